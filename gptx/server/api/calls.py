"""A call of the API: a request in the scheduler, and its answer, whole or as a stream."""

from __future__ import annotations

import contextlib
import math
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from gptx.generation.request import Request
from gptx.generation.results import Result
from gptx.server.api.writing import Delta, Writer
from gptx.server.errors import ApiError, too_long
from gptx.server.inbox import Inbox
from gptx.server.logs import Record
from gptx.server.scheduler import Paused, Scheduler, Ticket
from gptx.server.states import States
from gptx.server.streams import encode_event, encode_json


class Format(Protocol):
    """The JSON form of an answer, of one endpoint."""

    prefix: str  # of the id
    object: str
    stream_object: str

    def choice(self, call: Call, delta: Delta) -> dict[str, Any]:
        """Return a continuation as an item of `choices`."""

    def stream_choice(self, call: Call, delta: Delta) -> dict[str, Any]:
        """Return a part of a continuation as an item of `choices`."""

    def first_choices(self, call: Call) -> list[dict[str, Any]]:
        """Return the items of `choices` before the first token of a stream."""


@dataclass
class Call:
    """A call of the API, from its first request to the last one that continues it.

    Attributes
    ----------
    format
        JSON form of the answer.
    name
        Name of the model.
    request
        Prompts and options, checked.
    ticket
        The request in the scheduler; None before its submission.
    writers
        One for each continuation that is generated.
    n, copies
        Numbers of continuations of a prompt that are returned, and that are generated.
    logprobs
        Number of most probable tokens; None for no log-probabilities.
    prompt_tokens
        Number of tokens of all prompts.
    """

    format: Format
    name: str
    scheduler: Scheduler
    request: Request
    writers: list[Writer]
    prompt_tokens: int
    n: int = 1
    copies: int = 1
    logprobs: int | None = None
    has_ids: bool = False
    names_by_id: bool = False
    ticket: Ticket | None = None
    id: str = ""
    created: int = 0
    results: dict[int, Result] = field(default_factory=dict)
    state: str | None = None
    continued: str | None = None
    tokens_before: int = 0  # of the calls before this one

    def begin(self, continued: str | None = None) -> None:
        """Give the call an id and a time; `continued` is the state that it continues."""
        self.continued = continued
        self.id = f"{self.format.prefix}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.state = None
        self.tokens_before = sum(writer.n_tokens for writer in self.writers)

    @property
    def n_ends(self) -> int:
        """Number of continuations that have not ended."""
        return sum(writer.finish_reason is None for writer in self.writers)

    @property
    def usage(self) -> dict[str, Any]:
        """Counts of tokens, in OpenAI's form."""
        new = sum(writer.n_tokens for writer in self.writers) - self.tokens_before
        cached = self.ticket.cached_tokens if self.ticket is not None else 0
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self.prompt_tokens + new,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def ids(self, delta: Delta) -> dict[str, Any]:
        """Return the token ids of a part for its item of `choices`, if they are requested."""
        if not self.has_ids:
            return {}
        prompt = {} if delta.prompt_ids is None else {"prompt_token_ids": delta.prompt_ids}
        return {"token_ids": delta.ids, **prompt}

    def head(self, object: str) -> dict[str, Any]:
        """Return the fields of each answer and each part of a stream."""
        return {
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.name,
            "system_fingerprint": f"fp_{self.scheduler.model.fingerprint}",
        }

    def select(self, deltas: Sequence[Delta]) -> list[Delta]:
        """Return the `n` best continuations of each prompt, by mean log-probability, best first."""
        if self.copies == self.n:
            return list(deltas)
        best: list[Delta] = []
        for first in range(0, len(deltas), self.copies):
            made = deltas[first : first + self.copies]
            best += sorted(made, key=self._mean_logprob, reverse=True)[: self.n]
        for index, delta in enumerate(best):
            delta.index = index
        return best

    def _mean_logprob(self, delta: Delta) -> float:
        return self.results[delta.index].mean_logprob


@dataclass(frozen=True)
class Limits:
    """Limits of one call.

    Attributes
    ----------
    salt
        Word of the caller's key.
    seconds
        Time limit of the request.
    budget
        Seconds after which it is paused; None for no such limit.
    """

    salt: str
    seconds: float
    budget: float | None


