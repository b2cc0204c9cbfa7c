"""Blockwise 8-bit quantization: 256 values share a float32 scale, 256 fixed levels cover 7 decades.

The levels are bitsandbytes' dynamic ones (Dettmers 2015, arXiv 1511.04561; Dettmers et al. 2021,
arXiv 2110.02861): the decade 10^(e-7) .. 10^(e-6), for e = 0 .. 6, is divided into 2^e equal parts,
and the midpoints of the parts are levels, with both signs; 0 and 1 make it 256. Without signs each
decade has twice as many parts.

    x = levels[code] * scale        8 + 32 / 256 = 8.125 bits per value
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 256  # values that share a scale
CPU = torch.device("cpu")
TINY = torch.finfo(torch.float32).tiny


@lru_cache
def dynamic_levels(signed: bool, device: torch.device = CPU) -> Tensor:
    """Return the 256 levels, ascending, float32, from -0.993 or 0 to 1."""
    levels = [torch.tensor([0.0, 1.0], device="cpu")]
    for exponent in range(7):
        edges = torch.linspace(
            0.1, 1.0, 2 ** (exponent if signed else exponent + 1) + 1, device="cpu"
        )
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)
        levels += [middles, -middles] if signed else [middles]
    return torch.cat(levels).sort().values.to(device)


def middles(levels: Tensor) -> Tensor:
    """Return the 255 midpoints between levels, float32."""
    return (levels[:-1] + levels[1:]) / 2


@lru_cache
def search_tables(signed: bool) -> tuple[Tensor, Tensor]:
    """Return the tables with which the C++ kernel finds the nearest level.

    Returns:
        The midpoints `(256,)`, the last infinite; and starts `(65536,)` uint8: how many midpoints
        are below every float32 whose highest 16 bits are the index. At most one more is below one.
    """
    between = middles(dynamic_levels(signed))
    high = torch.arange(1 << 16, dtype=torch.int32)
    # among negative values, the one of largest magnitude
    lowest = (high << 16) | torch.where(high >= 1 << 15, 0xFFFF, 0).int()
    starts = torch.bucketize(lowest.view(torch.float32), between).to(torch.uint8)
    return torch.cat([between, torch.tensor([torch.inf])]), starts


def nearest_codes(x: Tensor, levels: Tensor) -> Tensor:
    """Return the index of the nearest level for each element of x, int32; ties go down."""
    return torch.bucketize(x, middles(levels), out_int32=True)


def quantize8(x: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes `(n,)` uint8 and scales `(ceil(n / 256),)` float32 of x `(n,)`."""
    blocks = F.pad(x.float(), (0, -len(x) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    codes = nearest_codes(blocks * (1.0 / scales.clamp(min=TINY))[:, None], levels)
    return codes.to(torch.uint8).flatten()[: len(x)], scales


def dequantize8(codes: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
    """Return the values `(n,)`, float32, of codes `(n,)` and scales `(ceil(n / 256),)`."""
    values = levels.index_select(0, F.pad(codes, (0, -len(codes) % BLOCK)).int())
    return values.view(-1, BLOCK).mul_(scales[:, None]).flatten()[: len(codes)]
