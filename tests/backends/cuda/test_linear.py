"""GEMV and GEMM kernels on the emulator, compared with the generic ops in float64."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from gptx.backends.fusion import ACTIVATIONS
from gptx.quantization import dequantize, quantize
from tests.emulator import cupy_stand_in
from tests.support.cuda_types import GENERIC

with cupy_stand_in.installed() as cupy:
    from gptx.backends.cuda import linear
    from gptx.backends.cuda.compiler import KernelVariant, kernel
    from gptx.backends.cuda.linear import (
        GEMM_TILES,
        GEMV_OUTPUTS,
        GEMV_ROWS,
        MAX_SHARED_BYTES,
        WARP,
        LaunchPlan,
        plan_gemm,
        plan_gemv,
    )

ERRORS = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}  # relative to the largest number
VARIANTS = [  # type of activations, bits of quantized values, group size
    ("float32", 0, 0),
    ("bfloat16", 0, 0),
    ("float16", 8, 128),
    ("bfloat16", 4, 32),
    ("float32", 4, 64),
    ("float32", 8, 32),
]
EPSILON = 1e-5

every_variant = pytest.mark.parametrize(
    "variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant))
)
gemv_variants = pytest.mark.parametrize(
    "variant", VARIANTS[:4], ids=lambda variant: "-".join(map(str, variant))
)


class LinearCase:
    """Random inputs of a fused linear op, and its result by the kernels and by the generic ops.

    Attributes
    ----------
    x, stream
        Activations and residual stream [n_rows, n_in]; the layer norm reads the latter.
    """

    def __init__(
        self,
        random: np.random.Generator,
        variant: tuple[str, int, int],
        n_rows: int,
        n_in: int,
        n_out: int,
        *,
        mean: float = 1.0,
    ) -> None:
        self.dtype, self.bits, self.group_size = variant
        self.variant = KernelVariant(self.dtype, bits=self.bits, group_size=self.group_size)
        self.array_dtype = self.variant.array_dtype
        self.n_rows, self.n_in, self.n_out = n_rows, n_in, n_out
        self.x = random.normal(size=(n_rows, n_in)).astype(self.array_dtype)
        self.stream = random.normal(mean, size=(n_rows, n_in)).astype(np.float32)
        self.norm = random.normal(size=(2, n_in)).astype(self.array_dtype)
        self.bias = random.normal(size=n_out).astype(self.array_dtype)
        self.residual = random.normal(size=(n_rows, n_out)).astype(np.float32)
        weight = random.normal(size=(n_out, n_in)).astype(self.array_dtype)
        self.arrays = [weight, None, None]
        self.weight = weight.astype(np.float64)
        if self.bits:
            q = quantize(weight.astype(np.float32), self.bits, self.group_size)
            self.arrays = [q.weight, q.scales.astype(np.float32), q.offsets.astype(np.float32)]
            self.weight = dequantize(q).astype(np.float64)

    def plan_gemv(self, multiprocessors: int = 2, *, with_layer_norm: bool = False) -> LaunchPlan:
        shape = self.n_rows, self.n_in, self.n_out, multiprocessors
        sizes = {"itemsize": self.variant.itemsize, "bits": self.bits}
        return plan_gemv(*shape, **sizes, with_layer_norm=with_layer_norm)

    def plan_gemm(self, multiprocessors: int = 3) -> LaunchPlan:
        shape = self.n_rows, self.n_in, self.n_out, multiprocessors
        sizes = {"itemsize": self.variant.itemsize, "bits": self.bits}
        return plan_gemm(*shape, **sizes, group_size=self.group_size)

    def run(
        self,
        plan: LaunchPlan,
        *,
        bias: bool = False,
        residual: bool = False,
        activation: int = 0,
        float32_out: bool = True,
    ) -> np.ndarray:
        with_layer_norm = plan.name.startswith("layer_norm")
        dtype = np.float32 if float32_out else self.array_dtype
        out = np.full((self.n_rows, self.n_out), np.nan, dtype)
        arrays: list[Any] = [
            *((self.stream, *self.norm, np.float32(EPSILON)) if with_layer_norm else (self.x,)),
            *self.arrays,
            self.bias if bias else None,
            self.residual if residual else None,
            out,
        ]
        args = [cupy.asarray(a) if isinstance(a, np.ndarray) else a for a in arrays]
        sizes = map(np.int32, (self.n_rows, self.n_in, self.n_out, activation, float32_out))
        file = "gemm.cu" if plan.name.startswith("gemm") else "gemv.cu"
        multiply = kernel(file, plan.name, self.variant)
        multiply(plan.grid, plan.block, *args, *sizes, shared_bytes=plan.shared_bytes)
        return cupy.asnumpy(args[-1]).astype(np.float64)

    def expected(
        self,
        *,
        with_layer_norm: bool = False,
        bias: bool = False,
        residual: bool = False,
        activation: int = 0,
    ) -> np.ndarray:
        x = self.x.astype(np.float64)
        if with_layer_norm:
            x = GENERIC.layer_norm(self.stream.astype(np.float64), *self.doubles(), EPSILON)
        y = x @ self.weight.T + (self.bias.astype(np.float64) if bias else 0.0)
        if activation:
            y = getattr(GENERIC, ACTIVATIONS[activation - 1])(y)
        return y + (self.residual.astype(np.float64) if residual else 0.0)

    def doubles(self) -> Any:
        return self.norm.astype(np.float64)

    def check(self, plan: LaunchPlan, **options: Any) -> None:
        """Run a plan; compare the result with the generic ops."""
        with_layer_norm = plan.name.startswith("layer_norm")
        is_rounded = with_layer_norm or not options.get("float32_out", True)
        given = self.run(plan, **options)
        options.pop("float32_out", None)
        expected = self.expected(with_layer_norm=with_layer_norm, **options)
        assert_near(given, expected, ERRORS[self.dtype] if is_rounded else 1e-5)


def assert_near(given: np.ndarray, expected: np.ndarray, error: float) -> None:
    assert np.abs(given - expected).max() <= error * np.abs(expected).max()


def widths(variant: tuple[str, int, int]) -> tuple[int, ...]:
    """Numbers of inputs that are small, and no multiples of the kernels' steps."""
    return (variant[2], 3 * variant[2]) if variant[1] else (8, 48, 160)


