"""Attention over keys and values that lie in pages of one pool, wherever there was room: serving's cache.

    kv          (pages, 2, kv_heads, page_size, head_dim)     one layer's part of the pool; pages may stand far apart
    tables      | 7 3 9 | 2 | 0 5 |                           the pages of each sequence, in the order of its tokens
    pasts       |  40   | 0 |  20 |                           tokens that were in the pool before this forward
    bounds      (0,     1,  9,    10)                         the queries: one of the first, eight of the second, ...

Query i of sequence s stands at position pasts[s] + i, and sees the keys up to its own, which are in their pages already.
Nothing here is differentiable.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from afina.kernels.dispatch import TYPES, data_pointer, kernels
from afina.kernels.varlen_attention import WIDE

# queries of a sequence up to which a kernel for few of them runs; beyond, PyTorch's attention over pages laid side by side
FEW = 32
# With AVX-512, rows (a query and a head that reads the same keys) up to which the kernel for few of them runs, whose time
# goes by the row; beyond, the one for pieces, whose time goes by 16 of them. In ms, two sequences after 500 tokens, few /
# pieces: 9 heads on 3, bf16, 2 queries 0.17 / 0.17, 4 0.22 / 0.12, 32 1.67 / 0.52; 16 heads, 4 queries 0.41 / 0.56, 8
# 0.80 / 0.66; float32, 8 queries 1.4 / 2.0, 16 2.3 / 2.5
ROWS = {torch.float32: 19, torch.bfloat16: 7}
Tables = Sequence[Sequence[int]] | Tensor


@torch.no_grad()
def paged_attention(
    query: Tensor,
    kv: Tensor,
    bounds: Sequence[int],
    pasts: Sequence[int],
    tables: Tables,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax(scaling * query keys^T, causal) values: (T, heads, head_dim) of query (T, heads, head_dim).

    Head h of the queries reads head h * kv_heads // heads of keys and values. `tables` are lists, or a tensor (sequences,
    most pages) int32 whose further entries do not count: make it once a forward. `window` w lets a query see its last w
    keys only; `softcap` c bends the scores to c tanh(score / c). Raises `ValueError` where shapes or tables do not fit.
    """
    _check(query, kv, bounds, pasts, tables)
    tables = padded(tables)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    fast = 0
    if gpu := kernels.triton_ops(query, kv):
        _check_pages(tables, bounds, pasts, kv)
        fast = FEW
        gpu.paged_attention(query, kv, bounds, pasts, tables, out, FEW, scaling, window, softcap)
    elif (
        kernels.cpp_accepts(query)
        and kv.dtype in TYPES
        and (query.dtype == torch.float32 or kv.dtype == query.dtype)
    ):
        query = query.contiguous()
        heads, width = query.shape[1:]
        pages, _, kv_heads, page_size, _ = kv.shape
        longest = max((end - start for start, end in pairwise(bounds)), default=0)
        pieces = kernels.isa in WIDE
        few, fast = (
            (max(1, ROWS[query.dtype] * kv_heads // heads), longest) if pieces else (FEW, FEW)
        )
        for run, limit in ((kernels.paged, few), (kernels.paged_pieces, few + 1))[
            : 1 + (pieces and longest > few)
        ]:
            run(
                data_pointer(query),
                TYPES[query.dtype],
                data_pointer(out),
                data_pointer(kv),
                TYPES[kv.dtype],
                pages,
                kv.stride(0),
                heads,
                kv_heads,
                page_size,
                width,
                data_pointer(tables),
                tables.shape[1],
                bounds,
                pasts,
                limit,
                scaling,
                softcap or 0.0,
                window or 0,
            )
    for s, (start, end) in enumerate(pairwise(bounds)):
        if end - start > fast:
            out[start:end] = paged_attention_reference(
                query[start:end], kv, pasts[s], tables[s], scaling, window, softcap
            )
    return out


@torch.no_grad()
def paged_write(key: Tensor, value: Tensor, kv: Tensor, slots: Tensor) -> None:
    """Put key and value (T, kv_heads, head_dim) into `kv`, token t at slots[t] (T, int64) = page * page_size + offset.

    Raises `ValueError` where a slot is not in the pool.
    """
    pages, _, kv_heads, page_size, width = kv.shape
    if (
        key.shape != (len(slots), kv_heads, width)
        or value.shape != key.shape
        or not kv[0].is_contiguous()
    ):
        shapes = f"keys {tuple(key.shape)} and values {tuple(value.shape)}"
        raise ValueError(f"{shapes} do not fit {len(slots)} slots of pages {tuple(kv.shape)}")
    key, value = key.to(kv.dtype), value.to(kv.dtype)
    if kernels.cpp_accepts(key, value, kv) and slots.dtype == torch.int64:
        key, value, slots = key.contiguous(), value.contiguous(), slots.contiguous()
        kernels.paged_write(
            data_pointer(key),
            data_pointer(value),
            kv.element_size(),
            data_pointer(kv),
            pages,
            kv.stride(0),
            len(slots),
            kv_heads,
            page_size,
            width,
            data_pointer(slots),
        )
        return
    if slots.numel() and not 0 <= int(slots.min()) <= int(slots.max()) < pages * page_size:
        raise ValueError("a slot is not in the pool")
    page, offset = slots // page_size, slots % page_size
    kv[page, 0, :, offset], kv[page, 1, :, offset] = key, value


def padded(tables: Tables) -> Tensor:
    """The tables as one tensor (sequences, most pages) int32, contiguous."""
    if isinstance(tables, Tensor):
        return tables.to(torch.int32).contiguous()
    longest = max(map(len, tables), default=0)
    filled = [[*table, *[0] * (longest - len(table))] for table in tables]
    return torch.tensor(filled, dtype=torch.int32).view(len(tables), longest)


def paged_attention_reference(
    query: Tensor,
    kv: Tensor,
    past: int,
    table: Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """The same for one sequence, query (n, heads, head_dim), in PyTorch: its pages are laid side by side first."""
    n, heads, _ = query.shape
    total = past + n
    if total > len(table) * kv.shape[3]:
        raise ValueError("a table has too few pages for its sequence's keys")
    first = (
        max(0, past + 1 - window) // kv.shape[3] if window else 0
    )  # the first page that anybody sees
    index = table[first : -(-total // kv.shape[3])].to(device=kv.device, dtype=torch.int64)
    if not 0 <= int(index.min()) <= int(index.max()) < len(kv):
        raise ValueError("a table names a page that is not there")
    skipped = first * kv.shape[3]
    # (2, kv_heads, keys, head_dim)
    keys, values = (
        kv.index_select(0, index)
        .permute(1, 2, 0, 3, 4)
        .flatten(2, 3)[:, :, : total - skipped]
        .to(query.dtype)
    )
    q = query.transpose(0, 1)[None]  # (1, heads, n, head_dim)
    allowed = None
    if past or softcap or (window and window < total):
        position = torch.arange(past, total, device=query.device)[:, None]
        key = torch.arange(skipped, total, device=query.device)
        allowed = (key <= position) & (key > position - window) if window else key <= position
    if softcap is None:
        repeats = heads // kv.shape[2]
        k, v = keys.repeat_interleave(repeats, 0)[None], values.repeat_interleave(repeats, 0)[None]
        out = F.scaled_dot_product_attention(
            q, k, v, allowed, is_causal=allowed is None, scale=scaling
        )
        return out[0].transpose(0, 1)
    assert allowed is not None
    scores = (
        q[0].unflatten(0, (kv.shape[2], -1)).float()
        @ keys[:, None].mT.float()
        * (scaling / softcap)
    )
    weights = scores.tanh_().mul_(softcap).masked_fill_(~allowed, float("-inf")).softmax(-1)
    return (weights @ values[:, None].float()).flatten(0, 1).transpose(0, 1).to(query.dtype)


def _check_pages(tables: Tensor, bounds: Sequence[int], pasts: Sequence[int], kv: Tensor) -> None:
    """Raise `ValueError` where a sequence's keys have no page; tables that lie on a GPU are not waited for."""
    counts = [
        -(-(past + end - start) // kv.shape[3])
        for past, (start, end) in zip(pasts, pairwise(bounds), strict=True)
    ]
    if max(counts, default=0) > tables.shape[1]:
        raise ValueError("a table has too few pages for its sequence's keys")
    used = torch.arange(tables.shape[1])[None] < torch.tensor(counts)[:, None]
    if tables.device.type == "cpu" and bool((((tables < 0) | (tables >= len(kv))) & used).any()):
        raise ValueError("a table names a page that is not there")


def _check(
    query: Tensor, kv: Tensor, bounds: Sequence[int], pasts: Sequence[int], tables: Tables
) -> None:
    heads, width = query.shape[1:]
    if kv.shape[1] != 2 or kv.shape[4] != width or heads % kv.shape[2] or not kv[0].is_contiguous():
        raise ValueError(f"queries {tuple(query.shape)} do not fit pages {tuple(kv.shape)}")
    if (
        len(bounds) != len(pasts) + 1
        or len(tables) != len(pasts)
        or bounds[0] != 0
        or bounds[-1] != len(query)
    ):
        counts = f"{len(query)} queries, {len(pasts)} pasts, {len(tables)} tables"
        raise ValueError(f"{counts} and bounds {tuple(bounds)} do not fit")
