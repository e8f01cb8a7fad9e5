"""Files of token ids: the three forms, shards, and files that are none."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptx.errors import DataError, NotFoundError, ParameterError, StorageError, TokenizerError
from gptx.training.data import token_files
from gptx.training.data.token_files import TokenFiles, TokenWriter, find_files, open_token_file
from tests.support.cli import raises_error


def llm_c_bytes(ids: list[int], magic: int = 20240520, version: int = 1) -> bytes:
    """A file of llm.c, after its own writer (dev/data/data_common.py)."""
    header = struct.pack("<256i", magic, version, len(ids), *[0] * 253)
    return header + struct.pack(f"<{len(ids)}H", *ids)


def write(folder: Path, ids: list[int], name: str = "train", **options: object) -> list[Path]:
    with TokenWriter(folder, name, **options) as writer:  # type: ignore[arg-type]
        for first in range(0, len(ids), 7):  # in several calls
            writer.write(np.array(ids[first : first + 7]))
    assert writer.n_tokens == len(ids)
    return sorted(folder.glob(f"{name}*.bin"))


IDS = [0, 1, 255, 256, 50256, 65535, *range(20)]


def test_files_without_a_header(tmp_path: Path) -> None:
    """Those of nanoGPT and of staticgrad."""
    [path] = write(tmp_path, IDS)
    assert path.read_bytes() == struct.pack(f"<{len(IDS)}H", *IDS)
    assert TokenFiles.open([path]).read(0, len(IDS)).tolist() == IDS


def test_files_of_llm_c(tmp_path: Path) -> None:
    [path] = write(tmp_path, IDS, header=True)
    assert path.read_bytes() == llm_c_bytes(IDS)
    assert TokenFiles.open([path]).read(0, len(IDS)).tolist() == IDS


@pytest.mark.parametrize("header", [False, True], ids=["raw", "llm.c"])
def test_shards(header: bool, tmp_path: Path) -> None:
    paths = write(tmp_path, IDS, header=header, shard_tokens=10)
    assert [path.name for path in paths] == [f"train_00000{i}.bin" for i in range(3)]
    files = TokenFiles.open(paths)
    assert [file.n_tokens for file in files.files] == [10, 10, 6]
    assert files.read(0, len(IDS)).tolist() == IDS


@given(st.lists(st.integers(0, 4), min_size=1, max_size=5), st.data())
def test_windows_span_files(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], data: st.DataObject
) -> None:
    folder, paths, total = tmp_path_factory.getbasetemp(), [], sum(sizes)
    for number, size in enumerate(sizes):
        paths.append(folder / f"{number}.bin")
        first = sum(sizes[:number])
        paths[-1].write_bytes(np.arange(first, first + size, dtype="<u2").tobytes())
    n = data.draw(st.integers(0, total))
    firsts = data.draw(st.lists(st.integers(0, total - n), max_size=4))
    windows = TokenFiles.open(paths).windows(firsts, n)
    assert windows.shape == (len(firsts), n)
    assert windows.tolist() == [list(range(first, first + n)) for first in firsts]


# A wrong file is trained: llm.c #77.
@pytest.mark.parametrize(
    ("data", "parts"),
    [
        (llm_c_bytes([1], 20240801, 7), ("Llama 3 with ids of 32 bits", "`gptx prepare`")),
        (llm_c_bytes([1], 20240522), ("an evaluation of llm.c (HellaSwag, MMLU)",)),
        (llm_c_bytes([1], 20240326, 3), ("a model of llm.c",)),
        (llm_c_bytes([1], version=2), ("version 2 of llm.c's data, expected 1",)),
        (llm_c_bytes([1, 2])[:-2], ("has 1026 bytes, expected 1028 for the 2 tokens",)),
        (llm_c_bytes([1, 2]) + b"\0\0", ("has 1030 bytes, expected 1028",)),
        (llm_c_bytes([])[:8], ("is truncated: expected a header of 1024 bytes",)),
        (b"Once upon a time there was a king.", ("is a text, expected token ids",)),
        ("Es war einmal ein König".encode()[:-3], ("is a text",)),
        (b"abc", ("has 3 bytes, expected ids of two bytes",)),
    ],
    ids=range(10),
)
def test_other_files(data: bytes, parts: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(data)
    with raises_error(DataError, str(path), *parts):
        open_token_file(path)


@pytest.mark.parametrize("shift", range(4))
def test_a_long_text(shift: int, tmp_path: Path) -> None:
    """A character can begin at the end of the first bytes."""
    path = tmp_path / "x.bin"
    path.write_bytes(b"a" * shift + "𝄞".encode() * 2000)
    with raises_error(DataError, "is a text"):
        open_token_file(path)
    path.write_bytes(b"\xff" * 5000)  # the id 65535
    assert open_token_file(path).n_tokens == 2500


def test_text_is_not_taken_for_ids_of_characters(tmp_path: Path) -> None:
    """Ids below 256 have a byte 0, so a file of characters is no text."""
    path = tmp_path / "x.bin"
    path.write_bytes(np.arange(32, 127, dtype="<u2").tobytes())
    assert open_token_file(path).n_tokens == 95


# The vocabulary of the data and of the model differ: nanoGPT #483, RWKV-PEFT #52.
def test_an_id_beyond_the_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_files, "CHUNK_TOKENS", 4)
    files = TokenFiles.open(write(tmp_path, [*range(9), 12, 11, 12]))
    files.check_ids(13)
    files.check_ids(2**16)
    with raises_error(DataError, "has the token id 9 at position 0"):
        TokenFiles.open(write(tmp_path, [9, 0], "first")).check_ids(9)
    with raises_error(DataError, "has the token id 12 at position 9, and the model has 12 tokens"):
        files.check_ids(12)


def test_a_file_that_becomes_shorter(tmp_path: Path) -> None:
    [path] = write(tmp_path, IDS)
    files = TokenFiles.open([path])
    path.write_bytes(path.read_bytes()[:-2])
    with raises_error(DataError, f"{path} has become shorter than its {len(IDS)} tokens"):
        files.read(0, len(IDS))
    path.unlink()
    with raises_error(StorageError, f"{path} cannot be read"):
        files.read(0, 1)


def test_a_pattern_finds_sorted_files(tmp_path: Path) -> None:
    paths = write(tmp_path, IDS, shard_tokens=10)
    assert find_files(str(tmp_path / "train_*.bin")) == paths
    (tmp_path / "a[1].bin").touch()
    assert find_files(str(tmp_path / "a[1].bin")) == [tmp_path / "a[1].bin"]
    with raises_error(NotFoundError, "val_*.bin does not exist"):
        find_files(str(tmp_path / "val_*.bin"))


def test_too_many_tokens_for_a_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_files, "MAX_LLM_C_TOKENS", 25)
    assert len(write(tmp_path, IDS[:25], header=True)) == 1
    assert len(write(tmp_path, IDS, "shards", header=True, shard_tokens=20)) == 2
    assert len(write(tmp_path, IDS, "raw")) == 1
    with raises_error(ParameterError, "more than 25 tokens", "shard_tokens=100000000"):
        write(tmp_path, IDS, "val", header=True)


def test_an_id_of_more_than_16_bits(tmp_path: Path) -> None:
    assert write(tmp_path, [2**16 - 1])
    with raises_error(TokenizerError, "the token id 65536, and token files have ids of 16 bits"):
        write(tmp_path, [2**16], "val")


@pytest.mark.parametrize("n", [1, 9, 10, 11, 25])
def test_split(n: int, tmp_path: Path) -> None:
    files = TokenFiles.open(write(tmp_path, IDS, header=True, shard_tokens=10))
    first, rest = files.split(n)
    assert first.read(0, first.n_tokens).tolist() == IDS[:n]
    assert rest.read(0, rest.n_tokens).tolist() == IDS[n:]


def test_the_checksum_depends_on_both_ends(tmp_path: Path) -> None:
    found = {
        TokenFiles.open(write(tmp_path, ids, name)).checksum()
        for name, ids in {"a": IDS, "b": [9, *IDS[1:]], "c": [*IDS[:-1], 9], "d": IDS[:-1]}.items()
    }
    assert len(found) == 4
