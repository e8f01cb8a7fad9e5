"""Containers: bytes on disk, without any knowledge of GPT-2."""
