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
from afina.errors import AdapterError, DataError, SettingsError

MIN_TEMPERATURE = 1e-6  # float32 logits overflow when divided by less
MAX_STOP_CHARACTERS = 10_000  # of all stop strings of a request
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
        # as text, since -1 and 1 would be the same number
        self._random = random.Random(str(sampling.seed))
        self._prompt = tuple(prompt) if sampling.repetition_penalty != 1.0 else ()
        # allocated for the first token: queued requests take no memory of the vocabulary's size
        self._seen: Tensor | None = None
        self._counts: Tensor | None = None
        self._bias: Tensor | None = None
        self._is_allocated = False
        self._early: list[int] = []  # tokens that were accepted before the first logits
        self._stops = sorted(stop_token_ids) if sampling.min_tokens else []
        self._num_early = sampling.min_tokens if self._stops else 0  # tokens before any stop token

    def _allocate(self, like: Tensor) -> None:
        """Create the tensors of penalties and bias, `(vocab_size,)`, on the device of `like`."""
        if self._is_allocated:
            return
        sampling, zeros = self.sampling, torch.zeros(len(like), device=like.device)
        self._is_allocated = True
        if sampling.repetition_penalty != 1.0:
            self._seen = zeros.bool()
            self._seen[[*self._prompt, *self._early]] = True
        if sampling.presence_penalty or sampling.frequency_penalty:
            self._counts = zeros.clone()
            for token in self._early:
                self._counts[token] += 1
        if sampling.logit_bias:
            values = torch.tensor(list(sampling.logit_bias.values()), dtype=torch.float32)
            self._bias = zeros.clone()
            self._bias[list(sampling.logit_bias)] = values.to(like.device)

    @property
    def is_identity(self) -> bool:
        """Whether the logits are used unchanged."""
        sampling = self.sampling
        penalties = sampling.presence_penalty or sampling.frequency_penalty
        is_penalized = sampling.repetition_penalty != 1.0 or bool(penalties)
        return not (is_penalized or sampling.logit_bias or self.grammar or self._num_early)

    @property
    def is_finished(self) -> bool:
        """Whether the grammar allows only the end of the completion."""
        return self.grammar is not None and self.grammar.is_finished

    def adjust_logits(self, logits: Tensor) -> None:
        """Apply penalties, bias and grammar to logits `(vocab_size,)` in place."""
        sampling = self.sampling
        self._allocate(logits)
        if self._seen is not None:
            # CTRL, arXiv 1909.05858, section 4.1; with negative logits as transformers does it
            penalty = sampling.repetition_penalty
            scaled = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits.copy_(torch.where(self._seen, scaled, logits))
        if self._counts is not None:
            # OpenAI: counts * frequency + (counts > 0) * presence, of the completion so far
            logits -= self._counts * sampling.frequency_penalty
            logits -= (self._counts > 0) * sampling.presence_penalty
        if self._bias is not None:
            logits += self._bias
        if self._num_early:
            logits[self._stops] = -math.inf
        if self.grammar is not None:
            allowed = self.grammar.allowed_tokens(len(logits)).to(logits.device)
            logits.masked_fill_(~allowed, -math.inf)

    def next_random(self) -> float:
        """Return the sequence's next random number, in [0, 1)."""
        return self._random.random()

    def accept_token(self, token: int) -> None:
        """Count a sampled token for penalties, grammar and `min_tokens`."""
        if not self._is_allocated and not self.is_identity:
            self._early.append(token)
        self._num_early = max(0, self._num_early - 1)
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1
        if self.grammar is not None:
            self.grammar.accept_token(token)


