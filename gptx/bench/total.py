"""The preset `total`: a whole process from its start to its end, for a few tokens.

Each run is a fresh Python that imports gptx, loads the model, reads a prompt and generates, as a
short script does. The first run of each setup may find the files on the disk (cold) and may
compile; the others find them in the page cache (warm). Only warm runs count for the median.
"""

from __future__ import annotations

import json
import statistics
import sys
from typing import Any

from gptx.backends import get_backend
from gptx.bench import tables, worker
from gptx.bench.machine import describe
from gptx.bench.setups import Settings, Setup, check_context, plan_setups, single_count
from gptx.bench.sources import open_sources, random_ids, write_source
from gptx.bench.tables import Column, duration
from gptx.bench.worker import Events

PROMPT_TOKENS, OUTPUT_TOKENS = 19, 20

SCRIPT = """
import json, sys, time
path, options, prompt, output = json.loads(sys.argv[1])
start = time.perf_counter()
import gptx.generation.api
imported = time.perf_counter()
model = gptx.generation.api.load_once(path, output, **options)
loaded = time.perf_counter()
result = model.generate(prompt, max_tokens=output, ignore_eos=True)
done = time.perf_counter()
print(json.dumps([imported - start, loaded - imported, result.time_to_first_token,
                  done - loaded - result.time_to_first_token, result.peak_memory]))
"""
PARTS = ("import_time", "load_time", "time_to_first_token", "other_tokens", "peak_memory")

COLUMNS = (
    tables.MODEL,
    tables.BACKEND,
    tables.DTYPE,
    tables.THREADS,
    Column("test", lambda r: f"{r['prompt']} + {r['output']}", setup=True),
    Column("whole process", lambda r: duration(r["median"])),
    Column("fastest–slowest", lambda r: f"{r['fastest']:.2f}–{r['slowest']:.2f} s", wide=True),
    Column("first run", lambda r: duration(r["first"]), wide=True),
    Column("import", lambda r: duration(r["import_time"])),
    tables.LOAD,
    Column("first token", lambda r: duration(r["time_to_first_token"])),
    Column("the others", lambda r: duration(r["other_tokens"])),
    tables.MEMORY,
)


def run(settings: Settings) -> Events:
    """Run the processes, the setups in turns; yield a record for each setup."""
    prompt = single_count(settings.prompts, PROMPT_TOKENS, "prompts")
    output = single_count(settings.outputs, OUTPUT_TOKENS, "outputs")
    with open_sources(settings.models, offline=settings.offline) as sources:
        for source in sources.values():
            check_context(source, prompt + output - 1, f"{prompt} + {output} tokens")
        plan = plan_setups(settings, sources.values())
        for source in sources.values():
            yield {"progress": f"preparing {source.name}"}
            write_source(source)
        texts = {name: random_ids(source.config, 1, prompt)[0] for name, source in sources.items()}
        runs: dict[Setup, list[dict[str, float]]] = {setup: [] for setup in plan}
        for turn in range(settings.repetitions + 1):
            for setup in plan:
                what = f"round {turn} of {settings.repetitions}" if turn else "first run"
                yield {"progress": f"{setup}: {what}"}
                runs[setup].append(run_once(setup, texts[setup.model], output))
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
            **describe(backend),
        }


def run_once(setup: Setup, prompt: list[int], output: int) -> dict[str, float]:
    """Run the process once; return its `total` seconds and its parts."""
    arguments: list[Any] = [setup.path, setup.options, prompt, output]
    command = [sys.executable, "-c", SCRIPT, json.dumps(arguments)]
    seconds, done = worker.time_process(command)
    if done.returncode > 0:  # a traceback ends with gptx.errors.WeightsError: tensor ...
        name, _, message = done.stderr.strip().rpartition("\n")[2].partition(": ")
        raise worker.make_error(name.rpartition(".")[2], message)
    worker.check_return_code(done.returncode, "total")
    return {"total": seconds} | dict(zip(PARTS, json.loads(done.stdout), strict=True))
