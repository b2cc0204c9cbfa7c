"""Choosing the next token of every sequence of a batch, each in its own way.

    logits (n, V) --> penalties, bias, grammar --> likeliest                                        temperature 0
                                               \\-> temperature, top-k, top-p, min-p --> one draw    otherwise

The order is transformers' own. Every sequence draws from its own random numbers, one a token, so that its answer does
not depend on what it was batched with.
"""

import math
import random
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from afina.engine.request import Logprob, SamplingParams
from afina.errors import SettingsError

COLDEST = 1e-6  # temperatures below are taken as this one: float32 has no room for more
NUCLEUS = 256  # likeliest tokens that are sorted first for top-p: on sharp distributions 20 times faster than all


class TokenMask(Protocol):
    """What may come next, and what came: a grammar, for one sequence."""

    is_finished: bool

    def allowed_tokens(self, vocabulary: int) -> Tensor:
        """The tokens that may come next: bool (vocabulary)."""

    def accept_token(self, token: int) -> None:
        """The token that was chosen."""


class Sampler:
    """One sequence's way of choosing: its settings, its random numbers, and what it has said so far.

    `prompt` counts for the repetition penalty only (as in transformers), the answer for all. `vocabulary` is the width
    of the logits. Raises `SettingsError` for a setting out of its range.
    """

    def __init__(
        self,
        sampling: SamplingParams,
        prompt: Sequence[int],
        vocabulary: int,
        grammar: TokenMask | None = None,
    ) -> None:
        _check(sampling, vocabulary)
        self.sampling, self.grammar = sampling, grammar
        self._random = random.Random(
            str(sampling.seed)
        )  # as text, since -1 and 1 would be the same number
        self._seen = self._counts = self._bias = None
        if sampling.repetition_penalty != 1.0:
            self._seen = torch.zeros(vocabulary, dtype=torch.bool)
            self._seen[list(prompt)] = True
        if sampling.presence_penalty or sampling.frequency_penalty:
            self._counts = torch.zeros(vocabulary)
        if sampling.logit_bias:
            self._bias = torch.zeros(vocabulary)
            self._bias[list(sampling.logit_bias)] = torch.tensor(
                list(sampling.logit_bias.values()), dtype=torch.float32
            )

    @property
    def is_identity(self) -> bool:
        """Whether the logits are taken as they are."""
        return (
            self._seen is None
            and self._counts is None
            and self._bias is None
            and self.grammar is None
        )

    @property
    def is_finished(self) -> bool:
        """Whether the grammar allows nothing more than the end of the answer."""
        return self.grammar is not None and self.grammar.is_finished

    def adjust_logits(self, logits: Tensor) -> None:
        """Change logits (V) in place by the penalties, the bias and the grammar."""
        sampling = self.sampling
        if (
            self._seen is not None
        ):  # CTRL, arXiv 1909.05858, section 4.1; with negative logits as transformers does it
            self._seen = self._seen.to(logits.device)
            penalty = sampling.repetition_penalty
            logits.copy_(
                torch.where(
                    self._seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits
                )
            )
        if (
            self._counts is not None
        ):  # OpenAI: counts * frequency + (counts > 0) * presence, of the answer so far
            self._counts = self._counts.to(logits.device)
            logits -= (
                self._counts * sampling.frequency_penalty
                + (self._counts > 0) * sampling.presence_penalty
            )
        if self._bias is not None:
            self._bias = self._bias.to(logits.device)
            logits += self._bias
        if self.grammar is not None:
            logits.masked_fill_(
                ~self.grammar.allowed_tokens(len(logits)).to(logits.device), -math.inf
            )

    def next_random(self) -> float:
        """The sequence's next random number, in [0, 1)."""
        return self._random.random()

    def accept_token(self, token: int) -> None:
        """Remember the token that was chosen."""
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1
        if self.grammar is not None:
            self.grammar.accept_token(token)


@torch.no_grad()
def sample(logits: Tensor, choosers: Sequence[Sampler]) -> list[Logprob]:
    """The next token of each sequence from logits (n, V) in float32, which stay as they are.

    The log-probability is NaN where the sequence's settings do not ask for it.
    """
    adjusted = logits
    if any(not chooser.is_identity for chooser in choosers):
        adjusted = logits.clone()
        for row, chooser in zip(adjusted, choosers, strict=True):
            if not chooser.is_identity:
                chooser.adjust_logits(row)
    warm = [row for row, chooser in enumerate(choosers) if chooser.sampling.temperature > 0]
    if len(warm) == len(choosers):
        tokens = _draw(adjusted, choosers)
    else:
        tokens = adjusted.argmax(-1)
        if warm:
            tokens[warm] = _draw(adjusted[warm], [choosers[row] for row in warm])
    told = _with_logprobs(logits, tokens, choosers)
    for chooser, logprob in zip(choosers, told, strict=True):
        chooser.accept_token(logprob.token)
    return told


