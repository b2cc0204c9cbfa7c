"""State of one request in the engine: its tokens, its blocks, and the adapters of its tokens."""

from dataclasses import dataclass, field
from enum import Enum, auto

from torch import Tensor

from afina.adapters.active import last_start
from afina.adapters.segments import Segment
from afina.engine.adapter_registry import AdapterRecord, LiveAdapter
from afina.engine.block_pool import BLOCK_SIZE
from afina.engine.detokenizer import Detokenizer
from afina.engine.prefix_cache import Key, PrefixNode, block_keys
from afina.engine.request import GenerationRequest, Logprob, OnOutput
from afina.engine.sampler import Sampler

AdapterSpan = tuple[str, float, int]  # content hash, weight, first token


class SequenceStatus(Enum):
    """Stage of a sequence in the scheduler."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(eq=False)
class SequenceState:
    """One prompt and its completion so far.

    Attributes:
        max_total_tokens: limit of prompt and completion together, in tokens.
        adapter_spans: adapters that are active on some token.
        num_computed_tokens: tokens whose keys and values are in `block_table`.
        prefix_nodes: the first blocks of `block_table`, shared through the prefix cache.
        num_cached_tokens: prompt tokens that came from the prefix cache.
        is_counted: whether the engine's statistics include it.
        hidden_sum: sum of the last hidden states so far, float32 `(hidden_size,)`, of a request
            for an embedding.
        prompt_logprobs: of the prompt's tokens after the first, where they are requested.
    """

    seq_id: int
    request: GenerationRequest
    adapters: list[AdapterRecord | LiveAdapter]
    on_output: OnOutput
    sampler: Sampler
    text: Detokenizer
    max_total_tokens: int
    token_ids: list[int] = field(default_factory=list)
    adapter_spans: list[AdapterSpan] = field(default_factory=list)
    num_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    prefix_nodes: list[PrefixNode] = field(default_factory=list)
    num_cached_tokens: int = 0
    status: SequenceStatus = SequenceStatus.WAITING
    is_counted: bool = False
    hidden_sum: Tensor | None = None
    prompt_logprobs: list[Logprob] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt)
        for part, content in zip(self.request.adapters, self.adapters, strict=True):
            invocation = content.invocation
            start = last_start(self.token_ids, invocation) if invocation else 0
            if start is not None:
                self.adapter_spans.append((part.adapter, part.weight, start))

    @property
    def is_running(self) -> bool:
        """Whether the scheduler has admitted the sequence."""
        return self.status is SequenceStatus.RUNNING

    @property
    def client_id(self) -> str:
        """Client of the fair queue: the request's own, or else its set of adapters."""
        return self.request.client or "+".join(part.adapter for part in self.request.adapters)

    @property
    def is_scored(self) -> bool:
        """Whether the next chunk is a part of a prompt whose log-probabilities are requested."""
        return self.request.sampling.prompt_logprobs is not None and self.num_completion_tokens == 0

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens without keys and values: 1 while it decodes from a cache."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_completion_tokens(self) -> int:
        """Generated tokens so far."""
        return len(self.token_ids) - len(self.request.prompt)

    @property
    def required_adapters(self) -> list[AdapterRecord | LiveAdapter]:
        """Adapters that are active on some token; one that is never invoked is not loaded."""
        names = {name for name, _, _ in self.adapter_spans}
        return [content for content in self.adapters if content.hash in names]

    @property
    def is_exclusive(self) -> bool:
        """Whether an adapter replaces base modules, so that only its own sequences share a step."""
        return any(
            isinstance(content, LiveAdapter) and content.replaces_base for content in self.adapters
        )

    def can_share_step(self, other: "SequenceState") -> bool:
        """Return whether the two may be in one forward pass."""
        if not self.is_exclusive and not other.is_exclusive:
            return True
        return self.adapter_spans == other.adapter_spans

    def add_text(self, token: int) -> str:
        """Return the text that is certain after `token`; nothing while no caller streams it."""
        return self.text.add(token) if self._is_detokenized else ""

    def end_text(self, has_stop_token: bool = False) -> str:
        """Return the rest of the text; `has_stop_token`: the last token is no part of it."""
        if self._is_detokenized:
            return self.text.end()
        end = len(self.token_ids) - has_stop_token
        return self.text.decode(self.token_ids[len(self.request.prompt) : end])

    @property
    def _is_detokenized(self) -> bool:
        return self.request.streams or bool(self.request.sampling.stop)

    def block_keys(self, end: int) -> list[Key]:
        """Return keys of the full blocks after those in the prefix cache, up to block `end`."""
        request, start = self.request, len(self.prefix_nodes)
        return block_keys(
            self.token_ids, self.adapter_spans, request.owner, start, end, request.cache_salt
        )

    def segments(self, offset: int, count: int) -> list[Segment]:
        """Return the adapter segments of the next `count` tokens, which begin at `offset`."""
        first, segments = self.num_computed_tokens, []
        labels = {content.hash: content.layer_key for content in self.adapters}
        for name, weight, start in self.adapter_spans:
            if start < first + count:
                begin = offset + max(0, start - first)
                segments.append(Segment(begin, offset + count, labels[name], weight))
        return segments

    def slot_mapping(self, count: int) -> list[int]:
        """Return `block * BLOCK_SIZE + offset` for keys and values of the next `count` tokens."""
        return [
            self.block_table[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE
            for at in range(self.num_computed_tokens, self.num_computed_tokens + count)
        ]


ScheduledChunk = tuple[SequenceState, int]  # a sequence and how many of its next tokens
