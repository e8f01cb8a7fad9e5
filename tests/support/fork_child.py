"""A process that forks after it has generated text; `tests/backends/test_fork.py` runs it.

Standard output is a JSON list: for each way to run the model, the text or error in the child, and
the text in the parent. While the main thread forks, one thread generates, and another one holds the
lock of the BLAS threads.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
import sys
import threading
from typing import Any

import gptx

OPTIONS: dict[str, Any] = json.loads(sys.argv[1])
models = {name: gptx.load("shakespeare", **options) for name, options in OPTIONS.items()}


def generate(model: gptx.Model) -> str:
    return model.generate("ROMEO:", max_tokens=4, temperature=0).text


def run_child(queue: Any) -> None:
    signal.alarm(60)  # ends a child that waits forever
    for name, model in models.items():
        try:
            queue.put((name, generate(model)))
        except gptx.GptxError as error:
            queue.put((name, type(error).__name__ + ": " + str(error)))


def generate_until_stopped() -> None:
    while not stop.is_set():
        generate(models["int8"])


def hold_the_blas_lock() -> None:
    with models["op by op"].backend.scope():
        held.set()
        stop.wait()


for model in models.values():
    generate(model)
stop, held = threading.Event(), threading.Event()
threads = [threading.Thread(target=f) for f in (generate_until_stopped, hold_the_blas_lock)]
for thread in threads:
    thread.start()
held.wait()
context = multiprocessing.get_context("fork")
results: Any = context.SimpleQueue()
child = context.Process(target=run_child, args=(results,))
child.start()
child.join()
stop.set()
for thread in threads:
    thread.join()
in_child = {} if results.empty() else dict(results.get() for _ in models)
print(json.dumps([in_child, {name: generate(model) for name, model in models.items()}]))
