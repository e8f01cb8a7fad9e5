"""Results of generation: tokens, chunks of a stream, continuations, scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from gptx.generation.logprobs import Top
from gptx.generation.prompts import Prompt
from gptx.tokenization.protocol import Tokenizer

if TYPE_CHECKING:
    from gptx.html import Cell

MAX_REPR_CHARACTERS = 80  # of a text in the `repr` of its result
DARKEST_LOGPROB = math.log(1e-4)  # from which a token has the strongest color in HTML
FinishReason = Literal["stop", "length", "interrupted"]


class Token(NamedTuple):
    """One new token of one sequence.

    Attributes
    ----------
    sequence
        Index of the prompt, from 0.
    id
        Token id; None if an end token ended the sequence.
    logprob
        Log-probability in nats that the model gives the token, or the end token, before penalties
        and temperature; None if not requested.
    finish_reason
        "stop" or "length" for the last token of a sequence, None for the others.
    top_logprobs
        Token id -> log-probability, of the most probable tokens; None if not requested.
    end_id
        Token id of the end token that ended the sequence; None for other tokens.
    """

    sequence: int
    id: int | None
    logprob: float | None
    finish_reason: FinishReason | None
    top_logprobs: Top | None = None
    end_id: int | None = None


@dataclass(frozen=True, repr=False)
class Result:
    """The continuation of one prompt; `str(result)` is its text, and f"{result:>80}" formats it.

    Attributes
    ----------
    prompt
        The prompt as given: text or token ids.
    text
        Generated text, which continues the text of the prompt: it begins with a space if its first
        token begins a word. None for a model without a tokenizer.
    tokens
        Generated token ids, without the token that ended the sequence.
    logprobs
        Log-probability of each token in nats, before penalties and temperature, and then that of
        the end token if one ended the sequence; None if not requested.
    finish_reason
        "stop" (an end token or a stop string), "length" (max_tokens or the context) or
        "interrupted".
    seed
        Seed of the sampling; the same seed gives the same tokens again.
    prompt_tokens
        Number of prompt tokens after truncation.
    prompt_tps
        Prompt tokens per second until the first new token, those found in a cache included.
    generation_tps
        New tokens per second after the first one, in this sequence; the time that the caller takes
        between two of them counts. 0 with fewer than two tokens.
    time_to_first_token
        Seconds from the start of the batch to its first tokens.
    peak_memory
        Bytes: largest resident size of the process so far, or largest size of the device's memory
        pool.
    stopped_by
        The end token's id, or the stop string; None for another finish reason.
    top_logprobs
        For each of `logprobs`: token id -> log-probability in nats, of the N most probable tokens
        in descending order; None if not requested. The value of a chosen token is the same float as
        in `logprobs`.
    prompt_ids
        Token ids of the prompt after truncation.
    prompt_logprobs
        Log-probability of each of `prompt_ids`, given those before it; None for the first one. None
        if not requested.
    prompt_top_logprobs
        The same for the prompt as `top_logprobs`.
    texts
        Text of each token id with a log-probability; empty for a model without a tokenizer.
    cached_tokens
        Number of prompt tokens that were not computed, because a cache had them.
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
    stopped_by: int | str | None = None
    top_logprobs: list[Top] | None = None
    prompt_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: list[Top | None] | None = None
    texts: dict[int, str] = field(default_factory=dict)
    cached_tokens: int = 0

    @property
    def tokens_with_end(self) -> list[int]:
        """`tokens`, and then the end token if one ended the sequence: one for each logprob."""
        end = self.stopped_by
        return [*self.tokens, end] if isinstance(end, int) else self.tokens

    @property
    def mean_logprob(self) -> float:
        """Mean of `logprobs`, in nats per token; -inf without any."""
        logprobs = self.logprobs or [-math.inf]
        return math.fsum(logprobs) / len(logprobs)

    def __str__(self) -> str:
        return self.text or ""

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    def __repr__(self) -> str:
        output = _shortened(self.tokens if self.text is None else self.text)
        return (
            f"<gptx.Result {output}: {len(self.tokens)} tokens at {self.generation_tps:,.1f} t/s, "
            f"{self.finish_reason}, after {self.prompt_tokens} prompt tokens in "
            f"{self.time_to_first_token:.3f} s, seed {self.seed}>"
        )

    def _repr_html_(self) -> str:
        """Show the output in a notebook; with log-probabilities, each token on a color."""
        from gptx import html

        if self.logprobs is None:
            tokens = [html.Cell(str(self.tokens) if self.text is None else self.text)]
        else:
            tokens = _cells(self.tokens_with_end, self.logprobs, self.top_logprobs, self.texts)
        if self.prompt_logprobs is not None:
            scored = self.prompt_ids, self.prompt_logprobs, self.prompt_top_logprobs, self.texts
            tokens = [*_cells(*scored), *tokens]
        seed = f"seed {self.seed}"
        caption = f"{len(self.tokens)} tokens, {self.finish_reason}, {seed}"
        return html.fragment(caption, html.text(tokens))


