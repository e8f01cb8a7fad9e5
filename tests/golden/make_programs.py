"""Save tiny models with the programs that people use, and compute their logits with them.

    python tests/golden/make_programs.py PROGRAM [SOURCES]

Each program needs a separate environment, with torch==2.13.0 and:

    transformers4   transformers==4.46.3
    trl             transformers==4.46.3 trl==0.11.4
    transformers5   transformers==5.24.0
    torch           transformers==5.24.0
    lightning       transformers==5.24.0 lightning==2.6.6
    peft            transformers==5.24.0 peft==0.21.2
    nanogpt         SOURCES: https://github.com/karpathy/nanoGPT, commit 3adf61e
    llama.cpp       transformers==5.24.0; SOURCES: vendor/llama.cpp of llama-cpp-python 0.3.36
    mlx             mlx-lm==0.32.2 'mlx[cpu]==0.32.4' transformers==5.24.0

For example:

    python -m venv /tmp/peft
    /tmp/peft/bin/pip install torch==2.13.0 transformers==5.24.0 peft==0.21.2
    /tmp/peft/bin/python tests/golden/make_programs.py peft

programs/CASE/
    The files of the program, as it wrote them.
programs/CASE.json
    Results of the program: `ids` [T] and the logits [V] of the last one, in float32 with the
    weights as stored; `texts`, the token ids of some texts; `greedy`, the new tokens of its own
    greedy generation. Without logits, the model is no language model.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAMS = Path(__file__).resolve().parent / "programs"
SIZES = {"vocab_size": 24, "n_positions": 16, "n_embd": 12, "n_layer": 2, "n_head": 3}
ENDS = {"bos_token_id": 23, "eos_token_id": 23}
HUB = {"n_ctx": SIZES["n_positions"]}  # in the Hub's configs; transformers does not write it
IDS = [5, 17, 0, 22, 9, 9, 14]
TEXTS = ["the cat and the hat", "  Two  spaces,\nand a line", "naïve — 漢字 🙂", "x<|endoftext|>y"]
CORPUS = ["the cat sat on the mat and the rat ate the hat of the cat", "on the hat sat the rat"] * 4


@contextmanager
def new_case(name: str) -> Iterator[Path]:
    """Make an empty folder of a case."""
    folder = PROGRAMS / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield folder
    print(name, sum(path.stat().st_size for path in folder.iterdir()))


def write_results(name: str, logits: Any = None, **results: Any) -> None:
    """Write CASE.json."""
    if logits is not None:
        results |= {"ids": results.get("ids", IDS)}
        results["logits"] = [float(f"{x:.9g}") for x in logits[-1].tolist()]
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in results.items()]
    (PROGRAMS / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def logits_of(model: Any, ids: list[int] = IDS) -> Any:
    """Compute logits [T, V] in float32, with the stored weights."""
    import torch

    with torch.no_grad():
        found = model.float().eval()(torch.tensor([ids]))
    return (found[0] if isinstance(found, tuple) else found.logits)[0].numpy()


def tiny(cls: str = "GPT2LMHeadModel", **settings: Any) -> Any:
    """Make a model of transformers whose weights are large enough to tell activations apart."""
    import torch
    import transformers

    torch.manual_seed(0)
    # SDPA attention of transformers 4.46 ignores the settings of the scale.
    settings = {**SIZES, **ENDS, "attn_implementation": "eager", **settings}
    config = transformers.GPT2Config(**settings)
    model = getattr(transformers, cls)(config)
    for name, parameter in model.named_parameters():
        mean = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
        torch.nn.init.normal_(parameter, mean, 0.3)
    return model.eval()


def byte_level(size: int = 290) -> Any:
    """Train a byte-level BPE on the corpus."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(CORPUS, size, 2, show_progress=False,
                                  special_tokens=["<|endoftext|>"])  # fmt: skip
    return tokenizer


def gpt2_tokenizer(**settings: Any) -> Any:
    """Make the class GPT2Tokenizer of transformers on that BPE."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        byte_level().save_model(folder)
        if transformers.__version__ < "5":
            vocabulary = {
                "vocab_file": f"{folder}/vocab.json",
                "merges_file": f"{folder}/merges.txt",
            }
        else:
            vocab = json.loads(Path(folder, "vocab.json").read_text())
            lines = Path(folder, "merges.txt").read_text().splitlines()[1:]
            vocabulary = {"vocab": vocab, "merges": [tuple(line.split()) for line in lines]}
        return transformers.GPT2Tokenizer(**vocabulary, **settings)


def ids_of(tokenizer: Any, texts: list[str]) -> dict[str, list[int]]:
    """Encode each text, special tokens included."""
    return {text: tokenizer(text)["input_ids"] for text in texts}


def greedy(model: Any, ids: list[int] = IDS, **settings: Any) -> list[int]:
    """Continue ids with the program's own greedy generation."""
    import torch

    batch = torch.tensor([ids])
    out = model.generate(batch, attention_mask=torch.ones_like(batch), do_sample=False,
                         pad_token_id=0, **settings)  # fmt: skip
    return out[0, len(ids) :].tolist()


