"""Commands of the `gptx` command line, one file each."""
