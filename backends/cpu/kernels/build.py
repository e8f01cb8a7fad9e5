"""Compile the kernels of a variant to a file: python -m gptx.backends.cpu.kernels.build PATH

The file has a line of JSON, then the object files of `run_program` and `join_runs`. The line has
the name and the size of each. Each line of the standard output is a compiled function.
The environment names the variant and the processor.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

from numba import types
from numba.core import event

from gptx.backends.cpu.kernels import interpreter
from gptx.backends.cpu.machine_code import NEVER_CALLED


class _Progress(event.Listener):
    def on_start(self, event: Any) -> None:
        pass

    def on_end(self, event: Any) -> None:
        print(flush=True)


def build() -> bytes:
    """Return the contents of the file."""
    objects = []
    for function, n_arguments in ((interpreter.run_program, 3), (interpreter.join_runs, 2)):
        result = function.get_compile_result(types.void(*[types.int64] * n_arguments))
        library = result.library
        for external in library._final_module.functions:
            name = external.name
            if not external.is_declaration or name.startswith("llvm.") or name == NEVER_CALLED:
                continue
            if not hasattr(ctypes.pythonapi, name):
                raise ImportError(f"the kernels call {name}, which Python does not have")
        objects.append((result.fndesc.llvm_func_name, library._get_compiled_object()))
    line = json.dumps([(name, len(code)) for name, code in objects])
    return line.encode() + b"\n" + b"".join(code for _, code in objects)


if __name__ == "__main__":
    event.register("numba:compile", _Progress())
    Path(sys.argv[1]).write_bytes(build())
