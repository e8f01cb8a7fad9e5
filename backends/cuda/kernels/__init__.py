"""CUDA kernels, compiled by NVRTC on first use."""
