"""Gradients of a whole model: those of the definitions, and bit for bit the same in each step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gptx import weights as stored
from gptx.backends import Backend, get_backend
from gptx.backends.backward import Batch, Dropout, loss_function
from gptx.backends.cpu import memory as memory_module
from gptx.backends.cpu.memory import Recycler
from gptx.backends.graph import named_weights
from gptx.model import Transformer, forward
from tests.support.models import EXACT, drawn_weights
from tests.support.random_models import CASES, random_ids

SHRUNK = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 23}
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None}


def steps(case: str, ops: Backend, dropout: Dropout | None, n: int) -> list[tuple[Any, Any]]:
    """Loss and gradients of n equal steps."""
    config = replace(CASES[case], **SHRUNK, **NO_TOKENS)
    model = Transformer(config, stored.to_backend(drawn_weights(config), ops), ops)
    ids = random_ids(config, 3, 18)
    batch = Batch(ids[:, :-1], ids[:, 1:], np.ones((3, 17), np.float32))
    function, found = loss_function(forward, model, dropout=dropout), []
    for _ in range(n):
        with ops.scope():
            loss, gradients = function.gradients(
                dict(named_weights(model.weights)), batch, scale=1 / batch.n_tokens
            )
        # Copies: the gradients' memory goes to the next step.
        found.append((float(loss), {name: np.array(g) for name, g in gradients.items()}))
    return found


@pytest.mark.parametrize("compile", [True, False], ids=["compiled", "NumPy"])
@pytest.mark.parametrize("case", ["124M", "untied", "dropout"])
def test_gradients_in_recycled_memory(
    case: str, compile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An op that reads memory which it has not written finds NaN there."""

    def poison(recycler: Recycler, memory: np.ndarray) -> None:
        memory[...] = 0xFF
        give_back(recycler, memory)

    give_back = Recycler.give_back
    monkeypatch.setattr(Recycler, "give_back", poison)
    monkeypatch.setattr(memory_module, "MIN_RECYCLED_BYTES", 1)
    case, dropout = ("untied", Dropout(0.1, 0.2, 0.3, 4)) if case == "dropout" else (case, None)
    ((wanted_loss, wanted),) = steps(case, EXACT, dropout, 1)
    ops = get_backend("numpy", threads=2, compile=compile)
    first, *others = steps(case, ops, dropout, 3)
    assert first[0] == pytest.approx(wanted_loss, rel=1e-6)
    assert set(first[1]) == set(wanted)
    for name, g in first[1].items():
        error = np.linalg.norm(g - wanted[name])
        assert error <= 1e-5 * np.linalg.norm(wanted[name]), name
        for loss, again in others:
            assert loss == first[0]
            np.testing.assert_array_equal(again[name], g)