@dataclass(frozen=True)
class Chunk:
    """One token of a stream, and the text that it completes.

    Attributes
    ----------
    text
        New text; empty if the token completes no character, or if a stop string may begin here.
    token
        Token id; None if an end token ended the sequence: `result.stopped_by` has its id.
    logprob
        Log-probability of the token, or of the end token, in nats; None if not requested.
    sequence
        Index of the continuation, from 0: i · n + j is copy j of prompt i.
    finish_reason, result
        Finish reason and `Result` of the sequence in its last chunk; None in the others.
    top_logprobs
        Token id -> log-probability, of the most probable tokens; None if not requested.
    """

    text: str
    token: int | None
    logprob: float | None
    sequence: int = 0
    finish_reason: FinishReason | None = None
    result: Result | None = None
    top_logprobs: Top | None = None

    def __str__(self) -> str:
        return self.text

    def __format__(self, spec: str) -> str:
        return format(self.text, spec)


@dataclass(frozen=True, repr=False)
class Score:
    """The log-probabilities of the tokens of a text, or of a choice after a context.

    Attributes
    ----------
    tokens
        Token ids of the text.
    logprobs
        Log-probability in nats of each token, given the tokens before it; None for the first one of
        a text. A choice has one for each token.
    top_logprobs
        For each of `logprobs`: token id -> log-probability, of the N most probable tokens in
        descending order; None if not requested.
    texts
        Text of each token id in the score; empty for a model without a tokenizer.
    """

    tokens: list[int]
    logprobs: list[float | None]
    top_logprobs: list[Top | None] | None = None
    texts: dict[int, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        return (
            f"<gptx.Score of {self.n_scored} tokens: loss {self.loss:.4f} nats per token, "
            f"perplexity {self.perplexity:.4g}>"
        )

    def _repr_html_(self) -> str:
        """Show the tokens in a notebook: the stronger the color, the less probable the token."""
        from gptx import html

        cells = _cells(self.tokens, self.logprobs, self.top_logprobs, self.texts)
        loss = f"{self.loss:.4f} nats per token, perplexity {self.perplexity:,.4g}"
        return html.fragment(f"{self.n_scored} tokens scored, {loss}", html.text(cells))

    @property
    def n_scored(self) -> int:
        """Number of tokens with a log-probability."""
        return sum(x is not None for x in self.logprobs)

    @property
    def total(self) -> float:
        """Sum of the log-probabilities, in nats."""
        return math.fsum(x for x in self.logprobs if x is not None)

    @property
    def loss(self) -> float:
        """Mean of -logprob, in nats per token."""
        return -self.total / self.n_scored

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite if that exceeds the range of a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def texts_of(
    tokenizer: Tokenizer, tokens: Iterable[int], tops: Iterable[Top | None] | None
) -> dict[int, str]:
    """Return the text of each token, and of the most probable ones in its place."""
    ids = {id for top in tops or () for id in top or ()}.union(tokens)
    return {id: tokenizer.decode([id]) for id in sorted(ids)}


def _cells(
    tokens: Sequence[int],
    logprobs: Sequence[float | None],
    tops: Sequence[Top | None] | None,
    texts: dict[int, str],
) -> list[Cell]:
    """Return tokens as cells of `gptx.html`, with their probabilities as colors and titles."""
    from gptx.html import Cell

    def describe(id: int, logprob: float) -> str:
        return f"{texts.get(id, str(id))!r} {math.exp(logprob):.2%}"

    cells = []
    for id, logprob, top in zip(tokens, logprobs, tops or [None] * len(tokens), strict=True):
        shown = texts.get(id, f"{id} ")
        if logprob is None:
            cells.append(Cell(shown, 0.0, f"id {id}"))
            continue
        lines = [f"{describe(id, logprob)}, {logprob:.3f} nats, id {id}"]
        lines += [describe(*pair) for pair in (top or {}).items()]
        cells.append(Cell(shown, -min(1.0, logprob / DARKEST_LOGPROB), "\n".join(lines)))
    return cells


def _shortened(value: str | list[int]) -> str:
    """Return the `repr` of a text or of token ids, shortened in the middle."""
    shown = repr(value)
    if len(shown) <= MAX_REPR_CHARACTERS:
        return shown
    half = MAX_REPR_CHARACTERS // 2 - 2
    return f"{shown[:half]} … {shown[-half:]}"
