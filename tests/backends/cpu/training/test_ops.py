"""Ops on many rows, their gradients, the optimizer: against the generic definitions in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from gptx.backends import Backend, Positions, get_backend, gradients
from gptx.backends.cpu.training import ops as ops_module
from gptx.backends.cpu.training import parallel
from gptx.training import optimizers
from tests.support.models import EXACT

Array = np.ndarray
ALL = (True,) * 6
DEFINITIONS = {**gradients.FUNCTIONS, **optimizers.FUNCTIONS}

# Way to compute -> arguments of get_backend
WAYS: dict[str, dict[str, Any]] = {
    "one thread": {"threads": 1},
    "two threads": {"threads": 2},
    "three threads": {"threads": 3},
    "NumPy": {"threads": 2, "compile": False},
    "float64": {"threads": 2, "dtype": "float64"},
}


@pytest.fixture(params=WAYS)
def ops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """A backend that splits even the small arrays of the tests."""
    monkeypatch.setattr(parallel, "MIN_PART_ELEMENTS", 1)
    monkeypatch.setattr(parallel, "MIN_PART_WORK", 1)
    monkeypatch.setattr(parallel, "MIN_PART_ROWS", 12)  # products by rows and by columns
    return get_backend("numpy", **WAYS[request.param])


@pytest.fixture
def draw(ops: Backend, random: np.random.Generator) -> Callable[..., Array]:
    """A function that returns normal random numbers of the backend's type."""
    return lambda *shape: random.standard_normal(shape).astype(ops.dtype)


def leaves(x: Any) -> Iterator[Array]:
    """The arrays of nested tuples and lists, without None."""
    if isinstance(x, tuple | list):
        for child in x:
            yield from leaves(child)
    elif x is not None:
        yield np.asarray(x)


def wide(x: Any) -> Any:
    """Arrays of floats in float64."""
    if isinstance(x, list):
        return [wide(child) for child in x]
    return x.astype(np.float64) if isinstance(x, Array) and x.dtype.kind == "f" else x


def check(ops: Backend, name: str, *operands: Any, **options: Any) -> Any:
    """Compare an op with its definition, and with itself: bit for bit. Return its result."""
    definition = getattr(Backend, name, None) or DEFINITIONS[name]
    with ops.scope(), EXACT.scope():
        function = ops.override(name) or getattr(ops, name)
        results = [function(*_copies(operands), **options) for _ in range(2)]
        expected = definition(EXACT, *map(wide, operands), **options)
    found, again, wanted = (list(leaves(x)) for x in (*results, expected))
    assert len(found) == len(wanted)
    tolerance = 1e-6 if ops.dtype == "float32" else 1e-14
    for x, y, z in zip(found, again, wanted, strict=True):
        assert x.dtype == ops.float_dtype
        assert x.shape == z.shape
        np.testing.assert_array_equal(x, y)
        assert np.linalg.norm(x - z) <= tolerance * np.linalg.norm(z)
    return results[0]


def _copies(operands: Any) -> list[Any]:
    """Return operands whose lists of arrays may be changed in place."""
    return [[a.copy() for a in x] if isinstance(x, list) else x for x in operands]


def positions(B: int, T: int) -> Positions:
    return Positions(np.broadcast_to(np.arange(T), (B, T)), T, True, EXACT.asarray)


@pytest.mark.parametrize("shape", [(33, 1, 16), (2, 37, 21)], ids=["33x16", "74x21"])
def test_layer_norm(ops: Backend, draw: Any, shape: tuple[int, ...]) -> None:
    x, g, weight, bias = draw(*shape), draw(*shape), draw(shape[-1]), draw(shape[-1])
    check(ops, "layer_norm", x, weight, bias, 1e-5)
    check(ops, "layer_norm_vjp", g, x, weight, bias, 1e-5, wanted=ALL)
    check(ops, "layer_norm_vjp", g, x, weight, bias, 1e-5, wanted=(True, False, False))


@pytest.mark.parametrize("name", ["gelu_new", "gelu", "relu"])
def test_activations(ops: Backend, draw: Any, name: str) -> None:
    x, g = 3 * draw(3, 13, 7), draw(3, 13, 7)
    check(ops, name, x)
    check(ops, f"{name}_vjp", g, x, wanted=ALL)
    check(ops, f"{name}_vjp", g[::-1, :, ::-1], x[:, ::-1], wanted=ALL)  # not contiguous


def test_add(ops: Backend, draw: Any) -> None:
    a, b = draw(3, 13, 7), draw(3, 13, 7)
    check(ops, "add", a, b)
    check(ops, "add", a[::-1, :, ::-1], b[:, ::-1])


