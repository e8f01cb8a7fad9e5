"""`gptx train`: training from scratch, or from a model."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, get_args

import click

from gptx.backends import TABLE
from gptx.backends.backward import RECOMPUTE
from gptx.cli.options import Sections, complete_model, offline_option
from gptx.config import SIZES
from gptx.errors import ParameterError, argument
from gptx.training.callbacks import Callback
from gptx.training.optimizers import OptimizerName
from gptx.training.reports.progress import Progress, duration
from gptx.training.schedule import Schedule
from gptx.training.settings import TrainingSettings

if TYPE_CHECKING:
    from gptx.training.trainer import TrainingResult

DEFAULT = TrainingSettings()
DTYPES = ("float32", "float64", "float16", "bfloat16")
UPDATES_OF_A_STEP = 100  # in gpt-burn
# gpt-burn's names of options.
SYNONYMS = {
    "context-length": "context",
    "d-model": "n-embd",
    "n-layers": "n-layer",
    "n-heads": "n-head",
    "output-path": "output",
}


class _Command(Sections):
    """A command that also takes the short options of gpt-burn whose letters have other meanings."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(_translate(args)))


def _translate(args: Sequence[str]) -> Iterator[str]:
    """Yield the arguments with long names for `-h N`, `-b N` and `-t FILE`.

    The value tells them apart: help has none, a backend is no number, and threads are one.
    """
    for flag, value in pairwise([*args, ""]):
        is_number = value.isdecimal()
        is_path = not is_number and value[:1] not in ("", "-")
        yield {
            ("-h", True, False): "--n-head",
            ("-b", True, False): "--batch-size",
            ("-t", False, True): "--text-corpus",
        }.get((flag, is_number, is_path), flag)


class _Validation(click.ParamType):  # type: ignore[type-arg]  # click before 8.4 has no argument
    """A fraction, or a file."""

    name = "validation"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float | str:
        try:
            return float(value)
        except ValueError:
            return str(value)


def _option(*names: str, default: Any = "", **more: Any) -> Callable[[Any], Any]:
    """Return an option that is None if it is not given; the default is a part of its help."""
    if default != "":
        more["help"] += f"  [default: {default}]"
    return click.option(*names, **more)


