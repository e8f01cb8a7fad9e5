"""From chunks of tokens to the parts of an answer, the same for streams and whole answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from gptx.generation.logprobs import KnownLogprobs, Top
from gptx.generation.model_info import ModelInfo
from gptx.generation.results import Chunk
from gptx.tokenization.pipeline import PipelineTokenizer

NO_PROBABILITY = -9999.0  # the log-probability 0 has in JSON, which has no infinity
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Row(NamedTuple):
    """A token with its log-probability.

    Attributes
    ----------
    id
        Token id.
    logprob
        Log-probability in nats; None for the first token of a text.
    top
        The most probable tokens in its place; None if not requested.
    offset
        Number of characters before the token, from the start of the prompt.
    """

    id: int
    logprob: float | None
    top: Top | None
    offset: int


@dataclass
class Delta:
    """A part of one continuation.

    Attributes
    ----------
    index
        Index of the continuation.
    text
        New text.
    rows
        New tokens with log-probabilities, if requested.
    ids, prompt_ids
        Ids of the new tokens; those of the prompt, in the first part only.
    finish_reason, stopped_by
        See `gptx.Result`; None before the last part.
    """

    index: int
    text: str = ""
    rows: list[Row] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    prompt_ids: list[int] | None = None
    finish_reason: str | None = None
    stopped_by: int | str | None = None

    def add(self, other: Delta) -> None:
        """Append the part that follows."""
        self.text += other.text
        self.rows += other.rows
        self.ids += other.ids
        self.prompt_ids = self.prompt_ids or other.prompt_ids
        self.finish_reason = self.finish_reason or other.finish_reason
        self.stopped_by = other.stopped_by if self.stopped_by is None else self.stopped_by

    @property
    def is_empty(self) -> bool:
        """True if it has nothing to send."""
        return not (self.text or self.rows or self.finish_reason or self.prompt_ids)


class Writer:
    """The writer of the parts of one continuation.

    Parameters
    ----------
    index
        Index of the continuation.
    prompt_text, prompt_ids
        Prompt after truncation.
    echo
        True to repeat the prompt.
    has_logprobs
        True to return log-probabilities.
    only_prompt
        True to leave out the new tokens.
    skip_space
        True to leave out white space at the start.
    """

    def __init__(
        self,
        index: int,
        info: ModelInfo,
        prompt_text: str,
        prompt_ids: Sequence[int],
        *,
        echo: bool = False,
        has_logprobs: bool = False,
        only_prompt: bool = False,
        skip_space: bool = False,
    ) -> None:
        self.index = index
        self.n_tokens = 0  # generated, with the end token
        self.finish_reason: str | None = None
        self._info = info
        self._prompt_text = prompt_text
        self._prompt_ids = list(prompt_ids)
        self._echo = echo
        self._has_logprobs = has_logprobs
        self._only_prompt = only_prompt
        self._skip_space = skip_space
        self._is_first = True
        tokenizer = info.tokenizer if info.has_tokenizer else None
        self._decoder = tokenizer.decoder(prompt_ids) if tokenizer and has_logprobs else None
        self._offset = len(prompt_text)

    def add(self, chunk: Chunk, known: KnownLogprobs | None) -> Delta:
        """Return the part of a chunk; `known` has the log-probabilities of the prompt."""
        delta = Delta(self.index)
        if self._is_first:
            self._is_first = False
            delta.prompt_ids = self._prompt_ids
            if self._echo:
                delta.text = self._prompt_text
                delta.rows = self._prompt_rows(known) if self._has_logprobs else []
        self.n_tokens += 1
        if not self._only_prompt:
            delta.text += self._without_space(chunk.text)
            delta.rows += self._rows(chunk) if self._has_logprobs else []
            delta.ids = [] if chunk.token is None else [chunk.token]
        if chunk.result is not None:
            self.finish_reason = "length" if self._only_prompt else str(chunk.finish_reason)
            delta.finish_reason = self.finish_reason
            delta.stopped_by = None if self._only_prompt else chunk.result.stopped_by
        return delta

    def _without_space(self, text: str) -> str:
        if not self._skip_space:
            return text
        text = text.lstrip()
        self._skip_space = not text
        return text

    def _rows(self, chunk: Chunk) -> list[Row]:
        id = _id_of(chunk, self._info)
        row = Row(id, chunk.logprob, chunk.top_logprobs, self._offset)
        if self._decoder is not None:
            self._offset += len(self._decoder.feed(id))
        return [row]

    def _prompt_rows(self, known: KnownLogprobs | None) -> list[Row]:
        assert known is not None
        logprobs: list[float | None] = [None, *known.logprobs]
        tops: list[Top | None] = [None] * len(logprobs)
        if known.top_logprobs is not None:
            tops[1:] = known.top_logprobs
        decoder = self._info.tokenizer.decoder() if self._info.has_tokenizer else None
        rows, offset = [], 0
        for row in zip(self._prompt_ids, logprobs, tops, strict=True):
            rows.append(Row(*row, offset))
            offset += len(decoder.feed(row[0])) if decoder is not None else 0
        return rows


def _id_of(chunk: Chunk, info: ModelInfo) -> int:
    """Return the token of a chunk, or the end token that ended its continuation."""
    if chunk.token is not None:
        return chunk.token
    end = chunk.result.stopped_by if chunk.result is not None else None
    return end if isinstance(end, int) else info.config.eos_token_ids[0]


def token_name(info: ModelInfo, id: int) -> str:
    r"""Return the text of a token, and a name that is unique for bytes without a character.

    It is "bytes:\xe2\x82" for a byte-level BPE, "token_id:5" for other tokens without a text.
    """
    if not info.has_tokenizer:
        return f"token_id:{id}"
    tokenizer = info.tokenizer
    if isinstance(tokenizer, PipelineTokenizer) and tokenizer.has_bytes:
        piece = tokenizer.piece(id)
        if isinstance(piece, bytes):
            return f"bytes:{repr(piece)[2:-1]}"
        return piece or f"token_id:{id}"
    text = tokenizer.decode([id])
    return f"token_id:{id}" if not text or REPLACEMENT in text else text


def token_bytes(info: ModelInfo, id: int) -> list[int] | None:
    """Return the bytes of a token; None if its tokenizer has no bytes for tokens."""
    if not info.has_tokenizer:
        return None
    tokenizer = info.tokenizer
    if isinstance(tokenizer, PipelineTokenizer) and tokenizer.has_bytes:
        return list(tokenizer.token_bytes(id))
    return list(tokenizer.decode([id]).encode())


def text_logprobs(info: ModelInfo, rows: Sequence[Row], *, by_id: bool = False) -> dict[str, Any]:
    """Return the log-probabilities in the form of /v1/completions.

    `by_id` names each token by its id, such as "token_id:5", in place of its text.
    """
    name = _id_name if by_id else partial(token_name, info)
    return {
        "tokens": [name(row.id) for row in rows],
        "token_logprobs": [finite(row.logprob) for row in rows],
        "top_logprobs": [_named_top(name, row) for row in rows],
        "text_offset": [row.offset for row in rows],
    }


def chat_logprobs(info: ModelInfo, rows: Sequence[Row]) -> dict[str, Any]:
    """Return the log-probabilities in the form of /v1/chat/completions."""

    def entry(id: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": token_name(info, id),
            "logprob": finite(logprob),
            "bytes": token_bytes(info, id),
        }

    return {
        "content": [
            {
                **entry(row.id, row.logprob),
                "top_logprobs": [entry(*pair) for pair in (row.top or {}).items()],
            }
            for row in rows
        ],
        "refusal": None,
    }


def _id_name(id: int) -> str:
    return f"token_id:{id}"


def _named_top(name_of: Callable[[int], str], row: Row) -> dict[str, float | None] | None:
    """Return the most probable tokens by unique names, and the token itself."""
    if row.logprob is None:
        return None
    named: dict[str, float | None] = {}
    for id, logprob in {**(row.top or {}), row.id: row.logprob}.items():
        name = name_of(id)
        named[name if name not in named else f"token_id:{id}"] = finite(logprob)
    return named


def finite(logprob: float | None) -> float | None:
    """Return a log-probability as JSON has it."""
    if logprob is None or math.isfinite(logprob):
        return logprob
    return NO_PROBABILITY
