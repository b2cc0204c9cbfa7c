"""What an engine keeps of computed tokens: keys and values in blocks, or nothing.

PagedKVCache     a step computes new tokens only; earlier keys and values are read from the pool
RecomputeCache   a step computes each sequence from its first token
"""

import sys
from collections.abc import Sequence
from itertools import accumulate
from typing import ClassVar, Protocol

import torch

from afina.engine.block_pool import BLOCK_SIZE, BlockPool, KVLayerShape
from afina.engine.sequence import ScheduledChunk
from afina.errors import BaseError
from afina.kernels.paged_attention import pad_block_tables
from afina.models.causal_lm import CausalLM
from afina.models.packed_attention import AttentionMetadata
from afina.models.paged_kv import KVShapeProbe, PagedKV


class KVCache(Protocol):
    """Keys and values between the steps of an engine.

    Attributes:
        keeps_tokens: whether a computed token stays computed; otherwise each step computes the
            full sequence, and prompts are not split.
        block_size: tokens of a sequence that share a block.
        layers: shapes that a block stores, by `layer_idx`.
    """

    keeps_tokens: ClassVar[bool]
    block_size: ClassVar[int]
    layers: dict[int, KVLayerShape]

    def bind(self, pool: BlockPool) -> None:
        """Use the blocks of `pool`, whose layers are this cache's."""

    def metadata(self, chunks: Sequence[ScheduledChunk]) -> AttentionMetadata:
        """Return boundaries and cache access of a forward pass over `chunks`."""


class PagedKVCache:
    """Keys and values in blocks of the pool, shared between sequences with equal beginnings."""

    keeps_tokens: ClassVar[bool] = True
    block_size: ClassVar[int] = BLOCK_SIZE

    def __init__(self, base: CausalLM) -> None:
        """Raise `BaseError` where the attention of `base` cannot read its keys from blocks."""
        self.layers = kv_layer_shapes(base)
        self._views: dict[int, torch.Tensor] = {}

    def bind(self, pool: BlockPool) -> None:
        """Use the blocks of `pool`, whose layers are this cache's."""
        self._views = dict(zip(self.layers, pool.views(), strict=True))

    def metadata(self, chunks: Sequence[ScheduledChunk]) -> AttentionMetadata:
        """Return boundaries of a forward pass over `chunks`, with their blocks and slots."""
        device = next(iter(self._views.values())).device
        slots = [slot for sequence, count in chunks for slot in sequence.slot_mapping(count)]
        paged = PagedKV(
            self._views,
            torch.tensor(slots, device=device),
            [sequence.num_computed_tokens for sequence, _ in chunks],
            pad_block_tables([sequence.block_table for sequence, _ in chunks]),
        )
        return AttentionMetadata(cu_seqlens_of(chunks), paged)


class RecomputeCache:
    """No keys and values: for state-space models, attention sinks, and what cannot be paged.

    A sequence has one block, which stores nothing, so that the scheduler counts it as any other.
    """

    keeps_tokens: ClassVar[bool] = False
    block_size: ClassVar[int] = sys.maxsize

    def __init__(self) -> None:
        # 16,384 elements a block: small for one sequence, and few blocks for one adapter
        self.layers = {0: KVLayerShape(1, 512)}

    def bind(self, pool: BlockPool) -> None:
        """Ignore the pool: no block is read."""

    def metadata(self, chunks: Sequence[ScheduledChunk]) -> AttentionMetadata:
        """Return boundaries of a forward pass over `chunks`."""
        return AttentionMetadata(cu_seqlens_of(chunks))


def select_cache(base: CausalLM) -> KVCache:
    """Return a `PagedKVCache`, or a `RecomputeCache` where the family cannot be paged."""
    try:
        return PagedKVCache(base)
    except BaseError:
        return RecomputeCache()


def cu_seqlens_of(chunks: Sequence[ScheduledChunk]) -> tuple[int, ...]:
    """Return the cumulative lengths of `chunks`, beginning with 0."""
    return (0, *accumulate(count for _, count in chunks))


@torch.no_grad()
def kv_layer_shapes(base: CausalLM) -> dict[int, KVLayerShape]:
    """Return what each attention layer keeps of a token, by `layer_idx`.

    Raises:
        BaseError: the family does not take packed sequences with a cache.
    """
    shapes: dict[int, tuple[int, int]] = {}
    why = "its layers do not take packed sequences with a cache"
    if base.supports_packing:
        tokens = torch.zeros(2, dtype=torch.int64, device=base.device)
        try:
            base.model.base_model(
                input_ids=tokens[None],
                position_ids=torch.arange(2, device=base.device)[None],
                use_cache=False,
                flat=AttentionMetadata((0, 2), KVShapeProbe(shapes)),
            )
        except (ValueError, RuntimeError) as error:
            why = str(error)
            shapes = {}
    if not shapes:
        raise BaseError("attention of this family cannot be paged", where=base.name, why=why)
    return {layer: KVLayerShape(*shapes[layer]) for layer in sorted(shapes)}
