"""Runs from end to end on a tiny base: what is learned, what is kept, what is told; and the parts that decide it."""

import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM

import afina
from afina.evaluation.metrics import (
    METRICS,
    accuracy,
    bleu,
    chrf,
    compute_metrics,
    exact_match,
    rouge,
)
from afina.models.causal_lm import CausalLM
from afina.models.loading import load_base
from afina.settings import TrainSettings, make_settings
from afina.training import process_memory as memory
from afina.training.setup.optimizer import AdapterOptimizer, schedule_factor
from helpers import ENVIRONMENT, metrics, put, same, tiny_tokenizer, write_rows

Train = Callable[..., Any]


@pytest.fixture
def train(tiny: Path, chats: Path, general: Path, tmp_path: Path) -> Train:
    """`afina.train` with small settings, into tmp_path/run."""

    def call(data: Path = chats, **settings: Any) -> Any:
        given = {
            "base": str(tiny),
            "output_dir": tmp_path / "run",
            "max_steps": 12,
            "retention_text": general,
            "learning_rate": 3e-3,
            **settings,
        }
        return afina.train(data, **given)

    return call


def saved(run: Any) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "adapter" / "adapter_model.safetensors")


def spec(run: Any) -> dict[str, Any]:
    return json.loads((run.folder / "adapter" / "afina.json").read_text())["spec"]


# what a run learns and tells


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        ("sft", {"method": "lora", "max_steps": 30, "learning_rate": 1e-2}),
        ("sft", {"method": "full", "max_steps": 30}),
        ("pretrain", {"method": "lora", "max_length": 64, "learning_rate": 1e-2}),
        ("pretrain", {"method": "full", "max_length": 64}),
    ],
)
def test_a_run_learns_and_tells_its_story(
    train: Train, chats: Path, text: Path, tiny: Path, objective: str, settings: dict[str, Any]
) -> None:
    data = chats if objective == "sft" else text
    run = train(data, eval_steps=6, **settings)
    story = json.loads((run.folder / "run.json").read_text())
    assert story == json.loads(json.dumps(run.record))
    losses = story["losses"]
    assert losses["eval_loss_after"] < losses["eval_loss_before"] - 0.5
    assert losses["train_loss_after"] < losses["eval_loss_before"]
    assert (
        losses["forgetting"]
        == losses["retention_loss_after"] - losses["retention_loss_before"]
        != 0
    )
    assert story["perplexity"]["after"] == pytest.approx(math.exp(losses["eval_loss_after"]))
    said = " ".join(story["verdict"])
    assert "Too few eval rows to tell (5 eval rows)" in said
    assert "retention loss" in story["verdict"][-1]
    assert (story["score"] is not None) == (objective == "sft")
    assert story["objective"] == objective
    assert story["format_version"] >= 1
    assert story["data"]["sha256"] == hashlib.sha256(data.read_bytes()).hexdigest()
    assert story["base"]["hash"] == load_base(str(tiny)).hash
    assert story["tokens"] == sum(line["tokens"] for line in metrics(run.folder))
    assert (
        min(
            story["seconds"],
            story["tokens_per_second"],
            story["peak_memory_mb"],
            story["adapter_kb"],
        )
        > 0
    )
    assert {"afina", "torch", "transformers", "python", "threads"} <= set(story["environment"])
    assert (
        story["adapter"] == json.loads((run.folder / "adapter" / "afina.json").read_text())["hash"]
    )


