"""Text to tokens and back: vocabularies, tokenizers, chat templates, stop strings."""
