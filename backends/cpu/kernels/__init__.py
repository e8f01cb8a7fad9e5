"""Kernels of the NumPy backend, compiled by Numba."""
