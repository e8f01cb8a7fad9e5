"""Compare gptx with transformers at a full size of GPT-2, in float32, on random weights.

Run by hand, in an environment that has gptx, torch and transformers:

    python benchmarks/check_transformers.py --size 355M --backend numpy

Both read the same model.safetensors. Compared are the logits of every position of one prompt, and
a greedy continuation. The models are loaded one after the other. At 1558M writing the file and
running transformers take 7 GB of memory each, and the file 6.2 GB in $TMPDIR.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import gptx
from gptx.config import SIZES, GPT2Config
from gptx.random_weights import random_weights
from tests.support.random_models import random_ids, write_model

LIMIT = 1e-4  # on the largest absolute difference of two logits
N_TOKENS = 20


@dataclass
class Outcome:
    """What one implementation computed, and the seconds that its forward pass took."""

    logits: np.ndarray  # [n, V] float32
    tokens: list[int]
    seconds: float
    margin: float | None = None  # the least distance from the best to the second logit


def with_transformers(folder: Path, ids: list[int]) -> Outcome:
    """Run the reference: one forward pass, then greedy steps with its cache."""
    import torch
    import transformers

    model = transformers.GPT2LMHeadModel.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        start = time.perf_counter()
        out = model(torch.tensor([ids]), use_cache=True)
        seconds = time.perf_counter() - start
        logits = out.logits[0].numpy()
        tokens: list[int] = []
        margins = []
        for _ in range(N_TOKENS):
            best = out.logits[0, -1].topk(2)
            tokens.append(int(best.indices[0]))
            margins.append(float(best.values[0] - best.values[1]))
            last = torch.tensor([tokens[-1:]])
            out = model(last, past_key_values=out.past_key_values, use_cache=True)
    return Outcome(logits, tokens, seconds, min(margins))


def with_gptx(folder: Path, ids: list[int], backend: str) -> Outcome:
    """Run gptx on the same file."""
    model = gptx.load(folder, backend=backend)
    start = time.perf_counter()
    logits = model.logits(ids)
    seconds = time.perf_counter() - start
    tokens = model.generate(ids, max_tokens=N_TOKENS, ignore_eos=True).tokens
    return Outcome(np.asarray(logits), [int(token) for token in tokens], seconds)


def compare(ours: Outcome, reference: Outcome) -> dict[str, float | bool | None]:
    """Put the differences in numbers; relative ones are to the largest logit."""
    if ours.logits.shape != reference.logits.shape:
        raise SystemExit(
            f"gptx gave logits {ours.logits.shape}, transformers {reference.logits.shape}"
        )
    difference = float(np.abs(ours.logits - reference.logits).max())
    same = ours.tokens == reference.tokens
    return {
        "max_abs_difference": difference,
        "max_relative_difference": difference / float(np.abs(reference.logits).max()),
        "logits_std": float(reference.logits.std()),
        "same_tokens": same,
        "least_margin": reference.margin,
        "gptx_seconds": ours.seconds,
        "transformers_seconds": reference.seconds,
        "passed": difference <= LIMIT and same,  # a NaN is not
    }


def main() -> int:
    """Compare, print a line and a JSON line; 1 if they disagree."""
    parser = argparse.ArgumentParser(description="compare gptx with transformers")
    parser.add_argument("--size", choices=tuple(SIZES), default="124M")
    parser.add_argument("--backend", default="numpy")
    parser.add_argument("--length", type=int, default=256, help="tokens of the prompt")
    args = parser.parse_args()

    config = GPT2Config.of_size(args.size)
    if not 1 <= args.length <= config.n_positions - N_TOKENS:
        parser.error(f"--length must be from 1 to {config.n_positions - N_TOKENS}")
    ids = random_ids(config, 1, args.length)[0].tolist()
    with tempfile.TemporaryDirectory() as folder:
        # never bound to a name, so that the arrays are gone before a model is loaded
        path = write_model(folder, config, random_weights(config))
        reference = with_transformers(path, ids)
        ours = with_gptx(path, ids, args.backend)
    result = compare(ours, reference)
    print(
        f"{args.size} on {args.backend}, {args.length} tokens: "
        f"logits differ by {result['max_abs_difference']:.1e} at most "
        f"(standard deviation {result['logits_std']:.2f}), "
        f"{N_TOKENS} greedy tokens {'the same' if result['same_tokens'] else 'DIFFER'}"
    )
    facts = {"size": args.size, "backend": args.backend, "length": args.length}
    print(json.dumps({**facts, **result}))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
