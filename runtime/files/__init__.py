"""Reading of whole files within bounds, and checks of output paths."""
