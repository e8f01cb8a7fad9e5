"""Out of memory on a CUDA device: the error message, and that memory is freed.

A small double replaces CuPy, so that the tests can raise its errors. The last test uses the
stand-in.
"""

from __future__ import annotations

import importlib
import sys
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

import gptx.backends
from gptx.errors import DeviceOutOfMemory
from tests.support.backends import make_backend
from tests.support.models import make_model
from tests.support.random_models import CASES

MODULE = "gptx.backends.cuda.out_of_memory"


class OutOfMemoryError(MemoryError):
    """CuPy's error with its pickle protocol."""

    def __init__(self, size: int, total: int, limit: int = 0) -> None:
        super().__init__(f"Out of memory allocating {size:,} bytes")
        self._args = size, total, limit

    def __reduce__(self) -> Any:
        return type(self), self._args


class CUDARuntimeError(RuntimeError):
    def __init__(self, status: int) -> None:
        super().__init__("out of memory")
        self.status = status


class CUDADriverError(CUDARuntimeError):
    pass


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    calls: list[str] = []
    double = SimpleNamespace(
        calls=calls,
        get_default_memory_pool=lambda: SimpleNamespace(
            free_all_blocks=lambda: calls.append("free_all_blocks")
        ),
        cuda=SimpleNamespace(
            Device=lambda: SimpleNamespace(id=3),
            memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
            runtime=SimpleNamespace(
                memGetInfo=lambda: (2_000, 80_000), CUDARuntimeError=CUDARuntimeError
            ),
            driver=SimpleNamespace(CUDADriverError=CUDADriverError),
        ),
    )
    monkeypatch.setitem(sys.modules, "cupy", double)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield double
    sys.modules.pop(MODULE, None)
    vars(gptx.backends).pop("cuda", None)


def translated(error: Exception) -> DeviceOutOfMemory | None:
    return importlib.import_module(MODULE).translate_out_of_memory(error)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OutOfMemoryError(12_345, 50_000),
            "12,345 bytes are needed; 2,000 of 80,000 bytes are free",
        ),
        (
            OutOfMemoryError(12_345, 50_000, 60_000),
            "12,345 bytes are needed; 10,000 of CuPy's limit of 60,000 bytes are free",
        ),
        (CUDARuntimeError(2), "out of memory; 2,000 of 80,000 bytes are free"),
        (CUDADriverError(2), "out of memory; 2,000 of 80,000 bytes are free"),
    ],
)
def test_the_error_reports_needed_and_free_bytes(cupy: Any, error: Exception, message: str) -> None:
    found = translated(error)
    assert isinstance(found, DeviceOutOfMemory)
    assert str(found) == (
        f"out of memory on CUDA device 3 ({message}): use a smaller model, batch, context or dtype"
    )
    assert found.exit_code == 71


def test_arrays_of_the_failed_call_are_freed_before_the_pool_is_emptied(cupy: Any) -> None:
    class Array:
        pass

    alive: list[Any] = []

    def fails() -> None:
        temporary = Array()
        alive.append(weakref.ref(temporary))
        raise OutOfMemoryError(1, 2)

    empties = cupy.get_default_memory_pool().free_all_blocks
    pool = SimpleNamespace(free_all_blocks=lambda: (empties(), alive.append(alive[0]())))
    cupy.get_default_memory_pool = lambda: pool
    try:
        fails()
    except OutOfMemoryError as error:
        translated(error)
    assert cupy.calls == ["free_all_blocks"]
    assert alive[1] is None  # when the pool was emptied


@pytest.mark.parametrize(
    "error", [CUDARuntimeError(700), CUDADriverError(1), ValueError("other"), MemoryError("host")]
)
def test_other_errors_are_not_translated(cupy: Any, error: Exception) -> None:
    cupy.cuda.runtime.memGetInfo = None  # a call would fail, as after an illegal access
    assert translated(error) is None
    assert cupy.calls == []


def test_a_call_after_an_out_of_memory_error_succeeds() -> None:
    ids = [3, 1, 4, 1, 5]
    expected = make_model(CASES["124M"], make_backend("numpy-generic")).generate(ids, max_tokens=4)
    model = make_model(CASES["124M"], make_backend("cupy-cpu"))
    pool = sys.modules["cupy"].get_default_memory_pool()
    pool.free_all_blocks()
    pool.set_limit(size=pool.used_bytes() + 4_000_000)
    try:
        with pytest.raises(
            DeviceOutOfMemory, match=r"[\d,]{9,} bytes are needed; [\d,]+ of CuPy's"
        ):
            model.generate([ids * 12] * 64, max_tokens=4, batch_size=64)
        assert model.generate(ids, max_tokens=4).tokens == expected.tokens
    finally:
        pool.set_limit()
