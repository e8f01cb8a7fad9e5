"""Instructions, words, sizes and features: shared by Python and the kernels, without Numba."""
