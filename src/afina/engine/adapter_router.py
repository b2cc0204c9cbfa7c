"""Routing of a prompt to the adapter whose training prompts have the closest hidden states.

    prompt --> mean hidden states --> whitened by general text --> whitened within adapters
           --> cosine with each point of each adapter's profile --> the closest adapter, or the base

The second whitening is linear discriminant analysis (Fisher 1936): directions in which the prompts
of one adapter differ do not distinguish adapters.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from afina.data import RETENTION_TEXT
from afina.engine.routing_profile import ChatFrame, Embedder, PromptEmbedder
from afina.errors import AdapterError
from afina.models.causal_lm import CausalLM

THRESHOLD = 0.35  # cosine below which the base answers; benchmarks/routing.py measures its errors
MARGIN = 0.03  # cosine by which an adapter must be closer than a loaded one to be loaded instead
PIECE, PIECES = 24, 256  # tokens of a piece of general text, about a prompt's length; pieces
# multiples of the mean variance, added to all variances: they are estimated from few points
SHRINK_GENERAL, SHRINK_WITHIN = 0.3, 1.0
GROWTH = 1.25  # ratio of new profiles at which the second whitening is computed again


@dataclass(frozen=True)
class RoutingDecision:
    """Routed adapter (None: the base), its cosine (-1 to 1), and the reason in words."""

    name: str | None
    score: float
    why: str


class AdapterRouter:
    """Router among the profiles of adapters, by name. Not thread-safe.

    Args:
        frame: tokens that the chat template writes around a prompt.
        threshold: cosine below which the base answers.
        margin: cosine by which a loaded adapter may be farther than the closest one.
        embedding: computes vectors of prompts; by default the base's hidden states.
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
        self._points: dict[str, Tensor] = {}  # name -> (k, r), whitened by general text
        self._within = torch.eye(self._to_white.shape[1])
        self._fitted = 0  # profiles of the last second whitening
        self._table: tuple[list[str], Tensor, Tensor] | None = None

    def add_profile(self, name: str, profile: Tensor) -> None:
        """Add or replace the profile `(k, parts, d)` of an adapter.

        Raises:
            AdapterError: the profile has another shape than vectors of this embedding.
        """
        if profile.shape[1:] != self._scale.shape[:1] + self._shape:
            raise AdapterError("the profile is of another embedding", where=name)
        self._points[name] = self._white(profile)
        self._table = None

    def remove_profile(self, name: str) -> None:
        """Remove the profile of an adapter, if there is one."""
        if self._points.pop(name, None) is not None:
            self._table = None

    def route(
        self,
        query: Sequence[int] | Tensor,
        resident: Collection[str] = (),
        among: Collection[str] | None = None,
    ) -> RoutingDecision:
        """Return the routing decision for a prompt.

        Args:
            query: token ids of the prompt, or its vectors `(parts, d)`.
            resident: loaded adapters, preferred within the margin.
            among: adapters that may be chosen or named in the reason; None: all.
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
            behind = score - scores[near]
            why = f"resident, and as close as {names[best]!r} ({score:.2f}) but for {behind:.3f}"
            best = near
        return RoutingDecision(names[best], scores[best], why)

    def _set_general(self, vectors: Tensor) -> None:
        """Compute the first whitening from vectors `(n, parts, d)` of general text."""
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
        """Return whitened points `(n, r)` of length 1 of vectors `(n, parts, d)`."""
        centred = ((vectors - self._centre) / self._scale).flatten(1)
        return torch.nn.functional.normalize(centred @ self._to_white, dim=-1)

    def _tabulate(self) -> tuple[list[str], Tensor, Tensor]:
        """Return all names, their points `(n, r)`, and the index of each point's name `(n,)`."""
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
        """Compute the second whitening from the points of each adapter around their mean."""
        around = torch.cat([points - points.mean(0) for points in self._points.values()])
        variance, directions = torch.linalg.eigh(around.T @ around / len(around))
        variance = variance.clamp_min(0.0)
        if float(variance.sum()) > 0.0:  # else every profile is a single point
            self._within = directions / (variance + SHRINK_WITHIN * variance.mean()).sqrt()
        self._fitted = len(self._points)


def _general(base: CausalLM) -> list[list[int]]:
    """Return evenly spaced pieces of the built-in general text, as token ids."""
    text = RETENTION_TEXT.read_text(encoding="utf-8")
    tokens = base.tokenizer(text, add_special_tokens=False, verbose=False)[
        "input_ids"
    ]  # longer than any context: no warning
    pieces = [tokens[i : i + PIECE] for i in range(0, len(tokens) - PIECE, PIECE)]
    return pieces[:: max(1, len(pieces) // PIECES)][:PIECES]
