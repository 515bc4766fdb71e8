"""Engines behind the API: the native one, onnxruntime for ONNX files, llama.cpp for the rest.

A backend has an engine whose sequences evaluate tokens; tokenizer, chat templates, sampling,
sessions and statistics are stoker's own.
"""
