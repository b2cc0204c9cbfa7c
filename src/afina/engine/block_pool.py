"""One pool of blocks for keys and values and for adapters of every rank.

    blocks  | A A A | . | B B | . . | k | k k | k |    A, B: adapters, contiguous, from the low end
              low end                     high end     k: 16 tokens in all layers, from the high end

Neither has a reserved part (unified paging of S-LoRA, arXiv 2311.03285). A block of keys and values
may be anywhere, so it moves where an adapter needs contiguous blocks.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_SIZE = 16  # tokens whose keys and values share a block

FREE, KEYS, ADAPTER = 0, 1, 2


@dataclass(frozen=True)
class KVLayerShape:
    """Keys and values of a token in one attention layer: 2 * `heads` vectors of `width`."""

    heads: int
    width: int

    @property
    def numel_per_block(self) -> int:
        """Elements of the layer in a block."""
        return 2 * self.heads * BLOCK_SIZE * self.width


class BlockPool:
    """`count` blocks of one size, in one tensor.

    Attributes:
        on_block_moved: called with the old and new index of each block of keys and values that
            moved to free contiguous blocks.
    """

    def __init__(
        self, count: int, layers: Iterable[KVLayerShape], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.layers = list(layers)
        self.numbers = sum(layer.numel_per_block for layer in self.layers)  # of one block
        # the operating system maps pages on first use: unused blocks take no memory on a CPU
        self.memory = torch.empty(count, self.numbers, dtype=dtype, device=device)
        self.on_block_moved: Callable[[int, int], None] = ignore_move
        self._use = bytearray(count)
        self._free = count

    @property
    def count(self) -> int:
        """Number of blocks."""
        return len(self._use)

    @property
    def num_free_blocks(self) -> int:
        """Number of unused blocks."""
        return self._free

    @property
    def page_bytes(self) -> int:
        """Size of a block in bytes."""
        return self.numbers * self.memory.element_size()

    def views(self) -> list[Tensor]:
        """Return a view of each layer: `(num_blocks, 2, heads, BLOCK_SIZE, width)`."""
        views, offset = [], 0
        for layer in self.layers:
            part = self.memory[:, offset : offset + layer.numel_per_block]
            views.append(part.unflatten(1, (2, layer.heads, BLOCK_SIZE, layer.width)))
            offset += layer.numel_per_block
        return views

    def blocks_for(self, numbers: int) -> int:
        """Return how many blocks store `numbers` elements."""
        return -(-numbers // self.numbers)

    # ---- keys and values

    def allocate(self) -> int | None:
        """Return a block for keys and values; None where the pool is full."""
        page = self._use.rfind(FREE)
        if page < 0:
            return None
        self._use[page] = KEYS
        self._free -= 1
        return page

    def free(self, page: int) -> None:
        """Return a block of keys and values to the pool."""
        self._use[page] = FREE
        self._free += 1

    # ---- adapters

    def allocate_contiguous(self, length: int) -> int | None:
        """Return the first of `length` contiguous blocks for an adapter; None if too few are free.

        Blocks of keys and values in the way move to free ones; adapters do not move.
        """
        if length > self._free:
            return None
        start = self._least_used(length)
        if start is None:
            return None
        run = range(start, start + length)
        in_the_way = [page for page in run if self._use[page] == KEYS]
        for page in run:
            self._use[page] = ADAPTER
        for old in in_the_way:
            new = self._use.rfind(FREE)
            self.memory[new].copy_(self.memory[old])
            self._use[new] = KEYS
            self.on_block_moved(old, new)
        self._free -= length
        return start

    def _least_used(self, length: int) -> int | None:
        """Return the lowest start of a run without adapters and with the fewest blocks in use."""
        best, best_cost, cost, barrier = None, length + 1, 0, -1
        for end, use in enumerate(self._use):
            cost += use == KEYS
            if use == ADAPTER:
                barrier = end
            start = end - length + 1
            if start < 0:
                continue
            if start > barrier and cost < best_cost:
                best, best_cost = start, cost
                if cost == 0:
                    break
            cost -= self._use[start] == KEYS
        return best

    def free_contiguous(self, start: int, length: int) -> None:
        """Return the blocks of an adapter to the pool."""
        self._use[start : start + length] = bytes(length)
        self._free += length

    def contiguous_view(self, start: int, numbers: int) -> Tensor:
        """Return a flat view of the first `numbers` elements from block `start` on."""
        offset = start * self.numbers
        return self.memory.view(-1)[offset : offset + numbers]


def ignore_move(old: int, new: int) -> None:
    """Do nothing when block `old` moves to `new`."""
