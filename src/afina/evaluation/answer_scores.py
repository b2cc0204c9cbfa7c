"""Answers of a language model to its eval prompts, and the task's score of them."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median

from afina.adapters.active import ActiveAdapters
from afina.data.renderer import Example
from afina.engine.engine import generate_completions
from afina.engine.request import SamplingParams
from afina.evaluation.metrics import exact_match, sentence_chrf
from afina.models.causal_lm import CausalLM
from afina.objectives.task_score import TaskScore

SHORT_ANSWER_WORDS = 12  # of the median answer; longer ones are right in more than one wording
MAX_SCORED_ROWS, MIN_SCORED_ROWS = 64, 8
MAX_ANSWER_TOKENS = 128
STOP_TOKENS = 8  # tokens after the longest expected answer, so that one that goes on is seen
# generated per trained token at most: a run of minutes is scored in seconds
SCORED_TOKENS_RATIO = 0.05

Answers = Mapping[str, Sequence[str]]  # by side: "before", "after"


def generate_answers(
    base: CausalLM,
    examples: Sequence[Example],
    sides: Mapping[str, ActiveAdapters],
    stop_token_ids: frozenset[int],
    max_new_tokens: int,
) -> dict[str, list[str]]:
    """Return the greedy answers of each side to the prompts of examples."""
    prompts = [example.token_ids[: example.prompt_length] for example in examples]
    sampling = SamplingParams(max_new_tokens)
    return {
        side: [
            completion.text
            for completion in generate_completions(base, prompts, sampling, active, stop_token_ids)
        ]
        for side, active in sides.items()
    }


def score_answers(answers: Answers, expected: Sequence[str], **fields: str) -> TaskScore:
    """Return the score of answers before and after: exact match of short ones, else chrF."""
    is_short = median(len(text.split()) for text in expected) <= SHORT_ANSWER_WORDS
    name = "exact match" if is_short else "chrF"
    metric: Callable[[str, str], float] = _exact if is_short else sentence_chrf
    before, after = (
        [metric(answer, right) for answer, right in zip(answers[side], expected, strict=True)]
        for side in ("before", "after")
    )
    unit = "%" if is_short else ""
    return TaskScore.of_rows(name, before, after, unit=unit, counts_right=is_short, **fields)


def _exact(answer: str, expected: str) -> float:
    return exact_match([answer], [expected])


def scored_examples(
    examples: Sequence[Example], base: CausalLM, trained_tokens: int
) -> tuple[list[Example], int]:
    """Return the examples that a run scores, spread over all, and the longest answer in tokens.

    Their number grows with the tokens that were trained, so that scoring takes a small part of a
    run's time; answers longer than `MAX_ANSWER_TOKENS` are left out.
    """
    lengths = [(one, len(one.token_ids) - one.prompt_length) for one in examples]
    chosen = [
        (one, length)
        for one, length in lengths
        if length <= MAX_ANSWER_TOKENS
        and one.prompt_length + length + STOP_TOKENS <= base.max_positions
    ]
    if not chosen:
        return [], 0
    longest = max(length for _, length in chosen) + STOP_TOKENS
    budget = int(trained_tokens * SCORED_TOKENS_RATIO / (2 * longest))
    most = min(MAX_SCORED_ROWS, max(MIN_SCORED_ROWS, budget))
    return [one for one, _ in chosen[:: -(-len(chosen) // most)]], longest
