"""A comparison of two tokenizers by what decides their token ids and their text.

The form of the files decides neither: the order of keys, added tokens inside or beside the
vocabulary, offsets, truncation, padding, and the post-processor, which gptx does not apply.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from gptx.tokenization.pipeline import PipelineTokenizer

MAX_SHOWN = 100  # characters of a value
_FLAGS = ("special", "single_word", "lstrip", "rstrip", "normalized")
_STEPS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
_BYTES = "bytes"  # the decoder of any byte-level tokenizer

Differences = dict[str, tuple[str, str]]


def compare_tokenizers(a: PipelineTokenizer, b: PipelineTokenizer) -> Differences:
    """Return part -> its two values, for the parts of two tokenizers that differ."""
    parts = _parts(a), _parts(b)
    found: Differences = {}
    for part in parts[0] | parts[1]:
        x, y = (side.get(part) for side in parts)
        if x == y:
            continue
        if isinstance(x, dict) and isinstance(y, dict):
            name, x, y = _first_difference(part, x, y)
        elif isinstance(x, list) and isinstance(y, list) and part == "merges":
            name, x, y = _first_difference(part, dict(enumerate(x)), dict(enumerate(y)))
        else:
            name = part
        found[name] = _shown(x), _shown(y)
    return found


def _first_difference(
    part: str, x: Mapping[Any, object], y: Mapping[Any, object]
) -> tuple[str, object, object]:
    """Name the first entry that differs, with its values."""
    names = [name for name in {**x, **y} if x.get(name) != y.get(name)]
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return f"{part} {_shown(names[0])}{more}", x.get(names[0]), y.get(names[0])


def _parts(tokenizer: PipelineTokenizer) -> dict[str, Any]:
    """Return what decides the ids and the text, in one form for tokenizers that are the same."""
    definition = tokenizer.definition()
    model = dict(definition["model"])
    vocab = model.pop("vocab")
    if isinstance(vocab, list):
        model["scores"] = dict(vocab)
        vocab = {token: id for id, (token, _) in enumerate(vocab)}
    added = {token["content"]: token for token in definition["added_tokens"]}
    steps = {part: list(_flat(definition[part], part)) for part in _STEPS}
    if tokenizer.has_bytes:
        steps["decoder"] = [_BYTES]
    # Without a normalizer, the flag changes nothing.
    flags = _FLAGS if steps["normalizer"] else _FLAGS[:-1]
    if not model.get("unk_token"):
        model.pop("fuse_unk", None)
    return {
        "model": model.pop("type"),
        "id of": vocab | {content: token["id"] for content, token in added.items()},
        "added token": {
            content: [flag for flag in flags if token[flag]] for content, token in added.items()
        },
        **steps,
        # Absent, null, "" and false mean the same.
        **{name: value for name, value in model.items() if value not in (None, "", False)},
    }


def _flat(part: Mapping[str, Any] | None, kind: str) -> Iterator[Any]:
    """Yield the steps of a normalizer, pre-tokenizer or decoder, without settings of offsets."""
    if part is None:
        return
    if part["type"] == "Sequence":
        for step in part[_STEPS[kind]]:
            yield from _flat(step, kind)
        return
    yield {name: value for name, value in part.items() if name != "trim_offsets"}


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
