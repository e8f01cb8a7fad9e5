"""The grid: every setup and each of its trials, with llama-bench's habits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, replace
from typing import Any

from gptx.bench.machine import cores
from gptx.bench.plan import Settings, Setup, setups, trials
from gptx.bench.process import Event, Events, fresh
from gptx.bench.sources import Source, sources, write


def run(settings: Settings) -> Events:
    """Measure the grid; yield what is being done, and the records of each setup when it is done.

    The speed of the memory is measured once for each backend and number of threads, in this run but
    in a process of its own, so that its buffer does not count as memory of the model.
    """
    speeds: dict[tuple[str, int | None], float] = {}
    with sources(settings.models, offline=settings.offline) as found:
        wanted = {name: trials(settings, source) for name, source in found.items()}
        for title, setup in numbered(setups(settings, found.values())):
            chosen = wanted[setup.model]
            where = setup.backend, setup.threads
            if where not in speeds and any(trial.output for trial in chosen):
                yield {"progress": f"{title}: speed of the memory"}
                for event in fresh("bandwidth", backend=setup.backend, threads=setup.threads):
                    speeds[where] = event["bandwidth"]
            arguments = {
                "trials": [astuple(trial) for trial in chosen],
                "repetitions": settings.repetitions,
            }
            for event in measured("speed", title, setup, found[setup.model], **arguments):
                yield event if "progress" in event else with_bandwidth(event, speeds.get(where))


def threads(settings: Settings) -> Events:
    """The grid over 1, 2, 4 ... threads, up to the number of cores."""
    return run(replace(settings, threads=powers(cores())))


def powers(limit: int) -> tuple[int, ...]:
    """1, 2, 4 ... and `limit` itself."""
    return (*(2**k for k in range(limit.bit_length()) if 2**k < limit), limit)


def numbered(plan: Sequence[Setup]) -> Iterator[tuple[str, Setup]]:
    """Each setup with its title for those who wait: "[2/6] shakespeare numpy int8 1 thread"."""
    for number, setup in enumerate(plan, start=1):
        yield f"[{number}/{len(plan)}] {setup}", setup


def measured(task: str, title: str, setup: Setup, source: Source, **arguments: Any) -> Events:
    """Have a task measure a setup in a fresh process; its progress gets the title."""
    yield {"progress": f"{title}: loading"}
    write(source)
    for event in fresh(task, setup=asdict(setup), **arguments):
        yield {"progress": f"{title}: {event['progress']}"} if "progress" in event else event


def with_bandwidth(record: Event, bandwidth: float | None) -> Event:
    """Add the speed of the memory (bytes per second) and how much of it decoding the record used:
    bytes of weights of a step, by the seconds of a step, by that speed."""
    used = None
    if record["output"] and bandwidth:
        steps_per_second = record["tokens_per_second"] / record["batch"]
        used = record["read"] * steps_per_second / bandwidth
    return record | {"bandwidth": bandwidth, "of_bandwidth": used}
