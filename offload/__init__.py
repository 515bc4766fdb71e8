"""Reading of experts and weights from flash during computation."""
