"""Attention of few queries a sequence over keys in pages: decoding. See `afina.kernels.paged_attention` for what lies where.

A program has one query, one head of keys with all heads of queries that read it, and a part of the keys; parts are
brought together by their largest score and their sum (Dao et al. 2023, "Flash-Decoding").
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

KEYS = 64  # keys a step
PROGRAMS = 256  # see lora.py


@triton.jit
def _paged(
    query,
    kv,
    tables,
    items,
    sums,
    tops,
    totals,
    page_stride,
    table_width,
    page_size,
    heads,
    kv_heads,
    width,
    count,
    span,
    window,
    scaling,
    softcap,
    SHARED: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Unscaled sums (part, query, heads, width), largest scores and totals (part, query, heads)."""
    item, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token, sequence, position = (
        tl.load(items + 3 * item),
        tl.load(items + 3 * item + 1),
        tl.load(items + 3 * item + 2),
    )
    shared = heads // kv_heads
    mine, at = tl.arange(0, SHARED), tl.arange(0, WIDTH)
    place = head * shared + mine
    there = (mine < shared)[:, None] & (at < width)[None, :]
    q = tl.load(
        query + (token.to(tl.int64) * heads + place)[:, None] * width + at[None, :],
        mask=there,
        other=0.0,
    )
    first = tl.maximum(position + 1 - window, 0)
    begin = first + part * span
    end = tl.minimum(begin + span, position + 1)
    top = tl.full([SHARED], -float("inf"), tl.float32)
    total = tl.zeros([SHARED], tl.float32)
    out = tl.zeros([SHARED, WIDTH], tl.float32)
    for start in range(begin, end, KEYS):
        key = start + tl.arange(0, KEYS)
        seen = key < end
        page = tl.load(tables + sequence * table_width + key // page_size, mask=seen, other=0).to(
            tl.int64
        )
        slot = kv + page * page_stride + (head * page_size + key % page_size) * width
        inside = seen[:, None] & (at < width)[None, :]
        k = tl.load(slot[:, None] + at[None, :], mask=inside, other=0.0).to(q.dtype)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
        if softcap > 0:  # c tanh(score / c)
            score = softcap * (2.0 * tl.sigmoid(2.0 * score / softcap) - 1.0)
        score = tl.where(seen[None, :], score, -float("inf"))
        new = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp(score - new[:, None])
        before = tl.exp(top - new)
        v = tl.load(
            (slot + kv_heads * page_size * width)[:, None] + at[None, :], mask=inside, other=0.0
        ).to(q.dtype)
        out = tl.dot(weight.to(q.dtype), v, out * before[:, None], input_precision="ieee")
        total = total * before + tl.sum(weight, 1)
        top = new
    row = (part * count + item).to(tl.int64) * heads + place
    tl.store(tops + row, top, mask=mine < shared)
    tl.store(totals + row, total, mask=mine < shared)
    tl.store(sums + row[:, None] * width + at[None, :], out, mask=there)


@lru_cache(maxsize=64)
def _items(
    bounds: tuple[int, ...], pasts: tuple[int, ...], most: int, device: torch.device
) -> tuple[Tensor, Tensor, int]:
    """(query, sequence, position) of each query of the sequences with at most `most`, the queries, the longest reach."""
    items = [
        (start + i, s, past + i)
        for s, ((start, end), past) in enumerate(zip(pairwise(bounds), pasts, strict=True))
        if end - start <= most
        for i in range(end - start)
    ]
    table = torch.tensor(items, dtype=torch.int32).view(-1, 3)
    return (
        table.to(device),
        table[:, 0].long().to(device),
        max((position for *_, position in items), default=0) + 1,
    )


def paged_attention(
    query: Tensor,
    kv: Tensor,
    bounds: Sequence[int],
    pasts: Sequence[int],
    tables: Tensor,
    out: Tensor,
    most: int,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    """Write into `out` (T, heads, d) the attention of those sequences that have at most `most` queries.

    tables (sequences, most pages) int32; the rest as in `afina.kernels.paged_attention.paged_attention`.
    """
    items, places, reach = _items(tuple(bounds), tuple(pasts), most, query.device)
    if not len(items):
        return
    query, tables = query.contiguous(), tables.to(query.device)
    (heads, width), (kv_heads, page_size), count = query.shape[1:], kv.shape[2:4], len(items)
    reach, parts = min(reach, window or reach), 1
    while count * kv_heads * parts < PROGRAMS and parts < 16 and reach > 2 * parts * KEYS:
        parts *= 2
    span = triton.cdiv(reach, parts)
    sums = torch.empty(parts, count, heads, width, dtype=torch.float32, device=query.device)
    tops, totals = (
        torch.empty(parts, count, heads, dtype=torch.float32, device=query.device) for _ in range(2)
    )
    _paged[(count, kv_heads, parts)](
        query,
        kv,
        tables,
        items,
        sums,
        tops,
        totals,
        kv.stride(0),
        tables.shape[1],
        page_size,
        heads,
        kv_heads,
        width,
        count,
        span,
        window or reach,
        scaling,
        softcap or 0.0,
        SHARED=max(16, triton.next_power_of_2(heads // kv_heads)),
        WIDTH=max(16, triton.next_power_of_2(width)),
        KEYS=KEYS,
    )
    share = torch.exp(tops - tops.amax(0))  # (parts, count, heads): 0 where a part has no keys
    made = (sums * share[..., None]).sum(0) / (totals * share).sum(0)[..., None]
    out[places] = made.to(out.dtype)
