"""Outputs are written atomically: a failure at any write leaves the old output."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import gptx.files
from gptx.conversions import FORMATS, convert
from gptx.errors import ParameterError, StorageError
from gptx.random_weights import random_weights
from tests.support.conversions import (
    WRITTEN,
    Failing,
    contents,
    in_a_child,
    read_all,
    source_of,
    to_format,
)
from tests.support.random_models import CASES, write_model

KILLED = 9

# By default one folder and one file; the others are slow.
SMOKE_TEST = ("safetensors", "fastgpt-dat")
at_every_write = pytest.mark.parametrize(
    "format",
    [
        name if name in SMOKE_TEST else pytest.param(name, marks=pytest.mark.kill)
        for name in WRITTEN
    ],
)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], Failing]:
    """Return a function that makes every writer call a function at its n-th write."""
    original = gptx.files.create

    def patch(at: int, fail: Callable[[], None]) -> Failing:
        counter = Failing(original, at, fail)
        for row in FORMATS.values():
            row.load_module()
        for name, module in list(sys.modules.items()):
            if name.startswith(("gptx.conversions", "gptx.files")) and hasattr(module, "create"):
                monkeypatch.setattr(module, "create", counter)
        return counter

    return patch


def prepared(format: str, tmp_path: Path) -> tuple[Path, Path, dict[str, bytes]]:
    """Write a source and an old output; return their paths and the bytes of the output."""
    old = write_model(tmp_path / "old", CASES["tiny"], random_weights(CASES["tiny"], seed=1))
    (tmp_path / "out").mkdir()
    there = to_format(format, old, tmp_path / "out")
    return source_of("tiny", tmp_path), there, contents(there)


def writes_of(format: str, source: Path, tmp_path: Path, failing: Callable[..., Failing]) -> int:
    """Count the writes of a conversion."""
    counter = failing(10**9, lambda: None)
    (tmp_path / "count").mkdir()
    to_format(format, source, tmp_path / "count")
    return 10**9 - counter.left


def raise_no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@at_every_write
def test_a_full_disk_at_any_write_leaves_the_old_output(
    format: str, tmp_path: Path, failing: Callable[..., Failing]
) -> None:
    source, there, before = prepared(format, tmp_path)
    n = writes_of(format, source, tmp_path, failing)
    assert n > 1
    for at in range(n):
        failing(at, raise_no_space)
        with pytest.raises(StorageError, match="No space left") as error:
            to_format(format, source, there.parent, overwrite=True)
        assert error.value.exit_code == 74
        assert contents(there) == before
        assert list(there.parent.iterdir()) == [there], "a temporary file is left"
    failing(n, raise_no_space)
    to_format(format, source, there.parent, overwrite=True)
    assert contents(there) != before
    assert list(there.parent.iterdir()) == [there]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@at_every_write
def test_a_kill_at_any_write_leaves_the_old_output(
    format: str, tmp_path: Path, failing: Callable[..., Failing]
) -> None:
    source, there, before = prepared(format, tmp_path)
    n = writes_of(format, source, tmp_path, failing)
    for at in sorted({*range(min(n, 8)), *range(0, n, 5), n - 1}):
        failing(at, lambda: os._exit(KILLED))
        code = in_a_child(lambda: to_format(format, source, there.parent, overwrite=True))
        assert code == KILLED
        assert contents(there) == before


@pytest.mark.parametrize("format", ["safetensors", "gguf"])
def test_an_existing_output_is_replaced_only_on_request(format: str, tmp_path: Path) -> None:
    source, there, before = prepared(format, tmp_path)
    with pytest.raises(
        ParameterError, match="already exists: give another name, or overwrite=True"
    ):
        to_format(format, source, there.parent)
    assert contents(there) == before


def test_a_folder_with_other_files_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("notes")
    for overwrite in (False, True):
        with pytest.raises(ParameterError, match=r"notes\.txt.*would be lost"):
            convert("shakespeare", tmp_path, "safetensors", overwrite=overwrite)
    assert contents(tmp_path) == {"notes.txt": b"notes"}


def test_a_folder_with_a_folder_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "out" / "model.safetensors").mkdir(parents=True)
    with pytest.raises(ParameterError, match="would be lost"):
        convert("shakespeare", tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_link_stays_and_its_target_is_replaced(kind: str, tmp_path: Path) -> None:
    format, name = ("safetensors", "real") if kind == "folder" else ("gguf", "real.gguf")
    old = write_model(tmp_path / "old", CASES["tiny"], random_weights(CASES["tiny"], seed=1))
    there, link = tmp_path / "out" / name, tmp_path / "out" / f"link{Path(name).suffix}"
    (tmp_path / "out").mkdir()
    convert(old, there, format)
    before = contents(there)
    link.symlink_to(there)
    convert(source_of("tiny", tmp_path), link, format, overwrite=True)
    assert link.is_symlink()
    assert contents(there) != before
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted([name, link.name])


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    convert("shakespeare", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    convert("shakespeare", tmp_path / "empty")
    assert contents(tmp_path / "empty") == contents(tmp_path / "out")


def test_a_model_can_replace_itself(tmp_path: Path) -> None:
    source = source_of("124M", tmp_path)
    size = (source / "model.safetensors").stat().st_size
    convert(source, source, dtype="float16", overwrite=True)
    read_all(source)()
    assert (source / "model.safetensors").stat().st_size < 0.6 * size


def test_a_damaged_source_leaves_the_old_output(tmp_path: Path) -> None:
    source, there, before = prepared("safetensors", tmp_path)
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(Exception, match="truncated or not a valid safetensors file"):
        convert(source, there, overwrite=True)
    assert contents(there) == before
