"""Attention of few queries per sequence over keys in blocks, in Triton: decoding.

`afina.kernels.paged_attention` describes the inputs. A program has one query, one head of keys with
all heads of queries that read it, and a part of the keys; parts are combined by their largest score
and their sum (Dao et al. 2023, "Flash-Decoding").
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

KEYS = 64  # keys per step of a program
PROGRAMS = 256  # as in lora.py


@triton.jit
def _scores(q, k, is_key, scaling, softcap):
    """Return the scores (heads, keys), -inf where there is no key."""
    score = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
    if softcap > 0:  # c tanh(score / c)
        score = softcap * (2.0 * tl.sigmoid(2.0 * score / softcap) - 1.0)
    return tl.where(is_key[None, :], score, -float("inf"))


@triton.jit
def _accumulate(out, top, total, score, v):
    """Return sums, largest scores and totals after further keys with these scores and values."""
    new_top = tl.maximum(top, tl.max(score, 1))
    weight = tl.exp(score - new_top[:, None])
    rescale = tl.exp(top - new_top)
    out = tl.dot(weight.to(v.dtype), v, out * rescale[:, None], input_precision="ieee")
    return out, new_top, total * rescale + tl.sum(weight, 1)


@triton.jit
def _paged(
    query,
    kv,
    tables,
    items,
    sums,
    tops,
    totals,
    block_stride,
    table_width,
    block_size,
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
    """Write unscaled sums (part, query, heads, width), largest scores and totals of a part."""
    item, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token, sequence = tl.load(items + 3 * item), tl.load(items + 3 * item + 1)
    position = tl.load(items + 3 * item + 2)
    shared = heads // kv_heads
    own, column = tl.arange(0, SHARED), tl.arange(0, WIDTH)
    query_head = head * shared + own
    is_query = (own < shared)[:, None] & (column < width)[None, :]
    rows = query + (token.to(tl.int64) * heads + query_head)[:, None] * width
    q = tl.load(rows + column[None, :], mask=is_query, other=0.0)
    begin = tl.maximum(position + 1 - window, 0) + part * span
    end = tl.minimum(begin + span, position + 1)
    top = tl.full([SHARED], -float("inf"), tl.float32)
    total = tl.zeros([SHARED], tl.float32)
    out = tl.zeros([SHARED, WIDTH], tl.float32)
    for start in range(begin, end, KEYS):
        key = start + tl.arange(0, KEYS)
        is_key = key < end
        block = tl.load(tables + sequence * table_width + key // block_size, mask=is_key, other=0)
        offset = (head * block_size + key % block_size) * width
        slot = (kv + block.to(tl.int64) * block_stride + offset)[:, None] + column[None, :]
        inside = is_key[:, None] & (column < width)[None, :]
        k = tl.load(slot, mask=inside, other=0.0).to(q.dtype)
        v = tl.load(slot + kv_heads * block_size * width, mask=inside, other=0.0).to(q.dtype)
        score = _scores(q, k, is_key, scaling, softcap)
        out, top, total = _accumulate(out, top, total, score, v)
    row = (part * count + item).to(tl.int64) * heads + query_head
    tl.store(tops + row, top, mask=own < shared)
    tl.store(totals + row, total, mask=own < shared)
    tl.store(sums + row[:, None] * width + column[None, :], out, mask=is_query)


@lru_cache(maxsize=64)
def _items(
    cu_seqlens: tuple[int, ...],
    context_lens: tuple[int, ...],
    max_queries: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, int]:
    """Return the queries of the sequences that have at most `max_queries`.

    Returns:
        `(num_queries, 3)` int32 of token, sequence and position; the tokens, int64; the largest
        number of keys.
    """
    items = [
        (start + i, s, context_len + i)
        for s, ((start, end), context_len) in enumerate(
            zip(pairwise(cu_seqlens), context_lens, strict=True)
        )
        if end - start <= max_queries
        for i in range(end - start)
    ]
    table = torch.tensor(items, dtype=torch.int32).view(-1, 3)
    reach = max((position for *_, position in items), default=0) + 1
    return table.to(device), table[:, 0].long().to(device), reach


def paged_attention(
    query: Tensor,
    kv: Tensor,
    cu_seqlens: Sequence[int],
    context_lens: Sequence[int],
    tables: Tensor,  # (num_sequences, max_blocks) int32
    out: Tensor,  # (num_tokens, heads, head_dim)
    max_queries: int,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    """Write into `out` the attention of the sequences that have at most `max_queries` queries.

    Other arguments are those of `afina.kernels.paged_attention.paged_attention`.
    """
    items, tokens, reach = _items(tuple(cu_seqlens), tuple(context_lens), max_queries, query.device)
    if not len(items):
        return
    query, tables = query.contiguous(), tables.to(query.device)
    (heads, width), (kv_heads, block_size), count = query.shape[1:], kv.shape[2:4], len(items)
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
        block_size,
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
    result = (sums * share[..., None]).sum(0) / (totals * share).sum(0)[..., None]
    out[tokens] = result.to(out.dtype)
