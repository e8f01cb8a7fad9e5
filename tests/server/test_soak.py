"""Load for minutes: no request is lost, and neither memory nor open files grow.

`GPTX_SOAK_SECONDS=1800 pytest -n 0 -m soak tests/server/test_soak.py` runs it for 30 minutes.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.serving import PATIENCE_SECONDS, raw_request, read_events, wait_until

SECONDS = float(os.environ.get("GPTX_SOAK_SECONDS", "120"))
START_SECONDS = 600.0  # kernels may have to be compiled on a busy machine
N_CLIENTS = 8
N_SAMPLES = 120
GROWTH_BYTES, GROWTH_SHARE = 4 * 2**20, 0.02  # of resident memory, in the second half of the run
PROMPTS = ("ROMEO:", "JULIET:\nO ", "First Citizen:\n", "KING RICHARD II:\nWhat", "To be, or")


class Server:
    """`gptx serve` in a process of its own."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        command = [sys.executable, "-m", "gptx", "serve", "-m", "shakespeare"]
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port), "--max-queue", "64"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.url = f"http://127.0.0.1:{self.port}"

    def wait_until_ready(self) -> None:
        end = time.monotonic() + START_SECONDS
        while not self.is_ready():
            assert time.monotonic() < end, "the server is not ready"
            time.sleep(0.1)

    def is_ready(self) -> bool:
        assert self.process.poll() is None, "the server has ended"
        try:
            return httpx.get(f"{self.url}/health").status_code == 200
        except httpx.HTTPError:
            return False

    @property
    def resident_bytes(self) -> int:
        text = Path(f"/proc/{self.process.pid}/status").read_text("utf-8")
        [kilobytes] = re.findall(r"VmRSS:\s*(\d+) kB", text)
        return int(kilobytes) * 1024

    @property
    def n_open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def metric(self, name: str) -> float:
        for line in httpx.get(f"{self.url}/metrics").text.splitlines():
            if line.startswith(f"{name} "):
                return float(line.split()[1])
        raise AssertionError(f"no metric {name}")


class Load:
    """Clients that send random requests until the end; `counts` has their outcomes."""

    def __init__(self, server: Server, end: float) -> None:
        self.server, self.end = server, end
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []

    def run(self, seed: int) -> None:
        r = random.Random(seed)
        kinds = (
            self.complete, self.stream, self.chat, self.others, self.pause, self.refused,
            self.hang_up,
        )  # fmt: skip
        with httpx.Client(base_url=self.server.url, timeout=PATIENCE_SECONDS) as client:
            while time.monotonic() < self.end:
                kind = r.choice(kinds)
                try:
                    kind(client, r)
                    self.counts[kind.__name__] += 1
                except Exception as error:
                    self.failures.append(f"{kind.__name__}: {error!r}")

    def body(self, r: random.Random) -> dict[str, Any]:
        return {
            "prompt": r.choice(PROMPTS) * r.choice([1, 1, 3, 8]),
            "max_tokens": r.randrange(1, 24),
            "temperature": r.choice([0, 0.8, 1]),
            "top_p": r.choice([1, 0.9]),
            "n": r.choice([1, 1, 2]),
            "logprobs": r.choice([None, 3]),
            "seed": r.randrange(1000),
            "presence_penalty": r.choice([0, 0.5]),
            "stop": r.choice([None, "\n\n"]),
        }

    def complete(self, client: httpx.Client, r: random.Random) -> None:
        body = self.body(r)
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        choices = answer.json()["choices"]
        assert len(choices) == body["n"]
        assert all(one["finish_reason"] in ("stop", "length") for one in choices)

    def stream(self, client: httpx.Client, r: random.Random) -> None:
        body = self.body(r)
        answer = client.post("/v1/completions", json={**body, "stream": True})
        events = read_events(answer.text)
        assert events[-1] == "[DONE]"
        reasons = [event["choices"][0]["finish_reason"] for event in events[:-1]]
        assert len([reason for reason in reasons if reason]) == body["n"]

    def chat(self, client: httpx.Client, r: random.Random) -> None:
        messages = [{"role": "user", "content": r.choice(PROMPTS)}]
        answer = client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 9})
        assert answer.status_code == 200, answer.text

    def others(self, client: httpx.Client, r: random.Random) -> None:
        text = r.choice(PROMPTS)
        ids = client.post("/tokenize", json={"prompt": text}).json()["tokens"]
        assert client.post("/detokenize", json={"tokens": ids}).json()["prompt"] == text
        answer = client.post("/v1/embeddings", json={"input": [text, "O"]})
        assert len(answer.json()["data"]) == 2
        assert client.get("/v1/models").status_code == 200

    def pause(self, client: httpx.Client, r: random.Random) -> None:
        body = {"prompt": r.choice(PROMPTS), "max_tokens": 100, "budget": 0.5}
        state = client.post("/v1/completions", json=body).json().get("state")
        if state is not None and r.random() < 0.5:  # the others are dropped by their age
            answer = client.post("/v1/completions", json={"state": state})
            assert answer.status_code == 200, answer.text

    def refused(self, client: httpx.Client, r: random.Random) -> None:
        wrong = r.choice([{"logit_bias": {"99999": 1}}, {"top_k": 1.5}, {"no_field": 1}])
        answer = client.post("/v1/completions", json={"prompt": "O", **wrong})
        assert answer.status_code == 400, answer.text

    def hang_up(self, client: httpx.Client, r: random.Random) -> None:
        body = {**self.body(r), "max_tokens": 200, "stream": r.random() < 0.5}
        with socket.create_connection(("127.0.0.1", self.server.port), PATIENCE_SECONDS) as one:
            one.sendall(raw_request("/v1/completions", body))
            time.sleep(r.random() * 0.1)


@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="memory is read from Linux's /proc")
def test_minutes_of_load_leave_nothing_behind() -> None:
    server = Server()
    try:
        server.wait_until_ready()
        end = time.monotonic() + SECONDS
        n_files = server.n_open_files
        load = Load(server, end)
        clients = [threading.Thread(target=load.run, args=[seed]) for seed in range(N_CLIENTS)]
        for client in clients:
            client.start()
        sizes = []
        while time.monotonic() < end:
            time.sleep(SECONDS / N_SAMPLES)
            sizes.append(server.resident_bytes)
        for client in clients:
            client.join(2 * PATIENCE_SECONDS)
            assert not client.is_alive(), "a request has no answer"
        assert load.failures == []
        assert len(load.counts) == 7, load.counts
        # The first half fills caches and the slots of prefixes.
        third = statistics.median(sizes[N_SAMPLES // 2 : 3 * N_SAMPLES // 4])
        fourth = statistics.median(sizes[3 * N_SAMPLES // 4 :])
        assert fourth <= third * (1 + GROWTH_SHARE) + GROWTH_BYTES
        wait_until(lambda: server.metric("gptx_requests_running") == 0)
        assert server.metric("gptx_requests_waiting") == 0
        wait_until(lambda: server.n_open_files <= n_files)
        print(json.dumps({"requests": load.counts, "resident bytes": [sizes[0], third, fourth]}))
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE_SECONDS) == 0
    finally:
        server.process.kill()
        server.process.wait()
        assert server.process.stdout is not None
        server.process.stdout.close()
