"""Checks of the CUDA backend and its speed beside PyTorch; see README.md."""
