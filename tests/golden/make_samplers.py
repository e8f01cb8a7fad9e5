"""Compute the golden logits of transformers' steps of sampling.

The environment needs torch, transformers and the sources of gptx:

    python -m venv /tmp/reference
    /tmp/reference/bin/pip install torch==2.13.0 transformers==5.24.0
    PYTHONPATH=. /tmp/reference/bin/python tests/golden/make_samplers.py

samplers.npz
    `ids` and `lengths`: 200 sequences of token ids, padded with -1; `logits`: float32 [200, V].
    For every step of `STEPS`: `<step>.params`, 200 settings as JSON; and its output for each:
    `<step>.kept`, the packed bits of the tokens that are left (whose logits do not change), or
    `<step>.logits`. `sampled.kept` has the tokens that all steps together leave, in the order of
    `GenerationMixin._get_logits_processor`.

A setting of `typical_p` and `top_p` is drawn again if rounding could change the set of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel
from transformers.generation import logits_process as steps

HERE = Path(__file__).resolve().parent
N, V, MAX_LENGTH = 200, 61, 40
MARGIN = 1e-5  # of a sum of probabilities to the parameter
random = np.random.default_rng(0)

Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def sequence(n_tokens: int) -> list[int]:
    """Draw token ids of few different values, which repeat."""
    return random.integers(0, 6, n_tokens).tolist()


def tokens() -> list[list[int]]:
    return [sequence(int(random.integers(2, MAX_LENGTH))) for _ in range(N)]


def part_of(ids: list[int]) -> list[int]:
    """Draw the newest tokens of a sequence and one more, or other tokens."""
    n = int(random.integers(0, 4))
    newest = ids[len(ids) - n :] if random.random() < 0.7 else sequence(n)
    return [*newest, int(random.integers(0, V))]


def number(low: float, high: float) -> float:
    return round(float(random.uniform(low, high)), 3)


def repetition_penalty(ids: list[int], x: torch.Tensor) -> tuple[dict[str, Any], Processor]:
    penalty = number(0.5, 3)
    return {"repetition_penalty": penalty}, steps.RepetitionPenaltyLogitsProcessor(penalty)


def no_repeat_ngram(ids: list[int], x: torch.Tensor) -> tuple[dict[str, Any], Processor]:
    size = int(random.integers(1, 6))
    return {"no_repeat_ngram_size": size}, steps.NoRepeatNGramLogitsProcessor(size)


def ban(ids: list[int], x: torch.Tensor) -> tuple[dict[str, Any], Processor]:
    words = [part_of(ids) for _ in range(int(random.integers(1, 9)))]
    return {"ban": words}, steps.NoBadWordsLogitsProcessor(words)


def sequence_bias(ids: list[int], x: torch.Tensor) -> tuple[dict[str, Any], Processor]:
    words = {tuple(part_of(ids)): number(-9, 9) for _ in range(int(random.integers(1, 9)))}
    biases = [[list(word), bias] for word, bias in words.items()]
    return {"sequence_bias": biases}, steps.SequenceBiasLogitsProcessor(biases)


def min_tokens(ids: list[int], x: torch.Tensor) -> tuple[dict[str, Any], Processor]:
    n_prompt, least = int(random.integers(1, len(ids) + 1)), int(random.integers(0, MAX_LENGTH))
    ends = random.choice(V, int(random.integers(1, 4)), replace=False).tolist()
    made = steps.MinNewTokensLengthLogitsProcessor(n_prompt, least, ends)
    return {"min_tokens": least, "n_prompt": n_prompt, "end_ids": ends}, made


def top_k(ids: list[int], x: torch.Tensor) -> tuple[dict[str, Any], Processor]:
    k = int(random.integers(1, V + 5))
    return {"top_k": k}, steps.TopKLogitsWarper(k)


def min_p(ids: list[int], x: torch.Tensor) -> tuple[dict[str, Any], Processor]:
    p = number(0.001, 0.9)
    return {"min_p": p}, steps.MinPLogitsWarper(p)


def top_p(ids: list[int], x: torch.Tensor) -> tuple[dict[str, Any], Processor]:
    sums = x.double().softmax(-1).sort(descending=True).values.cumsum(-1)
    p = sure(sums)
    return {"top_p": p}, steps.TopPLogitsWarper(p)


def typical_p(ids: list[int], x: torch.Tensor) -> tuple[dict[str, Any], Processor]:
    logprobs = x.double().log_softmax(-1)
    probs = logprobs.exp()
    order = (-logprobs + (probs * logprobs).sum(-1, keepdim=True)).abs().argsort()
    p = sure(probs.gather(-1, order).cumsum(-1))
    return {"typical_p": p}, steps.TypicalLogitsWarper(p)


def sure(sums: torch.Tensor) -> float:
    """Draw a sum of probabilities that no sum of a sequence's tokens is close to."""
    while True:
        p = number(0.02, 0.99)
        if (sums - p).abs().min() > MARGIN:
            return p


