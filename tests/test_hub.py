"""gptx.hub: names, folders, and a Hub on loopback that also misbehaves.

huggingface_hub reads its environment when it is imported, so whatever reaches the Hub runs in a
process of its own (`Client`), which counts the connections that it opens.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer, commit_of, etag_of
from huggingface_hub import __version__ as hf_version
from huggingface_hub import constants

from gptx.errors import (
    AuthorizationError,
    GptxError,
    HubUnavailableError,
    IntegrityError,
    NotFoundError,
    ParameterError,
    StorageError,
    WeightsError,
)
from gptx.hub import ALIASES, EMBEDDED, locate

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


# What the other process does: call `locate` once per job, report files or error as JSON.
CLIENT = """
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
from gptx.hub import locate
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


class Client:
    """Runs `locate` in other processes that share one cache."""

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
            [sys.executable, "-Walways::ResourceWarning", "-c", CLIENT, argument],
            env=kept | (env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, process: subprocess.Popen[str]) -> list[dict[str, Any]]:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert "ResourceWarning" not in err
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
    assert result["exit"] == kind.exit_code
    assert "\n" not in result["message"]
    for word in words:
        assert word in result["message"]


def check_files(result: dict[str, Any], files: dict[str, bytes]) -> None:
    """It found exactly the config, weights and tokenizer of `files`, byte by byte."""
    assert "error" not in result, result
    assert Path(result["config"]).read_bytes() == files["config.json"]
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    assert [Path(path).name for path in result["weights"]] == shards
    for path in [*result["weights"], *result["tokenizer"].values()]:
        assert Path(path).read_bytes() == files[Path(path).name], path


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer({"org/model": {"main": model()}}) as hub:
        yield hub


@pytest.fixture
def client(server: HubServer, tmp_path: Path) -> Client:
    return Client(server, tmp_path)


class TestNames:
    def test_embedded(self) -> None:
        files = locate("shakespeare")
        assert files.name == "shakespeare"
        assert files.revision is None
        assert files.folder == EMBEDDED["shakespeare"]
        assert [path.name for path in files.weights] == ["model.safetensors"]
        assert set(files.tokenizer) == {"tokenizer.json", "vocab.json", "merges.txt"}
        for path in (files.config, *files.weights, *files.tokenizer.values()):
            assert path.is_file()

    def test_import_is_light(self) -> None:
        code = "import sys, gptx.hub; gptx.hub.locate('shakespeare'); print(*sys.modules)"
        modules = subprocess.check_output([sys.executable, "-c", code], text=True).split()
        assert "gptx.hub" in modules
        assert not {"huggingface_hub", "gptx.hub_cache"} & set(modules)

    @pytest.mark.parametrize("name", ["", "  ", "a\0b", None, 3, b"gpt2"])
    def test_no_name(self, name: Any) -> None:
        with pytest.raises(ParameterError, match="expected an embedded name"):
            locate(name)

    @pytest.mark.parametrize(
        "name",
        [
            *("./gpt2", "../gpt2", "/gpt2", "~/no-such-folder", "a/b/c", "a\\b", "a b", "-a"),
            *("a--b", "https://huggingface.co/gpt2", "é", "a\nb", Path("gpt2"), "x" * 5000),
        ],
    )
    def test_no_such_place(self, name: Any) -> None:
        with pytest.raises(NotFoundError, match="expected an embedded name") as caught:
            locate(name)
        assert caught.value.exit_code == 66
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("revision", ["", "../../etc", "/main", "main/", "a b", "a\\b", "a\0"])
    def test_bad_revision(self, revision: str) -> None:
        with pytest.raises(ParameterError, match="revision is"):
            locate("gpt2", revision=revision)

    def test_bad_token_is_not_shown(self) -> None:
        with pytest.raises(ParameterError) as caught:
            locate("gpt2", token="hf_secret\n")
        assert "secret" not in str(caught.value)

    def test_revision_only_for_the_hub(self, tmp_path: Path) -> None:
        for name in ("shakespeare", str(tmp_path)):
            with pytest.raises(ParameterError, match="not from the Hub"):
                locate(name, revision="main")

    def test_aliases(self) -> None:
        for name, size in (("", "124M"), ("-medium", "355M"), ("-large", "774M"), ("-xl", "1558M")):
            assert ALIASES[f"gpt2{name}"] == ALIASES[size] == f"openai-community/gpt2{name}"
        assert ALIASES["distilgpt2"] == "distilbert/distilgpt2"


