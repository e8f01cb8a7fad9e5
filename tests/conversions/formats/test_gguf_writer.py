"""gptx.conversions.formats.gguf, the writer: files for llama.cpp."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gptx.conversions import convert, read
from gptx.conversions.containers import binary
from gptx.conversions.containers.gguf_types import FLOAT_TYPES, QUANTIZED_TYPES
from gptx.conversions.formats.gguf import write
from gptx.embedded import EMBEDDED
from gptx.errors import ConfigError, ParameterError, TokenizerError, WeightsError
from gptx.generation.text_model import Model
from gptx.quantization import Quantization
from gptx.random_weights import random_weights
from gptx.safetensors_file import BFLOAT16
from gptx.tokenization.pipeline import PipelineTokenizer
from tests.support.byte_tokenizers import byte_tokenizer
from tests.support.embedded_tokenizer import load_tokenizer
from tests.support.files.gguf import IDS, TYPES, File, checkpoint, written
from tests.support.random_models import CASES, random_ids, to_bfloat16, write_model

CONFIG = CASES["124M"]  # 96 wide, three blocks a row
KINDS = {kind.name: kind for kinds in (FLOAT_TYPES, QUANTIZED_TYPES) for kind in kinds.values()}


@pytest.fixture(scope="module")
def tokenizer() -> PipelineTokenizer:
    return load_tokenizer()


# Content of the file


def test_tensors_of_float32_are_the_same_numbers(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    file = written(tmp_path, CONFIG)
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


def test_an_untied_head(tmp_path: Path) -> None:
    config = CASES["untied"]
    head = written(tmp_path, config).numbers("output.weight")
    np.testing.assert_array_equal(head, random_weights(config)["lm_head.weight"])


@pytest.mark.parametrize("type", TYPES)
def test_matrices_have_the_type_and_vectors_are_float32(tmp_path: Path, type: str) -> None:
    file = written(tmp_path, CONFIG, type=type)
    for name, shape in file.shapes.items():
        plain = len(shape) == 1 or name == "position_embd.weight"
        assert file.types[name] == (0 if plain else IDS[type])


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float64"])
def test_matrices_keep_their_type_by_default(tmp_path: Path, name: str) -> None:
    weights = random_weights(CONFIG)
    source = {
        "float16": {k: w.astype(np.float16) for k, w in weights.items()},
        "bfloat16": {k: to_bfloat16(w).view(BFLOAT16) for k, w in weights.items()},
        "float64": {k: w.astype(np.float64) for k, w in weights.items()},
    }[name]
    write(checkpoint(CONFIG, source), tmp_path / "same.gguf")
    type = {"float16": "F16", "bfloat16": "BF16", "float64": "F32"}[name]
    same = (tmp_path / "same.gguf").read_bytes()
    assert same == written(tmp_path, CONFIG, source, type=type).data


def test_rows_that_do_not_divide_into_blocks_are_float16(tmp_path: Path) -> None:
    file = written(tmp_path, replace(CASES["n-inner"], n_inner=72), type="Q4_0")
    assert file.types["blk.0.ffn_down.weight"] == 1  # rows of 72
    assert file.types["blk.0.ffn_up.weight"] == 2  # rows of 32


def test_metadata(tmp_path: Path) -> None:
    config = replace(CASES["n-inner"], layer_norm_epsilon=2.0**-10)
    file = written(tmp_path, config, type="Q8_0")
    assert file.metadata == {
        "general.architecture": "gpt2",
        "general.type": "model",
        "general.name": "gpt2",
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
        "tokenizer.ggml.bos_token_id": 96,
        "tokenizer.ggml.eos_token_id": 96,
    }


def test_the_tokenizer_is_inside(tmp_path: Path, tokenizer: PipelineTokenizer) -> None:
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


@pytest.mark.parametrize("type", TYPES)
def test_chunks_and_types_of_the_source_do_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, type: str
) -> None:
    rounded = {name: to_bfloat16(w) for name, w in random_weights(CONFIG).items()}
    single = {name: (w.astype(np.uint32) << 16).view(np.float32) for name, w in rounded.items()}
    expected = written(tmp_path, CONFIG, single, type=type)
    monkeypatch.setattr(binary, "CHUNK_NUMBERS", 1000)
    for same in (
        {name: w.view(BFLOAT16) for name, w in rounded.items()},
        {name: w.astype(np.float64) for name, w in single.items()},
        {name: np.asfortranarray(w) for name, w in single.items()},
    ):
        assert written(tmp_path, CONFIG, same, type=type).data == expected.data


# Unsupported models


@pytest.mark.parametrize("type", ["F16", "BF16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("bad", [3.4e38, math.inf, math.nan])
def test_numbers_out_of_range(tmp_path: Path, type: str, bad: float) -> None:
    weights = random_weights(CONFIG)
    weights["h.1.mlp.c_fc.weight"][5, 7] = bad
    if KINDS[type].block_numbers == 1 and not math.isfinite(bad):
        file = written(tmp_path, CONFIG, weights, type=type)  # these types have such numbers
        np.testing.assert_equal(file.numbers("blk.1.ffn_up.weight")[7, 5], bad)
        return
    with pytest.raises(WeightsError, match=r"^tensor h\.1\.mlp\.c_fc\.weight has a number that is"):
        written(tmp_path, CONFIG, weights, type=type)


@pytest.mark.parametrize("case", ["gelu-erf", "relu", "unscaled", "layer-scaled"])
def test_unsupported_settings_are_refused(tmp_path: Path, case: str) -> None:
    with pytest.raises(ConfigError, match=r"is .*, llama\.cpp supports only"):
        written(tmp_path, CASES[case])


def test_only_the_group_size_of_gguf_is_supported(tmp_path: Path) -> None:
    for size in (32, 64):  # that of the blocks, and the default
        write(checkpoint(CONFIG), tmp_path / str(size), quantization=Quantization(size, 8))
    assert (tmp_path / "32").read_bytes() == (tmp_path / "64").read_bytes()
    with pytest.raises(ParameterError, match="is 128, expected 32, GGUF's"):
        write(checkpoint(CONFIG), tmp_path / "128", quantization=Quantization(128, 8))


def test_a_vocabulary_that_does_not_fit(tmp_path: Path, tokenizer: PipelineTokenizer) -> None:
    with pytest.raises(TokenizerError, match="has the token id 1023, the model 211 tokens"):
        written(tmp_path, CONFIG, tokenizer=tokenizer)


def test_a_tokenizer_that_splits_differently(tmp_path: Path, tokenizer: PipelineTokenizer) -> None:
    definition = tokenizer.definition()
    definition["pre_tokenizer"]["add_prefix_space"] = True
    other = PipelineTokenizer({}, definition=json.dumps(definition))
    with pytest.raises(TokenizerError, match=r"has add_prefix_space: true, llama\.cpp supports"):
        written(tmp_path, replace(CONFIG, vocab_size=1024), tokenizer=other)


# Special tokens


@pytest.mark.parametrize("id", [-1, 211, 50256])
def test_ids_beyond_the_vocabulary_are_left_out(tmp_path: Path, id: int) -> None:
    model = checkpoint(replace(CONFIG, bos_token_id=id, eos_token_id=id))
    notes = write(model, tmp_path / "model.gguf")
    stored = File((tmp_path / "model.gguf").read_bytes()).metadata
    assert not [key for key in stored if key.endswith("_token_id")]
    assert notes == tuple(
        f"{kind}_token_id {id} is no id of the 211 tokens: it is left out"
        for kind in ("bos", "eos")
    )


# llama.cpp ends each text at token 11 if the file has no valid end of text.


@pytest.mark.parametrize("id", [None, 1024])
def test_without_an_end_of_text_the_tokenizer_has_it(
    tmp_path: Path, tokenizer: PipelineTokenizer, id: int | None
) -> None:
    config = replace(CONFIG, vocab_size=1024, bos_token_id=None, eos_token_id=id)
    stored = written(tmp_path, config, tokenizer=tokenizer).metadata
    assert stored["tokenizer.ggml.eos_token_id"] == 0
    assert "tokenizer.ggml.bos_token_id" not in stored


def test_several_ends_of_text(tmp_path: Path) -> None:
    config = replace(CONFIG, bos_token_id=None, eos_token_id=(5, 300, 6, 7, 8))
    model = checkpoint(config)
    assert write(model, tmp_path / "model.gguf") == (
        "eos_token_id 300 is no id of the 211 tokens: it is left out",
        "GGUF has no place for 4 ends of text: 8 is left out",
    )
    stored = File((tmp_path / "model.gguf").read_bytes()).metadata
    assert [stored[f"tokenizer.ggml.{x}_token_id"] for x in ("eos", "eot", "eom")] == [5, 6, 7]
    assert read(tmp_path / "model.gguf")[1].config.eos_token_id == (5, 6, 7)


def test_special_tokens_that_the_tokenizer_names(tmp_path: Path) -> None:
    definition = byte_tokenizer({"<s>": 256, "</s>": 257, "<pad>": 258}).definition()
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "!"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    tokenizer = PipelineTokenizer.of_folder(tmp_path)
    config = replace(CONFIG, vocab_size=260, bos_token_id=None, eos_token_id=999)
    stored = written(tmp_path, config, tokenizer=tokenizer).metadata
    kinds = {"bos": 256, "eos": 257, "padding": 258, "unknown": 0}
    assert {kind: stored[f"tokenizer.ggml.{kind}_token_id"] for kind in kinds} == kinds
    found = read(tmp_path / "model.gguf")[1].tokenizer
    assert found is not None
    assert found.settings.named_tokens() == named


@pytest.mark.parametrize("in_settings", [True, False])
def test_the_chat_template(tmp_path: Path, in_settings: bool) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(byte_tokenizer().definition()))
    template = "{% for é in messages %}"
    if in_settings:
        settings = json.dumps({"chat_template": template})
        (tmp_path / "tokenizer_config.json").write_text(settings)
    else:
        (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    config = replace(CONFIG, vocab_size=256)
    for tokenizer, expected in (
        (PipelineTokenizer.of_folder(tmp_path), template),
        (byte_tokenizer(), None),
    ):
        stored = written(tmp_path, config, tokenizer=tokenizer).metadata
        assert stored.get("tokenizer.chat_template") == expected
        found = read(tmp_path / "model.gguf")[1].tokenizer
        assert found is not None
        assert found.settings.options.get("chat_template") == expected


def test_without_an_end_of_text_a_filler_is_the_end(tmp_path: Path) -> None:
    config = replace(CONFIG, vocab_size=258, eos_token_id=None)
    model = checkpoint(config, tokenizer=byte_tokenizer())
    assert write(model, tmp_path / "model.gguf") == ()
    stored = File((tmp_path / "model.gguf").read_bytes()).metadata
    assert stored["tokenizer.ggml.eos_token_id"] == 256
    assert read(tmp_path / "model.gguf")[1].config.eos_token_id is None


def test_a_model_without_any_end_of_text(tmp_path: Path) -> None:
    config = replace(CONFIG, vocab_size=256, bos_token_id=None, eos_token_id=None)
    model = checkpoint(config, tokenizer=byte_tokenizer())
    assert write(model, tmp_path / "model.gguf") == (
        "the model has no end of text: llama.cpp ends each text at token 11, ','",
    )
    stored = File((tmp_path / "model.gguf").read_bytes()).metadata
    assert "tokenizer.ggml.eos_token_id" not in stored


def test_flags_of_added_tokens_are_named(tmp_path: Path) -> None:
    definition = byte_tokenizer({"a1": 256, "b2": 257, "c3": 258}).definition()
    definition["added_tokens"][1] |= {"lstrip": True, "rstrip": True}
    definition["added_tokens"][2] |= {"single_word": True, "normalized": True}
    tokenizer = PipelineTokenizer({}, definition=json.dumps(definition))
    config = replace(CONFIG, vocab_size=259)
    assert write(checkpoint(config, tokenizer=tokenizer), tmp_path / "model.gguf") == (
        "llama.cpp ignores lstrip and rstrip of the added token 'b2': it splits some texts with it "
        "differently",
        "llama.cpp ignores single_word of the added token 'c3': it splits some texts with it "
        "differently",
    )


def test_the_notes_of_the_writer_follow_those_of_the_source(tmp_path: Path) -> None:
    config = replace(CONFIG, bos_token_id=None, eos_token_id=999)
    write_model(tmp_path, config, random_weights(config))
    found = convert(tmp_path, tmp_path / "model.gguf")
    assert found.notes[-1] == "eos_token_id 999 is no id of the 211 tokens: it is left out"


# Other programs, if they are installed


@pytest.mark.parametrize("type", TYPES)
def test_the_gguf_package_reads_the_same(tmp_path: Path, type: str) -> None:
    package = pytest.importorskip("gguf")
    file = written(tmp_path, CONFIG, type=type)
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
    """Return llama.cpp's tokens of a text and logits of token ids, from a separate process."""
    pytest.importorskip("llama_cpp")
    command = [sys.executable, "-c", LLAMA, str(path), text, *map(str, ids)]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode == -11:
        pytest.skip("llama.cpp crashes: see benchmarks/compare/README.md on AMX")
    assert ran.returncode == 0, ran.stderr
    return [list(map(int, x.split())) for x in ran.stdout.splitlines()], np.load(f"{path}.npy")


# Relative to the norm of the logits: llama.cpp stores keys and values in float16.
TOLERANCE = {"F32": 2e-3, "F16": 3e-3, "BF16": 1e-2, "Q8_0": 3e-2, "Q4_0": 0.4}


@pytest.mark.parametrize("type", TYPES)
def test_llama_cpp_computes_the_same(tmp_path: Path, shakespeare: Model, type: str) -> None:
    path = tmp_path / "model.gguf"
    how = TYPES[type].get("quantization")
    quantize = None if how is None else f"int{how.bits}"
    convert("shakespeare", path, dtype=TYPES[type].get("dtype"), quantize=quantize)
    text = "ROMEO:\nBut soft! — café 123 <|endoftext|>  日本 🎭 we'll\n\n x "
    ids = random_ids(shakespeare.config, 1, 50)[0].tolist()
    (plain, special), logits = llama_cpp(path, ids, text)
    assert plain == shakespeare.encode(text)
    assert special == shakespeare.encode(text, allow_special=True)
    expected = shakespeare.logits(ids)
    error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    assert error < TOLERANCE[type]
