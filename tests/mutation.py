"""Mutation testing: small faults are put into a copy of the package, and tests have to fail.

    python -m tests.mutation conversions/containers/gguf.py -- tests/conversions/containers

The copy is a temporary folder without `../shared`, as a fresh clone is. A mutant that no test
detects survives and is printed. `equivalent_mutants.tsv` lists mutants that compute the same as the
original, with the reason; these are not run.
"""

from __future__ import annotations

import argparse
import ast
import copy
import itertools
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EQUIVALENT = Path(__file__).with_name("equivalent_mutants.tsv")
COPIED = ("gptx", "backends", "conversions", "benchmarks", "tests")
IMPORTED_AS = {"backends": "gptx/backends", "conversions": "gptx/conversions"}
MIN_TIMEOUT = 60.0  # seconds
FILE_TIMES = itertools.count(1)  # in seconds; Python compiles a file of another time again

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.MatMult: ast.Add,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr,
}
# Types, decorators, asserts, and the text of messages are not mutated.
SKIPPED = (ast.Assert, ast.JoinedStr)
SKIPPED_FIELDS = ("annotation", "returns", "decorator_list")


@dataclass(frozen=True)
class Mutant:
    """A change of one expression.

    Attributes
    ----------
    start, end
        Position of the expression in the source, in bytes.
    line, code
        Number of its line, counted from 1, and the code of that line.
    before, after
        Code of the expression, on one line.
    """

    start: int
    end: int
    line: int
    code: str
    before: str
    after: str

    def apply(self, source: bytes) -> bytes:
        """Return the source with the change."""
        return source[: self.start] + self.after.encode() + source[self.end :]

    def __str__(self) -> str:
        return f"{self.before} -> {self.after}"


def find_mutants(source: str) -> list[Mutant]:
    """Return all mutants of a module, in the order of its lines."""
    lines = source.splitlines(keepends=True)
    starts = [0, *itertools.accumulate(len(line.encode()) for line in lines)]
    found = []
    for node in _walk(ast.parse(source)):
        for original, changed in _changes(node):
            start = starts[original.lineno - 1] + original.col_offset
            end = starts[original.end_lineno - 1] + original.end_col_offset
            after = ast.unparse(changed)
            if isinstance(changed, ast.expr):
                after = f"({after})"
            code, before = lines[original.lineno - 1].strip(), ast.unparse(original)
            found.append(Mutant(start, end, original.lineno, code, before, after))
    return sorted(found, key=lambda mutant: mutant.start)


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for field, value in ast.iter_fields(node):
        if field not in SKIPPED_FIELDS:
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and not isinstance(child, SKIPPED):
                    yield from _walk(child)


def _changes(node: Any) -> Iterator[tuple[Any, ast.AST]]:
    """Yield an expression or assignment of a node, and its replacement."""
    match node:
        case ast.Compare():
            for i, op in enumerate(node.ops):
                for other in COMPARISONS[type(op)]:
                    ops = [*node.ops[:i], other(), *node.ops[i + 1 :]]
                    yield node, _replaced(node, ops=ops)
        case ast.BinOp() | ast.AugAssign():
            yield node, _replaced(node, op=ARITHMETIC[type(node.op)]())
        case ast.BoolOp():
            yield node, _replaced(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.Not()):
            yield node, node.operand
        case ast.Constant(value=bool()):
            yield node, ast.Constant(not node.value)
        case ast.Constant(value=int() | float()):
            yield node, ast.Constant(node.value + 1)
        case ast.If() if getattr(node.test, "id", None) != "TYPE_CHECKING":
            yield node.test, ast.Constant(False)
        case ast.IfExp():
            yield node, node.body
            yield node, node.orelse


def _replaced(node: Any, **fields: Any) -> Any:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def read_equivalent() -> set[tuple[str, str, str]]:
    """Return path, code of the line, and change of each mutant in the list."""
    lines = EQUIVALENT.read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines]
    return {(path, code, change) for path, code, change, _reason in rows}


