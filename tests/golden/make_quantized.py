"""Quantize small random models with mlx-lm, the independent reference, and compute their logits.

The environment needs mlx-lm and the sources of gptx:

    python -m venv /tmp/mlx-lm
    /tmp/mlx-lm/bin/pip install mlx-lm==0.32.2 'mlx[cpu]==0.32.4' transformers==5.24.0
    PYTHONPATH=. /tmp/mlx-lm/bin/python tests/golden/make_quantized.py

mlx-lm-int4/, mlx-lm-int8/
    Files of mlx-lm, which quantizes the table of positions too, and logits.npz: `ids` [1, T] and
    `logits` [1, T, V], which mlx-lm computed in float32 from those files. `make_programs.py` makes
    its other quantizations.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from gptx.random_weights import random_weights  # noqa: E402
from tests.support.random_models import CASES, random_ids, write_model  # noqa: E402

CONFIG = replace(CASES["355M"], n_layer=2)
# bits, group size, type of the floats and of the scales
KINDS = [(4, 64, "float16"), (8, 32, "bfloat16")]


def make(name: str, bits: int, group_size: int, dtype: str) -> None:
    """Write one folder."""
    folder = HERE / f"mlx-lm-{name}"
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as floats:
        write_model(floats, CONFIG, random_weights(CONFIG), dtype=dtype)
        model, config = load_model(Path(floats))
    model, config = quantize_model(model, config, group_size, bits)
    save_model(folder, model)
    save_config(config, folder / "config.json")

    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    ids = random_ids(CONFIG, 1, 40)
    logits = np.array(model(mx.array(ids)))
    np.savez_compressed(folder / "logits.npz", ids=ids, logits=logits)
    print(f"{folder.name}: logits std {logits.std():.2f}")


if __name__ == "__main__":
    for bits, group_size, dtype in KINDS:
        make(f"int{bits}", bits, group_size, dtype)
