"""The load of `benchmarks/serving.py`: clients that send completions and time each token."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gptx.server.replicas.upstream import HOST, Upstream
from gptx.tokenization.protocol import Tokenizer

TEXT = (
    "the of and to a in that is was he for it with as his on be at by had not are but from or "
    "have an they which one you were her all she there would their we him been has when who will "
    "more no if out so said what up its about into than them can only other new some could time "
    "these"
)
WORDS = TEXT.split()
END = "[DONE]"


@dataclass(frozen=True)
class Traffic:
    """The requests of a run: ragged prompts and outputs, of which some share a prefix.

    Attributes
    ----------
    prompt_tokens, output_tokens
        Least and largest number of tokens; the logarithm is uniform between them.
    prefix_tokens
        Length of each shared prefix.
    n_prefixes
        Number of shared prefixes.
    shared
        Part of the requests that begin with one of them.
    """

    prompt_tokens: tuple[int, int] = (8, 128)
    output_tokens: tuple[int, int] = (16, 64)
    prefix_tokens: int = 64
    n_prefixes: int = 2
    shared: float = 0.5

    def draw(self, tokenizer: Tokenizer, n: int, seed: int) -> list[Job]:
        """Return n requests, the same ones for a seed."""
        random = np.random.default_rng(seed)
        prefixes = [
            draw_text(tokenizer, self.prefix_tokens, random) for _ in range(self.n_prefixes)
        ]
        jobs = []
        for _ in range(n):
            prompt = draw_text(tokenizer, _log_uniform(*self.prompt_tokens, random), random)
            if random.random() < self.shared:
                prompt = f"{prefixes[random.integers(self.n_prefixes)]} {prompt}"
            jobs.append(Job(prompt, _log_uniform(*self.output_tokens, random)))
        return jobs


def _log_uniform(low: int, high: int, random: np.random.Generator) -> int:
    return round(float(np.exp(random.uniform(np.log(low), np.log(high)))))


def draw_text(tokenizer: Tokenizer, n_tokens: int, random: np.random.Generator) -> str:
    """Return a text of words that has at most n tokens, and about as many."""
    words: list[str] = []
    while len(tokenizer.encode(" ".join(words))) < n_tokens:
        words.append(WORDS[random.integers(len(WORDS))])
    return " ".join(words[:-1] or words)


@dataclass(frozen=True)
class Job:
    """A request: a prompt, and the number of tokens to generate."""

    prompt: str
    max_tokens: int


@dataclass
class Timing:
    """The times of one request.

    Attributes
    ----------
    start
        Time of the request.
    arrivals
        Time of each event with text.
    n_tokens
        Number of new tokens: those that the server counts, or the number of events.
    """

    start: float
    arrivals: list[float] = field(default_factory=list)
    n_tokens: int = 0

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.arrivals[0] - self.start

    @property
    def between(self) -> list[float]:
        """Seconds between tokens."""
        return np.diff(self.arrivals).tolist()


@dataclass(frozen=True)
class Target:
    """A server as the clients see it: port, name of the model, and fields of each request."""

    port: int
    model: str
    extra: dict[str, Any]


async def complete(target: Target, job: Job) -> Timing:
    """Send one request, and time its stream.

    Raises
    ------
    RuntimeError
        The answer is no stream of tokens.
    """
    body = {
        "model": target.model,
        "prompt": job.prompt,
        "max_tokens": job.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **target.extra,
    }
    data = json.dumps(body).encode()
    headers = [
        (b"host", HOST.encode()),
        (b"content-type", b"application/json"),
        (b"content-length", str(len(data)).encode()),
    ]

    async def parts() -> AsyncIterator[bytes]:
        yield data

    timing = Timing(time.perf_counter())
    async with Upstream(target.port) as request:
        await request.send("POST", b"/v1/completions", headers, parts())
        await request.start()
        if request.status != 200:
            answer = b"".join([part async for part in request.parts()])
            raise RuntimeError(f"status {request.status}: {answer[:200].decode(errors='replace')}")
        left = b""
        async for part in request.parts():
            *lines, left = (left + part).split(b"\n")
            for line in lines:
                read_event(line, timing)
    if not timing.arrivals:
        raise RuntimeError("the stream has no token")
    timing.n_tokens = timing.n_tokens or len(timing.arrivals)
    return timing


def read_event(line: bytes, timing: Timing) -> None:
    """Add a line of a stream to the times."""
    if not line.startswith(b"data:"):
        return
    text = line.removeprefix(b"data:").strip().decode()
    if text == END:
        return
    event = json.loads(text)
    if "error" in event:
        raise RuntimeError(f"the stream has an error: {event['error']}")
    if usage := event.get("usage"):
        timing.n_tokens = usage["completion_tokens"]
    if any(choice.get("text") for choice in event.get("choices", ())):
        timing.arrivals.append(time.perf_counter())


async def run_clients(
    target: Target, jobs: Sequence[Job], n_clients: int, pause: float, seed: int
) -> tuple[list[Timing], float]:
    """Let clients send all requests; return the times of each, and the seconds of all.

    Each client pauses for an exponential time before a request, so that those of many clients
    arrive as a Poisson process.

    Parameters
    ----------
    pause
        Mean pause in seconds.
    """
    random = np.random.default_rng(seed)
    pauses = random.exponential(pause, len(jobs)).tolist() if pause else [0.0] * len(jobs)
    left = iter(list(zip(jobs, pauses, strict=True)))
    timings: list[Timing] = []

    async def client() -> None:
        for job, seconds in left:
            await asyncio.sleep(seconds)
            timings.append(await complete(target, job))

    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(n_clients):
            group.create_task(client())
    return timings, time.perf_counter() - start


async def run_beside_long(
    target: Target, jobs: Sequence[Job], long: Job | None, n_clients: int, pause: float, seed: int
) -> list[Timing]:
    """Let clients send short requests, and another one long prompts; return the short ones' times.

    Parameters
    ----------
    long
        A long prompt, which is sent again and again; None for none.
    """

    async def repeat() -> None:
        assert long is not None
        for number in range(10**6):  # another text each time: a cached prefix would cost nothing
            await complete(target, Job(f"{number} {long.prompt}", long.max_tokens))

    task = asyncio.create_task(repeat()) if long is not None else None
    try:
        timings, _ = await run_clients(target, jobs, n_clients, pause, seed)
    finally:
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    return timings


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """Return the 50th, 95th and 99th percentile; None of no values."""
    names = (50, 95, 99)
    if not values:
        return {f"p{name}": None for name in names}
    found = np.percentile(values, names)
    return {f"p{name}": float(value) for name, value in zip(names, found, strict=True)}


def summarize(timings: Sequence[Timing], seconds: float) -> dict[str, Any]:
    """Return rates per second, and percentiles in seconds."""
    return {
        "requests": len(timings),
        "seconds": seconds,
        "requests_per_second": len(timings) / seconds,
        "tokens_per_second": sum(timing.n_tokens for timing in timings) / seconds,
        "first": percentiles([timing.first for timing in timings]),
        "between": percentiles([x for timing in timings for x in timing.between]),
    }
