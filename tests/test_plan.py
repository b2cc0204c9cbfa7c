"""The plan before the run: counts, memory and time, from a configuration alone. Rates are fixed here: nothing is timed."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import afina
from afina.adapters.attach import attach
from afina.adapters.registry import registered_methods
from afina.adapters.saving import save_adapter
from afina.adapters.segments import Segments
from afina.cli.main import run
from afina.data.packing import pack_examples
from afina.data.renderer import Example
from afina.errors import SettingsError
from afina.io.adapter_folder import WEIGHTS_FILE
from afina.models.loading import load_base
from afina.models.nf4 import quantize_model
from afina.objectives.language_modeling import batch_loss
from afina.objectives.shared_prefix import SharedPrefixBatch
from afina.planning import machine as machines
from afina.planning import machine_rates as probe
from afina.planning.checkpointing_policy import CHECKPOINTING_LEVELS, choose_level
from afina.planning.estimate import estimate_methods, largest_batch, remedies
from afina.planning.estimates import Workload
from afina.planning.machine import PROCESS_BYTES, Machine, smallest_gpu
from afina.planning.model_shape import ModelShape, count_parameters, read_model_shape
from afina.planning.plan import UNKNOWN_WORKLOAD
from afina.planning.run_step import full_load, make_step
from afina.planning.step_cost import StepCost
from afina.settings import PlanSettings, TrainSettings
from afina.training.setup.set_up import build_adapter_config, set_up_run
from helpers import RATES, write_rows

LARGE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
HERE = Machine("cpu", 16e9, RATES)


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configuration of a model of 70B, and nothing else."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "config.json").write_text(json.dumps(LARGE))
    return folder


@pytest.fixture(scope="session")
def billion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the shape of Llama-3.2-1B, made shorter."""
    small = {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 8,
        "num_attention_heads": 32,
    }
    folder = tmp_path_factory.mktemp("billion")
    (folder / "config.json").write_text(json.dumps(LARGE | small | {"tie_word_embeddings": True}))
    return folder


def planned(folder: Path | str, **values: Any) -> tuple[ModelShape, PlanSettings, StepCost]:
    settings = PlanSettings(base=str(folder), **values)
    shape = read_model_shape(settings, "cpu")
    return shape, settings, make_step(shape, settings, HERE.device)


def peak(folder: Path, tokens: int = 1024, **values: Any) -> float:
    shape, settings, step = planned(folder, max_tokens_per_batch=tokens, **values)
    return round(step.memory(full_load(shape, settings), RATES.libraries).peak)


def seconds(folder: Path, tokens: int = 1024, **values: Any) -> float:
    shape, settings, step = planned(folder, max_tokens_per_batch=tokens, **values)
    return step.time(full_load(shape, settings), RATES).step


@pytest.mark.parametrize("kind", ["tiny", "tied"])
def test_parameters_are_those_of_the_model(request: pytest.FixtureRequest, kind: str) -> None:
    folder = request.getfixturevalue(kind)
    shape, model = planned(folder)[0], load_base(str(folder)).model
    assert (
        shape.parameters
        == sum(p.numel() for p in model.parameters())
        == sum(shape.parameters_by_kind.values())
    )
    assert shape.weight_bytes("plain") == sum(p.nbytes for p in model.parameters())
    assert (shape.parameters_by_kind["output"] == 0) is (kind == "tied")
    assert shape.num_layers == 4
    assert shape.is_exact
    quantize_model(model)
    assert shape.weight_bytes("nf4") == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("method", [*registered_methods(), "freeze"])
