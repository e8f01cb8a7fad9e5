"""The trainer: a step is a batch, the gradients of its passes, their norm, and an update."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from gptx.backends import Backend, get_backend
from gptx.backends.backward import Batch, loss_function
from gptx.config import GPT2Config
from gptx.errors import (
    GptxError,
    Interrupted,
    NonFiniteError,
    ParameterError,
    argument,
)
from gptx.generation.found_model import FoundModel, find_model
from gptx.generation.model_info import ModelInfo
from gptx.generation.text_model import Model
from gptx.model import forward
from gptx.model_files import CONFIG, ModelFiles
from gptx.tokenization.pipeline import PipelineTokenizer
from gptx.tokenization.protocol import Tokenizer
from gptx.training import checkpoint, llm_c_state, optimizers
from gptx.training.callbacks import Callback, EvaluationRecord, Skipped, StepRecord
from gptx.training.data.windows import TrainingData
from gptx.training.deferral import deferred_signals
from gptx.training.initialization import initial_weights
from gptx.training.loss_scale import LossScale
from gptx.training.parameters import Parameters
from gptx.training.schedule import learning_rate
from gptx.training.settings import CHANGEABLE, TrainingSettings
from gptx.training.state import TrainingState, appended, z_score

Array = Any

MAX_FAILURES = 10  # steps in a row without finite gradients


@dataclass(frozen=True)
class TrainingResult:
    """The end of a run.

    Attributes
    ----------
    step
        Number of steps.
    loss
        Loss of the last step; None without steps.
    validation_loss
        Loss of the last evaluation; None without a validation split.
    best_loss, best_step
        The lowest validation loss, and its step.
    skipped
        Number of steps that did not change the weights.
    reason
        "steps": all steps are done; "patience": no new best loss.
    folder
        Folder of the best weights; None if nothing was saved.
    """

    step: int
    loss: float | None
    validation_loss: float | None
    best_loss: float | None
    best_step: int | None
    skipped: int
    reason: str
    folder: Path | None


class Trainer:
    """A run: model, data, optimizer and state.

    Parameters
    ----------
    model
        A config, to train from scratch; or a model to continue from: everything that `gptx.load`
        takes, or the result of `gptx.generation.found_model.find_model`. A resumed run has the
        model of its checkpoint.
    data
        See `gptx.training.data.windows.TrainingData`.
    settings
        See `TrainingSettings`.
    output
        Folder of the run; None saves nothing.
    backend
        A `Backend`, or the name of one. Its dtype is that of the activations; in 16 bits, weights
        and optimizer are float32.
    callbacks
        See `gptx.training.callbacks`.
    optimizer_state
        Optimizer state of llm.c, to continue a run of it: moments and number of steps. With it,
        `model` is the model file of the same step.
    source
        Arguments with which `gptx.train` opened the data, for a resumed run.
    resume
        Continue the run in `output`.
    overwrite
        Replace the run in `output`.

    Attributes
    ----------
    config, settings, backend, data
        Parts of the run.
    tokenizer : Tokenizer or None
        Tokenizer of the model, or else of the data, which is saved with the model.
    output : Path or None
        Folder of the run.
    state : TrainingState
        State after the last step.
    parameters : Parameters
        Weights, and arrays of the optimizer, on the backend.

    Raises
    ------
    ParameterError
        The settings differ from those of the run to resume; the output folder is that of another
        run or has other files; or the model is quantized.
    StorageError
        The output folder cannot be written.
    NotFoundError, DataError
        There is no run to resume, or it is damaged.
    """

    def __init__(
        self,
        model: GPT2Config | FoundModel | str | os.PathLike[str],
        data: TrainingData,
        settings: TrainingSettings | None = None,
        *,
        output: str | os.PathLike[str] | None = None,
        backend: str | Any = "numpy",
        callbacks: Iterable[Callback] = (),
        optimizer_state: str | os.PathLike[str] | None = None,
        source: Mapping[str, Any] | None = None,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.settings = settings or TrainingSettings()
        self.data = data
        self.source = dict(source or {})
        self.callbacks = list(callbacks)
        self.backend = get_backend(backend)
        self.output = None if output is None else Path(output).expanduser()
        self.state = TrainingState(scale=LossScale.of(self.backend.dtype))
        self.reason = ""
        self._saved_state: TrainingState | None = None  # of the last checkpoint
        if optimizer_state is not None and resume:
            raise ParameterError(
                f"{argument('resume')} has an optimizer state of its own: leave out "
                f"{argument('optimizer_state')}"
            )
        if self.output is not None:
            checkpoint.check_output(self.output, resume=resume, overwrite=overwrite)
        elif resume:
            raise ParameterError(f"{argument('resume')} needs {argument('output')}, the folder")
        stored = checkpoint.read_last(self.output) if self.output and resume else None
        if stored:
            self.config, found = stored.config, stored.tokenizer
            self.source = self.source or dict(stored.source)
            self._compare(stored)
            first: Iterable[tuple[str, Any]] = stored.weights()
        else:
            self.config, found, first = _first_weights(model, self.settings.seed)
        self.tokenizer: Tokenizer | None = found or data.tokenizer
        data.check(self.config, self.tokenizer)
        self.parameters = Parameters(
            self.config, self.settings, self.backend, first, stored.moments() if stored else None
        )
        if optimizer_state is not None:
            n_steps = llm_c_state.read(self.parameters, optimizer_state)
            if n_steps >= self.settings.steps:
                raise ParameterError(
                    f"{optimizer_state} is the state after {n_steps} steps, expected more "
                    f"{argument('steps')} than that, not {self.settings.steps}"
                )
            self.state = replace(self.state, step=n_steps, updates=n_steps)
        self._loss_function = loss_function(
            forward,
            self.parameters.transformer(),
            trainable=self.parameters.trainable,
            recompute=self.settings.recompute,
            dropout=self.settings.dropout_places,
        )
        if self.output is not None:  # no error can come any more, and the weights have been read
            checkpoint.remove_leftovers(self.output, overwrite=overwrite)
        if stored:
            self._publish_best()

    # The loop

    def run(self) -> TrainingResult:
        """Train to the last step, or until the validation loss has no new best.

        Raises
        ------
        Interrupted
            Ctrl-C; the state after the last whole step is saved.
        NonFiniteError
            The gradients of ten steps in a row were not finite. The last good checkpoint stays.
        StorageError
            A checkpoint cannot be written. The older one stays.
        """
        self._call("on_start", self)
        try:
            result = self._run_steps()
        except BaseException:
            with suppress(GptxError):  # the first error is the one to report
                self._call("on_end", self)
            raise
        self._call("on_end", self)
        return result

    def _run_steps(self) -> TrainingResult:
        try:
            while True:
                self._evaluate_and_save()
                if self._is_finished():
                    self.save()
                    return self._result()
                self.step()
        except (KeyboardInterrupt, SystemExit) as error:
            self.save()
            if isinstance(error, KeyboardInterrupt):
                raise Interrupted from None
            raise

    def _is_finished(self) -> bool:
        patience = self.settings.patience
        if self.state.step >= self.settings.steps:
            self.reason = "steps"
        elif patience is not None and self.state.evaluations_since_best >= patience:
            self.reason = "patience"
        return bool(self.reason)

    def _evaluate_and_save(self) -> None:
        """Evaluate and write a checkpoint if it is time for that."""
        step, settings = self.state.step, self.settings
        is_time = step % settings.eval_every == 0 or step == settings.steps
        if is_time and self.state.evaluated_step != step:
            self.evaluate()
        every = settings.save_every or settings.eval_every
        if step % every == 0 or self.state.best_step == step:
            self.save()

    def step(self) -> StepRecord:
        """Run one step: update the weights, or skip the step if its gradients are no use."""
        started = time.perf_counter()
        state, settings, ops = self.state, self.settings, self.backend
        batch = self.data.batch(state.step)
        scale = state.scale
        with ops.scope():
            loss, grads = self._gradients(batch, scale.value)
            norm = math.sqrt(_float(ops, optimizers.function(ops, "squared_norm")(grads)))
            loss, norm = _float(ops, loss) / scale.value, norm / scale.value
            skipped = self._reason_to_skip(loss, norm)
            lr = learning_rate(settings, state.step)
            with deferred_signals():  # the update may change the arrays in place
                if skipped is None:
                    self.parameters.update(
                        grads,
                        lr=lr,
                        grad_scale=self._clip_factor(norm) / scale.value,
                        number=state.updates + 1,
                    )
                self.state = self._next_state(loss, norm, skipped)
        record = StepRecord(
            step=self.state.step,
            loss=loss,
            norm=norm,
            learning_rate=lr,
            tokens=round(batch.n_tokens),
            seconds=time.perf_counter() - started,
            skipped=skipped,
            loss_scale=scale.value if scale.is_dynamic else None,
        )
        self._call("on_step", record)
        if self.state.failures >= MAX_FAILURES:
            raise self._non_finite_error()
        return record

    def _gradients(self, batch: Batch, loss_scale: float) -> tuple[Array, list[Array]]:
        """Return the loss and the gradients of a step: the sums of those of its passes.

        Each pass divides by the tokens of the whole step, so the sums do not depend on the split.
        """
        n, n_tokens = self.settings.batch_size, max(1.0, batch.n_tokens)  # all may be masked
        loss, total = None, []
        for first in range(0, len(batch.ids), n):
            part_loss, part = self._loss_function.gradients(
                self.parameters.computed,
                batch.sequences(first, first + n),
                scale=loss_scale / n_tokens,
                step=self.state.step,
                first_sequence=first,
            )
            grads = [part[name] for name in self.parameters.trainable]
            if len(batch.ids) > n and self.backend.float_dtype != self.parameters.dtype:
                # A sum in 16 bits loses too much precision.
                grads = [self.backend.xp.astype(g, self.parameters.dtype) for g in grads]
            if first == 0:
                loss, total = part_loss, grads
                continue
            loss = loss + part_loss
            for i, g in enumerate(grads):
                total[i] += g
        return loss, total

    def _reason_to_skip(self, loss: float, norm: float) -> Skipped | None:
        state, limit = self.state, self.settings.skip_z
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return "loss scale" if state.scale.can_fall else "non-finite"
        if limit is not None and (
            z_score(state.losses, loss) > limit or z_score(state.norms, norm) > limit
        ):
            return "z-score"
        return None

    def _clip_factor(self, norm: float) -> float:
        clip = self.settings.clip
        return clip / norm if clip is not None and norm > clip else 1.0

    def _next_state(self, loss: float, norm: float, skipped: Skipped | None) -> TrainingState:
        state = self.state
        is_finite = math.isfinite(loss) and math.isfinite(norm)
        return replace(
            state,
            step=state.step + 1,
            updates=state.updates + (skipped is None),
            skipped=state.skipped + (skipped is not None),
            failures=0 if is_finite else state.failures + (skipped == "non-finite"),
            loss=loss if math.isfinite(loss) else state.loss,
            losses=appended(state.losses, loss),
            norms=appended(state.norms, norm),
            scale=state.scale.after_step(is_finite=is_finite),
        )

    def _non_finite_error(self) -> NonFiniteError:
        advice = f"lower {argument('learning_rate')} or {argument('clip')}"
        kept = ""
        if self.output and self.saved_step is not None:
            kept = f"; {self.output / checkpoint.LAST} has step {self.saved_step}"
        return NonFiniteError(
            f"the loss or a gradient was NaN or infinite in {MAX_FAILURES} steps in a row, up to "
            f"step {self.state.step}{kept}: {advice}"
        )

    @property
    def saved_step(self) -> int | None:
        """Step of the last checkpoint; None without one."""
        return self._saved_state.step if self._saved_state else None

    # Evaluation

    def evaluate(self) -> EvaluationRecord | None:
        """Compute the loss on the validation split, without dropout; None without a split."""
        started = time.perf_counter()
        total = tokens = 0.0
        with self.backend.scope():
            for batch in self.data.validation_batches(self.settings.eval_batches):
                n = max(1.0, batch.n_tokens)
                loss = self._loss_function.loss(self.parameters.computed, batch, scale=1 / n)
                total += n * _float(self.backend, loss)
                tokens += batch.n_tokens
        state = replace(self.state, evaluated_step=self.state.step)
        if not tokens:
            self.state = state
            return None
        loss = total / tokens
        is_best = math.isfinite(loss) and (state.best_loss is None or loss < state.best_loss)
        if is_best:
            state = replace(state, best_loss=loss, best_step=state.step, evaluations_since_best=0)
        else:
            n_worse = state.evaluations_since_best + 1
            state = replace(state, evaluations_since_best=n_worse)
        self.state = replace(state, validation_loss=loss if math.isfinite(loss) else None)
        seconds = time.perf_counter() - started
        record = EvaluationRecord(self.state.step, loss, is_best, seconds)
        self._call("on_evaluation", record)
        return record

    # Checkpoints

    def save(self) -> None:
        """Write the last checkpoint, and make it the best one if it is.

        Without a validation split the last checkpoint is the best one. Nothing is written if the
        run has no output folder, if the step is saved already, or while the loss is not finite:
        the checkpoint stays that of the last good step.

        Raises
        ------
        StorageError
            The disk is full, or the folder cannot be written; the older checkpoint stays.
        """
        if self.output is None:
            return
        state = self.state
        if state == self._saved_state:
            self._publish_best()  # Ctrl-C may have come between the two
            return
        if not self._is_good():
            return
        folder = checkpoint.write_last(
            self.output, self._checkpoint(), self.parameters.host_moments(), self._record()
        )
        self._saved_state = state
        self._publish_best()
        self._call("on_checkpoint", folder)

    def _is_good(self) -> bool:
        """Test for finite weights, and for finite losses since the last update."""
        state, ops = self.state, self.backend
        is_evaluated = state.evaluated_step == state.step and self.data.has_validation
        if state.failures or (is_evaluated and state.validation_loss is None):
            return False
        with ops.scope():
            weights = list(self.parameters.weights.values())
            return math.isfinite(_float(ops, optimizers.function(ops, "squared_norm")(weights)))

    def _publish_best(self) -> None:
        """Make the last checkpoint the best one if it is; after a crash, too."""
        is_best = self.state.best_step == self.state.step or not self.data.has_validation
        if self.output and is_best:
            checkpoint.publish(self.output)

    def _record(self) -> dict[str, Any]:
        return {
            "settings": self.settings.to_dict(),
            "data": self.data.describe(),
            "backend": self.backend.name,
            "dtype": self.backend.dtype,
            "source": self.source,
            "state": self.state.to_dict(),
        }

    def _checkpoint(self) -> Any:
        """Return the model as `gptx.conversions` writes it, with weights in float32."""
        from gptx.conversions.checkpoint import Checkpoint, StoredTensor

        shapes = self.config.tensor_shapes()
        stored = {
            name: StoredTensor(shapes[name], np.dtype(np.float32), read)
            for name, read in self.parameters.host_weights().items()
        }
        tokenizer = cast("PipelineTokenizer | None", self.tokenizer)  # or one that saves itself
        return Checkpoint(self.config, stored, tokenizer)

    def write_llm_c_state(self, path: str | os.PathLike[str]) -> None:
        """Write the optimizer state that llm.c resumes from, beside a model file of this step.

        Raises
        ------
        ParameterError
            The optimizer is not AdamW, or some weights are frozen.
        ConfigError
            llm.c would compute something else.
        StorageError
            The file cannot be written.
        """
        llm_c_state.write(self.parameters, self.state.updates, path)

    def _compare(self, stored: checkpoint.StoredRun) -> None:
        """Take the state of a checkpoint; refuse settings or data that differ from it."""
        old, new = stored.settings.to_dict(), self.settings.to_dict()
        differing = [n for n in new if n not in CHANGEABLE and new[n] != old[n]]
        if self.settings.steps < stored.state.step:
            raise ParameterError(
                f"{argument('steps')} is {self.settings.steps}, and the run in {self.output} has "
                f"{stored.state.step} steps: give more"
            )
        if differing == ["steps"] and self._has_same_rates(stored):
            differing = []
        if differing:
            changes = ", ".join(
                f"{argument(name)} ({old[name]!r}, not {new[name]!r})" for name in differing
            )
            raise ParameterError(
                f"the run in {self.output} has other settings: {changes}; give its settings to "
                f"resume it, or start from its weights with {argument('init', str(stored.folder))}"
            )
        data, given = stored.data, self.data.describe()
        if wrong := sorted(n for n in data.keys() | given.keys() if data.get(n) != given.get(n)):
            raise ParameterError(
                f"the run in {self.output} has other data: {wrong[0]} is {data.get(wrong[0])!r}, "
                f"not {given.get(wrong[0])!r}; give its data to resume it"
            )
        if stored.dtype != self.backend.dtype:
            raise ParameterError(
                f"the run in {self.output} computes in {stored.dtype}, not "
                f"{self.backend.dtype}: give this {argument('dtype')} to resume it"
            )
        self.state = self._saved_state = stored.state

    def _has_same_rates(self, stored: checkpoint.StoredRun) -> bool:
        """Test that another number of steps changes no learning rate of the steps so far."""
        old, new = stored.settings, self.settings
        return all(learning_rate(old, k) == learning_rate(new, k) for k in range(stored.state.step))

    def model(self) -> Model:
        """Return the model with the current weights, for samples; the next step changes them."""
        backend = copy.copy(self.backend)
        backend.compiles = False  # the compiled pass has the weights in another layout
        folder = self.output or Path()
        files = ModelFiles(str(folder), folder, folder / CONFIG, (), {}, None)
        info = ModelInfo(files, self.config, self.tokenizer)
        return Model(self.parameters.transformer(backend), info, f"step {self.state.step}")

    # Events

    def _call(self, event: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(*arguments)

    def _result(self) -> TrainingResult:
        state = self.state
        return TrainingResult(
            state.step,
            state.loss,
            state.validation_loss,
            state.best_loss,
            state.best_step,
            state.skipped,
            self.reason,
            self.output,
        )


def _float(ops: Backend, x: Array) -> float:
    """Wait for a scalar on the device."""
    return float(ops.to_numpy(x))


def _first_weights(
    model: Any, seed: int
) -> tuple[GPT2Config, PipelineTokenizer | None, Iterable[tuple[str, Any]]]:
    """Return the config, the tokenizer and the weights that a run starts from."""
    if isinstance(model, GPT2Config):
        return model, None, initial_weights(model, seed)
    found = model if isinstance(model, FoundModel) else find_model(model)
    opened = found.open()
    if opened.config.quantization is not None:
        raise ParameterError(
            f"{found.info.name} is {opened.config.quantization}, expected float weights to train: "
            "give the model that it was made of"
        )
    tokenizer = found.info.tokenizer if found.info.has_tokenizer else None
    if not isinstance(tokenizer, PipelineTokenizer | None):
        tokenizer = None
    return opened.config, tokenizer, ((n, opened.arrays[n]) for n in opened.config.tensor_shapes())