@gemv_variants
@pytest.mark.parametrize("n_rows", [1, 2, 3, 5, 8, 11])
def test_gemv(variant: tuple[str, int, int], n_rows: int, random: np.random.Generator) -> None:
    for n_in, n_out in itertools.product(widths(variant), (9, 37)):
        case = LinearCase(random, variant, n_rows, n_in, n_out)
        for with_layer_norm in (False, True):
            case.check(case.plan_gemv(with_layer_norm=with_layer_norm))


@gemv_variants
def test_gemv_with_any_team_and_grid(
    variant: tuple[str, int, int], random: np.random.Generator
) -> None:
    case = LinearCase(random, variant, 8, 3 * (variant[2] or 48), 45)
    shapes = (8, 8), (16, 2), (32, 1), (32, 3), (96, 2), (256, 1)
    for R, (i, (team, teams)) in itertools.product(GEMV_ROWS, enumerate(shapes)):
        blocks = (1, 3, 40)[(R + i) % 3]
        if team >= R * GEMV_OUTPUTS:
            plan = LaunchPlan(f"gemv_{R}", (8 // R, blocks), (team, teams), 64 * 1024)
            case.check(plan)


@every_variant
def test_products_of_the_width_of_gpt2(
    variant: tuple[str, int, int], random: np.random.Generator
) -> None:
    case = LinearCase(random, variant, 4, 768, 6)
    case.check(case.plan_gemv())
    case.check(case.plan_gemv(with_layer_norm=True))
    case.check(case.plan_gemm())


@every_variant
@pytest.mark.parametrize("tile", GEMM_TILES, ids=str)
def test_gemm_with_every_tile(
    variant: tuple[str, int, int],
    tile: tuple[int, int],
    random: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear, "GEMM_TILES", {tile: GEMM_TILES[tile]})
    for n_rows, n_out in ((1, 5), (tile[1] + 5, tile[0] + 24)):
        for n_in in widths(variant)[1:]:
            case = LinearCase(random, variant, n_rows, n_in, n_out)
            plan = case.plan_gemm()
            assert plan.name == "gemm_{}x{}".format(*tile)
            case.check(plan)


def test_gemm_tiles_keep_all_multiprocessors_busy() -> None:
    def chosen(n_rows: int, n_in: int, n_out: int) -> str:
        return plan_gemm(n_rows, n_in, n_out, 132, itemsize=2).name

    assert chosen(16, 768, 768) == "gemm_16x16"
    assert chosen(128, 6400, 1600) == "gemm_48x48"
    assert chosen(1024, 768, 768) == "gemm_96x64"
    assert chosen(1024, 1600, 6400) == "gemm_128x128"


@every_variant
@pytest.mark.parametrize("activation", range(1 + len(ACTIVATIONS)))
def test_epilogues(
    variant: tuple[str, int, int], activation: int, random: np.random.Generator
) -> None:
    case = LinearCase(random, variant, 3, 128, 18)
    plans = [case.plan_gemv(), case.plan_gemv(with_layer_norm=True), case.plan_gemm()]
    for plan, (bias, residual, float32_out) in itertools.product(
        plans, ((True, False, False), (True, True, True), (False, True, False))
    ):
        options = {"bias": bias, "residual": residual, "float32_out": float32_out}
        case.check(plan, activation=activation, **options)


def test_layer_norm_of_numbers_with_a_large_mean(random: np.random.Generator) -> None:
    for n_rows, n_in in ((1, 8), (1, 768), (2, 200), (8, 1600)):
        case = LinearCase(random, VARIANTS[0], n_rows, n_in, 3, mean=1000.0)
        given = case.run(case.plan_gemv(with_layer_norm=True))
        assert_near(given, case.expected(with_layer_norm=True), 2e-4)


@every_variant
def test_rows_are_independent(variant: tuple[str, int, int], random: np.random.Generator) -> None:
    case = LinearCase(random, variant, 7, 128, 18)
    expected = case.expected()
    case.x[2] = np.nan
    for plan in (case.plan_gemv(), case.plan_gemm()):
        given = case.run(plan)
        assert np.isnan(given[2]).all()
        rows = [0, 1, 3, 4, 5, 6]
        assert_near(given[rows], expected[rows], 1e-5)


@pytest.mark.parametrize("C", [768, 1024, 1280, 1600])
@pytest.mark.parametrize(("itemsize", "bits"), [(4, 0), (2, 0), (2, 8), (4, 4)])
def test_plans_for_gpt2_fit_a_device(C: int, itemsize: int, bits: int) -> None:
    for n_rows, (n_in, n_out) in itertools.product(
        (1, 2, 4, 8, 20), ((C, 3 * C), (C, C), (C, 4 * C), (4 * C, C), (C, 50257))
    ):
        sizes = {"itemsize": itemsize, "bits": bits}
        for with_layer_norm in (False, True):
            plan = plan_gemv(n_rows, n_in, n_out, 132, **sizes, with_layer_norm=with_layer_norm)
            R = int(plan.name.rpartition("_")[2])
            team, teams = plan.block
            assert plan.shared_bytes <= MAX_SHARED_BYTES
            assert team * teams <= (384 if R < 4 else 256)
            assert team * teams % WARP == 0
            assert team >= R * GEMV_OUTPUTS
            assert plan.grid[0] * R >= n_rows
            assert plan.grid[1] <= 2 * 132
        plan = plan_gemm(n_rows, n_in, n_out, 132, **sizes, group_size=bits and 64)
        assert plan.shared_bytes <= MAX_SHARED_BYTES


def test_a_gemv_of_one_row_has_a_block_on_nearly_every_multiprocessor() -> None:
    for n_in, n_out in ((768, 2304), (768, 768), (768, 3072), (3072, 768)):
        plan = plan_gemv(1, n_in, n_out, 132, itemsize=2)
        assert 0.9 * 132 <= plan.grid[1] <= 132


def test_a_gemv_has_fewer_rows_if_shared_memory_is_too_small() -> None:
    assert plan_gemv(8, 1600, 4800, 132, itemsize=4).name == "gemv_8"
    assert plan_gemv(8, 6400, 1600, 132, itemsize=4).name == "gemv_4"