def _draw(logits: Tensor, choosers: Sequence[Sampler]) -> Tensor:
    """One draw for each row of logits (n, V): int64 (n)."""
    settings = [chooser.sampling for chooser in choosers]

    def column(values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=logits.device)[:, None]

    temperature = column([max(s.temperature, COLDEST) for s in settings])
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if any(s.top_k for s in settings):
        sizes = [min(s.top_k or logits.shape[-1], logits.shape[-1]) for s in settings]
        largest = logits.topk(
            max(n for n, s in zip(sizes, settings, strict=True) if s.top_k)
        ).values
        last = column([min(n, largest.shape[-1]) - 1 for n in sizes], torch.int64)
        floor = largest.gather(-1, last).masked_fill(
            column([s.top_k for s in settings]) == 0, -math.inf
        )
        logits = logits.masked_fill(logits < floor, -math.inf)
    probabilities = logits.softmax(-1)
    narrow = [row for row, s in enumerate(settings) if s.top_p < 1.0]
    if narrow:
        shares = column([settings[row].top_p for row in narrow])
        probabilities[narrow] = _nucleus(probabilities[narrow], shares)
    if any(s.min_p for s in settings):
        least = column([s.min_p for s in settings]) * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    point = column([chooser.next_random() for chooser in choosers], torch.float64) * total
    point = point.minimum(
        total.nextafter(torch.zeros_like(total))
    )  # the product may round up to the total
    return torch.searchsorted(cumulative, point, right=True)[:, 0]


def _nucleus(probabilities: Tensor, shares: Tensor) -> Tensor:
    """Zero all but the likeliest tokens that together hold `shares` (n, 1) of probabilities (n, V).

    Holtzman et al. 2020, arXiv 1904.09751; the token that crosses the share stays.
    """
    size = min(NUCLEUS, probabilities.shape[-1])
    while True:
        ordered, order = probabilities.topk(size)
        before = ordered.cumsum(-1, dtype=torch.float64) - ordered
        if size == probabilities.shape[-1] or bool((before[:, -1:] >= shares).all()):
            break
        size = min(8 * size, probabilities.shape[-1])
    beyond = before >= shares
    beyond[:, 0] = False  # a share that float32 rounds to nothing still leaves the likeliest
    return torch.zeros_like(probabilities).scatter(-1, order, ordered.masked_fill(beyond, 0.0))


def _with_logprobs(logits: Tensor, tokens: Tensor, choosers: Sequence[Sampler]) -> list[Logprob]:
    """The chosen tokens (n), with what the model itself thought of them and of the likeliest, where that is asked."""
    chosen: list[int] = tokens.tolist()
    told = [Logprob(token, math.nan) for token in chosen]
    asked = [
        (row, n)
        for row, chooser in enumerate(choosers)
        if (n := chooser.sampling.logprobs) is not None
    ]
    if asked:
        rows = [row for row, _ in asked]
        scores = logits[rows].log_softmax(-1)
        own = scores.gather(-1, tokens[rows][:, None])[:, 0].tolist()
        top = scores.topk(min(max(n for _, n in asked), scores.shape[-1]))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        for (row, n), value, (likeliest, values) in zip(asked, own, pairs, strict=True):
            told[row] = Logprob(
                chosen[row], value, tuple(zip(likeliest[:n], values[:n], strict=True))
            )
    return told


def _check(sampling: SamplingParams, vocabulary: int) -> None:
    """Raise `SettingsError` for what would choose wrongly, or stop a whole batch."""
    ranges = {
        "temperature": (sampling.temperature, 0.0 <= sampling.temperature < math.inf, "at least 0"),
        "top_p": (sampling.top_p, 0.0 < sampling.top_p <= 1.0, "above 0 and at most 1"),
        "top_k": (sampling.top_k, sampling.top_k >= 0, "at least 0 (0: all)"),
        "min_p": (sampling.min_p, 0.0 <= sampling.min_p <= 1.0, "from 0 to 1"),
        "repetition_penalty": (
            sampling.repetition_penalty,
            0.0 < sampling.repetition_penalty < math.inf,
            "above 0",
        ),
        "presence_penalty": (
            sampling.presence_penalty,
            math.isfinite(sampling.presence_penalty),
            "a number",
        ),
        "frequency_penalty": (
            sampling.frequency_penalty,
            math.isfinite(sampling.frequency_penalty),
            "a number",
        ),
        "logprobs": (sampling.logprobs, (sampling.logprobs or 0) >= 0, "at least 0, or none"),
    }
    for name, (value, fits, wanted) in ranges.items():
        if not fits:
            raise SettingsError(f"{name} is {value}", why=f"it must be {wanted}")
    for token, value in sampling.logit_bias.items():
        if not 0 <= token < vocabulary or not math.isfinite(value):
            raise SettingsError(
                f"bias of token {token} is {value}",
                why=f"tokens are 0 to {vocabulary - 1}, biases numbers",
            )
