"""The tensors of a GPT-2 among those of a file: prefixes of trainers, other heads, adapters.

The names in gptx are the Hub's without the prefix `transformer.` (`h.0.attn.c_attn.weight`). In a
file they follow a prefix. Wrappers of PyTorch add `module.` or `_orig_mod.`, mlx-lm adds `model.`,
and Lightning adds the name of any attribute. The prefix is all that precedes the name of a tensor
of a GPT-2, so no list of prefixes is necessary.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from gptx.errors import WeightsError, argument

# Modules that contain another one and have no tensors: DistributedDataParallel and DeepSpeed,
# torch.compile, FullyShardedDataParallel, activation checkpoints, Lightning's strategies. They can
# be inside the model, as in `h.0._checkpoint_wrapped_module.ln_1.weight`.
_WRAPPER = re.compile(
    r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module"
    r"|_forward_module)\."
)
_TENSOR = re.compile(
    r"(?:(?P<prefix>.*)\.)?"
    r"(?P<name>"
    r"(?:wte|wpe|ln_f|lm_head|h\.\d{1,5}\.(?:ln_1|ln_2|attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj))"
    r"\.(?:weight|bias|scales|biases)"
    r"|h\.\d{1,5}\.attn\.(?:bias|masked_bias))"
)
_MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
_ADAPTER = re.compile(
    r"(?<![^.])(?:lora_\w+|ia3_l|base_layer|modules_to_save|prompt_embeddings)(?:\.|$)"
)

# Tensors of matrices that bitsandbytes (8 and 4 bits), GPTQ or AWQ quantized.
_QUANTIZED = re.compile(
    r".*\.(?:SCB|weight_format|absmax|quant_map|quant_state\.\w+|qweight|qzeros|g_idx)"
)

# Heads beside that of the language model. (`GPT2DoubleHeadsModel`; value heads of trl and trlx.)
_EXTRA_HEAD = re.compile(r"(?:.*\.)?(multiple_choice_head|v_head|value_head|ilql_heads)\..*")
# Heads in the place of that of the language model, and their classes in transformers.
_CLASSIFIER = re.compile(r"(?:.*\.)?(score|classifier|qa_outputs)\.(?:weight|bias)")
_CLASSES = {
    "score": "GPT2ForSequenceClassification",
    "classifier": "GPT2ForTokenClassification",
    "qa_outputs": "GPT2ForQuestionAnswering",
}


def is_gpt2_tensor(stored_name: str) -> bool:
    """Test for the name of a tensor of a GPT-2, with any prefix."""
    return _TENSOR.fullmatch(_WRAPPER.sub("", stored_name)) is not None


def are_out_in(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Test for matrices of linear layers that are [out, in], as those of torch.nn.Linear and MLX.

    Parameters
    ----------
    shapes
        Name -> shape in the file. The matrix of queries, keys and values decides for all: it is
        [C, 3C] in the Hub's Conv1D. The matrix of the attention's output is square.
    """
    for name, shape in shapes.items():
        if name.endswith("attn.c_attn.weight") and len(shape) == 2 and 0 not in shape:
            return shape[0] == 3 * shape[1]
    return False


