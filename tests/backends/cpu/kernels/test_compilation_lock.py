"""One process compiles the kernels at a time."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("numba", reason="the compiled kernels need Numba (pip install '.[fast]')")
fcntl: Any = pytest.importorskip("fcntl", reason="the locks of Windows are others")
interpreter: Any = pytest.importorskip("gptx.backends.cpu.kernels.interpreter")


def locked_by_another(path: Path) -> bool:
    """Test for a lock, by an attempt that does not wait."""
    with open(path, "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def function(folder: Path, calls: list[Any]) -> Any:
    """A stand-in for a Numba function, which notes the state of the lock when it compiles."""
    lock = folder / "kernels.lock"
    stats = SimpleNamespace(cache_path=str(folder))

    def compile(signature: str) -> str:
        calls.append(locked_by_another(lock) if lock.exists() else None)
        return signature.upper()

    return SimpleNamespace(compile=compile, stats=stats)


def test_a_compilation_holds_the_lock(tmp_path: Path) -> None:
    calls: list[Any] = []
    compiled = function(tmp_path, calls)
    interpreter._compile_in_one_process(compiled)
    assert compiled.compile("signature") == "SIGNATURE"
    assert calls == [True]
    assert not locked_by_another(tmp_path / "kernels.lock")


@pytest.mark.skipif(os.name != "posix", reason="a folder of this kind is POSIX's")
def test_without_a_lock_it_compiles_all_the_same(tmp_path: Path) -> None:
    calls: list[Any] = []
    compiled = function(tmp_path / "missing", calls)
    interpreter._compile_in_one_process(compiled)
    assert compiled.compile("signature") == "SIGNATURE"
    assert calls == [None]


def test_the_kernels_are_compiled_so() -> None:
    assert interpreter.run_program.compile.__name__ == "compile_alone"
