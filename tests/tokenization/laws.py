"""The laws of a tokenizer that gptx makes of a text."""

from __future__ import annotations

from pathlib import Path

import tokenizers

from gptx.tokenization.pipeline import PipelineTokenizer


class Saved:
    """A tokenizer, its files, and both readers of them.

    Parameters
    ----------
    made
        The tokenizer.
    folder
        Folder for its files.
    """

    def __init__(self, made: PipelineTokenizer, folder: Path) -> None:
        made.save(folder, context=64)
        read = PipelineTokenizer.of_folder(folder)
        assert read is not None
        self.made, self.read = made, read
        self.library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    def check(self, text: str) -> None:
        """Check the round trip of a text, its ids from the files, and the stream of its tokens."""
        ids = self.made.encode(text)
        assert self.made.decode(ids) == text
        assert self.read.encode(text) == ids
        self.library.encode_special_tokens = True
        assert self.library.encode(text, add_special_tokens=False).ids == ids
        assert self.library.decode(ids, skip_special_tokens=False) == text
        decoder = self.made.decoder()
        assert "".join([*map(decoder.feed, ids), decoder.finish()]) == text


LINES = (
    "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n"
    "First Citizen:\nYou are all resolved rather to die than to famish?\n"
)
