"""Learning from rewards: advantages, losses, who judges, runs that resume exactly, learn, and refuse what cannot be."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from afina import evaluate, merge, plan, train
from afina.adapters.active import BASE_ONLY
from afina.adapters.load_run import load_run
from afina.data.schemas import PROMPT
from afina.data.table import read_table
from afina.engine.engine import Engine
from afina.errors import AfinaError, DataError, TrainingError
from afina.objectives.policy import PolicyObjective
from afina.objectives.policy_losses import (
    clipped_losses,
    gae,
    grpo_advantages,
    kl_estimate,
    rloo_advantages,
    whiten,
)
from afina.objectives.reward_model import score_sequences
from afina.settings import EvalSettings, TrainSettings
from afina.training.setup.set_up import RunSetup, set_up_run
from afina.training.train import TrainResult
from afina.training.trainer import Trainer
from conftest import WORDS
from helpers import logits, metrics, write_rows

Learn = Callable[..., TrainResult]
RULES = """
def vowels(prompt, answer, reference):
    return sum(c in "aeiou" for c in answer) / max(1, len(answer))

def short(prompt, answer, reference):
    return -len(answer) / 100

def breaks(prompt, answer, reference):
    return {}[prompt]

def nothing(prompt, answer, reference):
    return float("nan")

def word(prompt, answer, reference):
    return "good"

def meant(prompt, answer, reference):
    return float(prompt.startswith("say ") and reference == prompt[4:7])
"""
TOLD = {"max_new_tokens": 6, "num_generations": 4, "prompts_per_step": 4}
SHORT = {
    "target_modules": ["down_proj", "lm_head"],
    "rank": 4,
    "learning_rate": 2e-2,
    "max_tokens_per_batch": 300,
    "chat_template": "plain",
    "max_steps": 4,
    "eval_steps": 2,
    "eval_size": 0.2,
}


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """40 prompts, and rules beside them."""
    (tmp_path / "rules.py").write_text(RULES)
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": f"say {a} {b}:", "completion": a[:3]} for a in WORDS for b in WORDS if a < b
    ][:40]
    return write_rows(tmp_path / "asked.jsonl", *rows)


@pytest.fixture
def learn(tiny: Path, general: Path) -> Learn:
    """A short run on the tiny base."""

    def run(data: Path, out: Path, **values: Any) -> TrainResult:
        options = TOLD | {"reward_funcs": "rules.py:vowels"} | values.pop("options", {})
        return train(
            data,
            output_dir=out,
            **SHORT | {"base": str(tiny), "retention_text": general} | values,
            **{values["objective"]: options},
        )

    return run


def ready(tiny: Path, data: Path, **values: Any) -> RunSetup:
    """A run that has not begun, its adapter moved away from zero."""
    options = TOLD | {"reward_funcs": "rules.py:vowels"} | values.pop("options", {})
    setup = set_up_run(
        TrainSettings(
            data=data,
            **SHORT | {"base": str(tiny), "objective": "grpo"} | values,
            **{values.get("objective", "grpo"): options},
        )
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in setup.adapter.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    setup.adapter.train(False)
    return setup


# ---- numbers


def test_advantages_of_groups() -> None:
    told = torch.tensor([[1.0, 0.0, 0.5, 2.0], [3.0, 3.0, 3.0, 3.0]], dtype=torch.float64)
    for k, row in enumerate(told.tolist()):
        mean = sum(row) / 4
        deviation = math.sqrt(sum((r - mean) ** 2 for r in row) / 3)
        for i, r in enumerate(row):
            assert grpo_advantages(told, True)[k, i] == pytest.approx(
                (r - mean) / (deviation + 1e-4), abs=1e-12
            )
            assert grpo_advantages(told, False)[k, i] == pytest.approx(r - mean, abs=1e-12)
            assert rloo_advantages(told)[k, i] == pytest.approx(r - (sum(row) - r) / 3, abs=1e-12)


def test_gae_is_the_sum_that_defines_it() -> None:
    rng = random.Random(0)
    given, values = ([rng.gauss(0, 1) for _ in range(7)] for _ in range(2))
    gamma, lam = 0.9, 0.7
    found = gae(
        torch.tensor(given, dtype=torch.float64),
        torch.tensor(values, dtype=torch.float64),
        gamma,
        lam,
    ).tolist()
    for t in range(7):
        following = [*values, 0.0]
        deltas = [given[u] + gamma * following[u + 1] - following[u] for u in range(7)]
        assert found[t] == pytest.approx(
            sum((gamma * lam) ** (u - t) * deltas[u] for u in range(t, 7)), abs=1e-12
        )
    whole = gae(
        torch.tensor(given, dtype=torch.float64), torch.zeros(7, dtype=torch.float64), 1.0, 1.0
    )
    assert whole[2].item() == pytest.approx(
        sum(given[2:]), abs=1e-12
    )  # with lambda 1 it is what came of it


def test_losses_of_tokens() -> None:
    logps, old = torch.tensor([-1.0, -2.0, -0.5, -3.0]), torch.tensor([-1.5, -1.0, -0.5, -3.1])
    advantages = torch.tensor([2.0, -1.0, 0.5, -2.0])
    losses, clipped = clipped_losses(logps, old, advantages, 0.2)
    for i in range(4):
        ratio, a = math.exp(logps[i] - old[i]), advantages[i].item()
        assert losses[i].item() == pytest.approx(
            -min(ratio * a, min(max(ratio, 0.8), 1.2) * a), abs=1e-6
        )
    assert clipped.tolist() == [True, True, False, False]
    reference = torch.tensor([-1.2, -2.0, -0.1, -5.0])
    for found, p, q in zip(
        kl_estimate(logps, reference).tolist(), logps.tolist(), reference.tolist(), strict=True
    ):
        assert found == pytest.approx(math.exp(q - p) - (q - p) - 1, abs=1e-6)
    even = whiten(torch.tensor([1.0, 4.0, -2.0], dtype=torch.float64))
    assert even.mean().item() == pytest.approx(0, abs=1e-12)
    assert even.square().mean().item() == pytest.approx(1, abs=1e-6)


def test_the_divergence_is_that_of_the_distributions() -> None:
    """Over a whole vocabulary the estimate's mean is sum p log(p/q)."""
    p, q = (
        torch.randn(50, generator=torch.Generator().manual_seed(s)).double().log_softmax(0)
        for s in (1, 2)
    )
    assert (p.exp() * kl_estimate(p, q)).sum().item() == pytest.approx(
        (p.exp() * (p - q)).sum().item(), abs=1e-12
    )


