"""Everything of a model but its weights: files, config and tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from gptx.config import GPT2Config
from gptx.errors import TokenizerError, argument
from gptx.model_files import ModelFiles
from gptx.tokenization.finding import describe_unreadable
from gptx.tokenization.pipeline import PipelineTokenizer
from gptx.tokenization.plugged import plug
from gptx.tokenization.protocol import StreamingTokenizer, Tokenizer


class ModelInfo:
    """Everything of a model but its weights.

    Parameters
    ----------
    tokenizer
        Any object with encode, decode and vocab_size. None: that of the files, if they have one.

    Attributes
    ----------
    files
        Files of the model.
    config
        Settings of the model.
    """

    def __init__(
        self, files: ModelFiles, config: GPT2Config, tokenizer: Tokenizer | None = None
    ) -> None:
        self.files = files
        self.config = config
        self._tokenizer = None if tokenizer is None else plug(tokenizer)

    @property
    def name(self) -> str:
        """Name of the model as given: an embedded name, a path or a Hub id."""
        return self.files.name

    @property
    def has_tokenizer(self) -> bool:
        """True if the model has a tokenizer."""
        return self._tokenizer is not None or bool(self.files.tokenizer)

    def end_ids(self, *, ignore_eos: bool = False, stop_token_ids: Sequence[int] = ()) -> list[int]:
        """Return the token ids that end a sequence, without duplicates."""
        of_model = () if ignore_eos else self.config.eos_token_ids
        return list(dict.fromkeys([*of_model, *stop_token_ids]))

    @cached_property
    def _token_texts(self) -> list[str]:
        """Text of each token of the vocabulary."""
        size = min(self.config.vocab_size, self.tokenizer.vocab_size)
        return [self.tokenizer.decode([id]) for id in range(size)]

    def tokens_with(self, text: str) -> list[int]:
        """Return the ids of the tokens whose text contains `text`; none without a tokenizer."""
        if not self.has_tokenizer:
            return []
        return [id for id, token in enumerate(self._token_texts) if text in token]

    @cached_property
    def tokenizer(self) -> StreamingTokenizer:
        """Tokenizer of the model, read at the first use.

        Raises
        ------
        TokenizerError
            The model has none, or its files are damaged.
        """
        if self._tokenizer is not None:
            return self._tokenizer
        if self.files.tokenizer:
            return PipelineTokenizer(self.files.tokenizer)
        if unreadable := describe_unreadable(self.files.folder):
            raise TokenizerError(f"{self.name} has no tokenizer that gptx reads: {unreadable}")
        if self.files.revision is None:
            other = f"put tokenizer.json (or vocab.json and merges.txt) into {self.files.folder}"
        else:  # its cache may be incomplete
            other = f"run `gptx download {self.name}` with a connection if the Hub has one"
        raise TokenizerError(
            f"{self.name} has no tokenizer: give {argument('tokenizer')}, a folder or a model "
            f"that has one (such as gpt2), or {other}; Python also takes token ids in place of text"
        )
