"""Windows of a corpus: their order, their coverage, and the checks before the first step."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from gptx.backends.backward import Batch
from gptx.errors import DataError, ParameterError
from gptx.tokenization.characters import character_tokenizer
from gptx.training.data.token_files import TokenFiles
from gptx.training.data.windows import EpochOrder, TokenData, spread
from tests.support.byte_tokenizers import byte_tokenizer
from tests.support.cli import raises_error
from tests.support.random_models import CASES


def corpus(folder: Path, n: int, name: str = "train") -> TokenFiles:
    """A corpus whose ids are their positions."""
    (folder / f"{name}.bin").write_bytes(np.arange(n, dtype="<u2").tobytes())
    return TokenFiles.open([folder / f"{name}.bin"])


def data(folder: Path, n: int = 1000, **options: int) -> TokenData:
    given = {"context": 8, "batch_size": 3, "seed": 5} | options
    return TokenData(corpus(folder, n), corpus(folder, n // 10, "val"), **given)  # type: ignore[arg-type]


def arrays(batch: Batch) -> list[list[list[float]]]:
    return [batch.ids.tolist(), batch.targets.tolist(), batch.weights.tolist()]


def test_a_batch_is_windows_and_their_next_tokens(tmp_path: Path) -> None:
    batch = data(tmp_path).batch(0)
    assert batch.ids.shape == (3, 8)
    assert batch.ids.dtype == batch.targets.dtype == np.int64
    assert batch.weights.dtype == np.float32
    assert (batch.ids[:, 1:] == batch.ids[:, :-1] + 1).all()
    assert (batch.targets == batch.ids + 1).all()
    assert (batch.weights == 1).all()


# Order and shuffle: nanoGPT #294, build-nanogpt #52, modded-nanogpt #174.
@pytest.mark.parametrize("n", [9, 16, 17, 100, 1000, 1001, 1007])
def test_each_token_is_a_target_once_an_epoch(n: int, tmp_path: Path) -> None:
    """All but fewer than 2 T at the ends, which the next epoch has."""
    found = TokenData(corpus(tmp_path, n), context=8, batch_size=1, seed=5)
    epochs = []
    for epoch in range(4):
        steps = range(epoch * found.sequences_per_epoch, (epoch + 1) * found.sequences_per_epoch)
        targets = np.concatenate([found.batch(step).targets[0] for step in steps])
        counts = Counter(targets.tolist())
        assert set(counts.values()) == {1}
        assert len(counts) > n - 1 - 2 * 8
        assert max(counts) - min(counts) + 1 == len(counts)  # no gap between windows
        epochs.append(targets.tolist())
    if n >= 100:
        assert len({min(epoch) for epoch in epochs}) > 1  # another offset
        assert len({tuple(np.argsort(epoch).tolist()) for epoch in epochs}) == 4  # another order
        assert all(epoch != sorted(epoch) for epoch in epochs)


# A resume repeats batches: nanoGPT #467, build-nanogpt #83, mlx-lm #97.
def test_a_batch_depends_on_seed_and_step_only(tmp_path: Path) -> None:
    straight = data(tmp_path, 100)
    batches = [arrays(straight.batch(step)) for step in range(12)]  # three epochs
    for step in (11, 0, 7, 3):
        assert arrays(straight.batch(step)) == batches[step]
        assert arrays(data(tmp_path, 100).batch(step)) == batches[step]
    assert len({str(batch) for batch in batches}) == 12
    assert arrays(data(tmp_path, 100, seed=6).batch(0)) != batches[0]


def test_the_size_of_a_batch_does_not_change_the_order(tmp_path: Path) -> None:
    """So 32 = 4 x 8: the sequences of one large batch are those of several small ones."""
    large = data(tmp_path, batch_size=12).batch(1)
    small = [data(tmp_path, batch_size=4).batch(step) for step in (3, 4, 5)]
    assert (np.concatenate([batch.ids for batch in small]) == large.ids).all()


def test_the_order_is_that_of_philox() -> None:
    """The same numbers on every machine, in every version: the words of the generator, sorted."""
    order = EpochOrder(6, seed=7, n_offsets=10)
    words = np.random.Philox(key=[7, 1], counter=[0, 2, 0, 0]).random_raw(7)
    assert order.epoch(2)[0] == int(words[0]) % 10
    assert order.epoch(2)[1].tolist() == sorted(range(6), key=lambda i: words[1 + i])
    offset, numbers = EpochOrder(6, seed=0, n_offsets=100).epoch(0)
    assert (offset, numbers.tolist()) == (38, [4, 2, 1, 3, 0, 5])


@pytest.mark.parametrize("n", [2, 8, 9, 10, 24, 25, 26, 60])
def test_validation_covers_the_split_once(n: int, tmp_path: Path) -> None:
    found = TokenData(
        corpus(tmp_path, 50), corpus(tmp_path, n, "val"), context=8, batch_size=3, seed=5
    )
    batches = list(found.validation_batches())
    counted = [batch.targets[batch.weights > 0] for batch in batches]
    assert np.concatenate(counted).tolist() == list(range(1, n))
    inputs = [batch.ids[batch.weights > 0] for batch in batches]
    assert np.concatenate(inputs).tolist() == list(range(n - 1))
    assert all(batch.ids.shape == (3, 8) for batch in batches[:-1])
    for batch in batches:  # padding is at the end of a sequence
        assert (np.diff(batch.weights, axis=1) <= 0).all()
    assert [arrays(x) for x in found.validation_batches()] == [arrays(x) for x in batches]


def test_some_validation_batches_are_spread_over_the_split(tmp_path: Path) -> None:
    found = data(tmp_path, 2500)
    every = [arrays(batch) for batch in found.validation_batches()]
    assert len(every) == 11
    assert [arrays(batch) for batch in found.validation_batches(3)] == [every[i] for i in (0, 3, 7)]
    assert [arrays(batch) for batch in found.validation_batches(99)] == every
    assert list(spread(0, 5)) == []


def test_no_validation(tmp_path: Path) -> None:
    found = TokenData(corpus(tmp_path, 50), context=8, batch_size=3)
    assert not found.has_validation
    assert list(found.validation_batches()) == []


# A text shorter than the context: nanoGPT #483.
def test_a_text_shorter_than_a_window(tmp_path: Path) -> None:
    assert TokenData(corpus(tmp_path, 9), context=8, batch_size=1).batch(0).ids[0, 0] == 0
    with raises_error(DataError, "train.bin has 8 tokens, expected at least 9", "lower context"):
        TokenData(corpus(tmp_path, 8), context=8, batch_size=1)
    with raises_error(DataError, "val.bin has 1 tokens, expected at least 2"):
        TokenData(corpus(tmp_path, 9), corpus(tmp_path, 1, "val"), context=8, batch_size=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "context is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"batch_size": True}, "batch_size is True"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_parameters_out_of_range(options: dict[str, int], message: str, tmp_path: Path) -> None:
    with raises_error(ParameterError, message):
        data(tmp_path, **options)


# The vocabulary of the data and of the model differ: nanoGPT #483, RWKV-PEFT #52.
def test_checks_before_the_first_step(tmp_path: Path) -> None:
    config = CASES["tiny"]
    n = config.vocab_size
    corpus(tmp_path, n + 1, "val")
    found = TokenData(
        corpus(tmp_path, n),
        TokenFiles.open([tmp_path / "val.bin"]),
        context=config.n_positions,
        batch_size=1,
    )
    with raises_error(DataError, f"val.bin has the token id {n} at position {n}"):
        found.check(config)
    found.validation = None
    found.check(config)
    found.context += 1
    expected = f"context is {config.n_positions + 1}, and the model has {config.n_positions}"
    with raises_error(ParameterError, expected):
        found.check(config)


def test_another_tokenizer_than_the_model(tmp_path: Path) -> None:
    config = CASES["tiny"]
    found = TokenData(
        corpus(tmp_path, 20), context=4, batch_size=1, tokenizer=character_tokenizer("abc")
    )
    found.check(config)
    found.check(config, character_tokenizer("abcd"))  # the same ids, and one more
    with raises_error(
        DataError, "the data have the id 0 for 'a'", "the tokenizer of the model has"
    ):
        found.check(config, byte_tokenizer())


def test_describe_tells_data_apart(tmp_path: Path) -> None:
    described = [
        data(tmp_path, **options).describe()
        for options in ({}, {"n": 999}, {"context": 9}, {"batch_size": 2}, {"seed": 6})
    ]
    assert len({str(x) for x in described}) == 5
    assert described[0] == data(tmp_path).describe()
    alone = TokenData(corpus(tmp_path, 1000), context=8, batch_size=3, seed=5).describe()
    changed = {name for name in alone if alone[name] != described[0][name]}
    assert changed == {"validation tokens", "validation checksum"}


# Memory grows with the data: nanoGPT #287 #428. The pages of a mapping stay in memory.
def test_memory_does_not_grow_with_the_files(tmp_path: Path) -> None:
    """Every page of a file of 64 MB is read; the memory grows by less than an eighth of it."""
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    code = f"""
import numpy as np
from pathlib import Path
from gptx.training.data.windows import TokenData
from gptx.training.data.token_files import TokenFiles
path = Path({str(tmp_path / "train.bin")!r})
with open(path, "wb") as file:
    file.truncate(2**26)
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
found = TokenData(TokenFiles.open([path]), context=1024, batch_size=64)
found.batch(0)
before = resident()
for step in range(found.sequences_per_epoch // 64):
    assert not found.batch(step).ids.any()
print(resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2**23
