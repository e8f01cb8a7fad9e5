"""From new tokens to text as it grows: half characters, stop strings, times."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import cast

from gptx.generation.engine import FinishReason, Token, TokenGenerator
from gptx.generation.options import Prompt
from gptx.generation.results import Chunk, Result
from gptx.tokenization.decoder import TextDecoder
from gptx.tokenization.protocol import Tokenizer


class Output:
    """One prompt's output while it grows: text, stop strings, times."""

    def __init__(
        self,
        sequence: int,
        prompt: Prompt,
        prompt_tokens: int,
        tokenizer: Tokenizer | None,
        stop: list[str],
        run: TokenGenerator,
    ) -> None:
        self._sequence = sequence
        self._prompt = prompt
        self._prompt_tokens = prompt_tokens
        self._decoder = tokenizer and TextDecoder(tokenizer)
        self._stop = StopFinder(stop)
        self._run = run
        self._pieces: list[tuple[int | None, float | None, str]] = []  # token, its logprob, text
        self._first = self._last = 0.0
        self._done: Result | None = None

    def add(self, token: Token) -> Chunk:
        self._last = time.perf_counter()
        self._first = self._first or self._last
        reason = token.finish_reason
        text = ""
        if token.id is not None and self._decoder:
            text = self._stop.feed(self._decoder.feed(token.id))
        if reason and self._decoder:
            text += self._stop.feed(self._decoder.finish()) + self._stop.finish()
        if self._stop.found:
            reason = "stop"
        self._pieces.append((token.id, token.logprob, text))  # all at once, or Ctrl-C parts them
        if reason:
            self._done = self.result(reason)
        return Chunk(text, token.id, token.logprob, self._sequence, reason, self._done)

    def result(self, reason: FinishReason) -> Result:
        if self._done is not None:
            return self._done
        rest = self._stop.finish() if reason == "interrupted" else ""
        tokens = [id for id, _, _ in self._pieces if id is not None]
        logprobs = [logprob for _, logprob, _ in self._pieces if logprob is not None]
        n, seconds = len(tokens), self._last - self._first
        first = self._run.prefill_seconds
        return Result(
            prompt=self._prompt,
            text="".join(text for _, _, text in self._pieces) + rest if self._decoder else None,
            tokens=tokens,
            logprobs=logprobs if self._run.logprobs else None,
            finish_reason=reason,
            seed=cast("int", self._run.params.seed),
            prompt_tokens=self._prompt_tokens,
            prompt_tps=self._prompt_tokens / first if first else 0.0,
            generation_tps=(n - 1) / seconds if n > 1 and seconds else 0.0,
            time_to_first_token=first,
            peak_memory=self._run.model.backend.peak_memory(),
        )


class StopFinder:
    """Finds stop strings in text that comes in pieces, and holds back what may begin one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """The text that can be shown now; nothing once a stop string was found."""
        if self.found:
            return ""
        self._held += text
        starts = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if starts:
            self.found = True
            return self._held[: min(starts)]
        keep = 0
        for stop in self._stop:
            longest = min(len(stop) - 1, len(self._held))
            keep = max(
                keep, next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
            )
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(shown) :]
        return shown

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        rest, self._held = self._held, ""
        return "" if self.found else rest
