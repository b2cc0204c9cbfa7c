"""Attention over a flat run of tokens: sequences one after another, no padding, no crossing.

It enters any transformers model through its own AttentionInterface, under the name "afina"; the boundaries
come with each forward as the keyword `flat`. When `flat` carries a cache, the keys and values of each
sequence are kept there and read back: the same function serves training, prefill and decoding.

    queries  (1, heads, T, head_dim)      T = tokens of all sequences together
"""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from afina.kernels.varlen_attention import causal_attention, fast, varlen_attention
from afina.models.paged_kv import KVShapeProbe, PagedKV

NAME = "afina"


Pieces = tuple[
    tuple[int, int], ...
]  # of one sequence: where its tokens stand, one stretch after another


@dataclass
class PrefixKV:
    """Keys and values of a run of `length` tokens, (length, heads * head_dim) a layer: one forward gives, others read."""

    length: int = 0
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass
class AttentionMetadata:
    """Boundaries of the sequences in a flat run: bounds = (0, end of first, ..., T); and perhaps a cache.

    A sequence may also begin with tokens that stand elsewhere: in the run, where another sequence has them too, or
    `before` it. Then `pieces` are each one's stretches, the last of them its own, counted over what is before and the run.
    `keep` takes the keys and values of this run, for others that come after it.
    """

    cu_seqlens: tuple[int, ...]
    cache: PagedKV | KVShapeProbe | None = None
    sequence_spans: tuple[Pieces, ...] = ()
    before: PrefixKV | None = None
    captured_kv: PrefixKV | None = None

    @cached_property
    def groups(self) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Sequences of about equal length side by side, so that many short ones are one call of attention.

        For each group (index, kept): index (n, L) picks its tokens from the run, short sequences going on with their
        last token; kept are the places of those that are its own among the n * L. Then the order that puts the groups'
        own tokens, end to end, back into the run. Padding is at most a fifth of the tokens.
        """
        sequences = self.sequence_spans or tuple(
            ((start, end),) for start, end in pairwise(self.cu_seqlens)
        )
        sizes = {pieces: sum(end - start for start, end in pieces) for pieces in sequences}
        groups: list[list[Pieces]] = []
        for pieces in sorted(sequences, key=lambda pieces: sizes[pieces]):
            real = sum(sizes[other] for other in groups[-1]) if groups else 0
            if groups and sizes[pieces] * (len(groups[-1]) + 1) <= 1.2 * (real + sizes[pieces]):
                groups[-1].append(pieces)
            else:
                groups.append([pieces])
        made, order = [], []
        for group in groups:
            longest = sizes[group[-1]]
            rows = [
                [place for start, end in pieces for place in range(start, end)] for pieces in group
            ]
            index = torch.tensor([row + row[-1:] * (longest - len(row)) for row in rows])
            along, ends = (
                torch.arange(longest),
                torch.tensor([sizes[pieces] for pieces in group])[:, None],
            )
            own = torch.tensor([pieces[-1][1] - pieces[-1][0] for pieces in group])[:, None]
            made.append((index, ((along >= ends - own) & (along < ends)).flatten().nonzero()[:, 0]))
            order.append(index.flatten()[made[-1][1]])
        return made, torch.cat(order).argsort()

    @cached_property
    def end_to_end(self) -> tuple[Tensor, tuple[int, ...], Tensor]:
        """Whole sequences one after another, what they share once more for each: their tokens' places in the run, their
        boundaries, and where among these tokens the run's own ones are, in the run's order."""
        rows = [
            [place for start, end in pieces for place in range(start, end)]
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
            torch.tensor([place for row in rows for place in row]),
            bounds,
            torch.tensor([at for _, at in sorted(own)]),
        )


def _allowed(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys each query may see, the last query standing at the last key: bool (queries, keys)."""
    position = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)[None]
    allowed = key <= position
    return allowed if window is None else allowed & (key > position - window)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None,
    scaling: float,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """Attention of queries (1, H, n, D) to keys (1, Hkv, m, D); `allowed` None means plain causal with n = m."""
    if softcap is None and allowed is None and not dropout:
        return causal_attention(query, key, value, scaling)
    if softcap is None:
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            allowed,
            dropout,
            is_causal=allowed is None,
            scale=scaling,
            enable_gqa=grouped,
        )
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    if allowed is None:
        allowed = _allowed(query.shape[2], key.shape[2], None, query.device)
    scores = torch.tanh(query @ key.mT * (scaling / softcap)) * softcap
    weights = (
        scores.masked_fill(~allowed, float("-inf")).softmax(-1, dtype=torch.float32).to(query.dtype)
    )
    return F.dropout(weights, dropout) @ value


def flat_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    flat: AttentionMetadata | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function over a flat run; returns (1, T, heads, head_dim) and no weights."""
    if flat is None:
        raise RuntimeError(
            "flat attention needs its boundaries: this model family did not pass `flat` on"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if flat.cache is not None:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        return flat.cache.attend(
            layer, query, key, value, flat.cu_seqlens, scaling, sliding_window, softcap
        ), None
    run = _with_before(module, query, key, value, flat)
    if softcap is None and not dropout and fast(query, key, value):
        return _end_to_end(*run, query.shape[-1], flat, scaling, sliding_window), None
    return _grouped(*run, query.shape[-1], flat, scaling, sliding_window, softcap, dropout), None


def _with_before(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, flat: AttentionMetadata
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as (T, heads * head_dim) each, after those of what is before (whose queries nobody needs)."""
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
    """Attention within each sequence by the kernel that needs no padding; otherwise as `_grouped`."""
    query, key, value = (x.unflatten(1, (-1, width)) for x in (query, key, value))
    if not flat.sequence_spans:
        return varlen_attention(query, key, value, flat.cu_seqlens, scaling, window)[None]
    places, bounds, own = flat.end_to_end
    query, key, value = (x.index_select(0, places) for x in (query, key, value))
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
    """Attention within each sequence, a group of them at a time; padding stands behind, where causality hides it.

    Queries, keys and values are (T, heads * width). What a sequence shares is attended from once more for each that has it:
    these outputs are dropped, so that only attention is done twice, and no product.
    """
    groups, order = flat.groups
    outputs = []
    for index, kept in groups:
        places = index.flatten().to(query.device)
        q, k, v = (
            x.index_select(0, places).view(*index.shape, -1, width).transpose(1, 2)
            for x in (query, key, value)
        )
        length = index.shape[1]
        allowed = (
            None if _within(length, window) else _allowed(length, length, window, query.device)
        )
        out = _attend(q, k, v, allowed, scaling, softcap, dropout).transpose(1, 2).flatten(0, 1)
        outputs.append(out if len(kept) == len(out) else out[kept.to(query.device)])
    together = torch.cat(outputs)
    in_order = len(groups) == 1 and bool((order == torch.arange(len(order))).all())
    return (together if in_order else together.index_select(0, order.to(query.device)))[None]


AttentionInterface.register(NAME, flat_attention)
