"""Attention over a packed batch: sequences end to end, without padding.

It is registered in transformers' AttentionInterface as "afina"; the sequence boundaries come with
each forward pass as the keyword `flat`. With a cache in `flat`, keys and values are written to and
read from the pool: one function for training, prefill and decoding.
"""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from afina.kernels.varlen_attention import causal_attention, is_fast, varlen_attention
from afina.models.paged_kv import KVShapeProbe, PagedKV

ATTENTION_NAME = "afina"

# the (start, end) ranges of a sequence in the packed batch, in order
SequenceSpans = tuple[tuple[int, int], ...]


@dataclass
class PrefixKV:
    """Keys and values of `length` tokens, `(length, num_kv_heads * head_dim)` by layer.

    One forward pass captures them, later ones read them.
    """

    length: int = 0
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass
class AttentionMetadata:
    """Boundaries of the sequences in a packed batch, and access to keys and values outside it.

    Attributes:
        cu_seqlens: cumulative lengths `(0, end of the first, ..., num_tokens)`.
        cache: blocks of the engine's pool.
        sequence_spans: ranges of each sequence, over `before` and the batch, where sequences share
            a prefix; the last range is its own.
        before: keys and values of a prefix outside the batch.
        captured_kv: receives the keys and values of this batch.
        is_causal: whether a token attends to no later one; not in encoders.
    """

    cu_seqlens: tuple[int, ...]
    cache: PagedKV | KVShapeProbe | None = None
    sequence_spans: tuple[SequenceSpans, ...] = ()
    before: PrefixKV | None = None
    captured_kv: PrefixKV | None = None
    is_causal: bool = True

    @cached_property
    def groups(self) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor]:
        """Groups of sequences of similar length, each for one call of attention.

        For each group (index, kept, lengths): `index` `(n, max_length)` selects its tokens from the
        batch, short sequences padded by their last token; `kept` are the positions of its own
        tokens among the n * max_length; `lengths` are `(n, 1)`. Then the permutation that returns
        the groups' own tokens to the order of the batch. Padding is at most a fifth of the tokens.
        """
        sequences = self.sequence_spans or tuple(
            ((start, end),) for start, end in pairwise(self.cu_seqlens)
        )
        sizes = {pieces: sum(end - start for start, end in pieces) for pieces in sequences}
        groups: list[list[SequenceSpans]] = []
        for pieces in sorted(sequences, key=lambda pieces: sizes[pieces]):
            real = sum(sizes[other] for other in groups[-1]) if groups else 0
            if groups and sizes[pieces] * (len(groups[-1]) + 1) <= 1.2 * (real + sizes[pieces]):
                groups[-1].append(pieces)
            else:
                groups.append([pieces])
        calls, order = [], []
        for group in groups:
            longest = sizes[group[-1]]
            rows = [
                [token for start, end in pieces for token in range(start, end)] for pieces in group
            ]
            index = torch.tensor([row + row[-1:] * (longest - len(row)) for row in rows])
            along, ends = (
                torch.arange(longest),
                torch.tensor([sizes[pieces] for pieces in group])[:, None],
            )
            own = torch.tensor([pieces[-1][1] - pieces[-1][0] for pieces in group])[:, None]
            kept = ((along >= ends - own) & (along < ends)).flatten().nonzero()[:, 0]
            calls.append((index, kept, ends))
            order.append(index.flatten()[calls[-1][1]])
        return calls, torch.cat(order).argsort()

    @cached_property
    def end_to_end(self) -> tuple[Tensor, tuple[int, ...], Tensor]:
        """Complete sequences end to end, shared prefixes repeated.

        Indices of their tokens in the batch, cumulative lengths, and the positions of the batch's
        own tokens among them, in the order of the batch.
        """
        rows = [
            [token for start, end in pieces for token in range(start, end)]
            for pieces in self.sequence_spans
        ]
        bounds = (0, *accumulate(map(len, rows)))
        own = [
            (start + i, end - length + i)
            for (*_, (start, stop)), end in zip(self.sequence_spans, bounds[1:], strict=True)
            for length in (stop - start,)
            for i in range(length)
        ]
        return (
            torch.tensor([token for row in rows for token in row]),
            bounds,
            torch.tensor([at for _, at in sorted(own)]),
        )


