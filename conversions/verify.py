"""Checks of a model, and comparisons of two models, of any formats, tensor by tensor."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np

from gptx.backends import get_backend
from gptx.conversions.checkpoint import Array, Checkpoint, float_array
from gptx.conversions.containers.binary import cast, dtype_name, row_chunks
from gptx.conversions.vocabularies.comparison import compare_tokenizers
from gptx.errors import WeightsError
from gptx.logits import all_logits
from gptx.model import Transformer
from gptx.weights import to_backend

PROMPT_LENGTH = 64  # tokens; `compare` compares the logits of each

_SIGNIFICAND_BITS = {"float32": 24, "float16": 11, "bfloat16": 8}


def check(checkpoint: Checkpoint) -> None:
    """Read every number of a model; readers of formats with checksums compare those.

    Raises
    ------
    WeightsError
        A number is not finite, or a tensor is damaged.
    """
    bad: dict[str, int] = {}
    for name, tensor in checkpoint.as_floats().tensors.items():
        if n := sum(int((~np.isfinite(rows)).sum()) for rows in row_chunks(float_array(tensor))):
            bad[name] = n
    if bad:
        name, n = next(iter(bad.items()))
        numbers = "a number that is" if n == 1 else f"{n} numbers that are"
        more = f" (other tensors too: {len(bad) - 1})" if len(bad) > 1 else ""
        raise WeightsError(f"tensor {name} has {numbers} not finite{more}: fetch the model again")


@dataclass(frozen=True)
class Difference:
    """The difference between a tensor a of one model and the tensor b of another.

    Attributes
    ----------
    largest
        The largest |a - b|; NaN if only one of them is not finite at some position.
    relative
        `largest` divided by the largest |a|.
    rounded
        True if rounding explains the difference: a and b are equal in the narrower of their types.
    """

    largest: float
    relative: float
    rounded: bool


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`.

    Attributes
    ----------
    config
        Setting -> its two values, for settings that differ and affect the computation.
    tensors
        Name -> difference; empty if the shapes differ.
    logits
        The largest difference of the logits of a fixed prompt; None if the shapes differ.
    agreement
        Fraction of that prompt's positions at which both models predict the same token; None if
        the shapes differ.
    tokenizer
        True if both models have the same tokenizer; None if one of them has none.
    without_tokenizer
        "A", "B", or both: the models without a tokenizer that gptx reads.
    tokenizer_differences
        Part -> its two values, for parts of the tokenizers that differ and decide ids or text.
    """

    config: dict[str, tuple[object, object]]
    tensors: dict[str, Difference]
    logits: float | None
    agreement: float | None
    tokenizer: bool | None
    without_tokenizer: list[str]
    tokenizer_differences: dict[str, tuple[str, str]]

    @property
    def identical(self) -> bool:
        """True if every number is the same."""
        return self.same and all(d.largest == 0 for d in self.tensors.values())

    @property
    def same(self) -> bool:
        """True if both are one model, except for rounding to the types of their files."""
        return (
            not self.config
            and all(d.rounded for d in self.tensors.values())
            and self.tokenizer is not False
        )


def compare(a: Checkpoint, b: Checkpoint) -> Comparison:
    """Compare settings, tokenizers, tensors and the logits of a fixed prompt of two models.

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
    without = [name for name, side in (("A", a), ("B", b)) if side.tokenizer is None]
    tokenizer, tokenizer_differences = None, {}
    if a.tokenizer is not None and b.tokenizer is not None:
        tokenizer_differences = compare_tokenizers(a.tokenizer, b.tokenizer)
        tokenizer = not tokenizer_differences
    if a.config.tensor_shapes() != b.config.tensor_shapes():
        return Comparison(differing, {}, None, None, tokenizer, without, tokenizer_differences)
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
        without,
        tokenizer_differences,
    )


def _narrower(a: np.dtype, b: np.dtype) -> str:
    return min(dtype_name(a), dtype_name(b), key=_SIGNIFICAND_BITS.__getitem__)


def _difference(a: Array, b: Array, narrower: str) -> Difference:
    largest, scale, rounded = 0.0, 0.0, True
    for x, y in zip(row_chunks(a), row_chunks(b), strict=True):
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
    except WeightsError:  # a number is out of range for that type
        return False


def _logits(checkpoint: Checkpoint) -> Array:
    """Compute the logits [T, V] of a fixed prompt."""
    config = checkpoint.config
    backend = get_backend("numpy")
    model = Transformer(config, to_backend(checkpoint.tensors, backend), backend)
    T = min(PROMPT_LENGTH, config.n_positions)
    ids = [(7919 * i + 11) % config.vocab_size for i in range(T)]
    with backend.scope():
        return backend.to_numpy(all_logits(model, ids))
