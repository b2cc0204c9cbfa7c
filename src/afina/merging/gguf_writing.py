"""Tensors into a GGUF file, one at a time: as numbers of 16 or 32 bits, or in quantized blocks.

A block is 32 weights of a row with a scale (q4_0, q5_0, q8_0), or a scale and a least value (q4_1,
q5_1), in 4.5, 5, 5.5, 6 or 8.5 bits a weight. The gguf package rounds to nearest.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from afina.merging.gguf_architecture import library

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
BLOCK = 32  # weights


def stored_kind(dtype: torch.dtype) -> str:
    """Return the name of a dtype in a GGUF file."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def file_type(kind: str) -> int:
    """Return the number of `general.file_type`."""
    types = library().LlamaFileType
    return int(types.ALL_F32 if kind == "f32" else types[f"MOSTLY_{kind.upper()}"])


def write_gguf(writer: Any, tensors: Sequence[tuple[str, Tensor, str]]) -> None:
    """Write metadata, then the tensors (name, value, kind), one at a time."""
    gguf = library()
    for name, tensor, kind in tensors:
        there = gguf.GGMLQuantizationType[kind.upper()]
        shape = list(tensor.shape)
        size = prod(gguf.quants.quant_shape_to_byte_shape(shape, there))
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=there)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, tensor, kind in tensors:
            writer.write_tensor_data(_bytes(tensor.detach().cpu(), kind))
    finally:
        writer.close()


def _bytes(tensor: Tensor, kind: str) -> np.ndarray:
    if kind in DTYPES:
        return tensor.to(DTYPES[kind]).contiguous().view(torch.uint8).numpy()
    gguf = library()
    numbers = tensor.float().contiguous().numpy()
    return np.asarray(gguf.quants.quantize(numbers, gguf.GGMLQuantizationType[kind.upper()]))