# Step -> its name in the file; True if the logits of the tokens that it leaves do not change.
STEPS: dict[Any, tuple[str, bool]] = {
    repetition_penalty: ("repetition_penalty", False),
    no_repeat_ngram: ("no_repeat_ngram_size", True),
    ban: ("ban", True),
    sequence_bias: ("sequence_bias", False),
    min_tokens: ("min_tokens", True),
    top_k: ("top_k", True),
    top_p: ("top_p", True),
    min_p: ("min_p", True),
    typical_p: ("typical_p", True),
}


def together(ids: list[int], x: torch.Tensor) -> tuple[dict[str, Any], torch.Tensor]:
    """Draw a setting of all steps; return it and the tokens that transformers' own order leaves."""
    params: dict[str, Any] = {"temperature": number(0.5, 2), "top_k": int(random.integers(5, V))}
    for step in (repetition_penalty, no_repeat_ngram, ban, sequence_bias, min_tokens, min_p):
        params |= step(ids, x)[0]
    params["min_p"] /= 50
    n_prompt, ends = params["n_prompt"], params["end_ids"]
    config = GenerationConfig(
        do_sample=True,
        temperature=params["temperature"],
        top_k=params["top_k"],
        top_p=number(0.5, 0.99),
        min_p=params["min_p"],
        typical_p=number(0.5, 0.99),
        repetition_penalty=params["repetition_penalty"],
        no_repeat_ngram_size=params["no_repeat_ngram_size"],
        bad_words_ids=params["ban"],
        sequence_bias=params["sequence_bias"],
        min_new_tokens=params["min_tokens"],
        eos_token_id=ends,
        max_new_tokens=100,
    )
    params |= {"top_p": config.top_p, "typical_p": config.typical_p}
    config._eos_token_tensor = torch.tensor(ends)
    chain = MODEL._get_logits_processor(
        config, input_ids_seq_length=n_prompt, encoder_input_ids=torch.tensor([ids]), device="cpu",
        prefix_allowed_tokens_fn=None, logits_processor=steps.LogitsProcessorList(),
    )  # fmt: skip
    kept = [
        torch.isfinite(chain(torch.tensor([ids]), x.to(kind)))
        for kind in (torch.float32, torch.float64)
    ]
    if not torch.equal(*kept):
        return together(ids, x)  # rounding decides
    return params, kept[0]


MODEL = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=2, vocab_size=V, n_positions=4))


def main() -> None:
    sequences = tokens()
    logits = random.normal(0, 3, (N, V)).astype(np.float32)
    padded = np.full((N, MAX_LENGTH), -1, np.int8)
    for row, ids in zip(padded, sequences, strict=True):
        row[: len(ids)] = ids
    out = {"ids": padded, "lengths": np.array([len(ids) for ids in sequences]), "logits": logits}

    def save(name: str, settings: list[dict[str, Any]], results: np.ndarray, keeps: bool) -> None:
        out[f"{name}.params"] = np.frombuffer(json.dumps(settings).encode(), np.uint8)
        if keeps:
            out[f"{name}.kept"] = np.packbits(np.isfinite(results), axis=-1)
        else:
            out[f"{name}.logits"] = results.astype(np.float32)

    for make, (name, keeps) in STEPS.items():
        settings, results = [], []
        for ids, row in zip(sequences, logits, strict=True):
            x = torch.tensor(row)[None]
            params, step = make(ids, x)
            settings.append(params)
            results.append(step(torch.tensor([ids]), x.clone())[0].numpy())
        if keeps:
            for row, result in zip(logits, results, strict=True):
                assert np.array_equal(result[np.isfinite(result)], row[np.isfinite(result)])
        save(name, settings, np.array(results), keeps)
    settings, results = [], []
    for ids, row in zip(sequences, logits, strict=True):
        params, kept = together(ids, torch.tensor(row)[None])
        settings.append(params)
        results.append(np.where(kept[0].numpy(), 0, -np.inf))
    save("sampled", settings, np.array(results), keeps=True)
    np.savez_compressed(HERE / "samplers.npz", **out)
    print({name: x.shape for name, x in out.items()})


if __name__ == "__main__":
    main()
