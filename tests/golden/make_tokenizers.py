"""Make tiny tokenizers of every kind, and the token ids that transformers 4 and 5 give for them.

    python -m venv v5 && v5/bin/pip install transformers==5.24.0
    python -m venv v4 && v4/bin/pip install transformers==4.46.3 jinja2
    v5/bin/python tests/golden/make_tokenizers.py make
    v5/bin/python tests/golden/make_tokenizers.py ids
    v4/bin/python tests/golden/make_tokenizers.py ids

`make` trains the tokenizers with the `tokenizers` library and writes the folders
`tests/golden/tokenizers/NAME`. `ids` adds the ids of the installed version of transformers to
`tests/golden/tokenizers/ids.json`. For other folders it prints them as JSON, to compare the result
of a conversion with its source:

    v4/bin/python tests/golden/make_tokenizers.py ids SOURCE RESULT
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

FOLDER = Path(__file__).parent / "tokenizers"
CORPUS = [
    "Before we proceed any further, hear me speak. Speak, speak!",
    "You are all resolved rather to die than to famish? Resolved, resolved.",
    "First, you know Caius Marcius is chief enemy to the people. We know't, we know't.",
    "the theory of their thoughts, there and then; low lower lowest new newer newest",
    "naïve café, Ångström; 你好 世界 你们 世人",
]
TEXTS = [
    "",
    "Hello world",
    "  two  spaces ",
    "You know't, we don't.",
    "Ｆｕｌｌ ① Ångström ÀÉ naïve",
    "hello there <speaker1><pad>hi",
    "word  [X]  x <m> y keyword",
    "你好 the world's ?",
    "<|endoftext|>a</s>[SEP] b",
    "lower\nnewest\tthe 🙂",
]
CHAT = "{% for m in messages %}<speaker1>{{ m['content'] }}{% endfor %}"
END = "<|endoftext|>"


def _special(token: str, id: int, **flags: bool) -> dict[str, Any]:
    names = ("single_word", "lstrip", "rstrip", "normalized")
    return {"id": id, "content": token, **dict.fromkeys(names, False), "special": True} | flags


class Maker:
    """The folders, one method a kind."""

    def __init__(self) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.train_from_iterator(
            CORPUS,
            trainers.BpeTrainer(
                vocab_size=320,
                special_tokens=[END],
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
        self.bytes = json.loads(tokenizer.to_str())

    def write(self, name: str, **files: Any) -> None:
        """Write the files of a folder; `__` in a name is a dot, a text is not JSON."""
        folder = FOLDER / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for key, content in {"config__json": {"model_type": "gpt2"}, **files}.items():
            text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
            (folder / key.replace("__", ".")).write_text(text + "\n")

    def definition(self, **changes: Any) -> dict[str, Any]:
        return json.loads(json.dumps({**self.bytes, **changes}))

    def split(self, *, prefix: bool) -> dict[str, Any]:
        return {**self.bytes["pre_tokenizer"], "add_prefix_space": prefix}

    def two_files(self) -> dict[str, Any]:
        model = self.bytes["model"]
        merges = "\n".join(" ".join(pair) for pair in model["merges"])
        return {"vocab__json": model["vocab"], "merges__txt": f"#version: 0.2\n{merges}"}

    def byte_level(self) -> None:
        fast = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
        # The class decides about the prefix space, not tokenizer.json.
        self.write(
            "prefix_of_class",
            tokenizer__json=self.definition(pre_tokenizer=self.split(prefix=False)),
            tokenizer_config__json={"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True},
        )
        self.write(
            "prefix_without_config",
            tokenizer__json=self.definition(pre_tokenizer=self.split(prefix=True)),
        )
        self.write(
            "prefix_of_json",
            tokenizer__json=self.definition(pre_tokenizer=self.split(prefix=True)),
            tokenizer_config__json={**fast, "add_prefix_space": True},
        )
        added = [
            _special("<pad>", 320),
            _special("<speaker1>", 321),
            _special("[X]", 322, lstrip=True, rstrip=True, normalized=True, special=False),
            _special("word", 323, single_word=True, normalized=True, special=False),
        ]
        self.write(
            "lower",
            tokenizer__json=self.definition(
                added_tokens=[*self.bytes["added_tokens"], *added],
                normalizer={
                    "type": "Sequence",
                    "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}],
                },
            ),
            tokenizer_config__json={
                **fast,
                "bos_token": END,
                "pad_token": "<pad>",
                "additional_special_tokens": ["<speaker1>"],
                "chat_template": CHAT,
            },
            generation_config__json={"eos_token_id": [0, 320], "pad_token_id": 320},
        )

    def older_files(self) -> None:
        added = {"<pad>": 320, "<speaker1>": 321, "hello there": 322}
        self.write(
            "added_tokens",
            **self.two_files(),
            added_tokens__json=added,
            special_tokens_map__json={
                "bos_token": END,
                "eos_token": {**_special(END, 0), "normalized": True},
                "pad_token": "<pad>",
                "additional_special_tokens": ["<speaker1>"],
            },
        )
        for key in ("id", "special"):  # as transformers wrote the file
            path = FOLDER / "added_tokens" / "special_tokens_map.json"
            data = json.loads(path.read_text())
            data["eos_token"].pop(key)
            path.write_text(json.dumps(data) + "\n")
        self.write(
            "added_beside_json",
            tokenizer__json=self.definition(),
            added_tokens__json=added,
            special_tokens_map__json={"pad_token": "<pad>", "sep_token": "low"},
        )
        listed = {
            "320": _special("<pad>", 0),
            "321": _special("<m>", 0, lstrip=True),
            "322": _special("word", 0, single_word=True, special=False),
        }
        for token in listed.values():
            del token["id"]
        self.write(
            "added_in_config",
            **self.two_files(),
            tokenizer_config__json={
                "tokenizer_class": "GPT2Tokenizer",
                "added_tokens_decoder": listed,
                "pad_token": "<pad>",
                "add_prefix_space": True,
            },
        )

    def others(self) -> None:
        from tokenizers import (
            Tokenizer,
            decoders,
            models,
            normalizers,
            pre_tokenizers,
            trainers,
        )

        quiet = {"show_progress": False}
        fast = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}

        def train(tokenizer: Any, trainer: Any) -> dict[str, Any]:
            tokenizer.train_from_iterator(CORPUS, trainer)
            return dict(json.loads(tokenizer.to_str()))

        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        special = ["<s>", "</s>", "<unk>", "<pad>"]
        trainer = trainers.BpeTrainer(vocab_size=160, special_tokens=special, **quiet)
        metaspace = train(tokenizer, trainer)
        self.write(
            "metaspace",
            tokenizer__json=metaspace,
            tokenizer_config__json={**fast, "bos_token": "</s>", "eos_token": "</s>"},
        )

        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=120, special_tokens=special, unk_token="<unk>", **quiet
        )
        self.write(
            "unigram",
            tokenizer__json=train(tokenizer, trainer),
            tokenizer_config__json={**fast, "eos_token": "</s>", "pad_token": "<pad>"},
        )

        marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=160, special_tokens=marks, **quiet)
        wordpiece = train(tokenizer, trainer)
        self.write(
            "wordpiece",
            tokenizer__json=wordpiece,
            tokenizer_config__json={"tokenizer_class": "BertTokenizer", "do_lower_case": False},
        )
        vocab = wordpiece["model"]["vocab"]
        self.write(
            "word_list",
            config__json={"model_type": "gpt2", "tokenizer_class": "BertTokenizer"},
            vocab__txt="\n".join(sorted(vocab, key=vocab.__getitem__)),
        )

        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(vocab_size=60, special_tokens=special, **quiet)
        self.write(
            "wordlevel", tokenizer__json=train(tokenizer, trainer), tokenizer_config__json=fast
        )

        tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<unk>"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
        trainer = trainers.BpeTrainer(
            vocab_size=160, special_tokens=special, end_of_word_suffix="</w>", **quiet
        )
        self.write(
            "word_ends", tokenizer__json=train(tokenizer, trainer), tokenizer_config__json=fast
        )

        fallback = json.loads(json.dumps(metaspace))
        vocab = fallback["model"]["vocab"]
        for byte in range(256):
            vocab[f"<0x{byte:02X}>"] = len(vocab)
        space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
        fallback["model"] |= {"byte_fallback": True, "fuse_unk": True}
        fallback |= {
            "normalizer": {
                "type": "Sequence",
                "normalizers": [{"type": "Prepend", "prepend": "▁"}, space],
            },
            "pre_tokenizer": None,
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    back,
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
                ],
            },
        }
        self.write("byte_fallback", tokenizer__json=fallback, tokenizer_config__json=fast)


def ids_of(folder: Path) -> dict[str, Any]:
    """Return the ids that transformers gives for a folder."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    kinds = ("bos", "eos", "unk", "pad")
    found = {
        "ids": [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS],
        "special": {kind: getattr(tokenizer, f"{kind}_token_id") for kind in kinds},
    }
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": "hello"}]
        found["chat"] = tokenizer.apply_chat_template(messages, tokenize=False)
    return found


def main() -> None:
    command, *folders = sys.argv[1:]
    if command == "make":
        maker = Maker()
        maker.byte_level()
        maker.older_files()
        maker.others()
        return
    import transformers

    version = transformers.__version__.split(".")[0]
    if folders:
        print(json.dumps({folder: ids_of(Path(folder)) for folder in folders}))
        return
    path = FOLDER / "ids.json"
    data = json.loads(path.read_text()) if path.exists() else {"texts": TEXTS, "folders": {}}
    data["texts"] = TEXTS
    for folder in sorted(path for path in FOLDER.iterdir() if path.is_dir()):
        try:
            found: Any = ids_of(folder)
        except Exception as error:
            found = {"error": type(error).__name__}
        data["folders"].setdefault(folder.name, {})[version] = found
    lines = [
        f"  {json.dumps(name)}: {json.dumps(found, ensure_ascii=False)}"
        for name, found in sorted(data["folders"].items())
    ]
    texts = json.dumps(TEXTS, ensure_ascii=False)
    folders_text = ",\n".join(lines)
    path.write_text(f'{{"texts": {texts},\n "folders": {{\n{folders_text}\n}}}}\n')


if __name__ == "__main__":
    main()
