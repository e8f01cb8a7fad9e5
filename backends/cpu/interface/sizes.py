"""Sizes of vectors, blocks and workspaces, which Python and the kernels share.

A size that depends on the instruction set is what was fastest on AVX-512 and on AVX2. On AVX2 a
tile of the result leaves room in the 16 registers for a vector of weights and a number. On NEON it
takes 24 of the 32 registers, and a vector of weights four.
"""

from __future__ import annotations

from gptx.backends.cpu.interface.cpu_features import ARM, HAS_AVX512

LANES = 16  # numbers of a vector

BLOCK_ROWS = 4  # rows of a block
PANEL_OUTPUTS = 64  # outputs of a panel: rows of matrices are padded to whole ones

# GEMM on vectors: a tile of the result has the rows of a tall block by vectors of 16 outputs.
TALL_ROWS, STRIP_VECTORS = (4, 4) if HAS_AVX512 else (6, 1)
STRIP_OUTPUTS = STRIP_VECTORS * LANES
# Inputs of a strip, and blocks of rows that are multiplied by it while it is in the cache.
STRIP_INPUTS, CHUNK_BLOCKS = (128, 32) if HAS_AVX512 else (384, 43)

# GEMM on VNNI
BYTE_ROWS = 8  # rows of a block

# GEMM that converts quantized weights in registers: rows of a block, and of a product. For more,
# `gemm.py` is as fast; on NEON, by the number of instructions.
WORD_ROWS, MAX_WORD_ROWS = (8, 22) if HAS_AVX512 else (4, 8) if ARM else (6, 22)

# Attention of a prompt on vectors
QUERIES = LANES  # of a block, one to a lane; on AMX, the rows of a tile
TALL_KEYS = 8 if HAS_AVX512 else 6  # keys, or numbers of a value, of a product with a block

# AMX
TILE_ROWS = 16
TILE_ROW_BYTES = 64
TILE_WORDS = TILE_ROWS * TILE_ROW_BYTES // 4  # 32-bit words
N_PARTS = 3  # bfloat16 parts of a float32
TILE_INPUTS = 32  # inputs to a tile register, of bfloat16
PANEL_TILES = PANEL_OUTPUTS // LANES  # tile registers side by side
ROWS_WORDS = N_PARTS * TILE_WORDS // TILE_INPUTS  # words to an input of 16 packed rows
PANEL_WORDS = PANEL_TILES * ROWS_WORDS  # words to an input of a packed panel
PACKED_PANEL_INPUTS = 64  # inputs of a packed panel of floats: 24 KB
SQUARE_SIZE = PANEL_OUTPUTS * PANEL_OUTPUTS  # also holds 16 rows of a result, and then their sums

# AMX, a thread's workspace for floats: a packed panel, and the floats of an incomplete one.
INCOMPLETE_PANEL_START = PACKED_PANEL_INPUTS * PANEL_WORDS

# AMX, a thread's workspace for quantized weights: integer sums of a group, unpacked weights of 4
# bits, float sums. After the groups of a panel, it holds offsets.
N_DIGITS = 3  # bytes of a number of a row
MAX_GROUP_SIZE = 128
QUANTIZED_CHUNK_ROWS = 128  # rows that are multiplied at a time
INT_SUMS_SIZE = PANEL_TILES * N_DIGITS * TILE_WORDS
UNPACKED_START = INT_SUMS_SIZE
SUMS_START = UNPACKED_START + PANEL_OUTPUTS * MAX_GROUP_SIZE // 4
QUANTIZED_WORKSPACE_SIZE = SUMS_START + QUANTIZED_CHUNK_ROWS * PANEL_OUTPUTS


def prepared_row_size(n_in: int) -> int:
    """Return the floats of a prepared row: numbers, and the sums of groups of at least 32."""
    return n_in + n_in // 32


def linear_workspace_size(width: int) -> int:
    """Return the floats of a thread's workspace; `width` is that of the widest FLOAT32 target."""
    return max(width, STRIP_INPUTS * STRIP_OUTPUTS)


def byte_rows_workspace_size(n_in: int) -> int:
    """Return the floats of a thread's workspace for a row and its bytes."""
    return n_in + N_DIGITS * n_in // 4


def attention_workspace_size(D: int, capacity: int) -> int:
    """Return the floats of a thread's workspace: keys, values, queries, result and scores."""
    return 2 * capacity * D + 2 * QUERIES * D + QUERIES * (capacity + 1)


def amx_prepared_size(rows: int, n_in: int) -> int:
    """Return the floats of workspace that packed rows occupy."""
    return -(-rows // TILE_ROWS) * TILE_ROWS * n_in * N_PARTS // 2


def amx_workspace_size(D: int, capacity: int) -> int:
    """Return the floats of a thread's workspace for products and attention."""
    products = max(
        INCOMPLETE_PANEL_START + PACKED_PANEL_INPUTS * PANEL_OUTPUTS, QUANTIZED_WORKSPACE_SIZE
    )
    length = -(-capacity // PANEL_OUTPUTS) * PANEL_OUTPUTS
    packed = ROWS_WORDS * (D + length) + 2 * D * length // PANEL_OUTPUTS * PANEL_WORDS
    return max(products, SQUARE_SIZE + packed + TILE_ROWS * length)
