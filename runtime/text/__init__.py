"""Conversion of text to tokens and back: vocabularies, tokenizers, chat templates, stop strings."""
