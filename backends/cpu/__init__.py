"""The NumPy backend: the CPU, with BLAS threads and with compiled kernels."""
