"""One forward pass over the scheduled chunks, laid end to end, and logits of complete sequences.

chunks     | prompt of s4, tokens 512..767 | s1 | s2 | s3 |        one packed batch
segments     (0, 256, "law")                 (256, 257, "tone")    active adapters by token range
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from afina.adapters.segments import Segment, Segments
from afina.engine.kv_cache import KVCache
from afina.engine.request import Logprob
from afina.engine.sequence import ScheduledChunk, SequenceState
from afina.models.causal_lm import CausalLM
from afina.models.packed_attention import AttentionMetadata

SCORED_ROWS = 64  # tokens whose logits are computed at once: 39 MB with a vocabulary of 152,000


class ModelRunner:
    """Forward passes of the base for the engine. Only the engine's thread calls."""

    def __init__(self, base: CausalLM, cache: KVCache) -> None:
        self.base, self.cache = base, cache
        self._last_segments: tuple[tuple[int, ...], Segments] = ((), Segments())

    @torch.no_grad()
    def run(
        self, chunks: Sequence[ScheduledChunk], segments: Segments | None = None
    ) -> tuple[list[SequenceState], Tensor]:
        """Compute the chunks, and log-probabilities of prompts where they are requested.

        Args:
            segments: active adapters, where they are not each sequence's own.

        Returns:
            The sequences whose last token was computed, and float32 logits after it
            `(num_complete, vocab_size)`.
        """
        tokens, positions, metadata = self._inputs(chunks)
        complete = [n for n, (s, count) in enumerate(chunks) if s.num_uncomputed_tokens == count]
        active = segments or self.segments(chunks, metadata.cu_seqlens)
        with self.base.forward_context.use(active):
            read = self.base.logits_reader(tokens, positions, metadata)
            logits = read([metadata.cu_seqlens[n + 1] - 1 for n in complete])
            for (sequence, count), start in zip(chunks, metadata.cu_seqlens, strict=False):
                if sequence.is_scored:
                    score_prompt(sequence, count, partial(_read_after, read, start))
        return [chunks[n][0] for n in complete], logits

    @torch.no_grad()
    def hidden_sums(self, chunks: Sequence[ScheduledChunk]) -> list[tuple[ScheduledChunk, Tensor]]:
        """Compute the chunks; return each with the sum of its last hidden states.

        The sums are float32 `(hidden_size,)`.
        """
        tokens, positions, metadata = self._inputs(chunks)
        with self.base.forward_context.use(self.segments(chunks, metadata.cu_seqlens)):
            hidden = self.base.hidden_states(tokens, positions, metadata).float()
        parts = hidden.tensor_split(metadata.cu_seqlens[1:-1])
        return [(chunk, part.sum(0).cpu()) for chunk, part in zip(chunks, parts, strict=True)]

    def _inputs(self, chunks: Sequence[ScheduledChunk]) -> tuple[Tensor, Tensor, AttentionMetadata]:
        """Return token ids and positions `(num_tokens,)` of the chunks, and their metadata."""
        device = self.base.device
        tokens: list[int] = []
        positions: list[int] = []
        for sequence, count in chunks:
            first = sequence.num_computed_tokens
            tokens += sequence.token_ids[first : first + count]
            positions += range(first, first + count)
        return (
            torch.tensor(tokens, device=device),
            torch.tensor(positions, device=device),
            self.cache.metadata(chunks),
        )

    def segments(self, chunks: Sequence[ScheduledChunk], cu_seqlens: tuple[int, ...]) -> Segments:
        """Return the active adapters of each token.

        While the same sequences decode together it is the same object, so that layers prepare
        their products once.
        """
        decoding = len(chunks) == cu_seqlens[-1] and all(
            start <= s.num_computed_tokens for s, _ in chunks for _, _, start in s.adapter_spans
        )
        key = tuple(s.seq_id for s, _ in chunks) if decoding else ()
        if decoding and self._last_segments[0] == key:
            return self._last_segments[1]
        first = chunks[0][0]
        shared = all(s.adapter_spans == first.adapter_spans for s, _ in chunks)
        if shared and all(start == 0 for _, _, start in first.adapter_spans):
            segments = _on_all_tokens(first)  # one product for the batch, not one per sequence
        else:
            spans: list[Segment] = []
            for (sequence, count), start in zip(chunks, cu_seqlens, strict=False):
                spans += sequence.segments(start, count)
            segments = Segments(spans=tuple(spans))
        self._last_segments = (key, segments)
        return segments


def _on_all_tokens(sequence: SequenceState) -> Segments:
    """Return the adapters of `sequence` as active on all tokens of the batch."""
    labels = {content.hash: content.layer_key for content in sequence.adapters}
    return Segments(tuple((labels[name], weight) for name, weight, _ in sequence.adapter_spans))


def _read_after(read: Callable[[Sequence[int]], Tensor], start: int, rows: Sequence[int]) -> Tensor:
    """Return the logits after tokens of a chunk that begins at `start` of the batch."""
    return read([start + row for row in rows])


def score_prompt(
    sequence: SequenceState, count: int, read: Callable[[Sequence[int]], Tensor]
) -> None:
    """Add the log-probabilities of the prompt's tokens that follow those of a chunk.

    Args:
        count: tokens of the chunk, which begins at `sequence.num_computed_tokens`.
        read: logits after tokens of the chunk, float32 `(num_tokens, vocab_size)`.
    """
    first, top = sequence.num_computed_tokens, sequence.request.sampling.prompt_logprobs or 0
    del sequence.prompt_logprobs[first:]  # of an attempt that failed
    following = sequence.token_ids[first + 1 : first + count + 1]
    for start in range(0, len(following), SCORED_ROWS):
        targets = following[start : start + SCORED_ROWS]
        scores = read(range(start, start + len(targets))).log_softmax(-1)
        own = scores.gather(-1, torch.tensor(targets, device=scores.device)[:, None])[:, 0].tolist()
        best = scores.topk(min(top, scores.shape[-1]))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        sequence.prompt_logprobs += [
            Logprob(token, value, tuple(zip(tokens, values, strict=True)))
            for token, value, (tokens, values) in zip(targets, own, pairs, strict=True)
        ]
