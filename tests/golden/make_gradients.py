"""Compute the golden losses and gradients with transformers and PyTorch's automatic derivatives.

The environment needs torch, transformers and the sources of gptx:

    python -m venv /tmp/reference
    /tmp/reference/bin/pip install torch==2.13.0 transformers==5.24.0
    PYTHONPATH=. /tmp/reference/bin/python tests/golden/make_gradients.py

gradients.npz
    For every case of `gradient_cases.CASES`: `<case>.loss`, the mean over the predictions that
    count, in float64; `<case>.<name of the weight>`, its gradient in the Hub's layout; and
    `<case>.crc`, the checksum of the weights. The gradients are computed in float64 and rounded to
    float32 once. The script prints the error of the reference in float32.

In the case "dropout" the masks are those that gptx defines, by NumPy's generator; their places are
those of transformers, in the order of the forward pass.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from gptx.random_weights import random_weights  # noqa: E402
from tests.golden.make_golden import reference  # noqa: E402
from tests.support.gradient_cases import (  # noqa: E402
    CASES,
    DROPOUT,
    FIRST_SEQUENCE,
    STEP,
    example,
)
from tests.support.random_models import checksum  # noqa: E402


def defined_dropout() -> Callable[..., torch.Tensor]:
    """Return a function in the place of torch.nn.functional.dropout, for one forward pass."""
    sites = itertools.count()

    def dropout(
        x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        if not training:
            return x
        site = next(sites)
        p = DROPOUT["resid" if site % 3 != 1 else "attn"] if site else DROPOUT["embd"]
        rows, n = x.shape[1:-1].numel(), x.shape[-1]
        first = FIRST_SEQUENCE * rows
        bits = [
            np.random.Philox(key=[DROPOUT["seed"], 0], counter=[0, STEP, site, row])
            .random_raw(-(-n // 4))
            .astype("<u8")
            .view("<u2")[:n]
            for row in range(first, first + len(x) * rows)
        ]
        keep = torch.tensor(np.array(bits) >= round(p * 65536)).reshape(x.shape)
        return x * keep / (1 - p)

    return dropout


def loss_and_gradients(model: torch.nn.Module, case: str) -> tuple[float, dict[str, np.ndarray]]:
    """Differentiate the weighted mean of the cross entropy; names are those of gptx."""
    model.zero_grad()
    ids, targets, weights = map(torch.tensor, example(case))
    with mock.patch("torch.nn.functional.dropout", defined_dropout()):
        logits = model.train(case == "dropout")(ids).logits.flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="none")
    loss = (losses * weights.flatten()).sum() / weights.sum()
    loss.backward()
    gradients = {
        name.removeprefix("transformer."): parameter.grad.numpy().copy()
        for name, parameter in model.named_parameters()  # a tied head once
    }
    return loss.item(), gradients


def main() -> None:
    """Write the file."""
    arrays: dict[str, np.ndarray] = {}
    for case, config in CASES.items():
        weights = random_weights(config)
        model = reference(config, weights)
        _, single = loss_and_gradients(model, case)
        loss, double = loss_and_gradients(model.double(), case)
        assert list(double) == list(config.tensor_shapes())
        noise = max(
            np.linalg.norm(single[name] - exact) / np.linalg.norm(exact)
            for name, exact in double.items()
        )
        print(f"{case:13} loss {loss:.6f}, float32 off by {noise:.1e} of a tensor's norm")
        arrays |= {f"{case}.{name}": g.astype(np.float32) for name, g in double.items()}
        arrays[f"{case}.loss"] = np.array(loss)
        arrays[f"{case}.crc"] = np.array(checksum(weights), np.uint32)
    np.savez_compressed(HERE / "gradients.npz", **arrays)


if __name__ == "__main__":
    main()
