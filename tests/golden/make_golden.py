"""Compute the golden logits and texts with transformers, the independent reference.

The environment needs torch, transformers and the sources of gptx:

    python -m venv /tmp/reference
    /tmp/reference/bin/pip install torch==2.13.0 transformers==5.24.0
    PYTHONPATH=. /tmp/reference/bin/python tests/golden/make_golden.py [tinyshakespeare.txt]

Without an argument the text is $TINY_SHAKESPEARE, or ../shared/data/tinyshakespeare.txt relative
to the repository.

logits.npz
    For every case of `random_models.CASES`: `<case>.ids` [2, T], `<case>` logits [2, T, V] and
    `<case>.crc`, the checksum of the weights. The logits are computed in float64 and rounded to
    float32 once, so they are exact to half a unit in the last place. The script prints the error
    of the reference in float32.
shakespeare_greedy.json
    The embedded model in float32: greedy continuations and the loss on the held-out text.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from gptx.config import GPT2Config  # noqa: E402
from gptx.random_weights import random_weights  # noqa: E402
from tests.support.random_models import CASES, checksum, random_ids  # noqa: E402

MODEL = ROOT / "gptx" / "embedded" / "shakespeare"
N_TOKENS = 100
MIN_MARGIN = 1e-3  # between the two best logits; below it, rounding could change the token

PROMPTS = [
    "ROMEO:",
    "JULIET:\n",
    "KING RICHARD III:\n",
    "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\n",
    "O",
    "\n",
    "The",
    "To be, or not to be",
    "QUEEN MARGARET:\nWhat, were you snarling all before I came,\nReady to catch each other by",
    "MENENIUS:\nI tell you, friends, most charitable care\nHave the patricians of you. For your "
    "wants,\nYour suffering in this dearth, you may as well\nStrike at the heaven with your staves",
    "Shall I compare thee to a summer's day?\nThou art more lovely and more temperate:\n",
    "GLOUCESTER:\nNow is the winter of our discontent\nMade glorious summer by this sun of York;\n"
    "And all the clouds that lour'd upon our house\nIn the deep bosom of the ocean buried.\n"
    "Now are our brows bound with victorious wreaths;\nOur bruised arms hung up for monuments;\n",
    "PETRUCHIO:\nGood morrow, Kate; for that's your name, I hear.\n\nKATHARINA:\n",
    "my lord, ",
    "   ",
    "DUKE VINCENTIO:\nÀ la française, « café » and naïve señor — 日本 🎭!\n",
    "1597. Act II, scene 2",
    "Wherefore art thou",
    "PROSPERO:\nHast thou, spirit,\nPerform'd to point the tempest that I bade thee?\n\nARIEL:\n"
    "To every article.",
    "\n\nNURSE:\nMadam!\n\nLADY CAPULET:\nNurse, give leave awhile,\nWe must talk in secret",
]


def reference(config: GPT2Config, weights: dict[str, np.ndarray]) -> transformers.GPT2LMHeadModel:
    """Make transformers' model with these weights, in float32."""
    hub = transformers.GPT2Config(**config.to_dict(), attn_implementation="eager")
    model = transformers.GPT2LMHeadModel(hub).eval()
    head = weights.get("lm_head.weight", weights["wte.weight"])
    state = {f"transformer.{k}": torch.tensor(v) for k, v in weights.items() if k[:3] != "lm_"}
    model.load_state_dict({**state, "lm_head.weight": torch.tensor(head)}, strict=True)
    return model


def golden_logits() -> dict[str, np.ndarray]:
    """Compute the contents of logits.npz; print the error of float32 and the size of logits."""
    arrays: dict[str, np.ndarray] = {}
    for name, config in CASES.items():
        weights = random_weights(config)
        ids = random_ids(config, 2, config.n_positions)
        model = reference(config, weights)
        single = model(torch.tensor(ids)).logits
        double = model.double()(torch.tensor(ids)).logits
        noise = float((single - double).abs().max())
        print(f"{name:13} float32 off by {noise:.1e}, logits std {float(double.std()):.2f}")
        arrays[name] = double.numpy().astype(np.float32)
        arrays[f"{name}.ids"] = ids.astype(np.int32)
        arrays[f"{name}.crc"] = np.array(checksum(weights), np.uint32)
    return arrays