@torch.no_grad()
def sample(logits: Tensor, samplers: Sequence[Sampler]) -> list[Logprob | Exception]:
    """Sample the next token of each sequence from float32 logits `(n, vocab_size)`, unchanged.

    An error of one sequence's parameters, grammar or logits is returned for its token and does
    not change the tokens of the others. The log-probability is NaN where the request does not
    include it.
    """
    sampled: list[Logprob | Exception] = [_NOT_FINITE] * len(samplers)
    adjusted, rows = logits, logits.amax(-1).isfinite().nonzero()[:, 0].tolist()
    if any(not samplers[row].is_identity for row in rows):
        adjusted = logits.clone()
        for row in [row for row in rows if not samplers[row].is_identity]:
            try:
                samplers[row].adjust_logits(adjusted[row])
                if not bool(adjusted[row].amax().isfinite()):
                    raise DataError("the parameters of the request leave no token to sample")
            except Exception as error:
                sampled[row] = error
                rows.remove(row)
    points = [samplers[row].next_random() for row in rows if _is_random(samplers[row])]
    random_rows = [row for row in rows if _is_random(samplers[row])]
    point_of = dict(zip(random_rows, points, strict=True))
    todo = [rows] if rows else []
    while todo:
        part = todo.pop()
        try:
            own: list[Sampler] = [samplers[row] for row in part]
            index: slice | list[int] = slice(None)
            if len(part) < len(samplers):  # indexing by a list copies the rows
                index = part
            tokens = _choose(adjusted[index], own, [point_of.get(row, 0.0) for row in part])
            found = _with_logprobs(logits[index], tokens, own)
        except Exception as error:  # of one row: in halves, until it is alone
            if len(part) == 1:
                sampled[part[0]] = error
            else:
                todo += [part[: len(part) // 2], part[len(part) // 2 :]]
            continue
        for row, logprob in zip(part, found, strict=True):
            sampled[row] = _accepted(samplers[row], logprob)
    return sampled


_NOT_FINITE = AdapterError(
    "the logits are not finite", why="the adapter's weights are broken, or too large"
)


def _is_random(sampler: Sampler) -> bool:
    return sampler.sampling.temperature > 0


def _accepted(sampler: Sampler, logprob: Logprob) -> Logprob | Exception:
    """Return a sampled token after its sequence has counted it, or the error of counting it."""
    try:
        sampler.accept_token(logprob.token)
    except Exception as error:
        return error
    return logprob


def _choose(logits: Tensor, samplers: Sequence[Sampler], points: Sequence[float]) -> Tensor:
    """Return one token for each row of adjusted logits `(n, vocab_size)`, int64 `(n,)`.

    Args:
        points: a random number in [0, 1) for each row.
    """
    warm = [row for row, sampler in enumerate(samplers) if _is_random(sampler)]
    if len(warm) == len(samplers):
        return _draw(logits, [sampler.sampling for sampler in samplers], points)
    tokens = logits.argmax(-1)
    if warm:
        settings = [samplers[row].sampling for row in warm]
        tokens[warm] = _draw(logits[warm], settings, [points[row] for row in warm])
    return tokens


def _draw(logits: Tensor, settings: Sequence[SamplingParams], points: Sequence[float]) -> Tensor:
    """Return one sample for each row of logits `(n, vocab_size)`, int64 `(n,)`."""

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
    point = column(list(points), torch.float64) * total
    # the product may round up to the total
    point = point.minimum(total.nextafter(torch.zeros_like(total)))
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
    one, inf = sampling, math.inf
    penalty, length = one.repetition_penalty, sum(map(len, one.stop))
    ranges: dict[str, tuple[object, bool, str]] = {
        "temperature": (one.temperature, 0.0 <= one.temperature < inf, "at least 0"),
        "top_p": (one.top_p, 0.0 < one.top_p <= 1.0, "above 0 and at most 1"),
        "top_k": (one.top_k, one.top_k >= 0, "at least 0 (0: all)"),
        "min_p": (one.min_p, 0.0 <= one.min_p <= 1.0, "from 0 to 1"),
        "repetition_penalty": (penalty, 0.0 < penalty < inf, "above 0"),
        "presence_penalty": (
            one.presence_penalty,
            math.isfinite(one.presence_penalty),
            "a number",
        ),
        "frequency_penalty": (
            one.frequency_penalty,
            math.isfinite(one.frequency_penalty),
            "a number",
        ),
        "logprobs": (one.logprobs, (one.logprobs or 0) >= 0, "at least 0, or none"),
        "stop": (
            f"{length:,} characters long",
            length <= MAX_STOP_CHARACTERS,
            f"at most {MAX_STOP_CHARACTERS:,} characters in all strings",
        ),
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
