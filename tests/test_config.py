"""gptx.config: sizes, config files of the Hub, and invalid values."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptx.backends import get_backend
from gptx.config import ACTIVATIONS, MAX_CONFIG_BYTES, SIZES, GPT2Config
from gptx.errors import ConfigError, DataError
from gptx.quantization import Quantization
from tests.support.random_models import CASES

# Config files of the Hub, unchanged

GPT2 = """{
  "activation_function": "gelu_new",
  "architectures": ["GPT2LMHeadModel"],
  "attn_pdrop": 0.1,
  "bos_token_id": 50256,
  "embd_pdrop": 0.1,
  "eos_token_id": 50256,
  "initializer_range": 0.02,
  "layer_norm_epsilon": 1e-05,
  "model_type": "gpt2",
  "n_ctx": 1024,
  "n_embd": 768,
  "n_head": 12,
  "n_layer": 12,
  "n_positions": 1024,
  "resid_pdrop": 0.1,
  "summary_activation": null,
  "summary_first_dropout": 0.1,
  "summary_proj_to_labels": true,
  "summary_type": "cls_index",
  "summary_use_proj": true,
  "task_specific_params": {"text-generation": {"do_sample": true, "max_length": 50}},
  "vocab_size": 50257
}"""

DISTILGPT2 = """{
  "_num_labels": 1,
  "activation_function": "gelu_new",
  "architectures": ["GPT2LMHeadModel"],
  "attn_pdrop": 0.1,
  "bos_token_id": 50256,
  "embd_pdrop": 0.1,
  "eos_token_id": 50256,
  "id2label": {"0": "LABEL_0"},
  "initializer_range": 0.02,
  "label2id": {"LABEL_0": 0},
  "layer_norm_epsilon": 1e-05,
  "model_type": "gpt2",
  "n_ctx": 1024,
  "n_embd": 768,
  "n_head": 12,
  "n_layer": 6,
  "n_positions": 1024,
  "resid_pdrop": 0.1,
  "summary_activation": null,
  "summary_first_dropout": 0.1,
  "summary_proj_to_labels": true,
  "summary_type": "cls_index",
  "summary_use_proj": true,
  "task_specific_params": {"text-generation": {"do_sample": true, "max_length": 50}},
  "vocab_size": 50257
}"""

DIALOGPT_SMALL = """{
  "activation_function": "gelu_new",
  "architectures": ["GPT2LMHeadModel"],
  "attn_pdrop": 0.1,
  "bos_token_id": 50256,
  "embd_pdrop": 0.1,
  "eos_token_id": 50256,
  "initializer_range": 0.02,
  "layer_norm_epsilon": 1e-05,
  "model_type": "gpt2",
  "n_ctx": 1024,
  "n_embd": 768,
  "n_head": 12,
  "n_layer": 12,
  "n_positions": 1024,
  "resid_pdrop": 0.1,
  "summary_activation": null,
  "summary_first_dropout": 0.1,
  "summary_proj_to_labels": true,
  "summary_type": "cls_index",
  "summary_use_proj": true,
  "task_specific_params": {"conversational": {"max_length": 1000}},
  "vocab_size": 50257
}"""

MISTRAL_GPT2 = """{
  "_name_or_path": "gpt2",
  "activation_function": "gelu_new",
  "architectures": ["GPT2LMHeadModel"],
  "attn_pdrop": 0.1,
  "bos_token_id": 50256,
  "embd_pdrop": 0.1,
  "eos_token_id": 50256,
  "gradient_checkpointing": false,
  "initializer_range": 0.02,
  "layer_norm_epsilon": 1e-05,
  "model_type": "gpt2",
  "n_ctx": 1024,
  "n_embd": 768,
  "n_head": 12,
  "n_inner": null,
  "n_layer": 12,
  "n_positions": 1024,
  "reorder_and_upcast_attn": true,
  "resid_pdrop": 0.1,
  "scale_attn_by_inverse_layer_idx": true,
  "scale_attn_weights": true,
  "summary_activation": null,
  "summary_first_dropout": 0.2,
  "summary_proj_to_labels": true,
  "summary_type": "cls_index",
  "summary_use_proj": true,
  "task_specific_params": {"text-generation": {"do_sample": true, "max_length": 1024}},
  "torch_dtype": "float32",
  "transformers_version": "4.12.0.dev0",
  "use_cache": false,
  "vocab_size": 50257
}"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GPT2, GPT2Config()),
        (DISTILGPT2, GPT2Config(n_layer=6)),
        (DIALOGPT_SMALL, GPT2Config()),
        (MISTRAL_GPT2, GPT2Config(scale_attn_by_inverse_layer_idx=True)),
        ("{}", GPT2Config()),
        ('{"n_ctx": 512}', GPT2Config(n_positions=512)),
        ('{"n_ctx": 512, "n_positions": 256}', GPT2Config(n_positions=256)),
        ('{"pruned_heads": {}, "add_cross_attention": false}', GPT2Config()),
        ('{"eos_token_id": null}', GPT2Config(eos_token_id=None)),
    ],
)
def test_config_files_of_the_hub(tmp_path: Path, text: str, expected: GPT2Config) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    assert GPT2Config.from_file(path) == expected