def transformers(program: str) -> None:
    """Save every form of save_pretrained."""
    import torch

    forms: dict[str, dict[str, Any]] = {
        "plain": {},
        "shards": {"max_shard_size": "4KB"},
        "bin": {"safe_serialization": False},
        "bin-shards": {"safe_serialization": False, "max_shard_size": "4KB"},
    }
    for form, options in forms.items():
        if "safe_serialization" in options and program == "transformers5":
            continue  # it writes safetensors only
        with new_case(f"{program}-{form}") as folder:
            model = tiny() if form == "plain" else tiny().half()
            model.save_pretrained(folder, **options)
            write_results(folder.name, logits_of(model))
    for dtype in (torch.float16, torch.bfloat16):
        with new_case(f"{program}-{str(dtype).removeprefix('torch.')}") as folder:
            model = tiny(n_layer=1).to(dtype)
            model.save_pretrained(folder)
            write_results(folder.name, logits_of(model))
    settings: dict[str, dict[str, Any]] = {
        "untied": {"tie_word_embeddings": False},
        "by-layer": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
        "unscaled": {"scale_attn_weights": False, "n_inner": 20, "layer_norm_epsilon": 1e-3},
    }
    for name, changes in settings.items():
        if name != "untied" and program == "transformers5":
            continue  # as in transformers 4
        with new_case(f"{program}-{name}") as folder:
            model = tiny(**changes)
            model.half().save_pretrained(folder)
            write_results(folder.name, logits_of(model))
    with new_case(f"{program}-no-head") as folder:  # its logits are those of a tied head
        model = tiny(n_layer=1)
        model.transformer.save_pretrained(folder)
        write_results(folder.name, logits_of(model))
    with new_case(f"{program}-double-heads") as folder:
        model = tiny("GPT2DoubleHeadsModel", n_layer=1)
        model.save_pretrained(folder)
        write_results(folder.name, logits_of(model))
    for task in ("SequenceClassification", "TokenClassification", "QuestionAnswering"):
        with new_case(f"{program}-{task}") as folder:
            tiny(f"GPT2For{task}", n_layer=1).half().save_pretrained(folder)
            write_results(folder.name)
    with new_case(f"{program}-cross-attention") as folder:
        tiny(n_layer=1, add_cross_attention=True).half().save_pretrained(folder)
        write_results(folder.name)
    _tied_heads(program)
    _activations(program)
    _ends(program)
    _tokenizers(program)


def _tied_heads(program: str) -> None:
    """Save models whose config is tied, with each content of the head."""
    import torch
    from safetensors.torch import save_file
    from transformers import GPT2LMHeadModel

    with new_case(f"{program}-tied-duplicate") as folder:
        model = tiny(n_layer=1)
        model.config.save_pretrained(folder)
        save_file({k: v.clone() for k, v in model.state_dict().items()},
                  folder / "model.safetensors", {"format": "pt"})  # fmt: skip
        write_results(folder.name, logits_of(GPT2LMHeadModel.from_pretrained(folder)))
    if program != "transformers5":
        return  # transformers 4 ties the head, whatever the file has
    with new_case(f"{program}-tied-other") as folder:
        model = tiny(n_layer=1, tie_word_embeddings=False)
        model.config.tie_word_embeddings = True
        model.config.save_pretrained(folder)
        save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
        write_results(folder.name, logits_of(GPT2LMHeadModel.from_pretrained(folder)))
        assert torch.equal(GPT2LMHeadModel.from_pretrained(folder).lm_head.weight,
                           model.lm_head.weight)  # fmt: skip
    with new_case(f"{program}-tied-head-only") as folder:
        model = tiny(n_layer=1)
        model.config.save_pretrained(folder)
        tensors = {k: v for k, v in model.state_dict().items() if k != "transformer.wte.weight"}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        write_results(folder.name, logits_of(GPT2LMHeadModel.from_pretrained(folder)))