@pytest.mark.parametrize("kind", ["tiny", "tied"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"rank": 3, "layers": "last:2"}, {"target_modules": ["q_proj", "down_proj", "lm_head"]}],
    ids=str,
)
def test_counts_are_those_of_a_real_adapter(
    request: pytest.FixtureRequest, kind: str, method: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = request.getfixturevalue(kind)
    _, asked, step = planned(folder, method=method, **settings)
    base = load_base(str(folder))
    adapter = attach(base.model, base.forward_context, "a", build_adapter_config(base.model, asked))
    assert step.count.config == adapter.config
    assert step.count.trainable == adapter.num_parameters()
    save_adapter(adapter, base, tmp_path / "a")
    size = (tmp_path / "a" / WEIGHTS_FILE).stat().st_size
    assert (
        step.count.width * step.count.trainable
        < size
        <= step.count.file_bytes
        <= size + 450 * len(step.count.layers)
    )


def test_new_tokens_are_counted(tiny: Path, tied: Path) -> None:
    of_lora = planned(tiny)[2].count.trainable
    for folder, places in ((tiny, 2), (tied, 1)):
        step = planned(folder, new_tokens=["<a>", "<b>", "<c>"])[2]
        assert step.count.trainable == of_lora + places * 3 * 48


@pytest.mark.parametrize("method", ["lora", "qlora", "dora", "mora", "full", "freeze"])
def test_more_tokens_take_more(billion: Path, method: str) -> None:
    """Memory never falls, and rises wherever it is not gradients or optimizer that take the most."""
    tokens = (256, 1024, 1025, 4096, 65536)
    peaks, times = (
        [peak(billion, n, method=method) for n in tokens],
        [seconds(billion, n, method=method) for n in tokens],
    )
    assert peaks == sorted(peaks)
    assert peaks[-1] > peaks[-2]
    assert len(set(peaks)) == len(peaks) or method in ("full", "freeze")
    assert times == sorted(set(times))


@pytest.mark.parametrize("method", ["lora", "qlora", "dora", "mora", "qmora"])
def test_higher_rank_takes_more(billion: Path, method: str) -> None:
    extra = (
        {"mora": {"operator": "sharing"}} if "mora" in method else {}
    )  # rotation rounds its columns to even numbers
    steps = [
        (
            peak(billion, rank=r, method=method, **extra),
            seconds(billion, rank=r, method=method, **extra),
        )
        for r in (4, 8, 256)
    ]
    assert steps == sorted(set(steps))
    assert [s for _, s in steps] == sorted({s for _, s in steps})


@pytest.mark.parametrize("method", ["lora", "full", "dora"])
def test_more_layers_take_more(billion: Path, method: str) -> None:
    layers = ("last:1", "last:2", "last:4", "last:8")
    peaks = [peak(billion, 4096, layers=n, method=method) for n in layers]
    times = [seconds(billion, layers=n, method=method) for n in layers]
    assert peaks == sorted(set(peaks))
    assert times == sorted(set(times))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora", "mora"])
def test_four_bits_take_less_memory_and_more_time(large: Path, method: str) -> None:
    saved = peak(large, method=method) - peak(large, method=f"q{method}")
    assert 0.95 * 68.4e9 * (16 - 4.127) / 8 < saved < 68.6e9 * (16 - 4.127) / 8
    assert seconds(large, method=f"q{method}") > seconds(large, method=method)


def test_moments_in_eight_bits_take_less(large: Path) -> None:
    *_, plain = planned(large, method="full")
    shape, settings, small = planned(large, method="full", optimizer="adamw_8bit")
    load = full_load(shape, settings)
    assert small.memory(load, 0.0).optimizer < 0.27 * plain.memory(load, 0.0).optimizer
    assert small.memory(load, 0.0).peak < plain.memory(load, 0.0).peak


def test_what_full_fine_tuning_holds(large: Path) -> None:
    """A bf16 copy, float32 masters and two float32 moments: 14 bytes a number besides the frozen base's two."""
    shape, settings, step = planned(large, method="full")
    memory = step.memory(full_load(shape, settings), 0.0)
    assert memory.learned + memory.optimizer == 14 * shape.parameters
    assert memory.weights == 2 * shape.parameters


@pytest.mark.slow
def test_kept_activations_are_those_that_autograd_keeps(tiny: Path) -> None:
    """Twice the tokens keep so many bytes more: as counted by hand, and as PyTorch packs them away."""
    for method in ("lora", "dora", "mora", "full"):
        base = load_base(str(tiny))
        _, asked, step = planned(tiny, method=method)
        adapter = attach(
            base.model, base.forward_context, "a", build_adapter_config(base.model, asked)
        )
        own = {
            p.untyped_storage().data_ptr()
            for p in [*base.model.parameters(), *adapter.parameters()]
        }
        kept = []
        for rows in (4, 8):
            storages: dict[int, torch.UntypedStorage] = {}

            def pack(
                tensor: torch.Tensor, storages: dict[int, torch.UntypedStorage] = storages
            ) -> torch.Tensor:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
                return tensor

            batch = pack_examples(
                [Example("", list(range(5, 69)), [False, *[True] * 63], 0, None)] * rows
            )
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = batch_loss(base, batch, adapter.active)
            kept.append(sum(s.nbytes() for place, s in storages.items() if place not in own))
            del loss
        counted = 256 * 4 * sum(step._kept(Workload.full(256, 64)))
        assert 0.9 * counted < kept[1] - kept[0] < 1.12 * counted, (
            method
        )  # besides: the loss's, the angles


@pytest.mark.slow
def test_blocks_below_the_first_adapted_one_keep_nothing(large: Path) -> None:
    def kept(layers: Any) -> float:
        return planned(large, layers=layers)[2].memory(Workload.full(1024, 512), 0.0).activations

    assert kept("last:20") == pytest.approx(kept(None) / 4)
    assert 0.6 * kept(None) < kept([0]) < kept(None)  # the others keep no inputs of adapters


@pytest.mark.slow
def test_a_70b_model_in_a_second(large: Path) -> None:
    planned(large)  # imports are not what is looked at
    start = time.process_time()
    result = afina.plan(
        base=str(large), device="cuda", method="qlora", gradient_checkpointing="all"
    )
    assert time.process_time() - start < 1.0
    assert result["base"]["parameters"] == 70_553_706_496
    assert result["cost"]["card_gib"] == 48 if result["cost"]["step_seconds"] is None else True
    assert result["example"] is None
    assert result["steps"] is None


def test_rows_are_counted_without_weights(tiny: Path, chats: Path, tmp_path: Path) -> None:
    """With a tokenizer beside its configuration, a model without weights is planned for as one with them."""
    whole = afina.plan(chats, base=str(tiny), show=2)
    for file in tiny.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    bare = afina.plan(chats, base=str(tmp_path), show=2)
    assert bare["cost"] == whole["cost"]
    assert {**bare["data"], "objective": "sft"} == whole["data"]
    assert bare["example"] == whole["example"]
    assert bare["examples"] == whole["examples"] and len(bare["examples"]) == 2
    for name in ("steps", "trainable_parameters", "layers"):
        assert bare[name] == whole[name]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    blind = afina.plan(chats, base=str(tmp_path), max_steps=7)
    assert (blind["steps"], blind["data"]["rows"], blind["example"]) == (7, 48, None)


def test_the_load_is_that_of_the_batches(tiny: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "a" * n, "completion": " b"} for n in (5, 9, 30, 31, 60, 80)]
    data = write_rows(tmp_path / "r.jsonl", *rows)
    result = afina.plan(
        data,
        base=str(tiny),
        eval_data=write_rows(tmp_path / "h.jsonl", rows[0]),
        max_tokens_per_batch=10**6,
    )
    assert result["cost"]["batch"]["tokens"] == result["data"]["tokens"]
    assert result["cost"]["batch"]["longest"] == result["data"]["longest"]
    labels = result["data"]["labelled_percent"] * result["data"]["tokens"] / 100
    assert result["cost"]["batch"]["labels"] == pytest.approx(labels)