# Sizes


@pytest.mark.parametrize(
    ("size", "n_parameters"),
    [("124M", 124_439_808), ("355M", 354_823_168), ("774M", 774_030_080), ("1558M", 1_557_611_200)],
)
def test_the_four_sizes(size: str, n_parameters: int) -> None:
    config = GPT2Config.of_size(size)
    assert config.n_parameters == n_parameters
    assert f"{round(n_parameters / 1e6)}M" == size
    assert config.head_dim == 64
    assert (config.vocab_size, config.n_positions) == (50257, 1024)


def test_the_default_is_the_first_size() -> None:
    assert list(SIZES) == ["124M", "355M", "774M", "1558M"]
    assert GPT2Config() == GPT2Config.of_size("124M")


def test_a_size_with_changes() -> None:
    config = GPT2Config.of_size("355M", n_positions=64)
    assert (config.n_positions, config.n_embd) == (64, 1024)


@pytest.mark.parametrize("size", ["125M", "", "gpt2", None])
def test_an_unknown_size(size: Any) -> None:
    with pytest.raises(ConfigError, match=f"size is {size!r}, expected one of 124M, 355M"):
        GPT2Config.of_size(size)


@pytest.mark.parametrize("case", CASES)
def test_tensor_shapes(case: str) -> None:
    config = CASES[case]
    shapes = config.tensor_shapes()
    L, C, M = config.n_layer, config.n_embd, config.n_inner or 4 * config.n_embd
    untied = not config.tie_word_embeddings
    assert len(shapes) == 4 + 12 * L + untied
    assert shapes["wte.weight"] == (config.vocab_size, C)
    assert shapes[f"h.{L - 1}.mlp.c_fc.weight"] == (C, M)
    assert ("lm_head.weight" in shapes) == untied
    block = 4 * C * C + 2 * C * M + 9 * C + M
    embeddings = (config.vocab_size * (1 + untied) + config.n_positions) * C
    assert config.n_parameters == embeddings + L * block + 2 * C
    assert config.n_parameters == sum(map(math.prod, shapes.values()))


@pytest.mark.parametrize(
    ("switches", "scales"),
    [
        ({}, [0.125, 0.125, 0.125]),
        ({"scale_attn_weights": False}, [1, 1, 1]),
        ({"scale_attn_by_inverse_layer_idx": True}, [0.125, 0.125 / 2, 0.125 / 3]),
        (
            {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
            [1, 1 / 2, 1 / 3],
        ),
    ],
)
def test_attention_scale(switches: dict[str, bool], scales: list[float]) -> None:
    config = GPT2Config(**switches)  # type: ignore[arg-type]
    assert [config.attention_scale(layer) for layer in range(3)] == pytest.approx(scales)


# Invalid values


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_type", "gpt_neo"),
        ("model_type", "llama"),
        ("model_type", None),
        ("add_cross_attention", True),
        ("is_encoder_decoder", True),
        ("pruned_heads", {"0": [1, 2]}),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("activation_function", "silu"),
        ("activation_function", "quick_gelu"),
        ("activation_function", None),
        ("activation_function", ["gelu_new"]),
    ],
    ids=str,
)
def test_a_setting_that_is_not_supported_is_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} is "):
        GPT2Config.from_dict({**json.loads(GPT2), name: value})


