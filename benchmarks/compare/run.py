"""The same weights in every engine that is installed: who is the fastest, and by how much?

    python benchmarks/compare.py --size 124M --threads 2

Each engine (`engines/`) runs in a process of its own, so that their pools of threads are not in
each other's way, and waits on a pipe while another is measured. They take turns, workload by
workload and round by round; the first round is thrown away. Before that each has to show that it
computes the model: its logits are compared with those of a plain NumPy loop, or its tokens if it
tells no logits. Prints one table, the
goals of gptx and whether they are met, and one JSON line. An engine that is not installed is left
out, with a line on standard error that says how to get it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.compare.child import Child, LeftOut
from benchmarks.compare.peers import PRECISIONS, READING, REFERENCE, TABLE
from benchmarks.compare.report import Run, goals_of, goals_table, results_table
from benchmarks.cpu import cpu_name
from gptx.config import SIZES, GPT2Config
from gptx.random_weights import random_weights
from tests.support.random_models import random_ids, write_model

# Largest error of the logits: root mean square, relative to that of the reference's. llama.cpp
# keeps keys and values in float16 at any precision; with 4 bits it is another model, nearly.
LIMITS = {"float32": 0.002, "16 bits": 0.03, "int8": 0.05, "int4": 0.4}

# What has to be as in OpenAI's models.
SETTINGS = (
    "activation_function",
    "layer_norm_epsilon",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "tie_word_embeddings",
    "quantization",
)


@dataclass(frozen=True)
class Workload:
    """What is timed.

    Attributes
    ----------
    part
        "first": from the prompts to the first token of each. "step": from each token to the next,
        the mean over `n_tokens` - 1 steps. "process": a new process, from its start to its end.
    n_counted
        Tokens that are read or made in that time; 0 where it is more than that.
    known
        The prompt is the same in each round, and need not be read again.
    times
        How often in a turn; of several the median without the first, which wakes the threads.
    """

    title: str
    part: str
    n_prompt: int
    n_tokens: int
    n_counted: int
    n_prompts: int = 1
    known: bool = False
    times: int = 1

    def prompts(self, config: GPT2Config, seed: int) -> list[list[int]]:
        """Random ids, by default others in each round."""
        return letters(config, self.n_prompts, self.n_prompt, 0 if self.known else seed)

    def seconds(self, child: Child, config: GPT2Config, seed: int) -> float:
        """Measure it."""
        prompts = self.prompts(config, seed)
        if self.part == "process":
            return child.whole_process(prompts[0], self.n_tokens)
        answer = child.ask(
            "time", prompts=prompts, n_tokens=self.n_tokens, known=self.known, times=self.times
        )
        values = answer[self.part]
        return float(np.median(values[1:] or values))


WORKLOADS = {
    "decode": Workload("decode from 20 to 84", "step", 20, 65, 1),
    "deep": Workload("decode at 1,000", "step", 985, 33, 1, known=True),
    "prefill19": Workload("prefill of 19", "first", 19, 1, 19, times=6),
    "prefill512": Workload("prefill of 512", "first", 512, 1, 512, times=2),
    "batch": Workload("decode 8 sequences", "step", 20, 33, 8, n_prompts=8),
    "process": Workload("whole process, 19 + 20", "process", 19, 20, 0),
}


def letters(config: GPT2Config, n: int, length: int, seed: int) -> list[list[int]]:
    """Random prompts of tokens that are single letters: GPT-2's first 94. So a program that begins
    with a text can be given them, too."""
    ids = random_ids(config, n, length, seed) % min(94, config.vocab_size)
    return [[int(i) for i in row] for row in ids]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="124M", choices=tuple(SIZES), help="of random weights")
    parser.add_argument("--model", type=Path, help="a folder with a model, instead")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pause", type=float, default=0.3, help="seconds before each measurement")
    parser.add_argument("--workloads", nargs="+", choices=tuple(WORKLOADS), default=[*WORKLOADS])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=[*PRECISIONS])
    parser.add_argument("--engines", nargs="+", help="those whose names begin so (default: all)")
    parser.add_argument(
        "--apart", action="store_true", help="one precision after the other: less memory"
    )
    parser.add_argument("--work", type=Path, help="keep converted models here, for the next run")
    args = parser.parse_args()
    names = [
        name
        for name, row in TABLE.items()
        if row.precision in args.precisions
        and not set(args.workloads) <= set(row.skips)
        and (not args.engines or name.lower().startswith(tuple(map(str.lower, args.engines))))
    ]
    if not names:
        parser.error(f"--engines {' '.join(args.engines)}: there are {', '.join(TABLE)}")
    with ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder, work = place(args.model, args.size, work)
        run = compare(folder, work, names, args)
    if run.about["busy_pauses"] > run.about["pauses"] / 50:
        print(
            f"in {run.about['busy_pauses']} of {run.about['pauses']} pauses something else was at "
            "work: run it again on a quiet machine",
            file=sys.stderr,
        )
    print(results_table(run, {key: WORKLOADS[key] for key in args.workloads}))
    print()
    print(goals_table(goals_of(run)))
    print()
    print(json.dumps(run.to_dict()))


def place(model: Path | None, size: str, work: Path) -> tuple[Path, Path]:
    """The model's folder (random weights are written once) and the one for its conversions."""
    if model is not None:
        work = work / f"{model.resolve().name}-converted"
        work.mkdir(parents=True, exist_ok=True)
        return model, work
    folder, work = work / size, work / f"{size}-converted"
    work.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.json").exists():
        config = GPT2Config.of_size(size)
        half = write_model(folder.with_suffix(".part"), config, random_weights(config))
        half.rename(folder)
    return folder, work


