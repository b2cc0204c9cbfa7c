"""Two processes give the run of one: data parallel, the base split, resumed with more or fewer; errors end all, told once."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import afina
from afina.data.packing import IGNORE_INDEX, PackedBatch
from afina.errors import SettingsError
from afina.models.fsdp import decoder_layers
from afina.models.loading import load_base
from afina.objectives.language_modeling import LanguageModelingObjective
from afina.objectives.padded import PaddedBatch
from afina.settings import TrainSettings
from afina.training.setup.set_up import set_up_run
from helpers import ENVIRONMENT, flat_run, metrics, put, write_rows

TOGETHER = dict(max_steps=20, max_tokens_per_batch=256, eval_steps=5, learning_rate=2e-3)


def torchrun(*command: object, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc-per-node N ...` on this machine."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
    ]
    return subprocess.run(
        [*launcher, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=250,
        env=ENVIRONMENT,
    )


def train(
    tiny: Path,
    data: Path,
    general: Path,
    out: Path,
    *more: object,
    processes: int = 2,
    **settings: Any,
) -> dict[str, Any]:
    """`afina train` in several processes; returns the story."""
    flags = [
        word
        for name, value in settings.items()
        for word in ("--" + name.replace("_", "-"), json.dumps(value).strip('"'))
    ]
    command = [
        "train",
        data,
        "--base",
        tiny,
        "--retention-text",
        general,
        "--output-dir",
        out,
        *flags,
        *more,
        "--json",
    ]
    done = torchrun("-m", "afina", *command, processes=processes)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1, "only the first process speaks"
    return json.loads(done.stdout)


def same_losses(a: Path, b: Path) -> None:
    """Whether two runs are one but for rounding."""
    ours, theirs = metrics(a), metrics(b)
    assert len(ours) == len(theirs) > 0
    for x, y in zip(ours, theirs, strict=True):
        assert (x["step"], x["tokens"]) == (y["step"], y["tokens"])
        assert x["loss"] == pytest.approx(y["loss"], abs=1e-5), x["step"]
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-3, abs=1e-5), x["step"]
        if y["eval_loss"] is not None:
            assert x["eval_loss"] == pytest.approx(y["eval_loss"], abs=1e-5), x["step"]


# ---- parts of a batch


@pytest.mark.parametrize("of", [1, 2, 3, 7])
def test_parts_of_a_flat_batch_add_up_to_it(tiny: Path, of: int) -> None:
    base = load_base(str(tiny))
    adapter = put(base)
    tokens, positions, bounds = flat_run((9, 1, 14, 6, 3))
    labels = torch.where(torch.arange(len(tokens)) % 3 > 0, tokens.roll(-1), -100)
    batch, task = (
        PackedBatch(tokens, positions, labels, bounds),
        LanguageModelingObjective.__new__(LanguageModelingObjective),
    )
    task.base = base
    parts = [batch.shard(number, of) for number in range(of)]
    assert sum(part.num_targets for part in parts) == batch.num_targets
    whole = task.loss(batch, adapter.active)
    gradients = torch.autograd.grad(whole, adapter.parameters())
    losses = [
        task.loss(part, adapter.active) for part in parts
    ]  # the last of 7 have no labels, and a backward all the same
    torch.testing.assert_close(torch.stack(losses).sum(), whole)
    for a, b in zip(
        torch.autograd.grad(torch.stack(losses).sum(), adapter.parameters()), gradients, strict=True
    ):
        # float32 sums in another order: about 20 roundings of the largest gradient (3e-6 seen)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=5e-6 * max(1.0, b.abs().max().item()))
    sizes = sorted(len(part.token_ids) for part in parts)
    assert of > 2 or sizes[-1] - sizes[0] <= 14


def test_a_part_without_labels_reaches_an_adapted_output_layer(tiny: Path) -> None:
    base = load_base(str(tiny))
    adapter = put(base, target_modules=["lm_head", "q_proj"])
    tokens, positions, bounds = flat_run((4,))
    part = PackedBatch(tokens, positions, tokens.roll(-1), bounds).shard(1, 2)
    with base.forward_context.use(adapter.active.segments(part.token_ids, part.cu_seqlens)):
        loss = base.loss(part.token_ids, part.positions, part.cu_seqlens, part.labels)
    loss.backward()
    assert loss.item() == 0
    assert all(not p.grad.any() for p in adapter.parameters())  # type: ignore[union-attr]


def test_parts_of_rows() -> None:
    batch = PaddedBatch({"input_ids": torch.arange(10).view(5, 2)}, torch.arange(5))
    assert [part.targets.tolist() for part in (batch.shard(n, 2) for n in range(2))] == [
        [0, 2, 4],
        [1, 3],
    ]
    assert batch.shard(1, 2).inputs["input_ids"].tolist() == [[2, 3], [6, 7]]
    assert batch.shard(5, 6).targets.tolist() == [IGNORE_INDEX]


@pytest.mark.parametrize("objective", ["dpo", "kto", "reward"])
@pytest.mark.parametrize("of", [2, 9])
def test_parts_of_preferences_add_up(tiny: Path, tmp_path: Path, objective: str, of: int) -> None:
    pairs = [
        {"prompt": f"{w} {n}", "chosen": f"good {w}" + " sol" * n, "rejected": f"bad {n}"}
        for w in "abc"
        for n in range(3)
    ]
    data = write_rows(tmp_path / "pairs.jsonl", *pairs)
    setup = set_up_run(
        TrainSettings(
            data=data, base=str(tiny), objective=objective, chat_template="plain", eval_size=0.2
        )
    )  # type: ignore[arg-type]
    task, route = setup.prepared.task, setup.adapter.active
    with torch.no_grad():
        for parameter in setup.adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    (batch,) = task.step_batches(0)
    whole = task.loss(batch, route)
    facts = task.metrics()
    gradients = torch.autograd.grad(whole, setup.adapter.parameters())
    (batch,) = task.step_batches(0)
    parts = [batch.shard(number, of) for number in range(of)]
    assert sum(map(task.num_targets, parts)) == task.num_targets(batch)
    assert of == 2 or min(map(task.num_targets, parts)) == 0 or objective == "kto"
    total = torch.stack([task.loss(part, route) for part in parts]).sum()
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad(total, setup.adapter.parameters()), gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert task.metrics(lambda numbers: numbers) == pytest.approx(facts, abs=1e-4)


def test_blocks_are_the_outermost_members_of_lists(tiny: Path) -> None:
    assert len(decoder_layers(load_base(str(tiny)).model)) == 4
    nested = nn.Sequential(
        nn.ModuleList([nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2)])})])
    )
    assert decoder_layers(nested) == {"0.0": nested[0][0]}  # type: ignore[index]


def test_full_fine_tuning_is_not_sharded(tiny: Path, chats: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="full cannot be sharded"):
        afina.train(chats, base=str(tiny), method="full", fsdp=True, output_dir=tmp_path / "run")


@pytest.mark.slow
def test_sharded_in_one_process_is_the_whole_base(
    tiny: Path, chats: Path, general: Path, tmp_path: Path
) -> None:
    runs = [
        afina.train(
            chats,
            base=str(tiny),
            retention_text=general,
            max_steps=2,
            fsdp=fsdp,
            output_dir=tmp_path / f"fsdp-{fsdp}",
        )
        for fsdp in (False, True)
    ]
    assert metrics(runs[0].folder) == metrics(runs[1].folder)


# ---- two processes


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        dict(method="lora", gradient_accumulation_steps=2),
        dict(method="alora", fsdp=True, gradient_checkpointing=True),
        dict(method="dora", fsdp=True, rank=4),
        dict(method="qmora", fsdp=True, rank=2),
        dict(method="full", target_modules=["q_proj"], learning_rate=2e-4),
        dict(method="lora", objective="kto", chat_template="plain", fsdp=True, learning_rate=1e-3),
        dict(
            method="lora",
            target_modules=["lm_head", "v_proj"],
            fsdp=True,
            max_tokens_per_batch=24,
        ),  # batches of one row
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_two_processes_are_one(
    tiny: Path, chats: Path, general: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    settings = TOGETHER | settings
    if settings.get("objective") == "kto":
        chats = write_rows(
            tmp_path / "labels.jsonl",
            *(
                {"prompt": f"say {n}", "completion": f"sol {n % 3}", "label": n % 3 > 0}
                for n in range(30)
            ),
        )
    story = train(tiny, chats, general, tmp_path / "two", **settings)
    one = afina.train(
        chats, base=str(tiny), retention_text=general, output_dir=tmp_path / "one", **settings
    )  # type: ignore[arg-type]
    same_losses(tmp_path / "two", tmp_path / "one")
    assert story["environment"]["processes"] == 2
    for key, value in one.record["losses"].items():
        if isinstance(value, float):
            assert story["losses"][key] == pytest.approx(value, abs=1e-4), key
    a, b = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        for name in ("two", "one")
    )
    assert list(a) == list(b)
    assert all((a[name] - b[name]).norm() <= 0.02 * b[name].norm() + 1e-4 for name in a)


@pytest.mark.slow
def test_a_sweep_of_two_bases_and_classifiers_too(
    tiny: Path, chats: Path, general: Path, tmp_path: Path
) -> None:
    rows = write_rows(
        tmp_path / "rows.jsonl",
        *({"text": f"{w} {n}", "label": w} for w in ("sol", "mar") for n in range(9)),
    )
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(
        f"base: {tiny}\nretention_text: {general}\nmax_steps: 6\nmax_tokens_per_batch: 128\nruns:\n"
        f"  - {{data: {chats}, rank: 2, name: a}}\n  - {{data: {chats}, method: dora, name: b, gradient_accumulation_steps: 2}}\n"
        f"  - {{data: {rows}, name: c}}\n"
    )
    done = torchrun("-m", "afina", "train", sweep, "--output-dir", tmp_path / "two", "--json")
    assert done.returncode == 0, done.stderr
    from afina.training.sweep import sweep as run_sweep

    run_sweep(sweep, {"output_dir": tmp_path / "one"})
    for name in "abc":
        same_losses(tmp_path / "two" / name, tmp_path / "one" / name)
    assert (tmp_path / "two" / "c" / "confusion.png").is_file()
    assert len(json.loads((tmp_path / "two" / "sweep.json").read_text())["runs"]) == 3


SHARDING = """
import sys
from afina.models.loading import load_base
from afina.models.fsdp import decoder_layers, shard_model
from afina.training.setup.processes import world
world()
base = load_base(sys.argv[1], quantization=sys.argv[2])
held = lambda: sum(getattr(p, "_local_tensor", p).nbytes for b in decoder_layers(base.model).values() for p in b.parameters())
before = held()
shard_model(base, [], base.device, 2)
print(before, held(), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_sharded_base_is_held_in_parts(tiny: Path, tmp_path: Path, quantization: str) -> None:
    (tmp_path / "sharding.py").write_text(SHARDING)
    done = torchrun(tmp_path / "sharding.py", tiny, quantization)
    assert done.returncode == 0, done.stderr
    pairs = [[int(word) for word in line.split()] for line in done.stdout.splitlines()]
    (whole, first), (same, second) = pairs
    assert whole == same
    assert whole <= first + second <= 1.1 * whole  # rows that do not divide are filled up
    assert max(first, second) <= 0.6 * whole


# a run that ends of itself after some ticks, in all processes at once or in one of them
BREAKING = """
import os, sys
from afina.cli.main import main
from afina.errors import TrainingError
from afina.training import trainer as loop

end, breaks = loop.Trainer.finish_step, os.environ["BREAKS"]
def ending(self, *arguments):
    if self.progress.step == 7 and breaks in (os.environ["RANK"], "all"):
        raise TrainingError(f"broken on purpose by {os.environ['RANK']}", hint="nothing")
    end(self, *arguments)
loop.Trainer.finish_step = ending
main()
"""


def broken(tmp_path: Path, breaks: str, *command: object) -> subprocess.CompletedProcess[str]:
    (tmp_path / "breaking.py").write_text(BREAKING)
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    words = [*launcher, tmp_path / "breaking.py", *command]
    environment = ENVIRONMENT | {"BREAKS": breaks}
    return subprocess.run(
        [str(w) for w in words], capture_output=True, text=True, timeout=250, env=environment
    )


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 3])
def test_a_run_goes_on_with_more_or_fewer_processes(
    tiny: Path, chats: Path, general: Path, tmp_path: Path, processes: int
) -> None:
    settings = TOGETHER | dict(method="lora", fsdp=True)
    whole = afina.train(
        chats, base=str(tiny), retention_text=general, output_dir=tmp_path / "whole", **settings
    )  # type: ignore[arg-type]
    flags = [
        word for name, value in settings.items() for word in ("--" + name.replace("_", "-"), value)
    ]
    cut = broken(
        tmp_path,
        "all",
        "train",
        chats,
        "--base",
        tiny,
        "--retention-text",
        general,
        "--output-dir",
        tmp_path / "cut",
        *flags,
    )
    assert cut.returncode != 0
    assert cut.stderr.count("broken on purpose") == 1, "told once"
    assert [line["step"] for line in metrics(tmp_path / "cut")] == list(range(1, 8))
    if processes == 1:
        afina.train(
            chats,
            base=str(tiny),
            retention_text=general,
            output_dir=tmp_path / "cut",
            resume=True,
            **(settings | {"device": "cpu"}),
        )  # type: ignore[arg-type]
    else:
        train(tiny, chats, general, tmp_path / "cut", "--resume", processes=processes, **settings)
    same_losses(tmp_path / "cut", whole.folder)