def _activations(program: str) -> None:
    """Save one model, and its logits with each activation of transformers."""
    from transformers.activations import ACT2CLS

    with new_case(f"{program}-activations") as folder:
        tiny(n_layer=1).save_pretrained(folder)
        found = {}
        for name in sorted(ACT2CLS):
            try:
                last = logits_of(tiny(n_layer=1, activation_function=name))[-1]
            except (TypeError, ImportError, RuntimeError):
                continue  # it needs parameters
            found[name] = [float(f"{x:.9g}") for x in last.tolist()]
        write_results(folder.name, ids=IDS, last_logits=found)


def _ends(program: str) -> None:
    """Save models with several end-of-text tokens, in the config or in generation_config.json."""
    model = tiny(n_layer=1).half().float()
    new = greedy(model, max_new_tokens=9, eos_token_id=-1)
    last = [20, new[2]]  # the text ends at the second
    assert not {new[2], 20} & set(new[:2])
    for name, config, generation in (
        ("eos-list", last, None),
        ("eos-generation", 23, last),
        ("eos-generation-only", None, last[1]),
    ):
        with new_case(f"{program}-{name}") as folder:
            model = tiny(n_layer=1, eos_token_id=config).half()
            if generation is not None:
                model.generation_config.eos_token_id = generation
            model.save_pretrained(folder)
            again = type(model).from_pretrained(folder).float()
            write_results(folder.name, logits_of(model), greedy=greedy(again, max_new_tokens=9),
                          without_end=new)  # fmt: skip


def _tokenizers(program: str) -> None:
    """Save a model with its tokenizer, and with added tokens in a resized table."""
    import transformers

    with new_case(f"{program}-tokenizer") as folder:
        tokenizer = gpt2_tokenizer()
        model = tiny(vocab_size=len(tokenizer), n_layer=1, eos_token_id=0, bos_token_id=0).half()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_results(folder.name, logits_of(model), texts=ids_of(tokenizer, TEXTS))
    with new_case(f"{program}-added-tokens") as folder:
        tokenizer = gpt2_tokenizer()
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        tokenizer.add_tokens(["<user>"])
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        model.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        texts = ids_of(tokenizer, [*TEXTS, "a <user>b<pad> c"])
        write_results(folder.name, logits_of(model), texts=texts)
    if program == "transformers4":
        with new_case(f"{program}-fast-tokenizer") as folder:
            with tempfile.TemporaryDirectory() as other:
                gpt2_tokenizer(add_prefix_space=True).save_pretrained(other)
                fast = transformers.AutoTokenizer.from_pretrained(other, use_fast=True)
            model = tiny(vocab_size=len(fast), n_layer=1, eos_token_id=0, bos_token_id=0).half()
            model.save_pretrained(folder)
            fast.save_pretrained(folder)
            write_results(folder.name, logits_of(model), texts=ids_of(fast, TEXTS))


def trl(_: str) -> None:
    """Save a model with a value head."""
    from trl.models.modeling_value_head import AutoModelForCausalLMWithValueHead

    with tempfile.TemporaryDirectory() as floats:
        tiny(n_layer=1).half().save_pretrained(floats)
        model = AutoModelForCausalLMWithValueHead.from_pretrained(floats)
    expected = logits_of(model.pretrained_model)
    model.half()
    for name, safe in (("safetensors", True), ("bin", False)):
        with new_case(f"trl-value-head-{name}") as folder:
            model.save_pretrained(folder, safe_serialization=safe)
            model.pretrained_model.config.save_pretrained(folder)
            write_results(folder.name, expected)


def torch(_: str) -> None:
    """Save state_dicts as training scripts do."""
    import torch

    model = tiny(n_layer=1).half()
    expected = logits_of(model)
    model.half()
    compiled = torch.compile(model).state_dict()
    plain = model.state_dict()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

    def prefixed(prefix: str, tensors: Any = plain) -> dict[str, Any]:
        return {prefix + name: tensor for name, tensor in tensors.items()}

    files: dict[str, tuple[str, Any]] = {
        "compiled": ("pytorch_model.bin", compiled),
        "ddp": ("pytorch_model.bin", torch.nn.DataParallel(model).state_dict()),
        "ddp-compiled": ("pytorch_model.bin", prefixed("module.", compiled)),
        "compiled-ddp": ("model.pt", prefixed("_orig_mod.module.")),
        "model": ("model.pth", prefixed("model.")),
        "model-module": ("model.pt", {"model": prefixed("module.")}),
        "fsdp": ("pytorch_model.bin", prefixed("_fsdp_wrapped_module.")),
        "checkpointing": ("model.pt", {
            name.replace("h.0.", "h.0._checkpoint_wrapped_module."): tensor
            for name, tensor in plain.items()
        }),
        "model-state-dict": ("checkpoint.pt", {
            "epoch": 3, "model_state_dict": plain, "optimizer_state_dict": optimizer.state_dict(),
            "loss": 1.25,
        }),
        "state-dict": ("checkpoint.pth", {"state_dict": model.transformer.state_dict(), "step": 7}),
        "deepspeed": ("mp_rank_00_model_states.pt", {"module": plain, "global_steps": 2}),
        "no-model": ("checkpoint.pt", {"epoch": 3, "optimizer": {"lr": 0.1}, "names": ["a"]}),
        "whole-module": ("model.pt", model),
    }  # fmt: skip
    for name, (file, value) in files.items():
        with new_case(f"torch-{name}") as folder:
            torch.save(value, folder / file)
            model.config.save_pretrained(folder)
            refused = name in ("no-model", "whole-module")
            write_results(folder.name, None if refused else expected)


