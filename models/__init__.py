"""stoker.models."""