def _allowed(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Return a causal mask, bool `(queries, keys)`; the last query is at the last key."""
    position = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)[None]
    allowed = key <= position
    return allowed if window is None else allowed & (key > position - window)


def _allowed_both_ways(lengths: Tensor, keys: int, window: int | None) -> Tensor | None:
    """Return the mask of padded rows without causality, bool `(n, 1, 1 or keys, keys)`, or None.

    With a window, a token attends to those at most `window - 1` tokens away.
    """
    position = torch.arange(keys, device=lengths.device)
    own = (position < lengths)[:, None, None]  # (n, 1, 1, keys)
    if not _within(keys, window):
        assert window is not None
        return own & ((position[:, None] - position).abs() < window)
    return None if bool(own.all()) else own


def _attend(
    query: Tensor,  # (n, num_heads, q, head_dim)
    key: Tensor,  # (n, num_kv_heads, k, head_dim)
    value: Tensor,  # (n, num_kv_heads, k, value_dim)
    allowed: Tensor | None,  # bool, broadcast to (n, num_heads, q, k)
    scaling: float,
    softcap: float | None,
    dropout: float,
    is_causal: bool,
) -> Tensor:
    """Return attention `(n, num_heads, q, value_dim)`; if causal without `allowed`, q = k."""
    if softcap is None and allowed is None and not dropout and is_causal:
        return causal_attention(query, key, value, scaling)
    if softcap is None:
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            allowed,
            dropout,
            is_causal=is_causal and allowed is None,
            scale=scaling,
            enable_gqa=grouped,
        )
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    if allowed is None and is_causal:
        allowed = _allowed(query.shape[2], key.shape[2], None, query.device)
    scores = torch.tanh(query @ key.mT * (scaling / softcap)) * softcap
    scores = scores if allowed is None else scores.masked_fill(~allowed, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return F.dropout(weights, dropout) @ value


def flat_attention(
    module: nn.Module,
    query: Tensor,  # (1, num_heads, num_tokens, head_dim)
    key: Tensor,  # (1, num_kv_heads, num_tokens, head_dim)
    value: Tensor,  # (1, num_kv_heads, num_tokens, value_dim)
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    flat: AttentionMetadata | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return attention `(1, num_tokens, num_heads, value_dim)` and None for weights."""
    if flat is None:
        raise RuntimeError(
            "packed attention needs its boundaries: this model family did not pass `flat` on"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if flat.cache is not None:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        return flat.cache.attend(
            layer, query, key, value, flat.cu_seqlens, scaling, sliding_window, softcap
        ), None
    run = _with_before(module, query, key, value, flat)
    if flat.is_causal and softcap is None and not dropout and is_fast(query, key, value):
        return _end_to_end(*run, query.shape[-1], flat, scaling, sliding_window), None
    return _grouped(*run, query.shape[-1], flat, scaling, sliding_window, softcap, dropout), None


def _with_before(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, flat: AttentionMetadata
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values `(num_tokens, heads * head_dim)` after those of the prefix.

    Queries of the prefix are zero: their outputs are dropped.
    """
    query, key, value = (x[0].transpose(0, 1).flatten(1) for x in (query, key, value))
    if flat.captured_kv is not None:
        flat.captured_kv.layers[int(module.layer_idx)] = key, value  # type: ignore[arg-type]
    if flat.before is None:
        return query, key, value
    keys, values = flat.before.layers[int(module.layer_idx)]  # type: ignore[arg-type]
    return (
        torch.cat([query.new_zeros(len(keys), query.shape[1]), query]),
        torch.cat([keys, key]),
        torch.cat([values, value]),
    )


def _within(length: int, window: int | None) -> bool:
    return window is None or length <= window


def _end_to_end(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    width: int,
    flat: AttentionMetadata,
    scaling: float,
    window: int | None,
) -> Tensor:
    """Return attention within each sequence by the varlen kernel, without padding."""
    query, key, value = (x.unflatten(1, (-1, width)) for x in (query, key, value))
    if not flat.sequence_spans:
        return varlen_attention(query, key, value, flat.cu_seqlens, scaling, window)[None]
    tokens, bounds, own = flat.end_to_end
    query, key, value = (x.index_select(0, tokens) for x in (query, key, value))
    out = varlen_attention(query, key, value, bounds, scaling, window)
    return out.index_select(0, own)[None]


def _grouped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    width: int,
    flat: AttentionMetadata,
    scaling: float,
    window: int | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """Return attention within each sequence, a group at a time; padding is last, and masked.

    Attention of a shared prefix is repeated for each of its sequences, and these outputs dropped:
    only attention is repeated, no product with weights.
    """
    groups, order = flat.groups
    outputs = []
    for index, kept, lengths in groups:
        tokens = index.flatten().to(query.device)
        q, k, v = (
            x.index_select(0, tokens).view(*index.shape, -1, width).transpose(1, 2)
            for x in (query, key, value)
        )
        length = index.shape[1]
        if not flat.is_causal:
            allowed = _allowed_both_ways(lengths.to(query.device), length, window)
        elif _within(length, window):
            allowed = None
        else:
            allowed = _allowed(length, length, window, query.device)
        out = _attend(q, k, v, allowed, scaling, softcap, dropout, flat.is_causal)
        out = out.transpose(1, 2).flatten(0, 1)
        outputs.append(out if len(kept) == len(out) else out[kept.to(query.device)])
    together = torch.cat(outputs)
    in_order = len(groups) == 1 and bool((order == torch.arange(len(order))).all())
    return (together if in_order else together.index_select(0, order.to(query.device)))[None]


AttentionInterface.register(ATTENTION_NAME, flat_attention)
