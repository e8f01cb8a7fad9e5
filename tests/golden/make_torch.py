"""Save small random models with PyTorch, in old and new formats, and with nanoGPT.

The environment needs torch, the model.py of nanoGPT (https://github.com/karpathy/nanoGPT, commit
3adf61e) and the sources of gptx. Files of the old format have addresses in memory, and differ in
each run:

    python -m venv /tmp/torch
    /tmp/torch/bin/pip install torch==2.13.0 numpy
    PYTHONPATH=. /tmp/torch/bin/python tests/golden/make_torch.py /path/to/nanoGPT

torch/*.bin
    state_dicts of `random_weights(CONFIG)`, with the type of all tensors in the name, and the
    container, protocol, views or wrappers.
torch/*.pt, torch/*.npz
    Checkpoints of nanoGPT's train.py after one step of its optimizer; `ids` [1, T] and `logits`
    [1, T, V], which nanoGPT computed from them.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.serialization import config as settings

HERE = Path(__file__).resolve().parent
FOLDER = HERE / "torch"
sys.path.insert(0, str(HERE.parents[1]))

from gptx.config import GPT2Config  # noqa: E402
from gptx.random_weights import random_weights  # noqa: E402
from tests.support.random_models import random_ids  # noqa: E402

CONFIG = GPT2Config(
    vocab_size=19, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=None,
    eos_token_id=None,
)  # fmt: skip


def state_dict(dtype: torch.dtype, prefix: str = "transformer.") -> OrderedDict[str, Any]:
    """Make a state_dict of transformers, with masks and a tied head."""
    found = OrderedDict()
    for name, array in random_weights(CONFIG).items():
        found[prefix + name] = torch.from_numpy(array).to(dtype)
    found[f"{prefix}h.0.attn.bias"] = torch.ones(1, 1, 8, 8).tril().bool()
    found[f"{prefix}h.0.attn.masked_bias"] = torch.tensor(-1e4)
    found["lm_head.weight"] = found[f"{prefix}wte.weight"]
    found._metadata = {"": {"version": 1}}  # as in every state_dict of a module
    return found


def with_views(found: OrderedDict[str, Any]) -> OrderedDict[str, Any]:
    """Make tensors views of storages with another order or more numbers."""
    for name, x in found.items():
        if name.endswith("c_fc.weight"):
            found[name] = x.T.contiguous().T
        if name.endswith("c_attn.weight"):
            found[name] = torch.cat([x, x + 1], 1)[:, : x.shape[1]]
    one = torch.cat([x for name, x in found.items() if ".ln_" in name])
    for i, name in enumerate(name for name in found if ".ln_" in name):
        found[name] = one[8 * i : 8 * i + 8]
    return found


def save(found: Any, name: str, **options: Any) -> None:
    """Write one file."""
    torch.save(found, FOLDER / name, **options)


def nanogpt(name: str, *, bias: bool, wrapped: bool) -> None:
    """Train nanoGPT for one step, save it, and compute its logits."""
    from model import GPT, GPTConfig

    arguments = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 16, "bias": bias}
    arguments |= {"vocab_size": 23, "dropout": 0.0}
    torch.manual_seed(0)
    model = GPT(GPTConfig(**arguments))
    for p in model.parameters():  # with its own small weights, any activation has equal logits
        torch.nn.init.normal_(p, std=0.7)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    ids = torch.from_numpy(random_ids(GPT2Config(vocab_size=23), 1, 16))
    loss = model(ids, ids)[1]
    loss.backward()
    optimizer.step()
    saved = torch.compile(model) if wrapped else model
    checkpoint = {
        "model": saved.state_dict(),
        "optimizer": optimizer.state_dict(),
        "model_args": arguments,
        "iter_num": 1,
        "best_val_loss": loss.detach(),
        "config": {"dataset": "shakespeare_char", "learning_rate": 1e-3, "compile": wrapped},
    }
    save(checkpoint, f"{name}.pt")
    with torch.no_grad():
        logits = model(ids, ids)[0].numpy()
    np.savez_compressed(FOLDER / f"{name}.npz", ids=ids.numpy(), logits=logits)
    print(f"{name}: logits std {logits.std():.2f}")


def main() -> None:
    """Write the folder."""
    FOLDER.mkdir(exist_ok=True)
    legacy = {"_use_new_zipfile_serialization": False}
    save(state_dict(torch.float32), "float32-zip.bin")
    save(with_views(state_dict(torch.float16)), "float16-zip-views.bin")
    save(state_dict(torch.bfloat16, ""), "bfloat16-zip-protocol-5.bin", pickle_protocol=5)
    save(state_dict(torch.float32), "float32-legacy.bin", **legacy)
    save(with_views(state_dict(torch.bfloat16)), "bfloat16-legacy-views.bin", **legacy)
    found = state_dict(torch.float64, "")
    for name in [name for name, x in found.items() if x.dtype == torch.float64]:
        found[name] = torch.nn.Parameter(found[name])
    save(found, "float64-legacy-parameters-protocol-4.bin", pickle_protocol=4, **legacy)
    settings.save.compute_crc32 = False
    save(state_dict(torch.float32, ""), "float32-zip-no-crc.bin")
    settings.save.compute_crc32 = True
    nanogpt("nanogpt", bias=True, wrapped=False)
    nanogpt("nanogpt-no-bias-compiled", bias=False, wrapped=True)


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    main()
