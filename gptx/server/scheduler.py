"""The scheduler: one model and one engine thread, which runs the requests of all clients.

Every other thread submits a request and gets its chunks in a function that the engine thread calls.
The engine thread alone touches the model while it serves.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from gptx.errors import GptxError, ParameterError
from gptx.generation.batching import Batch
from gptx.generation.logprobs import KnownLogprobs
from gptx.generation.request import Request
from gptx.generation.results import Chunk, Token
from gptx.generation.sequences import Sampling, make_sequences
from gptx.generation.sequences import Sequence as TokenSequence
from gptx.generation.streaming import Continuation
from gptx.generation.text_model import Model
from gptx.server.errors import QueueFull, Unavailable
from gptx.server.inbox import Bell

T = TypeVar("T")
OnEvent = Callable[[Chunk | Exception], None]

MAX_QUEUE = 64  # default number of requests that wait
MAX_RUNNING = 16  # default number of sequences in the running batch
CHUNK_TOKENS = 128  # default number of prompt tokens between two decode steps
PREFIX_BYTES = 2**29  # default memory of the prefix cache
MAX_PREFIXES = 64  # of the prefix cache: more are searched for longer than they are computed
MARGIN = 1.2  # factor of the expected time of a step, for which the budget has to last
LEAST_BUDGET = 1.5  # the same for the first step of a call, which may have to wait for another one
RELAXATION = 0.9  # factor of the expected time after a call for which it was too long
DECAY = 8  # steps after which a slow one counts for little
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
        self.submitted = scheduler.clock()
        self.deadline: float | None = None
        self.n_steps = 0  # since the last pause
        self.canceled = False
        self.outputs: dict[TokenSequence, Continuation] = {}  # of the sequences that have not ended
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
    max_running
        Number of sequences in the running batch.
    chunk_tokens
        Number of prompt tokens between two decode steps.
    prefix_bytes
        Memory of the prefix cache.

    Attributes
    ----------
    pace
        Times of steps so far, from which the time of the next one is expected.
    clock
        Function that returns the time in seconds.
    bell
        Bell that rings after the events of each step.
    """

    def __init__(
        self,
        model: Model,
        *,
        max_queue: int = MAX_QUEUE,
        max_running: int = MAX_RUNNING,
        chunk_tokens: int = CHUNK_TOKENS,
        prefix_bytes: int = PREFIX_BYTES,
    ) -> None:
        self.model = model
        self.max_queue = max_queue
        self._max_running = max_running
        self._chunk_tokens = chunk_tokens
        self._n_prefixes = min(MAX_PREFIXES, prefix_bytes // slot_bytes(model))
        self._batch: Batch | None = None
        self._owners: dict[TokenSequence, Ticket] = {}
        self.pace = Pace()
        self.clock: Callable[[], float] = time.perf_counter
        self.bell = Bell()
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
        ticket.submitted = self.clock()
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
            ticket.n_steps = 0
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
                self.bell.ring()
        except BaseException:
            logger.exception("the engine has ended")
        finally:
            self._gone = True
            self._refuse_all()
            self.bell.ring()

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
        """Move requests of the queue to the batch, while it has room."""
        while True:
            with self._changed:
                is_full = len(self._owners) >= self._max_running
                if not self._queue or is_full or (self._batch and self._batch.n_waiting):
                    return
                ticket = self._queue.popleft()
                self._running.append(ticket)
            try:
                self._join(ticket)
            except Exception as error:
                self._end(ticket, error)

    def _join(self, ticket: Ticket) -> None:
        """Add the sequences of a request to the batch; a paused request has them already."""
        batch = self._made_batch()
        options = ticket.request.options
        if not ticket.outputs:
            self._make_sequences(ticket)
        parts: list[list[TokenSequence]] = []  # sequences of a part read their prompt together
        for sequence in ticket.outputs:
            self._owners[sequence] = ticket
            if sequence.output:
                parts.append([sequence])
                continue
            sequence.prompt_logprobs = None
            is_copy = bool(parts) and parts[-1][0].prompt is sequence.prompt
            if is_copy and len(parts[-1]) < batch.max_running:
                parts[-1].append(sequence)
            else:
                parts.append([sequence])
        for part in parts:
            batch.add(
                part,
                known=options.cache,
                prompt_logprobs=None if part[0].output else options.prompt_logprobs,
                salt=ticket.salt,
            )

    def _made_batch(self) -> Batch:
        """Return the batch; it is made at the first request, and again after an error."""
        if self._batch is None:
            model = self.model
            with model.backend.scope():
                self._batch = Batch(
                    model.gpt2,
                    self._max_running + self._n_prefixes,
                    model.config.n_positions,
                    n_prefixes=self._n_prefixes,
                    chunk_tokens=self._chunk_tokens,
                )
        return self._batch

    def _make_sequences(self, ticket: Ticket) -> None:
        """Make the sequences of a request, and the texts that grow from their tokens."""
        model, request = self.model, ticket.request
        options = request.options
        end_ids = model.info.end_ids(
            ignore_eos=options.ignore_eos, stop_token_ids=options.stop_token_ids
        )
        made = make_sequences(
            request.check(model.info),
            Sampling(
                request.params,
                frozenset(end_ids),
                options.logprobs or options.selects,
                options.top_logprobs,
            ),
            model.config.n_positions,
            copies=options.best_of,
            max_tokens=options.max_tokens,
            overflow=options.overflow,
        )
        tokenizer = model.tokenizer if model.info.has_tokenizer else None
        for prompt, copies in zip(request.prompts, made, strict=True):
            for one in copies:
                ticket.outputs[one] = Continuation(
                    one.index, prompt, one, tokenizer, options.stop, model.backend
                )

    def _advance(self) -> None:
        """Run one step of the batch, and report its chunks."""
        for ticket in [one for one in self._running if one.canceled]:
            self._end(ticket)
        for ticket in [*self._running, *self._queue]:
            if self._is_late(ticket):
                if ticket.n_steps == 0:
                    self.pace.relax()
                self._end(ticket, Paused(ticket))
        # Canceled sequences leave in a step, too.
        if self._batch is None or not (self._owners or self._batch.n_waiting):
            return
        for ticket in self._running:
            ticket.n_steps += 1
        self.bell.ring()  # events before the step do not wait for it
        start = self.clock()
        try:
            made = self._batch.step()
        except Exception as error:
            logger.exception("a step failed: its requests end")
            self._batch = None
            for ticket in list(self._running):
                self._end(ticket, error)
            return
        if self._batch.n_computed:
            self.pace.add(self._batch.n_computed, self.clock() - start)
        for sequence, token in made:
            if (owner := self._owners.get(sequence)) is not None:
                self._add(owner, sequence, token)

    def _add(self, ticket: Ticket, sequence: TokenSequence, token: Token | GptxError) -> None:
        """Report a token of a request, or the error that ends it."""
        if isinstance(token, GptxError):
            if not isinstance(token, ParameterError):
                logger.error("a request failed in the engine: %s", token)
            self._end(ticket, token)
            return
        if sequence.index not in ticket.prompt_logprobs and sequence.prompt_logprobs is not None:
            ticket.prompt_logprobs[sequence.index] = sequence.prompt_logprobs
        is_first_copy = sequence.index % ticket.request.options.best_of == 0
        if is_first_copy and len(sequence.output) + (token.id is None) == 1:
            ticket.cached_tokens += sequence.n_reused
        chunk = ticket.outputs[sequence].add(token)
        if chunk.finish_reason is not None:
            self._leave(ticket, sequence)
            del ticket.outputs[sequence]
        self._report(ticket, chunk)
        if not ticket.outputs or ticket.canceled:
            self._end(ticket)

    def _leave(self, ticket: Ticket, sequence: TokenSequence) -> None:
        """Remove a sequence from the batch."""
        del self._owners[sequence]
        if self._batch is not None:
            self._batch.remove(sequence)

    def _n_running(self) -> int:
        return sum(bool(sequence.output) for sequence in self._owners)

    def _n_unread(self) -> int:
        """Return the number of prompt tokens that the next step reads at most."""
        unread = (sequence.prompt for sequence in self._owners if not sequence.output)
        return min(self._chunk_tokens, sum(map(len, unread)))

    def _is_late(self, ticket: Ticket) -> bool:
        """Return True if the next step would end after the budget of a request."""
        if ticket.deadline is None:
            return False
        n_next = max(self._n_running() + self._n_unread(), 1)
        return self.clock() + MARGIN * self.pace.expect(n_next) > ticket.deadline

    def least_budget(self, request: Request, ticket: Ticket | None = None) -> float:
        """Return the smallest budget in which a step of a request fits, in seconds."""
        n_next = sum(map(len, request.check(self.model.info)))
        if ticket is not None and ticket.outputs:
            n_next = sum(1 if one.output else len(one.prompt) for one in ticket.outputs)
        return LEAST_BUDGET * self.pace.expect(min(n_next, self._chunk_tokens))

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
        for sequence in ticket.outputs:
            if sequence in self._owners:
                self._leave(ticket, sequence)
        if not isinstance(event, Paused) or ticket.canceled:
            ticket.outputs = {}
        with self._changed:
            for place in (self._running, self._queue):
                if ticket in place:
                    place.remove(ticket)
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


def slot_bytes(model: Model) -> int:
    """Return the memory of one sequence in the KV cache, in bytes."""
    config = model.config
    itemsize = int(model.backend.cache_dtype[-2:]) // 8  # "bfloat16" has 2 bytes
    return 2 * config.n_layer * config.n_embd * config.n_positions * itemsize


class Pace:
    """Times of the steps of an engine, from which the time of the next one is expected."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}  # of a token, by the binary digits of their number

    def clear(self) -> None:
        """Forget all steps."""
        self._seconds.clear()

    def add(self, n_tokens: int, seconds: float) -> None:
        """Add a step that read this number of tokens; a slow one counts for longer."""
        key, found = n_tokens.bit_length(), seconds / n_tokens
        before = self._seconds.get(key, found)
        self._seconds[key] = max(found, before + (found - before) / DECAY)

    def relax(self) -> None:
        """Expect shorter steps: without a step, a slow one would count forever."""
        self._seconds = {key: RELAXATION * seconds for key, seconds in self._seconds.items()}

    def expect(self, n_tokens: int) -> float:
        """Return the expected seconds of a step; 0 before the first one."""
        if not self._seconds:
            return 0.0
        nearest = min(self._seconds, key=lambda key: abs(key - n_tokens.bit_length()))
        return self._seconds[nearest] * n_tokens
