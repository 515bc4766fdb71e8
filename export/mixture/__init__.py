"""Mixtures of experts: their sources, their refactoring, and how their routers learn."""
