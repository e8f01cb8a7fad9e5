"""The scheduler: one model and one engine thread, which runs the requests of all clients.

Every other thread submits a request and gets its chunks in a function that the engine thread calls.
The engine thread alone touches the model while it serves.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

from gptx.errors import ParameterError
from gptx.generation.engine import TokenGenerator, streams_of
from gptx.generation.logprobs import KnownLogprobs
from gptx.generation.request import Request
from gptx.generation.results import Chunk
from gptx.generation.scoring import MAX_BATCH_LOGITS
from gptx.generation.streaming import Continuation
from gptx.generation.text_model import Model
from gptx.server.errors import ApiError, QueueFull, Unavailable

T = TypeVar("T")
OnEvent = Callable[[Chunk | Exception], None]

MAX_QUEUE = 64  # default number of requests that wait
MARGIN = 1.2  # factor of the expected time of a step, for which the budget has to last
LEAST_BUDGET = 1.5  # the same for the first step of a call, which may have to wait for another one
logger = logging.getLogger("gptx.server")


class Paused(Exception):
    """The event of a request whose budget has ended; `Scheduler.resume` continues it."""

    def __init__(self, ticket: Ticket) -> None:
        super().__init__("the budget has ended")
        self.ticket = ticket


class Ticket:
    """A request of the scheduler.

    Attributes
    ----------
    request
        Prompts and options, checked.
    salt
        Word that separates the cached prefixes of different callers.
    prompt_logprobs
        Index of a continuation -> log-probabilities of its prompt without its first token, before
        its first chunk; empty if not requested.
    cached_tokens
        Number of prompt tokens that were not computed again.
    """

    def __init__(
        self, scheduler: Scheduler, request: Request, on_event: OnEvent, salt: str
    ) -> None:
        self.request = request
        self.salt = salt
        self.on_event = on_event
        self.prompt_logprobs: dict[int, KnownLogprobs] = {}
        self.cached_tokens = 0
        self.submitted = time.perf_counter()
        self.started: float | None = None
        self.deadline: float | None = None
        self.canceled = False
        self.run: _Run | None = None
        self._scheduler = scheduler

    def cancel(self) -> None:
        """Free the place of the request within one step; no event follows.

        Without effect after its last event.
        """
        self._scheduler.cancel(self)


class Scheduler:
    """Requests of all clients for one model, and the thread of its engine.

    Parameters
    ----------
    model
        The model; only the engine thread computes with it.
    max_queue
        Number of requests that wait for the engine; a further one is an error.

    Attributes
    ----------
    pace
        Times of steps so far, from which the time of the next one is expected.
    """

    def __init__(self, model: Model, *, max_queue: int = MAX_QUEUE) -> None:
        self.model = model
        self.max_queue = max_queue
        self.pace = Pace()
        self._changed = threading.Condition()
        self._queue: deque[Ticket] = deque()
        self._running: list[Ticket] = []
        self._calls: deque[Callable[[], None]] = deque()
        self._closed = False
        self._draining = False
        self._gone = False
        self._thread = threading.Thread(target=self._main, name="gptx-engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of requests that wait."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Number of requests in the engine."""
        return len(self._running)

    @property
    def healthy(self) -> bool:
        """True while the engine thread runs."""
        return not self._gone and not self._closed and self._thread.is_alive()

    def submit(
        self,
        request: Request,
        on_event: OnEvent,
        *,
        salt: str = "",
        budget: float | None = None,
    ) -> Ticket:
        """Add a request to the queue; any thread may call it.

        Parameters
        ----------
        request
            Its `check` has been called, or is called now.
        on_event
            Function that the engine thread calls with each chunk, or with the error that ends the
            request. The last chunks of all continuations, an error, or `Paused` end it.
        salt
            Word that separates the cached prefixes of different callers.
        budget
            Seconds from now after which the request is paused.

        Raises
        ------
        QueueFull
            Too many requests wait.
        Unavailable
            The server ends, or the engine has ended.
        GptxError
            The request is invalid.
        """
        request.check(self.model.info)
        ticket = Ticket(self, request, on_event, salt)
        self._enqueue(ticket, budget)
        return ticket

    def resume(self, ticket: Ticket, on_event: OnEvent, *, budget: float | None = None) -> None:
        """Continue a paused request with the same tokens as without the pause.

        Raises the errors of `submit`.
        """
        ticket.on_event = on_event
        ticket.submitted = time.perf_counter()
        ticket.canceled = False
        self._enqueue(ticket, budget)

    def call(self, function: Callable[[Model], T]) -> Future[T]:
        """Call a function between two steps in the engine thread.

        Raises
        ------
        QueueFull, Unavailable
        """
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function(self.model))
            except Exception as error:
                future.set_exception(error)

        with self._changed:
            self._check_open()
            if len(self._calls) >= self.max_queue:
                raise QueueFull(len(self._calls))
            self._calls.append(run)
            self._changed.notify()
        return future

    def cancel(self, ticket: Ticket) -> None:
        """Free the place of a request; see `Ticket.cancel`."""
        with self._changed:
            ticket.canceled = True
            if ticket in self._queue:
                self._queue.remove(ticket)
            self._changed.notify()

    def drain(self) -> None:
        """Refuse new requests from now on; those that run or wait continue."""
        self._draining = True

    @property
    def idle(self) -> bool:
        """True if no request runs or waits."""
        return not (self._queue or self._running or self._calls)

    def close(self) -> None:
        """End the engine thread after its current step; requests get an error."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _enqueue(self, ticket: Ticket, budget: float | None) -> None:
        with self._changed:
            self._check_open()
            if len(self._queue) >= self.max_queue:
                raise QueueFull(len(self._queue))
            ticket.deadline = None if budget is None else ticket.submitted + budget
            self._queue.append(ticket)
            self._changed.notify()

    def _check_open(self) -> None:
        if self._draining:
            raise Unavailable("the server ends: send the request to another one", "draining")
        if not self.healthy:
            raise Unavailable("the engine has ended: restart the server", "engine_gone")

    def _main(self) -> None:
        """Run requests and calls until the end; an error of the loop itself ends the engine."""
        try:
            while self._wait():
                self._call()
                self._admit()
                self._advance()
        except BaseException:
            logger.exception("the engine has ended")
        finally:
            self._gone = True
            self._refuse_all()

    def _wait(self) -> bool:
        """Wait for work; return False at the end."""
        with self._changed:
            while not (self._closed or self._calls or self._queue or self._running):
                self._changed.wait()
            return not self._closed

    def _call(self) -> None:
        """Run one call, so that calls and steps alternate."""
        if self._calls:
            self._calls.popleft()()

    def _admit(self) -> None:
        """Move the first request of the queue to the engine if that is free."""
        with self._changed:
            if self._running or not self._queue:
                return
            ticket = self._queue.popleft()
            self._running.append(ticket)
        ticket.started = ticket.started or time.perf_counter()
        try:
            if ticket.run is None:
                ticket.run = _Run(self.model, ticket)
        except Exception as error:
            self._end(ticket, error)

    def _advance(self) -> None:
        """Run one step of each request in the engine, and report its chunks."""
        for ticket in [one for one in self._running if one.canceled]:
            self._end(ticket)
        for ticket in [*self._running, *self._queue]:
            if self._is_late(ticket):
                self._end(ticket, Paused(ticket))
        for ticket in list(self._running):
            run, start = ticket.run, time.perf_counter()
            assert run is not None
            n_next = run.n_next
            try:
                chunks = run.step()
            except Exception as error:
                if not isinstance(error, ApiError | ParameterError):
                    logger.exception("a request failed in the engine")
                self._end(ticket, error)
                continue
            self.pace.add(n_next, time.perf_counter() - start)
            for chunk in chunks:
                self._report(ticket, chunk)
            if run.ended or ticket.canceled:
                self._end(ticket)

    def _is_late(self, ticket: Ticket) -> bool:
        """Return True if the next step of a request would end after its budget."""
        if ticket.deadline is None:
            return False
        expected = MARGIN * self.pace.expect(self._n_next(ticket.request, ticket))
        return time.perf_counter() + expected > ticket.deadline

    def _n_next(self, request: Request, ticket: Ticket | None) -> int:
        """Return the number of tokens that the next step of a request reads."""
        if ticket is not None and ticket.run is not None:
            return ticket.run.n_next
        return sum(map(len, request.check(self.model.info)))

    def least_budget(self, request: Request, ticket: Ticket | None = None) -> float:
        """Return the smallest budget in which a step of a request fits, in seconds."""
        return LEAST_BUDGET * self.pace.expect(self._n_next(request, ticket))

    def _report(self, ticket: Ticket, event: Chunk | Exception) -> None:
        """Call the function of a request; its error ends this request only."""
        if ticket.canceled:
            return
        try:
            ticket.on_event(event)
        except Exception:
            logger.exception("an event of a request was not delivered")
            ticket.canceled = True

    def _end(self, ticket: Ticket, event: Exception | None = None) -> None:
        """Free the place of a request, and report its last event, if it has one."""
        with self._changed:
            for place in (self._running, self._queue):
                if ticket in place:
                    place.remove(ticket)
        if not isinstance(event, Paused) or ticket.canceled:
            ticket.run = None
        if event is not None:
            self._report(ticket, event)

    def _refuse_all(self) -> None:
        """Answer all requests at the end of the engine."""
        with self._changed:
            tickets = [*self._running, *self._queue]
            self._running.clear()
            self._queue.clear()
            calls, self._calls = self._calls, deque()
        for ticket in tickets:
            self._report(ticket, Unavailable("the engine has ended", "engine_gone"))
        for call in calls:
            call()  # it needs no other thread now


class Pace:
    """Times of the steps of an engine, from which the time of the next one is expected."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}  # of a token, by the binary digits of their number

    def clear(self) -> None:
        """Forget all steps."""
        self._seconds.clear()

    def add(self, n_tokens: int, seconds: float) -> None:
        """Add a step that read this number of tokens; newer ones count more."""
        key, found = n_tokens.bit_length(), seconds / n_tokens
        self._seconds[key] = (self._seconds.get(key, found) + found) / 2

    def expect(self, n_tokens: int) -> float:
        """Return the expected seconds of a step; 0 before the first one."""
        if not self._seconds:
            return 0.0
        nearest = min(self._seconds, key=lambda key: abs(key - n_tokens.bit_length()))
        return self._seconds[nearest] * n_tokens


