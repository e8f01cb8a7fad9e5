"""Run llm.c's test program on a model and a debug state that gptx wrote.

    git clone https://github.com/karpathy/llm.c /tmp/llm.c
    python -m benchmarks.check_llm_c /tmp/llm.c
    python -m benchmarks.check_llm_c /tmp/llm.c --model gpt2 --text tinyshakespeare.txt

It needs a C compiler. llm.c computes logits, loss and all gradients of a batch, and compares them
with those of gptx. The model is a random one of 124M, or `--model`. Then it trains for ten steps.
"overall" compares their losses with those of OpenAI's 124M on the beginning of tiny Shakespeare.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import gptx
from benchmarks.llm_c import build
from gptx.backends import Backend, get_backend
from gptx.backends.backward import Batch, loss_function
from gptx.bench.sources import RANDOM, find_source, random_ids, write_source
from gptx.config import GPT2Config
from gptx.conversions import convert, read
from gptx.conversions.checkpoint import unquantized
from gptx.conversions.formats import llm_c_debug_state
from gptx.conversions.formats.llm_c_debug_state import DebugState
from gptx.kv_cache import KVCache
from gptx.model import Transformer, forward
from gptx.tokenization.protocol import Tokenizer
from gptx.weights import as_tree

B, T = 4, 64


@dataclass(frozen=True)
class Verdict:
    """The judgement of llm.c's program.

    Attributes
    ----------
    logits, loss, overall
        True if llm.c accepts them: the logits, the loss, and everything with ten losses.
    gradients
        Name in llm.c, "dwte" for one -> True if llm.c accepts the gradient.
    differences
        The same names, and "logits" -> largest absolute difference.
    """

    logits: bool
    loss: bool
    overall: bool
    gradients: dict[str, bool]
    differences: dict[str, float]

    @property
    def accepted(self) -> bool:
        """True if logits, loss and all 16 gradients are accepted."""
        return self.logits and self.loss and list(self.gradients.values()) == 16 * [True]


def compute_state(
    config: GPT2Config, found: Mapping[str, np.ndarray], tokens: np.ndarray, backend: Backend
) -> DebugState:
    """Compute logits, loss and gradients of tokens [B, T + 1], each of which predicts the next."""
    ids, targets = tokens[:, :-1].astype(np.int64), tokens[:, 1:].astype(np.int64)
    batch = Batch(ids, targets, np.ones(ids.shape, np.float32))
    with backend.scope():
        weights = {name: backend.asarray(np.asarray(found[name])) for name in found}
        model = Transformer(config, as_tree(weights), backend)
        cache = KVCache(config, backend, *ids.shape)
        positions = cache.extend([ids.shape[1]] * len(ids))
        logits = backend.to_numpy(forward(model, backend.asarray(ids), positions, cache))
        function = loss_function(forward, model)
        loss, gradients = function.gradients(weights, batch, scale=1 / batch.n_tokens)
        host = {name: backend.to_numpy(g) for name, g in gradients.items()}
        return DebugState(ids, targets, logits, float(loss), host)


def run_llm_c(clone: Path, folder: Path, tokens: np.ndarray, backend: Backend) -> Verdict:
    """Write a model and its debug state, build llm.c's test program, and run it on them.

    Parameters
    ----------
    folder
        The model.
    tokens
        Token ids [B, T + 1].

    Raises
    ------
    GptxError
        The program cannot be built.
    """
    _, checkpoint = read(folder)
    weights = {name: unquantized(x) for name, x in checkpoint.tensors.items()}
    state = compute_state(checkpoint.config, weights, tokens, backend)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        convert(folder, work / "gpt2_124M.bin", "llm.c", dtype="float32")  # llm.c's names
        llm_c_debug_state.write(state, checkpoint.config, work / "gpt2_124M_debug_state.bin")
        build(clone, clone / "test_gpt2.c", work / "test_gpt2")
        done = subprocess.run(
            [work / "test_gpt2"], cwd=work, capture_output=True, text=True, check=True
        )
    return parse(done.stdout)


def parse(output: str) -> Verdict:
    """Read the output of llm.c's test program."""
    found = re.findall(r"^(d\w+)$.*?^TENSOR (NOT )?OK, maxdiff = (\S+)$", output, re.M | re.S)
    logits = re.search(r"^(NOT )?OK \(LOGITS\), max_diff = (\S+)$", output, re.M)
    differences = {name: float(difference) for name, _, difference in found}
    if logits:
        differences["logits"] = float(logits[2])
    return Verdict(
        logits=bool(logits and not logits[1]),
        loss="\nLOSS OK:" in output,
        overall="\noverall okay: 1" in output,
        gradients={name: not wrong for name, wrong, _ in found},
        differences=differences,
    )


def tokens_of_text(text: str, tokenizer: Tokenizer, end: int) -> np.ndarray:
    """Encode the beginning of a text as llm.c's tinyshakespeare.py does: [B, T + 1].

    The token `end` precedes each section, and the blank line after a section is kept.
    """

    def stream() -> Iterator[int]:
        for section in text.split("\n\n"):
            yield end
            yield from tokenizer.encode(section + "\n\n")

    flat = np.fromiter(itertools.islice(stream(), B * T + 1), np.int64)
    return np.lib.stride_tricks.sliding_window_view(flat, T + 1)[::T]


def main() -> int:
    """Check, print the verdicts, and return 1 if llm.c does not accept the numbers."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.check_llm_c", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("clone", type=Path, help="folder of a clone of llm.c")
    parser.add_argument("--model", default=RANDOM + "124M", help="a name or a folder for gptx.load")
    parser.add_argument("--text", type=Path, help="file of the tokens (default: random tokens)")
    parser.add_argument("--backend", default="numpy")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        source = find_source(args.model, Path(scratch))
        write_source(source)
        if args.text:
            tokenizer, [end] = gptx.load(source.path).tokenizer, source.config.eos_token_ids
            tokens = tokens_of_text(args.text.read_text("utf-8"), tokenizer, end)
        else:
            tokens = np.array(random_ids(source.config, B, T + 1))
        verdict = run_llm_c(args.clone, source.path, tokens, get_backend(args.backend))
    words = {True: "OK", False: "NOT OK"}
    print(f"logits {words[verdict.logits]}, max difference {verdict.differences['logits']:.1e}")
    print(f"loss {words[verdict.loss]}")
    for name, accepted in verdict.gradients.items():
        print(f"{name} {words[accepted]}, max difference {verdict.differences[name]:.1e}")
    print(f"overall {words[verdict.overall]} (with the losses of OpenAI's 124M)")
    return 0 if verdict.accepted else 1


if __name__ == "__main__":
    sys.exit(main())