COUNTS = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")
SWITCHES = ("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "tie_word_embeddings")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, value) for name in COUNTS for value in (0, -12, "12", True, 12.0, math.inf, [12])],
        *[(name, 2**31) for name in COUNTS],
        ("n_layer", 10_001),
        *[(name, None) for name in COUNTS if name != "n_inner"],
        *[(name, value) for name in SWITCHES for value in (0, 1, "true", None)],
        *[("layer_norm_epsilon", value) for value in (0, -1e-5, math.nan, math.inf, "1e-5", True)],
        ("layer_norm_epsilon", None),
        *[("bos_token_id", value) for value in ("0", 1.0, [0], True)],
        *[("eos_token_id", value) for value in ("0", 1.0, ["0"], [0, None], [[0]], {"0": 1}, True)],
    ],
    ids=str,
)
def test_an_invalid_value_is_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        GPT2Config.from_dict({name: value})
    assert str(error.value).startswith(f"{name} is {value!r}, expected ")


@pytest.mark.parametrize(
    ("value", "expected", "ids"),
    [
        (5, 5, (5,)),
        (None, None, ()),
        ([], None, ()),
        ([5], 5, (5,)),
        ([5, 5], 5, (5,)),
        ([7, 5, 7], (7, 5), (7, 5)),
        (0, 0, (0,)),
    ],
)
def test_ids_that_end_a_text(value: Any, expected: Any, ids: tuple[int, ...]) -> None:
    config = GPT2Config.from_dict({"eos_token_id": value})
    assert config.eos_token_id == expected
    assert config.eos_token_ids == ids
    assert hash(config) == hash(GPT2Config(eos_token_id=expected))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gelu_new", "gelu_new"),
        ("gelu_pytorch_tanh", "gelu_new"),
        ("gelu_python_tanh", "gelu_new"),
        ("gelu_fast", "gelu_new"),
        ("gelu_accurate", "gelu_new"),
        ("gelu_python", "gelu"),
        ("gelu", "gelu"),
        ("relu", "relu"),
    ],
)
def test_other_names_of_an_activation(name: str, expected: str) -> None:
    """A written config has the name that every program knows."""
    config = GPT2Config.from_dict({"activation_function": name})
    assert config.activation_function == expected
    assert config.to_dict()["activation_function"] == expected
    assert GPT2Config(activation_function=name) == config


# Functions of transformers' activations.py under other names.
FORMULAS: dict[str, Any] = {
    "gelu_fast": lambda x: 0.5 * x * (1 + math.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x))),
    "gelu_accurate": lambda x: (
        0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
    "gelu_python": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_another_name_means_the_same_function(name: str) -> None:
    backend = get_backend("numpy", dtype="float64")
    x = np.linspace(-12, 12, 2401)
    activation = GPT2Config(activation_function=name).activation_function
    expected = np.vectorize(FORMULAS[name])(x)
    np.testing.assert_allclose(getattr(backend, activation)(x), expected, rtol=0, atol=5e-7)


def test_the_largest_sizes() -> None:
    names = [name for name in COUNTS if name != "n_layer"]
    config = GPT2Config(**dict.fromkeys(names, 2**31 - 1), n_layer=10_000)  # type: ignore[arg-type]
    assert config.n_parameters > 2**70


def test_heads_that_do_not_divide_the_width() -> None:
    with pytest.raises(ConfigError, match="n_embd 768 is not a multiple of n_head 7"):
        GPT2Config(n_head=7)


# Files


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"eos_token_id": [3, 4]}', (3, 4)),  # generate of transformers uses these
        ('{"eos_token_id": 3}', 3),
        ('{"eos_token_id": null}', None),
        ('{"temperature": 0.5}', 9),
        ("[]", 9),
        (None, 9),
    ],
)
def test_the_ends_of_generation_config(tmp_path: Path, content: str | None, expected: Any) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 9}')
    if content is not None:
        (tmp_path / "generation_config.json").write_text(content)
    assert GPT2Config.from_file(tmp_path / "config.json").eos_token_id == expected


