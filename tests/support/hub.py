"""A client of the Hub on loopback, small models, and checks of its results."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

from huggingface_hub import constants, file_download

from gptx.errors import GptxError
from gptx.hub.resolve import locate
from tests.support.hub_server import HubServer, etag_of

CONFIG = b'{"model_type": "gpt2"}'
HEADER = b'{"wte.weight":{"dtype":"U8","shape":[200000],"data_offsets":[0,200000]}}'


def tensors(seed: int) -> bytes:
    """Make a valid safetensors file of 200 kB."""
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


@contextmanager
def hub_settings(url: str, home: Path, **variables: str) -> Iterator[None]:
    """Have huggingface_hub in this process use another Hub and another cache.

    It reads its environment variables when it is imported; this replaces the values.
    """
    variables = {"HF_ENDPOINT": url, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"} | variables
    template = variables["HF_ENDPOINT"] + "/{repo_id}/resolve/{revision}/{filename}"
    values: dict[str, Any] = {
        "ENDPOINT": variables["HF_ENDPOINT"],
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_ASSETS_CACHE": str(home / "assets"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "HF_HUB_OFFLINE": "HF_HUB_OFFLINE" in variables,
        "HF_HUB_DISABLE_SYMLINKS": "HF_HUB_DISABLE_SYMLINKS" in variables,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "HF_HUB_DISABLE_IMPLICIT_TOKEN" in variables,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_ETAG_TIMEOUT": 5,
        "HF_HUB_DOWNLOAD_TIMEOUT": 5,
    }
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, inherited() | variables, clear=True))
        known = {name: value for name, value in values.items() if hasattr(constants, name)}
        stack.enter_context(mock.patch.multiple(constants, **known))
        if hasattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE"):  # before 1.0
            name = "HUGGINGFACE_CO_URL_TEMPLATE"
            stack.enter_context(mock.patch.object(file_download, name, template))
        yield


def inherited() -> dict[str, str]:
    """Return the environment without the variables of huggingface_hub."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}


@contextmanager
def counted_connections() -> Iterator[list[str]]:
    """List the addresses that this process looks up or connects to."""
    seen: list[str] = []
    connect, getaddrinfo = socket.socket.connect, socket.getaddrinfo

    def counted_connect(self: socket.socket, address: Any) -> None:
        seen.append(str(address))
        connect(self, address)

    def counted_getaddrinfo(*args: Any, **options: Any) -> Any:
        seen.append(str(args))
        return getaddrinfo(*args, **options)

    with (
        mock.patch.object(socket.socket, "connect", counted_connect),
        mock.patch.object(socket, "getaddrinfo", counted_getaddrinfo),
    ):
        yield seen


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """Have the system refuse longer files to this process; 0 for no limit."""
    if not limit:
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# A real process: it counts its connections by an audit hook, which no library escapes.
CHILD = """
import json, sys
connections = []
sys.addaudithook(lambda name, args: connections.append(str(args)) if name in
                 ("socket.connect", "socket.getaddrinfo") else None)
from gptx.errors import GptxError
from gptx.hub.resolve import locate
results = []
for job in json.loads(sys.argv[1]):
    connections.clear()
    try:
        files = locate(**job)
        result = dict(name=files.name, revision=files.revision, folder=str(files.folder),
                      config=str(files.config), weights=[str(path) for path in files.weights],
                      tokenizer={name: str(path) for name, path in files.tokenizer.items()})
    except GptxError as error:
        result = dict(error=type(error).__name__, message=str(error),
                      kinds=[kind.__name__ for kind in type(error).__mro__], exit=error.exit_code)
    results.append(result | dict(connections=list(connections)))
print(json.dumps(results))
"""


class Client:
    """Calls of `locate` that share one cache.

    Attributes
    ----------
    cache : Path
        Folder of the cache.
    stderr : str
        Standard error of the last run.
    """

    def __init__(self, server: HubServer, home: Path) -> None:
        self.url, self.home = server.url, home
        self.cache = home / "hub"
        self.stderr = ""

    def call(self, job: dict[str, Any]) -> dict[str, Any]:
        files = locate(**job)
        return {
            "name": files.name,
            "revision": files.revision,
            "folder": str(files.folder),
            "config": str(files.config),
            "weights": [str(path) for path in files.weights],
            "tokenizer": {name: str(path) for name, path in files.tokenizer.items()},
        }

    def run(
        self,
        *jobs: dict[str, Any],
        env: dict[str, str] | None = None,
        largest_file: int = 0,
        impatient: bool = False,
    ) -> list[dict[str, Any]]:
        """Run jobs in this process; report the files or the error of each.

        Parameters
        ----------
        largest_file
            Limit of file sizes in bytes, 0 for none.
        impatient
            Do not wait between attempts.
        """
        results = []
        with ExitStack() as stack:
            stack.enter_context(hub_settings(self.url, self.home, **(env or {})))
            stderr = stack.enter_context(redirect_stderr(StringIO()))
            connections = stack.enter_context(counted_connections())
            stack.enter_context(file_size_limit(largest_file))
            if impatient:
                stack.enter_context(mock.patch("time.sleep"))
            for job in jobs:
                connections.clear()
                try:
                    result = self.call(job)
                except GptxError as error:
                    kinds = [kind.__name__ for kind in type(error).__mro__]
                    result = {"error": kinds[0], "message": str(error), "kinds": kinds}
                    result["exit"] = error.exit_code
                results.append(result | {"connections": list(connections)})
        self.stderr = stderr.getvalue()
        return results

    def one(self, model: str, **more: Any) -> dict[str, Any]:
        """Call `locate` once; `more` are its keywords and those of `run`."""
        setup = {k: more.pop(k) for k in ("env", "largest_file", "impatient") if k in more}
        return self.run({"model": model, **more}, **setup)[0]

    def start(self, *jobs: dict[str, Any], **env: str) -> subprocess.Popen[str]:
        """Start a process that runs jobs."""
        settings = {"HF_ENDPOINT": self.url, "HF_HOME": str(self.home), "NO_PROXY": "127.0.0.1"}
        return subprocess.Popen(
            [sys.executable, "-Walways::ResourceWarning", "-c", CHILD, json.dumps(jobs)],
            env=inherited() | settings | {"HF_HUB_DISABLE_TELEMETRY": "1"} | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @staticmethod
    def finish(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
        """Wait for a process; return the results of its jobs."""
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert "ResourceWarning" not in err, err
        results: list[dict[str, Any]] = json.loads(out)
        return results

    def wrong(self) -> list[str]:
        """List published files without the hash in their name."""
        return [
            str(path)
            for path in self.cache.glob("models--*/blobs/*")
            if len(path.name) in (40, 64) and path.name != digest(path)
        ]

    def published(self) -> list[str]:
        """List everything under a published name, except marks of missing files."""
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
    """Check that a job failed with this class, in one line with these words."""
    assert kind.__name__ in result.get("kinds", ()), result
    assert result["exit"] == kind.exit_code, result
    assert "\n" not in result["message"], result
    for word in words:
        assert word in result["message"], (word, result)


def check_files(result: dict[str, Any], files: dict[str, bytes]) -> None:
    """Check that a job found exactly the config, weights and tokenizer of `files`."""
    assert "error" not in result, result
    assert Path(result["config"]).read_bytes() == files["config.json"], result
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    assert [Path(path).name for path in result["weights"]] == shards, result
    for path in [*result["weights"], *result["tokenizer"].values()]:
        assert Path(path).read_bytes() == files[Path(path).name], path
