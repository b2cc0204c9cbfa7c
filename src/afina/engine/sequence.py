"""A request on its way through the engine: its tokens, its pages, and who acts on which of them."""

from dataclasses import dataclass, field

from afina.engine.pages import PAGE
from afina.engine.prefix import Key, Node, keys_of
from afina.engine.request import OnEvent, Request
from afina.engine.sampling import Chooser
from afina.engine.shelf import Content, Lent
from afina.engine.text import Text
from afina.route.invocation import last_start
from afina.segments import Segment


@dataclass(eq=False)
class Sequence:
    """One prompt and its answer so far.

    `computed` tokens have their keys and values in `pages`; the first of these pages, `nodes`, are shared through the
    prefix tree. `acting` holds (content hash, weight, first token on which it acts) for those adapters that act at all.
    """

    number: int
    request: Request
    contents: list[Content | Lent]
    on_event: OnEvent
    chooser: Chooser
    text: Text
    limit: int  # tokens, prompt and answer together
    tokens: list[int] = field(default_factory=list)
    acting: list[tuple[str, float, int]] = field(default_factory=list)
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    cached: int = 0
    running: bool = False
    counted: bool = False  # among the figures

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)
        for part, content in zip(self.request.parts, self.contents, strict=True):
            invocation = content.invocation
            start = last_start(self.tokens, invocation) if invocation else 0
            if start is not None:
                self.acting.append((part.adapter, part.weight, start))

    @property
    def client(self) -> str:
        """Whose turn it counts as."""
        return self.request.client or "+".join(part.adapter for part in self.request.parts)

    @property
    def left(self) -> int:
        """Tokens that have no keys and values yet: 1 while it decodes."""
        return len(self.tokens) - self.computed

    @property
    def answer(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def needed(self) -> list[Content | Lent]:
        """The adapters that act: one that is never invoked need not be there."""
        names = {name for name, _, _ in self.acting}
        return [content for content in self.contents if content.hash in names]

    def keys(self, end: int) -> list[Key]:
        """Keys of the whole pages after those that the tree holds, up to page `end`."""
        return keys_of(self.tokens, self.acting, self.request.owner, len(self.nodes), end)

    def rows(self, offset: int, count: int) -> list[Segment]:
        """Who acts on the next `count` tokens, which lie at `offset` of the flat run."""
        first, rows = self.computed, []
        labels = {content.hash: content.label for content in self.contents}
        for name, weight, start in self.acting:
            if start < first + count:
                rows.append(Segment(offset + max(0, start - first), offset + count, labels[name], weight))
        return rows

    def slots(self, count: int) -> list[int]:
        """Where the keys and values of the next `count` tokens go: page * PAGE + place in the page."""
        return [self.pages[at // PAGE] * PAGE + at % PAGE for at in range(self.computed, self.computed + count)]
