"""NF4 in Triton: dequantize, quantize, and multiply a few rows without dequantizing.

Blocks of 64 weights share an absmax and never cross rows, so that programs run over the blocks of
all rows in one order: block b is number b % per_row of row b // per_row, and its absmax is computed
from scales[b] and superscales[b // 256].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from afina.kernels.int8_blockwise import TINY, dynamic_levels
from afina.kernels.nf4 import MAX_CODE_ROWS, level_table

BLOCKS = 32  # blocks of 64 weights per program that quantizes or dequantizes
OUT, DEPTH = 16, 4  # of the product: outputs per program, blocks of 64 weights per step


@triton.jit
def _absmax(scales, superscales, offset, levels8, block, there):
    level = tl.load(levels8 + tl.load(scales + block, mask=there, other=0).to(tl.int32))
    return level * tl.load(superscales + block // 256, mask=there, other=0.0) + tl.load(offset)


@triton.jit
def _decode(
    codes,
    scales,
    superscales,
    offset,
    levels8,
    levels,
    out,
    width,
    row_bytes,
    per_row,
    total,
    BLOCKS: tl.constexpr,
):
    """Dequantize some blocks."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    there = block < total
    row, at = (block // per_row)[:, None], (block % per_row)[:, None]
    absmax = _absmax(scales, superscales, offset, levels8, block, there)[:, None]
    byte = at * 32 + tl.arange(0, 32)[None, :]
    packed = tl.load(
        codes + row * row_bytes + byte, mask=there[:, None] & (byte < row_bytes), other=0
    ).to(tl.int32)
    values = tl.interleave(
        tl.load(levels + (packed >> 4)) * absmax, tl.load(levels + (packed & 15)) * absmax
    )
    column = at * 64 + tl.arange(0, 64)[None, :]
    tl.store(
        out + row * width + column,
        values.to(out.dtype.element_ty),
        mask=there[:, None] & (column < width),
    )


@triton.jit
def _encode(
    weight, middles, codes, absmax, width, row_bytes, per_row, total, tiny, BLOCKS: tl.constexpr
):
    """Quantize some blocks: the nearest level of each weight over its absmax, ties go down."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    there = block < total
    row, at = (block // per_row)[:, None], (block % per_row)[:, None]
    column = at * 64 + tl.arange(0, 64)[None, :]
    values = tl.load(
        weight + row * width + column, mask=there[:, None] & (column < width), other=0.0
    ).to(tl.float32)
    # infinity times zero is NaN, which the caller finds
    largest = tl.max(tl.abs(values), 1) + tl.sum(values * 0.0, 1)
    tl.store(absmax + block, largest, mask=there)
    scaled = (
        values * tl.div_rn(tl.full([BLOCKS], 1.0, tl.float32), tl.maximum(largest, tiny))[:, None]
    )
    code = tl.zeros([BLOCKS, 64], tl.int32)
    for level in tl.static_range(15):
        code += (scaled > tl.load(middles + level)).to(tl.int32)
    first, second = tl.split(tl.reshape(code, (BLOCKS, 32, 2)))
    byte = at * 32 + tl.arange(0, 32)[None, :]
    tl.store(
        codes + row * row_bytes + byte,
        ((first << 4) | second).to(tl.uint8),
        mask=there[:, None] & (byte < row_bytes),
    )


@triton.jit
def _few(
    x,
    codes,
    scales,
    superscales,
    offset,
    levels8,
    levels,
    bias,
    y,
    rows,
    width,
    outs,
    row_bytes,
    per_row,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    OUT: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Write y (rows, OUT of outs): even columns of x times high half bytes, odd ones times low."""
    row, out = tl.arange(0, ROWS)[:, None], tl.program_id(0) * OUT + tl.arange(0, OUT)
    real = (out < outs)[:, None]
    dtype = x.dtype.element_ty
    sums = tl.zeros([ROWS, OUT], tl.float32)
    for start in range(0, per_row, DEPTH):
        at = start + tl.arange(0, DEPTH)[None, :]
        block = out.to(tl.int64)[:, None] * per_row + at
        absmax = _absmax(scales, superscales, offset, levels8, block, real & (at < per_row))
        scale = tl.reshape(tl.broadcast_to(absmax[:, :, None], (OUT, DEPTH, 32)), (OUT, DEPTH * 32))
        byte = start * 32 + tl.arange(0, DEPTH * 32)[None, :]
        where = out.to(tl.int64)[:, None] * row_bytes + byte
        packed = tl.load(codes + where, mask=real & (byte < row_bytes), other=0).to(tl.int32)
        even = tl.load(
            x + row * width + 2 * byte, mask=(row < rows) & (2 * byte < width), other=0.0
        )
        odd = tl.load(
            x + row * width + 2 * byte + 1, mask=(row < rows) & (2 * byte + 1 < width), other=0.0
        )
        high = (tl.load(levels + (packed >> 4)) * scale).to(dtype)
        low = (tl.load(levels + (packed & 15)) * scale).to(dtype)
        sums = tl.dot(even, tl.trans(high), sums, input_precision="ieee")
        sums = tl.dot(odd, tl.trans(low), sums, input_precision="ieee")
    if BIASED:
        sums += tl.load(bias + out, mask=out < outs, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y + row * outs + out[None, :], sums.to(dtype), mask=(row < rows) & (out < outs)[None, :]
    )


def nf4_dequantize(
    codes: Tensor,
    scales: Tensor,
    superscales: Tensor,
    offset: Tensor,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the dense matrix `(rows, width)`: multiplied in float32, rounded once."""
    codes, scales = codes.contiguous(), scales.contiguous()
    out = torch.empty(len(codes), width, dtype=dtype, device=codes.device)
    tables = dynamic_levels(True, codes.device), level_table(codes.device)
    _decode[(triton.cdiv(scales.numel(), BLOCKS),)](
        codes,
        scales,
        superscales,
        offset,
        *tables,
        out,
        width,
        codes.shape[1],
        scales.shape[1],
        scales.numel(),
        BLOCKS=BLOCKS,
        enable_fp_fusion=False,
    )
    return out


def nf4_encode(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes and absmax of weight `(out, in)`.

    Returns:
        Codes `(out, ceil(in / 2))` uint8 and absmax `(out, ceil(in / 64))` float32, NaN where a
        weight is not finite.
    """
    weight = weight.contiguous()
    rows, width = weight.shape
    codes = torch.empty(rows, -(-width // 2), dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(rows, -(-width // 64), dtype=torch.float32, device=weight.device)
    levels = level_table(weight.device)
    _encode[(triton.cdiv(absmax.numel(), BLOCKS),)](
        weight,
        (levels[:-1] + levels[1:]) / 2,
        codes,
        absmax,
        width,
        codes.shape[1],
        absmax.shape[1],
        absmax.numel(),
        TINY,
        BLOCKS=BLOCKS,
        enable_fp_fusion=False,
    )
    return codes, absmax


def nf4_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    superscales: Tensor,
    offset: Tensor,
    width: int,
    bias: Tensor | None,
) -> Tensor:
    """Return x W^T + bias `(..., out)`, for few rows without the dense matrix."""
    rows, outs = x.numel() // width, len(codes)
    if rows > MAX_CODE_ROWS:
        return F.linear(x, nf4_dequantize(codes, scales, superscales, offset, width, x.dtype), bias)
    x, codes, scales = x.contiguous(), codes.contiguous(), scales.contiguous()
    y = x.new_empty(*x.shape[:-1], outs)
    tables = dynamic_levels(True, x.device), level_table(x.device)
    _few[(triton.cdiv(outs, OUT),)](
        x,
        codes,
        scales,
        superscales,
        offset,
        *tables,
        y if bias is None else bias.contiguous(),
        y,
        rows,
        width,
        outs,
        codes.shape[1],
        scales.shape[1],
        BIASED=bias is not None,
        ROWS=max(16, triton.next_power_of_2(rows)),
        OUT=OUT,
        DEPTH=DEPTH,
    )
    return y
