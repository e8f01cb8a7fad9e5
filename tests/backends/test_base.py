"""Ops of every backend against float64, overrides, the registry, the runtime."""

from __future__ import annotations

import builtins
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gptx.backends import TABLE, Backend, Positions, available, get_backend
from gptx.backends.base import OPS, OVERRIDABLE
from gptx.errors import BackendError, DeviceOutOfMemory, ParameterError
from tests.emulator import cupy_stand_in
from tests.support.backends import make_backend
from tests.support.models import EXACT

# Backends that override ops.
OVERRIDING = ["numpy", "mlx", "cupy", "cupy-cpu"]


def cases(random: np.random.Generator) -> dict[str, list[tuple[Any, ...]]]:
    """Return arguments for each op: plain shapes, odd ones, a batch, a single row."""

    def x(*shape: int) -> np.ndarray:
        return random.normal(size=shape) * 2

    def positions(first: list[int], counts: list[int], slots: Any = None) -> Positions:
        T, last = max(counts), np.array(first) + counts - 1
        index = np.minimum(np.array(first)[:, None] + np.arange(T), last[:, None])
        stop = int(last.max()) + 1
        aligned = bool((last == stop - 1).all() and len(set(counts)) == 1)
        slots = slots and np.array(slots)
        return Positions(index, stop, aligned, np.asarray, slots=slots)

    starts_counts_and_capacities = [
        ([0], [7], 7),
        ([5], [1], 6),
        ([3, 3], [1, 1], 4),
        ([0, 0, 0], [5, 1, 3], 5),
        ([4, 0, 9], [1, 1, 1], 10),
        ([2, 5], [3, 3], 8),
        ([9, 0], [1, 4], 10),
    ]
    return {
        "embed": [(np.array([[3, 0], [10, 3]]), x(11, 5)), (np.array([[0]]), x(1, 3))],
        "linear": [(x(2, 3, 7), x(7, 5), x(5)), (x(1, 1, 1), x(1, 9), x(9))],
        "unembed": [(x(2, 3, 7), x(13, 7)), (x(1, 1, 4), x(1, 4))],
        "layer_norm": [
            (x(2, 3, 7), x(7), x(7), 1e-5),
            (x(1, 1, 96) + 5, x(96), x(96), 1e-3),
            (np.ones((1, 2, 4)), x(4), x(4), 1e-5),
        ],
        "gelu_new": [(x(2, 3, 7) * 3,), (np.array([[[-30.0, 0, 30]]]),)],
        "gelu": [(x(2, 3, 7) * 3,), (np.array([[[-30.0, -3, 0, 3, 30]]]),)],
        "relu": [(x(2, 3, 7),)],
        "split_heads": [(x(2, 3, 30), 5), (x(1, 1, 3), 1)],
        "softmax": [(x(2, 3, 7) * 10,), (np.array([[1e4, 0.0, -np.inf]]),)],
        "update_kv": [
            (x(len(f) + 3, 2, S + 2, 3), x(len(f), 2, max(c), 3), positions(f, c, slots))
            for f, c, S in starts_counts_and_capacities
            for slots in (range(1, len(f) + 1), [2 * (len(f) % 2) + 1, 0, 4, 2][: len(f)])
        ]
        + [
            (x(len(f), 2, S + 2, 3), x(len(f), 2, max(c), 3), positions(f, c))
            for f, c, S in starts_counts_and_capacities
        ],
        "attention": [
            (x(len(f), 2, max(c), 3), x(len(f), 2, S, 3), x(len(f), 2, S, 3), positions(f, c), 0.3)
            for f, c, S in starts_counts_and_capacities
        ],
    }