def lightning(_: str) -> None:
    """Save a checkpoint of Lightning's trainer after one step."""
    import lightning as L
    import torch

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters({"learning_rate": 0.001})
            self.model = tiny(n_layer=1).half().float()

        def training_step(self, batch: Any, _: int) -> Any:
            return self.model(batch, labels=batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 1e-3)

    with new_case("lightning-checkpoint") as folder:
        module = Module()
        trainer = L.Trainer(max_steps=1, logger=False, accelerator="cpu", barebones=False,
                            enable_progress_bar=False, enable_checkpointing=False)  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(torch.tensor([IDS])))
        trainer.save_checkpoint(folder / "last.ckpt")
        module.model.config.save_pretrained(folder)
        write_results(folder.name, logits_of(module.model))


def peft(_: str) -> None:
    """Save adapters, and the model that one is merged into."""
    import peft
    import torch

    kinds = {
        "lora": peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["c_attn"],
                                fan_in_fan_out=True, init_lora_weights=False),
        "ia3": peft.IA3Config(task_type="CAUSAL_LM", target_modules=["c_attn", "mlp.c_proj"],
                              feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True),
        "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    }  # fmt: skip
    for name, config in kinds.items():
        with new_case(f"peft-{name}") as folder:
            model = peft.get_peft_model(tiny(n_layer=1), config)
            model.save_pretrained(folder)
            (folder / "README.md").unlink()  # an empty model card
            write_results(folder.name)
        if name != "lora":
            continue
        with new_case("peft-state-dict") as folder:
            torch.save(model.half().state_dict(), folder / "pytorch_model.bin")
            tiny(n_layer=1).config.save_pretrained(folder)
            write_results(folder.name)
        with new_case("peft-merged") as folder:
            merged = model.float().merge_and_unload().half()
            merged.save_pretrained(folder)
            write_results(folder.name, logits_of(merged))


def nanogpt(_: str, sources: str) -> None:
    """Save checkpoints of nanoGPT, as its train.py does."""
    import torch

    sys.path.insert(0, sources)
    from model import GPT, GPTConfig

    for name, bias, wrapped in (
        ("plain", True, False), ("compiled", True, True), ("no-bias-ddp", False, False),
    ):  # fmt: skip
        with new_case(f"nanogpt-{name}") as folder:
            arguments = {"n_layer": 1, "n_head": 3, "n_embd": 12, "block_size": 16, "bias": bias,
                         "vocab_size": 24, "dropout": 0.0}  # fmt: skip
            torch.manual_seed(0)
            model = GPT(GPTConfig(**arguments))
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
            optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
            saved = torch.compile(model) if wrapped else model
            tensors = saved.state_dict()
            if "ddp" in name:  # of a script that does not unwrap it
                tensors = {f"module.{key}": value for key, value in tensors.items()}
            checkpoint = {
                "model": tensors, "optimizer": optimizer.state_dict(), "model_args": arguments,
                "iter_num": 1, "best_val_loss": torch.tensor(2.5),
                "config": {"dataset": "shakespeare_char", "compile": wrapped},
            }  # fmt: skip
            torch.save(checkpoint, folder / "ckpt.pt")
            ids = torch.tensor([IDS])
            with torch.no_grad():
                write_results(folder.name, model(ids, ids)[0][0].numpy())


