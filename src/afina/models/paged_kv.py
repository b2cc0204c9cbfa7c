"""Keys and values on pages of a pool: what a forward of the serving engine carries beside its boundaries."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from afina.kernels.paged_attention import paged_attention, paged_write


@dataclass
class PagedKVCache:
    """Where each token of a flat run puts its keys and values, and where each sequence finds those before.

    `layers` are the pool's views, (pages, 2, kv_heads, page_size, head_dim) each; `slots` (T) int64; `pasts` tokens that are
    in already, a sequence; `tables` (sequences, most pages) int32.
    """

    layers: list[Tensor]
    slot_mapping: Tensor
    pasts: list[int]
    tables: Tensor

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bounds: tuple[int, ...],
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Attention of query (1, heads, T, head_dim) after key and value went in: (1, T, heads, head_dim)."""
        kv = self.layers[layer]
        paged_write(key[0].transpose(0, 1), value[0].transpose(0, 1), kv, self.slot_mapping)
        queries = query[0].transpose(0, 1)
        return paged_attention(
            queries, kv, bounds, self.pasts, self.tables, scaling, window, softcap
        )[None]

    def advance(self, bounds: tuple[int, ...]) -> None:
        """Nothing to count: the scheduler does."""


@dataclass
class KVShapeProbe:
    """Stands for a cache in one forward, and notes what each layer would keep: (kv_heads, head_dim)."""

    shapes: dict[int, tuple[int, int]]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Tensor:
        """Zeros in the shape of the answer."""
        if key.shape != value.shape:
            raise ValueError("keys and values of different widths")
        self.shapes[layer] = (key.shape[1], key.shape[3])
        return torch.zeros_like(query).transpose(1, 2)

    def advance(self, bounds: tuple[int, ...]) -> None:
        """Nothing to count."""
