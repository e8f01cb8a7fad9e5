"""The NumPy backend: ops on BLAS threads, and a compiled forward pass by Numba."""
