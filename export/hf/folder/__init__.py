"""A Hugging Face folder as it lies there: its configuration and its tensors."""
