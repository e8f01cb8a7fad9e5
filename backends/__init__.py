"""Backends: the array libraries that gptx runs on."""
