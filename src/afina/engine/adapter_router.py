"""Choosing the adapter by the query: the one whose own prompts are closest, as the base itself sees them.

    query --> means of the base's states --> white (as general text is spread) --> white (as one adapter's prompts are)
          --> cosine with every point of every adapter's profile --> the adapter with the closest point, or the base

The second whitening is linear discriminant analysis (Fisher 1936): directions in which the prompts of one and the same
adapter differ say little about which adapter is meant.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from afina.data import RETENTION_TEXT
from afina.engine.routing_profile import ChatFrame, Embedder, PromptEmbedder
from afina.errors import AdapterError
from afina.models.causal_lm import CausalLM

THRESHOLD = 0.35  # cosine under which the base answers; benchmarks/routing.py has what it lets through and what not
MARGIN = 0.03  # how much closer an adapter must be to be fetched instead of taking a resident one
PIECE, PIECES = 24, 256  # general text is read in pieces about as long as questions
SHRINK_GENERAL, SHRINK_WITHIN = (
    0.3,
    1.0,
)  # of the mean variance, added to all: few pieces, and few points, estimate them
GROWTH = 1.25  # profiles since the last second whitening at which it is made anew


@dataclass(frozen=True)
class RoutingDecision:
    """The adapter that was chosen (None: the base), how close it is (cosine, -1 to 1), and why in words."""

    name: str | None
    score: float
    why: str


class AdapterRouter:
    """Knows the profiles of adapters by name, and chooses among them. Not safe to change from several threads at once.

    `frame` is what the chat template writes around a question; `embedding` makes vectors of prompts, by default the
    base itself does.
    """

    def __init__(
        self,
        base: CausalLM,
        frame: ChatFrame | None = None,
        threshold: float = THRESHOLD,
        margin: float = MARGIN,
        embedding: Embedder | None = None,
    ) -> None:
        self.threshold, self.margin, self._frame = threshold, margin, frame or ChatFrame()
        self.embedding = embedding or PromptEmbedder(base)
        self._set_general(self.embedding(_general(base)))
        self._points: dict[str, Tensor] = {}  # name -> (k, r), white as general text
        self._within = torch.eye(self._to_white.shape[1])
        self._fitted = 0  # profiles that the second whitening has seen
        self._table: tuple[list[str], Tensor, Tensor] | None = None

    def add_profile(self, name: str, profile: Tensor) -> None:
        """Know an adapter by its profile (k, parts, d), in the place of what went by this name.

        Raises `AdapterError` for a profile of another shape than this embedding's.
        """
        if profile.shape[1:] != self._scale.shape[:1] + self._shape:
            raise AdapterError("this profile was not made by this embedding", where=name)
        self._points[name] = self._white(profile)
        self._table = None

    def remove_profile(self, name: str) -> None:
        """Know it no more; nothing happens where it was not known."""
        if self._points.pop(name, None) is not None:
            self._table = None

    def route(
        self,
        query: Sequence[int] | Tensor,
        resident: Collection[str] = (),
        among: Collection[str] | None = None,
    ) -> RoutingDecision:
        """The adapter for a query: a prompt's tokens, or its vectors (parts, d). A resident one is taken when it is close.

        Only adapters `among` these (None: all) are looked at and spoken of: others may be somebody's own.
        """
        names, points, owners = self._table or self._tabulate()
        open_to = [row for row, name in enumerate(names) if among is None or name in among]
        if not open_to:
            return RoutingDecision(None, 0.0, "no adapter is known by a profile: the base answers")
        vectors = (
            query if isinstance(query, Tensor) else self.embedding([self._frame.question(query)])[0]
        )
        white = torch.nn.functional.normalize(self._white(vectors[None]) @ self._within, dim=-1)[0]
        scores = (
            torch.full((len(names),), -1.0)
            .scatter_reduce(0, owners, points @ white, "amax")
            .tolist()
        )
        best = max(open_to, key=scores.__getitem__)
        score, why = scores[best], f"closest to the prompts that {names[best]!r} learned from"
        if score < self.threshold:
            return RoutingDecision(
                None,
                score,
                f"{names[best]!r} is closest, but under {self.threshold:g}: the base answers",
            )
        here = (
            [row for row in open_to if names[row] in resident]
            if names[best] not in resident
            else []
        )
        near = max(here, key=scores.__getitem__, default=best)
        if near != best and scores[near] >= max(score - self.margin, self.threshold):
            why = f"resident, and as close as {names[best]!r} ({score:.2f}) but for {score - scores[near]:.3f}"
            best = near
        return RoutingDecision(names[best], scores[best], why)

    def _set_general(self, vectors: Tensor) -> None:
        """The first whitening, from vectors (n, parts, d) of general text."""
        self._shape = vectors.shape[2:]
        self._centre = vectors.mean(0)
        spread = vectors - self._centre
        self._scale = (
            spread.square().mean((0, 2)).sqrt().clamp_min(1e-12)[:, None]
        )  # each part counts the same
        _, sizes, directions = torch.linalg.svd(
            (spread / self._scale).flatten(1), full_matrices=False
        )
        variance = sizes.square() / len(vectors)
        self._to_white = directions.T / (variance + SHRINK_GENERAL * variance.mean()).sqrt()

    def _white(self, vectors: Tensor) -> Tensor:
        """Vectors (n, parts, d) as points (n, r) of length 1 in which general text is spread alike in all directions."""
        centred = ((vectors - self._centre) / self._scale).flatten(1)
        return torch.nn.functional.normalize(centred @ self._to_white, dim=-1)

    def _tabulate(self) -> tuple[list[str], Tensor, Tensor]:
        """All names, their points (n, r) one after another, and whose each is (n)."""
        names = list(self._points)
        if not self._fitted <= len(names) <= GROWTH * self._fitted:
            self._fit_within()
        points = torch.cat([self._within.new_zeros(0, len(self._within)), *self._points.values()])
        points = torch.nn.functional.normalize(points @ self._within, dim=-1)
        counts = torch.tensor([len(own) for own in self._points.values()], dtype=torch.int64)
        owners = torch.arange(len(names)).repeat_interleave(counts)
        self._table = names, points, owners
        return self._table

    def _fit_within(self) -> None:
        """The second whitening, from how the points of each adapter lie around their mean."""
        around = torch.cat([points - points.mean(0) for points in self._points.values()])
        variance, directions = torch.linalg.eigh(around.T @ around / len(around))
        variance = variance.clamp_min(0.0)
        if float(variance.sum()) > 0.0:  # else every profile is a single point
            self._within = directions / (variance + SHRINK_WITHIN * variance.mean()).sqrt()
        self._fitted = len(self._points)


def _general(base: CausalLM) -> list[list[int]]:
    """The built-in general text in pieces of tokens, spread over all of it."""
    text = RETENTION_TEXT.read_text(encoding="utf-8")
    tokens = base.tokenizer(text, add_special_tokens=False, verbose=False)[
        "input_ids"
    ]  # longer than any context: no warning
    pieces = [tokens[i : i + PIECE] for i in range(0, len(tokens) - PIECE, PIECE)]
    return pieces[:: max(1, len(pieces) // PIECES)][:PIECES]