TURNS = """
import sys, time
from pathlib import Path
from afina.training.setup.processes import world
folder, us = Path(sys.argv[1]), world()
with us.main_process_first():
    seen = (folder / "in").exists(), (folder / "after").exists()
    (folder / "in").touch()
    time.sleep(0 if us.is_main_process else 1)
    assert seen == (not us.is_main_process, False), seen
    assert not (folder / "after").exists()
(folder / "after").touch()
"""


@pytest.mark.slow
def test_the_first_goes_on_when_all_had_their_turn(tmp_path: Path) -> None:
    """Else a slower process finds the checkpoint that the first has begun to write, and reads it while it is replaced."""
    (tmp_path / "turns.py").write_text(TURNS)
    done = torchrun(tmp_path / "turns.py", tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_an_error_in_one_process_ends_all(
    tiny: Path, chats: Path, general: Path, tmp_path: Path
) -> None:
    command = (
        "train",
        chats,
        "--base",
        tiny,
        "--retention-text",
        general,
        "--output-dir",
        tmp_path / "run",
        "--max-steps",
        12,
    )
    for rank in ("0", "1"):
        done = broken(tmp_path, rank, *command, *(["--resume"] if rank == "1" else []))
        assert done.returncode != 0
        assert f"afina: broken on purpose by {rank}\n  next: nothing\n" in done.stderr
        assert done.stderr.count("broken on purpose") == 1
        assert "afina/training" not in done.stderr, "no traceback but the launcher's own"
    wrong = torchrun("-m", "afina", "train", chats, "--rnak", 3)
    assert wrong.returncode != 0
    assert wrong.stderr.count("unknown flag --rnak") == 1


def test_settings_know_where_each_process_computes() -> None:
    settings = TrainSettings(data=Path("x"), fsdp=True)
    assert (settings.fsdp, settings.load_device) == (True, "cpu")
    settings = TrainSettings(data=Path("x"), device="cpu")
    assert (settings.fsdp, settings.load_device) == (False, "cpu")
