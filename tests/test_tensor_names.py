"""gptx.tensor_names: the tensors of a GPT-2 among those of a file."""

from __future__ import annotations

import pytest

from gptx.errors import WeightsError
from gptx.tensor_names import are_out_in, is_gpt2_tensor, model_names
from tests.support.files.safetensors_bytes import MICRO

NAMES = [*MICRO.tensor_shapes(), "lm_head.weight"]


def stored_names(prefix: str = "", head_prefix: str | None = None) -> dict[str, str]:
    """Return name in a file -> name, for all tensors of a model."""
    head_prefix = prefix.removesuffix("transformer.") if head_prefix is None else head_prefix
    return {(head_prefix if "lm_head" in name else prefix) + name: name for name in NAMES}


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "transformer.",
        "model.",
        "module.",
        "_orig_mod.",
        "module._orig_mod.transformer.",
        "_orig_mod.module.transformer.",
        "model.transformer.",
        "module.model.transformer.",
        "model.module.transformer.",
        "model._orig_mod.module.transformer.",
        "pretrained_model.transformer.",
        "base_model.model.transformer.",
        "_forward_module.model.transformer.",
        "lit.net.gpt2.",
    ],
)
def test_a_prefix_in_any_order_is_removed(prefix: str) -> None:
    stored = stored_names(prefix)
    assert model_names(stored) == (stored, ())


@pytest.mark.parametrize("head_prefix", ["", "model.", "model.backbone."])
def test_the_head_may_have_a_shorter_prefix(head_prefix: str) -> None:
    stored = stored_names("model.backbone.", head_prefix)
    assert model_names(stored) == (stored, ())


def test_wrappers_inside_of_the_model_are_removed() -> None:
    """Of FullyShardedDataParallel and of activation checkpoints."""
    for wrapper in ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module"):
        stored = {
            name.replace("h.0.", f"h.0.{wrapper}.").replace("attn.", f"attn.{wrapper}."): name
            for name in NAMES
        }
        assert model_names(stored) == (stored, ())


@pytest.mark.parametrize("prefix", ["", "transformer.", "module.model.transformer."])
def test_masks_are_left_out_without_a_note(prefix: str) -> None:
    masks = [
        f"{prefix}h.{layer}.attn.{kind}" for layer in (0, 11) for kind in ("bias", "masked_bias")
    ]
    stored = stored_names(prefix)
    assert model_names([*stored, *masks]) == (stored, ())


@pytest.mark.parametrize(
    "extra",
    [
        ["v_head.summary.weight", "v_head.summary.bias"],  # trl
        ["v_head.0.weight", "v_head.2.bias"],  # trlx
        ["multiple_choice_head.summary.weight"],
        ["value_head.weight"],
        ["ilql_heads.v_head.0.weight"],
    ],
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_heads_beside_that_of_the_language_model(extra: list[str], prefix: str) -> None:
    stored = stored_names(prefix + "transformer.")
    extra = [prefix + name for name in extra]
    names, notes = model_names([*stored, *extra])
    assert names == stored
    assert len(notes) == 1
    assert all(name in notes[0] for name in extra)
    assert "another head, which the language model does not use: left out" in notes[0]


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("score.weight", "GPT2ForSequenceClassification"),
        ("module.score.weight", "GPT2ForSequenceClassification"),
        ("classifier.bias", "GPT2ForTokenClassification"),
        ("qa_outputs.weight", "GPT2ForQuestionAnswering"),
    ],
)
def test_a_classifier_is_refused_by_its_architecture(name: str, architecture: str) -> None:
    stored = stored_names("transformer.")
    with pytest.raises(WeightsError) as caught:
        model_names([*stored, name])
    assert str(caught.value) == (
        f"tensor {name} is of the head of a classifier ({architecture}), which generates no text: "
        "give a language model, or ignore_unknown=True to use the rest of this one"
    )
    names, notes = model_names([*stored, name], ignore_unknown=True)
    assert (names, notes) == (stored, (f"tensor {name} is unknown: left out",))


