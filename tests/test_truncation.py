"""Rows that are too long: the prompt is cut, answers are kept and counted, and no mask is empty."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from afina.data.renderer import Example, Renderer
from afina.data.schemas import PreferenceRow, PromptRow, SFTRow
from afina.data.truncation import CUT_MARK, cut_prompt
from afina.errors import DataError
from afina.evaluation.evaluate import evaluate
from afina.objectives.preference_data import tokenize_preferences
from afina.planning.plan import plan
from afina.training.results import data_notes
from afina.training.train import train
from helpers import write_rows

WORDS = "the sol and the luna by the mar, and the casa at the road with pan. "
SYSTEM = {"role": "system", "content": "Be kind."}


def user(number: int, times: int = 1) -> dict[str, Any]:
    return {"role": "user", "content": f"begin {number} {WORDS * times}end {number}"}


def answer(number: int) -> dict[str, Any]:
    return {"role": "assistant", "content": f"It is answer {number}."}


CALL = {"id": "c1", "type": "function", "function": {"name": "a", "arguments": {"q": "b"}}}
CALLS = {"role": "assistant", "content": "One moment.", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": WORDS * 20, "tool_call_id": "c1", "name": "a"}
ROWS: dict[str, SFTRow] = {
    "long question": SFTRow("a:1", messages=(SYSTEM, user(1, 30), answer(1))),
    "without system": SFTRow("a:1", messages=(user(1, 30), answer(1))),
    "many turns": SFTRow(
        "a:1", messages=(SYSTEM, *(m for n in range(1, 9) for m in (user(n, 2), answer(n))))
    ),
    "turns and a long one": SFTRow(
        "a:1", messages=(SYSTEM, user(1, 30), answer(1), user(2), answer(2), user(3, 30), answer(3))
    ),
    "a long result": SFTRow("a:1", messages=(SYSTEM, user(1), CALLS, RESULT, answer(1))),
    "prompt": SFTRow("a:1", prompt=f"begin {WORDS * 30}end", completion="It is answer 1."),
}


def targets(examples: list[Example], renderer: Renderer) -> str:
    return "".join(
        renderer.tokenizer.decode([t for t, m in zip(e.token_ids, e.loss_mask, strict=True) if m])
        for e in examples
    )


@pytest.mark.parametrize("template", ["chatml", "plain", None])
@pytest.mark.parametrize("name", ROWS)
def test_answers_are_kept_and_prompts_fit(
    name: str, template: str | None, tokenizer: PreTrainedTokenizerFast
) -> None:
    if name == "a long result" and template != "chatml":
        return  # the other templates have no calls
    row = ROWS[name]
    length = 300 if name == "a long result" else 200
    whole, cut = Renderer(tokenizer, template, 1 << 20), Renderer(tokenizer, template, length, True)
    wanted, found = whole.examples(row), cut.examples(row)
    assert max(len(e.token_ids) for e in wanted) > length >= max(len(e.token_ids) for e in found)
    assert targets(found, cut) == targets(wanted, whole)  # every answer, once
    assert all(not e.loss_mask[0] and any(e.loss_mask) for e in found)
    if row.messages and row.messages[0] is SYSTEM:
        head = whole.template.render([SYSTEM], False, "a")
        texts = [tokenizer.decode(e.token_ids) for e in found]
        assert all(text.startswith(head) for text in texts)
    assert max(len(e.token_ids) for e in found) > 0.6 * length or name == "many turns"
    assert cut.counts["truncated_rows"] == 1 and cut.counts["truncated_answers"] == 0
    with pytest.raises(DataError, match="more than the .00 allowed") as caught:
        Renderer(tokenizer, template, length).examples(row)
    assert "--truncate" in str(caught.value)
    # a row that fits is what it was
    assert Renderer(tokenizer, template, 1 << 20, True).examples(row) == wanted


def test_a_continued_text_loses_its_beginning_and_a_question_its_middle(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    row = ROWS["prompt"]
    continued, asked = (
        tokenizer.decode(Renderer(tokenizer, t, 150, True).examples(row)[0].token_ids)
        for t in ("plain", "chatml")
    )
    assert "begin" not in continued and "pan. end" in continued
    assert "begin" in asked and CUT_MARK in asked and "pan. end" in asked


def test_an_answer_that_is_too_long_loses_its_end_and_its_stop_token(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    for row in (
        SFTRow("a:1", messages=(SYSTEM, user(1, 30), answer(1) | {"content": WORDS * 30})),
        SFTRow("a:2", prompt=WORDS * 30, completion=WORDS * 30),
    ):
        renderer = Renderer(tokenizer, "chatml", 200, True)
        [example] = renderer.examples(row)
        assert len(example.token_ids) == len(example.loss_mask) == 200
        assert 80 < example.prompt_length <= 100 and sum(example.loss_mask) >= 100
        assert example.token_ids[-1] not in renderer.stop_token_ids
        assert renderer.counts == {"truncated_rows": 1, "truncated_answers": 1}
    with pytest.raises(DataError, match="no answer fits into 20 tokens"):
        Renderer(tokenizer, "chatml", 20, True).examples(row)


def test_both_answers_of_a_pair_have_the_same_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        PreferenceRow(f"a:{n}", (SYSTEM, user(n, 30)), "Yes.", "It is a much longer no. " * 4)
        for n in (1, 2)
    ]
    for template in ("chatml", "plain"):
        renderer = Renderer(tokenizer, template, 200, True)
        for _, one in tokenize_preferences(renderer, rows, None, (), True):
            good, bad = one.chosen, one.rejected
            assert good is not None and bad is not None
            at = good.prompt_length
            assert at == bad.prompt_length and good.token_ids[:at] == bad.token_ids[:at]
            assert max(len(good.token_ids), len(bad.token_ids)) <= 200
        assert renderer.counts == {"truncated_rows": 2, "truncated_answers": 0}


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 400])
@pytest.mark.parametrize("room", [-1, 0, 5, 31, 40, 100])
def test_a_cut_needs_few_tries_and_uses_the_room(size: int, room: int) -> None:
    tries = 0

    def excess(prompt: Any) -> int:
        nonlocal tries
        tries += 1
        return len(prompt) - room

    found = cut_prompt("a" * size, excess).prompt
    assert tries <= 12
    assert len(found) == min(size, max(room, 32)) or size <= room
    assert "a" * size == found or size > room


def test_prompts_alone_are_cut_for_their_answers(tokenizer: PreTrainedTokenizerFast) -> None:
    renderer = Renderer(tokenizer, "chatml", 200, True)
    row = PromptRow("a:1", (SYSTEM, user(1, 2), answer(1), user(2, 30)))

    def num_tokens(prompt: Any) -> int:
        return len(renderer.prompt(prompt)) + 50

    fitted = renderer.fit_prompt(row.prompt, num_tokens, row.where)
    assert fitted[0] == SYSTEM and [m["role"] for m in fitted] == ["system", "user"]
    assert 180 < num_tokens(fitted) <= 200 and renderer.counts["truncated_rows"] == 1
    assert renderer.fit_prompt(fitted, num_tokens, row.where) is fitted
    strict: Callable[..., Any] = renderer.without_cutting.fit_prompt
    assert strict(row.prompt, num_tokens, row.where) is row.prompt


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["sft", "dpo", "grpo"])
def test_the_plan_counts_what_is_cut(objective: str, tiny: Path, tmp_path: Path) -> None:
    prompts = [f"{n} {WORDS * (30 if n < 3 else 1)}" for n in range(8)]
    answers = {
        "sft": {"completion": "It is."},
        "dpo": {"chosen": "It is.", "rejected": "It is not."},
        "grpo": {"reference": "It is."},
    }[objective]
    rows = [{"prompt": prompt} | answers for prompt in prompts]
    values: dict[str, Any] = {"base": str(tiny), "objective": objective, "max_length": 120}
    if objective == "grpo":
        grader = tmp_path / "rules.py"
        grader.write_text("def short(prompt, completion, reference=None):\n    return 1.0\n")
        group = {"reward_funcs": f"{grader}:short", "max_new_tokens": 8, "num_generations": 2}
        values["grpo"] = group
    data = write_rows(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(DataError, match="120 allowed|for the answer"):
        plan(data, **values)
    result = plan(data, truncate=True, **values)["data"]
    assert (result["truncated_rows"], result["truncated_answers"]) == (3, 0)


@pytest.mark.slow
def test_a_run_records_what_was_cut_and_eval_cuts_alike(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"messages": [SYSTEM, user(n, 20), answer(n)]} for n in range(6)
    ]  # all rows are cut, those of the evaluation too
    data = write_rows(tmp_path / "rows.jsonl", *rows)
    common: dict[str, Any] = {"base": str(tiny), "max_length": 150, "max_steps": 1}
    run = train(data, truncate=True, output_dir=tmp_path / "run", quiet=False, **common)
    assert run.record["data"]["truncated_rows"] == 6
    assert data_notes(run.record["data"])[-1] == "cut to max_length: 6 rows"
    assert "cut to max_length: 6 rows" in capsys.readouterr().err  # before the first step
    measured = evaluate(run.folder, max_new_tokens=1)
    loss = run.record["losses"]["eval_loss_before"]
    assert measured["before"]["loss"] == pytest.approx(loss, rel=1e-4)
