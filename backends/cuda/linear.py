"""Which kernel multiplies a number of rows with a matrix, and with what grid, on which device.

The constants are those of `cuda/gemv.cu` and `cuda/gemm.cu`, where the reasons are.
"""

from __future__ import annotations

from typing import NamedTuple

ROWS = (1, 2, 4, 8)  # that a block of `linear_R` has
SHARED_BYTES = 158 * 1024  # that a block may have on every device with tensor cores for bfloat16
WARP = 32
OUTPUTS = 2  # of a team of threads
TEAMS = (8, 16, *range(WARP, 385, WARP))  # threads that a team may have

# linear_tiles_MxN, for M outputs and N rows: parts of the inputs, stages and threads of a block.
TILES = {
    (16, 16): (4, 4, 128),
    (32, 32): (4, 3, 128),
    (48, 48): (4, 3, 256),
    (64, 64): (2, 3, 256),
    (96, 64): (2, 3, 256),
    (128, 128): (1, 3, 256),
}
SLICE_BYTES = 128  # of a row of activations


class Launch(NamedTuple):
    """A kernel's name, blocks along x and y, threads of a block along x and y, and the bytes of
    dynamic shared memory that it needs."""

    name: str
    grid: tuple[int, int]
    block: tuple[int, int]
    shared_bytes: int


def few_rows(
    n_rows: int,
    n_in: int,
    n_out: int,
    multiprocessors: int,
    *,
    itemsize: int,
    bits: int = 0,
    normed: bool = False,
) -> Launch:
    """`linear_R` or, if `normed`, `norm_linear_R`: every row of weights is read once for R rows.

    Parameters
    ----------
    n_rows, n_in, n_out
        Shapes: x [n_rows, n_in], weights [n_out, n_in].
    multiprocessors
        Of the device.
    itemsize
        Bytes of an activation.
    bits
        Of a weight's code; 0: it is of the activations' type.
    normed
        Whether the layer norm comes first.
    """
    numbers = 128 // (bits or 8 * itemsize)
    vectors = n_in // numbers  # of 16 bytes, of a row of weights

    def shared_bytes(R: int) -> int:
        x = R * _ceil(vectors, 8) * 8 * numbers * (4 if bits else itemsize)
        sums = _ceil(R * vectors, 4) * 16 if bits else 0
        norm = 2 * n_in * itemsize + R * n_in * 4 if normed else 0
        return x + sums + norm

    fitting = [R for R in ROWS if shared_bytes(R) <= SHARED_BYTES] or [1]
    R = next((R for R in fitting if n_rows <= R), fitting[-1])
    depth = 4 if not bits else 3 if R == 1 else 2
    threads = 384 if R < 4 else 256
    narrowest = max(8, R * OUTPUTS)

    # One block to a multiprocessor, if it can have all weights there on their way at once.
    in_flight = multiprocessors * threads * depth * OUTPUTS * 16
    blocks = multiprocessors if n_out * vectors * 16 <= in_flight else 2 * multiprocessors
    tiles = _ceil(n_rows, R)
    groups = _ceil(n_out, OUTPUTS)
    per_block = _ceil(groups, max(1, blocks // tiles))
    rounds = _ceil(per_block * narrowest, threads)
    teams = _ceil(per_block, rounds)
    # As wide as there is room for, but no wider than makes the steps fewer.
    widest = max(team for team in TEAMS if team * teams <= threads)
    steps = _ceil(vectors, widest)
    team = min(team for team in TEAMS if team >= narrowest and team * steps >= vectors)
    teams = _ceil(teams * team, WARP) * WARP // team  # whole warps
    name = f"norm_linear_{R}" if normed else f"linear_{R}"
    return Launch(name, (tiles, _ceil(groups, teams * rounds)), (team, teams), shared_bytes(R))


def tiles(
    n_rows: int,
    n_in: int,
    n_out: int,
    multiprocessors: int,
    *,
    itemsize: int,
    bits: int = 0,
    group: int = 0,
) -> Launch:
    """`linear_tiles_MxN`; parameters as in `few_rows`.

    `group` is the number of weights with the same scale, if there are codes.
    """

    def cycles(tile: tuple[int, int]) -> float:
        # For each input: a multiprocessor multiplies 1,024 pairs and receives 64 bytes in a cycle.
        M, N = tile
        one = products(itemsize, bits) * M * N / 1024 + itemsize * (M + min(N, n_rows)) / 64
        return _ceil(_ceil(n_rows, N) * _ceil(n_out, M), multiprocessors) * one

    M, N = min(TILES, key=cycles)
    parts, stages, threads = TILES[M, N]
    slice_, x_bits = SLICE_BYTES // itemsize, 8 * itemsize  # inputs
    numbers = parts * slice_ * (M * (bits or x_bits) + N * x_bits) // 8
    scales = parts * M * max(1, slice_ // group) * 8 if bits else 0
    sums = parts * N * (M + 4) * 4
    shared_bytes = max(stages * (numbers + scales), sums)
    grid = _ceil(n_rows, N), _ceil(n_out, M)
    return Launch(f"linear_tiles_{M}x{N}", grid, (threads, 1), shared_bytes)


def products(itemsize: int, bits: int) -> int:
    """What the matrix unit multiplies for one product: a float is a sum of three numbers."""
    return 1 if itemsize == 2 else 3 if bits else 6


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