@pytest.mark.slow
def test_the_run_folder_is_complete(train: Train, tiny: Path) -> None:
    run = train(max_steps=6, eval_steps=2)
    files = {str(path.relative_to(run.folder)) for path in run.folder.rglob("*") if path.is_file()}
    assert files >= {
        "settings.yaml",
        "example.txt",
        "metrics.jsonl",
        "eval.jsonl",
        "run.json",
        "curve.png",
        "README.md",
        "checkpoint/state.safetensors",
        "checkpoint/progress.json",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/afina.json",
        "adapter/README.md",
    }
    assert not [file for file in files if Path(file).name.startswith(".")]
    assert (run.folder / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    log = metrics(run.folder)
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    assert [line["eval_loss"] is not None for line in log] == [False, True] * 3
    held = [json.loads(line) for line in (run.folder / "eval.jsonl").read_text().splitlines()]
    assert len(held) == run.record["data"]["held_out"] == 5
    example = (run.folder / "example.txt").read_text()
    assert example.count("«") == example.count("»") == 1
    assert "</s>»" in example
    card = (run.folder / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["base_model"] == run.record["base"]["name"]
    for told in (
        run.record["base"]["hash"][:16],
        run.record["data"]["sha256"][:16],
        "license of the base",
        "license of the data",
    ):
        assert told in card
    assert all(sentence in card for sentence in run.record["verdict"])
    settings = yaml.safe_load(card.partition("```yaml\n")[2].partition("```")[0])
    data = settings.pop("data")
    assert data == Path(run.record["data"]["path"]).name
    again = {
        **make_settings(TrainSettings, {**settings, "data": data}).model_dump(),
        "data": None,
        "output_dir": None,
    }
    assert again == {
        **make_settings(TrainSettings, run.record["settings"]).model_dump(),
        "data": None,
        "output_dir": None,
    }


@pytest.mark.slow
def test_a_card_names_the_licence_of_the_base(train: Train, tiny: Path, tmp_path: Path) -> None:
    import shutil

    for number, (header, expected) in enumerate(
        ((("license: mit"), "mit"), ("license: [broken", None))
    ):
        folder = shutil.copytree(tiny, tmp_path / f"base{number}")
        (folder / "README.md").write_text(f"---\n{header}\n---\n# A model\n")
        run = train(base=str(folder), max_steps=1, output_dir=tmp_path / f"run{number}")
        assert run.record["base"]["licence"] == expected
        assert ("| license of the base | mit |" in (run.folder / "README.md").read_text()) is (
            expected == "mit"
        )


@pytest.mark.slow
def test_eval_finds_what_the_run_found(train: Train) -> None:
    """The judge, from the folder alone: the same held-out rows, the same losses; metrics and examples."""
    run = train(max_steps=30, learning_rate=1e-2)
    judged = afina.evaluate(run.folder, max_new_tokens=12, metrics=list(METRICS))
    losses = run.record["losses"]
    assert judged["before"]["loss"] == pytest.approx(losses["eval_loss_before"], rel=1e-5)
    assert judged["after"]["loss"] == pytest.approx(losses["eval_loss_after"], rel=1e-5)
    assert judged["after"]["perplexity"] == pytest.approx(
        math.exp(losses["eval_loss_after"]), rel=1e-4
    )
    assert judged["rows"] == len(judged["examples"]) == 5
    assert judged["after"]["chrf"] > judged["before"]["chrf"]
    for metric in METRICS:
        expected = [example["expected"] for example in judged["examples"]]
        for when in ("before", "after"):
            answers = [example[when] for example in judged["examples"]]
            assert judged[when][metric] == pytest.approx(METRICS[metric](answers, expected))
    assert judged["forgetting"] == pytest.approx(
        judged["after"]["retention_loss"] - judged["before"]["retention_loss"]
    )


def test_eval_of_a_base_alone_and_of_other_rows(tiny: Path, chats: Path, text: Path) -> None:
    judged = afina.evaluate(base=str(tiny), data=chats, limit=2, max_new_tokens=2)
    assert set(judged) >= {"before", "examples"}
    assert "after" not in judged
    assert len(judged["examples"]) == 2
    plain = afina.evaluate(base=str(tiny), data=text)
    assert plain["examples"] == []
    assert "exact_match" not in plain["before"]


@pytest.mark.slow
def test_the_same_settings_give_the_same_run(train: Train, tmp_path: Path) -> None:
    first = train(max_steps=4, dropout=0.2)
    settings = yaml.safe_load((first.folder / "settings.yaml").read_text())
    again = afina.train(**{**settings, "output_dir": tmp_path / "again"})
    assert again.record["adapter"] == first.record["adapter"]
    assert metrics(again.folder) == metrics(first.folder)
    other = train(max_steps=4, dropout=0.2, seed=1, output_dir=tmp_path / "other")
    assert other.record["adapter"] != first.record["adapter"]


@pytest.mark.slow
def test_the_default_folder_is_named_after_data_and_method(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = train(output_dir=None, max_steps=1)
    assert run.folder == Path("runs/chats-lora")
    assert (tmp_path / "runs" / "chats-lora" / "run.json").is_file()


@pytest.mark.slow
def test_epochs_steps_and_batches(train: Train, tmp_path: Path) -> None:
    one = train(max_steps=None, num_train_epochs=1, max_tokens_per_batch=10_000)
    assert one.record["steps"] == 1
    assert (
        metrics(one.folder)[0]["tokens"]
        == afina.plan(one.record["data"]["path"], base=one.record["base"]["name"])["data"]["tokens"]
    )
    three = train(
        max_steps=None,
        num_train_epochs=3,
        max_tokens_per_batch=256,
        gradient_accumulation_steps=2,
        output_dir=tmp_path / "three",
    )
    log = metrics(three.folder)
    assert max(line["tokens"] for line in log) <= 512
    assert sum(line["tokens"] for line in log) == pytest.approx(
        3 * metrics(one.folder)[0]["tokens"], rel=0.1
    )


@pytest.mark.slow
def test_rows_of_a_holdout_file_are_not_trained_on(train: Train, tmp_path: Path) -> None:
    rows = [{"prompt": f"say {n}", "completion": f" {n}"} for n in range(20)]
    run = train(
        write_rows(tmp_path / "t.jsonl", *rows[:15]),
        eval_data=write_rows(tmp_path / "h.jsonl", *rows[15:]),
        max_steps=1,
    )
    assert run.record["data"]["held_out"] == 5
    assert [
        json.loads(line) for line in (run.folder / "eval.jsonl").read_text().splitlines()
    ] == rows[15:]
    assert afina.evaluate(run.folder, limit=1, max_new_tokens=1)["after"]["loss"] == pytest.approx(
        run.record["losses"]["eval_loss_after"], rel=1e-5
    )


@pytest.mark.slow
def test_columns_of_ones_own(train: Train, tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    table.write_text("question,answer\n" + "".join(f"what is {n}?,{n}\n" for n in range(12)))
    run = train(table, columns={"prompt": "question", "completion": "answer"}, max_steps=2)
    assert run.record["data"]["rows"] == 12
    assert "what is" in (run.folder / "example.txt").read_text()


# which numbers are learned


@pytest.mark.slow
def test_lora_on_chosen_layers_with_ranks_and_rates_of_their_own(train: Train) -> None:
    run = train(
        target_modules=["q_proj", "down_proj"],
        layers=[0, -1],
        rank=4,
        rank_pattern={"down_proj": 2, r".*\.0\.self_attn\.q_proj": 6},
        learning_rate_pattern={"down_proj": 1e-9},
        alpha=4,
    )
    tensors = saved(run)
    ranks = {
        name.partition("layers.")[2][:-14]: len(t)
        for name, t in tensors.items()
        if "lora_A" in name
    }
    assert ranks == {
        "0.self_attn.q_proj": 6,
        "0.mlp.down_proj": 2,
        "3.self_attn.q_proj": 4,
        "3.mlp.down_proj": 2,
    }
    moved = {name: float(t.abs().max()) for name, t in tensors.items() if "lora_B" in name}
    assert all(size < 1e-6 if "down_proj" in name else size > 1e-3 for name, size in moved.items())
    config = json.loads((run.folder / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 4)


@pytest.mark.slow
def test_freeze_learns_the_last_quarter_of_the_blocks(train: Train, tiny: Path) -> None:
    run = train(method="freeze", max_steps=3)
    assert all(path.startswith("model.layers.3.") for path in spec(run)["targets"])
    base = load_base(str(tiny))
    block = dict(base.model.get_submodule("model.layers.3").named_parameters())
    tensors = {
        name.removeprefix("base_model.model.model.layers.3."): tensor
        for name, tensor in saved(run).items()
    }
    assert set(tensors) == set(block)
    assert all(not torch.equal(tensors[name], block[name]) for name in block)
    assert run.record["method"] == "full"


@pytest.mark.slow
@pytest.mark.parametrize("targets", ["norms", "embeddings", [".*layernorm", "lm_head"]])
def test_full_on_a_chosen_part(train: Train, tiny: Path, targets: Any) -> None:
    run = train(method="full", target_modules=targets, max_steps=1)
    base = load_base(str(tiny)).model
    paths = {
        "norms": {p for p, m in base.named_modules() if "Norm" in type(m).__name__},
        "embeddings": {"model.embed_tokens", "lm_head"},
    }.get(
        str(targets), {p for p, _ in base.named_modules() if p.endswith("layernorm")} | {"lm_head"}
    )
    assert set(spec(run)["targets"]) == paths
    assert {
        name.removeprefix("base_model.model.").removesuffix(".weight") for name in saved(run)
    } == paths


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tiny", "tied"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rank": 3, "rank_pattern": {"q_proj": 5}, "layers": "last:2"},
        {"target_modules": ["lm_head"]},
        {"method": "full"},
        {"method": "freeze"},
        {"method": "full", "target_modules": "embeddings"},
    ],
)
def test_the_plan_counts_what_is_trained(
    request: Any, train: Train, chats: Path, kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = request.getfixturevalue(kind)
    planned = afina.plan(
        chats,
        base=str(folder),
        max_steps=1,
        learning_rate=3e-3,
        output_dir=tmp_path / "run",
        **settings,
    )
    run = train(base=str(folder), max_steps=1, **settings)
    assert (
        planned["trainable_parameters"]
        == run.record["trainable_parameters"]
        == sum(t.numel() for t in saved(run).values())
    )
    assert planned["layers"] == len(spec(run)["targets"])
    assert planned["base"]["parameters"] == sum(
        p.numel() for p in load_base(str(folder)).model.parameters()
    )
    assert planned["steps"] == run.record["steps"]
    data = planned["data"]
    assert (data["rows"], data["train"], data["held_out"]) == (48, 43, 5)
    assert planned["example"] + "\n" == (run.folder / "example.txt").read_text()
    assert 0 < data["labelled_percent"] < 100
    assert data["objective"] == "sft"


def test_the_plan_counts_tokens_and_labels(tiny: Path, tmp_path: Path) -> None:
    base = load_base(str(tiny))
    rows = [{"prompt": f"n{n}", "completion": f" {n}"} for n in range(10)]
    planned = afina.plan(
        write_rows(tmp_path / "r.jsonl", *rows),
        base=str(tiny),
        eval_data=write_rows(tmp_path / "h.jsonl", rows[0]),
    )
    chat = [
        [{"role": "user", "content": f"n{n}"}, {"role": "assistant", "content": f" {n}"}]
        for n in range(10)
    ]
    tokens = sum(
        len(base.tokenizer.apply_chat_template(messages)["input_ids"]) for messages in chat
    )
    labels = sum(
        len(base.tokenizer(f" {n}", add_special_tokens=False)["input_ids"]) + 1 for n in range(10)
    )
    assert planned["data"]["tokens"] == tokens
    assert planned["data"]["labelled_percent"] == pytest.approx(100 * labels / tokens)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_bfloat16_base_trains_with_float32_adapters(train: Train, method: str) -> None:
    run = train(dtype="bfloat16", method=method, max_steps=20)
    assert run.record["base"]["dtype"] == "bfloat16"
    assert {t.dtype for t in saved(run).values()} == {
        torch.float32 if method == "lora" else torch.bfloat16
    }
    assert run.record["losses"]["eval_loss_after"] < run.record["losses"]["eval_loss_before"] - 0.3


# early stopping


@pytest.mark.slow
def test_early_stopping_keeps_the_best(train: Train, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"what comes with {n}?", "completion": f" {(n * 7919) % 1000}"}
        for n in range(12)
    ]
    data, held = (
        write_rows(tmp_path / "t.jsonl", *rows[:6]),
        write_rows(tmp_path / "h.jsonl", *rows[6:]),
    )
    run = train(
        data,
        eval_data=held,
        method="full",
        max_steps=400,
        eval_steps=4,
        early_stopping_patience=3,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
    )
    checks = [
        (line["eval_loss"], line["step"])
        for line in metrics(run.folder)
        if line["eval_loss"] is not None
    ]
    best = min(checks)
    assert run.record["steps"] < 400
    assert run.record["steps"] == checks[-1][1] == best[1] + 3 * 4
    assert run.record["losses"]["best_step"] == best[1]
    assert run.record["losses"]["eval_loss_after"] == pytest.approx(best[0], rel=1e-6)
    said = " ".join(run.record["verdict"])
    assert f"The best state, of step {best[1]}, was kept." in said and "It overfits" in said
    again = train(
        data,
        eval_data=held,
        method="full",
        max_steps=400,
        eval_steps=4,
        early_stopping_patience=3,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        resume=True,
    )
    assert again.record["steps"] == run.record["steps"]
    assert again.record["adapter"] == run.record["adapter"]


# the optimizer


def test_schedules() -> None:
    assert [schedule_factor("constant", step, 10, 0.2) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]
    linear = [schedule_factor("linear", step, 10, 0.2) for step in range(10)]
    assert linear == pytest.approx([0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    cosine = [schedule_factor("cosine", step, 8, 0.0) for step in range(8)]
    assert cosine == pytest.approx([(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)])
    assert schedule_factor("cosine", 4, 8, 0.0) == pytest.approx(0.5)
    assert [schedule_factor("cosine", step, 4, 1.0) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert schedule_factor("linear", 0, 1, 0.0) == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_a_run_follows_its_schedule(train: Train, schedule: str) -> None:
    run = train(max_steps=10, lr_scheduler_type=schedule, warmup_ratio=0.3, learning_rate=2e-3)
    expected = [2e-3 * schedule_factor(schedule, step, 10, 0.3) for step in range(10)]
    assert [line["learning_rate"] for line in metrics(run.folder)] == pytest.approx(expected)


def optimizer_of(
    base: CausalLM, method: str = "lora", **settings: Any
) -> tuple[Any, AdapterOptimizer]:
    adapter = put(base, target_modules="all-linear" if method == "lora" else "all", method=method)
    return adapter, AdapterOptimizer(
        adapter, **{"rate": 1e-2, "rates": {}, "weight_decay": 0.0, **settings}
    )


def give_gradients(adapter: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def test_the_optimizer_is_adamw_with_clipping_and_decay(base: CausalLM) -> None:
    adapter, optimizer = optimizer_of(base, "full", weight_decay=0.1, rates={"lm_head": 1e-3})
    copies = {
        name: torch.nn.Parameter(p.detach().clone()) for name, p in adapter.named_parameters()
    }
    reference = torch.optim.AdamW(
        [
            {
                "params": [p],
                "lr": 1e-3 if name == "lm_head.weight" else 1e-2,
                "weight_decay": 0.1 if p.ndim > 1 else 0.0,
            }
            for name, p in copies.items()
        ]
    )
    for step in range(3):
        give_gradients(adapter, step)
        for (_, p), copy in zip(adapter.named_parameters(), copies.values(), strict=True):
            copy.grad = p.grad.clone()
        expected = torch.nn.utils.clip_grad_norm_(copies.values(), 0.5)
        assert optimizer.step(1.0, clip=0.5) == pytest.approx(float(expected))
        reference.step()
    for name, parameter in adapter.named_parameters():
        assert (parameter - copies[name]).abs().max() < 1e-6, name
        assert parameter.grad is None


@pytest.mark.slow
def test_sixteen_bit_weights_have_float32_masters(tiny: Path) -> None:
    """Steps far below bfloat16's resolution add up."""
    adapter, optimizer = optimizer_of(load_base(str(tiny), dtype="bfloat16"), "full", rate=1e-5)
    name, parameter = next((n, p) for n, p in adapter.named_parameters() if "up_proj" in n)
    before = parameter.detach().clone()
    for _ in range(400):
        for p in adapter.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step(1.0, 1e9)
    assert (
        before.float() - optimizer.master_weights[name].detach()
    ).mean().item() == pytest.approx(400 * 1e-5, rel=0.01)
    assert parameter.dtype == torch.bfloat16
    assert torch.equal(parameter, optimizer.master_weights[name].bfloat16())
    assert (before - parameter.detach()).float().mean().item() == pytest.approx(
        400 * 1e-5, rel=0.05
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(base: CausalLM, bad: float) -> None:
    adapter, optimizer = optimizer_of(base)
    give_gradients(adapter, 0)
    optimizer.step(1.0, 1.0)
    before = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    give_gradients(adapter, 1)
    adapter.parameters()[2].grad[0, 0] = bad
    assert not math.isfinite(optimizer.step(1.0, 1.0))
    assert same(optimizer.state(), before)


def test_the_optimizers_state_goes_on_bit_for_bit(tiny: Path) -> None:
    one, optimizer = optimizer_of(load_base(str(tiny)))
    other, fresh = optimizer_of(load_base(str(tiny)))
    for step in range(2):
        give_gradients(one, step)
        optimizer.step(0.5, 1.0)
    fresh.load({name: tensor.clone() for name, tensor in optimizer.state().items()})
    for adapter, each in ((one, optimizer), (other, fresh)):
        give_gradients(adapter, 5)
        each.step(0.3, 1.0)
    assert same(optimizer.state(), fresh.state())


# the judge


def test_exact_match() -> None:
    assert exact_match(["El niño come.", " a ", "b"], ["El niño come.", "a", "B"]) == pytest.approx(
        200 / 3
    )
    assert exact_match(["El nino come."], ["El niño come."]) == 0


def test_accuracy_looks_at_the_label_that_begins_an_answer() -> None:
    answers = ["Positive!", "negative, since...", "¡Sí!", "no", "not bad", "it is positive", ""]
    expected = ["positive", "negative", "sí", "No", "no", "positive", "x"]
    assert accuracy(answers, expected) == pytest.approx(400 / 7)
    assert (
        accuracy(["sı", "cafe\u0301 con leche"], ["sí", "café"]) == 50
    )  # one composed, one not: the same word


def test_chrf_and_bleu_are_sacrebleus() -> None:
    import sacrebleu

    answers, expected = (
        ["la niña salió a la calle", "the cat sat"],
        ["la niña salió de la casa", "the cat sat on the mat"],
    )
    assert chrf(answers, expected) == pytest.approx(
        sacrebleu.corpus_chrf(answers, [expected]).score
    )
    assert bleu(answers, expected) == pytest.approx(
        sacrebleu.corpus_bleu(answers, [expected]).score, abs=0.5
    )
    for metric in (chrf, bleu, rouge):
        assert metric(expected, expected) == pytest.approx(100)
        assert metric(["zzz", "qqq"], expected) < 5


def test_rouge_counts_words_with_accents() -> None:
    """Words in order: 3 of 4 are common, precision and recall 3/4 each; and an accent is not a space."""
    assert rouge(["el niño comió pan"], ["el niño bebió pan"]) == pytest.approx(75)
    assert rouge(["acción"], ["acci n"]) == 0
    assert rouge(["ñ é ü"], ["ñ é ü"]) == pytest.approx(100)
    assert rouge(["a b c d"], ["d c b a"]) == pytest.approx(25)


def test_scores_by_name() -> None:
    assert compute_metrics(["exact_match", "accuracy"], ["a"], ["a"]) == {
        "exact_match": 100,
        "accuracy": 100,
    }


@pytest.mark.slow
def test_rows_one_by_one_give_the_held_out_loss(train: Train) -> None:
    """The change whose interval is told is the change of the losses in the table."""
    losses = (run := train(max_tokens_per_batch=64)).record["losses"]
    assert (
        losses["eval_change"]["rows"] == losses["eval_rows"] == run.record["data"]["held_out"] > 1
    )
    for side in ("eval", "train"):
        assert losses[f"{side}_change"]["mean"] == pytest.approx(
            losses[f"{side}_loss_after"] - losses[f"{side}_loss_before"], abs=1e-5
        )
    assert losses["eval_interval"][0] < losses["eval_change"]["mean"] < losses["eval_interval"][1]


@pytest.mark.slow
def test_a_run_on_three_rows_is_told_as_too_few(train: Train, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"what comes with {n}?", "completion": f" {(n * 7919) % 1000}"} for n in range(4)
    ]
    run = train(write_rows(tmp_path / "t.jsonl", *rows), max_steps=1)
    said = run.record["verdict"]
    assert said[0].startswith("Too few eval rows to tell (1 eval row): exact match 0.0% to ")
    assert said[1].startswith("On training rows: exact match 0.0% to ")
    assert run.record["cause"] == "steps" and "fewer than 100" in said[2]
    assert f"--config {run.folder}/settings.yaml --max-steps 100" in run.next_command


@pytest.mark.slow
def test_rows_of_an_encoder_are_measured_too(
    train: Train, text: Path, chats: Path, tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens(
        {"mask_token": "<mask>", "cls_token": "<cls>", "sep_token": "<sep>"}
    )
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    rows = [{"text": word * n, "label": word} for word in ("sol", "pan") for n in range(1, 7)]
    labelled = write_rows(tmp_path / "labelled.jsonl", *rows)
    for data, objective in ((text, "mlm"), (labelled, "classify")):
        run = train(
            data,
            base=str(tmp_path / "bert"),
            objective=objective,
            max_steps=2,
            output_dir=tmp_path / objective,
            retention_text=None,
        )
        low, high = run.record["losses"]["eval_interval"]
        assert low < run.record["losses"]["eval_change"]["mean"] < high


# the demo


def test_the_demos_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eval sentences are no train rows, and a fifth of their words at least occur in none."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "recipes")
    import demo_rows

    from afina.demo import demo

    train_rows, held = demo.load_rows()
    assert (train_rows, held) == demo_rows.make_rows(0)  # recipes/demo_rows.py makes the file
    answers = {row["messages"][1]["content"] for row in train_rows}
    known, words = set(demo._words(train_rows)), demo._words(held)
    assert not [row for row in held if row["messages"][1]["content"] in answers]
    assert 100 * sum(word not in known for word in words) / len(words) >= 20
    assert all(
        row["messages"][0]["content"].split(": ", 1)[1] != row["messages"][1]["content"]
        for row in held
    )
    assert {row["messages"][0]["content"].split(":")[0] for row in held} == {"Correct", "Corrige"}


@pytest.mark.slow
def test_the_demo_runs_and_may_be_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from afina.demo import demo
    from afina.errors import SettingsError

    train_rows, held = demo.load_rows()
    monkeypatch.setattr(demo, "load_rows", lambda: (train_rows[:60], held[:6]))
    for _ in range(2):
        told = demo.demo(output_dir=tmp_path / "demo", max_steps=2)
    assert {
        "seconds",
        "metric_before",
        "metric_after",
        "forgetting",
        "peak_memory_mb",
        "adapter_kb",
    } <= set(told)
    assert len(told["examples"]) == 3
    assert Path(told["curve"]).is_file()
    (tmp_path / "mine" / "run").mkdir(parents=True)
    with pytest.raises(SettingsError, match="not an earlier demo's"):
        demo.demo(output_dir=tmp_path / "mine", max_steps=2)


def test_the_embedded_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """15 MB or less, float32 on demand, answers that stop by themselves."""
    from afina.models.loading import EMBEDDED_FOLDER

    assert sum(file.stat().st_size for file in EMBEDDED_FOLDER.iterdir()) <= 15_000_000
    told = afina.generate(["Hello!", "¡Hola!"], dtype="float32", max_new_tokens=60)
    assert all(answer["stopped"] and answer["text"] for answer in told["answers"])


@pytest.mark.parametrize(("platform", "megabytes"), [("linux", 2048), ("darwin", 2), ("win32", 3)])
def test_peak_memory_is_in_megabytes_everywhere(
    monkeypatch: pytest.MonkeyPatch, platform: str, megabytes: float
) -> None:
    """KiB on Linux, bytes on macOS; Windows has no module `resource`."""
    monkeypatch.setattr(memory, "STATUS", Path("/nowhere"))
    system = (
        None
        if platform == "win32"
        else SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda _: SimpleNamespace(ru_maxrss=2e6))
    )
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=3e6))
    monkeypatch.setitem(sys.modules, "resource", system)
    monkeypatch.setitem(sys.modules, "psutil", SimpleNamespace(Process=lambda: process))
    monkeypatch.setattr(sys, "platform", platform)
    assert memory.process_peak_mb() == megabytes


def test_peak_memory_is_that_of_this_process() -> None:
    """Not that of pytest, which started it and is larger."""
    code = "x = bytearray(300_000_000); from afina.training.process_memory import process_peak_mb as p; print(p())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert 300 < float(done.stdout) < 360


def test_nothing_imports_resource_but_the_one_place() -> None:
    root = Path(__file__).parent.parent
    files = [
        file
        for folder in ("src", "benchmarks", "recipes")
        for file in (root / folder).rglob("*.py")
    ]
    found = [file.name for file in files if "import resource" in file.read_text()]
    assert sorted(found) == ["bounded.py", "process_memory.py"]  # both on systems that have it


def test_telemetry_is_off_unless_it_is_asked_for() -> None:
    code = "import afina; from huggingface_hub import constants; print(constants.HF_HUB_DISABLE_TELEMETRY)"
    clean = {
        name: value
        for name, value in ENVIRONMENT.items()
        if name not in ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_OFFLINE")
    }
    for own, off in (({}, "True"), ({"HF_HUB_DISABLE_TELEMETRY": "0"}, "False")):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={**clean, **own}
        )
        assert done.stdout.strip() == off, done.stderr


@pytest.mark.slow
def test_progress_is_silent_for_python(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    train(max_steps=1)
    out, err = capsys.readouterr()
    assert (out, err) == ("", "")