@pytest.mark.parametrize("content", ["{", '{"eos_token_id": "x"}'])
def test_a_damaged_generation_config_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ConfigError) as error:
        GPT2Config.from_file(tmp_path / "config.json")
    assert str(error.value).startswith(f"{tmp_path / 'generation_config.json'}")
    assert str(error.value).count(str(tmp_path)) == 1


def test_a_large_file_is_not_parsed(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"{}" + b" " * (MAX_CONFIG_BYTES - 2))
    assert GPT2Config.from_file(path) == GPT2Config()
    path.write_bytes(b"{}" + b" " * (MAX_CONFIG_BYTES - 1))
    with pytest.raises(ConfigError, match=f"is not valid JSON .over {MAX_CONFIG_BYTES} bytes.: "):
        GPT2Config.from_file(path)


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + b'{"n_layer": 3}')
    assert GPT2Config.from_file(tmp_path / "config.json").n_layer == 3


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"config",
        b'{"n_layer": 12,}',
        GPT2.encode()[:-1],
        b'{"model_type": "gpt2\xff"}',
        b'{"n_layer": 12\x00}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"n_layer": ' + b"1" * 5000 + b"}",
    ],
    ids=lambda content: str(content[:24]),
)
def test_a_file_that_is_not_json(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is not valid JSON") as error:
        GPT2Config.from_file(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", ["[]", "null", "3", '"gpt2"', '[{"model_type": "gpt2"}]'])
def test_a_file_that_is_not_an_object(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match="expected a JSON object"):
        GPT2Config.from_file(path)


def test_an_error_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"n_layer": NaN}')
    with pytest.raises(ConfigError) as error:
        GPT2Config.from_file(path)
    assert str(error.value).startswith(f"{path}: n_layer is nan, expected ")


def test_the_exit_code_of_a_config_error() -> None:
    assert issubclass(ConfigError, DataError)
    assert ConfigError.exit_code == 65


# Writing

CONFIGS = st.builds(
    lambda heads, width, **rest: GPT2Config(n_head=heads, n_embd=heads * width, **rest),
    st.integers(1, 32),
    st.integers(1, 128),
    vocab_size=st.integers(1, 10**6),
    n_positions=st.integers(1, 10**5),
    n_layer=st.integers(1, 100),
    n_inner=st.none() | st.integers(1, 10**5),
    activation_function=st.sampled_from(ACTIVATIONS),
    layer_norm_epsilon=st.floats(1e-30, 1),
    scale_attn_weights=st.booleans(),
    scale_attn_by_inverse_layer_idx=st.booleans(),
    tie_word_embeddings=st.booleans(),
    bos_token_id=st.none() | st.integers(0, 10**6),
    eos_token_id=st.none()
    | st.integers(0, 10**6)
    | st.lists(st.integers(0, 10**6), max_size=3).map(tuple),
    quantization=st.none()
    | st.builds(Quantization, st.sampled_from([32, 64, 128]), st.sampled_from([4, 8])),
)


@given(config=CONFIGS)
@settings(max_examples=50, deadline=None)
def test_a_written_config_reads_the_same(config: GPT2Config) -> None:
    assert GPT2Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_written_config_has_the_keys_of_transformers() -> None:
    written = GPT2Config(n_positions=77).to_dict()
    assert written["model_type"] == "gpt2"
    assert written["architectures"] == ["GPT2LMHeadModel"]
    assert written["n_ctx"] == written["n_positions"] == 77


def test_other_names_that_transformers_accepts() -> None:
    names = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3}
    config = GPT2Config.from_dict({**names, "max_position_embeddings": 7})
    assert (config.n_embd, config.n_head, config.n_layer, config.n_positions) == (64, 2, 3, 7)
    assert GPT2Config.from_dict({"n_embd": 48, "hidden_size": 64}).n_embd == 48


@pytest.mark.parametrize("epsilon", [10**400, 2, float("inf")])
def test_an_epsilon_that_is_too_large(epsilon: float) -> None:
    with pytest.raises(ConfigError, match="layer_norm_epsilon is"):
        GPT2Config(layer_norm_epsilon=epsilon)
