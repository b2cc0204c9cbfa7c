"""Sampling of the next token of each sequence of a batch, with its own parameters.

    logits (n, V) --> penalties, bias, grammar --> argmax                             temperature 0
                                               \\-> temperature, top-k, top-p, min-p   otherwise

The order is transformers' own. Each sequence uses its own random numbers, one per token, so that
its completion does not depend on the batch.
"""

import math
import random
from collections.abc import Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor

from afina.engine.request import Logprob, SamplingParams
from afina.errors import SettingsError

MIN_TEMPERATURE = 1e-6  # float32 logits overflow when divided by less
NUCLEUS_SIZE = 256  # tokens sorted first for top-p: 20 times faster than all where they suffice


class TokenMask(Protocol):
    """Constraint on the next token of one sequence, such as a grammar."""

    is_finished: bool

    def allowed_tokens(self, vocabulary: int) -> Tensor:
        """Return which tokens may come next, bool `(vocab_size,)`."""

    def accept_token(self, token: int) -> None:
        """Advance by a sampled token."""


class Sampler:
    """Sampling state of one sequence: its parameters, random numbers and past tokens.

    Args:
        prompt: counts for the repetition penalty only, as in transformers; new tokens for all.
        vocabulary: width of the logits.
        stop_token_ids: not sampled before `min_tokens` tokens.

    Raises:
        SettingsError: a parameter is out of its range.
    """

    def __init__(
        self,
        sampling: SamplingParams,
        prompt: Sequence[int],
        vocabulary: int,
        grammar: TokenMask | None = None,
        stop_token_ids: Collection[int] = (),
    ) -> None:
        _check(sampling, vocabulary)
        self.sampling, self.grammar = sampling, grammar
        self._random = random.Random(
            str(sampling.seed)
        )  # as text, since -1 and 1 would be the same number
        self._seen = self._counts = self._bias = None
        self._stops = sorted(stop_token_ids) if sampling.min_tokens else []
        self._num_early = sampling.min_tokens if self._stops else 0  # tokens before any stop token
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
        """Whether the logits are used unchanged."""
        return (
            self._seen is None
            and self._counts is None
            and self._bias is None
            and self.grammar is None
            and not self._num_early
        )

    @property
    def is_finished(self) -> bool:
        """Whether the grammar allows only the end of the completion."""
        return self.grammar is not None and self.grammar.is_finished

    def adjust_logits(self, logits: Tensor) -> None:
        """Apply penalties, bias and grammar to logits `(vocab_size,)` in place."""
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
        if self._num_early:
            logits[self._stops] = -math.inf
        if self.grammar is not None:
            logits.masked_fill_(
                ~self.grammar.allowed_tokens(len(logits)).to(logits.device), -math.inf
            )

    def next_random(self) -> float:
        """Return the sequence's next random number, in [0, 1)."""
        return self._random.random()

    def accept_token(self, token: int) -> None:
        """Count a sampled token for penalties, grammar and `min_tokens`."""
        self._num_early = max(0, self._num_early - 1)
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1
        if self.grammar is not None:
            self.grammar.accept_token(token)


@torch.no_grad()
def sample(logits: Tensor, samplers: Sequence[Sampler]) -> list[Logprob]:
    """Sample the next token of each sequence from float32 logits `(n, vocab_size)`, unchanged.

    The log-probability is NaN where the request does not include it.
    """
    adjusted = logits
    if any(not sampler.is_identity for sampler in samplers):
        adjusted = logits.clone()
        for row, sampler in zip(adjusted, samplers, strict=True):
            if not sampler.is_identity:
                sampler.adjust_logits(row)
    warm = [row for row, sampler in enumerate(samplers) if sampler.sampling.temperature > 0]
    if len(warm) == len(samplers):
        tokens = _draw(adjusted, samplers)
    else:
        tokens = adjusted.argmax(-1)
        if warm:
            tokens[warm] = _draw(adjusted[warm], [samplers[row] for row in warm])
    sampled = _with_logprobs(logits, tokens, samplers)
    for sampler, logprob in zip(samplers, sampled, strict=True):
        sampler.accept_token(logprob.token)
    return sampled


def _draw(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """Return one sample for each row of logits `(n, vocab_size)`, int64 `(n,)`."""
    settings = [sampler.sampling for sampler in samplers]

    def column(values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=logits.device)[:, None]

    temperature = column([max(s.temperature, MIN_TEMPERATURE) for s in settings])
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
    point = column([sampler.next_random() for sampler in samplers], torch.float64) * total
    point = point.minimum(
        total.nextafter(torch.zeros_like(total))
    )  # the product may round up to the total
    return torch.searchsorted(cumulative, point, right=True)[:, 0]


def _nucleus(probabilities: Tensor, shares: Tensor) -> Tensor:
    """Zero all but the most probable tokens with total probability `shares` `(n, 1)`.

    The token that crosses the share stays.

    References:
        Holtzman et al. 2020, arXiv 1904.09751.
    """
    size = min(NUCLEUS_SIZE, probabilities.shape[-1])
    while True:
        ordered, order = probabilities.topk(size)
        before = ordered.cumsum(-1, dtype=torch.float64) - ordered
        if size == probabilities.shape[-1] or bool((before[:, -1:] >= shares).all()):
            break
        size = min(8 * size, probabilities.shape[-1])
    beyond = before >= shares
    beyond[:, 0] = False  # a share that float32 rounds to 0 still keeps the most probable token
    return torch.zeros_like(probabilities).scatter(-1, order, ordered.masked_fill(beyond, 0.0))


def _with_logprobs(logits: Tensor, tokens: Tensor, samplers: Sequence[Sampler]) -> list[Logprob]:
    """Return the sampled tokens `(n,)`, with log-probabilities where the request includes them."""
    chosen: list[int] = tokens.tolist()
    sampled = [Logprob(token, math.nan) for token in chosen]
    reported = [
        (row, n)
        for row, sampler in enumerate(samplers)
        if (n := sampler.sampling.logprobs) is not None
    ]
    if reported:
        rows = [row for row, _ in reported]
        scores = logits[rows].log_softmax(-1)
        own = scores.gather(-1, tokens[rows][:, None])[:, 0].tolist()
        top = scores.topk(min(max(n for _, n in reported), scores.shape[-1]))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        for (row, n), value, (likeliest, values) in zip(reported, own, pairs, strict=True):
            sampled[row] = Logprob(
                chosen[row], value, tuple(zip(likeliest[:n], values[:n], strict=True))
            )
    return sampled


def _check(sampling: SamplingParams, vocabulary: int) -> None:
    """Raise `SettingsError` for a value that would sample wrongly or fail in a batch."""
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
