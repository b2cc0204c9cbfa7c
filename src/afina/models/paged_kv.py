"""Keys and values of one forward pass in blocks of the engine's pool."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from afina.kernels.paged_attention import paged_attention, paged_write


@dataclass
class PagedKV:
    """Where a forward pass writes keys and values, and where it finds those of earlier tokens.

    Attributes:
        layers: the pool's view of each attention layer, by `layer_idx`:
            `(num_blocks, 2, num_kv_heads, block_size, head_dim)`.
        slot_mapping: int64 `(num_tokens,)`, `block * block_size + offset` of each new token.
        pasts: number of earlier tokens of each sequence.
        tables: int32 `(num_sequences, max_blocks)`, the block table of each sequence.
    """

    layers: dict[int, Tensor]
    slot_mapping: Tensor
    pasts: list[int]
    tables: Tensor

    def attend(
        self,
        layer: int,
        query: Tensor,  # (1, num_heads, num_tokens, head_dim)
        key: Tensor,  # (1, num_kv_heads, num_tokens, head_dim)
        value: Tensor,  # (1, num_kv_heads, num_tokens, value_dim)
        cu_seqlens: tuple[int, ...],
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Write keys and values; return attention `(1, num_tokens, num_heads, value_dim)`.

        Keys and values of different widths (multi-head latent attention) share the wider one:
        zeros in a key change no score, and zeros in a value are cut from the result.
        """
        kv, value_dim = self.layers[layer], value.shape[-1]
        query, key, value = (
            x[0].transpose(0, 1) if x.shape[-1] == kv.shape[-1] else _widen(x, kv.shape[-1])
            for x in (query, key, value)
        )
        paged_write(key, value, kv, self.slot_mapping)
        out = paged_attention(
            query, kv, cu_seqlens, self.pasts, self.tables, scaling, window, softcap
        )
        return out[None, ..., :value_dim]


def _widen(x: Tensor, width: int) -> Tensor:  # x: (1, num_heads, num_tokens, head_dim)
    """Return x as `(num_tokens, num_heads, width)`, zeros after its own head_dim."""
    return F.pad(x[0].transpose(0, 1), (0, width - x.shape[-1]))


@dataclass
class KVShapeProbe:
    """Stand-in for `PagedKV` that records the key and value shape of each attention layer.

    Attributes:
        shapes: `(num_kv_heads, head_dim)` by `layer_idx`; the wider of key and value counts.
    """

    shapes: dict[int, tuple[int, int]]

    def attend(
        self,
        layer: int,
        query: Tensor,  # (1, num_heads, num_tokens, head_dim)
        key: Tensor,  # (1, num_kv_heads, num_tokens, head_dim)
        value: Tensor,  # (1, num_kv_heads, num_tokens, value_dim)
        *others: Any,
    ) -> Tensor:
        """Record the layer's shape; return zeros `(1, num_tokens, num_heads, value_dim)`."""
        self.shapes[layer] = (key.shape[1], max(key.shape[3], value.shape[3]))
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])
