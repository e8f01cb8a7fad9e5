"""The version, for the build and for `gptx --version`."""

__version__ = "0.1.0"
