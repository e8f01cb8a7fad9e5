"""Kernels on Intel's matrix unit, AMX."""