@pytest.mark.parametrize(
    "adapter",
    [
        "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight",
        "base_model.model.transformer.h.0.attn.c_attn.lora_B.default.weight",
        "transformer.h.0.attn.c_attn.lora_A",
        "base_model.model.transformer.h.0.attn.c_attn.base_layer.weight",
        "transformer.h.0.attn.c_attn.lora_magnitude_vector.default.weight",
        "base_model.model.transformer.h.0.mlp.c_fc.ia3_l",
    ],
)
@pytest.mark.parametrize("whole", [False, True])
def test_an_adapter_is_named(adapter: str, whole: bool) -> None:
    """An adapter only, and a model with one that is not merged."""
    stored = stored_names("base_model.model.transformer.") if whole else {}
    for ignore_unknown in (False, True):
        with pytest.raises(
            WeightsError, match=r"of an adapter \(LoRA\).*merge_and_unload"
        ) as caught:
            model_names([*stored, adapter], ignore_unknown=ignore_unknown)
        assert adapter in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "attn.c_attn.SCB",
        "attn.c_attn.weight_format",
        "attn.c_attn.weight.absmax",
        "attn.c_attn.weight.quant_map",
        "attn.c_attn.weight.quant_state.bitsandbytes__nf4",
        "attn.c_attn.qweight",
        "attn.c_attn.qzeros",
        "mlp.c_fc.g_idx",
    ],
)
@pytest.mark.parametrize("ignore_unknown", [False, True])
def test_quantizations_of_other_libraries_are_named(name: str, ignore_unknown: bool) -> None:
    stored = [*stored_names("transformer."), f"transformer.h.0.{name}"]
    with pytest.raises(WeightsError) as caught:
        model_names(stored, ignore_unknown=ignore_unknown)
    assert str(caught.value) == (
        f"tensor {stored[-1]} is of a quantized model (bitsandbytes, GPTQ or AWQ), which gptx does "
        "not read: load the float weights with quantize='int4'"
    )


def test_unknown_tensors_are_an_error_or_a_note() -> None:
    stored = stored_names("transformer.")
    unknown = ["clip.a", "h.0.attn.rotary", "transformer.h.0.crossattention.c_attn.weight", "d"]
    with pytest.raises(WeightsError) as caught:
        model_names([*stored, *unknown])
    listed = f"tensors {', '.join(unknown[:3])} and 1 more are unknown"
    assert str(caught.value) == (
        f"{listed}: no GPT-2 has such a name (ignore_unknown=True leaves them out)"
    )
    names, notes = model_names([*stored, *unknown], ignore_unknown=True)
    assert (names, notes) == (stored, (f"{listed}: left out",))
    _, notes = model_names([*stored, "a", "b", "c"], ignore_unknown=True)
    assert notes == ("tensors a, b, c are unknown: left out",)


@pytest.mark.parametrize("prefixes", [("", "ema."), ("model.", "ema."), ("a.transformer.", "b.")])
@pytest.mark.parametrize("ignore_unknown", [False, True])
def test_two_models_are_named(prefixes: tuple[str, str], ignore_unknown: bool) -> None:
    stored = stored_names(prefixes[0]) | stored_names(prefixes[1])
    with pytest.raises(WeightsError, match="several models, with the prefixes") as caught:
        model_names(stored, ignore_unknown=ignore_unknown)
    for prefix in prefixes:
        assert repr(prefix.removesuffix("transformer.")) in str(caught.value)


def test_the_head_of_another_model_is_not_taken() -> None:
    stored = stored_names("model.", "other.")
    with pytest.raises(WeightsError, match=r"the prefixes 'model\.', 'other\.': save one"):
        model_names(stored)


def test_a_file_without_a_gpt2() -> None:
    with pytest.raises(
        WeightsError, match=r"^it has a, b, c and 1 more, expected the tensors of a"
    ):
        model_names(["a", "b", "c", "d"])
    with pytest.raises(WeightsError, match=r"^it has no tensor, expected the tensors of a GPT-2$"):
        model_names([])


def test_two_tensors_of_one_name() -> None:
    stored = stored_names("transformer.")
    expected = r"^duplicate tensor ln_f\.bias: transformer\.ln_f\.bias and ln_f\.bias$"
    with pytest.raises(WeightsError, match=expected):
        model_names([*stored, "ln_f.bias"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("wte.weight", True),
        ("x.y.h.12.mlp.c_fc.bias", True),
        ("model.wte.scales", True),
        ("h.0.attn.masked_bias", True),
        ("h.123456.ln_1.bias", False),
        ("h.0.attn.weight", False),
        ("xwte.weight", False),
        ("wte.weight.exp_avg", False),
        ("wte", False),
    ],
)
def test_names_of_a_gpt2(name: str, expected: bool) -> None:
    assert is_gpt2_tensor(name) == expected


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((8, 24), False), ((24, 8), True), ((24, 24), False), ((24,), False), ((0, 0), False)],
)
def test_the_matrix_of_the_attention_tells_the_layout(
    shape: tuple[int, ...], expected: bool
) -> None:
    square = {"h.0.attn.c_proj.weight": (8, 8)}
    assert are_out_in(square | {"h.0.attn.c_attn.weight": shape}) == expected
    assert not are_out_in(square)
