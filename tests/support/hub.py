"""A process that runs `locate` against the Hub on loopback, small models, and what is expected."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gptx.errors import GptxError
from tests.support.hub_server import HubServer, etag_of

CONFIG = b'{"model_type": "gpt2"}'
HEADER = b'{"wte.weight":{"dtype":"U8","shape":[200000],"data_offsets":[0,200000]}}'


def tensors(seed: int) -> bytes:
    """A valid safetensors file of 200 kB."""
    body = bytes((i * i * 31 + seed) % 251 for i in range(1000)) * 200
    return len(HEADER).to_bytes(8, "little") + HEADER + body


def model(seed: int = 0, **more: bytes) -> dict[str, bytes]:
    files = {
        "config.json": CONFIG + b" " * seed,
        "model.safetensors": tensors(seed),
        "tokenizer.json": b'{"seed": %d}' % seed,
        "vocab.json": b"{}",
        "merges.txt": b"#version: 0.2\n",
    }
    return files | more


def index(*shards: object) -> bytes:
    return json.dumps({"weight_map": {f"t{i}": shard for i, shard in enumerate(shards)}}).encode()


# How another process begins: it counts connections, and is set up for faults.
PREPARED = """
import json, os, sys
connections = []
sys.addaudithook(lambda name, args: connections.append(str(args)) if name in
                 ("socket.connect", "socket.getaddrinfo") else None)
setup, jobs = json.loads(sys.argv[1])
if setup.get("largest_file"):
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (setup["largest_file"], setup["largest_file"]))
if setup.get("chunk"):
    from huggingface_hub import constants
    constants.DOWNLOAD_CHUNK_SIZE = setup["chunk"]
if setup.get("impatient"):
    import time
    time.sleep = lambda seconds: None
from gptx.errors import GptxError
"""

# What it does: call `locate` once per job, report files or error as JSON.
CLIENT = (
    PREPARED
    + """
from gptx.hub.resolve import locate
results = []
for job in jobs:
    connections.clear()
    try:
        files = locate(**job)
        result = dict(name=files.name, revision=files.revision, folder=str(files.folder),
                      config=str(files.config), weights=[str(path) for path in files.weights],
                      tokenizer={name: str(path) for name, path in files.tokenizer.items()})
    except GptxError as error:
        result = dict(error=type(error).__mro__[0].__name__, message=str(error),
                      kinds=[kind.__name__ for kind in type(error).__mro__], exit=error.exit_code)
    results.append(result | dict(connections=list(connections)))
print(json.dumps(results))
"""
)


class Client:
    """Runs `locate` in other processes that share one cache.

    huggingface_hub reads its environment when it is imported, so whatever reaches the Hub runs in
    a process of its own, which counts the connections that it opens.
    """

    script = CLIENT

    def __init__(self, server: HubServer, home: Path) -> None:
        self.url, self.home = server.url, home
        self.cache = home / "hub"

    def start(
        self, *jobs: dict[str, Any], env: dict[str, str] | None = None, **setup: Any
    ) -> subprocess.Popen[str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        kept |= {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_ETAG_TIMEOUT": "5",
            "HF_HUB_DOWNLOAD_TIMEOUT": "5",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        argument = json.dumps([setup, jobs])
        return subprocess.Popen(
            [sys.executable, "-Walways::ResourceWarning", "-c", self.script, argument],
            env=kept | (env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, process: subprocess.Popen[str]) -> list[dict[str, Any]]:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert "ResourceWarning" not in err, err
        self.stderr = err
        results: list[dict[str, Any]] = json.loads(out)
        return results

    def run(self, *jobs: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
        return self.finish(self.start(*jobs, **more))

    def one(self, model: str, **more: Any) -> dict[str, Any]:
        """One call of `locate`; keywords that are not its own set up the process."""
        setup = {k: more.pop(k) for k in ("env", "largest_file", "impatient", "chunk") if k in more}
        return self.run({"model": model, **more}, **setup)[0]

    def wrong(self) -> list[str]:
        """Published files whose content is not what their name promises."""
        return [
            str(path)
            for path in self.cache.glob("models--*/blobs/*")
            if len(path.name) in (40, 64) and path.name != digest(path)
        ]

    def published(self) -> list[str]:
        """Everything under a published name, except the memory of what does not exist."""
        return sorted(
            str(path.relative_to(self.cache))
            for pattern in ("models--*/blobs/*", "models--*/snapshots/**/*", "models--*/refs/*")
            for path in self.cache.glob(pattern)
            if not path.is_dir() and path.suffix != ".incomplete"
        )

    def partial(self) -> list[Path]:
        return list(self.cache.glob("models--*/blobs/*.incomplete"))


def digest(path: Path) -> str:
    return etag_of("x.bin" if len(path.name) == 64 else "x", path.read_bytes())


def check(result: dict[str, Any], kind: type[GptxError], *words: str) -> None:
    """It failed with this class, in one line that holds these words."""
    assert kind.__name__ in result.get("kinds", ()), result
    assert result["exit"] == kind.exit_code, result
    assert "\n" not in result["message"], result
    for word in words:
        assert word in result["message"], (word, result)


def check_files(result: dict[str, Any], files: dict[str, bytes]) -> None:
    """It found exactly the config, weights and tokenizer of `files`, byte by byte."""
    assert "error" not in result, result
    assert Path(result["config"]).read_bytes() == files["config.json"], result
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    assert [Path(path).name for path in result["weights"]] == shards, result
    for path in [*result["weights"], *result["tokenizer"].values()]:
        assert Path(path).read_bytes() == files[Path(path).name], path


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer({"org/model": {"main": model()}}) as hub:
        yield hub


@pytest.fixture
def client(server: HubServer, tmp_path: Path) -> Client:
    return Client(server, tmp_path)
