"""The config of a GPT-2: sizes and a few switches.

`GPT2Config` reads any `config.json` of model type "gpt2". A setting that changes the result and is
not supported is an error that names it.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from gptx.errors import ConfigError, NotFoundError, StorageError
from gptx.quantization import Quantization

ACTIVATIONS = ("gelu_new", "gelu", "relu")
# Other names in transformers for the same functions; rounding differs by less than 5e-7.
ACTIVATION_ALIASES = {
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_python_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_accurate": "gelu_new",
    "gelu_python": "gelu",
}

# transformers accepts these names too.
KEY_ALIASES = {
    "n_ctx": "n_positions",
    "max_position_embeddings": "n_positions",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}

MAX_CONFIG_BYTES = 2**24
MAX_LAYERS = 10_000  # limits the list of tensor names of a damaged file
MAX_SIZE = 2**31 - 1  # of the other numbers: their products are not too long to be printed

# Radford et al. 2019, table 2 (which counts the parameters wrongly): layers, heads, width.
SIZES = {
    "124M": (12, 12, 768),
    "355M": (24, 16, 1024),
    "774M": (36, 20, 1280),
    "1558M": (48, 25, 1600),
}


@dataclass(frozen=True)
class GPT2Config:
    """The sizes and switches of a GPT-2, with the names of the Hub's config.json.

    Attributes
    ----------
    vocab_size
        V, number of tokens.
    n_positions
        Maximum context, in tokens.
    n_embd, n_layer, n_head
        C, width of the model; L, number of layers; H, number of heads.
    n_inner
        Width of the MLP; None means 4 * n_embd.
    activation_function
        "gelu_new" (tanh form, the original), "gelu" (erf form) or "relu". The other names of them
        in transformers are replaced by these.
    layer_norm_epsilon
        Number added to the variance, in (0, 1].
    scale_attn_weights
        True if attention scores are divided by sqrt(D).
    scale_attn_by_inverse_layer_idx
        True if attention scores are also divided by the number of the layer, counted from 1.
    tie_word_embeddings
        True if the head is the transposed token embedding; otherwise it is `lm_head.weight`.
    bos_token_id
        Token id of the beginning of a text; None if the model has none.
    eos_token_id
        Token id of the end of a text, or several ids; None if the model has none. See
        `eos_token_ids`.
    quantization
        Quantization of the matrices; None for floats.

    Raises
    ------
    ConfigError
        A value is invalid or not supported.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"):
            value = getattr(self, name)
            if name == "n_inner" and value is None:
                continue
            if not _is_int(value) or value < 1:
                raise ConfigError(f"{name} is {value!r}, expected a whole number of at least 1")
            limit = MAX_LAYERS if name == "n_layer" else MAX_SIZE
            if value > limit:
                raise ConfigError(f"{name} is {value}, expected at most {limit}")
        for name in (
            "scale_attn_weights",
            "scale_attn_by_inverse_layer_idx",
            "tie_word_embeddings",
        ):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}, expected true or false")
        if self.bos_token_id is not None and not _is_int(self.bos_token_id):
            raise ConfigError(f"bos_token_id is {self.bos_token_id!r}, expected one id or null")
        object.__setattr__(self, "eos_token_id", _end_ids(self.eos_token_id))
        epsilon = self.layer_norm_epsilon
        if isinstance(epsilon, bool) or not isinstance(epsilon, (int, float)):
            raise ConfigError(f"layer_norm_epsilon is {epsilon!r}, expected a number")
        if not 0 < epsilon <= 1:
            raise ConfigError(f"layer_norm_epsilon is {epsilon!r}, expected more than 0, at most 1")
        activation = self.activation_function
        if isinstance(activation, str):
            activation = ACTIVATION_ALIASES.get(activation, activation)
            object.__setattr__(self, "activation_function", activation)
        if activation not in ACTIVATIONS:
            raise ConfigError(
                f"activation_function is {activation!r}, which is not supported: "
                f"expected {', '.join(ACTIVATIONS)} or another name of one of them"
            )
        if self.n_embd % self.n_head:
            raise ConfigError(
                f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}: "
                "the heads cannot share it evenly"
            )

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Token ids that end a text, the main one first."""
        ids = self.eos_token_id
        return ids if isinstance(ids, tuple) else () if ids is None else (ids,)

    @property
    def head_dim(self) -> int:
        """D, the width of one head."""
        return self.n_embd // self.n_head

    @property
    def mlp_dim(self) -> int:
        """Width of the MLP's hidden layer."""
        return self.n_inner or 4 * self.n_embd

    @property
    def n_parameters(self) -> int:
        """Number of weights; a tied head counts once."""
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())

    def attention_scale(self, layer: int) -> float:
        """Return the factor of the scores q·k in layer `layer` (counted from 0)."""
        scale = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return name (without `transformer.`) -> shape of every tensor, layers in order."""
        C, M = self.n_embd, self.mlp_dim
        shapes: dict[str, tuple[int, ...]] = {
            "wte.weight": (self.vocab_size, C),
            "wpe.weight": (self.n_positions, C),
        }
        for layer in range(self.n_layer):
            h = f"h.{layer}"
            shapes |= {
                f"{h}.ln_1.weight": (C,),
                f"{h}.ln_1.bias": (C,),
                f"{h}.attn.c_attn.weight": (C, 3 * C),
                f"{h}.attn.c_attn.bias": (3 * C,),
                f"{h}.attn.c_proj.weight": (C, C),
                f"{h}.attn.c_proj.bias": (C,),
                f"{h}.ln_2.weight": (C,),
                f"{h}.ln_2.bias": (C,),
                f"{h}.mlp.c_fc.weight": (C, M),
                f"{h}.mlp.c_fc.bias": (M,),
                f"{h}.mlp.c_proj.weight": (M, C),
                f"{h}.mlp.c_proj.bias": (C,),
            }
        shapes |= {"ln_f.weight": (C,), "ln_f.bias": (C,)}
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, C)
        return shapes

    @classmethod
    def of_size(cls, size: str, **changes: Any) -> GPT2Config:
        """Return the config of one of OpenAI's four models: "124M", "355M", "774M" or "1558M"."""
        if not isinstance(size, str) or size not in SIZES:
            raise ConfigError(f"size is {size!r}, expected one of {', '.join(SIZES)}")
        n_layer, n_head, n_embd = SIZES[size]
        return replace(cls(n_layer=n_layer, n_head=n_head, n_embd=n_embd), **changes)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> GPT2Config:
        """Read the contents of a config.json; ignore keys that do not change the result.

        Raises
        ------
        ConfigError
            A value is invalid or not supported.
        """
        if not isinstance(data, dict):
            raise ConfigError(f"the file holds a {type(data).__name__}, expected a JSON object")
        _check_supported(data)
        known = {f.name for f in fields(cls)}
        given = {key: value for key, value in data.items() if key in known}
        given["quantization"] = _quantization(data)
        for other, name in KEY_ALIASES.items():
            if other in data:
                given.setdefault(name, data[other])
        return cls(**given)

    @classmethod
    def from_file(cls, path: str | Path) -> GPT2Config:
        """Read a config.json, and the ends of a text of the generation_config.json beside it.

        transformers generates with those of the second file if it exists.

        Raises
        ------
        ConfigError
            A file is not valid JSON, or a value is invalid or not supported.
        NotFoundError
            The config.json does not exist.
        StorageError
            A file cannot be read.
        """
        path = Path(path)
        try:
            config = cls.from_dict(_read_json(path))
        except ConfigError as error:
            raise _located(error, path) from None
        beside = path.with_name("generation_config.json")
        if not beside.is_file():
            return config
        try:
            data = _read_json(beside)
            if isinstance(data, dict) and "eos_token_id" in data:
                config = replace(config, eos_token_id=data["eos_token_id"])
        except ConfigError as error:
            raise _located(error, beside) from None
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of a config.json for gptx and other GPT-2 libraries."""
        data = {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "n_ctx": self.n_positions,
            **asdict(self),
        }
        if self.quantization is None:
            del data["quantization"]
        else:
            data["quantization"] = self.quantization.to_dict()
        return data


def _read_json(path: Path) -> Any:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"over {MAX_CONFIG_BYTES} bytes")
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist, expected a config.json") from None
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:  # also what is not UTF-8
        raise ConfigError(f"{path} is not valid JSON ({error}): fetch it again") from None


def _located(error: ConfigError, path: Path) -> ConfigError:
    message = error.message
    return error if message.startswith(str(path)) else ConfigError(f"{path}: {message}")


def _end_ids(value: Any) -> int | tuple[int, ...] | None:
    """Check the ids that end a text; a list of one id or none becomes that id or None."""
    ids = list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]
    if not all(map(_is_int, ids)):
        raise ConfigError(f"eos_token_id is {value!r}, expected a token id, a list of ids or null")
    unique = tuple(dict.fromkeys(ids))
    return unique if len(unique) > 1 else unique[0] if unique else None


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_supported(data: dict[str, Any]) -> None:
    """Raise ConfigError for settings that change the result and are not supported.

    `reorder_and_upcast_attn` does not change it: it only makes a softmax of float16 accurate, and
    gptx computes every softmax in float32.
    """
    if data.get("model_type", "gpt2") != "gpt2":
        raise ConfigError(f"model_type is {data['model_type']!r}, gptx supports 'gpt2' only")
    for name in ("add_cross_attention", "is_encoder_decoder", "pruned_heads"):
        if data.get(name):
            raise ConfigError(f"{name} is {data[name]!r}, which gptx does not support")


def _quantization(data: dict[str, Any]) -> Quantization | None:
    """Read the quantization that MLX's libraries write, some of them under both names."""
    names = [name for name in ("quantization", "quantization_config") if data.get(name)]
    found = {Quantization.from_dict(data[name], name) for name in names}
    if len(found) > 1:
        raise ConfigError("quantization and quantization_config differ, expected equal values")
    return found.pop() if found else None
