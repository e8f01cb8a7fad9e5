"""gptx.conversions.gguf_file: files that llama.cpp reads, parsed here by a reader of their own."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import CASES, random_ids, random_weights, to_bfloat16

from gptx.config import GPT2Config
from gptx.conversions import gguf
from gptx.conversions.gguf_file import TYPES, write_gguf
from gptx.errors import ConfigError, ParameterError, StorageError, TokenizerError, WeightsError
from gptx.files import BFLOAT16
from gptx.generation import Model
from gptx.hub import EMBEDDED
from gptx.quantization import Quantization
from gptx.tokenizer import BytePairTokenizer
from gptx.weights import read_weights

CONFIG = CASES["124M"]  # 96 wide, three blocks a row
BLOCK_BYTES = {0: (1, 4), 1: (1, 2), 2: (32, 18), 8: (32, 34)}  # ggml's: numbers, bytes


class File:
    """A GGUF file as its specification says, read by a cursor."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 4
        assert data[:4] == b"GGUF"
        assert self.take("I") == 3
        n_tensors, n_metadata = self.take("Q"), self.take("Q")
        self.metadata = {self.string(): self.value(self.take("I")) for _ in range(n_metadata)}
        infos = []
        for _ in range(n_tensors):
            name = self.string()
            shape = [self.take("Q") for _ in range(self.take("I"))][::-1]
            infos.append((name, shape, self.take("I"), self.take("Q")))
        start = self.at + -self.at % 32
        self.types = {name: kind for name, _, kind, _ in infos}
        self.shapes = {name: shape for name, shape, _, _ in infos}
        self.raw = {}
        end = 0
        for name, shape, kind, offset in infos:
            assert offset == end  # one after the other, each at a multiple of 32
            block, size = BLOCK_BYTES[kind]
            n_bytes = math.prod(shape) // block * size
            self.raw[name] = data[start + offset : start + offset + n_bytes]
            end = offset + n_bytes + -n_bytes % 32
        assert len(data) == start + end

    def take(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        n = self.take("Q")
        self.at += n
        return self.data[self.at - n : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == 9:
            inner, n = self.take("I"), self.take("Q")
            return [self.value(inner) for _ in range(n)]
        return self.string() if kind == 8 else self.take({4: "I", 5: "i", 6: "f"}[kind])

    def numbers(self, name: str) -> np.ndarray:
        return decoded(self.raw[name], self.types[name]).reshape(self.shapes[name])


def decoded(raw: bytes, kind: int) -> np.ndarray:
    """The numbers that the bytes of a tensor stand for, in float64."""
    if kind in (0, 1):
        return np.frombuffer(raw, ["<f4", "<f2"][kind]).astype(np.float64)
    numbers: list[float] = []
    for start in range(0, len(raw), BLOCK_BYTES[kind][1]):
        (scale,) = struct.unpack_from("<e", raw, start)
        if kind == 8:
            whole = struct.unpack_from("32b", raw, start + 2)
        else:
            quants = raw[start + 2 : start + 18]
            whole = tuple([(q & 15) - 8 for q in quants] + [(q >> 4) - 8 for q in quants])
        numbers += [scale * x for x in whole]
    return np.array(numbers)


def written(
    folder: Path,
    config: GPT2Config = CONFIG,
    weights: Any = None,
    tokenizer: Any = None,
    **more: Any,
) -> File:
    weights = random_weights(config) if weights is None else weights
    write_gguf(folder / "model.gguf", config, weights, tokenizer, **more)
    return File((folder / "model.gguf").read_bytes())


@pytest.fixture(scope="module")
def tokenizer() -> BytePairTokenizer:
    return BytePairTokenizer({"tokenizer.json": EMBEDDED["shakespeare"] / "tokenizer.json"})


# What is in the file


def test_tensors_of_float32_are_the_same_numbers(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    file = written(tmp_path)
    assert set(file.types.values()) == {0}
    for ours, theirs in {
        "wte.weight": "token_embd.weight",
        "wpe.weight": "position_embd.weight",
        "ln_f.weight": "output_norm.weight",
        "ln_f.bias": "output_norm.bias",
        "h.2.ln_1.weight": "blk.2.attn_norm.weight",
        "h.2.ln_1.bias": "blk.2.attn_norm.bias",
        "h.2.attn.c_attn.weight": "blk.2.attn_qkv.weight",
        "h.2.attn.c_attn.bias": "blk.2.attn_qkv.bias",
        "h.2.attn.c_proj.weight": "blk.2.attn_output.weight",
        "h.2.attn.c_proj.bias": "blk.2.attn_output.bias",
        "h.2.ln_2.weight": "blk.2.ffn_norm.weight",
        "h.2.ln_2.bias": "blk.2.ffn_norm.bias",
        "h.2.mlp.c_fc.weight": "blk.2.ffn_up.weight",
        "h.2.mlp.c_fc.bias": "blk.2.ffn_up.bias",
        "h.2.mlp.c_proj.weight": "blk.2.ffn_down.weight",
        "h.2.mlp.c_proj.bias": "blk.2.ffn_down.bias",
    }.items():
        expected = weights[ours].T if ours.startswith("h.") else weights[ours]
        np.testing.assert_array_equal(file.numbers(theirs), expected)
    assert len(file.raw) == 4 + 12 * CONFIG.n_layer == len(weights)


def test_a_head_of_its_own(tmp_path: Path) -> None:
    config = CASES["untied"]
    head = written(tmp_path, config).numbers("output.weight")
    np.testing.assert_array_equal(head, random_weights(config)["lm_head.weight"])


@pytest.mark.parametrize(("dtype", "kind"), [("F32", 0), ("F16", 1), ("Q8_0", 8), ("Q4_0", 2)])
def test_which_tensors_are_of_the_type(tmp_path: Path, dtype: str, kind: int) -> None:
    file = written(tmp_path, dtype=dtype)
    for name, shape in file.shapes.items():
        plain = len(shape) == 1 or name == "position_embd.weight"
        assert file.types[name] == (0 if plain else kind)


def test_rows_that_are_not_whole_blocks_are_float16(tmp_path: Path) -> None:
    file = written(tmp_path, replace(CASES["n-inner"], n_inner=72), dtype="Q4_0")
    assert file.types["blk.0.ffn_down.weight"] == 1  # rows of 72
    assert file.types["blk.0.ffn_up.weight"] == 2  # rows of 32


def test_metadata(tmp_path: Path) -> None:
    config = replace(CASES["n-inner"], layer_norm_epsilon=2.0**-10)
    file = written(tmp_path, config, dtype="Q8_0", name="Übung")
    assert file.metadata == {
        "general.architecture": "gpt2",
        "general.type": "model",
        "general.name": "Übung",
        "gpt2.block_count": 3,
        "gpt2.context_length": 64,
        "gpt2.embedding_length": 32,
        "gpt2.feed_forward_length": 72,
        "gpt2.attention.head_count": 4,
        "gpt2.attention.layer_norm_epsilon": 2.0**-10,
        "gpt2.vocab_size": 97,
        "general.file_type": 7,
        "general.quantization_version": 2,
        "tokenizer.ggml.model": "none",
    }


def test_the_tokenizer_is_inside(tmp_path: Path, tokenizer: BytePairTokenizer) -> None:
    config = replace(CONFIG, vocab_size=1027, bos_token_id=0, eos_token_id=None)
    stored = written(tmp_path, config, tokenizer=tokenizer).metadata
    definition = json.loads((EMBEDDED["shakespeare"] / "tokenizer.json").read_text())["model"]
    tokens = sorted(definition["vocab"], key=definition["vocab"].__getitem__)
    assert stored["tokenizer.ggml.model"] == "gpt2"
    assert stored["tokenizer.ggml.pre"] == "gpt-2"
    assert stored["tokenizer.ggml.tokens"] == [*tokens, "[PAD1024]", "[PAD1025]", "[PAD1026]"]
    assert stored["tokenizer.ggml.token_type"] == [3] + [1] * 1023 + [5] * 3
    assert stored["tokenizer.ggml.merges"] == [" ".join(pair) for pair in definition["merges"]]
    assert stored["tokenizer.ggml.bos_token_id"] == 0
    assert "tokenizer.ggml.eos_token_id" not in stored


@pytest.mark.parametrize("dtype", TYPES)
def test_pieces_and_types_of_the_source_do_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    rounded = {name: to_bfloat16(w) for name, w in random_weights(CONFIG).items()}
    single = {name: (w.astype(np.uint32) << 16).view(np.float32) for name, w in rounded.items()}
    expected = written(tmp_path, weights=single, dtype=dtype)
    monkeypatch.setattr(gguf, "CHUNK", 1000)
    for same in (
        {name: w.view(BFLOAT16) for name, w in rounded.items()},
        {name: w.astype(np.float64) for name, w in single.items()},
        {name: np.asfortranarray(w) for name, w in single.items()},
    ):
        assert written(tmp_path, weights=same, dtype=dtype).data == expected.data


# Blocks

seeds = st.integers(0, 2**32 - 1)


def blocks_of(seed: int) -> np.ndarray:
    """Blocks of many sizes, some with equal magnitudes, halves, zeros, subnormal numbers."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(8, 32)) * 10.0 ** rng.integers(-46, 5, (8, 1))
    x[rng.random((8, 32)) < 0.1] = 0
    x[0] = rng.integers(-127, 128, 32) / 2  # the scale is 1/2, or a little less
    x[1] = rng.choice([-4.0, 4.0], 32)
    x[2] = 0
    return x.astype(np.float32)


def inverse(scale: np.float32) -> np.float32:
    with np.errstate(all="ignore"):
        inverse = np.float32(1) / scale
    return inverse if np.isfinite(inverse) else np.float32(0)


def q8_0(block: np.ndarray) -> bytes:
    """A block as ggml's quantize_row_q8_0_ref makes it, one number at a time."""
    scale = np.float32(max(abs(x) for x in block)) / np.float32(127)
    out = struct.pack("<e", scale)
    for x in block:
        y = float(x * inverse(scale))
        out += struct.pack("b", int(math.copysign(math.floor(abs(y) + 0.5), y)))
    return out


def q4_0(block: np.ndarray) -> bytes:
    """A block as ggml's quantize_row_q4_0_ref makes it, one number at a time."""
    scale = np.float32(max(block, key=abs)) / np.float32(-8)
    quants = [min(15, int(x * inverse(scale) + np.float32(8.5))) for x in block]
    low, high = quants[:16], quants[16:]
    return struct.pack("<e", scale) + bytes(a | b << 4 for a, b in zip(low, high, strict=True))


@given(seeds)
def test_blocks_are_those_of_ggml(seed: int) -> None:
    x = blocks_of(seed)
    for dtype, block in {"Q8_0": q8_0, "Q4_0": q4_0}.items():
        assert TYPES[dtype].encode(x).tobytes() == b"".join(map(block, x))


@given(seeds)
@settings(max_examples=50)
def test_blocks_are_close_to_the_numbers(seed: int) -> None:
    x = blocks_of(seed)
    largest = np.abs(x).max(axis=1, keepdims=True).astype(np.float64)
    # Half a step (at one end of Q4_0 a whole one), and the rounding of the scale to float16
    for dtype, steps, slack in (("Q8_0", 127, 0.5), ("Q4_0", 8, 1.0)):
        back = decoded(TYPES[dtype].encode(x).tobytes(), TYPES[dtype].id).reshape(x.shape)
        limit = largest * (slack / steps * 1.001 + 2.0**-11) + steps * 2.0**-25
        assert (np.abs(back - x) <= limit).all()


@given(seeds)
def test_float16_is_rounded_to_the_nearest(seed: int) -> None:
    x = blocks_of(seed)
    x = x[np.abs(x).max(axis=1) < 65504]
    back = decoded(TYPES["F16"].encode(x).tobytes(), 1).reshape(x.shape)
    assert (np.abs(back - x) <= np.abs(x) * 2.0**-11 + 2.0**-25).all()


# What cannot be written


@pytest.mark.parametrize("dtype", ["F16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("bad", [1e30, math.inf, math.nan])
def test_numbers_out_of_range(tmp_path: Path, dtype: str, bad: float) -> None:
    weights = random_weights(CONFIG)
    weights["h.1.mlp.c_fc.weight"][5, 7] = bad
    (tmp_path / "model.gguf").write_bytes(b"old")
    with pytest.raises(WeightsError) as caught:
        written(tmp_path, weights=weights, dtype=dtype)
    assert str(caught.value) == (
        f"tensor h.1.mlp.c_fc.weight holds a number that is not finite in {dtype}: write F32"
    )
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"model.gguf": b"old"}


@pytest.mark.parametrize("case", ["gelu-erf", "relu", "unscaled", "layer-scaled"])
def test_what_llama_cpp_does_not_compute(tmp_path: Path, case: str) -> None:
    with pytest.raises(ConfigError, match=r"is .*, llama\.cpp's GPT-2 has .* alone"):
        written(tmp_path, CASES[case])


def test_an_unknown_type(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="dtype is 'int8', expected one of F32, F16, Q8_0, Q"):
        written(tmp_path, dtype="int8")


def test_weights_that_are_quantized_already(tmp_path: Path) -> None:
    config = replace(CONFIG, quantization=Quantization(32, 4))
    with pytest.raises(ParameterError, match="are int4 in groups of 32, which GGUF has no type"):
        written(tmp_path, config)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be written"):
        written(tmp_path / "none")


def test_a_vocabulary_that_does_not_fit(tmp_path: Path, tokenizer: BytePairTokenizer) -> None:
    with pytest.raises(TokenizerError, match="has token 1023, the model 211 tokens"):
        written(tmp_path, tokenizer=tokenizer)


def test_a_tokenizer_that_splits_otherwise(tmp_path: Path) -> None:
    definition = json.loads((EMBEDDED["shakespeare"] / "tokenizer.json").read_text())
    definition["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    other = BytePairTokenizer({"tokenizer.json": tmp_path / "tokenizer.json"})
    with pytest.raises(TokenizerError, match="splits text otherwise"):
        written(tmp_path, replace(CONFIG, vocab_size=1024), tokenizer=other)


# Against others, where they are installed


@pytest.mark.parametrize("dtype", TYPES)
def test_the_gguf_package_reads_the_same(tmp_path: Path, dtype: str) -> None:
    package = pytest.importorskip("gguf")
    file = written(tmp_path, dtype=dtype)
    weights = random_weights(CONFIG)
    read = package.GGUFReader(tmp_path / "model.gguf")
    assert read.get_field("gpt2.embedding_length").contents() == CONFIG.n_embd
    assert [tensor.name for tensor in read.tensors] == list(file.raw)
    for tensor, source in zip(read.tensors, weights.values(), strict=True):
        rows = source.T if tensor.name.startswith("blk") else source
        expected = package.quantize(np.ascontiguousarray(rows), tensor.tensor_type)
        assert tensor.data.tobytes() == expected.tobytes() == file.raw[tensor.name]


LLAMA = """
import sys
import numpy as np
from llama_cpp import Llama
path, text, *ids = sys.argv[1:]
llama = Llama(path, n_ctx=0, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
if text:
    for special in (False, True):
        print(*llama.tokenize(text.encode(), add_bos=True, special=special))
llama.eval(list(map(int, ids)))
np.save(path + ".npy", np.array(llama.scores[: len(ids)]))
"""


def llama_cpp(path: Path, ids: list[int], text: str = "") -> tuple[list[list[int]], np.ndarray]:
    """llama.cpp's tokens of a text and logits of token ids, from a process of its own."""
    pytest.importorskip("llama_cpp")
    command = [sys.executable, "-c", LLAMA, str(path), text, *map(str, ids)]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode == -11:
        pytest.skip("llama.cpp crashes: see benchmarks/README.md on AMX")
    assert ran.returncode == 0, ran.stderr
    return [list(map(int, x.split())) for x in ran.stdout.splitlines()], np.load(f"{path}.npy")


# Of the logits' size, in the mean: llama.cpp keeps keys and values in float16.
TOLERANCE = {"F32": 2e-3, "F16": 3e-3, "Q8_0": 3e-2, "Q4_0": 0.4}


@pytest.mark.parametrize("dtype", TYPES)
def test_llama_cpp_computes_the_same(tmp_path: Path, shakespeare: Model, dtype: str) -> None:
    path, config = tmp_path / "model.gguf", shakespeare.config
    weights = read_weights(shakespeare.files.weights, config)
    write_gguf(path, config, weights, shakespeare.tokenizer, dtype=dtype)
    text = "ROMEO:\nBut soft! — café 123 <|endoftext|>  日本 🎭 we'll\n\n x "
    ids = random_ids(config, 1, 50)[0].tolist()
    (plain, special), logits = llama_cpp(path, ids, text)
    assert plain == shakespeare.encode(text)
    assert special == shakespeare.encode(text, allow_special=True)
    expected = shakespeare.logits(ids)
    error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    assert error < TOLERANCE[dtype]
