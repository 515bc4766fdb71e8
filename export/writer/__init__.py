"""Model files written piece by piece, and the tensor types that are chosen for them."""
