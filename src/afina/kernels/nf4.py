"""NF4: 4 bits per weight with double quantization (Dettmers et al. 2023, QLoRA, arXiv 2305.14314).

    row of W      | 64 weights | 64 weights | 40 |      blocks never cross rows, the last is short
    codes         4 bits, two per byte, the first in the high half: the nearest of 16 levels
    absmax        one per block = levels8[scale] * superscale + offset: 8 bits, a superscale per 256
    W[i, j] = level[code] * absmax

At widths that 64 divides, every stored value equals that of bitsandbytes
(bnb_4bit_use_double_quant), whose blocks divide the flattened matrix and so cross rows at other
widths. Here rows are independent and can be sharded. 4 + 8/64 + 32/(64 * 256) = 4.127 bits per
weight where 64 divides the width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from afina.kernels.dispatch import TYPES, data_pointer, kernels, register_op
from afina.kernels.int8_blockwise import TINY, dequantize8, dynamic_levels, nearest_codes, quantize8

# quantiles of the normal distribution in -1 .. 1, with an exact zero: arXiv 2305.14314, appendix E
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
BLOCK = 64  # weights that share an absmax
# weights per chunk, so that temporaries stay small, and in the cache on the CPU
CPU_CHUNK, DEVICE_CHUNK = 1 << 18, 1 << 26
MAX_CODE_ROWS = 32  # rows of x up to which the product reads the codes and not the dense matrix


@dataclass(frozen=True)
class NF4Weight:
    """A matrix (out, in) in 4 bits per weight."""

    codes: Tensor  # (out, ceil(in / 2)) uint8
    scales: Tensor  # (out, ceil(in / 64)) uint8: absmax - offset of each block, in 8 bits
    superscales: Tensor  # (ceil(out * ceil(in / 64) / 256)) float32
    offset: Tensor  # (1) float32: the mean absmax
    in_features: int  # codes of an odd width end in an unused half byte

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], self.in_features

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(t.nbytes for t in (self.codes, self.scales, self.superscales, self.offset))

    @property
    def bits(self) -> float:
        """Stored bits per weight."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    def absmax(self) -> Tensor:
        """Return the stored largest magnitude of each block, `(out, ceil(in / 64))` float32."""
        levels = dynamic_levels(True, self.scales.device)
        return (dequantize8(self.scales.flatten(), self.superscales, levels) + self.offset).view(
            self.scales.shape
        )


@lru_cache
def level_table(device: torch.device) -> Tensor:
    """Return the 16 levels, float32."""
    return torch.tensor(LEVELS, device=device)


@lru_cache
def _pairs(device: torch.device) -> Tensor:
    """Return the two levels of each byte of codes, `(256, 2)` float32."""
    byte = torch.arange(256, device=device)
    return level_table(device)[torch.stack([byte >> 4, byte & 15], 1)]