def model_names(
    stored_names: Iterable[str], *, ignore_unknown: bool = False
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Map the names of a file to those of gptx; leave out what a language model does not need.

    Causal masks, which some files store beside the weights, are left out, and so are heads beside
    that of the language model.

    Parameters
    ----------
    stored_names
        Names of all tensors of the file or of its shards.
    ignore_unknown
        Leave out other tensors too. Otherwise they are an error.

    Returns
    -------
    names, notes
        Name in the file -> name in gptx, and a sentence for each kind of tensors that is left out.

    Raises
    ------
    WeightsError
        The file is an adapter or a classifier, is quantized by another library, has several models
        or none, or has two tensors of one name or an unknown tensor.
    """
    models: dict[str, dict[str, str]] = {}  # prefix -> name in the file -> name
    others: list[str] = []
    for stored_name in stored_names:
        match = _TENSOR.fullmatch(_WRAPPER.sub("", stored_name))
        if match is None:
            others.append(stored_name)
            continue
        prefix = re.sub(r"(^|\.)transformer$", "", match["prefix"] or "")
        models.setdefault(prefix, {})[stored_name] = match["name"]
    if adapter := [name for name in others if _ADAPTER.search(name)]:
        raise WeightsError(
            f"{listed(adapter)} of an adapter (LoRA), not of a complete model: merge it into its "
            "base model with peft's merge_and_unload(), and save that with save_pretrained()"
        )
    if quantized := [name for name in others if _QUANTIZED.fullmatch(name)]:
        raise WeightsError(
            f"{listed(quantized)} of a quantized model (bitsandbytes, GPTQ or AWQ), which gptx "
            f"does not read: load the float weights with {argument('quantize', 'int4')}"
        )
    names = _one_model(models)
    if not names:
        found = _shortened(others) or "no tensor"
        raise WeightsError(f"it has {found}, expected the tensors of a GPT-2")
    notes = _check_others(others, ignore_unknown)
    by_name: dict[str, str] = {}
    for stored_name, name in names.items():
        if (same := by_name.setdefault(name, stored_name)) != stored_name:
            raise WeightsError(f"duplicate tensor {name}: {same} and {stored_name}")
    masks = {stored for stored, name in names.items() if _MASK_BUFFER.fullmatch(name)}
    return {stored: name for stored, name in names.items() if stored not in masks}, notes


def _one_model(models: dict[str, dict[str, str]]) -> dict[str, str]:
    """Return the names of the only model; its head may have a shorter prefix."""
    bodies = [
        prefix
        for prefix, names in models.items()
        if not all(name.startswith("lm_head.") for name in names.values())
    ]
    if any(not _contains(prefix, body) for prefix in models for body in bodies):
        shown = _shortened([repr(f"{prefix}." if prefix else "") for prefix in sorted(models)])
        raise WeightsError(f"it has several models, with the prefixes {shown}: save one of them")
    return {stored: name for names in models.values() for stored, name in names.items()}


def _contains(prefix: str, other: str) -> bool:
    """Test for a prefix that is the other one, or its beginning."""
    return not prefix or f"{other}.".startswith(f"{prefix}.")


def _check_others(others: list[str], ignore_unknown: bool) -> tuple[str, ...]:
    """Return notes on the tensors that are not a GPT-2's; raise an error for unknown ones."""
    extra = [name for name in others if _EXTRA_HEAD.fullmatch(name)]
    unknown = [name for name in others if name not in extra]
    notes: tuple[str, ...] = ()
    if extra:
        notes += (
            f"{listed(extra)} of another head, which the language model does not use: left out",
        )
    if not unknown:
        return notes
    if ignore_unknown:
        return (*notes, unknown_note(unknown))
    for name in unknown:
        if match := _CLASSIFIER.fullmatch(name):
            raise WeightsError(
                f"tensor {name} is of the head of a classifier ({_CLASSES[match[1]]}), which "
                f"generates no text: give a language model, or {argument('ignore_unknown', True)} "
                "to use the rest of this one"
            )
    raise unknown_error(unknown, "no GPT-2 has such a name")


def unknown_error(
    names: list[str], fault: str = "the weights do not fit the config"
) -> WeightsError:
    """Return the error for tensors that a GPT-2 or its config does not have."""
    return WeightsError(
        f"{listed(names)} unknown: {fault} ({argument('ignore_unknown', True)} leaves them out)"
    )


def unknown_note(names: list[str]) -> str:
    """Return the note on unknown tensors that are left out."""
    return f"{listed(names)} unknown: left out"


def listed(names: list[str]) -> str:
    """Return `tensor a is`, or `tensors a, b, c and 2 more are`."""
    return f"tensor {names[0]} is" if len(names) == 1 else f"tensors {_shortened(names)} are"


def _shortened(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
