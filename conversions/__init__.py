"""Readers and writers of foreign weight formats, one file each (see CONTRIBUTING.md)."""
