"""Measurements: of devices, of models, of claims."""
