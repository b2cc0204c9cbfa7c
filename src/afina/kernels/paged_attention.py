"""Attention over keys and values in blocks of one pool: the KV cache of serving.

    kv            (num_blocks, 2, kv_heads, block_size, head_dim)  one layer, strided
    block_tables  | 7 3 9 | 2 | 0 5 |       blocks of each sequence, in the order of its tokens
    context_lens  |  40   | 0 |  20 |       tokens that were in the pool before this forward pass
    cu_seqlens    (0,     1,  9,    10)      queries: one of the first sequence, eight of the next

Query i of sequence s has position context_lens[s] + i and sees the keys up to its own, which are in
their blocks already. Nothing here is differentiable.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from afina.kernels.dispatch import TYPES, data_pointer, kernels
from afina.kernels.varlen_attention import FAST_ISAS

# Queries of a sequence up to which a kernel for few of them runs; with more, PyTorch's attention
# over the gathered blocks.
MAX_FEW_QUERIES = 32
# With AVX-512, rows (a query and a head that reads the same keys) up to which the kernel for few of
# them runs, whose time is proportional to the rows; with more, the one that takes 16 at a time.
# ms for two sequences after 500 tokens, few / 16 at a time: 9 heads on 3, bfloat16, 2 queries
# 0.17 / 0.17, 4 0.22 / 0.12, 32 1.67 / 0.52; 16 heads, 4 queries 0.41 / 0.56, 8 0.80 / 0.66;
# float32, 8 queries 1.4 / 2.0, 16 2.3 / 2.5
MAX_FEW_ROWS = {torch.float32: 19, torch.bfloat16: 7}
BlockTables = Sequence[Sequence[int]] | Tensor


@dataclass(frozen=True)
class Scores:
    """How scores become weights.

    Attributes:
        scaling: Factor of query key^T.
        window: How many last keys a query sees; None: all.
        softcap: c of c tanh(score / c); None: scores stay as they are.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None


