"""The steps of a decoder of a tokenizer.json, and properties that they have together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Step = Mapping[str, Any]

_EACH_TOKEN = ("WordPiece", "Metaspace", "Replace", "Strip", "ByteFallback")


def steps_of(decoder: Step) -> list[Step]:
    """Return the steps of a decoder, in their order; none for an empty definition."""
    if decoder.get("type") != "Sequence":
        return [decoder] if decoder else []
    return [step for part in decoder["decoders"] for step in steps_of(part)]


def is_local(steps: Sequence[Step]) -> bool:
    """Test for a decoder whose text grows only at its end when tokens are added.

    The text of a token may depend on the start of the text, and that of bytes of ByteFallback on
    the bytes beside them. Each step is one of https://docs.rs/tokenizers, `tokenizers::decoders`.
    """
    if [step["type"] for step in steps] == ["BPEDecoder"]:
        return True
    fused = False
    for step in steps:
        kind = step["type"]
        if kind == "Fuse":
            fused = True
        elif kind not in _EACH_TOKEN or (fused and not _is_local_in_text(step)):
            return False
    return True


def _is_local_in_text(step: Step) -> bool:
    """Test for a step that is local on the text of all tokens too."""
    if step["type"] == "Replace":
        return len(step["pattern"].get("String", "")) == 1
    return step["type"] == "Strip" and step["stop"] == 0