@pytest.mark.parametrize("method", ["lora", pytest.param("dora", marks=pytest.mark.slow)])
def test_the_first_gradient_is_the_policy_gradient(method: str, tiny: Path, asked: Path) -> None:
    """At ratio 1: minus the mean of A grad log p over the tokens, whatever the clip."""
    setup = ready(tiny, asked, method=method, options={"beta": 0.0})
    task, adapter = setup.prepared.task, setup.adapter
    assert isinstance(task, PolicyObjective)
    batch = task.collate(task.train[:3], 1)
    assert batch.advantages.abs().max() > 0.1
    found, plain = (
        torch.autograd.grad(loss, adapter.parameters())
        for loss in (
            task.loss(batch, adapter.active),
            -(batch.advantages * task.read(batch, adapter.active)[0]).sum(),
        )
    )
    for ours, theirs in zip(found, plain, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-9


@pytest.mark.slow
def test_packed_is_unpacked(tiny: Path, asked: Path) -> None:
    for objective in ("grpo", "rloo", "ppo"):
        found = []
        for batch_tokens in (100_000, 1):
            setup = ready(
                tiny,
                asked,
                objective=objective,
                max_tokens_per_batch=batch_tokens,
                options={"num_iterations": 2, "beta": 0.1},
            )
            task, route = setup.prepared.task, setup.adapter.active
            batches = task.step_batches(0)
            count = sum(task.num_targets(batch) for batch in batches)
            loss = torch.stack([task.loss(batch, route) for batch in batches]).sum() / count
            loss.backward()
            gradient = torch.cat([p.grad.flatten() for p in setup.adapter.parameters()])  # type: ignore[union-attr]
            found.append((len(batches), count, loss.item(), gradient))
        (one, tokens, loss, gradient), (many, same, other, more) = found
        assert (one, many) == (1, 16), objective
        assert tokens == same
        assert loss == pytest.approx(other, abs=1e-5)
        assert (gradient - more).norm() <= 1e-4 * gradient.norm()


def test_the_kl_is_in_the_reward_or_in_the_loss(tiny: Path, asked: Path) -> None:
    """rloo subtracts beta (log p - log q) of the whole answer before it compares; ppo gives it token by token."""
    setup = ready(tiny, asked, objective="rloo", options={"beta": 0.5, "num_iterations": 2})
    task = setup.prepared.task
    assert isinstance(task, PolicyObjective)
    batch = task.collate(task.train[:2], 3)
    texts = [example for example in _answers(task, batch)]
    judged = torch.tensor([_vowels(text) for text in texts], dtype=torch.float64)
    counts = _counts(batch)
    assert batch.old_logprobs is not None
    drift = torch.stack(
        [part.double().sum() for part in (batch.old_logprobs - batch.reference).split(counts)]
    )
    expected = rloo_advantages((judged - 0.5 * drift).view(2, 4)).flatten()
    firsts = torch.tensor(
        [part[0].item() for part in batch.advantages.split(counts)], dtype=torch.float64
    )
    assert drift.abs().max() > 1e-3
    torch.testing.assert_close(firsts, expected, atol=1e-4, rtol=0)

    setup = ready(
        tiny,
        asked,
        objective="ppo",
        options={
            "beta": 0.5,
            "num_iterations": 2,
            "whiten_advantages": False,
            "num_generations": 1,
        },
    )
    task = setup.prepared.task
    assert isinstance(task, PolicyObjective)
    batch = task.collate(task.train[:4], 3)
    assert batch.old_logprobs is not None
    assert batch.returns is not None
    values = task.read(batch, setup.adapter.active, True)[1]
    assert values is not None
    pieces = zip(
        _answers(task, batch),
        *(
            t.split(_counts(batch))
            for t in (batch.old_logprobs - batch.reference, values, batch.advantages)
        ),
    )
    for text, apart, value, advantages in pieces:
        each = -0.5 * apart
        each[-1] += _vowels(text)
        torch.testing.assert_close(
            advantages, gae(each, value.detach(), 1.0, 0.95), atol=1e-5, rtol=0
        )


def _counts(batch: Any) -> list[int]:
    return [
        int((part >= 0).sum())
        for part in batch.flat.labels.tensor_split(batch.flat.cu_seqlens[1:-1])
    ]


def _answers(task: PolicyObjective, batch: Any) -> list[str]:
    """The answers of a batch as text."""
    parts = batch.flat.labels.tensor_split(batch.flat.cu_seqlens[1:-1])
    ends = {task.base.tokenizer.eos_token_id}
    return [
        task.base.decode([t for t in part.tolist() if t >= 0 and t not in ends]).strip()
        for part in parts
    ]


def _vowels(answer: str) -> float:
    return sum(c in "aeiou" for c in answer) / max(1, len(answer))


# ---- who writes


@pytest.mark.parametrize(
    "method",
    [
        "lora",
        "alora",
        *(pytest.param(m, marks=pytest.mark.slow) for m in ("qlora", "mora", "qadora", "full")),
    ],
)
def test_what_was_written_is_what_is_read(method: str, tiny: Path, asked: Path) -> None:
    """The likeliest answers are the likeliest tokens of the reading forward too, whoever wrote them."""
    more: dict[str, Any] = {"invocation": ":"} if method in ("alora", "qadora") else {}
    more |= {"target_modules": "norms"} if method == "full" else {}
    setup = ready(tiny, asked, method=method, **more)
    task, base = setup.prepared.task, setup.prepared.base
    assert isinstance(task, PolicyObjective)
    route, rows = setup.adapter.active, task.eval_rows[:4]
    plain = [answer.token_ids for answer in task.eval_completions(rows, BASE_ONLY)[0]]
    written, examples, _ = task.eval_completions(rows, route)
    assert [answer.token_ids for answer in written] != plain
    batch = task.pack(examples)
    with torch.no_grad(), base.forward_context.use(batch.segments(route)):
        logits = base.all_logits(batch.flat.token_ids, batch.flat.positions, batch.flat.cu_seqlens)  # type: ignore[union-attr]
    kept = batch.flat.labels >= 0
    gap = (
        logits[kept].max(-1).values - logits[kept].gather(1, batch.flat.labels[kept][:, None])[:, 0]
    )
    assert gap.max() < 1e-3


def test_an_answer_that_says_the_invocation_does_not_move_it(tiny: Path, asked: Path) -> None:
    setup = ready(tiny, asked, method="alora", invocation=":")
    task = setup.prepared.task
    assert isinstance(task, PolicyObjective)
    _, examples, _ = task.eval_completions(task.eval_rows[:1], setup.adapter.active)
    [colon] = setup.prepared.invocation
    spoken = examples[0]
    spoken.token_ids[-1] = colon
    table = task.pack([spoken]).segments(setup.adapter.active)
    assert [row.start for row in table.spans] == [spoken.prompt_length - 1]


def test_sampled_answers_follow_the_temperature(tiny: Path, asked: Path) -> None:
    """What is learned is the policy that was sampled: log p at that temperature."""
    setup = ready(tiny, asked, options={"temperature": 0.5}, target_modules=["q_proj"])
    task, base = setup.prepared.task, setup.prepared.base
    assert isinstance(task, PolicyObjective)
    batch = task.collate(task.train[:2], 0)
    flat = batch.flat
    with torch.no_grad(), base.forward_context.use(batch.segments(setup.adapter.active)):
        logits = base.all_logits(flat.token_ids, flat.positions, flat.cu_seqlens)  # type: ignore[union-attr]
    kept = flat.labels >= 0
    expected = (logits[kept] / 0.5).log_softmax(-1).gather(1, flat.labels[kept][:, None])[:, 0]
    torch.testing.assert_close(
        task.read(batch, setup.adapter.active)[0].detach(), expected, atol=1e-4, rtol=0
    )


# ---- who judges


@pytest.mark.slow
def test_a_reward_model_judges_on_the_same_base(
    learn: Learn, tiny: Path, general: Path, asked: Path, tmp_path: Path
) -> None:
    pairs = [
        {"prompt": f"say {a} {b}:", "chosen": f" {a} {b}", "rejected": " the night"}
        for a in WORDS
        for b in WORDS
        if a < b
    ]
    values = {
        "base": str(tiny),
        "retention_text": general,
        "chat_template": "plain",
        "target_modules": ["q_proj"],
        "rank": 4,
    }
    train(
        write_rows(tmp_path / "pairs.jsonl", *pairs[:20]),
        output_dir=tmp_path / "judge",
        objective="reward",
        learning_rate=1e-2,
        max_steps=6,
        **values,
    )
    told = {"reward_funcs": {"judge": 0.5, "rules.py:short": 2.0}}
    run = learn(asked, tmp_path / "run", objective="grpo", options=told, max_steps=2)
    tick = metrics(run.folder)[0]
    assert tick["reward"] == pytest.approx(
        0.5 * tick["reward_judge"] + 2 * tick["reward_rules.py:short"], abs=1e-6
    )
    assert [judge["name"] for judge in run.record["policy"]["reward_functions"]] == [
        "judge",
        "rules.py:short",
    ]
    setup = ready(tiny, asked, options=told)
    task, base = setup.prepared.task, setup.prepared.base
    assert isinstance(task, PolicyObjective)
    _, examples, found = task.eval_completions(task.eval_rows, setup.adapter.active)
    opened = load_run(tmp_path / "judge", EvalSettings(adapter=tmp_path / "judge"))
    alone = score_sequences(opened.base, task.pack(examples).flat, opened.active)  # type: ignore[arg-type]
    torch.testing.assert_close(found["reward_judge"].float(), alone.detach(), atol=1e-4, rtol=0)
    assert alone.std() > 1e-4
    assert not any(p.requires_grad for name, p in base.model.named_parameters() if "judge" in name)


def test_a_rule_sees_prompt_answer_and_reference(tiny: Path, asked: Path) -> None:
    task = ready(tiny, asked, options={"reward_funcs": "rules.py:meant"}).prepared.task
    assert isinstance(task, PolicyObjective)
    assert task.eval_completions(task.eval_rows, BASE_ONLY)[2]["reward"].tolist() == [1.0] * len(
        task.eval_rows
    )


@pytest.mark.parametrize(
    ("rule", "what"),
    [
        ("breaks", "the reward function failed"),
        ("nothing", "a finite number"),
        ("word", "a finite number"),
    ],
)
def test_a_rule_that_fails_says_on_what(rule: str, what: str, tiny: Path, asked: Path) -> None:
    task = ready(tiny, asked, options={"reward_funcs": f"rules.py:{rule}"}).prepared.task
    with pytest.raises(TrainingError, match=what) as caught:
        task.step_batches(0)
    assert "asked.jsonl:" in str(caught.value.why)
    assert rule in str(caught.value.where)


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"grpo": {}}, "reward_funcs is missing"),
        ({"grpo": {"reward_funcs": "gone.py:vowels"}}, "no such file"),
        ({"grpo": {"reward_funcs": "rules.py:vowel"}}, "no function 'vowel'"),
        ({"grpo": {"reward_funcs": "missing"}}, "no such reward function"),
        ({"grpo": {"reward_funcs": "folder"}}, "no reward model"),
        ({"grpo": {"reward_funcs": {"rules.py:vowels": 0.0}}}, "weight is 0"),
        ({"grpo": {"reward_funcs": {}}}, "reward_funcs is empty: at least one"),
        ({"grpo": {"reward_funcs": "rules.py:vowels", "lam": 0.9}}, "unknown setting grpo.lam"),
        (
            {"grpo": {"reward_funcs": "rules.py:vowels", "num_generations": 1}},
            "grpo.num_generations cannot be 1",
        ),
        (
            {"grpo": {"reward_funcs": "rules.py:vowels", "loss_type": "ipo"}},
            "unknown setting grpo.loss_type",
        ),
        (
            {"grpo": {"reward_funcs": "rules.py:vowels", "reference": "adapter"}},
            "there is no adapter to be the reference",
        ),
        (
            {"grpo": {"reward_funcs": "rules.py:vowels", "num_iterations": 2}, "eval_steps": 3},
            "eval_steps is 3",
        ),
        (
            {"grpo": {"reward_funcs": "rules.py:vowels", "max_new_tokens": 500}},
            "500 for the answer",
        ),
        ({"grpo": {"reward_funcs": "rules.py:vowels"}, "dropout": 0.1}, "a reference and dropout"),
        (
            {"grpo": {"reward_funcs": "rules.py:vowels"}, "gradient_accumulation_steps": 2},
            "gradient_accumulation_steps is 2",
        ),
        (
            {"grpo": {"reward_funcs": "rules.py:vowels"}, "method": "alora", "invocation": "zebra"},
            "invocation does not occur",
        ),
        (
            {"grpo": {"reward_funcs": "rules.py:vowels"}, "method": "grpo"},
            "an objective, not a method",
        ),
        ({"grpo": {"reward_funcs": "rules.py:vowels"}, "fsdp": True}, "one process"),
    ],
)
def test_what_cannot_be_is_refused(
    values: dict[str, Any], what: str, tiny: Path, asked: Path, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(AfinaError, match=what):
        set_up_run(
            TrainSettings(data=asked, **SHORT | {"base": str(tiny), "objective": "grpo"} | values)
        )


# ---- prompts


def test_every_form_of_a_prompt(tmp_path: Path) -> None:
    user, answer = {"role": "user", "content": "say sol"}, {"role": "assistant", "content": "sol"}
    lines = tmp_path / "lines.txt"
    lines.write_text("say sol\n\nsay mar\n")
    assert [
        (row.where, row.prompt, row.reference) for row in read_table(lines, PROMPT, {}).rows
    ] == [
        (f"{lines}:1", "say sol", None),
        (f"{lines}:3", "say mar", None),
    ]
    told = write_rows(
        tmp_path / "a.jsonl",
        {"prompt": "say sol", "completion": "sol"},
        {"messages": [user, answer]},
        {"messages": [user]},
        {"instruction": "say sol", "output": "sol"},
        {"prompt": [user], "reference": "sol"},
    )
    rows = read_table(told, PROMPT, {}).rows
    assert [row.text for row in rows] == ["say sol"] * 5
    assert [row.reference for row in rows] == ["sol", "sol", None, "sol", "sol"]
    again = read_table(
        write_rows(tmp_path / "b.jsonl", *(row.record() for row in rows)), PROMPT, {}
    ).rows
    assert [(r.prompt, r.reference) for r in again] == [(r.prompt, r.reference) for r in rows]
    (tmp_path / "c.csv").write_text("question,answer\nsay sol,sol\n")
    (row,) = read_table(
        tmp_path / "c.csv", PROMPT, {"prompt": "question", "completion": "answer"}
    ).rows
    assert (row.prompt, row.reference) == ("say sol", "sol")
    with pytest.raises(DataError, match="no prompt"):
        read_table(write_rows(tmp_path / "d.jsonl", {"text": "say sol"}), PROMPT, {})


# ---- runs


@pytest.mark.parametrize(
    "objective", ["grpo", *(pytest.param(o, marks=pytest.mark.slow) for o in ("rloo", "ppo"))]
)
def test_a_run_tells_its_story(
    learn: Learn, objective: str, tiny: Path, asked: Path, tmp_path: Path
) -> None:
    run = learn(asked, tmp_path / "run", objective=objective)
    ticks, found = metrics(run.folder), run.record["policy"]
    assert {"reward", "kl", "entropy", "length", "stop_ratio", "clip_ratio"} <= ticks[0].keys()
    assert ticks[1]["eval_reward"] == -ticks[1]["eval_loss"]
    assert abs(ticks[0]["kl"]) < 1e-6 < ticks[-1]["kl"]
    best = max(tick["eval_reward"] for tick in ticks if tick["eval_loss"] is not None)
    assert found["after"]["reward"] == pytest.approx(best, abs=1e-6)
    assert found["wins"] + found["losses"] + found["ties"] == found["rows"] == 8
    assert found["before"]["kl"] == pytest.approx(0, abs=1e-6)
    card = (run.folder / "README.md").read_text()
    assert (
        "| reward |" in card
        and "Reward functions: `rules.py:vowels`" in card
        and "nats a answer" not in card
    )
    assert "reward" in run.record["verdict"][0]
    kept = json.loads((run.folder / "completions" / "000002.json").read_text())
    assert kept["step"] == 2 and len(kept["answers"]) == 4 and kept["answers"][0]["answer"]
    assert json.loads((run.folder / "reference.json").read_text())["mode"] == "base"
    assert (
        "score"
        not in json.loads((run.folder / "adapter" / "afina.json").read_text())["spec"]["modules"]
    )
    judged = evaluate(run.folder)
    assert judged["after"]["reward"] == pytest.approx(found["after"]["reward"], abs=1e-6)
    assert (judged["wins"], judged["losses"]) == (found["wins"], found["losses"])
    opened = load_run(run.folder, EvalSettings(adapter=run.folder))
    Engine(opened.causal_lm).registry.add("policy", run.folder)  # it can be served
    planned = plan(
        asked,
        base=str(tiny),
        objective=objective,
        chat_template="plain",
        **{objective: {"reward_funcs": "rules.py:vowels"}},
    )
    assert planned["data"]["objective"] == objective and planned["cost"]["peak_bytes"] > 0


@pytest.mark.parametrize(
    ("objective", "told"),
    [
        ("grpo", {"num_iterations": 2}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("rloo", {}),
                ("ppo", {"num_iterations": 2}),
                ("grpo", {"init_adapter": "sft"}),
            )
        ),
    ],
)
def test_resumed_is_uninterrupted(
    learn: Learn,
    objective: str,
    told: dict[str, Any],
    tiny: Path,
    general: Path,
    asked: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = {"init_adapter": told.pop("init_adapter")} if "init_adapter" in told else {}
    if own:
        train(
            asked,
            output_dir=tmp_path / "sft",
            **SHORT | {"base": str(tiny), "retention_text": general},
        )
    whole = learn(asked, tmp_path / "whole", objective=objective, options=told, **own)
    if own:
        assert whole.record["policy"]["reference"]["mode"] == "adapter"
        assert whole.record["init_adapter"]
    end = Trainer.finish_step

    def cut(self: Trainer, *given: Any) -> None:
        end(self, *given)
        if self.progress.step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "finish_step", cut)
    with pytest.raises(KeyboardInterrupt):
        learn(asked, tmp_path / "cut", objective=objective, options=told, **own)
    monkeypatch.setattr(Trainer, "finish_step", end)
    resumed = learn(asked, tmp_path / "cut", objective=objective, options=told, resume=True, **own)
    assert metrics(resumed.folder) == metrics(whole.folder)
    assert resumed.record["adapter"] == whole.record["adapter"]
    (tmp_path / "rules.py").write_text(RULES + "\n# another rule\n")
    with pytest.raises(AfinaError, match="judge that gives the rewards"):
        learn(asked, tmp_path / "cut", objective=objective, options=told, resume=True, **own)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["grpo", "rloo", "ppo"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_reward_rises_on_prompts_that_it_has_not_seen(
    learn: Learn, objective: str, seed: int, asked: Path, tmp_path: Path
) -> None:
    told = {"max_new_tokens": 8} | (
        {"num_generations": 1, "prompts_per_step": 32}
        if objective == "ppo"
        else {"num_generations": 6, "prompts_per_step": 6}
    )
    steps = 24 if objective == "ppo" else 12
    run = learn(
        asked,
        tmp_path / "run",
        objective=objective,
        seed=seed,
        max_steps=steps,
        eval_steps=6,
        options=told,
        max_tokens_per_batch=2000,
    )
    before, after = run.record["policy"]["before"], run.record["policy"]["after"]
    assert after["reward"] > before["reward"] + 0.05
    assert run.record["policy"]["wins"] > run.record["policy"]["losses"]


# ---- over another adapter


@pytest.mark.parametrize("objective", ["grpo", pytest.param("dpo", marks=pytest.mark.slow)])
def test_an_adapter_that_learns_over_another(
    objective: str, tiny: Path, general: Path, asked: Path, tmp_path: Path
) -> None:
    """The one below stays and acts beside: in training, as the reference, when the run is opened, in a sum."""
    values = {**SHORT, "base": str(tiny), "retention_text": general}
    task = train(asked, output_dir=tmp_path / "task", **values | {"max_steps": 6})
    below = load_file(tmp_path / "task" / "adapter" / "adapter_model.safetensors")
    told = {"frozen_adapter": str(tmp_path / "task")} | (
        {"grpo": TOLD | {"reward_funcs": "rules.py:vowels"}} if objective == "grpo" else {}
    )
    data = asked
    if objective == "dpo":
        rows = [
            {"prompt": f"say {a} {b}:", "chosen": f" {a} {b}", "rejected": " no"}
            for a in WORDS
            for b in WORDS
            if a < b
        ]
        data = write_rows(tmp_path / "pairs.jsonl", *rows[:24])
    run = train(
        data,
        output_dir=tmp_path / "run",
        **values | {"objective": objective, "method": "dora"} | told,
    )
    assert run.record["frozen_adapter"] == task.record["adapter"]
    found = run.record["policy" if objective == "grpo" else "preferences"]
    assert found["reference"]["mode"] == "adapter"
    if objective == "grpo":
        assert metrics(run.folder)[0]["kl"] == pytest.approx(0, abs=1e-6)
    else:
        assert metrics(run.folder)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    again = load_file(tmp_path / "task" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(below[name], again[name]) for name in below)
    judged = evaluate(run.folder)["after"]
    assert all(
        judged[name] == pytest.approx(value, abs=1e-4) for name, value in found["after"].items()
    )

    opened = load_run(run.folder, EvalSettings(adapter=run.folder))
    summed = load_run(
        Path(f"{tmp_path / 'task'}:1,{tmp_path / 'run' / 'adapter'}:1"), EvalSettings()
    )
    alone = load_run(run.folder / "adapter", EvalSettings())
    tokens = torch.arange(5, 40)
    given = tokens, torch.arange(35), (0, 35)
    both, added, single = (
        logits(one.causal_lm, given, one.active.segments(tokens, (0, 35)))  # type: ignore[union-attr]
        for one in (opened, summed, alone)
    )
    torch.testing.assert_close(both, added, atol=1e-4, rtol=0)
    assert (both - single).abs().max() > 1e-2
    with pytest.raises(AfinaError, match="active with another"):
        merge(run.folder, output_dir=tmp_path / "merged")
    (tmp_path / "task").rename(tmp_path / "gone")
    with pytest.raises(AfinaError):
        load_run(run.folder, EvalSettings(adapter=run.folder))


def test_a_trained_layer_stands_on_nothing(
    learn: Learn, tiny: Path, general: Path, asked: Path, tmp_path: Path
) -> None:
    train(
        asked,
        output_dir=tmp_path / "task",
        **SHORT | {"base": str(tiny), "retention_text": general, "max_steps": 1, "eval_steps": 1},
    )
    with pytest.raises(AfinaError, match="cannot be active together"):
        learn(
            asked,
            tmp_path / "run",
            objective="grpo",
            method="full",
            target_modules="norms",
            frozen_adapter=tmp_path / "task",
        )
