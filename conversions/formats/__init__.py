"""Formats: one file each, reader and writer together."""
