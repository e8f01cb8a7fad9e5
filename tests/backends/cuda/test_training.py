"""Gradients, loss and optimizer on the emulator, compared with the generic ones in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from gptx.backends import Backend, Positions, gradients
from gptx.training import optimizers
from tests.support.backends import make_backend
from tests.support.cuda_types import GENERIC

ERRORS = {"float32": 3e-6, "float16": 2e-3, "bfloat16": 1e-2}  # relative to the largest number
CHAINED_ERRORS = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 2e-2}  # of several products
every_dtype = pytest.mark.parametrize(
    "dtype", [pytest.param(x, marks=pytest.mark.soak if x == "float16" else ()) for x in ERRORS]
)

Random = np.random.Generator
WANTED = (True, True, True)


class Ops:
    """The CuPy backend on the stand-in, beside the generic one."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.backend: Backend = make_backend("cupy-cpu", dtype=dtype)

    def to_device(self, x: Any) -> Any:
        """Copy NumPy arrays and positions to the device; float32 stays float32."""
        if isinstance(x, Positions):
            return Positions(x.host, x.stop, x.aligned, self.backend.asarray)
        if not isinstance(x, np.ndarray):
            return x
        return self.backend.asarray(x, "float32" if x.dtype == np.float32 else None)

    def to_float64(self, x: Any) -> Any:
        """Round float64 to the backend's type."""
        if isinstance(x, np.ndarray) and x.dtype.kind == "f":
            return self.to_host(self.to_device(x))
        return x

    def to_host(self, x: Any) -> Any:
        return None if x is None else self.backend.to_numpy(x).astype(np.float64)

    def run(self, name: str, *args: Any, **options: Any) -> tuple[Any, ...]:
        """Return the results of a function on the device."""
        function = self.backend.override(name)
        assert function is not None, f"{name} is not overridden"
        on_device = {key: self.to_device(x) for key, x in options.items()}
        with self.backend.scope():
            found = function(*map(self.to_device, args), **on_device)
        return found if isinstance(found, tuple) else (found,)

    def check(self, name: str, *args: Any, error: float = 0, **options: Any) -> None:
        """Compare the results of a function of `gradients` with those of its definition."""
        found = self.run(name, *args, **options)
        generic = {key: self.to_float64(x) for key, x in options.items()}
        expected = gradients.FUNCTIONS[name](GENERIC, *map(self.to_float64, args), **generic)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for given, exact in zip(found, expected, strict=True):
            assert (given is None) == (exact is None)
            if exact is not None:
                wide = name == "pattern_vjp"
                assert given.dtype == (np.float32 if wide else self.backend.float_dtype)
                assert given.shape == exact.shape
                distance = np.abs(self.to_host(given) - exact).max()
                assert distance <= (error or ERRORS[self.dtype]) * np.abs(exact).max()


def positions(B: int, T: int) -> Positions:
    return Positions(np.broadcast_to(np.arange(T), (B, T)), T, True, np.asarray)


@every_dtype
def test_linear_vjp(dtype: str, random: Random) -> None:
    g, x = random.normal(size=(2, 35, 40)), random.normal(size=(2, 35, 24))
    w, b = random.normal(size=(24, 40)), random.normal(size=40)
    ops = Ops(dtype)
    ops.check("linear_vjp", g, x, w, b, wanted=WANTED)
    for order in "CF":
        on_device = ops.to_device(w).copy(order=order)
        found = ops.run("linear_vjp", g, x, on_device, b, wanted=WANTED)[1]
        assert found.strides == on_device.strides
    assert ops.run("linear_vjp", g, None, w, b, wanted=(False, False, True))[:2] == (None, None)


@every_dtype
def test_sums_of_many_rows_are_split(dtype: str, random: Random) -> None:
    """Every block has some of the 700 rows, and the last block of rows is short."""
    g = random.normal(size=(1, 700, 33))
    Ops(dtype).check("linear_vjp", g, None, np.ones((3, 33)), None, wanted=(False, False, True))


@every_dtype
@pytest.mark.parametrize("n", [1, 40, 257])
def test_layer_norm_vjp(dtype: str, n: int, random: Random) -> None:
    g, x = random.normal(size=(3, 4, n)), random.normal(size=(3, 4, n)) + 3
    w, b = random.normal(size=(2, n))
    ops = Ops(dtype)
    ops.check("layer_norm_vjp", g, x, w, b, 1e-2, wanted=WANTED)
    for wanted in [(True, False, False), (False, True, False), (False, False, True)]:
        ops.check("layer_norm_vjp", g, x, w, b, 1e-2, wanted=wanted)


@every_dtype
@pytest.mark.parametrize("name", ["gelu_new", "gelu", "relu"])
def test_activation_vjp(dtype: str, name: str, random: Random) -> None:
    g, x = random.normal(size=(2, 3, 2, 7)), 3 * random.normal(size=(2, 3, 2, 7))
    Ops(dtype).check(f"{name}_vjp", g[0], x[0], wanted=(True,))