def copy_package(folder: Path) -> None:
    """Copy what tests import, in the layout of an installed package."""
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name)  # keeps times: compiled kernels stay valid
    for name, link in IMPORTED_AS.items():
        (folder / link).symlink_to(folder / name)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy2(path, folder / path.name)


def run_python(folder: Path, *arguments: str, timeout: float | None = None) -> tuple[int, str]:
    """Run Python on a copy; return the exit code, 1 after a timeout, and the output."""
    unset = ("CI", "PYTHONDONTWRITEBYTECODE")
    env = {name: value for name, value in os.environ.items() if name not in unset}
    env |= {"PYTHONPATH": str(folder), "PYTHONPYCACHEPREFIX": str(folder / "compiled")}
    command = [sys.executable, *arguments]
    try:
        ran = subprocess.run(
            command, cwd=folder, env=env, timeout=timeout, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired:
        return 1, "timeout"
    return ran.returncode, ran.stdout + ran.stderr


def run_tests(folder: Path, tests: list[str], timeout: float | None = None) -> tuple[int, str]:
    """Run tests on a copy until the first failure."""
    options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider"]
    return run_python(folder, "-m", "pytest", *options, *tests, timeout=timeout)


def survives(folder: Path, path: str, mutant: Mutant, tests: list[str], timeout: float) -> bool:
    """Run the tests on a mutant; a timeout counts as a failure."""
    target, backup = folder / path, folder / "original.py"
    shutil.copy2(target, backup)
    try:
        target.write_bytes(mutant.apply(backup.read_bytes()))
        os.utime(target, (time.time(), next(FILE_TIMES)))
        return run_tests(folder, tests, timeout)[0] == 0
    finally:
        shutil.move(backup, target)


def check_copy(folder: Path, paths: list[str], tests: list[str]) -> float:
    """Check that the copy is imported and passes its tests; return the seconds they took."""
    for path in paths:
        module = ".".join(Path(path).with_suffix("").parts).removeprefix("gptx.")
        _, output = run_python(folder, "-c", f"import gptx.{module} as m; print(m.__file__)")
        if Path(output.strip()).resolve() != (folder / path).resolve():
            sys.exit(f"{path}: the tests import something else: {output.strip()}")
    start = time.perf_counter()
    code, output = run_tests(folder, tests)
    if code:
        sys.exit(f"the tests fail without a mutant:\n{output}")
    return time.perf_counter() - start


def main(arguments: list[str]) -> None:
    """Run the command line: `SOURCE... [options] -- TEST...`."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("paths", nargs="+", metavar="SOURCE", help="a module of the package")
    parser.add_argument("--sample", type=int, metavar="N", help="mutants of each module")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=1, help="mutants that run at a time")
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options, tests = parser.parse_args(arguments[:split]), arguments[split + 1 :]
    if not tests:
        parser.error("the tests are missing: give their paths after --")
    equivalent = read_equivalent()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # removes the copies
    with tempfile.TemporaryDirectory() as parent:
        folders: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for i in range(options.jobs):
            copy_package(folder := Path(parent, str(i)))
            folders.put(folder)
        seconds = check_copy(folder, options.paths, tests)
        print(f"without a mutant the tests take {seconds:.0f} s", flush=True)

        def run(path: str, mutant: Mutant) -> bool:
            folder = folders.get()
            try:
                alive = survives(folder, path, mutant, tests, max(MIN_TIMEOUT, 3 * seconds))
            finally:
                folders.put(folder)
            if alive:
                print(f"{path}:{mutant.line}: {mutant}", flush=True)
            return alive

        with ThreadPoolExecutor(options.jobs) as pool:
            for path in options.paths:
                found = find_mutants((folder / path).read_text())
                found = [m for m in found if (path, m.code, str(m)) not in equivalent]
                if options.sample and options.sample < len(found):
                    found = random.Random(options.seed).sample(found, options.sample)
                n = len(found)
                killed = n - sum(pool.map(run, [path] * n, found))
                print(f"{path}: {killed} of {n} mutants killed, {killed / n:.0%}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
