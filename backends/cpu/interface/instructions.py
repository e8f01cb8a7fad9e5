"""The instruction format: the columns of a program's table, which has an instruction a row.

The table is int64, made by `program.py` and read by `interpreter.py`. Instructions:

- EMBED adds token and position embeddings.
- LINEAR computes layer norm, product, bias, activation and residual sum.
- ATTENTION writes the new keys and values to the cache, then computes attention over the cache.
"""

from __future__ import annotations

EMBED, LINEAR, ATTENTION = range(3)  # INSTRUCTION
FLOAT32, FLOAT32_TRANSPOSED, INT8, INT4 = range(4)  # FORMAT: [I, O], [O, I], packed
NO_ACTIVATION, GELU_NEW, GELU, RELU = range(4)  # ACTIVATION

N_COLUMNS = 23
INSTRUCTION, FORMAT, ACTIVATION = range(3)
LAST_ONLY = 3  # 1: only the last token of each sequence
LAYER = 4  # of the KV cache
SOURCE, TARGET, RESIDUAL = range(5, 8)  # numbers of buffers; no residual is -1
SOURCE_WIDTH, TARGET_WIDTH = range(8, 10)  # numbers to a row of the buffer
N_IN, N_OUT, GROUP_SIZE = range(10, 13)  # of the matrix
WEIGHT, GROUPS, BIAS = range(13, 16)  # addresses, 0 is none; a bias is padded to whole panels
OFFSET_BITS = 16  # of a group's word; 0: float scales and offsets (see `group_scales.py`)
NORM_WEIGHT, NORM_BIAS, POSITION_TABLE = range(17, 20)  # addresses, 0 is none
EPSILON, SCALE = range(20, 22)  # float64
WORK = 22  # multiplications to a row, approximately
