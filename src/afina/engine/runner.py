"""One forward: the pieces that the scheduler chose, laid end to end, and the logits of those that are complete.

    pieces   | prompt of s4, tokens 512..767 | s1 | s2 | s3 |        one flat run
    rows       (0, 256, "law")                 (256, 257, "tone") ...     who acts on which of them
"""

from collections.abc import Sequence as Many
from itertools import accumulate

import torch
from torch import Tensor

from afina.base.flat import Flat
from afina.base.model import Base
from afina.base.paged import PagedCache, ShapeProbe
from afina.engine.pages import LayerShape, Pool
from afina.engine.scheduler import Piece
from afina.engine.sequence import Sequence
from afina.errors import BaseError
from afina.kernels.paged import padded
from afina.segments import Segment, Segments


class Runner:
    """Runs pieces through the base over the pool's pages. Only the engine's thread calls."""

    def __init__(self, base: Base, pool: Pool) -> None:
        self.base, self.pool = base, pool
        self._views = pool.views()
        self._before: tuple[tuple[int, ...], Segments] = ((), Segments())

    @torch.no_grad()
    def run(self, pieces: Many[Piece], segments: Segments | None = None) -> tuple[list[Sequence], Tensor]:
        """Compute the pieces; returns the sequences whose last token was among them, and their logits (n, V) float32.

        `segments` says who acts, where it is not each sequence's own adapters.
        """
        counts = [count for _, count in pieces]
        bounds = (0, *accumulate(counts))
        device = self.base.device
        tokens = [token for s, count in pieces for token in s.tokens[s.computed : s.computed + count]]
        positions = [at for s, count in pieces for at in range(s.computed, s.computed + count)]
        slots = [slot for s, count in pieces for slot in s.slots(count)]
        cache = PagedCache(
            self._views, torch.tensor(slots, device=device),
            [s.computed for s, _ in pieces], padded([s.pages for s, _ in pieces]),
        )  # fmt: skip
        whole = [number for number, (s, count) in enumerate(pieces) if s.left == count]
        with self.base.board.route(segments or self.segments(pieces, bounds)):
            logits = self.base.last_logits(
                torch.tensor(tokens, device=device), torch.tensor(positions, device=device), bounds, cache, whole
            )
        return [pieces[number][0] for number in whole], logits

    def segments(self, pieces: Many[Piece], bounds: tuple[int, ...]) -> Segments:
        """Who acts where. While the same sequences decode side by side, it is the same object: layers prepare once."""
        decoding = len(pieces) == bounds[-1] and all(start <= s.computed for s, _ in pieces for _, _, start in s.acting)
        key = tuple(s.number for s, _ in pieces) if decoding else ()
        if decoding and self._before[0] == key:
            return self._before[1]
        rows: list[Segment] = []
        for (sequence, count), start in zip(pieces, bounds, strict=False):
            rows += sequence.rows(start, count)
        segments = Segments(rows=tuple(rows))
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
        with self.base.board.route(Segments(rows=rows)):
            hidden = self.base.hidden(tokens, positions, bounds).float()
        means = torch.stack([part.mean(0) for part in hidden.tensor_split(bounds[1:-1])])
        return torch.nn.functional.normalize(means, dim=-1)


@torch.no_grad()
def shapes_of(base: Base) -> list[LayerShape]:
    """What each attention layer keeps of a token; raises `BaseError` where the model's attention cannot be paged."""
    shapes: dict[int, tuple[int, int]] = {}
    why = "its layers do not take a flat run of tokens with a cache"
    if base.flat:
        tokens = torch.zeros(2, dtype=torch.int64, device=base.device)
        try:
            flat = Flat((0, 2), ShapeProbe(shapes))
            base.model.base_model(
                input_ids=tokens[None], position_ids=torch.arange(2, device=base.device)[None], use_cache=False, flat=flat
            )
        except (ValueError, RuntimeError) as error:
            why = str(error)
            shapes = {}
    if not shapes or sorted(shapes) != list(range(len(shapes))):
        raise BaseError("this family cannot be served", where=base.name, why=why, hint="afina generate")
    return [LayerShape(*shapes[layer]) for layer in range(len(shapes))]
