"""stoker.kernels_cpu."""
