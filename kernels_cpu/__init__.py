"""The CPU kernels, which are C++ and part of the core."""
