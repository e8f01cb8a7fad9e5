"""Memory that runs out on a CUDA device: what is said, and that it is given back.

CuPy is replaced by the few names that are used of it, since its errors can be made without a
device; and at the end by the stand-in that runs the whole backend.
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
    """CuPy's, which pickle takes apart like this."""

    def __init__(self, size: int, total: int, limit: int = 0) -> None:
        super().__init__(f"Out of memory allocating {size:,} bytes")
        self._made_of = size, total, limit

    def __reduce__(self) -> Any:
        return type(self), self._made_of


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
    vars(gptx.backends).pop("cupy_memory", None)


def translated(error: Exception) -> DeviceOutOfMemory | None:
    return importlib.import_module(MODULE).out_of_memory(error)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OutOfMemoryError(12_345, 50_000), "12,345 bytes are needed, 2,000 of 80,000 are free"),
        (
            OutOfMemoryError(12_345, 50_000, 60_000),
            "12,345 bytes are needed, 10,000 of the 60,000 that CuPy is limited to are free",
        ),
        (CUDARuntimeError(2), "out of memory; of its bytes, 2,000 of 80,000 are free"),
        (CUDADriverError(2), "out of memory; of its bytes, 2,000 of 80,000 are free"),
    ],
)
def test_it_says_what_is_needed_and_what_is_free(cupy: Any, error: Exception, says: str) -> None:
    found = translated(error)
    assert isinstance(found, DeviceOutOfMemory)
    assert str(found) == (
        f"memory ran out on CUDA device 3 ({says}): use a smaller model, batch, context or dtype"
    )
    assert found.exit_code == 71


def test_what_the_failed_call_held_is_free_before_the_pool_is_emptied(cupy: Any) -> None:
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
def test_other_errors_are_none_of_its_business(cupy: Any, error: Exception) -> None:
    cupy.cuda.runtime.memGetInfo = None  # which would fail, too, after an illegal access
    assert translated(error) is None
    assert cupy.calls == []


def test_the_call_after_one_that_did_not_fit_works() -> None:
    ids = [3, 1, 4, 1, 5]
    expected = make_model(CASES["124M"], make_backend("numpy-generic")).generate(ids, max_tokens=4)
    model = make_model(CASES["124M"], make_backend("cupy-cpu"))
    pool = sys.modules["cupy"].get_default_memory_pool()
    pool.free_all_blocks()
    pool.set_limit(size=pool.used_bytes() + 4_000_000)
    try:
        with pytest.raises(DeviceOutOfMemory, match=r"[\d,]{9,} bytes are needed, [\d,]+ of the"):
            model.generate([ids * 12] * 64, max_tokens=4, batch_size=64)
        assert model.generate(ids, max_tokens=4).tokens == expected.tokens
    finally:
        pool.set_limit()
