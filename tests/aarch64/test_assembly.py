"""The inner loops that LLVM makes for aarch64, on any machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("numba", reason="the compiled kernels need Numba (pip install '.[fast]')")

import llvmlite.binding as llvm


def inner_loops(features: str, *kernels: str) -> list[str]:
    """Compile kernels for a processor with these features; return the loops of one block."""
    llvm.initialize_all_targets()
    try:
        llvm.Target.from_triple("aarch64-unknown-linux-gnu")
    except RuntimeError:
        pytest.skip("this LLVM cannot compile for aarch64")
    names = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": features}
    code = subprocess.run(
        [sys.executable, "-m", "tests.aarch64.assembly", *kernels],
        env=os.environ | names | {"GPTX_ISA": ""}, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    blocks = re.split(r"^(\.L\w+):", code, flags=re.MULTILINE)
    labels = zip(blocks[1::2], blocks[2::2], strict=True)
    ends = ((body, re.search(rf"\tb\.\w+\t{label}$", body, re.MULTILINE)) for label, body in labels)
    return [body[: end.end()] for body, end in ends if end]


def test_a_tile_stays_in_registers() -> None:
    loops = inner_loops("+neon", "strips")
    loops = sorted((x for x in loops if "fmla" in x), key=len, reverse=True)
    assert len(loops) == 4  # two heights, each of which copies the weights or does not
    for loop, rows in zip(loops, (6, 6, 4, 4), strict=True):
        assert loop.count("fmla") == 4 * rows  # 16 outputs are four registers
        assert re.search(r"fmla\s.*\.s\[\d\]$", loop, re.MULTILINE)  # by a lane of a register
        assert "[sp" not in loop


def test_a_block_of_rows_stays_in_registers() -> None:
    (loop,) = (x for x in inner_loops("+neon", "words") if "fmla" in x and "ucvtf" in x)
    assert loop.count("fmla") == 4 * 4 * 8  # rows, registers, values of a word
    assert "[sp" not in loop


@pytest.mark.parametrize(("features", "instruction"), [("", "sdot"), (",+i8mm", "usdot")])
def test_products_of_bytes(features: str, instruction: str) -> None:
    loops = inner_loops(f"+neon,+dotprod{features}", "int8", "int4")
    int8, int4 = sorted((x for x in loops if "dot" in x), key=len)
    for loop, products in ((int8, 12), (int4, 24)):  # 3 digits, 4 registers, fields of 4 bits
        assert len(re.findall(rf"\t{instruction}\t", loop)) == products
        assert "prfm" in loop
        assert "[sp" not in loop
