"""Model files out of model files: a module a verb, a function each."""