class TestFolder:
    @staticmethod
    def make(folder: Path, files: dict[str, bytes]) -> Path:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return folder

    def test_single(self, tmp_path: Path) -> None:
        files = locate(self.make(tmp_path, model()))
        assert files.folder == tmp_path
        assert files.weights == (tmp_path / "model.safetensors",)
        assert set(files.tokenizer) == {"tokenizer.json", "vocab.json", "merges.txt"}
        assert locate(tmp_path, weights=False).weights == ()

    def test_goes_before_the_hub(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: Client
    ) -> None:
        (tmp_path / "gpt2").mkdir()
        self.make(tmp_path / "gpt2", model())
        monkeypatch.chdir(tmp_path)
        assert locate("gpt2").weights[0].samefile(tmp_path / "gpt2" / "model.safetensors")

    def test_shards_in_the_order_of_the_index(self, tmp_path: Path) -> None:
        names = ["b.safetensors", "a.safetensors", "b.safetensors"]
        self.make(tmp_path, dict.fromkeys(names, b"") | {"config.json": CONFIG})
        self.make(tmp_path, {"model.safetensors.index.json": index(*names)})
        assert locate(tmp_path).weights == tuple(tmp_path / name for name in names[:2])
        (tmp_path / "a.safetensors").unlink()
        with pytest.raises(NotFoundError, match=r"a\.safetensors is missing"):
            locate(tmp_path)

    @pytest.mark.parametrize(
        "content",
        [
            *map(index, ("../a", "/a", "a/b", "a\\b", "..", "", "a\0", "C:a", 1, None)),
            *(index(), b"{", b"[]", b"{}", b'{"weight_map": []}', b"\xff", b"[" * 100000),
        ],
        ids=lambda content: repr(content[:40]),
    )
    def test_index_that_lies(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "folder").mkdir()
        (tmp_path / "a").touch()
        files = {"config.json": CONFIG, "model.safetensors.index.json": content}
        with pytest.raises(WeightsError) as caught:
            locate(self.make(tmp_path / "folder", files))
        assert caught.value.exit_code == 65
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
    def test_only_pickles(self, tmp_path: Path, name: str) -> None:
        self.make(tmp_path, {"config.json": CONFIG, name: b""})
        with pytest.raises(NotFoundError, match=f"holds {name}.*`gptx convert {tmp_path} DST`"):
            locate(tmp_path)

    def test_what_may_be_missing(self, tmp_path: Path) -> None:
        with pytest.raises(NotFoundError, match=r"config\.json is missing"):
            locate(tmp_path)
        self.make(tmp_path, {"config.json": CONFIG})
        with pytest.raises(NotFoundError, match=r"model\.safetensors is missing"):
            locate(tmp_path)
        self.make(tmp_path, {"model.safetensors": b""})
        assert locate(tmp_path).tokenizer == {}

    def test_a_file_is_no_folder(self, tmp_path: Path) -> None:
        self.make(tmp_path, {"model.safetensors": b""})
        with pytest.raises(NotFoundError, match="is a file, expected"):
            locate(tmp_path / "model.safetensors")


