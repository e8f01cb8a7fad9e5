"""The version, read by the build and by `gptx --version`."""

__version__ = "0.1.0"
