"""Text that grows from tokens: complete characters, stop strings, times."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import cast

from gptx.backends import Backend
from gptx.generation.prompts import Prompt
from gptx.generation.results import Chunk, FinishReason, Result, Token, texts_of
from gptx.generation.sequences import Sequence as TokenSequence
from gptx.tokenization.protocol import StreamingTokenizer, Tokenizer


class Continuation:
    """The continuation of one prompt while it grows: tokens, text, times.

    Parameters
    ----------
    index
        Index of the continuation in the request.
    prompt
        The prompt as given.
    sequence
        The sequence of the tokens.
    tokenizer
        None for a model without a tokenizer: the continuation then has no text.
    stop
        Stop strings.
    backend
        The backend that computes it, for its peak of memory.
    """

    def __init__(
        self,
        index: int,
        prompt: Prompt,
        sequence: TokenSequence,
        tokenizer: StreamingTokenizer | None,
        stop: list[str],
        backend: Backend,
    ) -> None:
        self._index = index
        self._prompt = prompt
        self._sequence = sequence
        self._prompt_ids = list(sequence.prompt)
        self._tokenizer = tokenizer
        self._decoder = tokenizer and tokenizer.decoder(self._prompt_ids)
        self._has_space = tokenizer is not None and _loses_space(
            prompt, self._prompt_ids, tokenizer
        )
        self._stop = StopFinder(stop)
        self._backend = backend
        self._pieces: list[tuple[Token, str]] = []
        self._first_time = self._last_time = 0.0
        self._result: Result | None = None

    def add(self, token: Token) -> Chunk:
        """Add a token; return the chunk of the stream that reports it."""
        self._last_time = time.perf_counter()
        self._first_time = self._first_time or self._last_time
        reason = token.finish_reason
        text = ""
        if token.id is not None and self._decoder:
            text = self._stop.feed(self._after_prompt(self._decoder.feed(token.id)))
        if reason and self._decoder:
            rest = self._after_prompt(self._decoder.finish())
            text += self._stop.feed(rest) + self._stop.finish()
        if self._stop.found is not None:
            reason = "stop"
        self._pieces.append((token, text))  # one call: Ctrl-C cannot split it
        if reason:
            self._result = self.result(reason)
        return Chunk(
            text,
            token.id,
            token.logprob,
            self._index,
            reason,
            self._result,
            token.top_logprobs,
        )

    def _after_prompt(self, text: str) -> str:
        """Leave out the space before the first word if the prompt already has it."""
        if text and self._has_space:
            self._has_space = False
            return text.removeprefix(" ")
        return text

    def result(self, reason: FinishReason) -> Result:
        """Return the result so far; `reason` is its finish reason if it has none yet."""
        if self._result is not None:
            return self._result
        rest = self._stop.finish()  # empty unless the run was interrupted
        sequence, made = self._sequence, [token for token, _ in self._pieces]
        sampling = sequence.sampling
        tokens = [token.id for token in made if token.id is not None]
        logprobs = [token.logprob for token in made if token.logprob is not None]
        top = [token.top_logprobs for token in made if token.top_logprobs is not None]
        n, seconds = len(tokens), self._last_time - self._first_time
        prefill_seconds = sequence.prefill_seconds
        stopped_by = made[-1].end_id if made and self._stop.found is None else self._stop.found
        of_prompt = sequence.prompt_logprobs
        texts: dict[int, str] = {}
        if self._tokenizer and sampling.logprobs:
            ids = [cast("int", token.end_id if token.id is None else token.id) for token in made]
            texts = texts_of(self._tokenizer, ids, top)
        if self._tokenizer and of_prompt:
            texts |= texts_of(self._tokenizer, self._prompt_ids, of_prompt.top_logprobs)
        return Result(
            prompt=self._prompt,
            text="".join(text for _, text in self._pieces) + rest if self._decoder else None,
            tokens=tokens,
            logprobs=logprobs if sampling.logprobs else None,
            finish_reason=reason,
            seed=cast("int", sampling.params.seed),
            prompt_tokens=len(self._prompt_ids),
            prompt_tps=len(self._prompt_ids) / prefill_seconds if prefill_seconds else 0.0,
            generation_tps=(n - 1) / seconds if n > 1 and seconds else 0.0,
            time_to_first_token=prefill_seconds,
            peak_memory=self._backend.peak_memory(),
            stopped_by=stopped_by,
            top_logprobs=top if sampling.top_logprobs else None,
            prompt_ids=self._prompt_ids,
            prompt_logprobs=[None, *of_prompt.logprobs] if of_prompt else None,
            prompt_top_logprobs=(
                [None, *of_prompt.top_logprobs]
                if of_prompt and of_prompt.top_logprobs is not None
                else None
            ),
            texts=texts,
            cached_tokens=sequence.n_reused,
        )


def _loses_space(prompt: Prompt, ids: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Test for a space at the end of a prompt that its tokens do not have, as in WordPiece."""
    ends = isinstance(prompt, str) and prompt[-1:].isspace()
    return ends and not tokenizer.decode(ids)[-1:].isspace()


class StopFinder:
    """Search for stop strings in text that arrives in pieces.

    It holds back text that may be the start of a stop string.

    Attributes
    ----------
    found
        The stop string that appeared; None before that.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str) -> str:
        """Add text; return the part that can no longer belong to a stop string.

        After a stop string, it is empty.
        """
        if self.found is not None:
            return ""
        self._held += text
        starts = [(at, stop) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if starts:
            first, self.found = min(starts)
            return self._held[:first]
        n_held = 0
        for stop in self._stop:
            longest = min(len(stop) - 1, len(self._held))
            n_held = max(
                n_held, next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
            )
        shown = self._held[: len(self._held) - n_held]
        self._held = self._held[len(shown) :]
        return shown

    def finish(self) -> str:
        """Return the text held back, at the end of all text."""
        rest, self._held = self._held, ""
        return rest if self.found is None else ""