async def parts(
    call: Call,
    limits: Limits,
    states: States[Call],
    record: Record,
    *,
    idle_seconds: float | None = None,
) -> AsyncGenerator[list[Delta], None]:
    """Submit a call, or continue it, and yield the parts of its continuations as they grow.

    Parameters
    ----------
    states
        States of paused calls, to which this call is added if its budget ends.
    record
        Line of the log, which gets the counts.
    idle_seconds
        Time without a part after which an empty list is yielded. None to yield all parts at the
        end, otherwise those of each step are yielded together.

    Raises
    ------
    ApiError, GptxError
        The request is refused, fails, or takes too long.
    """
    left = call.n_ends
    inbox = Inbox(call.scheduler.bell, left, idle_seconds=idle_seconds)
    try:
        ticket = _submit(call, inbox, limits)
    except Exception:
        inbox.close()
        if call.continued is not None:
            states.restore(call.continued, call, limits.salt)
        raise
    inbox.put_later(limits.seconds, too_long(limits.seconds))
    try:
        while left:
            deltas: list[Delta] = []
            for event in await inbox.take():
                if event is None:
                    continue
                if isinstance(event, Paused):
                    call.state = states.keep(call, limits.salt)
                    deltas += [
                        Delta(writer.index, finish_reason="length")
                        for writer in call.writers
                        if writer.finish_reason is None
                    ]
                    left = 0
                    break
                if isinstance(event, Exception):
                    raise event
                record.first_token()
                known = ticket.prompt_logprobs.get(event.sequence)
                deltas.append(call.writers[event.sequence].add(event, known))
                if event.result is not None:
                    call.results[event.sequence] = event.result
                    left -= 1
            yield deltas
    finally:
        inbox.close()
        if call.state is None:
            ticket.cancel()
        record.count(call.usage)


def _submit(call: Call, inbox: Inbox, limits: Limits) -> Ticket:
    """Give a call to the scheduler, with the error of a budget in which not one step fits."""
    scheduler, budget = call.scheduler, limits.budget
    seconds = scheduler.least_budget(call.request, call.ticket)
    if budget is not None and seconds > budget:
        scheduler.pace.relax()
        raise ApiError(
            400,
            f"budget is {budget:g} s, in which not one step fits: the smallest that does is "
            f"{math.ceil(seconds * 1000) / 1000:g} s",
            param="budget",
            code="budget_too_small",
        )
    if call.ticket is None:
        call.ticket = scheduler.submit(call.request, inbox.put, salt=limits.salt, budget=budget)
    else:
        scheduler.resume(call.ticket, inbox.put, budget=budget)
    return call.ticket


async def collect(call: Call, limits: Limits, states: States[Call], record: Record) -> list[Delta]:
    """Run a call, and return its continuations, each as one part.

    Raises the errors of `parts`.
    """
    found = [Delta(writer.index, finish_reason=writer.finish_reason) for writer in call.writers]
    async with contextlib.aclosing(parts(call, limits, states, record)) as all_parts:
        async for deltas in all_parts:
            for delta in deltas:
                found[delta.index].add(delta)
    return call.select(found)


def whole_answer(call: Call, deltas: Sequence[Delta]) -> dict[str, Any]:
    """Return the answer of a call that is no stream."""
    answer = {
        **call.head(call.format.object),
        "choices": [call.format.choice(call, delta) for delta in deltas],
        "usage": call.usage,
    }
    return answer if call.state is None else {**answer, "state": call.state}


async def stream_answer(
    call: Call,
    limits: Limits,
    states: States[Call],
    record: Record,
    *,
    include_usage: bool,
    ping_seconds: float,
) -> AsyncGenerator[bytes, None]:
    """Yield the events of a call that is a stream, those of each step together.

    After `ping_seconds` without one, the bytes are empty. Raises the errors of `parts`.
    """
    head = encode_json(call.head(call.format.stream_object))[:-1]  # the same in each event
    usage = {"usage": None} if include_usage else {}

    def event(choices: list[dict[str, Any]], more: dict[str, Any]) -> bytes:
        return encode_event(head + b"," + encode_json({"choices": choices, **more})[1:])

    first = [event([one], usage) for one in call.format.first_choices(call)]
    async with contextlib.aclosing(
        parts(call, limits, states, record, idle_seconds=ping_seconds)
    ) as all_parts:
        async for deltas in all_parts:
            if not deltas:
                yield b""
                continue
            more = usage if call.state is None else {**usage, "state": call.state}
            events = first + [
                event([call.format.stream_choice(call, delta)], more)
                for delta in deltas
                if not delta.is_empty
            ]
            first = []
            if events:
                yield b"".join(events)
    if include_usage:
        yield event([], {"usage": call.usage})