def _rows(matrix: Tensor, width: int) -> Iterator[slice]:
    """Yield slices of complete rows, about a chunk of weights each."""
    chunk = CPU_CHUNK if matrix.device.type == "cpu" else DEVICE_CHUNK
    step = max(1, chunk // max(1, width))
    return (slice(start, start + step) for start in range(0, matrix.shape[0], step))


def encode(weight: Tensor, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Return codes and absmax of weight `(out, in)`.

    Returns:
        Codes `(out, ceil(in / 2))` uint8 and absmax `(out, ceil(in / block))` float32.
    """
    rows, width = weight.shape
    if block == BLOCK and (gpu := kernels.triton_ops(weight)):
        return gpu.nf4_encode(weight)
    codes = torch.empty(rows, -(-width // 2), dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(rows, -(-width // block), device=weight.device)
    uses_cpp = (
        block == BLOCK
        and weight.device.type == "cpu"
        and kernels.cpp_accepts(codes.new_empty(0, dtype=torch.float32))
    )
    for part in _rows(weight, width):
        if uses_cpp:
            some = (weight[part] if weight.dtype in TYPES else weight[part].float()).contiguous()
            kernels.quantize(
                data_pointer(some),
                TYPES[some.dtype],
                *some.shape,
                data_pointer(codes[part]),
                data_pointer(absmax[part]),
            )
            continue
        blocks = F.pad(weight[part].float(), (0, -width % block)).unflatten(1, (-1, block))
        absmax[part] = blocks.abs().amax(2)
        scaled = (blocks * (1.0 / absmax[part].clamp(min=TINY))[..., None]).flatten(1)
        nearest = nearest_codes(scaled, level_table(weight.device)).to(torch.uint8)[
            :, : width + width % 2
        ]
        codes[part] = nearest[:, ::2] << 4 | nearest[:, 1::2]
    return codes, absmax


def decode(
    codes: Tensor, absmax: Tensor, width: int, dtype: torch.dtype, block: int = BLOCK
) -> Tensor:
    """Return the matrix `(rows, width)`: multiplied in float32, rounded once to `dtype`."""
    out = torch.empty(codes.shape[0], width, dtype=dtype, device=codes.device)
    pairs = _pairs(codes.device)
    for part in _rows(codes, width):
        values = pairs.index_select(0, codes[part].flatten().int()).view(-1, 2 * codes.shape[1])
        if width % block == 0:
            values.unflatten(1, (-1, block)).mul_(absmax[part][..., None])
            out[part] = values
        else:
            torch.mul(
                values[:, :width],
                absmax[part].repeat_interleave(block, 1)[:, :width],
                out=values[:, :width],
            )
            out[part] = values[:, :width]
    return out


def quantize(weight: Tensor) -> NF4Weight:
    """Return a matrix `(out, in)` of any float dtype in NF4.

    The offset is torch's float32 mean, as in bitsandbytes: its last bit may depend on the number of
    threads.

    Raises:
        ValueError: a weight is not finite, or the matrix is empty.
    """
    if weight.ndim != 2 or not weight.numel():
        raise ValueError(f"NF4 holds matrices, not a tensor of shape {tuple(weight.shape)}")
    codes, absmax = encode(weight)
    if not absmax.isfinite().all():
        raise ValueError("a weight is NaN or infinite")
    offset = absmax.mean()
    scales, superscales = quantize8(
        (absmax - offset).flatten(), dynamic_levels(True, weight.device)
    )
    return NF4Weight(codes, scales.view(absmax.shape), superscales, offset.view(1), weight.shape[1])


def dequantize(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    """Return the dense matrix `(out, in)` of `weight`."""
    return _dequantize(*_stored(weight), dtype)


def errors(weight: Tensor, quantized: NF4Weight) -> tuple[float, float]:
    """Return the relative error and the zeroed ratio of `quantized`, the NF4 of weight `(out, in)`.

    Returns:
        |W - W'| / |W| in the Frobenius norm, and the ratio of all weights that became zero.
    """
    absmax, lost, norm, zeros = quantized.absmax(), 0.0, 0.0, 0
    for part in _rows(weight, weight.shape[1]):
        before = weight[part].float()
        after = decode(quantized.codes[part], absmax[part], weight.shape[1], torch.float32)
        zeros += int(((after == 0) & (before != 0)).sum())
        norm += float(before.square().sum(dtype=torch.float64))
        lost += float(after.sub_(before).square_().sum(dtype=torch.float64))
    return (lost / norm) ** 0.5 if norm else 0.0, zeros / weight.numel()


def nf4_linear(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + bias `(..., out)` for x `(..., in)`, in the dtype of x.

    Gradients reach x and bias. The dense matrix is allocated during a product only, and not at all
    for few rows; the backward pass dequantizes it again.
    """
    if x.shape[-1] != weight.in_features:
        raise ValueError(f"x has {x.shape[-1]} columns, the matrix {weight.in_features}")
    return _linear(x, *_stored(weight), bias)


# ---- the operations, over the stored tensors: codes, scales, superscales, offset, in_features


def _stored(weight: NF4Weight) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    return weight.codes, weight.scales, weight.superscales, weight.offset, weight.in_features


def _native(weight: NF4Weight) -> tuple[Any, tuple[Tensor, ...]]:
    """Return `weight` as the C++ kernels take it, and the tensors that it points to."""
    parts = [part.contiguous() for part in _stored(weight)[:4]]  # type: ignore[union-attr]
    parts.append(dynamic_levels(True, parts[0].device))
    return kernels.library.NF4(*map(data_pointer, parts), *weight.shape), tuple(parts)


def _run_dequantize(
    codes: Tensor,
    scales: Tensor,
    superscales: Tensor,
    offset: Tensor,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    weight = NF4Weight(codes, scales, superscales, offset, width)
    if not kernels.cpp_accepts(offset):
        return decode(codes, weight.absmax(), width, dtype)
    native, _parts = _native(weight)
    out = torch.empty(weight.shape, dtype=dtype if dtype in TYPES else torch.float32)
    kernels.dequantize(native, TYPES[out.dtype], data_pointer(out))
    return out.to(dtype)


def _run_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    superscales: Tensor,
    offset: Tensor,
    width: int,
    bias: Tensor | None,
) -> Tensor:
    weight = NF4Weight(codes, scales, superscales, offset, width)
    rows = x.numel() // width
    if rows > MAX_CODE_ROWS or not kernels.cpp_accepts(x, bias):
        return F.linear(
            x, _run_dequantize(codes, scales, superscales, offset, width, x.dtype), bias
        )
    native, _parts = _native(weight)
    x, y = x.contiguous(), x.new_empty(*x.shape[:-1], codes.shape[0])
    kernels.nf4_product(
        data_pointer(x), TYPES[x.dtype], rows, native, data_pointer(bias), data_pointer(y)
    )
    return y


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *weight, ctx.width, _ = inputs
    ctx.save_for_backward(*weight)  # the stored tensors themselves: no new memory


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = (
        grad @ _dequantize(*ctx.saved_tensors, ctx.width, grad.dtype)
        if ctx.needs_input_grad[0]
        else None
    )
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[6] else None
    return grad_x, None, None, None, None, None, grad_bias


_STORED = "Tensor codes, Tensor scales, Tensor superscales, Tensor offset, int width"
_dequantize = register_op(
    f"nf4_dequantize({_STORED}, ScalarType dtype) -> Tensor",
    _run_dequantize,
    lambda codes, scales, superscales, offset, width, dtype: codes.new_empty(
        codes.shape[0], width, dtype=dtype
    ),
)
_linear = register_op(
    f"nf4_linear(Tensor x, {_STORED}, Tensor? bias) -> Tensor",
    _run_linear,
    lambda x, codes, scales, superscales, offset, width, bias: x.new_empty(
        *x.shape[:-1], codes.shape[0]
    ),
    _linear_backward,
    _keep,
)