@every_dtype
@pytest.mark.parametrize("C", [24, 131])
def test_embed_vjp(dtype: str, C: int, random: Random) -> None:
    ids = random.integers(0, 5, (3, 13))  # some ids are frequent, and one is absent
    ids[ids == 2] = 6
    g, table = random.normal(size=(3, 13, C)), random.normal(size=(7, C))
    ops = Ops(dtype)
    ops.check("embed_vjp", g, ids, table, wanted=(False, True))
    ops.check("embed_vjp", g, ids, table, wanted=(False, True), total=table)
    assert ops.run("embed_vjp", g, ids, table, wanted=(False, False)) == (None, None)


HEADS = [("float32", 24, 67), ("float16", 8, 70), ("bfloat16", 64, 66), ("bfloat16", 80, 40)]


@pytest.mark.parametrize(("dtype", "D", "T"), HEADS)
def test_attention_and_its_gradient(dtype: str, D: int, T: int, random: Random) -> None:
    """Of queries, keys and values in one buffer, as `linear` and `split_heads` make them."""
    B, H = (2, 2) if D == 8 else (1, 1)
    ops = Ops(dtype)
    qkv = 2 * random.normal(size=(B, T, 3 * H * D))
    heads = ops.backend.split_heads(ops.to_device(qkv), H)
    exact = GENERIC.split_heads(ops.to_float64(qkv), H)
    at = positions(B, T)
    (y,) = ops.run("attention", *heads, at, 0.2)
    expected = GENERIC.attention(*exact, at, 0.2)
    error = CHAINED_ERRORS[dtype]
    assert np.abs(ops.to_host(y) - expected).max() <= error * np.abs(expected).max()

    g = random.normal(size=(B, T, H * D))
    dq, dk, dv, *_ = ops.run("attention_vjp", g, *heads, at, 0.2, wanted=WANTED)
    (dqkv,) = ops.run("split_heads_vjp", dq, dk, dv)
    assert dqkv.data.ptr == dq.data.ptr  # no copy
    rest = {"wanted": WANTED}
    parts = gradients.attention_vjp(GENERIC, ops.to_float64(g), *exact, at, 0.2, **rest)[:3]
    expected = gradients.split_heads_vjp(GENERIC, *parts)
    for third, part in zip(np.split(ops.to_host(dqkv), 3, axis=-1), np.split(expected, 3, axis=-1),
                           strict=True):  # fmt: skip
        assert np.abs(third - part).max() <= error * np.abs(part).max()


WITHOUT_KERNEL = [("float32", 4), ("bfloat16", 4), ("float32", 136)]
WITH_KERNEL = [("float32", 24), ("float16", 8), ("bfloat16", 64)]  # widths of the test above


@pytest.mark.parametrize(("dtype", "D"), WITHOUT_KERNEL + WITH_KERNEL)
def test_attention_of_separate_arrays(dtype: str, D: int, random: Random) -> None:
    q, k, v = random.normal(size=(3, 2, 3, 5, D))
    ops, at, error = Ops(dtype), positions(2, 5), CHAINED_ERRORS[dtype]
    g = random.normal(size=(2, 5, 3 * D))
    ops.check("attention_vjp", g, q, k, v, at, 0.5, wanted=WANTED, error=error)
    ops.check("split_heads_vjp", q, k, v)
    (y,) = ops.run("attention", q, k, v, at, 0.5)
    expected = GENERIC.attention(*map(ops.to_float64, (q, k, v)), at, 0.5)
    assert np.abs(ops.to_host(y) - expected).max() <= error * np.abs(expected).max()


@pytest.mark.parametrize("size", [30.0, 1e-3])
def test_scores_of_very_different_size(size: float, random: Random) -> None:
    q, k, v = random.normal(size=(3, 1, 1, 40, 24))
    g = random.normal(size=(1, 40, 24))
    args = g, size * q, k, v, positions(1, 40), 1.0
    Ops("float32").check("attention_vjp", *args, wanted=WANTED, error=1e-4)


@every_dtype
def test_the_ops_of_attention(dtype: str, random: Random) -> None:
    q, k, v = random.normal(size=(3, 2, 3, 5, 4))
    p, g = random.uniform(size=(2, 3, 5, 5)), random.normal(size=(2, 5, 12))
    ops, at = Ops(dtype), positions(2, 5)
    (found,) = ops.run("scores", q, k, at, 0.5)
    exact = gradients.scores(GENERIC, ops.to_float64(q), ops.to_float64(k), at, 0.5)
    np.testing.assert_allclose(ops.to_host(found), exact, rtol=1e-5, atol=1e-6)
    ops.check("scores_vjp", p, q, k, at, 0.5, wanted=(True, True))
    ops.check("pattern_vjp", random.normal(size=p.shape), p)
    ops.check("pattern", exact.astype(np.float32))
    ops.check("z", p, v)
    ops.check("z_vjp", g, p, v, wanted=(True, True))


