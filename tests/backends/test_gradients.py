"""The vector-Jacobian products in the array API: finite differences in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gptx.backends import Positions, gradients
from tests.support.models import EXACT

Random = np.random.Generator
B, T, H, D = 2, 5, 3, 4
C = H * D
POSITIONS = Positions(np.broadcast_to(np.arange(T), (B, T)), T, True, EXACT.asarray)
HEADS = [(B, H, T, D)] * 3

# Op -> shapes of its operands of floats, and the operands after them.
OPS: dict[str, tuple[list[tuple[int, ...]], tuple[Any, ...]]] = {
    "linear": ([(B, T, C), (C, 7), (7,)], ()),
    "layer_norm": ([(B, T, C), (C,), (C,)], (1e-5,)),
    "gelu_new": ([(B, T, C)], ()),
    "gelu": ([(B, T, C)], ()),
    "relu": ([(B, T, C)], ()),
    "attention": (HEADS, (POSITIONS, 0.4)),
}


def derivative(f: Callable[[float], Any], step: float = 1e-5) -> Any:
    """The central difference of a function of one number at 0."""
    return (f(step) - f(-step)) / (2 * step)


def operands_of(op: str, random: Random) -> list[Any]:
    shapes, rest = OPS[op]
    return [*(random.standard_normal(shape) for shape in shapes), *rest]


@pytest.mark.parametrize("op", OPS)
def test_a_product_equals_finite_differences(op: str, random: Random) -> None:
    operands = operands_of(op, random)
    n_arrays = len(OPS[op][0])
    g = random.standard_normal(getattr(EXACT, op)(*operands).shape)
    wanted = tuple(i < n_arrays for i in range(len(operands)))
    found = gradients.function(EXACT, f"{op}_vjp")(g, *operands, wanted=wanted)
    assert len(found) == len(operands) or op in ("gelu_new", "gelu", "relu")
    for i in range(n_arrays):
        direction = random.standard_normal(operands[i].shape)

        def at(h: float, i: int = i, direction: Any = direction) -> float:
            moved = [*operands[:i], operands[i] + h * direction, *operands[i + 1 :]]
            return float(np.sum(g * getattr(EXACT, op)(*moved)))

        assert found[i].shape == operands[i].shape
        error = abs(derivative(at) - np.sum(found[i] * direction)) / np.linalg.norm(found[i])
        assert error < (2e-6 if op == "gelu" else 1e-8), (i, error)


@pytest.mark.parametrize("op", ["linear", "layer_norm"])
@pytest.mark.parametrize("i", range(3))
def test_a_gradient_that_is_not_wanted_is_none(op: str, i: int, random: Random) -> None:
    operands = operands_of(op, random)
    g = random.standard_normal(getattr(EXACT, op)(*operands).shape)
    wanted = tuple(k == i for k in range(len(operands)))
    vjp = gradients.function(EXACT, f"{op}_vjp")
    all_of_them = vjp(g, *operands, wanted=(True, True, True, False))
    if op == "linear" and i != 1:
        operands[0] = None  # only the gradient by the weight reads x
    for k, x in enumerate(vjp(g, *operands, wanted=wanted)):
        assert (x is not None) == (k == i)
    np.testing.assert_array_equal(vjp(g, *operands, wanted=wanted)[i], all_of_them[i])


def test_embed_adds_the_rows_of_equal_ids(random: Random) -> None:
    ids, table = np.array([[3, 1, 3], [3, 0, 1]]), random.standard_normal((5, C))
    g = random.standard_normal((2, 3, C))
    wanted = np.zeros((5, C))
    np.add.at(wanted, ids.reshape(-1), g.reshape(-1, C))
    vjp = gradients.function(EXACT, "embed_vjp")
    np.testing.assert_allclose(vjp(g, ids, table, wanted=(False, True))[1], wanted, rtol=1e-14)
    total = vjp(g, ids, table, wanted=(False, True), total=table)[1]
    np.testing.assert_allclose(total, table + wanted, rtol=1e-13)
    assert vjp(g, ids, table, wanted=(False, False)) == (None, None)


def test_split_heads_is_inverted(random: Random) -> None:
    qkv = random.standard_normal((B, T, 3 * C))
    back = gradients.function(EXACT, "split_heads_vjp")(*EXACT.split_heads(qkv, H))
    np.testing.assert_array_equal(back, qkv)


def test_attention_in_three_ops_is_attention(random: Random) -> None:
    q, k, v = (random.standard_normal(shape) for shape in HEADS)
    p = gradients.pattern(EXACT, gradients.scores(EXACT, q, k, POSITIONS, 0.4))
    y = gradients.z(EXACT, p, v)
    np.testing.assert_allclose(y, EXACT.attention(q, k, v, POSITIONS, 0.4), atol=1e-15)


def test_dropout_of_attention_equals_finite_differences(random: Random) -> None:
    heads = [random.standard_normal(shape) for shape in HEADS]
    rest = (POSITIONS, 0.4, 0.3)
    counters = {"seed": 5, "step": 1, "site": 4, "first_row": 7}
    attention = gradients.function(EXACT, "dropped_attention")
    y = attention(*heads, *rest, **counters)
    p = gradients.pattern(EXACT, gradients.scores(EXACT, *heads[:2], POSITIONS, 0.4))
    dropped = gradients.dropout(EXACT, p, 0.3, **counters)
    np.testing.assert_array_equal(y, gradients.z(EXACT, dropped, heads[2]))
    g = random.standard_normal(y.shape)
    vjp = gradients.function(EXACT, "dropped_attention_vjp")
    found = vjp(g, *heads, *rest, wanted=(True, True, True, False, False), **counters)
    for i in range(3):
        direction = random.standard_normal(heads[i].shape)

        def at(h: float, i: int = i, direction: Any = direction) -> float:
            moved = [*heads[:i], heads[i] + h * direction, *heads[i + 1 :]]
            return float(np.sum(g * attention(*moved, *rest, **counters)))

        error = abs(derivative(at) - np.sum(found[i] * direction)) / np.linalg.norm(found[i])
        assert error < 1e-8, (i, error)


def test_dropout_of_a_row_does_not_depend_on_the_other_rows(random: Random) -> None:
    x = random.standard_normal((4, T, C))
    options = {"seed": 7, "step": 2, "site": 5}
    y = gradients.dropout(EXACT, x, 0.3, **options, first_row=0)
    half = gradients.dropout(EXACT, x[2:], 0.3, **options, first_row=2 * T)
    np.testing.assert_array_equal(y[2:], half)
    kept = y != 0
    np.testing.assert_allclose(y[kept], (x / 0.7)[kept], rtol=1e-15)
    assert 0.6 < kept.mean() < 0.8
    for other in ({"seed": 8}, {"step": 3}, {"site": 4}):
        again = gradients.dropout(EXACT, x, 0.3, **(options | other), first_row=0)
        assert ((again != 0) != kept).any()


@pytest.mark.parametrize("rows", [1, 64, 130])  # less than a block, one, two and a rest
def test_cross_entropy(rows: int, random: Random) -> None:
    V = 9
    x, table = random.standard_normal((rows, C)), random.standard_normal((V, C))
    targets, weights = random.integers(0, V, rows), random.random(rows)
    weights[::3] = 0.0

    def loss_of(x: Any, table: Any) -> float:
        logits = x @ table.T
        nll = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(rows), targets]
        return float(weights @ nll)

    cross_entropy = gradients.function(EXACT, "cross_entropy")
    loss, dx, dtable = cross_entropy(x, table, targets, weights, wanted=(True, True))
    assert float(loss) == pytest.approx(loss_of(x, table), rel=1e-13)
    assert not dx[::3].any()  # masked rows
    for found, at in [
        (dx, lambda h, d: loss_of(x + h * d, table)),
        (dtable, lambda h, d: loss_of(x, table + h * d)),
    ]:
        direction = random.standard_normal(found.shape)
        wanted = derivative(lambda h, at=at, direction=direction: at(h, direction))
        assert abs(wanted - np.sum(found * direction)) < 1e-8 * max(np.linalg.norm(found), 1e-3)
    none = cross_entropy(x, table, targets, weights, wanted=(False, False))
    assert float(none[0]) == float(loss)
    assert none[1:] == (None, None)