def llama_cpp(_: str, sources: str) -> None:
    """Convert a model with llama.cpp's converter; its logits are those of transformers."""
    sys.path[:0] = [sources, f"{sources}/gguf-py"]
    import convert_hf_to_gguf as converter
    import gguf
    import torch
    from conversion.base import TextModel
    from transformers import GPT2LMHeadModel

    # The converter knows a tokenizer by a hash of its ids: a new vocabulary has none.
    TextModel.get_vocab_base_pre = lambda *_: "gpt-2"
    tokenizer = gpt2_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.add_tokens(["<user>"])
    sizes = {"vocab_size": len(tokenizer), "n_layer": 1, "bos_token_id": 0, "eos_token_id": 0}
    model = tiny(**sizes, **HUB)
    wide = tiny(**sizes, **HUB, n_embd=32, n_head=4)  # Q8_0 has blocks of 32 numbers
    untied = tiny(**sizes, **HUB, n_embd=32, n_head=4, tie_word_embeddings=False)
    texts = ids_of(tokenizer, [*TEXTS, "a <user>b<pad> c"])
    for name, type, source in (
        ("f32", "f32", model), ("f16", "f16", model), ("bf16", "bf16", model),
        ("q8_0", "q8_0", wide), ("q8_0-untied", "q8_0", untied),
    ):  # fmt: skip
        with new_case(f"llama.cpp-{name}") as folder, tempfile.TemporaryDirectory() as floats:
            source.save_pretrained(floats)
            tokenizer.save_pretrained(floats)
            path = folder / "model.gguf"
            sys.argv = ["convert", floats, "--outfile", str(path), "--outtype", type,
                        "--model-name", "tiny"]  # fmt: skip
            converter.main()
            names = {"token_embd": "transformer.wte", "position_embd": "transformer.wpe",
                     "output_norm": "transformer.ln_f", "output": "lm_head", "attn_norm": "ln_1",
                     "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_norm": "ln_2",
                     "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}  # fmt: skip
            state = source.state_dict()
            for tensor in gguf.GGUFReader(path).tensors:
                found = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
                *block, stem, kind = tensor.name.split(".")
                prefix = f"transformer.h.{block[1]}." if block else ""
                linear = block and kind == "weight" and "norm" not in stem
                state[f"{prefix}{names[stem]}.{kind}"] = found.T if linear else found
            if source is not untied:
                state["lm_head.weight"] = state["transformer.wte.weight"]
            stored = GPT2LMHeadModel(source.config)
            stored.load_state_dict(state)
            write_results(folder.name, logits_of(stored), texts=texts)


def mlx(_: str) -> None:
    """Convert a model with mlx_lm.convert, in each type and mode."""
    import mlx.core as mx
    import numpy as np
    from mlx_lm import convert
    from mlx_lm.utils import dequantize_model, load_model

    def quantized(**settings: Any) -> dict[str, Any]:
        return {"quantize": True, "q_group_size": 32, **settings}

    def mixed(name: str, *_: Any) -> bool | dict[str, int]:
        if name.endswith("wpe"):
            return False
        return {"group_size": 32, "bits": 6} if name.endswith("wte") else True

    forms: dict[str, dict[str, Any]] = {
        "bfloat16": {"dtype": "bfloat16"},
        **{f"{bits}-bit": quantized(q_bits=bits) for bits in (2, 3, 4, 5, 6, 8)},
        "mixed": quantized(q_bits=4, quant_predicate=mixed),
        "mxfp4": quantized(q_mode="mxfp4", q_bits=4),
        "mxfp8": quantized(q_mode="mxfp8", q_bits=8),
        "nvfp4": quantized(q_mode="nvfp4", q_bits=4, q_group_size=16),
    }
    source = tempfile.mkdtemp()
    tokenizer = gpt2_tokenizer()
    model = tiny(vocab_size=len(tokenizer), n_embd=32, n_head=4, n_layer=1, **HUB)
    model.transformer.save_pretrained(source)  # the Hub's names, which mlx-lm needs
    tokenizer.save_pretrained(source)
    for form, settings in forms.items():
        with new_case(f"mlx-lm-{form}") as folder:
            folder.rmdir()  # convert makes it
            convert(source, str(folder), **settings)
            for path in folder.iterdir():
                if path.suffix not in (".json", ".safetensors") or "tokenizer" in path.name:
                    path.unlink()
            model, _ = load_model(folder)
            model.set_dtype(mx.float32)
            if settings.get("quantize"):  # mlx-lm adds mxfp8 embeddings in bfloat16
                model = dequantize_model(model)
                model.set_dtype(mx.float32)
            logits = np.array(model(mx.array([IDS]))[0])
            write_results(folder.name, logits)
    shutil.rmtree(source)


MAKERS: dict[str, Callable[..., None]] = {
    "transformers4": transformers, "transformers5": transformers, "trl": trl, "torch": torch,
    "lightning": lightning, "peft": peft, "nanogpt": nanogpt, "llama.cpp": llama_cpp, "mlx": mlx,
}  # fmt: skip

if __name__ == "__main__":
    MAKERS[sys.argv[1]](*sys.argv[1:])
