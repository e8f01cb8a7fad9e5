"""Containers: file formats below GPT-2, from bytes to named tensors and back."""