@torch.no_grad()
def paged_attention(
    query: Tensor,  # (num_tokens, heads, head_dim)
    kv: Tensor,
    cu_seqlens: Sequence[int],
    context_lens: Sequence[int],
    block_tables: BlockTables,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Return softmax(scaling * query keys^T, causal) values: `(num_tokens, heads, head_dim)`.

    Head h of the queries reads head h * kv_heads // heads of keys and values.

    Args:
        query: The queries, see the module's docstring for the other inputs.
        kv: One layer's part of the pool.
        cu_seqlens: Cumulative numbers of queries, from 0.
        context_lens: Tokens of each sequence before the queries.
        block_tables: Lists, or a tensor `(num_sequences, max_blocks)` int32 with any padding,
            built once per forward pass.
        scaling: Factor of the scores.
        window: How many last keys a query sees; None: all.
        softcap: c, with which scores become c tanh(score / c).

    Raises:
        ValueError: shapes or block tables do not fit each other.
    """
    _check(query, kv, cu_seqlens, context_lens, block_tables)
    tables, scores = pad_block_tables(block_tables), Scores(scaling, window, softcap)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    max_queries = 0  # sequences with more of them are left to PyTorch
    if triton := kernels.triton_ops(query, kv):
        _check_blocks(tables, cu_seqlens, context_lens, kv)
        max_queries = MAX_FEW_QUERIES
        triton.paged_attention(
            query, kv, cu_seqlens, context_lens, tables, out, max_queries, scaling, window, softcap
        )
    elif _cpp_accepts(query, kv):
        max_queries = _run_cpp(query, kv, cu_seqlens, context_lens, tables, out, scores)
    for s, (start, end) in enumerate(pairwise(cu_seqlens)):
        if end - start > max_queries:
            out[start:end] = paged_attention_reference(
                query[start:end], kv, context_lens[s], tables[s], scores
            )
    return out


def _cpp_accepts(query: Tensor, kv: Tensor) -> bool:
    """Return whether the C++ kernels take the dtypes: a float32 query reads either kind of keys."""
    same = query.dtype == torch.float32 or kv.dtype == query.dtype
    return kernels.cpp_accepts(query) and kv.dtype in TYPES and same


def _run_cpp(
    query: Tensor,
    kv: Tensor,
    cu_seqlens: Sequence[int],
    context_lens: Sequence[int],
    tables: Tensor,
    out: Tensor,
    scores: Scores,
) -> int:
    """Write the sequences that C++ computes into `out`; return the most queries that they have."""
    query = query.contiguous()
    heads, width = query.shape[1:]
    num_blocks, _, kv_heads, block_size, _ = kv.shape
    few = limit = MAX_FEW_QUERIES
    runs = [(kernels.paged, few)]
    if kernels.isa in FAST_ISAS:
        few = max(1, MAX_FEW_ROWS[query.dtype] * kv_heads // heads)
        limit = max((end - start for start, end in pairwise(cu_seqlens)), default=0)
        runs = [(kernels.paged, few)]
        if limit > few:
            runs.append((kernels.paged_pieces, few + 1))
    for run, bound in runs:
        run(
            data_pointer(query),
            TYPES[query.dtype],
            data_pointer(out),
            data_pointer(kv),
            TYPES[kv.dtype],
            num_blocks,
            kv.stride(0),
            heads,
            kv_heads,
            block_size,
            width,
            data_pointer(tables),
            tables.shape[1],
            cu_seqlens,
            context_lens,
            bound,
            scores.scaling,
            scores.softcap or 0.0,
            scores.window or 0,
        )
    return limit


@torch.no_grad()
def paged_write(key: Tensor, value: Tensor, kv: Tensor, slot_mapping: Tensor) -> None:
    """Write key and value `(num_tokens, kv_heads, head_dim)` into `kv`.

    Token t goes to slot_mapping[t] `(num_tokens,)` int64 = block * block_size + offset.

    Raises:
        ValueError: shapes do not fit, or a slot is not in the pool.
    """
    num_blocks, _, kv_heads, block_size, width = kv.shape
    shape = (len(slot_mapping), kv_heads, width)
    if key.shape != shape or value.shape != shape or not kv[0].is_contiguous():
        shapes = f"keys {tuple(key.shape)} and values {tuple(value.shape)}"
        raise ValueError(
            f"{shapes} do not fit {len(slot_mapping)} slots of blocks {tuple(kv.shape)}"
        )
    key, value = key.to(kv.dtype), value.to(kv.dtype)
    if kernels.cpp_accepts(key, value, kv) and slot_mapping.dtype == torch.int64:
        key, value, slots = key.contiguous(), value.contiguous(), slot_mapping.contiguous()
        kernels.paged_write(
            data_pointer(key),
            data_pointer(value),
            kv.element_size(),
            data_pointer(kv),
            num_blocks,
            kv.stride(0),
            len(slots),
            kv_heads,
            block_size,
            width,
            data_pointer(slots),
        )
        return
    slots = slot_mapping
    if slots.numel() and not 0 <= int(slots.min()) <= int(slots.max()) < num_blocks * block_size:
        raise ValueError("a slot is not in the pool")
    block, offset = slots // block_size, slots % block_size
    kv[block, 0, :, offset], kv[block, 1, :, offset] = key, value


def pad_block_tables(block_tables: BlockTables) -> Tensor:
    """Return the block tables as one tensor `(num_sequences, max_blocks)` int32, contiguous."""
    if isinstance(block_tables, Tensor):
        return block_tables.to(torch.int32).contiguous()
    longest = max(map(len, block_tables), default=0)
    filled = [[*table, *[0] * (longest - len(table))] for table in block_tables]
    return torch.tensor(filled, dtype=torch.int32).view(len(block_tables), longest)


def paged_attention_reference(
    query: Tensor,  # (num_queries, heads, head_dim)
    kv: Tensor,
    context_len: int,
    table: Tensor,
    scores: Scores,
) -> Tensor:
    """Return the attention of one sequence, in PyTorch, over its gathered blocks.

    Raises:
        ValueError: the table has too few blocks, or one that is not in the pool.
    """
    num_queries, heads, _ = query.shape
    block_size, window, softcap = kv.shape[3], scores.window, scores.softcap
    total = context_len + num_queries
    if total > len(table) * block_size:
        raise ValueError("a block table has too few blocks for its sequence's keys")
    first = max(0, context_len + 1 - window) // block_size if window else 0  # the first visible one
    index = table[first : -(-total // block_size)].to(device=kv.device, dtype=torch.int64)
    if not 0 <= int(index.min()) <= int(index.max()) < len(kv):
        raise ValueError("a block table names a block that is not in the pool")
    skipped = first * block_size
    gathered = kv.index_select(0, index).permute(1, 2, 0, 3, 4).flatten(2, 3)
    keys, values = gathered[:, :, : total - skipped].to(query.dtype)  # (kv_heads, keys, head_dim)
    q = query.transpose(0, 1)[None]  # (1, heads, num_queries, head_dim)
    allowed = None
    if context_len or softcap or (window and window < total):
        position = torch.arange(context_len, total, device=query.device)[:, None]
        key = torch.arange(skipped, total, device=query.device)
        allowed = (key <= position) & (key > position - window) if window else key <= position
    if softcap is None:
        repeats = heads // kv.shape[2]
        k, v = keys.repeat_interleave(repeats, 0)[None], values.repeat_interleave(repeats, 0)[None]
        out = F.scaled_dot_product_attention(
            q, k, v, allowed, is_causal=allowed is None, scale=scores.scaling
        )
        return out[0].transpose(0, 1)
    assert allowed is not None
    products = q[0].unflatten(0, (kv.shape[2], -1)).float() @ keys[:, None].mT.float()
    capped = (products * (scores.scaling / softcap)).tanh_().mul_(softcap)
    weights = capped.masked_fill_(~allowed, float("-inf")).softmax(-1)
    return (weights @ values[:, None].float()).flatten(0, 1).transpose(0, 1).to(query.dtype)


def _check_blocks(
    tables: Tensor, cu_seqlens: Sequence[int], context_lens: Sequence[int], kv: Tensor
) -> None:
    """Raise `ValueError` where a sequence's keys have no block.

    The entries of tables on a GPU are not read: that would wait for it.
    """
    counts = [
        -(-(context_len + end - start) // kv.shape[3])
        for context_len, (start, end) in zip(context_lens, pairwise(cu_seqlens), strict=True)
    ]
    if max(counts, default=0) > tables.shape[1]:
        raise ValueError("a block table has too few blocks for its sequence's keys")
    used = torch.arange(tables.shape[1])[None] < torch.tensor(counts)[:, None]
    if tables.device.type == "cpu" and bool((((tables < 0) | (tables >= len(kv))) & used).any()):
        raise ValueError("a block table names a block that is not in the pool")


def _check(
    query: Tensor,
    kv: Tensor,
    cu_seqlens: Sequence[int],
    context_lens: Sequence[int],
    tables: BlockTables,
) -> None:
    heads, width = query.shape[1:]
    if kv.shape[1] != 2 or kv.shape[4] != width or heads % kv.shape[2] or not kv[0].is_contiguous():
        raise ValueError(f"queries {tuple(query.shape)} do not fit blocks {tuple(kv.shape)}")
    num_sequences = len(context_lens)
    covers = cu_seqlens[0] == 0 and cu_seqlens[-1] == len(query)
    if len(cu_seqlens) != num_sequences + 1 or len(tables) != num_sequences or not covers:
        counts = f"{len(query)} queries, {num_sequences} contexts, {len(tables)} block tables"
        raise ValueError(f"{counts} and cu_seqlens {tuple(cu_seqlens)} do not fit")
