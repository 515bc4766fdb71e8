"""Experts and weights that are read from flash while computing."""
