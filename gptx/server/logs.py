"""The log: one line for each request, without its prompt unless the settings ask for it."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

logger = logging.getLogger("gptx.server.requests")
MAX_PATH_CHARACTERS = 200


class Record:
    """A request and its answer, for the log and the metrics.

    Attributes
    ----------
    status
        HTTP status; 0 before the answer.
    hung_up
        True if the client hung up before the end of the answer, or did not read it.
    usage
        Counts of tokens, of a generation.
    error
        Message of an error.
    prompt
        Prompt, if prompts are logged.
    """

    def __init__(self, method: str, path: str, client: str) -> None:
        self.method = method
        self.path = path[:MAX_PATH_CHARACTERS]
        self.client = client
        self.status = 0
        self.hung_up = False
        self.usage: dict[str, Any] | None = None
        self.error: str | None = None
        self.prompt: Any = None
        self._start = time.perf_counter()
        self._first: float | None = None

    def first_token(self) -> None:
        """Keep the time of the first call."""
        self._first = self._first or time.perf_counter()

    def count(self, usage: dict[str, Any]) -> None:
        """Keep the counts of tokens."""
        self.usage = usage

    @property
    def seconds(self) -> float:
        """Seconds since the arrival of the request."""
        return time.perf_counter() - self._start

    @property
    def first_token_seconds(self) -> float | None:
        """Seconds until the first token; None before it."""
        return None if self._first is None else self._first - self._start

    def facts(self) -> dict[str, Any]:
        """Return the fields of the line."""
        facts: dict[str, Any] = {
            "client": self.client,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "seconds": round(self.seconds, 4),
        }
        if self.usage is not None:
            facts["prompt_tokens"] = self.usage["prompt_tokens"]
            facts["completion_tokens"] = self.usage["completion_tokens"]
        if self.first_token_seconds is not None:
            facts["first_token_seconds"] = round(self.first_token_seconds, 4)
        if self.hung_up:
            facts["hung_up"] = True
        if self.error is not None:
            facts["error"] = self.error
        if self.prompt is not None:
            facts["prompt"] = self.prompt
        return facts

    def write(self, log_format: str) -> None:
        """Write the line, as "text" or as "json"."""
        facts = self.facts()
        if log_format == "json":
            line = json.dumps({"time": time.time(), **facts})
        else:
            shown = {name: value for name, value in facts.items() if name != "client"}
            request = [shown.pop(name) for name in ("method", "path", "status")]
            rest = (f"{name}={json.dumps(value)}" for name, value in shown.items())
            line = " ".join([self.client, *map(str, request), *rest])
        logger.info("%s", line)