@every_dtype
@pytest.mark.parametrize("n", [5, 32, 37])
def test_dropout(dtype: str, n: int, random: Random) -> None:
    x = random.normal(size=(2, 3, n))
    counter = {"seed": 2**64 - 5, "step": 2**40, "site": 3, "first_row": 2**33}
    for p in (0.2, 0.7):
        Ops(dtype).check("dropout", x, p, **counter)


@every_dtype
@pytest.mark.parametrize("V", [64, 75])
@pytest.mark.parametrize("n_rows", [3, 100])
def test_cross_entropy(
    dtype: str, V: int, n_rows: int, random: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    ops = Ops(dtype)
    from gptx.backends.cuda import training

    bytes_per_row = 128 * ops.backend.float_dtype(0).nbytes
    monkeypatch.setattr(training, "MAX_LOGITS_BYTES", bytes_per_row * n_rows)
    x, table = random.normal(size=(7, 8)), random.normal(size=(V, 8))
    targets, weights = random.integers(0, V, 7), random.uniform(size=7).astype(np.float32)
    targets[0], weights[2] = V - 1, 0
    args = x, table, targets
    exact = gradients.cross_entropy(
        GENERIC, *map(ops.to_float64, args), weights.astype(np.float64), wanted=(True, True)
    )
    for wanted in [(True, True), (True, False), (False, True), (False, False)]:
        loss, *found = ops.run("cross_entropy", *args, weights, wanted=wanted)
        assert float(loss) == pytest.approx(float(exact[0]), rel=ERRORS[dtype])
        for yes, given, expected in zip(wanted, found, exact[1:], strict=True):
            assert (given is not None) == yes
            if yes:
                assert given.dtype == ops.backend.float_dtype
                error = np.abs(ops.to_host(given) - expected).max()
                assert error <= CHAINED_ERRORS[dtype] * np.abs(expected).max()


SHAPES = [(3, 5), (7,), (130, 127), (2, 8)]  # the third has more than a block


def tensors(random: Random, scale: float = 1.0) -> list[np.ndarray]:
    return [(scale * random.normal(size=shape)).astype(np.float32) for shape in SHAPES]


@pytest.mark.parametrize("kinds", ["32", "16", "mixed"])
def test_adamw_update(kinds: str, random: Random) -> None:
    ops = Ops("float32" if kinds == "32" else "bfloat16")
    is_float32 = {"32": [True] * 4, "16": [False] * 4, "mixed": [True, False, False, True]}[kinds]
    weights, grads, m = (tensors(random) for _ in range(3))
    v = [x**2 for x in tensors(random)]
    options = {"lr": 3e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "step": 3, "grad_scale": 0.5}
    options["decays"] = [0.1, 0.0, 0.2, 0.1]

    def on_device(arrays: Sequence[np.ndarray]) -> list[Any]:
        return [ops.backend.asarray(x, "float32") for x in arrays]

    device = [
        ops.backend.asarray(x, "float32" if wide else None)
        for x, wide in zip(grads, is_float32, strict=True)
    ]
    device[2] = device[2].copy(order="F")  # another order of memory than the weight's
    given = on_device(weights)
    found = ops.run("adamw_update", given, device, on_device(m), on_device(v), **options)
    parts = weights, map(ops.to_host, device), m, v
    exact_parts = ([x.astype(np.float64) for x in part] for part in parts)
    exact = optimizers.adamw_update(GENERIC, *exact_parts, **options)
    assert all(a is b for a, b in zip(found[0], given, strict=True))  # in place
    for part, expected in zip(found, exact, strict=True):
        for x, y in zip(part, expected, strict=True):
            np.testing.assert_allclose(ops.to_host(x), y, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_squared_norm(dtype: str, random: Random) -> None:
    ops = Ops(dtype)
    grads = [ops.backend.asarray(x) for x in tensors(random)]
    grads[0] = grads[0].T
    exact = sum(float((ops.to_host(g) ** 2).sum()) for g in grads)
    for mixed in ([], [ops.backend.asarray(np.ones(3, np.float32), "float32")]):
        (norm,) = ops.run("squared_norm", [*grads, *mixed])
        assert norm.shape == ()
        assert float(norm) == pytest.approx(exact + 3 * len(mixed), rel=1e-5)
    grads[1][3] = np.inf
    assert np.isinf(float(ops.run("squared_norm", grads)[0]))


@pytest.mark.parametrize("options", [{"dtype": "float64"}, {"generic": True}])
def test_without_kernels_the_definitions_are_used(options: dict[str, Any]) -> None:
    backend = make_backend("cupy-cpu", **options)
    names: list[Callable[..., Any] | None] = [
        backend.override(name) for name in (*gradients.FUNCTIONS, *optimizers.FUNCTIONS)
    ]
    assert not any(names)
