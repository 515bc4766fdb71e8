"""Reading of whole files within bounds, and writing under a final name."""
