"""Train the embedded model again from tiny Shakespeare, and measure its validation loss.

    python -m benchmarks.train_shakespeare tinyshakespeare.txt -o shakespeare

It takes about half an hour on 2 cores. Further options are those of `gptx train`, such as
`--threads 4`. The validation loss is that of gptx/embedded/shakespeare/README.md: over the last
tenth of the characters, in windows of 256 tokens without overlap.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import gptx
from benchmarks.goals import Goal, goals_table
from gptx.process import environment

MAX_LOSS = 3.43  # of a token; the embedded model has 3.4168
SETTINGS = (
    "--tokenizer shakespeare --validation 0.1 --n-layer 6 --n-head 6 --n-embd 192 --context 256 "
    "--steps 2600 --batch-size 16 --weight-decay 0.1 --dropout 0.15 "
    "--schedule cosine --warmup 100 --learning-rate 2e-3 --final-fraction 0.05"
)


def train(text: Path, output: Path, options: Sequence[str]) -> float:
    """Run `gptx train`; return the seconds it took. It ends this process if it fails."""
    command = ["train", str(text), *shlex.split(SETTINGS), "--output", str(output), *options]
    print("gptx", shlex.join(command), file=sys.stderr)
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "gptx", *command], env=environment(), check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return time.perf_counter() - start


def validation_loss(model: Path, text: str) -> tuple[float, float]:
    """Return the loss of a token in nats, and bits per character, over the last tenth of a text."""
    held_out = text[int(0.9 * len(text)) :]
    score = gptx.load(model).score(held_out)
    return score.loss, score.loss * score.n_scored / math.log(2) / len(held_out)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, measure, and print the goal and a line of JSON; return 1 if the goal is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_shakespeare",
        description=__doc__.partition("\n")[0],
        epilog="Further options are those of `gptx train`.",
    )
    parser.add_argument("text", type=Path, help="tinyshakespeare.txt, 1,115,394 bytes")
    parser.add_argument("-o", "--output", type=Path, default=Path("shakespeare"))
    args, options = parser.parse_known_args(arguments)
    seconds = train(args.text, args.output, options)
    loss, bits = validation_loss(args.output, args.text.read_bytes().decode())
    goal = Goal("validation loss of a token", "≤", MAX_LOSS, loss)
    print(goals_table([goal]))
    print()
    facts = {"seconds": seconds, "loss": loss, "bits_per_character": bits, "options": options}
    print(json.dumps(facts))
    return 0 if goal.verdict == "met" else 1


if __name__ == "__main__":
    sys.exit(main())
