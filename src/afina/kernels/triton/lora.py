"""Grouped LoRA in Triton: any ranks and adapters in three kernels, not padded to the largest rank.

The work is divided into strips: the tokens of one row of the table in one tile of the batch, times
up to WIDTH ranks of its adapter. Little is padding: a rank is padded to 16, as tensor cores need.

    tokens   | tile 0        | tile 1        |
    rows     | A A A A A A A A A A A A | B B B B |
    strips of tile 1: (8..12, A, ranks 0..8) (12..16, B, ranks 0..16) (12..16, B, ranks 16..20)

    into     low[strip] = weight * x[tokens] M_k[ranks]^T            one program per strip
    out of   y[tile, columns] += sum over its strips of low M_k      per tile and some columns
    across   G_k[ranks, columns] = sum over strips of low^T x        per some ranks and columns

Forward is `into` with A and `out of` with B; backward is both with B and A, and `across` for each.
Every element is written by one program, in one order: no atomics, equal bits each time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 64  # columns per step of a program
PROGRAMS = 256  # enough for a large GPU: with fewer strips, columns are split between programs


@triton.jit
def _into(
    x,
    matrices,
    strips,
    weights,
    low,
    columns,
    span,
    strip_count,
    ACROSS: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write low[part, strip] (TILE, WIDTH), the sum over the columns of this part."""
    strip, part = tl.program_id(0), tl.program_id(1)
    about = strips + strip * 6
    tile, start, end = tl.load(about), tl.load(about + 1), tl.load(about + 2)
    adapter, first, ranks = tl.load(about + 3), tl.load(about + 4), tl.load(about + 5)
    dtype = x.dtype.element_ty
    matrix = tl.load(matrices + adapter).to(tl.pointer_type(dtype))
    token = tile * TILE + tl.arange(0, TILE)
    active = (token >= start) & (token < end)
    rank = first + tl.arange(0, WIDTH)
    sums = tl.zeros([TILE, WIDTH], tl.float32)
    for begin in range(part * span, tl.minimum(part * span + span, columns), COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        there = active[:, None] & (column < columns)[None, :]
        some = tl.load(
            x + token.to(tl.int64)[:, None] * columns + column[None, :], mask=there, other=0.0
        )
        if ACROSS:
            where = column.to(tl.int64)[:, None] * ranks + rank[None, :]
        else:
            where = rank.to(tl.int64)[None, :] * columns + column[:, None]
        low_rank = tl.load(
            matrix + where, mask=(rank < ranks)[None, :] & (column < columns)[:, None], other=0.0
        )
        sums = tl.dot(some, low_rank, sums, input_precision="ieee")
    inner = tl.arange(0, TILE)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(
        low + (part * strip_count + strip).to(tl.int64) * TILE * WIDTH + inner,
        sums * tl.load(weights + strip),
    )


@triton.jit
def _low(low, strip, strip_count, PARTS: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """Return low[strip] (TILE, WIDTH), float32, summed over its parts."""
    inner = tl.arange(0, TILE)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    sums = tl.zeros([TILE, WIDTH], tl.float32)
    for part in tl.static_range(PARTS):
        sums += tl.load(low + (part * strip_count + strip).to(tl.int64) * TILE * WIDTH + inner)
    return sums


@triton.jit
def _out_of(
    y,
    result,
    low,
    matrices,
    strips,
    firsts,
    tokens,
    columns,
    strip_count,
    ACROSS: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write result[tile, columns] = y + the outputs of the tile's strips."""
    tile = tl.program_id(0)
    token, column = (
        tile * TILE + tl.arange(0, TILE),
        tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS),
    )
    there = (token < tokens)[:, None] & (column < columns)[None, :]
    where = token.to(tl.int64)[:, None] * columns + column[None, :]
    sums = tl.load(y + where, mask=there, other=0.0).to(tl.float32)
    dtype = y.dtype.element_ty
    for strip in range(tl.load(firsts + tile), tl.load(firsts + tile + 1)):
        about = strips + strip * 6
        adapter, first, ranks = tl.load(about + 3), tl.load(about + 4), tl.load(about + 5)
        matrix = tl.load(matrices + adapter).to(tl.pointer_type(dtype))
        rank = first + tl.arange(0, WIDTH)
        if ACROSS:
            at = column.to(tl.int64)[None, :] * ranks + rank[:, None]
        else:
            at = rank.to(tl.int64)[:, None] * columns + column[None, :]
        factor = tl.load(
            matrix + at, mask=(rank < ranks)[:, None] & (column < columns)[None, :], other=0.0
        )
        sums = tl.dot(
            _low(low, strip, strip_count, PARTS, TILE, WIDTH).to(dtype),
            factor,
            sums,
            input_precision="ieee",
        )
    tl.store(result + where, sums.to(dtype), mask=there)


@triton.jit
def _across(
    x,
    low,
    result,
    strips,
    order,
    firsts,
    offsets,
    tokens,
    columns,
    strip_count,
    rank_count,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write result[split, ranks of an adapter, columns]: low^T x of every SPLITS-th strip."""
    group, split = tl.program_id(0), tl.program_id(2)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    dtype = x.dtype.element_ty
    sums = tl.zeros([WIDTH, COLUMNS], tl.float32)
    for number in range(tl.load(firsts + group) + split, tl.load(firsts + group + 1), SPLITS):
        strip = tl.load(order + number)
        token = tl.load(strips + strip * 6) * TILE + tl.arange(0, TILE)
        there = (token < tokens)[:, None] & (column < columns)[None, :]
        some = tl.load(
            x + token.to(tl.int64)[:, None] * columns + column[None, :], mask=there, other=0.0
        )
        # zero for tokens outside the strip
        low_rank = _low(low, strip, strip_count, PARTS, TILE, WIDTH).to(dtype)
        sums = tl.dot(tl.trans(low_rank), some, sums, input_precision="ieee")
    offset, ranks = tl.load(offsets + 2 * group), tl.load(offsets + 2 * group + 1)
    rank = tl.arange(0, WIDTH)
    where = (split * rank_count + offset + rank).to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(result + where, sums, mask=(rank < ranks)[:, None] & (column < columns)[None, :])


@dataclass(frozen=True)
class SegmentTiling:
    """The strips of a table, on the device; built once for all modules of a forward pass.

    Attributes:
        tile: Tokens per tile.
        width: Ranks per strip.
        count: Number of strips.
        rank_count: Ranks of all adapters together.
        strips: `(count, 6)` int32: tile, first and end token, adapter, first rank, rank of the
            adapter.
        weights: `(count,)` float32.
        firsts: `(tiles + 1,)` int32: the first strip of each tile.
        order: `(count,)` int32: strips sorted by adapter and rank.
        group_firsts: `(groups + 1,)` int32: where each group, `width` ranks of an adapter, starts
            in `order`.
        offsets: `(groups, 2)` int32: a group's first row among all ranks, and its number of rows.
    """

    tile: int
    width: int
    count: int
    rank_count: int
    strips: Tensor
    weights: Tensor
    firsts: Tensor
    order: Tensor
    group_firsts: Tensor
    offsets: Tensor

    @property
    def groups(self) -> int:
        """Number of groups."""
        return len(self.offsets)


@lru_cache(maxsize=64)
def build_tiling(
    rows: tuple[tuple[int, int, int], ...],
    weights: tuple[float, ...],
    ranks: tuple[int, ...],
    tokens: int,
    device: torch.device,
) -> SegmentTiling:
    """Return the strips of rows (start, end, adapter) over `tokens` tokens."""
    tile = 16 if tokens <= 64 else 32 if tokens <= 1024 else 64
    width = min(64, max(16, triton.next_power_of_2(-(-sum(ranks) // max(1, len(ranks))))))
    result: list[tuple[tuple[int, ...], float]] = []
    for (start, end, k), weight in zip(rows, weights, strict=True):
        tiles = range(start // tile, -(-end // tile)) if start < end else ()
        result += [
            ((t, start, end, k, r, ranks[k]), weight)
            for t in tiles
            for r in range(0, ranks[k], width)
        ]
    result.sort(key=lambda strip: strip[0][0])
    strips = [strip for strip, _ in result]
    firsts = _starts([strip[0] for strip in strips], -(-tokens // tile))
    order = sorted(range(len(strips)), key=lambda n: strips[n][3:5])
    groups = sorted({strip[3:5] for strip in strips})
    offset = list(accumulate(ranks, initial=0))
    rows_of = [(offset[k] + r, min(width, ranks[k] - r)) for k, r in groups]
    number = {group: n for n, group in enumerate(groups)}
    group_firsts = _starts([number[strips[n][3:5]] for n in order], len(groups))

    def tensor(values: Sequence[object], shape: int = 1) -> Tensor:
        return (
            torch.tensor(values, dtype=torch.int32)
            .view(-1, *([shape] if shape > 1 else []))
            .to(device)
        )

    of_strips = torch.tensor([weight for _, weight in result], dtype=torch.float32).to(device)
    return SegmentTiling(
        tile,
        width,
        len(strips),
        offset[-1],
        tensor(strips, 6),
        of_strips,
        tensor(firsts),
        tensor(order),
        tensor(group_firsts),
        tensor(rows_of, 2),
    )


def _starts(keys: Sequence[int], count: int) -> list[int]:
    """Return where each of 0 .. count starts among sorted keys, and the end."""
    counts = [0] * count
    for key in keys:
        counts[key] += 1
    return list(accumulate(counts, initial=0))


def _plan_of(x: Tensor, table: Tensor, weights: Tensor, matrices: list[Tensor]) -> SegmentTiling:
    rows = tuple((start, end, k) for start, end, k in table.tolist())
    return build_tiling(
        rows, tuple(weights.tolist()), tuple(len(m) for m in matrices), len(x), x.device
    )


@lru_cache(maxsize=4096)
def _addresses(offsets: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(offsets, dtype=torch.int64).to(device)


class _Matrices:
    """Low-rank matrices (ranks, columns) by address; `across`: all are stored transposed."""

    def __init__(self, matrices: list[Tensor]) -> None:
        self.across = all(m.T.is_contiguous() and not m.is_contiguous() for m in matrices)
        self.matrices = matrices if self.across else [m.contiguous() for m in matrices]
        self.table = _addresses(tuple(m.data_ptr() for m in self.matrices), matrices[0].device)


def _run_into(x: Tensor, matrices: _Matrices, plan: SegmentTiling) -> Tensor:
    """Return low `(parts, strips, tile, width)` float32."""
    columns = x.shape[1]
    parts = 1
    while plan.count * parts < PROGRAMS and parts < 8 and columns > 2 * parts * COLUMNS:
        parts *= 2
    span = triton.cdiv(triton.cdiv(columns, COLUMNS), parts) * COLUMNS
    low = torch.empty(
        parts, plan.count, plan.tile, plan.width, dtype=torch.float32, device=x.device
    )
    _into[(plan.count, parts)](
        x,
        matrices.table,
        plan.strips,
        plan.weights,
        low,
        columns,
        span,
        plan.count,
        ACROSS=matrices.across,
        TILE=plan.tile,
        WIDTH=plan.width,
        COLUMNS=COLUMNS,
    )
    return low


def _run_out_of(y: Tensor, low: Tensor, matrices: _Matrices, plan: SegmentTiling) -> Tensor:
    tokens, columns = y.shape
    result = torch.empty_like(y)
    _out_of[(len(plan.firsts) - 1, triton.cdiv(columns, COLUMNS))](
        y,
        result,
        low,
        matrices.table,
        plan.strips,
        plan.firsts,
        tokens,
        columns,
        plan.count,
        ACROSS=matrices.across,
        PARTS=len(low),
        TILE=plan.tile,
        WIDTH=plan.width,
        COLUMNS=COLUMNS,
    )
    return result


def _run_across(x: Tensor, low: Tensor, plan: SegmentTiling, ranks: list[int]) -> list[Tensor]:
    tokens, columns = x.shape
    blocks = triton.cdiv(columns, COLUMNS)
    splits = 1
    while plan.groups * blocks * splits < PROGRAMS and plan.count > 4 * splits * plan.groups:
        if splits == 8:
            break
        splits *= 2
    result = torch.zeros(splits, plan.rank_count, columns, dtype=torch.float32, device=x.device)
    _across[(plan.groups, blocks, splits)](
        x,
        low,
        result,
        plan.strips,
        plan.order,
        plan.group_firsts,
        plan.offsets,
        tokens,
        columns,
        plan.count,
        plan.rank_count,
        SPLITS=splits,
        PARTS=len(low),
        TILE=plan.tile,
        WIDTH=plan.width,
        COLUMNS=COLUMNS,
    )
    return [part.to(x.dtype, copy=True) for part in result.sum(0).split(ranks)]


def grouped_lora(
    y: Tensor, x: Tensor, table: Tensor, weights: Tensor, a: list[Tensor], bt: list[Tensor]
) -> Tensor:
    """Return y `(T, out)` plus, on the tokens of each row, weight * (x A_k^T) B_k^T."""
    plan = _plan_of(x, table, weights, a)
    if not plan.count:
        return y.clone(memory_format=torch.contiguous_format)
    x, y = x.contiguous(), y.contiguous()
    return _run_out_of(y, _run_into(x, _Matrices(a), plan), _Matrices(bt), plan)


def grouped_lora_backward(
    grad: Tensor, x: Tensor, table: Tensor, weights: Tensor, a: list[Tensor], bt: list[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return the gradients of x, of each A and of each B transposed."""
    plan = _plan_of(x, table, weights, a)
    if not plan.count:
        return (
            torch.zeros_like(x),
            [torch.zeros_like(t) for t in a],
            [torch.zeros_like(t) for t in bt],
        )
    grad, x, ranks = grad.contiguous(), x.contiguous(), [len(t) for t in a]
    of_a, of_b = _Matrices(a), _Matrices(bt)
    low_rank = _run_into(grad, of_b, plan)
    grad_x = _run_out_of(torch.zeros_like(x), low_rank, of_a, plan)
    low = _run_into(x, of_a, plan)
    return grad_x, _run_across(x, low_rank, plan, ranks), _run_across(grad, low, plan, ranks)
