"""One forward: the pieces that the scheduler chose, laid end to end, and the logits of those that are complete.

pieces   | prompt of s4, tokens 512..767 | s1 | s2 | s3 |        one flat run
rows       (0, 256, "law")                 (256, 257, "tone") ...     who acts on which of them
"""

from collections.abc import Sequence as Many
from itertools import accumulate

import torch
from torch import Tensor

from afina.adapters.segments import Segment, Segments
from afina.engine.block_pool import BlockPool, KVLayerShape
from afina.engine.scheduler import ScheduledChunk
from afina.engine.sequence import SequenceState
from afina.errors import BaseError
from afina.kernels.paged_attention import padded
from afina.models.causal_lm import CausalLM
from afina.models.packed_attention import AttentionMetadata
from afina.models.paged_kv import KVShapeProbe, PagedKVCache


class ModelRunner:
    """Runs pieces through the base over the pool's pages. Only the engine's thread calls."""

    def __init__(self, base: CausalLM, pool: BlockPool) -> None:
        self.base, self.pool = base, pool
        self._views = pool.views()
        self._before: tuple[tuple[int, ...], Segments] = ((), Segments())

    @torch.no_grad()
    def run(
        self, pieces: Many[ScheduledChunk], segments: Segments | None = None
    ) -> tuple[list[SequenceState], Tensor]:
        """Compute the pieces; returns the sequences whose last token was among them, and their logits (n, V) float32.

        `segments` says who acts, where it is not each sequence's own adapters.
        """
        counts = [count for _, count in pieces]
        bounds = (0, *accumulate(counts))
        device = self.base.device
        tokens = [
            token
            for s, count in pieces
            for token in s.token_ids[s.num_computed_tokens : s.num_computed_tokens + count]
        ]
        positions = [
            at
            for s, count in pieces
            for at in range(s.num_computed_tokens, s.num_computed_tokens + count)
        ]
        slots = [slot for s, count in pieces for slot in s.slot_mapping(count)]
        cache = PagedKVCache(
            self._views,
            torch.tensor(slots, device=device),
            [s.num_computed_tokens for s, _ in pieces],
            padded([s.block_table for s, _ in pieces]),
        )
        whole = [
            number for number, (s, count) in enumerate(pieces) if s.num_uncomputed_tokens == count
        ]
        with self.base.forward_context.use(segments or self.segments(pieces, bounds)):
            logits = self.base.next_token_logits(
                torch.tensor(tokens, device=device),
                torch.tensor(positions, device=device),
                bounds,
                cache,
                whole,
            )
        return [pieces[number][0] for number in whole], logits

    def segments(self, pieces: Many[ScheduledChunk], bounds: tuple[int, ...]) -> Segments:
        """Who acts where. While the same sequences decode side by side, it is the same object: layers prepare once."""
        decoding = len(pieces) == bounds[-1] and all(
            start <= s.num_computed_tokens for s, _ in pieces for _, _, start in s.adapter_spans
        )
        key = tuple(s.seq_id for s, _ in pieces) if decoding else ()
        if decoding and self._before[0] == key:
            return self._before[1]
        rows: list[Segment] = []
        for (sequence, count), start in zip(pieces, bounds, strict=False):
            rows += sequence.segments(start, count)
        segments = Segments(spans=tuple(rows))
        self._before = (key, segments)
        return segments

    @torch.no_grad()
    def embed(self, prompts: Many[tuple[int, ...]], acting: Many[tuple[str, float]]) -> Tensor:
        """One vector a prompt, (n, d) float32 of length 1: the mean of its last hidden states."""
        bounds = (0, *accumulate(map(len, prompts)))
        device = self.base.device
        tokens = torch.tensor([token for prompt in prompts for token in prompt], device=device)
        positions = torch.cat([torch.arange(len(prompt)) for prompt in prompts]).to(device)
        rows = tuple(Segment(0, bounds[-1], name, weight) for name, weight in acting)
        with self.base.forward_context.use(Segments(spans=rows)):
            hidden = self.base.hidden_states(tokens, positions, bounds).float()
        means = torch.stack([part.mean(0) for part in hidden.tensor_split(bounds[1:-1])])
        return torch.nn.functional.normalize(means, dim=-1)


@torch.no_grad()
def kv_layer_shapes(base: CausalLM) -> list[KVLayerShape]:
    """What each attention layer keeps of a token; raises `BaseError` where the model's attention cannot be paged."""
    shapes: dict[int, tuple[int, int]] = {}
    why = "its layers do not take a flat run of tokens with a cache"
    if base.supports_packing:
        tokens = torch.zeros(2, dtype=torch.int64, device=base.device)
        try:
            flat = AttentionMetadata((0, 2), KVShapeProbe(shapes))
            base.model.base_model(
                input_ids=tokens[None],
                position_ids=torch.arange(2, device=base.device)[None],
                use_cache=False,
                flat=flat,
            )
        except (ValueError, RuntimeError) as error:
            why = str(error)
            shapes = {}
    if not shapes or sorted(shapes) != list(range(len(shapes))):
        raise BaseError(
            "this family cannot be served", where=base.name, why=why, hint="afina generate"
        )
    return [KVLayerShape(*shapes[layer]) for layer in range(len(shapes))]
