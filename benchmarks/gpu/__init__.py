"""Checks and times on a GPU."""
