"""The prefix cache: pages of keys and values that later requests may read instead of computing them.

    root ── "You are a hel" ── "pful judge. Th" ──┬── "e case: ..."              base: everybody's
                                                  ├── "e case: ..." by 3f9a...    under an adapter: only its own
                                                  └── "e other ..."

A tree of whole pages, shared by all requests. A page is known by its tokens, by who acted on them (content hashes of
adapters, never names) and by all pages before it. What comes before an activated adapter's invocation was made by the base
alone, so the base and all activated adapters share it, in both directions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from time import monotonic

from afina.engine.block_pool import BLOCK_SIZE

AdapterSpans = tuple[
    tuple[str, float, int], ...
]  # (content hash, weight, first token of the page on which it acts)
Key = tuple[tuple[int, ...], AdapterSpans, str]  # tokens, who acted, whose private page it is


@dataclass(eq=False)
class PrefixNode:
    """One page that is filled; `users` are the running sequences that read it."""

    key: Key
    page: int
    parent: "PrefixNode | None"
    children: dict[Key, "PrefixNode"] = field(default_factory=dict)
    depth: int = 0
    ref_count: int = 0
    last_used: float = 0.0  # when it was last wanted, seconds of the monotonic clock


class PrefixCache:
    """Filled pages by what they hold; those that nobody reads are forgotten, the longest unused first."""

    def __init__(self) -> None:
        self.root = PrefixNode(((), (), ""), -1, None, ref_count=1)
        self._by_page: dict[int, PrefixNode] = {}
        self._by_adapter: dict[str, set[PrefixNode]] = {}
        # what `forget` may take, perhaps outdated: (used, -depth, page, id, node)
        self._idle: list[tuple[float, int, int, int, PrefixNode]] = []
        self.num_idle_blocks = 0  # pages that no running sequence reads

    def __len__(self) -> int:
        return len(self._by_page)

    def match(self, keys: Sequence[Key]) -> list[PrefixNode]:
        """The nodes of the longest known beginning of `keys`; they are held until `leave`."""
        node, found = self.root, []
        for key in keys:
            child = node.children.get(key)
            if child is None:
                break
            found.append(child)
            node = child
        for node in found:
            self._hold(node)
        return found

    def insert(self, parent: PrefixNode, key: Key, page: int) -> PrefixNode:
        """Enter a filled page after `parent`; where the tree has an equal one, that one is returned, held."""
        node = parent.children.get(key)
        if node is None:
            node = parent.children[key] = self._by_page[page] = PrefixNode(
                key, page, parent, depth=parent.depth + 1
            )
            for name in _adapters(key):
                self._by_adapter.setdefault(name, set()).add(node)
            self.num_idle_blocks += 1
        self._hold(node)
        return node

    def _hold(self, node: PrefixNode) -> None:
        if node.ref_count == 0:
            self.num_idle_blocks -= 1
        node.ref_count += 1
        node.last_used = monotonic()

    def release(self, nodes: Sequence[PrefixNode]) -> None:
        """A sequence reads these no more."""
        for node in reversed(nodes):
            node.ref_count -= 1
            if node.ref_count == 0:
                self.num_idle_blocks += 1
                self._offer(node)

    def _offer(self, node: PrefixNode) -> None:
        if not node.children and node.ref_count == 0 and node is not self.root:
            heappush(self._idle, (node.last_used, -node.depth, node.page, id(node), node))

    def oldest(self) -> float | None:
        """When the longest unused page was last wanted; None where all are read."""
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
        """Forget the longest unused page that nothing depends on; returns it, or None where all are read."""
        return None if self.oldest() is None else self._drop(heappop(self._idle)[4])

    def forget_adapter(self, adapter: str) -> list[int]:
        """Forget the pages that this adapter made and nobody reads: without it, they are of no use."""
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
        """The page `old` lies at `new` now; False where the tree does not hold it."""
        node = self._by_page.pop(old, None)
        if node is None:
            return False
        node.page = new
        self._by_page[new] = node
        self._offer(node)  # its entry among the idle ones names the old page
        return True


def _adapters(key: Key) -> set[str]:
    """The adapters that made a page, each once: a sum may name one twice."""
    return {name for name, _, _ in key[1]}


def block_keys(
    tokens: Sequence[int],
    acting: Sequence[tuple[str, float, int]],
    owner: str,
    start: int,
    end: int,
) -> list[Key]:
    """Keys of the whole pages start..end (numbers of pages) of a sequence.

    `acting` holds (content hash, weight, first token on which it acts).
    """
    keys: list[Key] = []
    for page in range(start, end):
        first = page * BLOCK_SIZE
        who = tuple(
            (name, weight, max(0, begin - first))
            for name, weight, begin in acting
            if begin < first + BLOCK_SIZE
        )
        keys.append((tuple(tokens[first : first + BLOCK_SIZE]), who, owner if who else ""))
    return keys
