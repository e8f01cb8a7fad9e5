"""The NumPy backend's ops on many rows: products on threads, fused row functions, the optimizer."""
