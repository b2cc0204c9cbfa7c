"""A request on its way through the engine: its tokens, its pages, and who acts on which of them."""

from dataclasses import dataclass, field

from afina.adapters.active import last_start
from afina.adapters.segments import Segment
from afina.engine.adapter_registry import AdapterRecord, LiveAdapter
from afina.engine.block_pool import BLOCK_SIZE
from afina.engine.detokenizer import Detokenizer
from afina.engine.prefix_cache import Key, PrefixNode, block_keys
from afina.engine.request import GenerationRequest, OnOutput
from afina.engine.sampler import Sampler


@dataclass(eq=False)
class SequenceState:
    """One prompt and its answer so far.

    `computed` tokens have their keys and values in `pages`; the first of these pages, `nodes`, are shared through the
    prefix tree. `acting` holds (content hash, weight, first token on which it acts) for those adapters that act at all.
    """

    seq_id: int
    request: GenerationRequest
    adapters: list[AdapterRecord | LiveAdapter]
    on_event: OnOutput
    sampler: Sampler
    text: Detokenizer
    max_total_tokens: int  # tokens, prompt and answer together
    token_ids: list[int] = field(default_factory=list)
    adapter_spans: list[tuple[str, float, int]] = field(default_factory=list)
    num_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    prefix_nodes: list[PrefixNode] = field(default_factory=list)
    num_cached_tokens: int = 0
    running: bool = False
    is_counted: bool = False  # among the figures

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt)
        for part, content in zip(self.request.adapters, self.adapters, strict=True):
            invocation = content.invocation
            start = last_start(self.token_ids, invocation) if invocation else 0
            if start is not None:
                self.adapter_spans.append((part.adapter, part.weight, start))

    @property
    def client_id(self) -> str:
        """Whose turn it counts as."""
        return self.request.client or "+".join(part.adapter for part in self.request.adapters)

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens that have no keys and values yet: 1 while it decodes."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_completion_tokens(self) -> int:
        """Tokens of the answer so far."""
        return len(self.token_ids) - len(self.request.prompt)

    @property
    def required_adapters(self) -> list[AdapterRecord | LiveAdapter]:
        """The adapters that act: one that is never invoked need not be there."""
        names = {name for name, _, _ in self.adapter_spans}
        return [content for content in self.adapters if content.hash in names]

    def block_keys(self, end: int) -> list[Key]:
        """Keys of the whole pages after those that the tree holds, up to page `end`."""
        return block_keys(
            self.token_ids, self.adapter_spans, self.request.owner, len(self.prefix_nodes), end
        )

    def segments(self, offset: int, count: int) -> list[Segment]:
        """Who acts on the next `count` tokens, which lie at `offset` of the flat run."""
        first, rows = self.num_computed_tokens, []
        labels = {content.hash: content.layer_key for content in self.adapters}
        for name, weight, start in self.adapter_spans:
            if start < first + count:
                rows.append(
                    Segment(offset + max(0, start - first), offset + count, labels[name], weight)
                )
        return rows

    def slot_mapping(self, count: int) -> list[int]:
        """Where the keys and values of the next `count` tokens go: page * PAGE + place in the page."""
        return [
            self.block_table[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE
            for at in range(self.num_computed_tokens, self.num_computed_tokens + count)
        ]
