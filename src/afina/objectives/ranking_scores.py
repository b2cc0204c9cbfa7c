"""Scores of a ranking: nDCG@10, MRR@10 and how often the first item is right, in percent.

    nDCG@10 = sum of gain / log2(1 + rank)   /   the same of the best order        ranks up to 10
    MRR@10  = 1 / rank of the first relevant item, 0 beyond rank 10

Where scores are equal, the irrelevant item comes first: a model that gives one score to all items
gains nothing from their order. nDCG: Järvelin and Kekäläinen 2002, doi 10.1145/582415.582418.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log2

import torch
from torch import Tensor

MAX_RANK = 10


@dataclass(frozen=True)
class RankedItems:
    """The relevant items of one query: the rank of each, from 1, and its gain, above 0."""

    ranks: Sequence[int]
    gains: Sequence[float]

    @classmethod
    def of(cls, scores: Tensor, relevant: Sequence[int], gains: Sequence[float]) -> "RankedItems":
        """Rank the items at the indices `relevant` among all.

        Args:
            scores: `(num_items,)`, higher is better.
            relevant: Indices of the items with a gain.
            gains: Their gains; lower ones come first where scores are equal.
        """
        order = sorted(range(len(relevant)), key=lambda n: (-float(scores[relevant[n]]), gains[n]))
        own = scores[[relevant[n] for n in order]]
        others = scores.clone()
        others[list(relevant)] = -torch.inf
        before = (others >= own[:, None]).sum(1).tolist()
        ranks = [1 + number + rank for rank, number in enumerate(before)]
        return cls(ranks, [gains[n] for n in order])

    @property
    def ndcg(self) -> float:
        """Normalized discounted cumulative gain of the first `MAX_RANK` items, 0 to 1."""
        best = sorted(self.gains, reverse=True)[:MAX_RANK]
        ideal = sum(gain / log2(2 + rank) for rank, gain in enumerate(best))
        ranked = zip(self.ranks, self.gains, strict=True)
        return sum(gain / log2(1 + rank) for rank, gain in ranked if rank <= MAX_RANK) / ideal

    @property
    def reciprocal_rank(self) -> float:
        """1 / rank of the first relevant item; 0 beyond `MAX_RANK`."""
        first = min(self.ranks)
        return 1 / first if first <= MAX_RANK else 0.0


def ranking_scores(queries: Sequence[RankedItems]) -> dict[str, float]:
    """Return the mean scores over queries, in percent; empty without a query."""
    if not queries:
        return {}
    percent = 100.0 / len(queries)
    return {
        "ndcg_at_10": percent * sum(query.ndcg for query in queries),
        "mrr_at_10": percent * sum(query.reciprocal_rank for query in queries),
        "accuracy_at_1": percent * sum(min(query.ranks) == 1 for query in queries),
    }