def compare(folder: Path, work: Path, names: list[str], args: argparse.Namespace) -> Run:
    """Run all engines that can be had."""
    config = GPT2Config.from_file(folder / "config.json")
    for setting in SETTINGS:
        if getattr(config, setting) != getattr(GPT2Config, setting):
            sys.exit(f"{setting} is {getattr(config, setting)!r}, which not all engines can do")
    run = Run(
        {
            "model": folder.name,
            "size": size_of(config),
            "threads": args.threads,
            "cpu": cpu_name(),
            "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d"),
            "pauses": 0,
            "busy_pauses": 0,
        }
    )
    groups = [[n for n in names if TABLE[n].precision == p] for p in args.precisions]
    with ExitStack() as stack:
        reference = sample(started(REFERENCE, folder, args.threads, work, stack), config)
    for group in groups if args.apart else [names]:
        with ExitStack() as stack:
            children = {}
            for name in [READING, *group]:
                try:
                    child = started(name, folder, args.threads, work, stack)
                    if name != READING:
                        check(run, name, sample(child, config), reference)
                    run.engines[name] = child.about
                    children[name] = child
                except LeftOut as error:
                    print(error, file=sys.stderr)
            measure(run, children, config, args)
    return run


def size_of(config: GPT2Config) -> str | None:
    """Which of OpenAI's sizes it is, whatever its vocabulary."""
    shape = (config.n_layer, config.n_head, config.n_embd)
    return next((size for size, row in SIZES.items() if row == shape), None)


def started(name: str, folder: Path, threads: int, work: Path, stack: ExitStack) -> Child:
    """An engine that ends with the stack."""
    child = Child(name, folder, threads, work)
    stack.callback(child.close)
    return child


def sample(child: Child, config: GPT2Config) -> dict[str, Any]:
    """What an engine computes for one prompt."""
    (ids,) = letters(config, 1, 64, seed=1)
    answer: dict[str, Any] = child.ask("sample", ids=ids, n_tokens=16)
    return answer


def check(run: Run, name: str, ours: dict[str, Any], reference: dict[str, Any]) -> None:
    """Note how far an engine is from the reference; raise LeftOut if it is another model."""
    tokens = reference["tokens"]
    if len(ours["tokens"]) != len(tokens):
        raise LeftOut(f"{name} is left out: {len(ours['tokens'])} tokens came, not {len(tokens)}")
    pairs = zip(ours["tokens"], tokens, strict=True)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(tokens))
    run.agreement[name] = {"same_tokens": same}
    if ours["logits"] is None:
        if same < len(tokens):
            raise LeftOut(f"{name} is left out: its token {same} is another one")
        return
    expected = np.array(reference["logits"])
    error = float(np.linalg.norm(ours["logits"] - expected) / np.linalg.norm(expected))
    run.agreement[name]["logits_error"] = round(error, 6)
    if not error <= LIMITS[TABLE[name].precision]:
        raise LeftOut(f"{name} is left out: its logits are off by {error:.1%}")


def measure(
    run: Run, children: dict[str, Child], config: GPT2Config, args: argparse.Namespace
) -> None:
    """Time every workload, in turns; an engine that fails is dropped."""

    def note(turn: int, workload: str, name: str, seconds: float) -> None:
        if turn:  # the first is for the caches
            run.seconds.setdefault(workload, {}).setdefault(name, []).append(seconds)

    for turn in range(args.rounds + 1):
        print(f"round {turn} of {args.rounds}", file=sys.stderr)
        for key in args.workloads:
            for name, child in list(children.items()):
                run.about["pauses"] += 1
                run.about["busy_pauses"] += rest(args.pause)
                try:
                    if name == READING:
                        note(turn, READING, READING, child.ask("read"))
                    elif key not in TABLE[name].skips:
                        note(turn, key, name, WORKLOADS[key].seconds(child, config, turn))
                except LeftOut as error:
                    print(error, file=sys.stderr)
                    del children[name]


def rest(seconds: float) -> bool:
    """Wait until the threads of the engine before have stopped spinning; True if others work then.

    Then the machine is not quiet, and the figures are worth little: at the barriers of two threads
    that spin, a third one costs more than its share.
    """
    time.sleep(seconds * 2 / 3)
    before = worked()
    time.sleep(seconds / 3)
    return worked() - before > 0.2 * seconds / 3


def worked() -> float:
    """Seconds that all cores have worked since the start of the system, where it tells."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    user, nice, system = map(int, fields[:3])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
