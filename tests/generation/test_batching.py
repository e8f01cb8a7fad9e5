"""The running batch: each sequence gets what it gets alone, whatever joins and leaves."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from gptx.errors import GptxError, NonFiniteError, ParameterError
from gptx.generation.batching import MAX_PASSED_OVER, Batch
from gptx.generation.params import SamplingParams
from gptx.generation.results import Token
from gptx.generation.sampling import Sampler
from gptx.generation.sequences import Sampling, Sequence, make_sequences
from gptx.generation.text_model import Model
from gptx.quantization import Quantization
from gptx.random_weights import random_weights
from tests.support.backends import make_backend
from tests.support.models import make_model
from tests.support.random_models import CASES

CONFIG = CASES["tiny"]
V, N = CONFIG.vocab_size, CONFIG.n_positions
GREEDY = Sampling(SamplingParams())
NEAR_TIE = 1e-5  # between log-probabilities of tokens that another order of a sum may exchange


@dataclass
class Request:
    """A prompt, how to continue it, and when its client hangs up."""

    prompt: list[int]
    sampling: Sampling
    max_tokens: int
    copies: int
    overflow: Any
    salt: str
    prompt_logprobs: int | None
    leaves_after: int | None  # tokens of its first copy
    joins_at: int
    tokens: dict[int, list[Token]] = field(default_factory=dict)

    def sequences(self) -> list[Sequence]:
        [made] = make_sequences(
            [self.prompt],
            self.sampling,
            N,
            copies=self.copies,
            max_tokens=self.max_tokens,
            overflow=self.overflow,
        )
        return made


def random_request(r: random.Random, step: int) -> Request:
    prefix = [[], [3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8]][r.randrange(3)]
    prompt = [*prefix, *(r.randrange(V) for _ in range(r.choice([1, 1, 2, 5, 14])))]
    greedy = r.random() < 0.3
    params = SamplingParams(
        temperature=0.0 if greedy else r.choice([0.5, 1.0, 2.0]),
        top_k=r.choice([0, 0, 5, 20]),
        top_p=r.choice([1.0, 0.9, 0.5]),
        min_p=r.choice([0.0, 0.0, 0.1]),
        typical_p=r.choice([1.0, 1.0, 1.0, 0.9]),
        repetition_penalty=r.choice([1.0, 1.0, 1.3]),
        presence_penalty=r.choice([0.0, 0.0, 0.5]),
        frequency_penalty=r.choice([0.0, 0.0, 0.5]),
        logit_bias=r.choice([{}, {}, {5: 4.0, 6: -math.inf}]),
        no_repeat_ngram_size=r.choice([0, 0, 0, 2]),
        dry_multiplier=r.choice([0.0, 0.0, 0.0, 0.8]),
        min_tokens=r.choice([0, 0, 2]),
        seed=r.randrange(1000),
    )
    logprobs = r.random() < 0.5
    ends = frozenset(r.choice([(), (), (7,), (7, 11, 13)]))
    sampling = Sampling(params, ends, logprobs, r.choice([0, 3]) if logprobs else 0)
    return Request(
        prompt,
        sampling,
        max_tokens=r.choice([1, 3, 6, 10]),
        copies=r.choice([1, 1, 1, 3]),
        overflow=r.choice(["truncate", "slide"]),
        salt=r.choice(["", "", "a"]),
        prompt_logprobs=r.choice([None, None, None, 2]),
        leaves_after=r.choice([None, None, None, 0, 2]),
        joins_at=step,
    )


def run_together(model: Model, requests: list[Request], **options: Any) -> Batch:
    """Run requests that join at their steps and leave when their clients do."""
    batch = Batch(model.gpt2, 9, N, n_prefixes=3, chunk_tokens=8, **options)
    coming, step = list(requests), 0
    owner: dict[Sequence, Request] = {}
    first: dict[int, Sequence] = {}
    while coming or batch.sequences:
        while coming and coming[0].joins_at <= step:
            request = coming.pop(0)
            made = request.sequences()
            owner.update(dict.fromkeys(made, request))
            first[id(request)] = made[0]
            batch.add(made, prompt_logprobs=request.prompt_logprobs, salt=request.salt)
            if request.leaves_after == 0 and step % 2:
                batch.remove(made[0])
        for sequence, token in batch.step():
            assert isinstance(token, Token), token
            request = owner[sequence]
            request.tokens.setdefault(sequence.index, []).append(token)
            if sequence.index == 0 and len(request.tokens[0]) == request.leaves_after:
                batch.remove(sequence)
        step += 1
    for request in requests:
        request_first = first[id(request)]
        if request.prompt_logprobs is not None and 0 in request.tokens:
            assert request_first.prompt_logprobs is not None
            assert len(request_first.prompt_logprobs.logprobs) == len(request_first.prompt) - 1
    return batch


def run_alone(model: Model, request: Request) -> dict[int, list[Token]]:
    batch = Batch(model.gpt2, request.copies, N)
    batch.add(request.sequences(), prompt_logprobs=request.prompt_logprobs)
    tokens: dict[int, list[Token]] = {}
    while batch.sequences:
        for sequence, token in batch.step():
            assert isinstance(token, Token), token
            tokens.setdefault(sequence.index, []).append(token)
    return tokens


def id_of(token: Token) -> int | None:
    return token.end_id if token.id is None else token.id


def is_near_tie(model: Model, request: Request, ids: list[Any], a: Any, b: Any) -> bool:
    """Test for two equal logits; a draw can be at the border between any two tokens."""
    x = model.logits([*request.prompt, *ids][-N:])[-1]
    return not request.sampling.params.greedy or bool(abs(x[a] - x[b]) < NEAR_TIE)


def count_ties(model: Model, request: Request) -> int:
    """Compare a request with its run alone; return the number of sequences with a near tie."""
    alone, ties = run_alone(model, request), 0
    for index, expected in alone.items():
        found = request.tokens.get(index, [])
        for i, (x, y) in enumerate(zip(found, expected, strict=False)):
            if id_of(x) != id_of(y):
                ids = [id_of(token) for token in expected[:i]]
                assert is_near_tie(model, request, ids, id_of(x), id_of(y))
                ties += 1
                break
            assert (x.id, x.finish_reason, x.end_id) == (y.id, y.finish_reason, y.end_id)
            assert x.logprob == (None if y.logprob is None else pytest.approx(y.logprob, abs=1e-4))
            assert (x.top_logprobs is None) == (y.top_logprobs is None)
        else:
            left = request.leaves_after is not None and index == 0
            assert left or len(found) == len(expected)
    return ties


def run_requests(model: Model, n: int, seed: int) -> int:
    """Compare n random requests with their runs alone; return the number of near ties."""
    r = random.Random(seed)
    step, requests = 0, []
    for _ in range(n):
        step += r.choice([0, 0, 1, 2, 5])
        requests.append(random_request(r, step))
    run_together(model, requests)
    ties = sum(count_ties(model, request) for request in requests)
    assert ties <= n / 200
    return ties


def test_each_request_equals_the_request_alone(small: Model) -> None:
    numbers = {"array_api_strict": 4, "cupy": 4, "mlx": 40}
    run_requests(small, numbers.get(small.backend.name, 80), seed=1)


def test_in_float64_with_generic_ops_no_token_ever_differs() -> None:
    model = make_model(CONFIG, make_backend("numpy-generic", dtype="float64"))
    assert run_requests(model, 60, seed=2) == 0


@pytest.mark.soak
@pytest.mark.parametrize("quantization", [None, Quantization(32, 8), Quantization(32, 4)])
def test_ten_thousand_requests(quantization: Quantization | None) -> None:
    config = CONFIG if quantization is None else replace(CASES["124M"], n_layer=2, n_head=3)
    model = make_model(config, make_backend("numpy"), quantization=quantization)
    n = 10_000 if quantization is None else 1000
    for seed in range(n // 500):
        run_requests(model, 500, seed=100 + seed)


# Joining and leaving


def steps(batch: Batch) -> list[list[int]]:
    """Run a batch to its end; return the indices of the sequences with a token in each step."""
    seen = []
    while batch.sequences:
        seen.append([sequence.index for sequence, _ in batch.step()])
    return seen


def one(prompt: list[int], n: int = 4, index: int = 0, **options: Any) -> Sequence:
    return Sequence(prompt, GREEDY, n, index=index, **options)


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model(CONFIG, make_backend("numpy"))


def test_chunks_of_a_prompt_and_decode_steps_alternate() -> None:
    """A backend that computes padding takes one or the other in a pass."""
    model = make_model(CONFIG, make_backend("numpy-generic"))
    batch = Batch(model.gpt2, 2, N, chunk_tokens=4)
    batch.add([one([1, 2], 6, index=0)])
    batch.add([one([1] * 18, 1, index=1)])
    # The short prompt first; then a chunk of the long one between two tokens of the other.
    assert steps(batch) == [[0], [0], [], [0], [], [0], [], [0], [], [0], [1]]


def test_chunks_of_a_prompt_and_decode_steps_share_passes(model: Model) -> None:
    batch = Batch(model.gpt2, 2, N, chunk_tokens=4)
    batch.add([one([1, 2], 6, index=0)])
    batch.add([one([1] * 18, 1, index=1)])
    n_computed = []
    seen = []
    while batch.sequences:
        seen.append([sequence.index for sequence, _ in batch.step()])
        n_computed.append(batch.n_computed)
    assert seen == [[0], [0], [0], [0], [0], [0, 1]]
    assert n_computed == [2, 5, 5, 5, 5, 3]


def test_a_prompt_with_log_probabilities_does_not_stop_the_others(model: Model) -> None:
    """Its logits of all tokens are requested, so it has a pass of its own."""
    batch = Batch(model.gpt2, 2, N, chunk_tokens=4)
    batch.add([one([1, 2], 6, index=0)])
    batch.step()
    batch.add([one([1] * 10, 1, index=1)], prompt_logprobs=0)
    assert steps(batch) == [[], [0], [], [0], [1], [0], [0], [0]]


def test_a_short_prompt_passes_a_long_one(model: Model) -> None:
    batch = Batch(model.gpt2, 3, N, chunk_tokens=4)
    batch.add([one([1] * 40, 1, index=0)])
    assert batch.step() == []
    batch.add([one([5, 6, 7], 1, index=1)])
    assert [sequence.index for sequence, _ in batch.step()] == [1]


def test_the_oldest_prompt_has_its_turn(model: Model) -> None:
    batch = Batch(model.gpt2, 2, N, chunk_tokens=4)
    batch.add([one([1] * 9, 1, index=0)])
    n = 0
    while 0 in [sequence.index for sequence in batch.sequences]:
        if len(batch.sequences) < 2:  # a short prompt waits at all times
            batch.add([one([n % V, 3], 1, index=1)])
        batch.step()
        n += 1
    assert n <= 3 * (MAX_PASSED_OVER + 1)


def test_prompts_wait_in_order_until_a_slot_is_free(model: Model) -> None:
    batch = Batch(model.gpt2, 2, N)
    for index in range(4):
        batch.add([one([index + 1], 2, index=index)])
    assert batch.n_waiting == 4
    assert steps(batch) == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_a_sequence_that_leaves_frees_its_place_in_the_next_step(model: Model) -> None:
    waiting, reading, running = one([1] * 20, 9), one([2] * 20, 9), one([3], 9)
    batch = Batch(model.gpt2, 2, N, chunk_tokens=4)
    batch.add([running])
    batch.step()
    batch.add([reading])
    batch.add([waiting])
    batch.step()
    batch.step()
    assert (batch.n_waiting, len(reading.output)) == (1, 0)
    batch.remove(waiting)
    batch.remove(reading)
    batch.remove(running)
    assert batch.sequences == []
    assert batch.step() == []
    assert (waiting.output, reading.output) == ([], [])
    batch.add([one([4], 1)])
    batch.add([one([5], 1)])
    assert len(batch.step()) == 2


def test_more_copies_than_places_are_an_error(model: Model) -> None:
    batch = Batch(model.gpt2, 4, N, n_prefixes=2)
    with pytest.raises(ParameterError, match="n is 3, expected at most 2"):
        batch.add([one([1]), one([1]), one([1])])


def test_a_copy_that_leaves_while_the_prompt_is_read(model: Model) -> None:
    sampling = Sampling(SamplingParams(temperature=1.0, seed=5))
    [alone] = make_sequences([[3] * 12], sampling, N, copies=3, max_tokens=5)
    batch = Batch(model.gpt2, 3, N)
    batch.add(alone)
    while batch.sequences:
        batch.step()
    [copies] = make_sequences([[3] * 12], sampling, N, copies=3, max_tokens=5)
    batch = Batch(model.gpt2, 3, N, chunk_tokens=5)
    batch.add(copies)
    batch.step()
    batch.remove(copies[0])
    while batch.sequences:
        batch.step()
    assert [copy.output for copy in copies] == [[], alone[1].output, alone[2].output]


def test_requests_that_differ_in_the_seed_share_a_sampler(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    real = Sampler.__call__

    def call(self: Sampler, logits: Any) -> Any:
        rows.append(logits.shape[0])
        return real(self, logits)

    monkeypatch.setattr(Sampler, "__call__", call)
    params = {"temperature": 1.0, "presence_penalty": 0.5, "no_repeat_ngram_size": 3}
    batch = Batch(model.gpt2, 4, N)
    for seed in (1, 2, 3):
        batch.add([Sequence([seed], Sampling(SamplingParams(seed=seed, **params)), 4)])
    batch.add([Sequence([4], Sampling(SamplingParams(seed=4, top_k=5, **params)), 4)])
    steps(batch)
    assert rows == [1, 1, 1, 1] + 3 * [3, 1]


# Shared prefixes


def test_a_shared_prefix_is_computed_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    real = model.gpt2.forward

    def forward(ids: Any, *args: Any, **options: Any) -> Any:
        lengths.append(ids.shape[1])
        return real(ids, *args, **options)

    monkeypatch.setitem(vars(model.gpt2), "forward", forward)
    batch = Batch(model.gpt2, 3, N, n_prefixes=2)
    first = one([1, 2, 3, 4, 5, 6], 1)
    batch.add([first])
    steps(batch)
    again = one([1, 2, 3, 4, 9, 9, 9], 1)
    batch.add([again])
    steps(batch)
    assert lengths == [6, 3]
    assert (first.n_reused, again.n_reused) == (0, 4)
    other = one([1, 2, 3, 4, 9, 9, 9, 8], 1)
    batch.add([other], salt="key")
    steps(batch)
    assert (lengths[2], other.n_reused) == (8, 0)


def test_the_output_of_a_sequence_is_a_prefix_too(model: Model) -> None:
    batch = Batch(model.gpt2, 2, N, n_prefixes=1)
    first = one([1, 2, 3], 5)
    batch.add([first])
    steps(batch)
    again = one([1, 2, 3, *first.output, 7], 1)
    batch.add([again])
    steps(batch)
    assert again.n_reused == 3 + 4  # the newest token of an output is not in the cache


def test_log_probabilities_of_a_prompt_compute_it_whole(model: Model) -> None:
    batch = Batch(model.gpt2, 2, N, n_prefixes=1, chunk_tokens=3)
    batch.add([one([1, 2, 3, 4, 5, 6, 7], 1)])
    steps(batch)
    scored = one([1, 2, 3, 4, 5, 6, 7], 1)
    batch.add([scored], prompt_logprobs=0)
    steps(batch)
    assert (scored.n_reused, scored.prompt_logprobs is None) == (0, False)
    assert scored.prompt_logprobs is not None
    expected = model.score([1, 2, 3, 4, 5, 6, 7]).logprobs[1:]
    assert scored.prompt_logprobs.logprobs == pytest.approx(expected, abs=1e-5)


# Going on after some output


@pytest.mark.parametrize("n_before", [1, 4])
def test_a_sequence_continues_after_its_output(small: Model, n_before: int) -> None:
    params = SamplingParams(
        temperature=1.0, seed=3, presence_penalty=0.7, repetition_penalty=1.2, min_tokens=6
    )
    sampling = Sampling(params, frozenset({1}))
    whole = Sequence([5, 6, 7], sampling, 9)
    batch = Batch(small.gpt2, 2, N, n_prefixes=1)
    batch.add([whole])
    steps(batch)
    rest = Sequence([5, 6, 7], sampling, 9 - n_before, output=whole.output[:n_before])
    batch.add([rest])
    steps(batch)
    assert rest.output == whole.output


# Errors


def test_a_number_that_is_not_finite_ends_its_sequence_only() -> None:
    weights = random_weights(CONFIG)
    weights["wte.weight"][50] = np.nan
    weights = dict(weights) | {"lm_head.weight": random_weights(CONFIG)["wte.weight"]}
    model = make_model(replace(CONFIG, tie_word_embeddings=False), make_backend("numpy"), weights)
    without_50 = Sampling(SamplingParams(logit_bias={50: -math.inf}))
    good, bad = Sequence([1, 2], without_50, 5), one([3, 50], 5)
    batch = Batch(model.gpt2, 2, N)
    batch.add([good])
    batch.step()
    batch.add([bad])
    errors = []
    while batch.sequences:
        errors += [made for _, made in batch.step() if isinstance(made, GptxError)]
    assert [type(error) for error in errors] == [NonFiniteError]
    assert (len(good.output), len(bad.output)) == (5, 0)


def test_an_error_of_a_processor_ends_its_sequences_only(model: Model) -> None:
    bad = Sampling(SamplingParams(logits_processor=lambda ids, logits: logits[:3]))
    good, wrong = one([1, 2], 3), Sequence([3], bad, 3)
    batch = Batch(model.gpt2, 2, N)
    batch.add([good])
    batch.add([wrong])
    made = [item for _ in range(4) for item in batch.step()]
    errors = [(sequence, error) for sequence, error in made if isinstance(error, GptxError)]
    assert [sequence for sequence, _ in errors] == [wrong]
    assert len(good.output) == 3
    assert batch.sequences == []
