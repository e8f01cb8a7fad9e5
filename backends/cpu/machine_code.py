"""The machine code of the kernels: compiled once for a processor, then loaded from disk.

A process that runs the kernels needs LLVM's loader only, which takes hundredths of a second: Numba
is imported by the process that compiles (`kernels/build.py`). A variant is the code for some
formats of weights, "int8" or "float32,float16-cache" for example (see `interface/variant.py`).
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import cache, partial
from pathlib import Path
from typing import IO, NamedTuple

import llvmlite
import llvmlite.binding as llvm

from gptx.backends.cpu.interface import cpu_features
from gptx.backends.cpu.interface.variant import VARIABLE
from gptx.errors import BackendError
from gptx.file_lock import lock
from gptx.files import atomic_write
from gptx.process import ForkSafeLock, environment

KERNELS, INTERFACE = (Path(__file__).parent / name for name in ("kernels", "interface"))
CHECKSUM_BYTES = 32
# Of Numba's runtime, for arrays that own memory: the kernels have none, and never call it.
NEVER_CALLED = "NRT_MemInfo_call_dtor"
N_FUNCTIONS = 65  # that Numba compiles for a variant, approximately: for the progress in percent


class Code(NamedTuple):
    """The functions of `kernels/interpreter.py`: the address of one, and the other to call.

    A call does not hold the global interpreter lock.
    """

    run_program: int
    join_runs: Callable[[int, int], None]


# `join_runs` in Numba's calling convention: pointers for a result and an error, which it does not
# set, then its arguments.
_JOIN_RUNS = ctypes.CFUNCTYPE(
    ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64
)
_returned = (ctypes.c_void_p * 2)()

_lock = ForkSafeLock()
_loaded: dict[str, Code] = {}
_engines: list[llvm.ExecutionEngine] = []  # own the code


def load(name: str) -> Code:
    """Return the code of a variant: that of this process, of the disk, or compiled now.

    Raises
    ------
    BackendError
        The kernels cannot be compiled.
    """
    with _lock:
        if name not in _loaded:
            _loaded[name] = _load_objects(read_or_compile(name))
        return _loaded[name]


def is_compiled(name: str) -> bool:
    """Return True if the code of a variant is on the disk."""
    return any(_read(folder / _file_name(name)) for folder in _folders())


def read_or_compile(name: str) -> bytes:
    """Return the object files of a variant, see `kernels/build.py`."""
    folders = _folders()
    for folder in folders:
        if data := _read(folder / _file_name(name)):
            return data
    writable = next(folders_that_can_be_written(folders), None)
    if writable is None:
        return _compile(name)
    path = writable / _file_name(name)
    with ExitStack() as stack:
        with suppress(OSError):  # a file system without locks: two processes may compile
            stack.enter_context(lock(writable / "kernels.lock"))
        data = _read(path)  # another process may have compiled it
        if data is None:
            data = _compile(name)
            with suppress(OSError):  # the disk is full
                atomic_write(path, hashlib.sha256(data).digest() + data)
    return data


def folders_that_can_be_written(folders: list[Path]) -> Iterator[Path]:
    """Yield the folders in which files can be created, and create them."""
    for folder in folders:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                yield folder


def _folders() -> list[Path]:
    """Return where the code may be: as for Numba's own cache."""
    if folder := os.environ.get("NUMBA_CACHE_DIR"):
        return [Path(folder)]
    folders = [KERNELS / "__pycache__"]
    with suppress(RuntimeError):  # no home folder
        user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folders.append(Path(user, "gptx"))
    return folders


@cache
def _key() -> str:
    """Return a checksum of all that the machine code depends on, besides the variant."""
    files = [*sorted(KERNELS.rglob("*.py")), *sorted(INTERFACE.glob("*.py"))]
    parts = [path.read_bytes() for path in files]
    names = [cpu_features.NAME, cpu_features.FEATURES, sys.platform, sys.version]
    names += [llvmlite.__version__, _numba_version()]
    return hashlib.sha256(b"\0".join([*parts, *(name.encode() for name in names)])).hexdigest()


def _numba_version() -> str:
    """Return what changes with Numba's version, without an import of Numba.

    `importlib.metadata` takes longer to import than the rest of the loader.
    """
    spec = importlib.util.find_spec("numba")
    with suppress(OSError):
        if spec is not None and spec.origin is not None:
            return Path(spec.origin).with_name("_version.py").read_text(encoding="utf-8")
    from importlib import metadata

    return metadata.version("numba")


def _file_name(name: str) -> str:
    return f"kernels-{name.replace(',', '+')}-{_key()[:16]}.o"


def _read(path: Path) -> bytes | None:
    """Return the contents of a file of the cache; None if it is missing or damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    checksum, data = data[:CHECKSUM_BYTES], data[CHECKSUM_BYTES:]
    return data if hashlib.sha256(data).digest() == checksum else None


def _compile(name: str) -> bytes:
    """Compile a variant in a process of its own, which writes to a temporary file."""
    import subprocess  # a process that finds the code does not need it

    if not sys.executable:
        raise BackendError(
            "the kernels cannot be compiled: there is no Python program, sys.executable"
        )
    module = "gptx.backends.cpu.kernels.build"
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as errors:
        path = Path(folder, "kernels")
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            env=environment() | {VARIABLE: name},
        )
        with process:
            assert process.stdout is not None
            try:
                _show_progress(process.stdout, name)
            except BaseException:  # an interrupt
                process.kill()
                raise
        if process.returncode:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
            reason = lines[-1] if lines else f"exit code {process.returncode}"
            raise BackendError(f"the kernels cannot be compiled: {reason}")
        return path.read_bytes()


def _show_progress(lines: IO[str], name: str) -> None:
    """Show that a variant is compiled, on a terminal in percent: each line is a function more."""
    message = f"gptx: compiling the kernels for {name.replace(',', ', ')} on this processor, once"
    if sys.stderr is None or not sys.stderr.isatty():
        if sys.stderr is not None:
            print(f"{message} ...", file=sys.stderr, flush=True)
        lines.read()  # until the compiler ends
        return
    try:
        print(f"{message} ...", end="", file=sys.stderr, flush=True)
        for number, _ in enumerate(lines, 1):
            percent = min(99, 100 * number // N_FUNCTIONS)
            print(f"\r{message}: {percent} %", end="", file=sys.stderr, flush=True)
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _load_objects(data: bytes) -> Code:
    """Load the object files that `kernels/build.py` has written."""
    line, _, code = data.partition(b"\n")
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    addresses = []
    for name, size in json.loads(line):
        # Each in an engine of its own: the second file of an engine gets null for outer symbols.
        machine = llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(jit=True)
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        if not llvm.address_of_symbol(NEVER_CALLED):
            end = ctypes.cast(ctypes.pythonapi.Py_FatalError, ctypes.c_void_p).value
            llvm.add_symbol(NEVER_CALLED, end)
        engine.add_object_file(llvm.object_file.ObjectFileRef.from_data(code[:size]))
        engine.finalize_object()
        addresses.append(engine.get_function_address(name))
        _engines.append(engine)
        code = code[size:]
    run_program, join_runs = addresses
    pointers = ctypes.addressof(_returned), ctypes.addressof(_returned) + 8
    return Code(run_program, partial(_JOIN_RUNS(join_runs), *pointers))
