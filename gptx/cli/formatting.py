"""Sizes in bytes as text."""

from __future__ import annotations


def format_size(n_bytes: float) -> str:
    """Return a number of bytes with its unit: "497.8 MB"."""
    if n_bytes < 1000:
        return f"{n_bytes:.0f} bytes"
    for unit in ("kB", "MB"):
        n_bytes /= 1000
        if n_bytes < 1000:
            return f"{n_bytes:.1f} {unit}"
    return f"{n_bytes / 1000:.1f} GB"
