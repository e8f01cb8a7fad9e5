"""The run of a batch: items that have no result yet, several at a time.

An item is claimed when its turn comes, and its result is appended as soon as it is there. A killed
run loses the items that were in flight; the next run computes these and the rest.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

from gptx.cluster.in_process import Response
from gptx.cluster.items import WHOLE, Item, Shard, item_id, parse_item, read_lines
from gptx.cluster.results import ResultFile
from gptx.errors import DataError, GptxError, HubUnavailableError
from gptx.server.errors import ApiError

Answer = Callable[[str, Any], Awaitable[Response]]
IN_FLIGHT = 16  # default number of items that are computed at a time
DUPLICATE = "duplicate_custom_id"


@dataclass
class Progress:
    """Counts of one run.

    Attributes
    ----------
    n_lines
        Number of lines of the input that are not blank.
    n_done
        Number of lines that have a result, also of earlier runs.
    completed, failed
        Number of results of this run: of requests that were answered, and of lines that were
        refused.
    unanswered
        Number of lines without a result, because the engine failed.
    prompt_tokens, new_tokens
        Number of tokens that this run has read and generated.
    seconds
        Time of this run.
    """

    n_lines: int
    n_done: int
    completed: int = 0
    failed: int = 0
    unanswered: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    start: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of this run."""
        return self.new_tokens / max(self.seconds, 1e-9)

    def count(self, response: Response | None, error: ApiError | None) -> None:
        """Count a result."""
        self.n_done += 1
        if error is not None:
            self.failed += 1
        elif response is not None:
            self.completed += 1
            usage = response.body.get("usage", {})
            self.prompt_tokens += usage.get("prompt_tokens", 0)
            self.new_tokens += usage.get("completion_tokens", 0)


@dataclass
class Batch:
    """An input, an output, and what to do about each item.

    Attributes
    ----------
    source
        Input file: one JSON object a line, see `gptx.cluster.items`.
    results
        Output file.
    seed
        Key of the seeds of requests without one.
    shard
        Part of the input that this machine computes.
    """

    source: Path
    results: ResultFile
    seed: int = 0
    shard: Shard = WHOLE

    def begin(self) -> Progress:
        """Count the lines, and check that all results belong to them.

        Raises
        ------
        NotFoundError, StorageError
            The input cannot be read.
        DataError
            The output has results of another input.
        """
        n_lines, n_done = 0, 0
        for line, data in read_lines(self.source, self.shard):
            n_lines += 1
            n_done += item_id(line, data) in self.results.done
        if n_done < len(self.results.done):
            raise DataError(
                f"{self.results.path} has {len(self.results.done) - n_done} results of other lines "
                f"than those of {self.source}: give the same input and shard, or another output"
            )
        return Progress(n_lines, n_done)

    def items(self) -> Iterator[Item]:
        """Yield the items without a result, in the order of the input."""
        first: dict[str, int] = {}  # custom_id -> line
        for line, data in read_lines(self.source, self.shard):
            is_done = item_id(line, data) in self.results.done
            item = parse_item(line, data, self.seed)
            name = item.custom_id
            if name is not None and first.setdefault(name, line) != line and item.error is None:
                message = f"custom_id is that of line {first[name]}: give each line its own"
                error = ApiError(400, message, param="custom_id", code=DUPLICATE)
                item = Item(line, item.id, name, error=error)
            if not is_done:
                yield item

    async def run(
        self,
        answer: Answer,
        progress: Progress,
        report: Callable[[Item, str | None], None],
        in_flight: int = IN_FLIGHT,
    ) -> None:
        """Compute all items without a result.

        Parameters
        ----------
        answer
            Function that sends a body to an endpoint.
        report
            Function that gets each item after its result is written, and the message of its error.
        in_flight
            Number of items that are computed at a time.

        Raises
        ------
        HubUnavailableError
            The server has ended. Items in flight have no result.
        StorageError
            The output cannot be written.
        """
        items = self.items()

        async def work() -> None:
            for item in items:  # the items are shared: each is claimed once
                error, response = item.error, None
                if error is None:
                    response = await answer(item.url, item.body)
                    error = _error_of(response)
                if error is not None and error.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                    progress.unanswered += 1  # the next run computes it
                else:
                    self.results.append(item, _described(item, response), error)
                    progress.count(response, error)
                report(item, None if error is None else error.message)
                await asyncio.sleep(0)  # a run of invalid lines lets the others work

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(in_flight):
                    group.create_task(work())
        except* GptxError as errors:
            raise errors.exceptions[0] from None
        finally:
            self.results.flush()


def _error_of(response: Response) -> ApiError | None:
    """Return the error of a request that was not answered.

    Raises
    ------
    HubUnavailableError
        The server has ended.
    """
    if response.status < HTTPStatus.BAD_REQUEST:
        return None
    error = response.body["error"]
    if response.status == HTTPStatus.SERVICE_UNAVAILABLE:
        raise HubUnavailableError(f"{error['message']}: run the command again")
    return ApiError(
        response.status, error["message"], param=error.get("param"), code=error.get("code")
    )


def _described(item: Item, response: Response | None) -> dict[str, Any] | None:
    """Return the response in OpenAI's batch format."""
    if response is None:
        return None
    return {
        "status_code": response.status,
        "request_id": response.body.get("id", item.id),
        "body": response.body,
    }
