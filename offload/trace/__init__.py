"""Recorded routing, and its replay through every cache policy."""
