"""Gradients on every backend: float32 and 16 bits against float64, overrides, whole models."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from gptx.backends import Backend, Positions, get_backend, gradients
from gptx.backends.backward import Batch, Dropout, LossFunction, loss_function
from gptx.backends.graph import named_weights
from gptx.model import Transformer, forward
from gptx.weights import to_backend
from tests.support.backends import make_backend
from tests.support.models import EXACT, drawn_weights
from tests.support.random_models import CASES, random_ids

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Case = Callable[[], Arguments]
# Function -> number of the argument that has the accumulation dtype.
WIDE = {"cross_entropy": 3, "pattern": 0, "scores_vjp": 0}
OVERRIDING = ["numpy", "mlx", "cupy", "cupy-cpu"]


def cases(name: str) -> list[Arguments]:
    """Return arguments of a function: plain shapes, odd ones, a batch, a single row.

    The random numbers of a case depend on the function and the number of the case only.
    """
    random = np.random.default_rng()

    def x(*shape: int) -> np.ndarray:
        return random.normal(size=shape)

    def heads(n: int, B: int, H: int, T: int, D: int) -> list[np.ndarray]:
        return [x(B, H, T, D) for _ in range(n)]

    def positions(B: int, T: int) -> Positions:
        return Positions(np.broadcast_to(np.arange(T), (B, T)), T, True, np.asarray)

    def p(B: int, H: int, T: int) -> np.ndarray:
        visible = np.tril(np.ones((T, T), bool))
        return np.asarray(EXACT.softmax(np.where(visible, 2 * x(B, H, T, T), -np.inf)))

    everything = {"wanted": (True,) * 5}
    sizes = [(2, 3, 7, 4), (1, 1, 1, 3), (1, 2, 37, 5)]
    activations: list[Case] = [
        lambda: ((x(2, 3, 7), 2 * x(2, 3, 7)), {"wanted": (True,)}),
        lambda: ((x(1, 1, 5), np.array([[[-30.0, -3, -1e-4, 3, 30]]])), {"wanted": (True,)}),
    ]
    ids = np.array([[3, 0, 3], [10, 3, 9]])
    counters = {"seed": 2**63 + 5, "step": 7, "site": 3, "first_row": 11}

    def embed(wanted: bool, **total: np.ndarray) -> Arguments:
        return (x(2, 3, 5), ids, x(11, 5)), {"wanted": (False, wanted), **total}

    def norm(shape: tuple[int, ...], *wanted: bool) -> Arguments:
        n = shape[-1]
        options = {"wanted": wanted} if wanted else everything
        return (x(*shape), 2 * x(*shape) + 1, x(n), x(n), 1e-5), options

    def attention(B: int, H: int, T: int, D: int, *p: float) -> tuple[Any, ...]:
        return (*heads(3, B, H, T, D), positions(B, T), 0.6, *p)

    def loss(n: int, V: int, *wanted: bool) -> Arguments:
        """The head of n rows for V words, every fifth row masked."""
        weights = (np.arange(n) % 5 > 0) / n
        return (x(n, 7), x(V, 7), random.integers(0, V, n), weights), {"wanted": wanted}

    def of_sizes(make: Callable[[int, int, int, int], Arguments]) -> list[Case]:
        return [partial(make, *size) for size in sizes]

    functions: dict[str, list[Case]] = {
        "add": [lambda: ((x(2, 3, 5), x(2, 3, 5)), {}), lambda: ((x(3, 40, 7), x(3, 40, 7)), {})],
        "embed_vjp": [
            lambda: embed(True),
            lambda: embed(True, total=x(11, 5)),
            lambda: ((x(1, 1, 3), np.array([[0]]), x(1, 3)), {"wanted": (False, True)}),
            lambda: (
                (x(4, 50, 6), random.integers(0, 5, (4, 50)), x(5, 6)),
                {"wanted": (False, True)},
            ),
            lambda: embed(False),
        ],
        "linear_vjp": [
            lambda: ((x(2, 3, 5), x(2, 3, 7), x(7, 5), x(5)), everything),
            lambda: ((x(1, 1, 9), x(1, 1, 1), x(1, 9), x(9)), everything),
            lambda: ((x(2, 40, 5), x(2, 40, 7), x(7, 5), x(5)), {"wanted": (False, True, True)}),
            lambda: ((x(2, 3, 5), None, x(7, 5), x(5)), {"wanted": (True, False, False)}),
        ],
        "layer_norm_vjp": [
            lambda: norm((2, 3, 7)),
            lambda: norm((1, 1, 96)),
            lambda: norm((5, 30, 5)),
            lambda: norm((2, 3, 7), True, False, False),
            lambda: norm((2, 3, 7), False, True, True),
        ],
        "gelu_new_vjp": activations,
        "gelu_vjp": activations,
        "relu_vjp": activations,
        "split_heads_vjp": of_sizes(lambda *size: (tuple(heads(3, *size)), {})),
        "attention_vjp": of_sizes(
            lambda B, H, T, D: ((x(B, T, H * D), *attention(B, H, T, D)), everything)
        ),
        "dropped_attention": of_sizes(lambda *size: (attention(*size, 0.3), counters)),
        "dropped_attention_vjp": of_sizes(
            lambda B, H, T, D: (
                (x(B, T, H * D), *attention(B, H, T, D, 0.3)),
                everything | counters,
            )
        ),
        "scores": of_sizes(lambda B, H, T, D: ((*heads(2, B, H, T, D), positions(B, T), 0.6), {})),
        "scores_vjp": of_sizes(
            lambda B, H, T, D: (
                (np.tril(x(B, H, T, T)), *heads(2, B, H, T, D), positions(B, T), 0.6),
                everything,
            )
        ),
        "pattern": of_sizes(lambda B, H, T, D: ((2 * x(B, H, T, T),), {})),
        "pattern_vjp": of_sizes(lambda B, H, T, D: ((x(B, H, T, T), p(B, H, T)), {})),
        "z": of_sizes(lambda B, H, T, D: ((p(B, H, T), x(B, H, T, D)), {})),
        "z_vjp": of_sizes(
            lambda B, H, T, D: (
                (x(B, T, H * D), p(B, H, T), x(B, H, T, D)),
                {"wanted": (True, True)},
            )
        ),
        "dropout": [
            lambda: ((x(2, 3, 5, 21), 0.3), counters),
            lambda: (
                (x(1, 1, 16), 0.5),
                {"seed": 0, "step": 2**40, "site": 0, "first_row": 2**33},
            ),
        ],
        "cross_entropy": [
            lambda: loss(6, 13, True, True),
            lambda: loss(140, 11, True, True),
            lambda: loss(1, 1, True, True),
            lambda: loss(70, 5, False, True),
            lambda: loss(70, 5, True, False),
            lambda: loss(70, 5, False, False),
        ],
    }
    found = []
    for number, case in enumerate(functions[name]):
        random = np.random.default_rng([zlib.crc32(name.encode()), number])
        found.append(case())
    return found


def call(
    backend: Backend, name: str, arguments: Arguments, *, generic: bool = False
) -> list[np.ndarray | None]:
    """Call a function of `gradients` with arrays of a backend; return arrays of the host."""

    def to_device(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return backend.asarray(value.copy())
        if isinstance(value, Positions):
            return replace(value, asarray=backend.asarray)
        return value

    function = partial(gradients.FUNCTIONS[name], backend)
    if not generic:
        function = gradients.function(backend, name)
    positional, keywords = arguments
    with backend.scope():
        device = [to_device(a) for a in positional]
        if name in WIDE:
            dtype = "float64" if backend.dtype == "float64" else "float32"
            device[WIDE[name]] = backend.asarray(positional[WIDE[name]], dtype)
        out = function(*device, **{key: to_device(a) for key, a in keywords.items()})
        outs = out if isinstance(out, tuple) else (out,)
        return [None if o is None else backend.to_numpy(o).copy() for o in outs]


def assert_close(
    found: Sequence[np.ndarray | None], expected: Sequence[np.ndarray | None], tolerance: float
) -> None:
    """Assert that the difference has at most `tolerance` times the norm of the expected array."""
    assert len(found) == len(expected)
    for f, e in zip(found, expected, strict=True):
        assert (f is None) == (e is None)
        if f is None or e is None:
            continue
        assert f.shape == e.shape
        np.testing.assert_array_equal(np.isneginf(f), np.isneginf(e))
        f, e = (np.where(np.isneginf(a), 0, a).astype(np.float64) for a in (f, e))
        assert np.linalg.norm(f - e) <= tolerance * np.linalg.norm(e) + 1e-30


@pytest.mark.parametrize("name", gradients.FUNCTIONS)
def test_a_function_agrees_with_float64(name: str, library: Backend) -> None:
    for arguments in cases(name):
        assert_close(call(library, name, arguments), call(EXACT, name, arguments), 1e-5)


@pytest.mark.parametrize("name", OVERRIDING)
def test_overrides_agree_with_the_generic_functions(name: str) -> None:
    backend = make_backend(name)
    overrides = {name: backend.override(name) for name in gradients.FUNCTIONS}
    assert any(overrides.values())
    for name, override in overrides.items():
        if override is None:
            continue
        parameters = list(inspect.signature(gradients.FUNCTIONS[name]).parameters)
        assert list(inspect.signature(override).parameters) == parameters[1:]
        for arguments in cases(name):
            generic = call(backend, name, arguments, generic=True)
            assert_close(call(backend, name, arguments), generic, 1e-5)


@pytest.mark.soak
@pytest.mark.parametrize("name", gradients.FUNCTIONS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("library_name", ["mlx", "cupy", "cupy-cpu"])
def test_a_function_in_16_bits(library_name: str, dtype: str, name: str) -> None:
    """Against float64 with the same operands, those that a 16-bit type can hold."""
    backend = make_backend(library_name, dtype=dtype)
    eps = {"float16": 2**-10, "bfloat16": 2**-7}[dtype]

    def rounded(value: Any) -> Any:
        is_float = isinstance(value, np.ndarray) and value.dtype.kind == "f"
        return backend.to_numpy(backend.asarray(value)).astype(np.float64) if is_float else value

    for positional, keywords in cases(name):
        with backend.scope():
            arguments = (
                tuple(rounded(a) for a in positional),
                {key: rounded(a) for key, a in keywords.items()},
            )
        assert_close(call(backend, name, arguments), call(EXACT, name, arguments), 8 * eps)


# Whole models

MODELS = {
    "plain": ("124M", {}),
    "untied": ("untied", {}),
    "gelu-erf": ("gelu-erf", {"recompute": "block"}),
    "relu": ("relu", {"recompute": "cheap"}),
    "layer-scaled": ("layer-scaled", {"trainable": ("h.0.attn.c_attn.weight", "wpe.weight")}),
    "dropout": ("124M", {"dropout": Dropout(0.1, 0.2, 0.3, seed=4)}),
}
SMALL: dict[str, Any] = {"n_layer": 2, "n_embd": 12, "n_head": 3, "vocab_size": 23}


def model_gradients(
    case: str, backend: Backend, make: Callable[..., LossFunction] = loss_function
) -> list[np.ndarray | None]:
    """Return the loss without and with dropout, then the gradients, of a small model."""
    name, options = MODELS[case]
    config = replace(CASES[name], **SMALL, bos_token_id=None, eos_token_id=None)
    ids = random_ids(config, 2, 8)
    weights = np.ones((2, 7), np.float32)
    weights[1, -3:] = 0
    batch = Batch(ids[:, :-1], ids[:, 1:], weights)
    with backend.scope():
        model = Transformer(config, to_backend(drawn_weights(config), backend), backend)
        function = make(forward, model, **options)
        arrays = dict(named_weights(model.weights))
        loss, found = function.gradients(arrays, batch, scale=0.1, step=5, first_sequence=4)
        losses = [function.loss(arrays, batch, scale=0.1), loss]
        assert set(found) == set(options.get("trainable", arrays))
        return [backend.to_numpy(x).copy() for x in (*losses, *(found[n] for n in sorted(found)))]


@pytest.mark.parametrize("case", MODELS)
def test_gradients_of_a_model_agree_with_float64(case: str, library: Backend) -> None:
    assert_close(model_gradients(case, library), model_gradients(case, EXACT), 1e-5)


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("name", ["numpy", "mlx"])
def test_gradients_of_a_model_agree_with_the_generic_ones(case: str, name: str) -> None:
    generic = model_gradients(case, make_backend(name, generic=True))
    assert_close(model_gradients(case, make_backend(name)), generic, 1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("case", MODELS)
def test_gradients_of_a_model_on_pytorch_agree_with_float64(case: str) -> None:
    backend = get_backend(pytest.importorskip("torch"))
    assert_close(model_gradients(case, backend), model_gradients(case, EXACT), 1e-5)