class _Run:
    """A request in the engine: its generators, batch by batch, and the text of each continuation.

    Attributes
    ----------
    ended
        True after the last chunk.
    n_next
        Number of tokens that the next step reads.
    """

    def __init__(self, model: Model, ticket: Ticket) -> None:
        request, self._ticket = ticket.request, ticket
        options, ids = request.options, request.check(model.info)
        tokenizer = model.tokenizer if model.info.has_tokenizer else None
        copies = options.best_of
        streams = streams_of([one for one in ids for _ in range(copies)])
        size = max(1, options.batch_size // copies)  # prompts of a batch
        if options.prompt_logprobs is not None:  # which need the logits of all tokens
            n_logits = model.config.vocab_size * min(max(map(len, ids)), model.config.n_positions)
            size = max(1, min(size, MAX_BATCH_LOGITS // n_logits))
        self._batches: deque[tuple[int, TokenGenerator]] = deque()
        self._outputs: list[Continuation] = []
        for first in range(0, len(ids), size):
            batch = slice(first, first + size)
            run = TokenGenerator(
                model.gpt2,
                ids[batch],
                request.params,
                copies=copies,
                streams=streams[first * copies : (first + size) * copies],
                max_tokens=options.max_tokens,
                eos_ids=model.info.end_ids(
                    ignore_eos=options.ignore_eos, stop_token_ids=options.stop_token_ids
                ),
                overflow=options.overflow,
                logprobs=options.logprobs or options.selects,
                top_logprobs=options.top_logprobs,
                prompt_logprobs=options.prompt_logprobs,
                cache=options.cache,
            )
            self._batches.append((first * copies, run))
            given = [prompt for prompt in request.prompts[batch] for _ in range(copies)]
            self._outputs += [
                Continuation(first * copies + row, prompt, used, tokenizer, options.stop, run, row)
                for row, (prompt, used) in enumerate(zip(given, run.prompts, strict=True))
            ]
        self._steps: Iterator[list[Chunk]] | None = None
        self._done: list[bool] = []  # for each sequence of the first batch

    @property
    def ended(self) -> bool:
        return not self._batches

    @property
    def n_next(self) -> int:
        if self._steps is not None or not self._batches:
            return self._done.count(False) or 1
        return sum(map(len, self._batches[0][1].prompts))

    def step(self) -> list[Chunk]:
        """Run one step; return its chunks."""
        if self._steps is None:
            self._steps = self._chunks(*self._batches[0])
        chunks = next(self._steps)
        if all(self._done):
            self._batches.popleft()
            self._steps = None
        return chunks

    def _chunks(self, first: int, run: TokenGenerator) -> Iterator[list[Chunk]]:
        self._done = [False] * len(run.prompts)
        for step in run:
            for row, scores in enumerate(run.prompt_logprobs):
                self._ticket.prompt_logprobs.setdefault(first + row, scores)
            chunks = []
            for token in step:
                chunk = self._outputs[first + token.sequence].add(token)
                if chunk.finish_reason is not None:
                    run.finish(token.sequence)
                    self._done[token.sequence] = True
                chunks.append(chunk)
            yield chunks
