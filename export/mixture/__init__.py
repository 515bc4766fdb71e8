"""Mixtures of experts: what they are made from and what their routers learn."""
