"""Compute the golden activations with TransformerLens and transformers.

The environment needs torch, TransformerLens with its transformers, and the sources of gptx:

    python -m venv /tmp/lens
    /tmp/lens/bin/pip install torch==2.13.0 transformer_lens==2.18.0
    /tmp/lens/bin/pip install --no-deps numpy==2.2.6 pandas==2.2.3
    PYTHONPATH=. /tmp/lens/bin/python tests/golden/make_lens.py

lens.npz
    For every case of `lens_cases.CASES`: `<case>.ids` [1, T] and `<case>.crc`, the checksum of the
    weights; `<case>.hidden_states` [L + 1, T, C] and `<case>.attentions` [L, H, T, T] of
    transformers; `<case>.<name of a hook>` [1, T, ...] of TransformerLens's
    `from_pretrained_no_processing`, unless it does not know the setting. `<case>.ablated` and
    `<case>.patched` are logits [T, V] of TransformerLens's `run_with_hooks`: the attention result
    of one head is zero, or the residual stream at one token is that of the ids in reverse order.

All numbers are computed in float64 and rounded to float32 once.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformer_lens import HookedTransformer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from gptx.config import GPT2Config  # noqa: E402
from gptx.random_weights import random_weights  # noqa: E402
from tests.golden.make_golden import reference  # noqa: E402
from tests.support.lens_cases import CASES, HEAD, LAYER, TOKEN, lens_ids  # noqa: E402
from tests.support.random_models import checksum  # noqa: E402

LEFT_OUT = ("hook_scale",)  # of the layer norms: no result of an op in gptx


def lens(config: GPT2Config, model: Any) -> HookedTransformer:
    """Make TransformerLens's model from transformers' model, without the Hub and a tokenizer."""
    facts = copy.copy(model.config)
    facts.architectures, facts.n_ctx = ["GPT2LMHeadModel"], config.n_positions
    with (
        mock.patch("transformer_lens.loading_from_pretrained.AutoConfig") as configs,
        mock.patch("transformer_lens.HookedTransformer.AutoTokenizer"),
        mock.patch.object(HookedTransformer, "set_tokenizer", no_tokenizer),
    ):
        configs.from_pretrained.return_value = facts
        return HookedTransformer.from_pretrained_no_processing(
            "gpt2", hf_model=model, dtype=torch.float64, device="cpu"
        )


def no_tokenizer(model: HookedTransformer, *_: Any, **__: Any) -> None:
    """Leave a model without a tokenizer, in the place of `set_tokenizer`."""
    model.tokenizer = None


def is_known(config: GPT2Config) -> bool:
    """Test for settings that TransformerLens's GPT-2 has."""
    return config.scale_attn_weights and config.n_inner in (None, 4 * config.n_embd)


def main() -> None:
    arrays: dict[str, np.ndarray] = {}
    for name, config in CASES.items():
        weights = random_weights(config)
        ids = lens_ids(config)
        arrays[f"{name}.ids"] = ids.astype(np.int32)
        arrays[f"{name}.crc"] = np.array(checksum(weights), np.uint32)
        model = reference(config, weights).double()
        options = {"output_hidden_states": True, "output_attentions": True}
        found = model(torch.tensor(ids), **options)
        results = {
            "hidden_states": torch.stack(found.hidden_states)[:, 0],
            "attentions": torch.stack(found.attentions)[:, 0],
        }
        if is_known(config):
            hooked = lens(config, model)
            logits, cache = hooked.run_with_cache(torch.tensor(ids))
            error = float((logits - found.logits).abs().max())
            assert error < 1e-6, (name, error)
            results |= {k: x for k, x in cache.items() if not k.endswith(LEFT_OUT)}

            def ablate(z: torch.Tensor, hook: Any) -> torch.Tensor:
                z[:, :, HEAD] = 0
                return z

            hooks = [(f"blocks.{LAYER}.attn.hook_z", ablate)]
            results["ablated"] = hooked.run_with_hooks(torch.tensor(ids), fwd_hooks=hooks)[0]
            place = f"blocks.{LAYER}.hook_resid_post"
            other = hooked.run_with_cache(torch.tensor(ids[:, ::-1].copy()))[1][place]

            def patch(x: torch.Tensor, hook: Any, other: torch.Tensor = other) -> torch.Tensor:
                x[:, TOKEN] = other[:, TOKEN]
                return x

            hooks = [(place, patch)]
            results["patched"] = hooked.run_with_hooks(torch.tensor(ids), fwd_hooks=hooks)[0]
        for key, x in results.items():
            arrays[f"{name}.{key}"] = x.detach().numpy().astype(np.float32)
        print(f"{name}: {len(results)} arrays")
    np.savez_compressed(HERE / "lens.npz", **arrays)
    print(f"{(HERE / 'lens.npz').stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
