"""Model files written piece by piece, and the choice of their tensor types."""