@pytest.mark.slow
def test_what_fits_and_what_would(large: Path) -> None:
    shape, settings, step = planned(large, method="lora")
    load = full_load(shape, settings)
    assert remedies(shape, settings, Machine("cpu", 16e9, RATES), load) == []  # not even in 4 bits
    place = Machine("cpu", 64e9, RATES)
    found = remedies(shape, settings, place, load)
    assert found
    for remedy in found:
        changed = settings.model_copy(update=remedy["settings"])
        load = full_load(shape, changed)
        turned, _, _ = choose_level(make_step(shape, changed, place.device), load, place)
        peak = turned.memory(load, place.libraries).peak
        assert peak == pytest.approx(remedy["peak_bytes"], rel=0.02)
        assert place.fits(peak)
        assert changed.method == "qlora"
    load, roomy = full_load(shape, settings), Machine("cpu", 400e9, RATES)
    most = largest_batch(step, load, roomy)
    assert most is not None
    assert roomy.fits(step.memory(load.at(most), RATES.libraries).peak)
    assert not roomy.fits(step.memory(load.at(most + most // 32), RATES.libraries).peak)


def test_cards() -> None:
    assert [smallest_gpu(gigabytes * 2**30) for gigabytes in (1, 7, 20, 21, 44, 75, 1000)] == [
        8,
        12,
        24,
        24,
        48,
        80,
        None,
    ]


@pytest.mark.slow
def test_compare(capsys: pytest.CaptureFixture[str], large: Path, tiny: Path, chats: Path) -> None:
    assert (
        run(["plan", "--compare-methods", "--base", str(large), "--device", "cuda", "--json"]) == 0
    )
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    lines = {line["method"]: line for line in result["methods"]}
    assert set(lines) == {"lora", "qlora", "dora", "qdora", "mora", "qmora", "full", "freeze"}
    assert lines["qlora"]["peak_bytes"] < lines["lora"]["peak_bytes"] < lines["full"]["peak_bytes"]
    assert lines["full"]["trainable_parameters"] == result["base"]["parameters"]
    assert lines["full"]["card_gib"] is None
    assert run(["plan", str(chats), "--compare-methods", "--base", str(tiny)]) == 0
    shown = capsys.readouterr().out
    assert "qdora" in shown
    assert "yes" in shown
    assert run(["plan", "--base", str(large)]) == 0
    assert "does NOT fit in 16.00 GB" in capsys.readouterr().out


def test_a_base_in_codes_has_no_full(tiny: Path) -> None:
    shape = planned(tiny)[0]
    held = ModelShape(shape.name, shape.folder, shape.model, shape.dtype, True, True)
    lines = {
        x["method"]: x
        for x in estimate_methods(
            held, PlanSettings(), HERE, Workload.full(256, 64), UNKNOWN_WORKLOAD, 3
        )
    }
    assert "why" in lines["full"]
    assert lines["lora"]["peak_bytes"] == lines["qlora"]["peak_bytes"]


def test_rates_between_those_measured() -> None:
    assert RATES.rate("bfloat16", 8) == pytest.approx(0.5e11)
    assert RATES.rate("bfloat16", 16) == pytest.approx(1e11)
    assert RATES.rate("bfloat16", 128) == pytest.approx(2.5e11)
    assert RATES.rate("bfloat16", 9999) == pytest.approx(4e11)


def test_rates_are_kept_until_the_machine_changes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from dataclasses import asdict

    monkeypatch.setenv("AFINA_CACHE", str(tmp_path))
    measured: list[str] = []
    monkeypatch.setattr(
        probe, "_measure_in_subprocess", lambda device: measured.append(device) or asdict(RATES)
    )
    assert probe.measured_rates("cpu") == probe.measured_rates("cpu") == RATES
    assert len(measured) == 1
    probe.measured_rates("cpu", anew=True)
    assert len(measured) == 2
    monkeypatch.setattr(probe, "machine_key", lambda device: "another")
    probe.measured_rates("cpu")
    assert len(measured) == 3
    probe.cache_file().write_text('{"another": {"copy": 1}}')  # of another version
    assert probe.measured_rates("cpu") == RATES
    probe.cache_file().write_text("{")
    assert probe.measured_rates("cpu") == RATES


def test_counts_of_modules_that_are_owned_whole(tiny: Path) -> None:
    shape, settings, _ = planned(tiny)
    spec = build_adapter_config(shape.model, settings, modules=("model.norm",))
    assert count_parameters(shape, spec).trainable == planned(tiny)[2].count.trainable + 48


# the dial of checkpointing


@pytest.mark.parametrize("method", ["lora", "qlora", "dora", "mora", "full"])
def test_each_step_of_the_dial_takes_less_memory_and_more_time(billion: Path, method: str) -> None:
    tokens = 65536
    peaks = [
        peak(billion, tokens, gradient_checkpointing=value, method=method)
        for value in CHECKPOINTING_LEVELS
    ]
    times = [
        seconds(billion, gradient_checkpointing=value, method=method)
        for value in CHECKPOINTING_LEVELS
    ]
    assert peaks == sorted(set(peaks), reverse=True)
    assert times == sorted(set(times))


def test_the_dial_goes_as_far_as_it_must(billion: Path) -> None:
    """With room for exactly what a step of the dial takes, that step is chosen; with a little less, the next one."""
    shape, settings, step = planned(billion, max_tokens_per_batch=16384)
    load = full_load(shape, settings)
    for number, value in enumerate(CHECKPOINTING_LEVELS):
        takes = peak(billion, 16384, gradient_checkpointing=value)
        turned, used, why = choose_level(
            step, load, Machine("cpu", 1.001 * (takes + PROCESS_BYTES) / 0.95, RATES)
        )
        assert (used, turned.every) == (value, {"off": 0, "all": 1}.get(value, value))  # type: ignore[call-overload]
        assert why is not None and ("without" in why) is (value != "off")
        tight = choose_level(
            step, load, Machine("cpu", 0.999 * (takes + PROCESS_BYTES) / 0.95, RATES)
        )
        assert tight[1] == CHECKPOINTING_LEVELS[min(number + 1, len(CHECKPOINTING_LEVELS) - 1)]
    assert tight[2] is not None and "still too much" in tight[2]
    assert choose_level(step, load, Machine("cuda", None, None))[1] == "off"
    told = planned(billion, max_tokens_per_batch=16384, gradient_checkpointing=3)[2]
    assert choose_level(told, load, Machine("cpu", 1e9, RATES)) == (told, 3, None)


def test_what_the_dial_keeps_is_what_autograd_keeps(tiny: Path) -> None:
    """Bytes saved for the backward pass, packed away by PyTorch, at each step of the dial: as counted, in proportion."""
    base = load_base(str(tiny))
    adapter = attach(
        base.model, base.forward_context, "a", build_adapter_config(base.model, planned(tiny)[1])
    )
    own = {
        p.untyped_storage().data_ptr() for p in [*base.model.parameters(), *adapter.parameters()]
    }
    batch = pack_examples([Example("", list(range(5, 69)), [False, *[True] * 63], 0, None)] * 8)
    kept = []
    for value in ("off", 3, 2, "all"):
        settings = PlanSettings(base=str(tiny), gradient_checkpointing=value)
        storages: dict[int, torch.UntypedStorage] = {}

        def pack(
            tensor: torch.Tensor, storages: dict[int, torch.UntypedStorage] = storages
        ) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            base.gradient_checkpointing(settings.recomputed),
        ):
            loss = batch_loss(base, batch, adapter.active)
        held = sum(s.nbytes() for place, s in storages.items() if place not in own)
        counted = (
            512
            * 4
            * sum(planned(tiny, gradient_checkpointing=value)[2]._kept(Workload.full(512, 64)))
        )
        kept.append((held, counted))
        del loss
    rest = [held - counted for held, counted in kept]  # what is no block's: the loss's, the angles
    # 7 layers x rank 8 numbers a token and block are counted for A x, which the C++ kernels do not keep: 8.2%
    assert max(rest) - min(rest) < 0.085 * kept[0][1], kept


@pytest.mark.slow
def test_train_uses_what_the_plan_chose(
    tiny: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where memory is short, plan and run turn the dial alike; the run's settings and its story say so."""
    monkeypatch.setattr(machines, "measured_rates", lambda device, anew: RATES)
    monkeypatch.setattr(machines, "known_rates", lambda device: RATES)
    settings = {"base": str(tiny), "max_steps": 2, "max_tokens_per_batch": 4096}
    plain = afina.plan(chats, **settings)
    assert plain["settings"]["gradient_checkpointing"] == "off"
    monkeypatch.setattr(
        machines, "machine_memory", lambda: (plain["cost"]["peak_bytes"] - 1e5) / 0.95
    )
    planned = afina.plan(chats, **settings)
    used = planned["cost"]["checkpointing"]["used"]
    assert used in (4, 3, 2)
    assert planned["cost"]["fits"] is True
    assert planned["settings"]["gradient_checkpointing"] == used
    run = afina.train(chats, **settings, output_dir=tmp_path / "run")
    assert run.record["settings"]["gradient_checkpointing"] == used
    assert run.record["checkpointing"] == {
        "used": used,
        "why": planned["cost"]["checkpointing"]["why"],
    }
    assert (
        yaml.safe_load((run.folder / "settings.yaml").read_text())["gradient_checkpointing"] == used
    )
    off = afina.train(chats, **settings, gradient_checkpointing="off", output_dir=tmp_path / "off")
    assert run.record["adapter"] == off.record["adapter"]
    assert off.record["checkpointing"] == {"used": "off", "why": None}
    many = afina.train_many(
        [TrainSettings(data=chats, output_dir=tmp_path / f"m{n}", **settings) for n in range(2)]
    )
    assert [r.record["settings"]["gradient_checkpointing"] for r in many] == [
        many[0].record["settings"]["gradient_checkpointing"]
    ] * 2
    assert many[0].record["settings"]["gradient_checkpointing"] in (
        3,
        2,
        "all",
    )  # twice the tokens in a pass


@pytest.mark.slow
def test_cards_with_and_without_checkpointing(large: Path) -> None:
    lines = {
        x["method"]: x
        for x in afina.plan(
            base=str(large), device="cuda", max_tokens_per_batch=16384, compare_methods=True
        )["methods"]
    }
    for line in lines.values():
        assert (
            line["card_gib_all"] is None
            or line["card_gib"] is None
            or line["card_gib_all"] <= line["card_gib"]
        )
    assert lines["qlora"]["card_gib_all"] < (lines["qlora"]["card_gib"] or 999)
    assert lines["full"]["card_gib_all"] is None


# ---- preferences and rewards


def pairs_of(folder: Path, count: int = 20) -> Path:
    rows = [
        {
            "prompt": f"say the sol and the luna {n}:",
            "chosen": " sol" * (2 + n % 3),
            "rejected": " night by the sea" * 2,
        }
        for n in range(count)
    ]
    return write_rows(folder / "pairs.jsonl", *rows)


SMALL = {"chat_template": "plain", "max_tokens_per_batch": 200, "eval_size": 0.2, "max_steps": 10}


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "rules.py").write_text("def ones(prompt, answer, reference):\n    return 1.0\n")
    monkeypatch.chdir(tmp_path)
    return "rules.py:ones"


@pytest.mark.slow
def test_a_plan_of_pairs_counts_what_is_computed(tiny: Path, tmp_path: Path) -> None:
    rows = pairs_of(tmp_path)
    costs = {
        o: afina.plan(rows, base=str(tiny), objective=o, **SMALL)["cost"]
        for o in ("dpo", "simpo", "kto", "reward")
    }
    known = afina.plan(
        rows, base=str(tiny), objective="dpo", **SMALL, dpo={"reference": "precomputed"}
    )["cost"]
    assert costs["dpo"]["phases"]["learning"] == pytest.approx(costs["simpo"]["phases"]["learning"])
    assert costs["simpo"]["phases"]["reading"] == known["phases"]["reading"] == 0.0
    assert (
        0.2 < costs["dpo"]["phases"]["reading"] / costs["dpo"]["phases"]["learning"] < 0.6
    )  # forwards alone
    assert costs["dpo"]["step_seconds"] == pytest.approx(sum(costs["dpo"]["phases"].values()))
    assert known["step_seconds"] < costs["dpo"]["step_seconds"]
    assert (
        known["run_seconds"] - 10 * known["step_seconds"]
        > costs["simpo"]["run_seconds"] - 10 * costs["simpo"]["step_seconds"]
    )
    assert costs["kto"]["phases"]["reading"] > 0 and costs["reward"]["not_counted"]
    setup = set_up_run(TrainSettings(data=rows, base=str(tiny), objective="dpo", **SMALL))
    task = setup.prepared.task
    sizes = [
        SharedPrefixBatch(task.base, b.flat, everywhere).num_computed_tokens(everywhere)[0]  # type: ignore[attr-defined]
        for step in range(task.steps_per_epoch)
        for b in task.step_batches(step)
        for everywhere in [Segments.on_all_tokens("adapter")]
    ]
    assert costs["dpo"]["batch"]["tokens"] == max(sizes) < 200  # two answers, and one prompt


@pytest.mark.slow
def test_a_reference_takes_memory_only_where_it_is_a_copy(tiny: Path, tmp_path: Path) -> None:
    rows = pairs_of(tmp_path)
    first = afina.train(
        rows,
        base=str(tiny),
        objective="dpo",
        output_dir=tmp_path / "first",
        **SMALL | {"max_steps": 1},
    )
    new, none = (
        afina.plan(rows, base=str(tiny), objective=o, **SMALL)["cost"] for o in ("dpo", "simpo")
    )
    again = afina.plan(rows, base=str(tiny), objective="dpo", **SMALL, init_adapter=first.folder)[
        "cost"
    ]
    assert new["peak_bytes"] == none["peak_bytes"]
    assert again["peak_bytes"] - new["peak_bytes"] == 4 * new["trainable_parameters"]


@pytest.mark.slow
def test_a_plan_of_rewards_says_what_is_written(tiny: Path, tmp_path: Path, judge: str) -> None:
    rows, options = (
        pairs_of(tmp_path),
        {"reward_funcs": judge, "max_new_tokens": 8, "num_generations": 4, "prompts_per_step": 4},
    )

    def cost(objective: str = "grpo", **more: Any) -> dict[str, Any]:
        return afina.plan(
            rows, base=str(tiny), objective=objective, **SMALL, **{objective: options | more}
        )["cost"]

    shown = afina.plan(rows, base=str(tiny), objective="grpo", show=1, **SMALL, grpo=options)
    assert shown["examples"][0]["text"].endswith("«...»")
    plain = cost()
    assert all(plain["phases"][name] > 0 for name in ("learning", "reading", "writing"))
    assert any("scoring" in what for what in plain["not_counted"]) and any(
        "8 tokens" in what for what in plain["not_counted"]
    )
    longer, twice, more = cost(max_new_tokens=16), cost(num_iterations=2), cost(num_generations=8)
    assert longer["phases"]["writing"] > 1.5 * plain["phases"]["writing"]
    assert twice["phases"]["writing"] == pytest.approx(
        plain["phases"]["writing"] / 2
    )  # one writing for two steps
    assert more["phases"]["learning"] > plain["phases"]["learning"]
    assert (
        cost("ppo", num_generations=1)["trainable_parameters"] == plain["trainable_parameters"] + 48
    )  # and a value head
    with pytest.raises(SettingsError, match="with its rows"):
        afina.plan(None, base=str(tiny), objective="dpo")


def test_an_activated_adapter_reads_what_comes_before_it_once(tiny: Path, tmp_path: Path) -> None:
    rows = pairs_of(tmp_path)
    both = [
        afina.plan(rows, base=str(tiny), objective="dpo", method=m, invocation=i, **SMALL)["cost"]
        for m, i in (("lora", None), ("alora", ":"))
    ]
    assert both[1]["batch"]["tokens"] < both[0]["batch"]["tokens"]
    assert both[1]["phases"]["learning"] < both[0]["phases"]["learning"]


@pytest.mark.slow
def test_the_dial_turns_for_pairs_too(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = pairs_of(tmp_path)
    values: dict[str, Any] = {"base": str(tiny), "objective": "dpo", **SMALL, "max_steps": 1}
    assert afina.plan(rows, **values)["cost"]["checkpointing"]["used"] == "off"
    monkeypatch.setattr(machines, "machine_memory", lambda: 1e6)
    found = afina.plan(rows, **values)["cost"]
    assert found["checkpointing"]["used"] == "all" and found["fits"] is False
    run = afina.train(rows, output_dir=tmp_path / "run", **values)
    assert (
        yaml.safe_load((run.folder / "settings.yaml").read_text())["gradient_checkpointing"]
        == "all"
    )


SHOWN: list[tuple[str, dict[str, Any], Any]] = [
    ("sft", {"prompt": "Who is it {}?", "completion": "It is me."}, "«It is me.<|end|>»"),
    ("pretrain", {"text": "The sea is blue {}."}, "«he sea is blue"),
    ("dpo", {"prompt": "Who {}?", "chosen": "Me.", "rejected": "No idea."}, "worse: "),
    ("kto", {"prompt": "Who {}?", "completion": "Me.", "label": True}, "better: "),
    ("reward", {"prompt": "Who {}?", "chosen": "Me.", "rejected": "No idea."}, "better: "),
]


@pytest.mark.parametrize(("objective", "row", "part"), SHOWN, ids=[name for name, *_ in SHOWN])
def test_examples_are_shown_as_the_model_reads_them(
    objective: str, row: dict[str, Any], part: str, tiny: Path, tmp_path: Path
) -> None:
    names = ["a" * n for n in range(1, 9)]
    rows = [
        {key: v.format(name) if isinstance(v, str) else v for key, v in row.items()}
        for name in names
    ]
    if objective == "kto":
        rows[1]["label"] = rows[2]["label"] = False
    file = write_rows(tmp_path / "rows.jsonl", *rows)
    values = {"base": str(tiny), "objective": objective, **SMALL}
    result = afina.plan(file, show=3, show_longest=True, **values)
    examples = result["examples"]
    assert [one.get("is_longest", False) for one in examples] == [False] * 3 + [True] * 3
    shown, longest = examples[:3], examples[3:]
    assert [one["where"] for one in shown] == sorted({one["where"] for one in shown})
    assert all(one["where"].startswith(f"{file}:") and one["tokens"] > 0 for one in examples)
    assert longest[0]["tokens"] == max(one["tokens"] for one in examples)
    assert part[:8] in shown[0]["text"]
    assert "examples" in dict(result) and f"example of {shown[1]['where']}" in result.to_markdown()
    assert 0 < shown[0]["targets"] < shown[0]["tokens"]
    # without the option there is one example, as ever
    assert [*afina.plan(file, **values)["examples"]] == []


def test_examples_need_rows(large: Path, chats: Path) -> None:
    for values, why in (({}, "no rows"), ({"data": chats, "compare_methods": True}, "a table")):
        with pytest.raises(SettingsError, match="show has no effect here") as caught:
            afina.plan(base=str(large), show=2, **values)
        assert why in str(caught.value)
    with pytest.raises(SettingsError, match="examples need a tokenizer"):
        afina.plan(chats, base=str(large), show_longest=True)
