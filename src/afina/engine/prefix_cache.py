"""Prefix cache: blocks of keys and values that later requests read instead of computing them.

    root ── "You are a hel" ── "pful clerk. Th" ──┬── "e case: ..."             base: shared by all
                                                  ├── "e case: ..." by 3f9a...  under an adapter
                                                  └── "e other ..."

A tree of full blocks. The key of a block is its tokens, the adapters that are active on them
(content hashes, not names), the salt of the request, and all blocks before it. Tokens before the
invocation of an activated adapter are computed by the base, so that the base and all activated
adapters share them. Requests with different salts share nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from time import monotonic

from afina.engine.block_pool import BLOCK_SIZE

# content hash, weight, first active token of the block
AdapterSpans = tuple[tuple[str, float, int], ...]
Key = tuple[tuple[int, ...], AdapterSpans, str]  # tokens, adapters, salt or owner of the block


@dataclass(eq=False)
class PrefixNode:
    """A full block.

    Attributes:
        ref_count: running sequences that read it.
        clients: clients whose requests have computed or read it.
    """

    key: Key
    page: int
    parent: "PrefixNode | None"
    children: dict[Key, "PrefixNode"] = field(default_factory=dict)
    depth: int = 0
    ref_count: int = 0
    last_used: float = 0.0  # seconds of the monotonic clock
    clients: set[str] = field(default_factory=set)


class PrefixCache:
    """Full blocks by their content; unread ones are evicted, least recently used first."""

    def __init__(self) -> None:
        self.root = PrefixNode(((), (), ""), -1, None, ref_count=1)
        self._by_page: dict[int, PrefixNode] = {}
        self._by_adapter: dict[str, set[PrefixNode]] = {}
        # candidates of `evict`, perhaps outdated: (last_used, -depth, block, id, node)
        self._idle: list[tuple[float, int, int, int, PrefixNode]] = []
        self.num_idle_blocks = 0  # blocks that no running sequence reads

    def __len__(self) -> int:
        return len(self._by_page)

    def match(self, keys: Sequence[Key]) -> list[PrefixNode]:
        """Return the nodes of the longest cached beginning of `keys`, kept until `release`."""
        node, found = self.root, []
        for key in keys:
            child = node.children.get(key)
            if child is None:
                break
            found.append(child)
            node = child
        for node in found:
            self._acquire(node)
        return found

    def insert(self, parent: PrefixNode, key: Key, page: int) -> PrefixNode:
        """Insert a full block after `parent`; return its node, or that of an equal cached block."""
        node = parent.children.get(key)
        if node is None:
            node = parent.children[key] = self._by_page[page] = PrefixNode(
                key, page, parent, depth=parent.depth + 1
            )
            for name in _adapters(key):
                self._by_adapter.setdefault(name, set()).add(node)
            self.num_idle_blocks += 1
        self._acquire(node)
        return node

    def _acquire(self, node: PrefixNode) -> None:
        if node.ref_count == 0:
            self.num_idle_blocks -= 1
        node.ref_count += 1
        node.last_used = monotonic()

    def release(self, nodes: Sequence[PrefixNode]) -> None:
        """Count these as read by one sequence less."""
        for node in reversed(nodes):
            node.ref_count -= 1
            if node.ref_count == 0:
                self.num_idle_blocks += 1
                self._offer(node)

    def _offer(self, node: PrefixNode) -> None:
        if not node.children and node.ref_count == 0 and node is not self.root:
            heappush(self._idle, (node.last_used, -node.depth, node.page, id(node), node))

    def oldest(self) -> float | None:
        """Return when the least recently used block was last read; None where all are in use."""
        while self._idle:
            used, _, page, _, node = self._idle[0]
            if (
                self._by_page.get(page) is node
                and node.ref_count == 0
                and not node.children
                and node.last_used == used
            ):
                return used
            heappop(self._idle)
        return None

    def evict(self) -> int | None:
        """Remove the least recently used leaf; return its block, or None where all are in use."""
        return None if self.oldest() is None else self._drop(heappop(self._idle)[4])

    def forget_adapter(self, adapter: str) -> list[int]:
        """Remove the unread blocks computed under this adapter; return them."""
        pages: list[int] = []
        for node in sorted(
            self._by_adapter.get(adapter, ()), key=lambda node: -node.depth
        ):  # children before their parents
            if node.ref_count == 0 and not node.children:
                pages.append(self._drop(node))
        return pages

    def _drop(self, node: PrefixNode) -> int:
        assert node.parent is not None
        del node.parent.children[node.key], self._by_page[node.page]
        for name in _adapters(node.key):
            self._by_adapter[name].discard(node)
            if not self._by_adapter[name]:
                del self._by_adapter[name]
        self.num_idle_blocks -= 1
        self._offer(node.parent)
        return node.page

    def moved(self, old: int, new: int) -> bool:
        """Note that block `old` is at `new`; return False where it is not cached."""
        node = self._by_page.pop(old, None)
        if node is None:
            return False
        node.page = new
        self._by_page[new] = node
        self._offer(node)  # its entry among the idle ones names the old page
        return True


def _adapters(key: Key) -> set[str]:
    """Return the adapters of a block, each once: a weighted sum may name one twice."""
    return {name for name, _, _ in key[1]}


def block_keys(
    tokens: Sequence[int],
    spans: Sequence[tuple[str, float, int]],
    owner: str,
    start: int,
    end: int,
    salt: str = "",
) -> list[Key]:
    """Return the keys of full blocks `start` to `end` (excluded) of a sequence.

    Args:
        spans: content hash, weight and first active token of each adapter.
        owner: of the adapters; blocks on which one is active are private to it.
        salt: all blocks are private to it; replaces `owner`.
    """
    keys: list[Key] = []
    for page in range(start, end):
        first = page * BLOCK_SIZE
        active = tuple(
            (name, weight, max(0, begin - first))
            for name, weight, begin in spans
            if begin < first + BLOCK_SIZE
        )
        private = salt or (owner if active else "")
        keys.append((tuple(tokens[first : first + BLOCK_SIZE]), active, private))
    return keys
