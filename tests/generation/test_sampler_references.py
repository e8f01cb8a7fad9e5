"""Every step of the sampler against transformers, or a definition in float64."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptx.backends import Backend
from gptx.generation.history import MAX_PENALTY, Dry, History
from gptx.generation.params import SamplingParams
from gptx.generation.sampling import Sampler
from tests.support.backends import make_backend
from tests.support.sampling_reference import INF, Floats, dry

GOLDEN = Path(__file__).parents[1] / "golden" / "samplers.npz"
STEPS = [
    *("repetition_penalty", "no_repeat_ngram_size", "ban", "sequence_bias", "min_tokens"),
    *("top_k", "top_p", "min_p", "typical_p"),
]


@pytest.fixture(params=["numpy", "mlx", "strict"])
def device(request: pytest.FixtureRequest) -> Backend:
    """One backend of each array library that tests run without an emulator."""
    return make_backend(request.param)


@cache
def golden() -> dict[str, Any]:
    """The arrays of the golden file, its settings as dicts, and its sequences as lists."""
    with np.load(GOLDEN) as file:
        arrays: dict[str, Any] = dict(file)
    for name in [name for name in arrays if name.endswith(".params")]:
        arrays[name] = json.loads(arrays[name].tobytes())
    pairs = zip(arrays["ids"], arrays["lengths"], strict=True)
    arrays["sequences"] = [row[:n].tolist() for row, n in pairs]
    return arrays


def sampler_of(backend: Backend, setting: dict[str, Any], ids: list[int], V: int) -> Sampler:
    """Return the sampler of one sequence; `n_prompt` of its tokens are the prompt."""
    options = dict(setting)
    n_prompt, end_ids = options.pop("n_prompt", len(ids)), options.pop("end_ids", ())
    if "sequence_bias" in options:
        options["sequence_bias"] = {tuple(key): x for key, x in options["sequence_bias"]}
    made = Sampler(SamplingParams(**options), backend, [ids], [0], V, end_ids)
    if made.history is not None:
        made.history = History([ids[:n_prompt]])
        for id in ids[n_prompt:]:
            made.history.add([id])
    return made


def processed(backend: Backend, made: Sampler, logits: Floats) -> Floats:
    """Return one row of logits after all steps of a sampler; those of a draw if it draws."""
    with backend.scope():
        x = made.process(backend.asarray(logits[None].astype(np.float32), "float32"))
        return np.asarray(backend.to_numpy(x if made.params.greedy else made.filter(x)))[0]


@pytest.mark.parametrize("name", STEPS)
def test_each_step_is_that_of_transformers(device: Backend, name: str) -> None:
    data = golden()
    settings, logits = data[f"{name}.params"], data["logits"]
    assert len(settings) == 200
    for i, (setting, ids, x) in enumerate(zip(settings, data["sequences"], logits, strict=True)):
        draws = {"temperature": 1.0} if name in ("top_k", "top_p", "min_p", "typical_p") else {}
        found = processed(device, sampler_of(device, setting | draws, ids, len(x)), x)
        if f"{name}.kept" in data:
            kept = np.unpackbits(data[f"{name}.kept"][i])[: len(x)].astype(bool)
            np.testing.assert_array_equal(found, np.where(kept, x, -INF), err_msg=str(setting))
        else:
            expected = data[f"{name}.logits"][i]
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6, err_msg=str(setting))


def test_all_steps_together_leave_the_tokens_that_transformers_leaves(device: Backend) -> None:
    """With its own order of the steps."""
    data = golden()
    n_kept = []
    for i, setting in enumerate(data["sampled.params"]):
        ids, x = data["sequences"][i], data["logits"][i]
        found = processed(device, sampler_of(device, setting, ids, len(x)), x)
        kept = np.unpackbits(data["sampled.kept"][i])[: len(x)].astype(bool)
        np.testing.assert_array_equal(found > -INF, kept, err_msg=str(setting))
        n_kept.append(int(kept.sum()))
    assert min(n_kept) >= 1
    assert len(set(n_kept)) > 10


def dry_setting(random: np.random.Generator) -> tuple[dict[str, Any], list[int]]:
    """Draw a setting, and a sequence with repetitions."""
    ids = random.integers(0, 5, int(random.integers(1, 40))).tolist()
    if random.random() < 0.7:
        start = int(random.integers(0, len(ids)))
        ids += ids[start : start + int(random.integers(1, 20))]
    setting = {
        "dry_multiplier": round(float(random.uniform(0.1, 5)), 3),
        "dry_base": round(float(random.uniform(1, 3)), 3),
        "dry_allowed_length": int(random.integers(1, 5)),
        "dry_range": int(random.choice([0, 0, 3, 10, 30])),
        "dry_sequence_breakers": random.choice(8, int(random.integers(0, 3))).tolist(),
    }
    return setting, ids


def test_dry_is_its_definition(device: Backend) -> None:
    random = np.random.default_rng(5)
    n_penalized = 0
    for _ in range(200):
        setting, ids = dry_setting(random)
        x = random.normal(0, 3, 11).astype(np.float32)
        found = processed(device, sampler_of(device, setting, ids, len(x)), x)
        penalty = dry(ids, len(x), **{k.removeprefix("dry_"): v for k, v in setting.items()})
        expected = x.astype(np.float64) - penalty
        np.testing.assert_allclose(
            found, expected, rtol=1e-6, atol=1e-5, err_msg=f"{setting} {ids}"
        )
        n_penalized += bool(penalty.any())
    assert 50 < n_penalized < 195


def test_dry_of_a_text_that_repeats() -> None:
    step = Dry(0.8, 1.75, 2, 0, ())
    assert dict(step([1, 2, 3, 9, 1, 2], 6)) == {3: pytest.approx(-0.8)}  # 2 tokens are repeated
    assert dict(step([5, 1, 2, 3, 9, 5, 1, 2], 8)) == {3: pytest.approx(-0.8 * 1.75)}
    assert dict(step([2, 3, 9, 2], 4)) == {}  # one token
    # The longer repetition of 3 counts.
    assert dict(step([5, 1, 2, 3, 1, 2, 3, 5, 1, 2], 10)) == {3: pytest.approx(-0.8 * 1.75)}
    breaks = Dry(0.8, 1.75, 2, 0, (5,))
    assert dict(breaks([5, 1, 2, 3, 9, 5, 1, 2], 8)) == {3: pytest.approx(-0.8)}
    assert dict(breaks([1, 2, 5, 9, 1, 2], 6)) == {}  # a breaker has no penalty


def test_the_penalty_of_dry_stays_finite() -> None:
    [(id, bias)] = Dry(3.0, 1000.0, 1, 0, ())([7] * 500, 500)
    assert (id, bias) == (7, pytest.approx(-MAX_PENALTY))


ALL: dict[str, Any] = {
    "temperature": 0.9,
    "top_k": 40,
    "top_p": 0.97,
    "min_p": 0.01,
    "typical_p": 0.9,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.2,
    "logit_bias": {3: -INF, 5: 1.0},
    "sequence_bias": {(1, 2): -3.0, (7,): 0.5, (4, 4, 4): -INF},
    "ban": ((9,), (8, 1)),
    "no_repeat_ngram_size": 2,
    "dry_multiplier": 0.8,
    "dry_sequence_breakers": (6,),
    "min_tokens": 4,
    "logits_processor": lambda ids, x: x + 0.25 * (len(ids) % 2),
    "seed": 11,
}


def test_the_same_seed_gives_the_same_tokens_on_all_backends(library: Backend) -> None:
    random = np.random.default_rng(3)
    logits = random.normal(0, 2, (12, 5, 61)).astype(np.float32)

    def continue_(on: Backend) -> list[list[int]]:
        prompts = [[i, 1, i + 3] for i in range(5)]
        made = Sampler(SamplingParams(**ALL), on, prompts, list(range(5)), 61, (10, 11))
        assert made.history is not None
        found = []
        for x in logits:
            with on.scope():
                tokens = on.sample(on.asarray(x, "float32"), made)
                found.append(on.read_tokens(tokens).ids)
            made.history.add(found[-1])
        return found

    expected = continue_(make_backend("numpy-generic"))
    assert continue_(library) == expected
    assert min(map(min, expected)) >= 0
    assert len({tuple(ids) for ids in expected}) == 12


# The order of the steps: a result that no other order of the two gives.


@pytest.mark.parametrize(
    ("options", "logits", "expected"),
    [
        # (2 + 2) / 2, not 2 / 2 + 2
        ({"sequence_bias": [[[1, 0], 2.0]], "repetition_penalty": 2.0}, [2.0, 1.0, 7.0], 2.0),
        # 6 / 2 - 1, not (6 - 1) / 2
        ({"repetition_penalty": 2.0, "dry_multiplier": 1.0}, [6.0, 1.0, 7.0], 2.0),
        # the function sees the ban, and not the temperature
        (
            {"temperature": 0.5, "ban": [[2]], "logits_processor": lambda ids, x: x - x[2] * 0 + 1},
            [6.0, 1.0, 7.0],
            None,
        ),
        ({"temperature": 0.5, "logits_processor": lambda ids, x: x + 1}, [6.0, 1.0, 7.0], 14.0),
    ],
)
def test_order_of_the_steps(
    device: Backend, options: dict[str, Any], logits: list[float], expected: float | None
) -> None:
    made = sampler_of(device, {"dry_allowed_length": 1, **options}, [1, 0, 1], 3)
    found = processed(device, made, np.array(logits))[0]
    assert np.isnan(found) if expected is None else found == expected


def test_typical_p_is_after_min_p(device: Backend) -> None:
    x = np.log(np.array([0.4, 0.3, 0.12, 0.1, 0.08]))
    both = {"temperature": 1.0, "min_p": 0.35, "typical_p": 0.25}
    first = processed(device, sampler_of(device, both, [0], 5), x)
    only = processed(device, sampler_of(device, {**both, "min_p": 0.0}, [0], 5), x)
    assert np.flatnonzero(first > -INF).tolist() == [0]
    assert np.flatnonzero(only > -INF).tolist() == [1]