def greedy(model: transformers.GPT2LMHeadModel, ids: list[int]) -> tuple[list[int], float]:
    """Continue `ids` by N_TOKENS without a cache; return them and the smallest margin."""
    tokens: list[int] = []
    margin = math.inf
    for _ in range(N_TOKENS):
        logits = model(torch.tensor([ids + tokens])).logits[0, -1]
        best, second = logits.topk(2).values.tolist()
        margin = min(margin, best - second)
        tokens.append(int(logits.argmax()))
    return tokens, margin


def golden_greedy(
    model: transformers.GPT2LMHeadModel, tokenizer: tokenizers.Tokenizer
) -> list[dict[str, object]]:
    """Continue every prompt; exit if rounding could change a continuation."""
    results = []
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt).ids
        tokens, margin = greedy(model, ids)
        print(f"{len(ids):4} tokens, margin {margin:.4f}: {prompt[:40]!r}")
        if margin < MIN_MARGIN or model.config.eos_token_id in tokens:
            raise SystemExit(f"choose another prompt than {prompt!r}")
        text = tokenizer.decode(tokens, skip_special_tokens=False)
        results.append(
            {"prompt": prompt, "ids": ids, "tokens": tokens, "text": text, "margin": margin}
        )
    return results


HELDOUT_DEFINITION = (
    "Text from character int(0.9 * length) to the end, encoded at once. Windows of 256 tokens "
    "without overlap, the last one shorter; each token of a window predicts the token after it, "
    "the last one the first of the next window. Mean over all predictions, natural logarithm."
)


def heldout(
    model: transformers.GPT2LMHeadModel, tokenizer: tokenizers.Tokenizer, text: str
) -> dict[str, object]:
    """Measure the loss on the last tenth of the text, see HELDOUT_DEFINITION."""
    text = text[int(0.9 * len(text)) :]
    ids = torch.tensor(tokenizer.encode(text).ids)
    window = model.config.n_positions
    total = 0.0
    for x, y in zip(ids[:-1].split(window), ids[1:].split(window), strict=True):
        logits = model(x[None]).logits[0].double()
        total += float(torch.nn.functional.cross_entropy(logits, y, reduction="sum"))
    n = len(ids) - 1
    return {
        "definition": HELDOUT_DEFINITION,
        "characters": len(text),
        "tokens": len(ids),
        "predictions": n,
        "window": window,
        "loss": total / n,
        "perplexity": math.exp(total / n),
        "bits_per_character": total / math.log(2) / len(text),
    }


@torch.no_grad()
def main() -> None:
    """Write both files."""
    data = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("TINY_SHAKESPEARE")
    text_file = Path(data or ROOT.parent / "shared" / "data" / "tinyshakespeare.txt")
    text = text_file.read_bytes().decode()
    np.savez_compressed(HERE / "logits.npz", **golden_logits())
    model = transformers.GPT2LMHeadModel.from_pretrained(
        MODEL, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokenizer = tokenizers.Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    golden = {
        "made_with": {"transformers": transformers.__version__, "torch": torch.__version__},
        "heldout": heldout(model, tokenizer, text),
        "prompts": golden_greedy(model, tokenizer),
    }
    rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in golden.pop("prompts"))
    facts = json.dumps(golden, indent=1)[:-2]
    out = f'{facts},\n "prompts": [\n{rows}\n]}}\n'
    (HERE / "shakespeare_greedy.json").write_text(out, encoding="utf-8")


if __name__ == "__main__":
    main()
