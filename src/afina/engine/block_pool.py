"""One pool of pages for everything that comes and goes: keys and values, and adapters of every rank.

    pages   | A A A | . | B B | . . | k | k k | k |       A, B: adapters, each on a run of pages from the low end up
              low end                      high end        k: keys and values of 16 tokens in all layers, from the top down

Nothing is set aside for either, so nothing lies idle (S-LoRA's unified paging, arXiv 2311.03285). A page of keys and values
may be anywhere, so it moves aside where an adapter needs a run: adapters of any size find a place as long as there is one.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_SIZE = 16  # tokens whose keys and values share a page

FREE, KEYS, ADAPTER = 0, 1, 2


@dataclass(frozen=True)
class KVLayerShape:
    """What one attention layer keeps of a token: twice `heads` vectors of `width` numbers."""

    heads: int
    width: int

    @property
    def numel_per_block(self) -> int:
        """Numbers a page."""
        return 2 * self.heads * BLOCK_SIZE * self.width


class BlockPool:
    """`count` pages of one size, in one tensor.

    `moved(old, new)` is called for each page of keys and values that had to make room: whoever holds it writes the new
    number down.
    """

    def __init__(
        self, count: int, layers: Iterable[KVLayerShape], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.layers = list(layers)
        self.numbers = sum(layer.numel_per_block for layer in self.layers)  # of one page
        self.memory = torch.empty(
            count, self.numbers, dtype=dtype, device=device
        )  # touched page by page, as they are used
        self.on_block_moved: Callable[[int, int], None] = ignore_move
        self._use = bytearray(count)
        self._free = count

    @property
    def count(self) -> int:
        """All pages."""
        return len(self._use)

    @property
    def num_free_blocks(self) -> int:
        """Pages that hold nothing."""
        return self._free

    @property
    def page_bytes(self) -> int:
        """Size of a page."""
        return self.numbers * self.memory.element_size()

    def views(self) -> list[Tensor]:
        """Each layer's keys and values: (pages, 2, heads, PAGE, width), strided over the pages."""
        views, offset = [], 0
        for layer in self.layers:
            part = self.memory[:, offset : offset + layer.numel_per_block]
            views.append(part.unflatten(1, (2, layer.heads, BLOCK_SIZE, layer.width)))
            offset += layer.numel_per_block
        return views

    def blocks_for(self, numbers: int) -> int:
        """How many pages hold so many numbers."""
        return -(-numbers // self.numbers)

    # ---- keys and values

    def allocate(self) -> int | None:
        """A page for keys and values; None where the pool is full."""
        page = self._use.rfind(FREE)
        if page < 0:
            return None
        self._use[page] = KEYS
        self._free -= 1
        return page

    def free(self, page: int) -> None:
        """A page of keys and values is free again."""
        self._use[page] = FREE
        self._free += 1

    # ---- adapters

    def allocate_contiguous(self, length: int) -> int | None:
        """The first of `length` pages in a row, for an adapter; None where there are not as many free ones.

        Pages of keys and values in the way move to free ones elsewhere; adapters stay where they are.
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
        """Where a run without adapters has the fewest pages of keys and values; the lowest of several."""
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
        """An adapter's pages are free again."""
        self._use[start : start + length] = bytes(length)
        self._free += length

    def contiguous_view(self, start: int, numbers: int) -> Tensor:
        """The first `numbers` numbers from page `start` on: a flat view."""
        offset = start * self.numbers
        return self.memory.view(-1)[offset : offset + numbers]


def ignore_move(old: int, new: int) -> None:
    """Do nothing when block `old` moves to `new`."""
