"""Is a model whole, and are two the same? Read tensor by tensor, whatever their formats."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np

from gptx.backends import get_backend
from gptx.conversions.checkpoint import Array, Checkpoint, float_array
from gptx.conversions.containers.binary import cast, chunks, dtype_name
from gptx.errors import WeightsError
from gptx.logits import all_logits
from gptx.model import Transformer
from gptx.weights import to_backend

PROMPT_LENGTH = 64  # tokens whose logits are compared


def check(checkpoint: Checkpoint) -> None:
    """Read every number of a model; formats with checksums compare theirs.

    Raises
    ------
    WeightsError
        Numbers are not finite, or a tensor is damaged.
    """
    bad: dict[str, int] = {}
    for name, tensor in checkpoint.as_floats().tensors.items():
        if n := sum(int((~np.isfinite(rows)).sum()) for rows in chunks(float_array(tensor))):
            bad[name] = n
    if bad:
        name, n = next(iter(bad.items()))
        many = "a number that is" if n == 1 else f"{n} numbers that are"
        more = f" (and other tensors: {len(bad) - 1})" if len(bad) > 1 else ""
        raise WeightsError(f"tensor {name} holds {many} not finite{more}")


@dataclass(frozen=True)
class Difference:
    """How far a tensor of one model is from the other's.

    Attributes
    ----------
    largest
        The largest |a - b|; NaN if one of them is not finite where the other is.
    relative
        That, divided by the largest |a|.
    rounded
        Whether it is rounding alone: the two are equal in the narrower of their two types.
    """

    largest: float
    relative: float
    rounded: bool


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes
    ----------
    config
        Setting -> its two values, of those that change the numbers and differ.
    tensors
        Name -> how far apart; empty if the shapes differ.
    logits
        The largest difference of logits on a fixed prompt; None if the shapes differ.
    agreement
        The fraction of its positions at which both predict the same token.
    tokenizer
        Whether both have the same tokenizer; None if one of them has none.
    """

    config: dict[str, tuple[object, object]]
    tensors: dict[str, Difference]
    logits: float | None
    agreement: float | None
    tokenizer: bool | None

    @property
    def identical(self) -> bool:
        """Whether every number is the same."""
        return self.same and all(d.largest == 0 for d in self.tensors.values())

    @property
    def same(self) -> bool:
        """Whether they are one model, but for rounding to the types in which they are stored."""
        return (
            not self.config
            and all(d.rounded for d in self.tensors.values())
            and self.tokenizer is not False
        )


def compare(a: Checkpoint, b: Checkpoint) -> Comparison:
    """Compare two models: their settings, each tensor, the logits of a fixed prompt.

    Raises
    ------
    WeightsError
        A tensor is damaged.
    """
    a, b = a.as_floats(), b.as_floats()
    settings = asdict(a.config), asdict(b.config)
    for setting in settings:
        setting["n_inner"] = setting["n_inner"] or 4 * setting["n_embd"]
        del setting["bos_token_id"], setting["eos_token_id"]
    differing = {
        name: (value, settings[1][name])
        for name, value in settings[0].items()
        if value != settings[1][name]
    }
    tokenizer = None
    if a.tokenizer is not None and b.tokenizer is not None:
        tokenizer = _vocabulary(a) == _vocabulary(b)
    if a.config.tensor_shapes() != b.config.tensor_shapes():
        return Comparison(differing, {}, None, None, tokenizer)
    tensors = {
        name: _difference(
            float_array(a.tensors[name]),
            float_array(b.tensors[name]),
            _narrower(a.stored[name].dtype, b.stored[name].dtype),
        )
        for name in a.stored
    }
    logits = _logits(a), _logits(b)
    return Comparison(
        differing,
        tensors,
        float(np.abs(logits[0] - logits[1]).max()),
        float((logits[0].argmax(axis=-1) == logits[1].argmax(axis=-1)).mean()),
        tokenizer,
    )


def _vocabulary(checkpoint: Checkpoint) -> object:
    assert checkpoint.tokenizer is not None
    model = checkpoint.tokenizer.definition()["model"]
    return {name: model.get(name) for name in ("type", "vocab", "merges")}


def _narrower(a: np.dtype, b: np.dtype) -> str:
    width = {"float32": 24, "float16": 11, "bfloat16": 8}  # bits of the significand
    return min(dtype_name(a), dtype_name(b), key=width.__getitem__)


def _difference(a: Array, b: Array, narrower: str) -> Difference:
    largest, scale, rounded = 0.0, 0.0, True
    for x, y in zip(chunks(a), chunks(b), strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        different = ~((x == y) | (np.isnan(x) & np.isnan(y)))
        with np.errstate(invalid="ignore"):
            gap = np.abs(x - y)[different]
        if gap.size:
            largest = max(largest, float(gap.max())) if np.isfinite(gap).all() else math.nan
            rounded &= _same_rounded(x[different], y[different], narrower)
        scale = max(scale, float(np.abs(x).max()))
    return Difference(largest, largest / scale if scale else largest, rounded)


def _same_rounded(x: Array, y: Array, dtype: str) -> bool:
    try:
        return bool((cast(x, dtype, "a") == cast(y, dtype, "b")).all())
    except WeightsError:  # one is too large for that type
        return False


def _logits(checkpoint: Checkpoint) -> Array:
    """Logits [T, V] of a fixed prompt."""
    config = checkpoint.config
    backend = get_backend("numpy")
    model = Transformer(config, to_backend(checkpoint.tensors, backend), backend)
    T = min(PROMPT_LENGTH, config.n_positions)
    ids = [(7919 * i + 11) % config.vocab_size for i in range(T)]  # anything, the same each time
    with backend.scope():
        return backend.to_numpy(all_logits(model, ids))
