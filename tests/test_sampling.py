"""Choosing the next token: each rule against its formula in float64, transformers' processors or its distribution."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from afina.engine.request import SamplingParams
from afina.engine.sampler import Sampler, sample
from afina.errors import SettingsError
from afina.models.causal_lm import CausalLM
from helpers import generate_tokens

VOCABULARY = 40
DRAWS = 4000


def scores(n: int = 1, vocabulary: int = VOCABULARY, seed: int = 0) -> Tensor:
    return torch.randn(n, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2


def chooser(prompt: Sequence[int] = (), vocabulary: int = VOCABULARY, **settings: Any) -> Sampler:
    return Sampler(SamplingParams(**settings), prompt, vocabulary)


def adjusted(logits: Tensor, chooser: Sampler) -> Tensor:
    """A row of logits (V) as the chooser changes it."""
    changed = logits.clone()
    chooser.adjust_logits(changed)
    return changed


def drawn(logits: Tensor, draws: int = DRAWS, **settings: Any) -> Tensor:
    """How often each token is drawn from logits (V): many sequences side by side, each with its own seed."""
    choosers = [chooser(vocabulary=len(logits), seed=seed, **settings) for seed in range(draws)]
    tokens = torch.tensor([c.token for c in sample(logits.expand(draws, -1), choosers)])
    return torch.bincount(tokens, minlength=len(logits))


def follows(counts: Tensor, probabilities: Tensor) -> bool:
    """Whether the counts are those of the distribution (V): none where it has none, and chi-square elsewhere."""
    expected = probabilities.double() * counts.sum()
    if counts[expected == 0].any():
        return False
    small = expected < 5
    observed = torch.cat([counts[~small].double(), counts[small].double().sum()[None]])
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    keep = expected > 0
    return (
        len(observed[keep]) == 1
        or chisquare(observed[keep], expected[keep] * observed.sum() / expected.sum()).pvalue
        > 0.001
    )


# the likeliest


def test_temperature_0_takes_the_likeliest_and_leaves_the_logits_alone() -> None:
    logits = scores(5)
    before = logits.clone()
    choosers = [
        chooser(),
        chooser(temperature=1.0),
        chooser(repetition_penalty=3.0),
        chooser(logit_bias={3: 50.0}),
        chooser(),
    ]
    told = sample(logits, choosers)
    assert torch.equal(logits, before)
    assert [told[0].token, told[4].token, told[3].token] == [
        logits[0].argmax(),
        logits[4].argmax(),
        3,
    ]
    assert math.isnan(told[0].logprob) and told[0].top == ()


# draws follow their distributions


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 2.0, "top_k": 7},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 1.5, "top_k": 12, "top_p": 0.7, "min_p": 0.2},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 1.0, "top_p": 1e-60},
    ],
    ids=str,
)
def test_draws_follow_the_distribution_of_transformers_warpers(settings: dict[str, Any]) -> None:
    logits = scores()
    warpers = LogitsProcessorList([TemperatureLogitsWarper(settings["temperature"])])
    if "top_k" in settings:
        warpers.append(TopKLogitsWarper(settings["top_k"]))
    if "top_p" in settings:
        warpers.append(TopPLogitsWarper(settings["top_p"]))
    if "min_p" in settings:
        warpers.append(MinPLogitsWarper(settings["min_p"]))
    expected = warpers(torch.zeros(1, 1, dtype=torch.int64), logits)[0].softmax(-1)
    counts = drawn(logits[0], **settings)
    assert follows(counts, expected)
    assert not follows(counts, expected.roll(1)), "the test sees a wrong distribution"


@pytest.mark.slow
def test_a_wide_nucleus_is_found_beyond_the_first_tokens_that_are_sorted() -> None:
    logits = scores(vocabulary=5000)[0] * 0.05  # nearly flat: 90% of it are thousands of tokens
    counts = drawn(logits, temperature=1.0, top_p=0.9, draws=20000)
    ordered, order = logits.double().softmax(-1).sort(descending=True)
    allowed = order[: int((ordered.cumsum(0) < 0.9).sum()) + 1]
    outside = torch.ones(5000, dtype=torch.bool)
    outside[allowed] = False
    assert not counts[outside].any()
    assert (counts[allowed] > 0).float().mean() > 0.9


def test_one_draw_a_token_by_the_sequences_own_seed() -> None:
    logits, settings = scores(8, seed=3), {"temperature": 1.3, "top_p": 0.9}

    def alone(row: int, steps: int = 6) -> list[int]:
        one = chooser(seed=row, **settings)
        return [sample(logits[row : row + 1], [one])[0].token for _ in range(steps)]

    together = [chooser(seed=row, **settings) for row in range(8)]
    together[5] = chooser()  # a cold one among them takes nothing of the others' luck
    steps = [[c.token for c in sample(logits, together)] for _ in range(6)]
    for row in {*range(8)} - {5}:
        assert [step[row] for step in steps] == alone(row)
    assert alone(1) == alone(1) != alone(2)
    assert chooser(seed=1).next_random() != chooser(seed=-1).next_random()


def test_extreme_temperatures_and_logits_stay_numbers() -> None:
    logits = scores()
    for temperature in (1e-40, 1e-9):
        assert sample(logits, [chooser(temperature=temperature)])[0].token == logits.argmax()
    assert 0 <= sample(logits, [chooser(temperature=1e30)])[0].token < VOCABULARY
    assert sample(logits * 1e30, [chooser(temperature=1e-3)])[0].token == logits.argmax()
    masked = torch.full((1, VOCABULARY), -math.inf)
    masked[0, 11] = -3.0
    assert sample(masked, [chooser(temperature=1.0, top_k=3, top_p=0.5)])[0].token == 11


def test_the_last_draw_below_one_is_still_a_token_with_a_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits = scores()
    logits[0, -5:] = -math.inf
    one = chooser(temperature=1.0)
    monkeypatch.setattr(one, "next_random", lambda: 1.0 - 2.0**-53)
    assert sample(logits, [one])[0].token < VOCABULARY - 5
    monkeypatch.setattr(one, "next_random", lambda: 0.0)
    logits[0, :3] = -math.inf
    assert sample(logits, [one])[0].token == 3


# penalties, bias


def test_repetition_penalty_is_that_of_transformers_over_prompt_and_answer() -> None:
    logits, prompt = scores()[0], [3, 4, 4, 9]
    one = chooser(prompt, repetition_penalty=1.7)
    one.accept_token(20)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(
        torch.tensor([[*prompt, 20]]), logits[None].clone()
    )[0]
    assert torch.equal(adjusted(logits, one), expected)
    assert (expected != logits).sum() == 4


def test_presence_and_frequency_count_the_answer_only() -> None:
    logits = scores()[0]
    one = chooser([1, 1, 2], presence_penalty=0.5, frequency_penalty=0.25)
    for token in (7, 7, 7, 8):
        one.accept_token(token)
    expected = logits.double()
    expected[7] -= 3 * 0.25 + 0.5
    expected[8] -= 0.25 + 0.5
    assert torch.allclose(adjusted(logits, one).double(), expected, atol=1e-6)
    assert torch.equal(adjusted(logits, one)[:7], logits[:7])


def test_choose_remembers_what_it_chose() -> None:
    logits, one = scores(), chooser(frequency_penalty=100.0)
    said = [sample(logits, [one])[0].token for _ in range(5)]
    assert said == logits[0].topk(5).indices.tolist()


def test_bias_comes_after_the_penalties() -> None:
    logits = scores()[0]
    one = chooser([5], repetition_penalty=2.0, logit_bias={5: 1.5, 6: -100.0})
    expected = logits.double()
    expected[5] = (expected[5] / 2 if expected[5] > 0 else expected[5] * 2) + 1.5
    expected[6] -= 100
    assert torch.allclose(adjusted(logits, one).double(), expected, atol=1e-5)


# logprobs


def test_logprobs_are_the_models_own() -> None:
    logits = scores(3)
    settings = SamplingParams(
        temperature=0.1, top_p=0.3, logit_bias={2: 9.0}, repetition_penalty=1.2, seed=4
    )
    choosers = [Sampler(replace(settings, logprobs=n), [1], VOCABULARY) for n in (0, 3, None)]
    told = sample(logits, choosers)
    expected = logits.double().log_softmax(-1)
    for row in (0, 1):
        assert told[row].logprob == pytest.approx(float(expected[row, told[row].token]), abs=1e-5)
    values, tokens = expected[1].topk(3)
    assert told[0].top == () and [token for token, _ in told[1].top] == tokens.tolist()
    assert [value for _, value in told[1].top] == pytest.approx(values.tolist(), abs=1e-5)
    assert math.isnan(told[2].logprob)


# the rest


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"min_p": 2.0}, "min_p is 2.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"presence_penalty": math.inf}, "presence_penalty is inf"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"logit_bias": {VOCABULARY: 1.0}}, "tokens are 0 to 39"),
        ({"logit_bias": {1: math.nan}}, "bias of token 1 is nan"),
    ],
    ids=str,
)
def test_a_setting_out_of_its_range_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        chooser(**settings)


def test_generation_draws_by_prompt_whatever_the_batch(base: CausalLM) -> None:
    prompts = [[5, 6, 7 + n] for n in range(3)]
    sampling = SamplingParams(
        12, temperature=1.0, seed=11, repetition_penalty=1.1, frequency_penalty=0.2
    )
    together = generate_tokens(base, prompts, sampling)
    for n, prompt in enumerate(prompts):
        assert generate_tokens(base, [prompt], replace(sampling, seed=11 + n)) == [together[n]]
    assert len(generate_tokens(base, prompts[:1] * 2, sampling)) == 2
    first, second = generate_tokens(base, prompts[:1] * 2, sampling)
    assert first != second, "two answers to one prompt are two draws"
