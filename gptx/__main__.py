"""The command line, as `python -m gptx`."""

from gptx.cli import main

if __name__ == "__main__":
    main()