@click.command(
    cls=_Command,
    context_settings={
        "token_normalize_func": lambda name: SYNONYMS.get(name, name),
        "help_option_names": ["-h", "--help"],  # click keeps those of its first context
    },
    sections={
        "Data": "tokenizer",
        "Model": "init",
        "Optimization": "steps",
        "Evaluation": "eval_every",
        "Computation": "backend",
        "As in gpt-burn": "n_steps",
        "Output": "output",
    },
)
@click.argument("data", nargs=-1, type=click.Path())
@_option(
    "--tokenizer",
    metavar="NAME",
    shell_complete=complete_model,
    help="characters, vowels, gpt2, or a folder or model that has one.",
    default="that of --init or of the token files; else characters",
)
@_option(
    "--validation",
    type=_Validation(),
    metavar="X",
    help="Fraction of the text for validation, at its end; or a file.",
    default=0.1,
)
@_option(
    "--init",
    metavar="MODEL",
    shell_complete=complete_model,
    help="Start from the weights of a model: gpt2, shakespeare, a Hub id, a file or a folder.",
)
@_option(
    "--optimizer-state",
    metavar="FILE",
    type=click.Path(),
    help="Continue with llm.c's optimizer state, which belongs to the model of --init.",
)
@_option(
    "--resume",
    metavar="FOLDER",
    type=click.Path(),
    help="Continue the run in this folder, with its data and settings.",
)
@_option(
    "--size",
    metavar="NAME",
    type=click.Choice(tuple(SIZES)),
    help=f"Start from scratch, with the size of a GPT-2: {', '.join(SIZES)}.",
)
@offline_option
@_option("-l", "--n-layer", type=int, metavar="N", help="Layers.", default=4)
@_option("--n-head", type=int, metavar="N", help="Heads of a layer.", default=4)
@_option("-d", "--n-embd", type=int, metavar="N", help="Width.", default=128)
@_option(
    "-c",
    "--context",
    type=int,
    metavar="N",
    help="Tokens of a sequence.",
    default="64; 1024 with --size; up to 256 with --init",
)
@_option("--steps", type=int, metavar="N", help="Updates of the weights.", default=DEFAULT.steps)
@_option(
    "--batch-size",
    type=int,
    metavar="N",
    help="Sequences of a pass.",
    default=f"{DEFAULT.batch_size}; 4 with --size or --init",
)
@_option(
    "--accumulate",
    type=int,
    metavar="N",
    help="Passes of a step: it has N times as many sequences in the memory of one pass.",
    default=DEFAULT.accumulate,
)
@_option(
    "--optimizer",
    metavar="NAME",
    type=click.Choice(get_args(OptimizerName)),
    help=f"{' or '.join(get_args(OptimizerName))}.",
    default=DEFAULT.optimizer,
)
@_option(
    "-r",
    "--learning-rate",
    type=float,
    metavar="X",
    help="Learning rate after the warm-up.",
    default="1e-3; 6e-4 with --size; 1e-4 with --init",
)
@_option(
    "--schedule",
    metavar="NAME",
    type=click.Choice(get_args(Schedule)),
    help="Learning rate after the warm-up: cosine or linear (falls), constant, or wsd (falls in "
    "the last fifth).",
    default=DEFAULT.schedule,
)
@_option(
    "--warmup",
    type=int,
    metavar="N",
    help="Steps in which the learning rate rises.",
    default=f"{DEFAULT.warmup}, at most a tenth of the steps",
)
@_option(
    "--final-fraction",
    type=float,
    metavar="X",
    help="Learning rate at the end, as a fraction of the largest one.",
    default=DEFAULT.final_fraction,
)
@_option(
    "--weight-decay",
    type=float,
    metavar="X",
    help="Decay of the matrices.",
    default=DEFAULT.weight_decay,
)
@_option("--beta1", type=float, metavar="X", help="Of adamw.", default=DEFAULT.beta1)
@_option("--beta2", type=float, metavar="X", help="Of adamw.", default=DEFAULT.beta2)
@_option("--eps", type=float, metavar="X", help="Of adamw.", default="1e-8")
@_option("--momentum", type=float, metavar="X", help="Of sgd.", default=DEFAULT.momentum)
@_option(
    "--clip",
    type=float,
    metavar="X",
    help="Largest norm of the gradients; 0 is off.",
    default=DEFAULT.clip,
)
@_option(
    "--dropout",
    type=float,
    metavar="X",
    help="Probability of dropout, against overfitting.",
    default=DEFAULT.dropout,
)
@_option(
    "--skip-z",
    type=float,
    metavar="X",
    help="Skip an update whose loss or norm is X standard deviations above the recent mean.",
)
@_option(
    "--trainable",
    multiple=True,
    metavar="NAME",
    help="Train the weights of this name only, such as 'h.11.*' (repeatable).",
)
@_option(
    "-s",
    "--seed",
    type=int,
    metavar="N",
    help="Seed of the first weights, the order of the data, and dropout.",
    default=DEFAULT.seed,
)
@_option(
    "--eval-every",
    type=int,
    metavar="N",
    help="Steps between two evaluations, which also save.",
    default=DEFAULT.eval_every,
)
@_option(
    "--eval-batches",
    type=int,
    metavar="N",
    help="Batches of an evaluation.",
    default="all",
)
@_option(
    "--patience",
    type=int,
    metavar="N",
    help="Stop after N evaluations without a new best.",
)
@_option(
    "--sample-every",
    type=int,
    metavar="N",
    help="Steps between two texts that the model generates; 0 is off.",
    default="a quarter of the steps",
)
@_option("--prompt", metavar="TEXT", help="Beginning of these texts.")
@click.option(
    "-b",
    "--backend",
    metavar="NAME",
    type=click.Choice(tuple(TABLE)),
    help=f"Array library: {', '.join(TABLE)} (see gptx backends).  [default: numpy, or that of "
    "the run to resume]",
)
@_option(
    "--dtype",
    metavar="NAME",
    type=click.Choice(DTYPES),
    help="Type to compute in: float32, float64 (numpy, cupy), float16 or bfloat16 (cupy, mlx).",
    default="float32",
)
@_option(
    "-t",
    "--threads",
    type=int,
    metavar="N",
    help="CPU threads of the numpy backend.",
    default="one for each core",
)
@_option(
    "--recompute",
    metavar="NAME",
    type=click.Choice(RECOMPUTE),
    help="Compute values again to save memory: none, cheap (norms, activations), or block.",
    default=DEFAULT.recompute,
)
@click.option(
    "-n",
    "--n-steps",
    type=int,
    metavar="N",
    help=f"{UPDATES_OF_A_STEP} times N as --steps.",
)
@click.option("--text-corpus", type=click.Path(), metavar="FILE", help="Another way to give DATA.")
@click.option(
    "-m",
    "--n-mega-bytes",
    "max_bytes",
    type=int,
    metavar="N",
    help="Read the first N MiB of the text only.",
)
@click.option(
    "-o",
    "--output",
    metavar="FOLDER",
    type=click.Path(),
    help="Folder of the model, its log and its last checkpoint.  [default: model]",
)
@_option(
    "--save-every",
    type=int,
    metavar="N",
    help="Steps between two checkpoints.",
    default="at each evaluation",
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier run in the folder.")
@click.option("-x", "--no-save", is_flag=True, help="Save nothing.")
@_option(
    "--log-every",
    type=int,
    metavar="N",
    help="Steps between two lines of progress, if standard error is no terminal.",
    default="a hundredth of the steps",
)
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
def train(
    *,
    data: tuple[str, ...],
    text_corpus: str | None,
    resume: str | None,
    output: str | None,
    no_save: bool,
    n_steps: int | None,
    max_bytes: int | None,
    sample_every: int | None,
    prompt: str | None,
    log_every: int | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Train a GPT-2 on text, from scratch or from a model.

    DATA is text in UTF-8: files, a .jsonl file ("text", or "prompt" and "completion"), or a folder
    of token files (gptx prepare, nanoGPT, llm.c). The default is a small model of characters, which
    two cores train in a few minutes.

    The folder of the output is the model with the lowest validation loss, for gptx generate. It
    also has log.jsonl, loss.png (with matplotlib), and last, from which --resume continues. Ctrl-C
    saves.

    gpt-burn's options work too: --context-length, --d-model, --n-layers, --n-heads, --output-path;
    -h, -b and -t mean its --n-heads, --batch-size and --text-corpus if a number or a file follows.

    \b
    Examples:
      gptx train corpus.txt -o model
      gptx train corpus.txt --init gpt2 --steps 200 -o tuned
      gptx train --resume model
      gptx train tokens --size 124M -b mlx --dtype bfloat16
    """
    # Imported here: `gptx train --help` starts faster without.
    from gptx.training.api import train as train_model
    from gptx.training.reports.samples import Samples

    if text_corpus is not None:
        data = (*data, text_corpus)
    if not data and resume is None:
        raise click.UsageError("missing DATA: give a text file, or --resume FOLDER")
    if resume is not None and (no_save or output not in (None, resume)):
        raise click.UsageError("--resume FOLDER saves in that folder: leave out -o and --no-save")
    if n_steps is not None:
        if options["steps"] is not None:
            raise click.UsageError("--n-steps and --steps contradict each other: give one of them")
        options["steps"] = UPDATES_OF_A_STEP * n_steps
        _note(
            f"--n-steps {n_steps} is --steps {options['steps']}: a step of gpt-burn has "
            f"{UPDATES_OF_A_STEP} updates"
        )
    for name, number, least in (
        ("max_bytes", max_bytes, 1),
        ("log_every", log_every, 1),
        ("sample_every", sample_every, 0),
    ):
        if number is not None and number < least:
            raise ParameterError(f"{argument(name)} is {number}, expected at least {least}")
    if max_bytes is not None:
        options["max_bytes"] = max_bytes << 20
    given = {name: x for name, x in options.items() if x is not None and x != ()}
    if given.get("clip") == 0:
        given["clip"] = None
    run = _Run()
    callbacks: list[Callback] = [run]
    if not quiet:
        progress = Progress(sys.stderr, every=log_every)
        samples = Samples(progress.sample, every=sample_every, prompt=prompt)
        callbacks += [progress, samples]
    folder = output if resume is None else resume
    with run.explained():
        result = train_model(
            list(data) or None,
            output=None if no_save else "model" if folder is None else folder,
            resume=resume is not None,
            callbacks=callbacks,
            **given,
        )
    if not quiet:
        run.summarize(result)


class _Run(Callback):
    """The run as the command line explains it at its end."""

    def __init__(self) -> None:
        self._trainer: Any = None
        self._start = time.monotonic()

    def on_start(self, trainer: Any) -> None:
        self._trainer, self._start = trainer, time.monotonic()

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Say how an interrupted run is continued."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            step = None if self._trainer is None else self._trainer.saved_step
            if step is not None:
                folder = self._trainer.output
                _note(
                    f"step {step:,} is in {folder / 'last'}: continue with "
                    f"gptx train --resume {shlex.quote(str(folder))}"
                )
            raise

    def summarize(self, result: TrainingResult) -> None:
        """Print the result, and the command that uses it."""
        seconds = duration(time.monotonic() - self._start)
        text = f"{result.step:,} steps in {seconds}"
        if result.best_loss is not None:
            text += f", best validation loss {result.best_loss:.4f} at step {result.best_step:,}"
        if result.reason == "patience":
            text += " (stopped early: no better one since)"
        if result.skipped:
            text += f", updates skipped: {result.skipped:,}"
        click.echo(text, err=True)
        if result.folder is not None:
            name = shlex.quote(str(result.folder))
            click.echo(f"{result.folder}: gptx generate -m {name} --temperature 0.8", err=True)


def _note(text: str) -> None:
    click.echo(f"Note: {text}", err=True)
