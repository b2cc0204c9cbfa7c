"""Preferences: data in every form, each loss, the reference, runs that begin at ln 2, resume and pack exactly."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from afina import evaluate, merge, plan, train
from afina.adapters.active import BASE_ONLY, ActiveAdapter, ActiveAdapters
from afina.adapters.load_run import load_run
from afina.adapters.registry import registered_methods
from afina.adapters.saving import save_adapter
from afina.data.packing import pack_examples
from afina.data.renderer import Example, Renderer
from afina.data.schemas import PREFERENCE, PreferenceRow, split_pairs
from afina.data.table import detect_schema, read_table
from afina.errors import AdapterError, AfinaError, DataError, MergeError, SettingsError
from afina.models.causal_lm import CausalLM
from afina.models.loading import load_base
from afina.objectives.preference import PreferenceObjective
from afina.objectives.preference_data import tokenize_preferences
from afina.objectives.preference_losses import (
    AnswerLogprobs,
    kto_losses,
    pair_losses,
)
from afina.objectives.preference_report import displacement_warning
from afina.objectives.reference import ReferencePolicy, sequence_logprobs
from afina.objectives.registry import get_objective
from afina.objectives.reward_model import calibration_error, score_sequences
from afina.settings import (
    PREFERENCES,
    EvalSettings,
    KTOSettings,
    ORPOSettings,
    TrainSettings,
    make_settings,
    settings_groups,
)
from afina.training.setup.set_up import set_up_run
from afina.training.train import TrainResult
from afina.training.trainer import Trainer
from conftest import WORDS
from helpers import SHARED, metrics, put, write_rows

Learn = Callable[..., TrainResult]
LN2 = math.log(2)
TRAINED = {
    "target_modules": ["q_proj", "down_proj"],
    "rank": 4,
    "learning_rate": 5e-3,
    "max_tokens_per_batch": 300,
    "chat_template": "plain",
}
SHORT = TRAINED | {"max_steps": 4, "eval_steps": 2}


def pair(a: str, b: str) -> dict[str, Any]:
    return {"prompt": f"say {a} {b}:", "chosen": f" {a} {b} {a}", "rejected": f" the {b} by night"}


def rows_of(count: int) -> list[dict[str, Any]]:
    return [pair(a, b) for a in WORDS for b in WORDS if a < b][:count]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """24 pairs of answers of different lengths."""
    return write_rows(tmp_path / "pairs.jsonl", *rows_of(24))


def labels_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    both = [(row, name) for row in rows for name in ("chosen", "rejected")]
    return [
        {"prompt": r["prompt"], "completion": r[n], "label": n == "chosen"}
        for k, (r, n) in enumerate(both)
        if k % 3
    ]


@pytest.fixture
def learn(tiny: Path, general: Path) -> Learn:
    """A short run on the tiny base."""
    return lambda data, out, **values: train(
        data, output_dir=out, **SHORT | {"base": str(tiny), "retention_text": general} | values
    )


# ---- data

USER = {"role": "user", "content": "say sol"}
GOOD, BAD = {"role": "assistant", "content": "sol"}, {"role": "assistant", "content": "mar"}
FORMS = {
    "openai": {
        "input": {"messages": [USER], "tools": []},
        "preferred_output": [GOOD],
        "non_preferred_output": [BAD],
    },
    "conversations": {
        "conversations": [{"from": "human", "value": "say sol"}],
        "chosen": {"from": "gpt", "value": "sol"},
        "rejected": {"from": "gpt", "value": "mar"},
    },
    "messages": {"messages": [USER], "chosen": "sol", "rejected": "mar"},
    "prompt as messages": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "prompt and whole chats": {
        "prompt": "say sol",
        "chosen": [USER, GOOD],
        "rejected": [USER, BAD],
    },
    "whole chats": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "alpaca": {"instruction": "say sol", "input": "", "chosen": "sol", "rejected": "mar"},
}


def read(
    tmp_path: Path, *rows: Any, columns: dict[str, str] | None = None, **options: Any
) -> list[PreferenceRow]:
    file = write_rows(tmp_path / "rows.jsonl", *rows)
    return read_table(file, PREFERENCE, columns, **options).rows


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_a_pair_is_the_same_pair(name: str, tmp_path: Path) -> None:
    (row,) = read(tmp_path, FORMS[name])
    assert row.row(row.chosen).messages == (USER, GOOD)
    assert row.row(row.rejected).messages == (USER, BAD)
    assert detect_schema(tmp_path / "rows.jsonl", {}) == (PREFERENCE, "pairs")


def test_texts_stay_texts_and_a_system_message_comes_first(tmp_path: Path) -> None:
    plain, told = read(tmp_path, pair("sol", "mar"), pair("sol", "mar") | {"system": "be brief"})
    assert (plain.prompt, plain.chosen) == ("say sol mar:", " sol mar sol")
    assert [m["role"] for m in told.row(told.chosen).messages or ()] == [
        "system",
        "user",
        "assistant",
    ]


def test_earlier_answers_are_context_and_not_learned(tmp_path: Path, base: CausalLM) -> None:
    (row,) = read(tmp_path, {"messages": [USER, GOOD, USER], "chosen": "luna", "rejected": "mar"})
    example = Renderer(base.tokenizer, None, 192).example(row.row(row.chosen))
    assert (
        "".join(
            base.tokenizer.decode(t)
            for t, label in zip(example.token_ids, example.loss_mask)
            if label
        )
        == "luna</s>"
    )


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, GOOD], "label": True},
        {"prompt": [USER], "completion": [GOOD], "label": True},
        {"conversations": [USER, GOOD], "kto_tag": True},
        {"instruction": "say sol", "output": "sol", "kto_tag": True},
    ],
)
def test_every_form_of_a_label_is_the_same_answer(row: dict[str, Any], tmp_path: Path) -> None:
    (found,) = read(tmp_path, row)
    assert found.rejected is None and found.row(found.chosen).messages == (USER, GOOD)
    assert detect_schema(tmp_path / "rows.jsonl", {}) == (PREFERENCE, "labels")


def test_a_row_written_is_the_row_read(tmp_path: Path) -> None:
    rows = read(tmp_path, *FORMS.values(), pair("sol", "mar"))
    labels = split_pairs(rows)
    for given in (rows, labels):
        again = read(tmp_path, *(row.record() for row in given))
        assert [(r.prompt, r.chosen, r.rejected) for r in again] == [
            (r.prompt, r.chosen, r.rejected) for r in given
        ]


def test_columns_and_csv(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("question,better,worse\nsay sol,sol,mar\n")
    columns = {"prompt": "question", "chosen": "better", "rejected": "worse"}
    (row,) = read_table(file, PREFERENCE, columns).rows
    assert (row.prompt, row.chosen, row.rejected) == ("say sol", "sol", "mar")
    file.write_text("prompt,completion,label\nsay sol,sol,true\nsay sol,mar,0\n")
    assert [(r.chosen, r.rejected) for r in read_table(file, PREFERENCE, {}).rows] == [
        ("sol", None),
        (None, "mar"),
    ]


@pytest.mark.parametrize(
    ("row", "where", "what"),
    [
        ({"prompt": "a", "chosen": "b"}, ":1:rejected", "missing"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, ":1:rejected", "empty"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, ":1", "the same"),
        ({"prompt": [USER], "chosen": [USER], "rejected": [BAD]}, ":1:chosen", "does not follow"),
        ({"chosen": [GOOD], "rejected": [BAD]}, ":1:chosen", "do not begin alike"),
        ({"prompt": "a", "completion": "b", "label": "maybe"}, ":1:label", "true"),
        ({"messages": [USER], "label": True}, ":1:messages", "no answer"),
        ({"prompt": "a", "completion": "b"}, ":1", "neither a pair"),
        (
            {"input": {"messages": 3}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
            ":1:input.messages",
            "expected",
        ),
    ],
)
def test_a_bad_row_says_where_and_can_be_left_out(
    row: Any, where: str, what: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, row)
    assert str(caught.value.where).endswith(where) and what in caught.value.what
    assert len(read(tmp_path, row, pair("sol", "mar"), skip_bad_rows=True)) == 1


def test_pairs_and_labels_do_not_mix(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="some rows are pairs"):
        read(tmp_path, pair("sol", "mar"), {"prompt": "a", "completion": "b", "label": True})


@pytest.mark.shared
def test_what_llamafactory_ships_is_read_whole() -> None:
    folder = SHARED / "data" / "llamafactory-demo"
    tables = [
        read_table(folder / name, PREFERENCE, {})
        for name in ("dpo_en_demo.json", "kto_en_demo.json")
    ]
    assert [(t.format, len(t.rows), t.skipped) for t in tables] == [
        ("pairs", 300, []),
        ("labels", 300, []),
    ]
    assert sum(row.chosen is not None for row in tables[1].rows) == sum(
        row["label"] for row in json.loads((folder / "kto_en_demo.json").read_text())
    )


# ---- losses, against the formulas in float64

LOGPS = [
    torch.tensor(v)
    for v in ([-7.0, -3.5, -20.0], [-9.0, -2.5, -4.0], [-6.5, -4.0, -22.0], [-8.0, -3.0, -5.0])
]
TOKENS = [torch.tensor(v) for v in ([5.0, 2.0, 9.0], [6.0, 3.0, 4.0])]


def expected(
    objective: str,
    beta: float,
    label_smoothing: float = 0.0,
    gamma: float = 1.0,
    loss_type: str = "sigmoid",
    sft_weight: float = 0.0,
) -> Any:
    """The published formulas, number by number."""
    result = []
    for w, x, wr, xr, nw, nx in zip(*(t.double().tolist() for t in (*LOGPS, *TOKENS))):
        sigmoid = lambda z: 1 / (1 + math.exp(-z))  # noqa: E731
        h = beta * ((w - wr) - (x - xr))
        if objective == "orpo":
            odds = [math.log(math.exp(m) / (1 - math.exp(m))) for m in (w / nw, x / nx)]
            value = -w / nw - beta * math.log(sigmoid(odds[0] - odds[1]))
        elif objective == "simpo":
            value = -math.log(sigmoid(beta * (w / nw - x / nx) - gamma))
        elif loss_type == "robust":
            value = (
                -(1 - label_smoothing) * math.log(sigmoid(h))
                + label_smoothing * math.log(sigmoid(-h))
            ) / (1 - 2 * label_smoothing)
        elif loss_type == "hinge":
            value = max(0.0, 1 - h)
        elif loss_type == "ipo":
            value = ((w - wr) / nw - (x - xr) / nx - 1 / (2 * beta)) ** 2
        else:
            value = -(1 - label_smoothing) * math.log(sigmoid(h)) - label_smoothing * math.log(
                sigmoid(-h)
            )
        result.append(value + sft_weight * -w / nw)
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize(
    ("objective", "told"),
    [
        ("dpo", {"beta": 0.3}),
        ("dpo", {"beta": 0.3, "label_smoothing": 0.1}),
        ("dpo", {"beta": 0.3, "loss_type": "robust", "label_smoothing": 0.2}),
        ("dpo", {"beta": 0.3, "loss_type": "hinge"}),
        ("dpo", {"beta": 0.3, "loss_type": "ipo"}),
        ("dpo", {"beta": 0.3, "sft_weight": 0.5}),
        ("orpo", {"beta": 0.1}),
        ("simpo", {"beta": 2.0, "gamma": 1.6}),
        ("simpo", {"beta": 2.0, "sft_weight": 0.1}),
    ],
)
def test_losses_are_the_formulas(objective: str, told: dict[str, Any]) -> None:
    good, bad = (AnswerLogprobs(LOGPS[n], LOGPS[n + 2], TOKENS[n]) for n in (0, 1))
    found = pair_losses(settings_groups.get(objective)(**told), good, bad)
    torch.testing.assert_close(found.double(), expected(objective, **told), rtol=0, atol=2e-6)


def test_kto_is_its_formula() -> None:
    good, bad = (AnswerLogprobs(LOGPS[n], LOGPS[n + 2], TOKENS[n]) for n in (0, 1))
    options = KTOSettings(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    found = kto_losses(options, good, bad, torch.tensor(0.4))
    for sign, weight, losses, (policy, reference) in zip(
        (1, -1), (1.5, 0.5), found, ((0, 2), (1, 3))
    ):
        ratio = LOGPS[policy].double() - LOGPS[reference].double()
        torch.testing.assert_close(
            losses.double(),
            weight * (1 - torch.sigmoid(sign * 0.3 * (ratio - 0.4))),
            rtol=0,
            atol=1e-6,
        )


def test_orpo_stays_finite_where_an_answer_is_certain() -> None:
    sure = AnswerLogprobs(torch.tensor([0.0]), None, torch.tensor([3.0]))
    unsure = AnswerLogprobs(torch.tensor([-1.0], requires_grad=True), None, torch.tensor([3.0]))
    loss = pair_losses(ORPOSettings(beta=0.1), sure, unsure)
    loss.sum().backward()
    assert loss.isfinite().all() and unsure.policy.grad.isfinite().all()  # type: ignore[union-attr]


def test_calibration() -> None:
    torch.testing.assert_close(
        calibration_error(torch.zeros(4) - 1e-9), 0.5
    )  # sure of nothing, and never right
    exact = torch.full((10,), math.log(0.8 / 0.2))
    exact[:2] *= -1  # 80% sure, and right on 8 of 10
    assert calibration_error(exact) < 1e-6


# ---- the reference


def examples(base: CausalLM, pairs: Path) -> list[Example]:
    renderer = Renderer(base.tokenizer, "plain", 192)
    made = tokenize_preferences(renderer, read_table(pairs, PREFERENCE, {}).rows, None, (), False)
    return [
        example for _, choice in made for example in (choice.chosen, choice.rejected) if example
    ]


@pytest.mark.parametrize("method", sorted(registered_methods()))
def test_the_reference_with_the_adapter_off_is_a_separate_frozen_copy(
    method: str, base: CausalLM, tiny: Path, pairs: Path
) -> None:
    put(base, "policy", method=method, **({} if method == "full" else {"rank": 4}))
    given = examples(base, pairs)
    batch, separate = pack_examples(given), load_base(str(tiny))
    off = ReferencePolicy("base", "").logps(base, batch, given)
    on = sequence_logprobs(base, batch, ActiveAdapters((ActiveAdapter("policy"),)))[0]
    assert (off - sequence_logprobs(separate, batch, BASE_ONLY)[0]).abs().max() <= 1e-6
    assert (on - off).abs().max() > 0.1  # the adapter would have shown


KINDS = ("lora", "dora", "mora", "full", "alora", "qlora", "qdora", "qmora", "adora", "amora")


@pytest.mark.parametrize(
    ("method", "continued"),
    [(method, False) for method in KINDS]
    + [
        pytest.param(method, True, marks=[] if method in ("lora", "alora") else pytest.mark.slow)
        for method in KINDS
    ],
)
def test_dpo_begins_at_ln_2(
    learn: Learn, method: str, continued: bool, tiny: Path, pairs: Path, tmp_path: Path
) -> None:
    """Each method on each base, from nothing and from an adapter that has learned something."""
    values = {**TRAINED, "base": str(tiny), "method": method}
    values |= {"target_modules": "norms", "rank": 8} if method == "full" else {}
    if "a" in method.removesuffix("dora").removesuffix("mora").removesuffix("lora"):
        values |= {"invocation": ":"}
    if continued:
        sft = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows_of(24)]
        data = write_rows(tmp_path / "sft.jsonl", *sft)
        learn(
            data,
            tmp_path / "sft",
            **values | {"max_steps": 3, "eval_steps": 3, "learning_rate": 2e-2},
        )
        values |= {"init_adapter": str(tmp_path / "sft")}
    setup = set_up_run(TrainSettings(data=pairs, objective="dpo", **values))
    task = setup.prepared.task
    assert isinstance(task, PreferenceObjective) and task.reference is not None
    assert task.reference.mode == ("adapter" if continued else "base")
    if continued:  # it has learned something: its log-probabilities are not the base's
        batch = task.collate(task.train, 0)
        moved = (
            task.reference.logps(task.base, batch.flat, batch.examples)
            - sequence_logprobs(task.base, batch.flat, BASE_ONLY)[0]
        )
        assert moved.abs().max() > 0.01
    losses = [one.total for one in task.row_losses(task.train, setup.adapter.active)]
    assert max(abs(loss - LN2) for loss in losses) <= 1e-6
    batch = task.collate(task.train, 0)
    assert (
        abs(task.loss(batch, setup.adapter.active).item() / task.num_targets(batch) - LN2) <= 1e-6
    )  # with a graph too
    frozen = setup.prepared.baseline
    assert bool(frozen) == continued


@pytest.mark.slow
def test_the_mode_is_written_down_and_precomputed_is_the_same(
    learn: Learn, pairs: Path, tmp_path: Path
) -> None:
    runs = {
        mode: learn(pairs, tmp_path / mode, objective="dpo", dpo={"reference": mode})
        for mode in ("base", "precomputed")
    }
    for mode, run in runs.items():
        told = json.loads((run.folder / "reference.json").read_text())
        assert told["mode"] == mode and told["of"] == "the base, adapter off" and told["why"]
        assert run.record["preferences"]["reference"] == told
    base = runs["precomputed"].record["base"]
    with safe_open(runs["precomputed"].folder / "reference.safetensors", "pt") as cached:
        of = f"{base['hash']}plaintorch.{base['dtype']}"  # as version 0.1 wrote it
        assert cached.metadata()["of"] == hashlib.sha256(of.encode()).hexdigest()
    ours, theirs = (metrics(run.folder) for run in runs.values())
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys() and abs(a["loss"] - b["loss"]) <= 1e-6


@pytest.mark.parametrize(
    ("values", "what"),
    [
        (
            {"init_adapter": "sft", "dpo": {"reference": "base"}},
            "the reference of a continued adapter",
        ),
        ({"dpo": {"reference": "adapter"}}, "there is no adapter to be the reference"),
        ({"dropout": 0.1}, "a reference and dropout"),
        ({"init_adapter": "sft", "rank": 16}, "rank is not the adapter's"),
        ({"init_adapter": "sft", "method": "dora"}, "the adapter is lora"),
        (
            {"init_adapter": "sft", "target_modules": ["k_proj"]},
            "target_modules is not the adapter's",
        ),
        ({"init_adapter": 3}, "init_adapter cannot be 3"),
        ({"init_adapter": "judge"}, "dpo cannot continue this adapter"),
        ({"dpo": {"gamma": 1.0}}, "unknown setting dpo.gamma"),
        ({"objective": "orpo", "orpo": {"reference": "base"}}, "unknown setting orpo.reference"),
        ({"dpo": {"loss_type": "robust"}}, "robust needs dpo.label_smoothing"),
        ({"dpo": {"loss_type": "hinge", "label_smoothing": 0.1}}, "no effect on the loss 'hinge'"),
        ({"dpo": {"beta": -1}}, "dpo.beta cannot be -1"),
        ({"lora": {"operator": "sharing"}}, "unknown setting lora.operator"),
        ({"mora": {"operator": "sharing"}}, "mora.operator has no effect: method is 'lora'"),
        ({"objective": "sft", "dpo": {"beta": 0.1}}, "dpo.beta has no effect: objective is 'sft'"),
    ],
)
def test_what_could_mean_two_things_is_refused(
    learn: Learn,
    values: dict[str, Any],
    what: str,
    tiny: Path,
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    start = values.get("init_adapter")
    if start == "sft":
        data = write_rows(
            tmp_path / "sft.jsonl",
            {"prompt": "a", "completion": "b"},
            {"prompt": "c", "completion": "d"},
        )
        learn(data, tmp_path / "sft", max_steps=1, eval_steps=1, eval_data=data)
    elif start == "judge":
        learn(pairs, tmp_path / "judge", max_steps=1, eval_steps=1, objective="reward")
    told = {"base": str(tiny), "chat_template": "plain", "objective": "dpo"} | values
    if "target_modules" not in values and start is None:
        told["target_modules"] = TRAINED["target_modules"]
    with pytest.raises(
        SettingsError if values.get("objective") != "sft" else AfinaError, match=what
    ):
        set_up_run(make_settings(TrainSettings, {"data": pairs} | told))


def test_an_objective_is_no_method(pairs: Path) -> None:
    for name, hint in (
        ("dpo", "--objective dpo"),
        ("qipo", "--objective dpo --dpo.loss-type ipo"),
        ("kto", "--objective kto"),
    ):
        with pytest.raises(SettingsError, match="an objective, not a method") as caught:
            set_up_run(TrainSettings(data=pairs, method=name))
        assert hint in str(caught.value.hint)


def test_labels_are_for_kto(tiny: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "labels.jsonl", *labels_of(rows_of(12)))
    with pytest.raises(DataError, match="dpo compares two completions"):
        set_up_run(TrainSettings(data=data, base=str(tiny), objective="dpo"))


# ---- runs


@pytest.mark.parametrize(
    "objective",
    [
        name if name == "dpo" else pytest.param(name, marks=pytest.mark.slow)
        for name in sorted(PREFERENCES)
    ],
)
def test_a_run_learns_and_logs(
    learn: Learn, objective: str, tiny: Path, pairs: Path, tmp_path: Path
) -> None:
    run = learn(
        pairs,
        tmp_path / "run",
        objective=objective,
        max_steps=8,
        eval_steps=4,
        max_tokens_per_batch=2000,
    )
    ticks, found = metrics(run.folder), run.record["preferences"]
    assert ticks[-1]["loss"] < ticks[0]["loss"]
    assert (
        found["after"]["rewards/accuracies"] > (0.7 if objective == "kto" else 0.9)
        and run.record["verdict"]
    )
    names = {"rewards/accuracies", "rewards/chosen", "rewards/rejected"}
    names |= {"chosen_length", "rejected_length"}
    names |= set() if objective == "reward" else {"logps/chosen", "logps/rejected"}
    names |= {"z"} if objective == "kto" else {"rewards/margins"}
    assert names <= ticks[0].keys() and {f"eval_{name}" for name in names} <= ticks[3].keys()
    assert "chosen completion preferred" in (run.folder / "README.md").read_text()
    judged = evaluate(run.folder)
    assert judged["after"]["rewards/accuracies"] == found["after"]["rewards/accuracies"]
    assert judged["after"]["loss"] == pytest.approx(
        run.record["losses"]["eval_loss_after"], abs=1e-5
    )
    planned = plan(pairs, base=str(tiny), objective=objective, chat_template="plain")
    assert planned["data"]["objective"] == objective and planned["cost"]["peak_bytes"] > 0


@pytest.mark.slow
def test_pairs_and_labels_are_recognised(learn: Learn, pairs: Path, tmp_path: Path) -> None:
    labels = write_rows(tmp_path / "labels.jsonl", *labels_of(rows_of(20)))
    for data, objective in ((pairs, "dpo"), (labels, "kto")):
        run = learn(data, tmp_path / objective, max_steps=2)
        assert run.record["objective"] == objective


@pytest.mark.slow
@pytest.mark.parametrize("objective", sorted(PREFERENCES))
def test_packed_is_unpacked(objective: str, tiny: Path, pairs: Path) -> None:
    values = {**TRAINED, "base": str(tiny), "objective": objective, "data": pairs}
    together = set_up_run(TrainSettings(**values | {"max_tokens_per_batch": 100_000}))
    alone = set_up_run(
        TrainSettings(**values | {"max_tokens_per_batch": 1, "gradient_accumulation_steps": 1000})
    )
    found = []
    for setup in (together, alone):
        task, adapter = setup.prepared.task, setup.adapter
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        batches = task.step_batches(0)
        losses = [task.loss(batch, adapter.active) for batch in batches]
        count = sum(task.num_targets(batch) for batch in batches)
        (torch.stack(losses).sum() / count).backward()
        gradients = torch.cat([p.grad.flatten() for p in adapter.parameters()])  # type: ignore[union-attr]
        found.append(
            (len(batches), count, sum(x.item() for x in losses) / count, gradients, task.metrics())
        )
    (one, rows, loss, gradients, facts), (many, same, other, more, noted) = found
    assert one == 1 and many == rows == same > 10
    assert loss == pytest.approx(other, abs=1e-5)
    assert (gradients - more).norm() <= 1e-4 * gradients.norm()
    assert facts.keys() == noted.keys() and all(
        noted[name] == pytest.approx(facts[name], abs=1e-3) for name in facts
    )


@pytest.mark.parametrize(
    ("objective", "own"),
    [
        ("dpo", {"init_adapter": "sft", "dpo": {"reference": "precomputed"}}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("dpo", {}), ("dpo", {"init_adapter": "sft"}), ("kto", {}), ("reward", {}))
        ),
    ],
)
def test_resumed_is_uninterrupted(
    learn: Learn,
    objective: str,
    own: dict[str, Any],
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if "init_adapter" in own:
        sft = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows_of(24)]
        learn(write_rows(tmp_path / "sft.jsonl", *sft), tmp_path / "sft", max_steps=2)
    values = {"objective": objective, "max_steps": 4} | own
    whole = learn(pairs, tmp_path / "whole", **values)

    end = Trainer.finish_step

    def cut(self: Trainer, *given: Any) -> None:
        end(self, *given)
        if self.progress.step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "finish_step", cut)
    with pytest.raises(KeyboardInterrupt):
        learn(pairs, tmp_path / "cut", **values)
    monkeypatch.setattr(Trainer, "finish_step", end)
    resumed = learn(pairs, tmp_path / "cut", **values, resume=True)
    assert metrics(resumed.folder) == metrics(whole.folder)
    assert resumed.record["adapter"] == whole.record["adapter"]


@pytest.mark.slow
def test_another_start_is_not_gone_on_with(
    learn: Learn, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sft = write_rows(
        tmp_path / "sft.jsonl",
        *({"prompt": r["prompt"], "completion": r["chosen"]} for r in rows_of(24)),
    )
    learn(sft, tmp_path / "sft", max_steps=2)
    run = learn(pairs, tmp_path / "dpo", init_adapter="sft")
    (tmp_path / "sft").rename(tmp_path / "old")
    learn(sft, tmp_path / "sft", max_steps=3)
    with pytest.raises(AfinaError, match="adapter it goes on from is not what"):
        learn(pairs, tmp_path / "dpo", init_adapter="sft", resume=True)
    with pytest.raises(DataError, match="has changed"):
        evaluate(run.folder)


def test_the_better_answers_becoming_unlikely_is_a_warning_with_a_remedy() -> None:
    before, after = (
        {"logps/chosen": -40.0, "logps/rejected": -42.0},
        {"logps/chosen": -42.1, "logps/rejected": -60.0},
    )
    hint = get_objective("dpo").displacement_hint
    (said,) = displacement_warning({"before": before, "after": after}, hint)
    assert "likelihood displacement" in said and "sft" in said and "-40.0 to -42.1" in said
    assert not displacement_warning(
        {"before": before, "after": {**after, "logps/chosen": -41.9}}, hint
    )


@pytest.mark.slow
def test_the_sft_term_keeps_the_better_answers_likely(
    learn: Learn, pairs: Path, tmp_path: Path
) -> None:
    told = {"objective": "dpo", "max_steps": 10, "eval_steps": 10, "max_tokens_per_batch": 2000}
    found = [
        learn(pairs, tmp_path / str(sft), dpo={"sft_weight": sft}, **told).record["preferences"][
            "after"
        ]["logps/chosen"]
        for sft in (0.0, 1.0)
    ]
    assert found[1] > found[0] + 0.5


# ---- reward models


@pytest.mark.parametrize(
    "method", ["lora", *(pytest.param(m, marks=pytest.mark.slow) for m in ("alora", "qlora"))]
)
def test_a_reward_model_on_disk_is_the_one_in_memory(
    learn: Learn, method: str, tiny: Path, pairs: Path, tmp_path: Path
) -> None:
    more = {"invocation": ":"} if method == "alora" else {}
    run = learn(pairs, tmp_path / "run", objective="reward", method=method, max_steps=6, **more)
    opened = load_run(run.folder, EvalSettings(adapter=run.folder))
    base = opened.base
    assert isinstance(base, CausalLM)
    with pytest.raises(AdapterError, match="cannot generate text"):
        _ = opened.causal_lm
    with pytest.raises(MergeError):  # an activated one, and one on 4 bits, neither
        merge(run.folder, output_dir=tmp_path / "merged")
    given = examples(base, pairs)
    found = score_sequences(base, pack_examples(given), opened.active)
    assert found.std() > 1e-3
    assert score_sequences(base, pack_examples(given), BASE_ONLY).abs().max() == 0.0
    alone = torch.cat(
        [score_sequences(base, pack_examples([example]), opened.active) for example in given]
    )
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)
    if method != "lora":
        return
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForSequenceClassification

    plain = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1)
    theirs = peft.PeftModel.from_pretrained(plain, run.folder / "adapter").eval()
    with torch.no_grad():
        scores = torch.cat(
            [theirs(input_ids=torch.tensor([example.token_ids])).logits[:, 0] for example in given]
        )
    torch.testing.assert_close(found, scores, atol=1e-5, rtol=0)


# ---- TRL


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "loss"), [("dpo", "sigmoid"), ("dpo", "ipo"), ("dpo", "hinge"), ("kto", "kto")]
)
def test_each_step_is_trls(
    learn: Learn, objective: str, loss: str, tiny: Path, tmp_path: Path
) -> None:
    """The same rows, start, rate and optimizer: losses of six steps within 1e-4."""
    trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = rows_of(10) if objective == "dpo" else labels_of([r for r in rows_of(12)])
    if objective == "kto":  # every prompt once: its mismatched answers are then TRL's
        rows = list({row["prompt"]: row for row in rows}.values())
    data = write_rows(tmp_path / "rows.jsonl", *rows)
    steps, rate = 6, 5e-3
    options = {} if loss in ("sigmoid", "kto") else {objective: {"loss_type": loss}}
    values = {
        **TRAINED,
        "base": str(tiny),
        "objective": objective,
        **options,
        "eval_data": data,
        "max_tokens_per_batch": 10**5,
    }
    values |= {
        "learning_rate": rate,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
        "max_grad_norm": 1.0,
        "max_steps": steps,
        "eval_steps": 6,
    }
    setup = set_up_run(TrainSettings(data=data, **values))
    save_adapter(setup.adapter, setup.prepared.base, tmp_path / "start")
    ours = [tick["loss"] for tick in metrics(learn(data, tmp_path / "run", **values).folder)]

    model = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32),
        tmp_path / "start",
        is_trainable=True,
    )
    shared = {
        "output_dir": str(tmp_path / "trl"),
        "per_device_train_batch_size": len(rows),
        "max_steps": steps,
        "learning_rate": rate,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "optim": "adamw_torch",
        "beta": 0.1,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": 192,
        "disable_tqdm": True,
        "save_strategy": "no",
        "loss_type": loss,
    }
    kinds = {"dpo": (trl.DPOTrainer, trl.DPOConfig), "kto": (trl.KTOTrainer, trl.KTOConfig)}[
        objective
    ]
    trainer = kinds[0](
        model=model,
        args=kinds[1](**shared),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny),
    )
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(theirs) == steps
    assert abs(ours[0] - ours[-1]) > 0.05  # six steps that moved something
    for a, b in zip(ours, theirs, strict=True):
        assert abs(a - b) <= 1e-4, (ours, theirs)


def test_what_only_an_objective_knows_is_checked() -> None:
    given = TrainSettings(data=Path("x"), objective="simpo", simpo={"gamma": 0.5})
    assert given.group("simpo").beta == 2.0 and given.group("simpo").gamma == 0.5
