"""Hugging Face folders: their configuration, tensors and tokenizer in the terms of GGUF."""
