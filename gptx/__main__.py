"""`python -m gptx` is the command line."""

from gptx.cli import main

if __name__ == "__main__":
    main()