@pytest.mark.parametrize(("n_in", "n_out"), [(24, 40), (70, 17)])
def test_linear(ops: Backend, draw: Any, n_in: int, n_out: int) -> None:
    x, weight, bias, g = draw(3, 11, n_in), draw(n_in, n_out), draw(n_out), draw(3, 11, n_out)
    check(ops, "linear", x, weight, bias)
    check(ops, "linear", x[:, ::-1], weight, bias)
    check(ops, "linear_vjp", g, x, weight, bias, wanted=ALL)
    for n in range(3):  # the other weights are frozen
        wanted = tuple(i == n for i in range(3))
        found = check(ops, "linear_vjp", g, x if n == 1 else None, weight, bias, wanted=wanted)
        assert [x is not None for x in found] == list(wanted)


# B, H, T, D: with the compiled kernels, with BLAS, one head, one row and more rows than a block
HEADS = [(2, 3, 37, 16), (3, 1, 19, 80), (1, 2, 64, 64), (2, 2, 130, 8), (33, 1, 1, 16)]


@pytest.mark.parametrize("shape", HEADS, ids=["x".join(map(str, shape)) for shape in HEADS])
def test_attention(ops: Backend, draw: Any, shape: tuple[int, ...]) -> None:
    B, H, T, D = shape
    q, k, v = ops.split_heads(draw(B, T, 3 * H * D), H)
    check(ops, "attention", q, k, v, positions(B, T), 0.3)
    g = draw(B, T, H * D)
    found = check(ops, "attention_vjp", g, q, k, v, positions(B, T), 0.3, wanted=ALL)
    parts = found[:3]
    whole = ops.override("split_heads_vjp")(*parts)  # type: ignore[misc]
    assert np.shares_memory(whole, parts[0])
    np.testing.assert_array_equal(whole, gradients.split_heads_vjp(ops, *parts))
    other = check(ops, "split_heads_vjp", parts[1], parts[0], parts[2])
    assert not np.shares_memory(other, parts[0])


def test_attention_of_separate_arrays(ops: Backend, draw: Any) -> None:
    q, k, v = draw(2, 2, 20, 16), draw(2, 20, 2, 16).swapaxes(1, 2), draw(2, 2, 20, 16)
    check(ops, "attention", q, k, v, positions(2, 20), 0.3)
    check(ops, "attention_vjp", draw(2, 20, 32), q, k, v, positions(2, 20), 0.3, wanted=ALL)


def test_attention_that_is_not_of_all_tokens(ops: Backend, draw: Any) -> None:
    """Keys of a cache, and sequences that are not aligned: the definitions."""
    q, k, v = draw(1, 2, 40, 16), draw(1, 2, 43, 16), draw(1, 2, 43, 16)
    later = Positions(np.arange(3, 43)[None, :], 43, True, EXACT.asarray)
    check(ops, "attention", q, k, v, later, 0.3)
    first = Positions(np.arange(40)[None, :], 40, False, EXACT.asarray)
    k, v = k[:, :, :40], v[:, :, :40]
    check(ops, "attention_vjp", draw(1, 40, 32), q, k, v, first, 0.3, wanted=ALL)


