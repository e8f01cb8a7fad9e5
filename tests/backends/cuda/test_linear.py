"""gemv.cu and gemm.cu on the CPU, launched as the CuPy backend does: against the generic
ops in float64 on the same rounded numbers."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from gptx.backends import get_backend
from gptx.backends.cuda import linear as cupy_launch
from gptx.backends.cuda.linear import (
    OUTPUTS,
    ROWS,
    SHARED_BYTES,
    TILES,
    WARP,
    Launch,
    few_rows,
    tiles,
)
from gptx.backends.fusion import ACTIVATIONS
from gptx.quantization import dequantize, quantize
from tests.emulator import cupy_stand_in as cupy_on_cpu

with cupy_on_cpu.installed() as cupy:
    from gptx.backends.cuda.compiler import Kinds, kernel

GENERIC = get_backend("numpy", dtype="float64", generic=True)
ERRORS = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}  # of the largest number
KINDS = [  # type of activations, bits of a code, group
    ("float32", 0, 0),
    ("bfloat16", 0, 0),
    ("float16", 8, 128),
    ("bfloat16", 4, 32),
    ("float32", 4, 64),
    ("float32", 8, 32),
]
EPSILON = 1e-5

kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind)))
few_kinds = pytest.mark.parametrize("kind", KINDS[:4], ids=lambda kind: "-".join(map(str, kind)))


class Product:
    """Random rows times a random matrix, on the CPU in place of a device.

    Attributes
    ----------
    x, stream
        Rows [n_rows, n_in] of activations, and of the residual stream, which the norm comes before.
    """

    def __init__(
        self,
        random: np.random.Generator,
        kind: tuple[str, int, int],
        n_rows: int,
        n_in: int,
        n_out: int,
        *,
        mean: float = 1.0,
    ) -> None:
        self.dtype, self.bits, self.group = kind
        self.kinds = Kinds(self.dtype, bits=self.bits, group=self.group)
        self.real = self.kinds.real
        self.n_rows, self.n_in, self.n_out = n_rows, n_in, n_out
        self.x = random.normal(size=(n_rows, n_in)).astype(self.real)
        self.stream = random.normal(mean, size=(n_rows, n_in)).astype(np.float32)
        self.norm = random.normal(size=(2, n_in)).astype(self.real)
        self.bias = random.normal(size=n_out).astype(self.real)
        self.residual = random.normal(size=(n_rows, n_out)).astype(np.float32)
        weight = random.normal(size=(n_out, n_in)).astype(self.real)
        self.parts = [weight, None, None]
        self.weight = weight.astype(np.float64)
        if self.bits:
            q = quantize(weight.astype(np.float32), self.bits, self.group)
            self.parts = [q.weight, q.scales.astype(np.float32), q.biases.astype(np.float32)]
            self.weight = dequantize(q).astype(np.float64)

    def few_rows(self, multiprocessors: int = 2, *, normed: bool = False) -> Launch:
        shape = self.n_rows, self.n_in, self.n_out, multiprocessors
        size = np.dtype(self.real).itemsize
        return few_rows(*shape, itemsize=size, bits=self.bits, normed=normed)

    def tiles(self, multiprocessors: int = 3) -> Launch:
        shape = self.n_rows, self.n_in, self.n_out, multiprocessors
        size = np.dtype(self.real).itemsize
        return tiles(*shape, itemsize=size, bits=self.bits, group=self.group)

    def run(
        self,
        launch: Launch,
        *,
        bias: bool = False,
        residual: bool = False,
        activation: int = 0,
        wide: bool = True,
    ) -> np.ndarray:
        normed = launch.name.startswith("norm")
        out = np.full((self.n_rows, self.n_out), np.nan, np.float32 if wide else self.real)
        arrays = [
            *((self.stream, *self.norm, np.float32(EPSILON)) if normed else (self.x,)),
            *self.parts,
            self.bias if bias else None,
            self.residual if residual else None,
            out,
        ]
        args = [cupy.asarray(a) if isinstance(a, np.ndarray) else a for a in arrays]
        numbers = self.n_rows, self.n_in, self.n_out, activation, wide
        file = "gemm.cu" if launch.name.startswith("linear_tiles") else "gemv.cu"
        multiply = kernel(file, launch.name, self.kinds)
        multiply(
            launch.grid,
            launch.block,
            *args,
            *map(np.int32, numbers),
            shared_bytes=launch.shared_bytes,
        )
        return cupy.asnumpy(args[-1]).astype(np.float64)

    def expected(
        self,
        *,
        normed: bool = False,
        bias: bool = False,
        residual: bool = False,
        activation: int = 0,
    ) -> np.ndarray:
        x = self.x.astype(np.float64)
        if normed:
            x = GENERIC.layer_norm(self.stream.astype(np.float64), *self.doubles(), EPSILON)
        y = x @ self.weight.T + (self.bias.astype(np.float64) if bias else 0.0)
        if activation:
            y = getattr(GENERIC, ACTIVATIONS[activation - 1])(y)
        return y + (self.residual.astype(np.float64) if residual else 0.0)

    def doubles(self) -> Any:
        return self.norm.astype(np.float64)

    def check(self, launch: Launch, **options: Any) -> None:
        """Run a launch and hold what comes out to the generic ops."""
        normed = launch.name.startswith("norm")
        rounded = normed or not options.get("wide", True)  # inputs, or results, to the short type
        given = self.run(launch, **options)
        options.pop("wide", None)
        near(
            given, self.expected(normed=normed, **options), ERRORS[self.dtype] if rounded else 1e-5
        )


def near(given: np.ndarray, expected: np.ndarray, error: float) -> None:
    assert np.abs(given - expected).max() <= error * np.abs(expected).max()


def widths(kind: tuple[str, int, int]) -> tuple[int, ...]:
    """Numbers of inputs: few, and no multiple of what is worked on at a time."""
    return (kind[2], 3 * kind[2]) if kind[1] else (8, 48, 160)


@few_kinds
@pytest.mark.parametrize("n_rows", [1, 2, 3, 5, 8, 11])
def test_few_rows_are_multiplied(
    kind: tuple[str, int, int], n_rows: int, random: np.random.Generator
) -> None:
    for n_in, n_out in itertools.product(widths(kind), (9, 37)):
        product = Product(random, kind, n_rows, n_in, n_out)
        for normed in (False, True):
            product.check(product.few_rows(normed=normed))


@few_kinds
def test_any_team_and_any_grid_multiply_all_outputs(
    kind: tuple[str, int, int], random: np.random.Generator
) -> None:
    product = Product(random, kind, 8, 3 * (kind[2] or 48), 45)
    for R, (team, teams), blocks in itertools.product(
        ROWS, ((8, 8), (16, 2), (32, 1), (32, 3), (96, 2), (256, 1)), (1, 3, 40)
    ):
        if team >= R * OUTPUTS:
            launch = Launch(f"linear_{R}", (8 // R, blocks), (team, teams), 64 * 1024)
            product.check(launch)


@kinds
def test_rows_of_a_real_width_are_multiplied(
    kind: tuple[str, int, int], random: np.random.Generator
) -> None:
    product = Product(random, kind, 4, 768, 6)
    product.check(product.few_rows())
    product.check(product.few_rows(normed=True))
    product.check(product.tiles())


@kinds
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_more_rows_are_multiplied_in_tiles_of_every_size(
    kind: tuple[str, int, int],
    tile: tuple[int, int],
    random: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cupy_launch, "TILES", {tile: TILES[tile]})
    for n_rows, n_out in ((1, 5), (tile[1] + 5, tile[0] + 24)):
        for n_in in widths(kind)[1:]:
            product = Product(random, kind, n_rows, n_in, n_out)
            launch = product.tiles()
            assert launch.name == "linear_tiles_{}x{}".format(*tile)
            product.check(launch)


def test_tiles_are_as_large_as_keeps_all_multiprocessors_busy() -> None:
    def chosen(n_rows: int, n_in: int, n_out: int) -> str:
        return tiles(n_rows, n_in, n_out, 132, itemsize=2).name

    assert chosen(16, 768, 768) == "linear_tiles_16x16"
    assert chosen(128, 6400, 1600) == "linear_tiles_48x48"
    assert chosen(1024, 768, 768) == "linear_tiles_96x64"
    assert chosen(1024, 1600, 6400) == "linear_tiles_128x128"


@kinds
@pytest.mark.parametrize("activation", range(1 + len(ACTIVATIONS)))
def test_what_follows_a_product_is_applied(
    kind: tuple[str, int, int], activation: int, random: np.random.Generator
) -> None:
    product = Product(random, kind, 3, 128, 18)
    launches = [product.few_rows(), product.few_rows(normed=True), product.tiles()]
    for launch, (bias, residual, wide) in itertools.product(
        launches, ((True, False, False), (True, True, True), (False, True, False))
    ):
        product.check(launch, bias=bias, residual=residual, activation=activation, wide=wide)


def test_a_norm_of_numbers_far_from_zero_is_exact(random: np.random.Generator) -> None:
    for n_rows, n_in in ((1, 8), (1, 768), (2, 200), (8, 1600)):
        product = Product(random, KINDS[0], n_rows, n_in, 3, mean=1000.0)
        given = product.run(product.few_rows(normed=True))
        near(given, product.expected(normed=True), 2e-4)


@kinds
def test_rows_do_not_touch_each_other(
    kind: tuple[str, int, int], random: np.random.Generator
) -> None:
    product = Product(random, kind, 7, 128, 18)
    expected = product.expected()
    product.x[2] = np.nan
    for launch in (product.few_rows(), product.tiles()):
        given = product.run(launch)
        assert np.isnan(given[2]).all()
        rows = [0, 1, 3, 4, 5, 6]
        near(given[rows], expected[rows], 1e-5)


@pytest.mark.parametrize("C", [768, 1024, 1280, 1600])
@pytest.mark.parametrize(("itemsize", "bits"), [(4, 0), (2, 0), (2, 8), (4, 4)])
def test_launches_of_the_real_sizes_fit_a_device(C: int, itemsize: int, bits: int) -> None:
    for n_rows, (n_in, n_out) in itertools.product(
        (1, 2, 4, 8, 20), ((C, 3 * C), (C, C), (C, 4 * C), (4 * C, C), (C, 50257))
    ):
        for normed in (False, True):
            launch = few_rows(n_rows, n_in, n_out, 132, itemsize=itemsize, bits=bits, normed=normed)
            R = int(launch.name.rpartition("_")[2])
            team, teams = launch.block
            assert launch.shared_bytes <= SHARED_BYTES
            assert team * teams <= (384 if R < 4 else 256)
            assert team * teams % WARP == 0
            assert team >= R * OUTPUTS
            assert launch.grid[0] * R >= n_rows
            assert launch.grid[1] <= 2 * 132
        launch = tiles(n_rows, n_in, n_out, 132, itemsize=itemsize, bits=bits, group=bits and 64)
        assert launch.shared_bytes <= SHARED_BYTES


def test_a_decode_step_has_a_block_on_nearly_every_multiprocessor() -> None:
    for n_in, n_out in ((768, 2304), (768, 768), (768, 3072), (3072, 768)):
        launch = few_rows(1, n_in, n_out, 132, itemsize=2)
        assert 0.9 * 132 <= launch.grid[1] <= 132


def test_rows_that_do_not_fit_in_shared_memory_are_fewer_at_a_time() -> None:
    assert few_rows(8, 1600, 4800, 132, itemsize=4).name == "linear_8"
    assert few_rows(8, 6400, 1600, 132, itemsize=4).name == "linear_4"
