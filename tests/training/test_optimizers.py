"""gptx.training.optimizers: AdamW, SGD and the norm of gradients on every backend."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from gptx.backends import Backend, get_backend
from gptx.training import optimizers
from tests.support.backends import make_backend

SHAPES = [(3, 5), (7,), (1, 1)]


def arrays(seed: int, scale: float = 1.0) -> list[np.ndarray]:
    rng = np.random.Generator(np.random.Philox(seed))
    return [rng.standard_normal(shape) * scale for shape in SHAPES]


def run(ops: Backend, name: str, state: list[list[np.ndarray]], **options: Any) -> list[Any]:
    """Call a function with lists of float32 or float64 arrays; return the lists on the host."""
    dtype = "float64" if ops.dtype == "float64" else "float32"
    with ops.scope():
        lists = [[ops.asarray(x.astype(dtype), dtype) for x in values] for values in state]
        new = optimizers.function(ops, name)(*lists, **options)
        return [[np.array(ops.to_numpy(x)) for x in values] for values in new]


def adamw_of_the_paper(
    w: float, g: float, m: float, v: float, *, lr: float, b1: float, b2: float, eps: float,
    decay: float, step: int,
) -> tuple[float, float, float]:  # fmt: skip
    """Algorithm 2 of https://arxiv.org/abs/1711.05101, for one number."""
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g**2
    m_hat, v_hat = m / (1 - b1**step), v / (1 - b2**step)
    return w - lr * (m_hat / (math.sqrt(v_hat) + eps) + decay * w), m, v


def test_adamw_is_that_of_the_paper(library: Backend) -> None:
    w, g = arrays(1), arrays(2)
    m, v = arrays(3), [x * x for x in arrays(4)]
    decays = [0.1, 0.0, 0.2]
    for step in (1, 2, 1000):
        found = run(
            library, "adamw_update", [w, g, m, v],
            lr=0.01, beta1=0.9, beta2=0.99, eps=1e-8, decays=decays, step=step, grad_scale=0.5,
        )  # fmt: skip
        for i, shape in enumerate(SHAPES):
            one = np.vectorize(adamw_of_the_paper, excluded={"step"})
            expected = one(w[i], 0.5 * g[i], m[i], v[i], lr=0.01, b1=0.9, b2=0.99, eps=1e-8,
                           decay=decays[i], step=step)  # fmt: skip
            for kind in range(3):
                assert found[kind][i].shape == shape
                np.testing.assert_allclose(found[kind][i], expected[kind], rtol=2e-5, atol=1e-6)


def test_sgd(library: Backend) -> None:
    w, g, m = arrays(1), arrays(2), arrays(3)
    options = {"lr": 0.1, "decays": [0.1, 0.0, 0.0], "grad_scale": 2.0}
    found = run(library, "sgd_update", [w, g, m], momentum=0.9, **options)
    for i in range(3):
        mean = 0.9 * m[i] + 2 * g[i]
        np.testing.assert_allclose(found[1][i], mean, rtol=1e-5, atol=1e-6)
        decayed = w[i] - 0.1 * (mean + options["decays"][i] * w[i])  # type: ignore[index]
        np.testing.assert_allclose(found[0][i], decayed, rtol=1e-5, atol=1e-6)
    plain, moments = run(library, "sgd_update", [w, g, []], momentum=0.0, **options)
    assert moments == []
    np.testing.assert_allclose(plain[1], w[1] - 0.2 * g[1], rtol=1e-5, atol=1e-6)


def test_the_norm_is_that_of_all_gradients(library: Backend) -> None:
    grads = arrays(5)
    with library.scope():
        on_device = [library.asarray(x.astype(np.float32)) for x in grads]
        found = float(library.to_numpy(optimizers.function(library, "squared_norm")(on_device)))
    assert found == pytest.approx(sum(float(np.sum(x * x)) for x in grads), rel=1e-5)


def test_the_norm_of_16_bit_gradients_is_a_float32() -> None:
    """The number 300² is no float16."""
    ops = make_backend("mlx", dtype="float16")
    with ops.scope():
        grads = [ops.asarray(np.full(4, 300, np.float32))]
        found = optimizers.function(ops, "squared_norm")(grads)
        assert float(ops.to_numpy(found)) == 360_000


def test_an_override_is_used_unless_it_is_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = get_backend("numpy")
    monkeypatch.setattr(type(ops), "squared_norm", lambda self, grads: "override", raising=False)
    assert optimizers.function(ops, "squared_norm")([]) == "override"
    generic = get_backend("numpy", generic=True)
    assert optimizers.function(generic, "squared_norm")([np.ones(2, np.float32)]) == 2
