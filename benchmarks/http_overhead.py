"""Measure what HTTP costs: tokens per second of `Model.generate`, of an answer, and of a stream.

    python -m benchmarks.http_overhead --size 124M --threads 2

One client on the same cores asks a server in the same process, in turns with `Model.generate`. Then
several clients stream, and the processor time of the event loop's thread is divided by the tokens.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gptx
from benchmarks.goals import Goal, goals_table
from benchmarks.instruction_sets import instruction_set
from gptx.bench.machine import cpu_name
from gptx.bench.sources import RANDOM, find_source, write_source
from gptx.config import SIZES
from gptx.server.app import make_app
from gptx.server.listener import make_listener
from gptx.server.models import Models
from gptx.server.settings import Settings

PROMPT = [5] * 20
WARM_UP_REQUESTS = 32  # after which all memory of the KV cache has been used
GOALS = {"answer": 0.95, "stream": 0.90}


def generate(model: gptx.Model, n: int) -> float:
    """Return the seconds of n tokens by `Model.generate`."""
    start = time.perf_counter()
    model.generate(PROMPT, max_tokens=n, ignore_eos=True)
    return time.perf_counter() - start


def request(port: int, n: int, *, stream: bool) -> float:
    """Return the seconds of n tokens over HTTP."""
    body = {"prompt": PROMPT, "max_tokens": n, "temperature": 0, "ignore_eos": True}
    connection = http.client.HTTPConnection("127.0.0.1", port)
    start = time.perf_counter()
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps({**body, "stream": stream}), headers)
    answer = connection.getresponse().read()
    seconds = time.perf_counter() - start
    connection.close()
    assert b'"length"' in answer, answer[:200]
    return seconds


def measure(model: gptx.Model, port: int, n: int, rounds: int) -> dict[str, list[float]]:
    """Return the tokens per second of each way, in turns."""
    ways: dict[str, Any] = {
        "generate": lambda: generate(model, n),
        "answer": lambda: request(port, n, stream=False),
        "stream": lambda: request(port, n, stream=True),
    }
    for _ in range(WARM_UP_REQUESTS):
        request(port, 1, stream=False)
    found: dict[str, list[float]] = {name: [] for name in ways}
    for round in range(rounds + 1):
        for name, run in ways.items():
            seconds = run()
            if round:  # the first one warms up
                found[name].append(n / seconds)
    return found


def loop_microseconds(thread: threading.Thread, port: int, n: int, clients: int) -> float:
    """Return the processor time of the event loop for a token of several streams at a time."""
    assert thread.ident is not None
    clock = time.pthread_getcpuclockid(thread.ident)
    with ThreadPoolExecutor(clients) as threads:
        start = time.clock_gettime(clock)
        for ended in [threads.submit(request, port, n, stream=True) for _ in range(clients)]:
            ended.result()
        return (time.clock_gettime(clock) - start) / (clients * n) * 1e6


def main() -> None:
    """Print the table of one run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--size", choices=list(SIZES), default="124M", help="random weights")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of a request")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds")
    parser.add_argument("--clients", type=int, default=8, help="streams at a time")
    parser.add_argument("--quantize", choices=["int8", "int4"], help="of the weights")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = find_source(f"{RANDOM}{options.size}", Path(folder))
        write_source(source)
        load: Any = {"threads": options.threads, "quantize": options.quantize}
        model = gptx.load(str(source.path), backend="numpy", **load)
        models = Models(settings=Settings())
        models.add("model", model)
        listener = make_listener(make_app(models), Settings(), host="127.0.0.1", port=0)
        thread = threading.Thread(target=listener.run)
        thread.start()
        while not listener.started:
            time.sleep(0.01)
        port = int(listener.addresses[0].rpartition(":")[2])
        try:
            found = measure(model, port, options.tokens, options.rounds)
            costs = [
                loop_microseconds(thread, port, options.tokens, options.clients)
                for _ in range(options.rounds)
            ]
        finally:
            listener.should_exit = True
            thread.join()
    kind = options.quantize or "float32"
    print(f"{options.size} {kind}, {options.threads} threads, {cpu_name()}, {instruction_set()}\n")
    print("| | tokens per second | quartiles |\n|---|---:|---:|")
    for name, rates in found.items():
        low, middle, high = statistics.quantiles(rates, n=4)
        print(f"| {name} | {middle:.1f} | {low:.1f}–{high:.1f} |")
    print(
        f"\nThe event loop takes {statistics.median(costs):.0f} us for a token of "
        f"{options.clients} streams."
    )
    base = statistics.median(found["generate"])
    print()
    print(
        goals_table(
            [
                Goal(f"{name} / generate", "≥", limit, statistics.median(found[name]) / base)
                for name, limit in GOALS.items()
            ]
        )
    )


if __name__ == "__main__":
    main()
