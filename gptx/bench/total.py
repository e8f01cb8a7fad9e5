"""The preset `total`: a whole process, from its start to its end, for a few tokens.

Each run is a fresh Python that imports gptx, loads the model, reads a prompt and generates, as a
short script would. The first run of each setup finds files in the state that they happen to be in
(cold, perhaps) and may have to compile; the others find them in the system's cache (warm). They are
told apart, and only the warm ones count for the median.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np

from gptx import errors
from gptx.backends import get_backend
from gptx.bench.machine import about
from gptx.bench.plan import Settings, Setup, check_context, setups, single
from gptx.bench.process import Events, check, environment
from gptx.bench.sources import sources, write
from gptx.errors import GptxError

PROMPT, OUTPUT = 19, 20

SCRIPT = """
import json, sys, time
folder, options, prompt, output = json.loads(sys.argv[1])
began = time.perf_counter()
import gptx.generation.api
imported = time.perf_counter()
model = gptx.generation.api.load_once(folder, output, **options)
loaded = time.perf_counter()
result = model.generate(prompt, max_tokens=output, ignore_eos=True)
done = time.perf_counter()
print(json.dumps([imported - began, loaded - imported, result.time_to_first_token,
                  done - loaded - result.time_to_first_token, result.peak_memory]))
"""
PARTS = ("import_time", "load_time", "time_to_first_token", "other_tokens", "peak_memory")


def run(settings: Settings) -> Events:
    """Start the processes, the setups taking turns; yield a record for each setup."""
    prompt = single(settings.prompts, PROMPT, "-p")
    output = single(settings.outputs, OUTPUT, "-n")
    with sources(settings.models, offline=settings.offline) as found:
        for source in found.values():
            check_context(source, prompt + output - 1, f"{prompt} + {output} tokens")
        plan = setups(settings, found.values())
        for source in found.values():
            yield {"progress": f"preparing {source.name}"}
            write(source)
        random = np.random.default_rng(0)
        texts = {
            source.name: random.integers(0, source.config.vocab_size, prompt).tolist()
            for source in found.values()
        }
        runs: dict[Setup, list[dict[str, float]]] = {setup: [] for setup in plan}
        for turn in range(settings.repetitions + 1):
            for setup in plan:
                what = f"round {turn} of {settings.repetitions}" if turn else "first run"
                yield {"progress": f"{setup}: {what}"}
                runs[setup].append(once(setup, texts[setup.model], output))
    for setup, (first, *warm) in runs.items():
        total = [seconds["total"] for seconds in warm]
        backend = get_backend(setup.backend, threads=setup.threads)
        yield {
            **setup.facts,
            "prompt": prompt,
            "output": output,
            "first": first["total"],
            "median": statistics.median(total),
            "fastest": min(total),
            "slowest": max(total),
            **{part: statistics.median(seconds[part] for seconds in warm) for part in PARTS},
            "samples": total,
            **about(backend),
        }


def once(setup: Setup, prompt: list[int], output: int) -> dict[str, float]:
    """Run the process once: its `total` seconds, and those of its parts."""
    arguments: list[Any] = [setup.folder, setup.options, prompt, output]
    command = [sys.executable, "-c", SCRIPT, json.dumps(arguments)]
    start = time.perf_counter()
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        env=environment(),
        check=False,
        start_new_session=True,
    )
    seconds = time.perf_counter() - start
    if done.returncode > 0:  # the last line of a traceback: gptx.errors.WeightsError: tensor ...
        name, _, message = done.stderr.strip().rpartition("\n")[2].partition(": ")
        kind = getattr(errors, name.rpartition(".")[2], GptxError)
        raise kind(message or name)
    check(done.returncode, "total")
    return {"total": seconds} | dict(zip(PARTS, json.loads(done.stdout), strict=True))