class TestDownload:
    def test_every_name(self, server: HubServer, client: Client) -> None:
        repos = sorted(set(ALIASES.values()))
        server.repos |= {repo: {"main": model(seed)} for seed, repo in enumerate(repos)}
        names = [*ALIASES, *repos]
        results = client.run(*({"model": name} for name in names))
        for name, result in zip(names, results, strict=True):
            repo = ALIASES.get(name, name)
            assert result["name"] == repo
            assert result["revision"] == commit_of(repo, "main")
            check_files(result, model(repos.index(repo)))
            assert set(result["tokenizer"]) == {"tokenizer.json"}
        assert client.wrong() == client.partial() == []
        assert client.stderr == ""  # no progress bars where there is no terminal

    def test_all_files_from_one_commit(self, server: HubServer, client: Client) -> None:
        server.repos["org/model"]["v1"] = model(7)
        check_files(client.one("org/model", revision="v1"), model(7))
        assert server.log()[0] == "HEAD /org/model/resolve/v1/config.json"
        commit = commit_of("org/model", "v1")
        assert all(f"/resolve/{commit}/" in line for line in server.log()[1:])
        assert len(server.log("GET", "/resolve/")) == 4  # of them two for the weights

    def test_cached_needs_one_request_or_none(self, server: HubServer, client: Client) -> None:
        files = model()
        del files["tokenizer.json"]
        server.repos["org/model"]["main"] = files
        first = client.one("org/model")
        check_files(first, files)
        assert set(first["tokenizer"]) == {"vocab.json", "merges.txt"}
        server.requests.clear()
        assert client.one("org/model")["weights"] == first["weights"]
        assert server.log() == ["HEAD /org/model/resolve/main/config.json"]
        server.requests.clear()
        pinned = client.one("org/model", revision=commit_of("org/model", "main"))
        assert pinned["weights"] == first["weights"]
        assert pinned["connections"] == []
        assert server.log() == []

    def test_branch_that_moves(self, server: HubServer, client: Client) -> None:
        old, new = "a" * 40, "b" * 40
        repo = server.repos["org/model"] = {"main": old, old: model(1), new: model(2)}
        server.after_request = lambda: repo.update(main=new)  # while the first run downloads
        ref = client.cache / "models--org--model" / "refs" / "main"
        during = client.one("org/model")
        check_files(during, model(1))
        assert during["revision"] == ref.read_text() == old
        after, pinned = client.run(
            {"model": "org/model"}, {"model": "org/model", "revision": old, "offline": True}
        )
        check_files(after, model(2))
        assert after["revision"] == ref.read_text() == new
        check_files(pinned, model(1))

    @pytest.mark.parametrize("revision", ["refs/pr/1", "v1.0"])
    def test_other_revisions(self, server: HubServer, client: Client, revision: str) -> None:
        server.repos["org/model"][revision] = model(4)
        server.faults.same_host = True
        online, offline = client.run(
            {"model": "org/model", "revision": revision},
            {"model": "org/model", "revision": revision, "offline": True},
        )
        check_files(online, model(4))
        check_files(offline, model(4))

    def test_config_and_tokenizer_alone(self, server: HubServer, client: Client) -> None:
        assert client.one("org/model", weights=False)["weights"] == []
        assert server.log("", "safetensors") == []

    def test_shards(self, server: HubServer, client: Client) -> None:
        files = model()
        files["b.safetensors"], files["a.safetensors"] = files.pop("model.safetensors"), tensors(1)
        files["model.safetensors.index.json"] = index("a.safetensors", "b.safetensors")
        server.repos["org/model"]["main"] = files
        name = "model.safetensors.index.json"
        server.repos["org/liar"] = {"main": files | {name: index("../a")}}
        server.repos["org/short"] = {"main": files | {name: index("c.safetensors")}}
        good, liar, short = client.run(*({"model": f"org/{n}"} for n in ("model", "liar", "short")))
        check_files(good, files)
        check(liar, WeightsError, "'../a'")
        check(short, NotFoundError, "c.safetensors")

    def test_other_tools_share_the_cache(self, server: HubServer, client: Client) -> None:
        code = (
            "from huggingface_hub import hf_hub_download, scan_cache_dir\n"
            "for name in ('config.json', 'model.safetensors', 'tokenizer.json'):\n"
            "    print(hf_hub_download({!r}, name))\n"
            "report = scan_cache_dir()\n"
            "assert not report.warnings, report.warnings\n"
        )
        server.repos["org/other"] = {"main": model(2)}

        def other(repo: str) -> list[str]:
            env = {**os.environ, "HF_ENDPOINT": client.url, "HF_HOME": str(client.home)}
            env |= {"NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}
            command = [sys.executable, "-c", code.format(repo)]
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return done.stdout.split()

        paths = other("org/model")
        result = client.one("org/model", offline=True)
        assert [result["config"], *result["weights"], *result["tokenizer"].values()] == paths
        mine = client.one("org/other")
        server.requests.clear()
        assert other("org/other")[1:2] == mine["weights"]
        assert server.log("GET") == []

    def test_no_symlinks(self, server: HubServer, client: Client) -> None:
        if not hasattr(constants, "HF_HUB_DISABLE_SYMLINKS"):
            pytest.skip("this huggingface_hub cannot do without symlinks")
        env = {"HF_HUB_DISABLE_SYMLINKS": "1"}
        first, again, found = client.run(
            {"model": "org/model"},
            {"model": "org/model", "verify_cached": True},
            {"model": "org/model", "offline": True},
            env=env,
        )
        for result in (first, again, found):
            check_files(result, model())
            assert not any(Path(path).is_symlink() for path in result["weights"])
        Path(first["weights"][0]).unlink()
        Path(first["weights"][0]).write_bytes(b"damaged")
        check_files(client.one("org/model", verify_cached=True, env=env), model())


class TestRefusals:
    def test_gated(self, server: HubServer, client: Client) -> None:
        server.faults.gated["org/model"] = "hf_good"
        none, bad, good = client.run(
            {"model": "org/model"},
            {"model": "org/model", "token": "hf_bad"},
            {"model": "org/model", "token": "hf_good"},
        )
        check(none, AuthorizationError, "org/model", "accept the terms", "HF_TOKEN")
        check(bad, AuthorizationError, "this token")
        assert "hf_bad" not in bad["message"]
        check_files(good, model())
        on_cdn = [request for request in server.requests if request.path.startswith("/cdn/")]
        assert on_cdn
        assert not any("authorization" in request.headers for request in on_cdn)
        shutil.rmtree(client.cache)
        check_files(client.one("org/model", env={"HF_TOKEN": "hf_good"}), model())

    def test_missing(self, server: HubServer, client: Client) -> None:
        files = model()
        del files["config.json"]
        server.repos["org/empty"] = {"main": files}
        server.repos["org/pickles"] = {"main": {"config.json": CONFIG, "pytorch_model.bin": b"1"}}
        server.repos["org/bare"] = {"main": {"config.json": CONFIG}}
        repo, revision, file, pickles, bare = client.run(
            {"model": "org/none"},
            {"model": "org/model", "revision": "v9"},
            {"model": "org/empty"},
            {"model": "org/pickles"},
            {"model": "org/bare"},
        )
        check(repo, NotFoundError, "org/none", "main", "config.json", "no such repository", "token")
        check(revision, NotFoundError, "org/model", "v9", "revision")
        check(file, NotFoundError, "org/empty", "main", "config.json")
        check(pickles, NotFoundError, "pytorch_model.bin", "gptx convert")
        check(bare, NotFoundError, "org/bare", "gptx convert")

    def test_status(self, server: HubServer, client: Client) -> None:
        kinds = {401: AuthorizationError, 403: AuthorizationError, 404: NotFoundError}
        kinds |= dict.fromkeys((408, 418, 429, 500, 503), HubUnavailableError)
        for status in kinds:
            server.repos[f"org/{status}"] = {"main": model()}
            server.faults.status[f"org/{status}"] = status
        results = client.run(*({"model": f"org/{s}"} for s in kinds), impatient=True)
        for (status, kind), result in zip(kinds.items(), results, strict=True):
            check(result, kind, f"org/{status}", "config.json")
        assert client.published() == []

    @pytest.mark.parametrize("url", ["http://127.0.0.1:9", "nonsense", "http://[", "{}/other"])
    def test_not_a_hub(self, server: HubServer, client: Client, url: str) -> None:
        env = {"HF_ENDPOINT": url.format(server.url)}
        result = client.one("org/model", env=env, impatient=True)
        if url == "http://[" and result["exit"] == ParameterError.exit_code:
            return check(result, ParameterError, "HF_", "Invalid IPv6 URL")  # refused at import
        check(result, NotFoundError if url == "{}/other" else HubUnavailableError)


class TestInterruptions:
    def test_cut_once(self, server: HubServer, client: Client) -> None:
        server.faults.cut, server.faults.cuts = {"model.safetensors": 70000}, 1
        result = client.one("org/model", impatient=True, chunk=10000)
        if "error" in result and hf_version < "2":
            check(result, HubUnavailableError)  # before, it did not go on by itself
            result = client.one("org/model")
        check_files(result, model())
        ranges = [r.headers["range"] for r in server.requests if "range" in r.headers]
        assert set(ranges) == {"bytes=70000-"}

    def test_always_cut_then_resumed(self, server: HubServer, client: Client) -> None:
        server.faults.cut = {"model.safetensors": 70000}
        server.faults.no_range = True
        result = client.one("org/model", impatient=True, chunk=10000)
        check(result, HubUnavailableError, "try again")
        assert len(server.log("GET", "/cdn/")) < 10  # it gave up
        assert client.wrong() == []
        assert not list(client.cache.glob("models--*/snapshots/*/model.safetensors"))
        assert [path.stat().st_size for path in client.partial()] == [70000]
        server.faults.cut, server.faults.no_range = {}, False
        server.requests.clear()
        check_files(client.one("org/model"), model())
        assert {r.headers.get("range") for r in server.requests if r.method == "GET"} >= {
            "bytes=70000-"
        }
        assert client.partial() == client.wrong() == []

    @pytest.mark.parametrize("left", [b"rubbish", b"rubbish" * 100000])
    def test_leftover_that_does_not_fit(
        self, server: HubServer, client: Client, left: bytes
    ) -> None:
        blobs = client.cache / "models--org--model" / "blobs"
        blobs.mkdir(parents=True)
        etag = etag_of("model.safetensors", tensors(0))
        (blobs / f"{etag}.incomplete").write_bytes(left)
        check_files(client.one("org/model"), model())
        assert client.partial() == client.wrong() == []

    def test_no_connection(self, server: HubServer, client: Client) -> None:
        check_files(client.one("org/model"), model())
        commit = commit_of("org/model", "main")
        server.stop()
        branch, pinned, other = client.run(
            {"model": "org/model"},
            {"model": "org/model", "revision": commit},
            {"model": "org/other"},
            impatient=True,
        )
        check_files(branch, model())
        check_files(pinned, model())
        check(other, HubUnavailableError, "org/other", client.url)

    def test_no_connection_and_half_a_cache(self, server: HubServer, client: Client) -> None:
        client.one("org/model", weights=False)
        server.stop()
        commit = commit_of("org/model", "main")
        for result in client.run(
            {"model": "org/model"}, {"model": "org/model", "revision": commit}, impatient=True
        ):
            check(result, HubUnavailableError, "org/model")


class TestIntegrity:
    @pytest.mark.parametrize("fault", ["corrupt", "shorter"])
    def test_wrong_content(self, server: HubServer, client: Client, fault: str) -> None:
        names = ["model.safetensors", "tokenizer.json", "config.json"]
        repos = {f"org/{name}": name for name in names}
        for repo, name in repos.items():
            server.repos[repo] = {"main": model()}
            getattr(server.faults, fault).add(f"{repo}/{name}")
        jobs = [{"model": repo} for repo in repos]
        results = client.run(*jobs)
        assert client.wrong() == client.partial() == []
        for (repo, name), result in zip(repos.items(), results, strict=True):
            check(result, IntegrityError, name, repo)
            published = [path for path in client.published() if repo.replace("/", "--") in path]
            assert len(published) == {"config.json": 0, "tokenizer.json": 2}.get(name, 4)
            for trace in (f"/{name}", etag_of(name, model()[name]), "refs"):
                assert not [path for path in published if path.endswith(trace) or trace == path]
        getattr(server.faults, fault).clear()
        for result in client.run(*jobs):
            check_files(result, model())

    def test_two_processes_at_once(self, server: HubServer, client: Client) -> None:
        server.faults.delay = 0.03  # 0.4 s for the weights
        processes = [client.start({"model": "org/model"}) for _ in range(3)]
        for process in processes:
            check_files(client.finish(process)[0], model())
        assert client.wrong() == client.partial() == []
        assert len(server.log("GET", "/cdn/org/model")) == 1  # the others waited for it

    @pytest.mark.parametrize("corrupt", [False, True])
    def test_never_seen_wrong(self, server: HubServer, client: Client, corrupt: bool) -> None:
        server.faults.delay = 0.02
        if corrupt:
            server.faults.corrupt.add("model.safetensors")
        processes = [client.start({"model": "org/model"}) for _ in range(2)]
        seen, polls = self.watch(client, lambda: any(p.poll() is None for p in processes))
        results = [client.finish(process)[0] for process in processes]
        assert polls > 20
        assert seen == set()
        for result in results:
            if corrupt:
                check(result, IntegrityError)
            else:
                check_files(result, model())
        # The watcher can fail:
        blob = next(client.cache.glob("models--*/blobs/*"))
        blob.write_bytes(b"wrong")
        assert self.watch(client, lambda: False)[0] == {str(blob)}

    @staticmethod
    def watch(client: Client, running: Callable[[], bool]) -> tuple[set[str], int]:
        seen: set[str] = set()
        polls = 0
        while True:
            last = not running()
            seen.update(client.wrong())
            for path in client.cache.glob("models--*/snapshots/*/*"):
                blob = path.resolve()
                if path.name not in model() or path.read_bytes() != model()[path.name]:
                    seen.add(str(blob))
            polls += 1
            if last:
                return seen, polls
            time.sleep(0.005)

    def test_verify_cached(self, server: HubServer, client: Client) -> None:
        weights = Path(client.one("org/model")["weights"][0])
        weights.write_bytes(tensors(1))  # through the link, into the blob
        trusting, offline = client.run(
            {"model": "org/model"}, {"model": "org/model", "verify_cached": True, "offline": True}
        )
        assert trusting["weights"] == [str(weights)]
        check(offline, IntegrityError, str(weights), "damaged")
        assert client.wrong() != []
        server.requests.clear()
        check_files(client.one("org/model", verify_cached=True), model())
        assert client.wrong() == []
        assert [line for line in server.log("GET") if "safetensors" not in line] == []

    def test_verify_cached_behind_two_links(self, server: HubServer, client: Client) -> None:
        """huggingface_hub 2.4 may make a blob a link into a store shared by repositories."""
        weights = Path(client.one("org/model")["weights"][0])
        if not weights.is_symlink():
            pytest.skip("this file system has no symlinks")
        blob, shared = weights.parent / os.readlink(weights), client.cache / "blobs" / ("ab" * 32)
        shared.parent.mkdir()
        blob.rename(shared)
        blob.symlink_to(shared)
        server.requests.clear()
        check_files(client.one("org/model", verify_cached=True), model())
        assert server.log("GET") == []
        shared.write_bytes(b"damaged")
        check_files(client.one("org/model", verify_cached=True), model())


class TestOffline:
    def test_with_and_without_cache(self, server: HubServer, client: Client) -> None:
        check_files(client.one("org/model"), model())
        online = server.log()
        assert online
        jobs = [{"model": "org/model", "offline": True}, {"model": "org/none", "offline": True}]
        jobs += [{"model": "org/model", "offline": True, "revision": "v1"}]
        found, none, other = client.run(*jobs)
        plain, unknown = client.run(
            {"model": "org/model"}, {"model": "org/none"}, env={"HF_HUB_OFFLINE": "1"}
        )
        for result in (found, plain):
            check_files(result, model())
        for result in (none, unknown):
            check(result, NotFoundError, "org/none", "offline", "gptx download org/none")
        check(other, NotFoundError, "org/model", "v1", "offline")
        for result in (found, none, other, plain, unknown):
            assert result["connections"] == []
        assert server.log() == online

    def test_the_audit_sees_connections(self, client: Client) -> None:
        assert client.one("org/model", weights=False)["connections"] != []

    def test_half_a_cache(self, server: HubServer, client: Client) -> None:
        client.one("org/model", weights=False)
        result = client.one("org/model", offline=True)
        check(result, NotFoundError, "model.safetensors", "offline")
        assert result["connections"] == []


class TestStorage:
    @pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_FSIZE on Windows")
    def test_file_too_large(self, server: HubServer, client: Client) -> None:
        result = client.one("org/model", largest_file=100_000)
        check(result, StorageError, "model.safetensors", str(client.cache), "HF_HOME")
        assert client.wrong() == client.partial() == []
        assert not [entry for entry in client.published() if "safetensors" in entry]
        check_files(client.one("org/model"), model())

    def test_disk_full(self, server: HubServer, client: Client) -> None:
        client.cache.mkdir(parents=True)
        mount = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(client.cache)]
        if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("cannot mount a small tmpfs here")
        try:
            result = client.one("org/model")
            check(result, StorageError, "model.safetensors", "No space left")
            assert client.wrong() == client.partial() == []
            assert not [entry for entry in client.published() if "safetensors" in entry]
        finally:
            subprocess.run(["umount", str(client.cache)], check=True)

    def test_cache_that_is_no_folder(self, server: HubServer, client: Client) -> None:
        client.cache.write_bytes(b"")
        check(client.one("org/model"), StorageError, str(client.cache))