def to_device(backend: Backend, value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return backend.asarray(value)
    if isinstance(value, Positions):
        return replace(value, asarray=backend.asarray)
    return value


def run(backend: Backend, op: str, arguments: tuple[Any, ...]) -> list[np.ndarray]:
    with backend.scope():
        out = getattr(backend, op)(*(to_device(backend, a) for a in arguments))
        outs = out if isinstance(out, tuple) else (out,)
        return [backend.to_numpy(o) for o in outs]


def consistent(op: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Repeat the last column of `new` for repeated tokens, as a ragged forward pass does."""
    if op != "update_kv":
        return arguments
    buffer, new, positions = arguments
    first = positions.index[:, :1]
    return (
        buffer,
        np.take_along_axis(new, (positions.index - first)[:, None, :, None], 2),
        positions,
    )


@pytest.mark.parametrize("op", OPS)
def test_op_agrees_with_float64(op: str, backend: Backend, random: np.random.Generator) -> None:
    for arguments in cases(random)[op]:
        arguments = consistent(op, arguments)
        got = run(backend, op, arguments)
        expected = run(EXACT, op, arguments)
        assert len(got) == len(expected)
        for g, e in zip(got, expected, strict=True):
            assert g.shape == e.shape
            np.testing.assert_allclose(g, e, rtol=3e-6, atol=3e-6)


def test_every_op_is_tested(random: np.random.Generator) -> None:
    assert set(cases(random)) == set(OPS)


def test_exact_gelu_against_the_error_function(random: np.random.Generator) -> None:
    from math import erf

    x = np.linspace(-8, 8, 1001)[None, None, :]
    exact = np.array([0.5 * t * (1 + erf(t / 2**0.5)) for t in x.ravel()]).reshape(x.shape)
    np.testing.assert_allclose(run(EXACT, "gelu", (x,))[0], exact, atol=5e-7)


@pytest.mark.parametrize("name", ["mlx", "cupy", "cupy-cpu"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("op", OPS)
def test_op_in_16_bits(op: str, dtype: str, name: str, random: np.random.Generator) -> None:
    backend = make_backend(name, dtype=dtype)
    eps = {"float16": 2**-10, "bfloat16": 2**-7}[dtype]
    for arguments in cases(random)[op]:
        arguments = consistent(op, arguments)
        for g, e in zip(run(backend, op, arguments), run(EXACT, op, arguments), strict=True):
            scale = np.abs(e).max() + 1
            np.testing.assert_allclose(g, e, atol=8 * eps * scale)


@pytest.mark.parametrize("name", OVERRIDING)
def test_generic_turns_every_override_off(name: str) -> None:
    backend = make_backend(name, generic=True)
    for op in OVERRIDABLE:
        assert getattr(backend, op).__func__ is getattr(Backend, op)


@pytest.mark.parametrize("name", OVERRIDING)
def test_an_override_has_the_signature_of_the_generic_op(name: str) -> None:
    import inspect

    cls = type(make_backend(name))
    for op in OVERRIDABLE:
        override, generic = (inspect.signature(getattr(c, op)) for c in (cls, Backend))
        assert list(override.parameters) == list(generic.parameters)


@pytest.mark.parametrize("n", [1, 3, 96, 97])
def test_the_largest_numbers(backend: Backend, random: np.random.Generator, n: int) -> None:
    x = random.permuted(np.tile(np.arange(97, dtype=np.float32) - 40, (5, 1)), axis=1)
    with backend.scope():
        found = backend.to_numpy(backend.largest(backend.asarray(x, "float32"), n))
    np.testing.assert_array_equal(found, np.argsort(-x, axis=-1)[:, :n])


def test_round_trip_of_arrays(backend: Backend, random: np.random.Generator) -> None:
    floats = random.normal(size=(3, 4)).astype(np.float32)
    np.testing.assert_array_equal(backend.to_numpy(backend.asarray(floats)), floats)
    ints = np.array([[1, 2], [-3, 4]])
    back = backend.to_numpy(backend.asarray(ints))
    assert back.dtype.kind == "i"
    np.testing.assert_array_equal(back, ints)


def test_numpy_does_not_copy_float32() -> None:
    x = np.ones(5, np.float32)
    assert get_backend("numpy").asarray(x) is x


def test_two_backends_side_by_side(random: np.random.Generator) -> None:
    one, other = get_backend("numpy"), get_backend("numpy", dtype="float64")
    x = random.normal(size=(1, 2, 4))
    assert one.softmax(one.asarray(x)).dtype == np.float32
    assert other.softmax(other.asarray(x)).dtype == np.float64


def test_scope_sets_blas_threads_and_restores_them() -> None:
    from threadpoolctl import threadpool_info

    def blas() -> list[int]:
        return [lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"]

    before = blas()
    with get_backend("numpy", threads=1).scope():
        assert blas() == [1] * len(before)
    assert blas() == before


def test_the_error_of_an_unknown_backend_names_the_known_ones() -> None:
    with pytest.raises(BackendError, match=r"'tpu'.*'numpy', 'cupy', 'mlx'"):
        get_backend("tpu")


def test_an_object_that_is_not_a_namespace() -> None:
    with pytest.raises(BackendError, match="array-API namespace"):
        get_backend(builtins)


def test_numpy_does_not_support_float16() -> None:
    with pytest.raises(BackendError, match=r"'float16'.*float32, float64"):
        get_backend("numpy", dtype="float16")


def test_an_existing_backend_is_returned_unchanged() -> None:
    backend = get_backend("numpy")
    assert get_backend(backend) is backend
    with pytest.raises(ParameterError, match=r"^threads, compile cannot be set on an existing"):
        get_backend(backend, threads=1, compile=False)


def test_an_old_mlx_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    mx = pytest.importorskip("mlx.core")
    monkeypatch.setattr(mx, "__version__", "0.32.2")
    with pytest.raises(BackendError, match=r"0\.32\.2 is too old, expected 0\.32\.3"):
        get_backend("mlx")


def test_available_lists_the_registry() -> None:
    statuses = {status.name: status for status in available()}
    assert list(statuses) == list(TABLE)
    assert statuses["numpy"].available
    assert np.__version__ in statuses["numpy"].detail


def test_out_of_memory_is_a_gptx_error() -> None:
    backend = get_backend("numpy")
    with pytest.raises(DeviceOutOfMemory, match="out of memory on the numpy"), backend.scope():
        backend.zeros((2**50,))


def test_peak_memory_includes_temporaries(backend: Backend) -> None:
    with backend.scope():
        x = backend.zeros((4, 1024, 1024)) + 1  # 16 MB
        backend.to_numpy(backend.xp.sum(x))
        assert backend.peak_memory() > 8e6


def test_cupy_devices_are_numbered() -> None:
    with cupy_stand_in.installed():
        assert get_backend("cupy", device=1).device.id == 1
        for device in (2, -1, True, "0"):
            with pytest.raises(BackendError, match=f"device is {device!r}, .*from 0 to 1"):
                get_backend("cupy", device=device)
        with pytest.raises(BackendError, match="no setting for threads"):
            get_backend("cupy", threads=2)


def test_out_of_memory_on_cupy_is_a_gptx_error() -> None:
    with cupy_stand_in.installed() as cupy:
        backend = get_backend("cupy", device=1)
        with pytest.raises(DeviceOutOfMemory, match="on CUDA device 1"), backend.scope():
            cupy.empty(2**50)
        with backend.scope():
            assert backend.zeros((2,)).dtype == np.float32
        backend.synchronize()
