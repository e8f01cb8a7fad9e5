"""The tensor types of GGUF: plain numbers, and blocks of quantized numbers.

Type numbers: https://github.com/ggml-org/ggml/blob/master/include/ggml.h, `enum ggml_type`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gptx.conversions.containers import gguf_blocks as blocks
from gptx.conversions.containers.binary import Array, cast
from gptx.safetensors_file import BFLOAT16

Encode = Callable[[Array, str], Array]
Decode = Callable[[Array], Array]


@dataclass(frozen=True)
class TensorType:
    """A type of tensors.

    Attributes
    ----------
    name, id
        ggml's name, and its number in files.
    layout
        Type of one number, or of one block: ggml's struct.
    block_numbers
        Count of numbers in a block. Plain numbers have blocks of one.
    encode
        Function that converts rows of floats (float32 for blocks) to the data of the file; its
        second argument is their label in error messages. None for a type that is only read.
    decoder
        Function that converts blocks [N] of the layout to float32 [N, block_numbers]. None for
        plain numbers.
    """

    name: str
    id: int
    layout: np.dtype
    block_numbers: int = 1
    encode: Encode | None = None
    decoder: Decode | None = None

    @property
    def dtype(self) -> np.dtype:
        """Type of the decoded numbers; float32 for blocks."""
        return self.layout if self.decoder is None else np.dtype(np.float32)

    @property
    def block_bytes(self) -> int:
        """Size of a block in bytes."""
        return self.layout.itemsize

    def decode(self, raw: Array) -> Array:
        """Decode blocks, uint8 [N, block_bytes], to float32 [N, block_numbers]."""
        assert self.decoder is not None, "a type of blocks"
        with np.errstate(all="ignore"):  # a damaged scale can be infinite or NaN
            return self.decoder(raw.view(self.layout)[:, 0])


def _float_type(name: str, id: int, dtype: str, layout: np.dtype) -> TensorType:
    def encode(x: Array, label: str) -> Array:
        return cast(x, dtype, label)

    return TensorType(name, id, layout, encode=encode)


FLOAT_TYPES = {
    "float32": _float_type("F32", 0, "float32", np.dtype("<f4")),
    "float16": _float_type("F16", 1, "float16", np.dtype("<f2")),
    "bfloat16": _float_type("BF16", 30, "bfloat16", BFLOAT16),
}
INTEGER_TYPES = {
    "int8": TensorType("I8", 24, np.dtype(np.int8)),
    "int32": TensorType("I32", 26, np.dtype("<i4")),
}
FLOAT64 = TensorType("F64", 28, np.dtype("<f8"))

Q4_0 = TensorType("Q4_0", 2, blocks.Q4_0, 32, blocks.encode_q4_0, blocks.decode_q4_0)
Q8_0 = TensorType("Q8_0", 8, blocks.Q8_0, 32, blocks.encode_q8_0, blocks.decode_q8_0)
# Bits a weight -> type that is written.
QUANTIZED_TYPES = {4: Q4_0, 8: Q8_0}
BLOCK_TYPES = (
    Q4_0,
    Q8_0,
    TensorType("Q4_1", 3, blocks.Q4_1, 32, decoder=blocks.decode_q4_1),
    TensorType("Q5_0", 6, blocks.Q5_0, 32, decoder=blocks.decode_q5_0),
    TensorType("Q5_1", 7, blocks.Q5_1, 32, decoder=blocks.decode_q5_1),
    TensorType("Q2_K", 10, blocks.Q2_K, 256, decoder=blocks.decode_q2_k),
    TensorType("Q3_K", 11, blocks.Q3_K, 256, decoder=blocks.decode_q3_k),
    TensorType("Q4_K", 12, blocks.Q4_K, 256, decoder=blocks.decode_q4_k),
    TensorType("Q5_K", 13, blocks.Q5_K, 256, decoder=blocks.decode_q5_k),
    TensorType("Q6_K", 14, blocks.Q6_K, 256, decoder=blocks.decode_q6_k),
    TensorType("IQ4_NL", 20, blocks.IQ4_NL, 32, decoder=blocks.decode_iq4_nl),
    TensorType("IQ4_XS", 23, blocks.IQ4_XS, 256, decoder=blocks.decode_iq4_xs),
    TensorType("TQ1_0", 34, blocks.TQ1_0, 256, decoder=blocks.decode_tq1_0),
    TensorType("TQ2_0", 35, blocks.TQ2_0, 256, decoder=blocks.decode_tq2_0),
    TensorType("MXFP4", 39, blocks.MXFP4, 32, decoder=blocks.decode_mxfp4),
)
TYPES_BY_ID = {
    kind.id: kind
    for kind in (*FLOAT_TYPES.values(), *INTEGER_TYPES.values(), FLOAT64, *BLOCK_TYPES)
}

# Types that are not supported, for error messages.
# fmt: off
UNSUPPORTED_TYPES = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S",
    22: "IQ2_S", 25: "I16", 27: "I64", 29: "IQ1_M", 40: "NVFP4", 41: "Q1_0",
}
# fmt: on
