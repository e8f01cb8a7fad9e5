"""Compare gptx with transformers at a full size of GPT-2, in float32, on random weights.

    python -m benchmarks.check_transformers --size 355M --backend numpy

It needs torch and transformers. Both read the same model.safetensors. It compares the logits of
every position of a prompt, and a greedy continuation. The models are loaded one after the other. At
1558M, transformers takes 7 GB of memory, and the file 6.2 GB in $TMPDIR.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

import gptx
from gptx.bench.sources import random_ids, write_random_model
from gptx.config import SIZES, GPT2Config

MAX_DIFFERENCE = 1e-4  # of two logits
N_TOKENS = 20


class Output(NamedTuple):
    """Logits [T, V] in float32, greedy tokens after them, and seconds of the forward pass."""

    logits: np.ndarray
    tokens: list[int]
    seconds: float


def run_transformers(folder: Path, ids: list[int]) -> tuple[Output, float]:
    """Run the reference; return also the smallest distance of the best to the second logit."""
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
    return Output(logits, tokens, seconds), min(margins)


def run_gptx(folder: Path, ids: list[int], backend: str) -> Output:
    model = gptx.load(folder, backend=backend)
    start = time.perf_counter()
    logits = model.logits(ids)
    seconds = time.perf_counter() - start
    tokens = model.generate(ids, max_tokens=N_TOKENS, ignore_eos=True).tokens
    return Output(np.asarray(logits), [int(token) for token in tokens], seconds)


def compare(ours: Output, reference: Output) -> dict[str, float | bool]:
    """Return the differences; the relative one is relative to the largest logit."""
    if ours.logits.shape != reference.logits.shape:
        sys.exit(f"gptx gave logits {ours.logits.shape}, transformers {reference.logits.shape}")
    difference = float(np.abs(ours.logits - reference.logits).max())
    same = ours.tokens == reference.tokens
    return {
        "max_abs_difference": difference,
        "max_relative_difference": difference / float(np.abs(reference.logits).max()),
        "logits_std": float(reference.logits.std()),
        "same_tokens": same,
        "gptx_seconds": ours.seconds,
        "transformers_seconds": reference.seconds,
        "passed": difference <= MAX_DIFFERENCE and same,  # False for NaN
    }


def main() -> int:
    """Compare, and print a line of text and one of JSON; return 1 if they disagree."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.check_transformers", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--size", choices=tuple(SIZES), default="124M")
    parser.add_argument("--backend", default="numpy")
    parser.add_argument("--length", type=int, default=256, help="tokens of the prompt")
    args = parser.parse_args()

    config = GPT2Config.of_size(args.size)
    if not 1 <= args.length <= config.n_positions - N_TOKENS:
        parser.error(f"--length is {args.length}, expected 1 to {config.n_positions - N_TOKENS}")
    [ids] = random_ids(config, 1, args.length)
    with tempfile.TemporaryDirectory() as folder:
        path = write_random_model(Path(folder) / "model", config)
        reference, margin = run_transformers(path, ids)
        ours = run_gptx(path, ids, args.backend)
    result = compare(ours, reference) | {"least_margin": margin}
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