@pytest.mark.parametrize("has_total", [False, True])
def test_embed_vjp(ops: Backend, draw: Any, random: Any, has_total: bool) -> None:
    ids = random.integers(0, 9, (3, 17))
    options = {"total": draw(11, 6)} if has_total else {}
    g, table = draw(3, 17, 6), draw(11, 6)
    wide_options = {name: x.copy() for name, x in options.items()}
    with ops.scope():
        _, found = ops.override("embed_vjp")(  # type: ignore[misc]
            g, ids, table, wanted=ALL, **wide_options
        )
    _, wanted = gradients.embed_vjp(
        EXACT, wide(g), ids, wide(table), wanted=ALL, **{k: wide(x) for k, x in options.items()}
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    if has_total:
        assert found is wide_options["total"]
    vjp: Any = ops.override("embed_vjp")
    assert vjp(g, ids, table, wanted=(False, False)) == (None, None)


@pytest.mark.parametrize("V", [13, 300])
@pytest.mark.parametrize("block_rows", [32, 1000])
def test_cross_entropy(
    ops: Backend, draw: Any, random: Any, monkeypatch: pytest.MonkeyPatch, V: int, block_rows: int
) -> None:
    monkeypatch.setattr(ops_module, "MIN_LOSS_ROWS", 1)
    monkeypatch.setattr(ops_module, "LOSS_BYTES", block_rows * (V + 16) * 4)
    N, C = 75, 24
    weights = (random.random(N) * (random.random(N) < 0.7)).astype(ops.dtype)  # masked tokens
    operands = draw(N, C), draw(V, C), random.integers(0, V, N), weights
    for wanted in ((True, True), (False, True), (True, False), (False, False)):
        found = check(ops, "cross_entropy", *operands, wanted=wanted)
        assert [x is not None for x in found] == [True, *wanted]
    dx = check(ops, "cross_entropy", *operands, wanted=(True, True))[1]
    assert not dx[weights == 0].any()


@pytest.mark.parametrize("n", [5, 32, 37])
def test_dropout_has_the_mask_of_the_definition(ops: Backend, draw: Any, n: int) -> None:
    x = 1 + draw(3, 11, n) ** 2
    for seed, p in ((7, 0.3), (2**64 - 1, 0.9), (0, 0.0)):
        options = {"seed": seed, "step": 2, "site": 5, "first_row": 11}
        y = check(ops, "dropout", x, p, **options)
        mask = gradients.dropout(EXACT, wide(x), p, **options) != 0
        np.testing.assert_array_equal(y != 0, mask)


def test_optimizer(ops: Backend, draw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops_module, "ADAMW_ELEMENTS", 1000)
    monkeypatch.setattr(ops_module, "NORM_ELEMENTS", 100)
    monkeypatch.setattr(ops_module, "NORM_SUMS", 3)
    shapes = [(37, 41), (17,), (1, 300)]
    weights, grads, m = ([draw(*shape) for shape in shapes] for _ in range(3))
    v = [draw(*shape) ** 2 for shape in shapes]
    options = {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "step": 3, "grad_scale": 0.5}
    check(ops, "adamw_update", weights, grads, m, v, decays=[0.1, 0.0, 0.1], **options)
    check(ops, "squared_norm", grads)
    update: Any = ops.override("adamw_update")
    new = update(weights, grads, m, v, decays=[0.1, 0.0, 0.1], **options)
    for given, found in zip((weights, m, v), new, strict=True):
        assert all(x is y for x, y in zip(given, found, strict=True))


def test_arrays_that_are_read_only(ops: Backend, draw: Any) -> None:
    """Memory-mapped weights: a step leaves them as they are."""
    weights, x = [draw(40, 24), draw(24), draw(24)], draw(2, 20, 24)
    for array in (*weights, x):
        array.flags.writeable = False
    check(ops, "layer_norm", x, weights[1], weights[2], 1e-5)
    check(ops, "layer_norm_vjp", x, x, weights[1], weights[2], 1e-5, wanted=ALL)
    check(ops, "gelu_new", x)
    moments = [[np.ones_like(w) for w in weights] for _ in range(2)]
    options = {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "step": 1, "grad_scale": 1.0}
    before = [w.copy() for w in weights]
    new, *_ = ops.on_rows.adamw_update(  # type: ignore[attr-defined]
        weights, before, *moments, decays=[0.0] * 3, **options
    )
    for old, w, changed in zip(before, weights, new, strict=True):
        np.testing.assert_array_equal(w, old)
        assert (changed != w).any()


def test_nan_propagates(ops: Backend, draw: Any, random: Any) -> None:
    x, table = draw(1, 40, 32), draw(19, 32)
    x[0, 21, 3] = np.nan
    ones, T = np.ones(32, ops.dtype), 40
    q, k, v = ops.split_heads(np.concatenate([x, x, x], axis=2), 2)
    targets, weights = random.integers(0, 19, T), np.ones(T, ops.dtype)
    with ops.scope():
        y = ops.attention(q, k, v, positions(1, T), 0.3)
        d = ops.on_rows.attention_vjp(x, q, k, v, positions(1, T), 0.3, wanted=ALL)  # type: ignore[attr-defined]
        loss, dx, dtable = ops.on_rows.cross_entropy(  # type: ignore[attr-defined]
            x[0], table, targets, weights, wanted=ALL
        )
        vjp = ops.on_rows.layer_norm_vjp(x, x, ones, ones, 1e-5, wanted=ALL)  # type: ignore[attr-defined]
        others = [ops.layer_norm(x, ones, ones, 1e-5), *vjp[:3], ops.gelu_new(x), ops.gelu(x),
                  ops.relu(x), *d[:3], dx]  # fmt: skip
        assert np.isnan(float(ops.on_rows.squared_norm([x, ones])))  # type: ignore[attr-defined]
    assert np.isnan(loss)
    assert np.isnan(dtable).any()
    assert np.isnan(y[0, 21:, :16]).all()
    assert all(np.isnan(other).any() for other in others)
