"""What comes back: results, the chunks of a stream, scores."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gptx.generation.engine import FinishReason
from gptx.generation.options import Prompt


@dataclass(frozen=True)
class Result:
    """One continuation; `str(result)` is its text.

    Attributes
    ----------
    prompt
        As it was given: text or token ids.
    text
        What was generated; None for a model without a tokenizer.
    tokens
        The generated token ids, without the end-of-text token.
    logprobs
        The logarithm of the model's own probability for each token; None unless asked for.
    finish_reason
        "stop" (end of text or a stop string), "length" (max_tokens or the context) or
        "interrupted".
    seed
        With which the same tokens come again.
    prompt_tokens
        How many tokens of the prompt were used.
    prompt_tps, generation_tps
        Prompt tokens per second until the first new token, those that a cache held included, and
        new tokens per second after it, what the caller did between two of them included (0 where
        there were none). In a batch, of this sequence.
    time_to_first_token
        Seconds from the start of its batch.
    peak_memory
        Bytes: the process's largest resident size so far, or what the device's pool has held.
    """

    prompt: Prompt
    text: str | None
    tokens: list[int]
    logprobs: list[float] | None
    finish_reason: FinishReason
    seed: int
    prompt_tokens: int
    prompt_tps: float
    generation_tps: float
    time_to_first_token: float
    peak_memory: int

    def __str__(self) -> str:
        return self.text or ""


@dataclass(frozen=True)
class Chunk:
    """A piece of a stream: one token, and the text that it completes (possibly none).

    The last one of a `sequence` (which prompt, counted from 0) has a `finish_reason`, and the
    `result` of the whole.
    """

    text: str
    token: int | None
    logprob: float | None
    sequence: int = 0
    finish_reason: FinishReason | None = None
    result: Result | None = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Score:
    """How probable a text is to the model.

    Attributes
    ----------
    tokens
        The text's token ids.
    logprobs
        The log-probability of each token given those before it; None for the first.
    """

    tokens: list[int]
    logprobs: list[float | None]

    @property
    def n_scored(self) -> int:
        """How many tokens have a log-probability."""
        return sum(x is not None for x in self.logprobs)

    @property
    def loss(self) -> float:
        """The mean of -logprob, in nats per token."""
        return -math.fsum(x for x in self.logprobs if x is not None) / self.n_scored

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is too large for a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf
