"""Files of others and of our own: read whole within bounds, written under their final name."""
