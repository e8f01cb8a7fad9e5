"""gptx.hub.resolve: names and folders without a connection."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gptx.conversions.registry import FORMATS
from gptx.embedded import EMBEDDED
from gptx.errors import DataError, NotFoundError, ParameterError, StorageError, WeightsError
from gptx.hub.resolve import ALIASES, FILE_SUFFIXES, local_path, locate
from tests.support.cli import raises_error
from tests.support.hub import CONFIG, index, model
from tests.support.permissions import folder_of_another_user, unprivileged

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    b"size 12345\n"
)


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
        code = (
            "import sys\n"
            "from gptx.hub.resolve import locate\n"
            "locate('shakespeare')\n"
            "print(*sys.modules)"
        )
        modules = subprocess.check_output([sys.executable, "-c", code], text=True).split()
        assert "gptx.hub.resolve" in modules
        assert not {"huggingface_hub", "gptx.hub.repository"} & set(modules)

    @pytest.mark.parametrize("name", ["", "  ", "a\0b", None, 3, b"gpt2"])
    def test_invalid_name(self, name: Any) -> None:
        with pytest.raises(ParameterError, match="expected an embedded name"):
            locate(name)

    @pytest.mark.parametrize(
        "name",
        [
            *("./gpt2", "../gpt2", "/gpt2", "~/no-such-folder", "a/b/c", "a\\b", "a b", "-a"),
            *("a--b", "https://example.com/gpt2", "é", "a\nb", Path("gpt2"), "x" * 5000),
        ],
    )
    def test_missing_folder_or_repository(self, name: Any) -> None:
        with pytest.raises(NotFoundError, match="expected an embedded name") as caught:
            locate(name)
        assert caught.value.exit_code == 66
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "name",
        ["x.gguf", "ckpt.pt", "model.safetensors", "models/x.GGUF", "./x.bin", Path("a.json")],
    )
    def test_missing_file(self, name: Any) -> None:
        with pytest.raises(NotFoundError, match=f"^file '{name}' does not exist, expected"):
            locate(name)

    @pytest.mark.parametrize("rest", ["", "/", "/tree/main", "/resolve/main/x.gguf"])
    @pytest.mark.parametrize("host", ["https://huggingface.co", "https://hf.co", "hf.co"])
    def test_address_on_the_hub(self, host: str, rest: str) -> None:
        address = f"{host}/org/my-gpt.2{rest}"
        with raises_error(NotFoundError, f"{address!r} is an address, expected", "org/my-gpt.2"):
            locate(address)

    def test_another_address(self) -> None:
        with raises_error(NotFoundError, "is an address, expected an embedded name"):
            locate("https://example.com/x.gguf")

    def test_revision_in_the_name(self) -> None:
        with raises_error(NotFoundError, "expected 'org/x' and revision='v1'"):
            locate("org/x@v1")
        for name in ("org/x@", "@v1", "a b@v1"):
            with raises_error(NotFoundError, f"model {name!r} does not exist"):
                locate(name)

    def test_suffixes_of_all_formats_are_those_of_files(self) -> None:
        suffixes = {row.suffix for row in FORMATS.values() if row.suffix != "/"}
        assert suffixes <= set(FILE_SUFFIXES)

    @pytest.mark.parametrize("revision", ["", "../../etc", "/main", "main/", "a b", "a\\b", "a\0"])
    def test_invalid_revision(self, revision: str) -> None:
        with pytest.raises(ParameterError, match="revision is"):
            locate("gpt2", revision=revision)

    def test_error_about_a_token_hides_it(self) -> None:
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

    def test_folder_takes_precedence_over_the_hub(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    def test_invalid_index(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "folder").mkdir()
        (tmp_path / "a").touch()
        files = {"config.json": CONFIG, "model.safetensors.index.json": content}
        with pytest.raises(WeightsError) as caught:
            locate(self.make(tmp_path / "folder", files))
        assert caught.value.exit_code == 65
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("n_bytes", [2**23, 2**23 + 1])
    def test_size_of_an_index(self, tmp_path: Path, n_bytes: int) -> None:
        files = {"config.json": CONFIG, "a": b""}
        files["model.safetensors.index.json"] = index("a").ljust(n_bytes)
        self.make(tmp_path, files)
        if n_bytes == 2**23:
            assert locate(tmp_path).weights == (tmp_path / "a",)
        else:
            with raises_error(WeightsError, "index.json is invalid", f"at most {2**23} bytes"):
                locate(tmp_path)

    def test_folder_with_only_pickles(self, tmp_path: Path) -> None:
        self.make(tmp_path, {"config.json": CONFIG, "a.bin": b"", "b.bin": b""})
        (tmp_path / "pytorch_model.bin.index.json").write_bytes(index("b.bin", "a.bin"))
        assert [path.name for path in locate(tmp_path).weights] == ["b.bin", "a.bin"]
        (tmp_path / "pytorch_model.bin").touch()
        assert [path.name for path in locate(tmp_path).weights] == ["pytorch_model.bin"]
        (tmp_path / "model.safetensors").touch()
        assert [path.name for path in locate(tmp_path).weights] == ["model.safetensors"]

    def test_missing_files(self, tmp_path: Path) -> None:
        with pytest.raises(NotFoundError, match=r"config\.json is missing"):
            locate(tmp_path)
        self.make(tmp_path, {"config.json": CONFIG})
        with pytest.raises(NotFoundError, match=r"model\.safetensors is missing"):
            locate(tmp_path)
        self.make(tmp_path, {"model.safetensors": b""})
        assert locate(tmp_path).tokenizer == {}

    @pytest.mark.parametrize(
        ("name", "repository"),
        [
            ("gpt2", "openai-community/gpt2"),
            ("gpt2/", "openai-community/gpt2"),
            ("org/model", "org/model"),
        ],
    )
    def test_folder_that_hides_a_hub_id(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, repository: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        folder = tmp_path / name
        folder.mkdir(parents=True)
        hint = f"missing in folder {folder}.*the folder hides the model {repository} of the Hub"
        with pytest.raises(NotFoundError, match=rf"config\.json is {hint}: rename the folder"):
            locate(name)
        self.make(folder, {"config.json": CONFIG})
        with pytest.raises(NotFoundError, match=rf"model\.safetensors is {hint}"):
            locate(name)
        for other in (f"./{name}", folder):
            with pytest.raises(NotFoundError) as caught:
                locate(other)
            assert "Hub" not in str(caught.value)

    @pytest.mark.parametrize("part", ["", "snapshots", f"snapshots/{'a' * 40}"])
    def test_folder_of_the_cache(self, tmp_path: Path, part: str) -> None:
        folder = tmp_path / "models--openai-community--gpt2" / part
        folder.mkdir(parents=True)
        with raises_error(NotFoundError, "the cache of the Hub: give the id openai-community/gpt2"):
            locate(folder)

    @pytest.mark.parametrize(
        "name", ["config.json", "tokenizer.json", "vocab.json", "merges.txt", "model.safetensors"]
    )
    def test_git_lfs_pointer(self, tmp_path: Path, name: str) -> None:
        locate(self.make(tmp_path, model()))
        (tmp_path / name).write_bytes(POINTER)
        with pytest.raises(DataError, match=f"{name} is a git-lfs pointer.*`git lfs pull`"):
            locate(tmp_path)

    def test_git_lfs_pointer_in_a_shard(self, tmp_path: Path) -> None:
        files = {"config.json": CONFIG, "a.safetensors": b"", "b.safetensors": POINTER}
        files["model.safetensors.index.json"] = index("a.safetensors", "b.safetensors")
        with pytest.raises(DataError, match=r"b\.safetensors is a git-lfs pointer"):
            locate(self.make(tmp_path, files))

    @pytest.mark.parametrize("name", ["config.json", "vocab.json", "model.safetensors", ""])
    def test_no_permission(self, name: str) -> None:
        with folder_of_another_user() as parent:
            folder = self.make(parent, model())
            for path in folder.iterdir():
                path.chmod(0o644)
            with unprivileged():
                locate(folder)
            path = folder / name
            path.chmod(0)
            with (
                unprivileged(),
                pytest.raises(StorageError, match=f"{name}.* cannot be read .Permission denied"),
            ):
                locate(folder)
            path.chmod(0o700)

    def test_no_permission_to_search(self) -> None:
        with folder_of_another_user() as parent:
            folder = self.make(parent, model())
            (folder / "inner").mkdir()
            folder.chmod(0)
            with unprivileged():
                for path in (folder, folder / "inner", folder / "x.gguf", folder / "missing"):
                    with pytest.raises(StorageError, match=f"{path}.* cannot be read"):
                        local_path(path)
            folder.chmod(0o700)

    def test_file_instead_of_a_folder(self, tmp_path: Path) -> None:
        self.make(tmp_path, {"model.safetensors": b""})
        with pytest.raises(NotFoundError, match="is a file, expected"):
            locate(tmp_path / "model.safetensors")
