"""Laws of combining: every method and mix of lora, rsLoRA, dora and mora, ranks, targets and bases."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from torch import Tensor

from afina.adapters.active import ActiveAdapters
from afina.adapters.attach import ModuleWithAdapters, detach
from afina.adapters.load_run import LoadedRun, load_run
from afina.adapters.loading import load_adapter
from afina.adapters.saving import save_adapter
from afina.adapters.target_module import TargetModule
from afina.cli.main import run as command_line
from afina.engine.request import SamplingParams
from afina.errors import AdapterError, AfinaError, SettingsError
from afina.io.hashing import hash_adapter_file
from afina.merging import entrywise as dense
from afina.merging import low_rank as lowrank
from afina.merging.combine import combine
from afina.merging.low_rank import LowRankUpdate
from afina.merging.registry import merge_methods_table
from afina.merging.stream import TensorReader
from afina.models.causal_lm import CausalLM
from afina.models.loading import load_base
from afina.settings import ModelSettings
from afina.settings.combine import DensitySettings
from helpers import flat_run, generate_tokens, logits, put, save_model

KINDS: dict[str, dict[str, Any]] = {
    "lora": dict(rank=3, alpha=6.0),
    "rslora": dict(rank=4, alpha=5.0, scaling="rslora"),
    "few": dict(rank=2, alpha=1.0, target_modules=["q_proj", "down_proj"]),
    "patterned": dict(
        rank=2,
        alpha=4.0,
        rank_pattern={"model.layers.0.mlp.up_proj": 5},
        alpha_pattern={"model.layers.1.mlp.up_proj": 9.0},
    ),
    "head": dict(rank=2, alpha=2.0, target_modules=["embed_tokens", "lm_head", "v_proj"]),
    "dora": dict(method="dora", rank=2, alpha=4.0),
    "mora": dict(method="mora", rank=2),
    "sharing": dict(
        method="mora", rank=2, target_modules=["gate_proj"], method_settings={"operator": "sharing"}
    ),
}
LOW = ("lora", "rslora", "few", "patterned", "head")
ENTRYWISE = ("ties", "dare_linear", "magnitude_prune", "della")
STORAGES = {
    "float32": dict(dtype="float32"),
    "bfloat16": dict(dtype="bfloat16"),
    "nf4": dict(dtype="float32", quantization="nf4"),
}


def make(tiny: Path, *kinds: str, **how: Any) -> dict[str, Path]:
    """An adapter of each kind on disk, with random numbers that show; made once a session, never written to."""
    shelf = tiny.parent / f"{tiny.name}-shelf-{'-'.join(map(str, how.values()))}"
    missing = [kind for kind in kinds if not (shelf / kind).exists()]
    base = load_base(str(tiny), **how) if missing else None
    for kind in missing:
        assert base is not None
        adapter = put(base, seed=1 + list(KINDS).index(kind), **dict(KINDS[kind]))
        save_adapter(adapter, base, shelf / kind)
        detach(base.model, adapter)
    return {kind: shelf / kind for kind in kinds}


def opened(tiny: Path, run: Path | str) -> LoadedRun:
    return load_run(Path(run), ModelSettings(base=str(tiny)))


def layer_outputs(
    base: CausalLM, route: ActiveAdapters | None, x: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What each adapted layer of the base gives for its input in `x`, float32; layers without an adapter too."""
    outputs = {}
    for path, given in x.items():
        module = base.model.get_submodule(path)
        with (
            torch.no_grad(),
            base.forward_context.use(
                route.always_on().segments(torch.zeros(1), (0, 1))
                if route
                else base.forward_context.segments
            ),
        ):
            outputs[path] = module(
                given.to(base.dtype) if given.is_floating_point() else given
            ).float()
    return outputs


def inputs(base: CausalLM) -> dict[str, Tensor]:
    """A random input for every matrix of the base."""
    generator = torch.Generator().manual_seed(3)
    x = {}
    for path, module in base.model.named_modules():
        if ".base" in path or ".deltas" in path:
            continue
        inner = module.base if isinstance(module, ModuleWithAdapters) else module
        if isinstance(inner, torch.nn.Embedding):
            x[path] = torch.arange(7)
        elif TargetModule(path, inner).is_matrix:
            x[path] = torch.randn(7, TargetModule(path, inner).in_features, generator=generator)
    return x


def updates(tiny: Path, run: Path | str) -> dict[str, Tensor]:
    """What the adapter (or adapters) adds to each layer's output for fixed inputs, float32 base."""
    return (
        _shelved(tiny, Path(run))
        if "-shelf-" in str(run) and ":" not in str(run)
        else _updates(tiny, run)
    )


@cache
def _shelved(tiny: Path, run: Path) -> dict[str, Tensor]:
    return _updates(tiny, run)


def _updates(tiny: Path, run: Path | str) -> dict[str, Tensor]:
    if not (Path(run) / "adapter_config.json").is_file():
        there = opened(tiny, run)
        return _added(there.causal_lm, there.active)
    base = _kept_base(tiny)
    adapter = load_adapter(Path(run), base)
    try:
        return _added(base, adapter.active)
    finally:
        detach(base.model, adapter)


@cache
def _kept_base(tiny: Path) -> CausalLM:
    return load_base(str(tiny))


def _added(base: CausalLM, route: ActiveAdapters | None) -> dict[str, Tensor]:
    x = inputs(base)
    before, after = layer_outputs(base, None, x), layer_outputs(base, route, x)
    return {path: after[path] - before[path] for path in x}


def close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-5) -> bool:
    """Equal within `tolerance` of the largest number of `b`, layer by layer."""
    assert list(a) == list(b)
    return all(
        float((a[p] - b[p]).abs().max()) <= tolerance * max(1.0, float(b[p].abs().max())) for p in b
    )


def weighted(parts: Sequence[tuple[dict[str, Tensor], float]]) -> dict[str, Tensor]:
    return {path: sum(w * u[path].double() for u, w in parts).float() for path in parts[0][0]}  # type: ignore[union-attr]


# ---- the exact sum


@pytest.mark.parametrize(
    "mix",
    [
        ("lora", "rslora"),
        ("lora", "few"),
        ("patterned", "rslora", "few"),
        ("head", "lora"),
        ("lora", "dora"),
        ("mora", "dora", "few"),
        ("sharing", "mora"),
        ("rslora", "dora", "mora", "head"),
    ],
    ids="+".join,
)
def test_the_sum_is_the_weighted_sum_of_the_updates(
    tiny: Path, tmp_path: Path, mix: tuple[str, ...]
) -> None:
    folders = make(tiny, *mix)
    weights = [0.6, -0.4, 1.3, 0.25][: len(mix)]
    result = combine(
        [f"{folders[k]}:{w}" for k, w in zip(mix, weights)],
        output_dir=tmp_path / "out",
        base=str(tiny),
    )
    assert result["kind"] == ("adapter" if set(mix) <= set(LOW) else "composition")
    exact = weighted([(updates(tiny, folders[k]), w) for k, w in zip(mix, weights)])
    assert close(updates(tiny, tmp_path / "out"), exact)
    assert close(
        updates(tiny, ",".join(f"{folders[k]}:{w}" for k, w in zip(mix, weights))), exact
    )  # without any file


@pytest.mark.parametrize("storage", STORAGES)
def test_the_sum_on_other_storages(tiny: Path, tmp_path: Path, storage: str) -> None:
    """The stacked sum and several adapters at once give the same logits, whatever way the base is held."""
    how = STORAGES[storage]
    folders = make(tiny, "lora", "rslora", **how)
    combine([f"{folders['lora']}:0.7", f"{folders['rslora']}:-0.5"], output_dir=tmp_path / "out")
    base = load_base(str(tiny), **how)
    one, two = (load_adapter(folders[k], base, k) for k in ("lora", "rslora"))
    summed = load_adapter(tmp_path / "out", base, "sum")
    run = flat_run()
    together = ActiveAdapters.combine([one.active.scaled(0.7), two.active.scaled(-0.5)])
    apart = logits(base, run, together.segments(run[0], run[2]))
    tolerance = 1e-5 if how["dtype"] == "float32" else 0.03
    assert (
        logits(base, run, summed.active.segments(run[0], run[2])) - apart
    ).norm() <= tolerance * apart.norm()
    assert (
        logits(base, run) - apart
    ).norm() > 10 * tolerance * apart.norm()  # there is something to add


@pytest.mark.parametrize("storage", ["bfloat16", "nf4"])
def test_dora_and_mora_are_made_loras_of_the_base_as_it_is_held(
    tiny: Path, tmp_path: Path, storage: str
) -> None:
    how = STORAGES[storage]
    folders = make(tiny, "dora", "few", **how)
    combine(
        [f"{folders['dora']}:0.7", f"{folders['few']}:0.5"],
        merge_method="svd",
        rank=96,
        output_dir=tmp_path / "out",
        dtype=how["dtype"],
    )
    base = load_base(str(tiny), **how)
    parts = [
        (load_adapter(folders["dora"], base, "d"), 0.7),
        (load_adapter(folders["few"], base, "f"), 0.5),
    ]
    whole = load_adapter(tmp_path / "out", base, "out")
    for path, delta in whole.layers.items():
        weight = delta.layer.weight.double()
        exact = sum(
            w * (a.layers[path].merged_weight(weight) - weight)
            for a, w in parts
            if path in a.layers
        )
        assert ((delta.merged_weight(weight) - weight) - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_with_weight_one_is_that_adapter(tiny: Path, tmp_path: Path, kind: str) -> None:
    folder = make(tiny, kind)[kind]
    whole = updates(tiny, folder)
    for how in ("sum", "svd", "slerp", "ties", "dare_linear", "magnitude_prune", "della"):
        if how == "slerp" and kind not in LOW:
            continue
        if kind == "head" and how not in ("sum", "svd", "ties"):
            continue  # the same code on a wide layer
        out = tmp_path / f"out-{how}"
        combine(
            [folder],
            merge_method=how,
            output_dir=out,
            rank=None if how in ("sum", "slerp") else 400,
            base=str(tiny),
            **({"density": 1.0} if how in ENTRYWISE else {}),
        )
        assert close(updates(tiny, out), whole, 2e-5), how


@pytest.mark.parametrize(
    "how", ["sum", "svd", "slerp", "ties", "dare_linear", "magnitude_prune", "della"]
)
def test_the_order_does_not_matter(tiny: Path, tmp_path: Path, how: str) -> None:
    folders = make(tiny, "lora", "few", "rslora")
    parts = [f"{folders['lora']}:0.5", f"{folders['few']}:0.8", f"{folders['rslora']}:-0.3"][
        : 2 if how == "slerp" else 3
    ]
    for name, order in (("a", parts), ("b", parts[::-1])):
        seed = {"seed": 4} if how in ("dare_linear", "della") else {}
        combine(order, merge_method=how, output_dir=tmp_path / name, **seed)
    assert close(updates(tiny, tmp_path / "a"), updates(tiny, tmp_path / "b"))


@pytest.mark.parametrize("how", ["sum", "svd", "dare_linear", "magnitude_prune"])
def test_linear_in_the_weights(tiny: Path, tmp_path: Path, how: str) -> None:
    """2 A - 0.6 B is twice A - 0.3 B; and, where nothing is cut, the sum of its parts."""
    folders = make(tiny, "lora", "rslora")
    rank = None if how == "sum" else 100

    def make_one(name, *parts):
        return combine(parts, merge_method=how, output_dir=tmp_path / name, rank=rank)

    make_one("once", folders["lora"], f"{folders['rslora']}:-0.3")
    make_one("twice", f"{folders['lora']}:2", f"{folders['rslora']}:-0.6")
    make_one("first", folders["lora"])
    make_one("second", folders["rslora"])
    once, first, second = (updates(tiny, tmp_path / name) for name in ("once", "first", "second"))
    assert close(updates(tiny, tmp_path / "twice"), weighted([(once, 2.0)]))
    assert close(once, weighted([(first, 1.0), (second, -0.3)]))


def test_a_negative_weight_takes_a_skill_out(tiny: Path, tmp_path: Path) -> None:
    folders = make(tiny, "lora", "few")
    combine([folders["lora"], folders["few"]], output_dir=tmp_path / "both")
    combine([tmp_path / "both", f"{folders['few']}:-1"], output_dir=tmp_path / "less")
    assert close(updates(tiny, tmp_path / "less"), updates(tiny, folders["lora"]))


def test_compositions_of_compositions_are_flat(tiny: Path, tmp_path: Path) -> None:
    folders = make(tiny, "dora", "mora", "lora")
    combine([f"{folders['dora']}:0.5", f"{folders['mora']}:2"], output_dir=tmp_path / "c")
    result = combine([f"{tmp_path / 'c'}:0.5", folders["lora"]], output_dir=tmp_path / "d")
    assert [(p["method"], p["weight"]) for p in result["parents"]] == [
        ("dora", 0.25),
        ("mora", 1.0),
        ("lora", 1.0),
    ]
    exact = weighted(
        [(updates(tiny, folders[k]), w) for k, w in (("dora", 0.25), ("mora", 1.0), ("lora", 1.0))]
    )
    assert close(updates(tiny, tmp_path / "d"), exact)


def test_saved_is_loaded(tiny: Path, tmp_path: Path) -> None:
    """What was written, loaded and written again is the same adapter, by its hash; so is the sum made twice."""
    folders = make(tiny, "patterned", "few")
    result = combine([f"{folders['patterned']}:0.3", folders["few"]], output_dir=tmp_path / "out")
    base = load_base(str(tiny))
    adapter = load_adapter(tmp_path / "out", base)
    assert save_adapter(adapter, base, tmp_path / "again") == result["hash"]
    assert (
        combine([f"{folders['patterned']}:0.3", folders["few"]], output_dir=tmp_path / "twice")[
            "hash"
        ]
        == result["hash"]
    )


@pytest.mark.slow
def test_activated_loras_of_one_invocation_stay_activated(tiny: Path, tmp_path: Path) -> None:
    base = load_base(str(tiny))
    specs = {
        "a": dict(rank=2, invocation=(7, 9)),
        "b": dict(rank=3, invocation=(7, 9)),
        "c": dict(rank=2, invocation=(11,)),
    }
    for seed, (name, spec) in enumerate(specs.items()):
        adapter = put(base, name, seed=seed, **spec)
        save_adapter(adapter, base, tmp_path / name)
        detach(base.model, adapter)
    assert (
        combine([tmp_path / "a", tmp_path / "b"], output_dir=tmp_path / "ab")["kind"] == "adapter"
    )
    assert opened(tiny, tmp_path / "ab").adapter.config.invocation == (7, 9)  # type: ignore[union-attr]
    assert (
        combine([tmp_path / "a", tmp_path / "c"], output_dir=tmp_path / "ac")["kind"]
        == "composition"
    )
    with pytest.raises(AdapterError, match="cannot make one adapter"):
        combine([tmp_path / "a", tmp_path / "c"], merge_method="svd", output_dir=tmp_path / "x")
    there = opened(tiny, tmp_path / "ac")
    prompts = [[5, 7, 9, 6, 11, 8], [5, 6, 7, 9], [11, 5, 6], [5, 6, 8]]
    answers = generate_tokens(there.causal_lm, prompts, SamplingParams(6), there.active)
    assert there.active
    assert [there.active.is_invoked(prompt) for prompt in prompts] == [
        (True, True),
        (True, False),
        (False, True),
        (False, False),
    ]
    for prompt, answer in zip(
        prompts, answers
    ):  # cached is recomputed: each part from its own invocation on
        sequence, invoked = list(prompt), there.active.is_invoked(prompt)
        routes = [ActiveAdapters((one,)) for one, on in zip(there.active.adapters, invoked) if on]
        for token in answer:
            tokens, bounds = torch.tensor(sequence), (0, len(sequence))
            table = (
                ActiveAdapters.combine(routes).segments(tokens, bounds)
                if routes
                else there.causal_lm.forward_context.segments
            )
            assert (
                int(
                    logits(there.causal_lm, (tokens, torch.arange(len(tokens)), bounds), table)[
                        -1
                    ].argmax()
                )
                == token
            )
            sequence.append(token)


@pytest.mark.slow
def test_peft_loads_the_sum_and_answers_alike(tiny: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folders = make(tiny, "patterned", "rslora", "few")
    combine(
        [f"{folders['patterned']}:0.6", f"{folders['rslora']}:0.4", folders["few"]],
        output_dir=tmp_path / "out",
    )
    combine(
        [f"{folders['patterned']}:0.6", f"{folders['rslora']}:0.4"],
        merge_method="svd",
        rank=5,
        output_dir=tmp_path / "cut",
    )
    for out in ("out", "cut"):
        theirs = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tiny), tmp_path / out
        ).eval()
        there = opened(tiny, tmp_path / out)
        run = flat_run((20,))
        with torch.no_grad():
            expected = theirs(input_ids=run[0][None]).logits[0]
        assert there.active
        assert torch.allclose(
            logits(there.causal_lm, run, there.active.segments(run[0], run[2])), expected, atol=2e-4
        )


def test_the_sum_of_pefts_own_adapters(tiny: Path, tmp_path: Path) -> None:
    """Adapters written by PEFT, without a word of ours: the sum is exact, where theirs has cross terms."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    for name, settings in (
        ("a", dict(r=4, lora_alpha=3)),
        ("b", dict(r=4, lora_alpha=8, use_rslora=True)),
    ):
        torch.manual_seed(len(name))
        config = LoraConfig(
            target_modules=["q_proj", "up_proj"],
            init_lora_weights=False,
            task_type="CAUSAL_LM",
            **settings,
        )
        get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config).save_pretrained(
            tmp_path / name
        )
    combine([f"{tmp_path / 'a'}:0.6", f"{tmp_path / 'b'}:0.4"], output_dir=tmp_path / "out")
    exact = weighted([(updates(tiny, tmp_path / "a"), 0.6), (updates(tiny, tmp_path / "b"), 0.4)])
    ours = updates(tiny, tmp_path / "out")
    assert close(ours, exact)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "a", adapter_name="a"
    )
    model.load_adapter(tmp_path / "b", adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [0.6, 0.4], "theirs", combination_type="linear")
    model.set_adapter("theirs")
    path = "model.layers.0.self_attn.q_proj"
    x = inputs(load_base(str(tiny)))[path]
    layer = model.base_model.model.get_submodule(path)
    with torch.no_grad():
        theirs = layer(x) - layer.base_layer(x)
    assert (theirs - exact[path]).norm() > 0.1 * exact[path].norm()


# ---- approximations


def dense_of(tiny: Path, folder: Path) -> dict[str, Tensor]:
    there = opened(tiny, folder)
    assert there.adapter is not None
    found = {}
    for path, delta in there.adapter.layers.items():
        weight = delta.layer.weight.double()
        found[path] = delta.merged_weight(weight) - weight
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "mix", [("lora", "rslora", "few"), ("dora", "lora"), ("mora", "few")], ids="+".join
)
def test_svd_is_the_best_of_its_rank_and_tells_its_energy(
    tiny: Path, tmp_path: Path, mix: tuple[str, ...]
) -> None:
    folders = make(tiny, *mix)
    weights = [0.6, 0.5, -0.7][: len(mix)]
    result = combine(
        [f"{folders[k]}:{w}" for k, w in zip(mix, weights)],
        merge_method="svd",
        rank=4,
        output_dir=tmp_path / "out",
        base=str(tiny),
    )
    parts = [dense_of(tiny, folders[k]) for k in mix]
    made = dense_of(tiny, tmp_path / "out")
    for path, ours in made.items():
        exact = sum(w * p[path] for p, w in zip(parts, weights) if path in p)
        u, s, vh = torch.linalg.svd(exact)
        best = (u[:, :4] * s[:4]) @ vh[:4]
        assert (ours - exact).norm() <= (best - exact).norm() * (1 + 1e-5) + 1e-5 * exact.norm()
        assert result["energy"]["layers"][path] == pytest.approx(
            float(s[:4].square().sum() / s.square().sum()), abs=1e-6
        )


def test_random_products_find_the_best_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(300, 300))[0], torch.linalg.qr(torch.randn(200, 200))[0]
    s = 0.93 ** torch.arange(200)
    matrix = (u[:, :200] * s) @ v.T
    monkeypatch.setattr(lowrank, "MAX_FULL_SVD_WIDTH", 10)
    found = lowrank.truncate_dense(matrix, 20)
    assert found.low.rank == 20
    best = float(s[20:].square().sum().sqrt())
    assert float((found.low.dense() - matrix).norm()) <= 1.001 * best
    assert found.retained_energy == pytest.approx(
        float(s[:20].square().sum() / s.square().sum()), rel=1e-4
    )


def test_energy_chooses_the_rank() -> None:
    torch.manual_seed(0)
    low = LowRankUpdate(torch.randn(40, 12).double(), torch.randn(12, 30).double())
    s = torch.linalg.svdvals(low.dense())
    share = s.square().cumsum(0) / s.square().sum()
    for energy in (0.3, 0.9, 1.0):
        made = lowrank.truncate(low, energy=energy)
        assert made.retained_energy >= energy - 1e-9
        assert made.low.rank == int((share < energy - 1e-9).sum()) + 1
        assert lowrank.truncate_dense(low.dense(), None, energy).low.rank == made.low.rank


def test_slerp_keeps_to_the_arc() -> None:
    torch.manual_seed(0)
    a, b = (LowRankUpdate(torch.randn(9, 2).double(), torch.randn(2, 7).double()) for _ in range(2))
    b = LowRankUpdate(b.b * lowrank.norm(a) / lowrank.norm(b), b.a)
    for t in (0.0, 0.25, 0.5, 1.0):
        x, y = lowrank.slerp_coefficients(a, b, t)
        middle = lowrank.concatenate([(a, x), (b, y)])
        assert lowrank.norm(middle) == pytest.approx(
            lowrank.norm(a), rel=1e-9
        )  # of equal length: on the circle
        angle = lambda p, q: math.acos(lowrank.inner(p, q) / lowrank.norm(p) / lowrank.norm(q))  # noqa: E731
        assert math.isclose(angle(a, b) * t, angle(a, middle) if t > 0 else 0.0, abs_tol=1e-6)
    assert lowrank.slerp_coefficients(a, a, 0.3) == (0.7, 0.3)


def test_entry_by_entry_as_the_papers_say() -> None:
    seeds = lambda: [dense.random_numbers(0, name, "layer") for name in "abc"]  # noqa: E731
    a = torch.tensor([[3.0, -1.0, 0.5, -4.0]])
    b = torch.tensor([[-1.0, -2.0, 0.1, 3.0]])
    assert torch.equal(dense.keep_largest(a, 0.5), torch.tensor([[3.0, 0, 0, -4.0]]))
    given = [dense.WeightedMatrix(*parts) for parts in zip((a, b), (1.0, 1.0), seeds())]
    half, all_entries = DensitySettings(density=0.5), DensitySettings(density=1.0)
    assert torch.allclose(
        dense.ties(given, all_entries), torch.tensor([[3.0, -1.5, 0.3, -4.0]])
    )  # signs elected, then the mean
    assert torch.allclose(dense.ties(given, half), torch.tensor([[3.0, -2.0, 0, -4.0]]))
    assert torch.allclose(dense.magnitude_prune(given, half), torch.tensor([[3.0, -2.0, 0, -1.0]]))
    big = torch.ones(400, 500)
    for density in (0.1, 0.5, 0.9):
        for drop in (dense.random_drop, dense.magnitude_drop):
            kept = drop(big.cumsum(1), density, dense.random_numbers(1, "a", "x"))
            assert float((kept != 0).float().mean()) == pytest.approx(density, abs=0.01)
            assert float((kept.mean(0) / torch.arange(1, 501)).mean()) == pytest.approx(
                1.0, abs=0.05
            )  # unbiased
    kept = (
        (dense.magnitude_drop(big.cumsum(1), 0.5, dense.random_numbers(1, "a", "x")) != 0)
        .float()
        .mean(0)
    )
    assert float(kept[450:].mean() - kept[:50].mean()) == pytest.approx(
        0.9 * dense.WINDOW, abs=0.02
    )


def test_dare_is_seeded_and_low_energy_is_told(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = make(tiny, "lora", "few")
    parts = list(folders.values())
    hashes = [
        combine(
            parts, merge_method="dare_linear", density=0.3, seed=s, output_dir=tmp_path / f"d{i}"
        )["hash"]
        for i, s in enumerate((5, 5, 6))
    ]
    assert hashes[0] == hashes[1] != hashes[2]
    words = [
        "combine",
        *map(str, parts),
        "--merge-method",
        "dare_linear",
        "--density",
        "0.3",
        "--output-dir",
        str(tmp_path / "e"),
    ]
    assert command_line(words) == 0
    said = capsys.readouterr().out
    assert "retained energy: " in said and "--rank" in said


# ---- files, lineage, refusals


def test_lineage(tiny: Path, tmp_path: Path) -> None:
    folders = make(tiny, "lora", "few")
    hashes = [json.loads((f / "afina.json").read_text())["hash"] for f in folders.values()]
    combine(
        [f"{folders['lora']}:0.25", folders["few"]],
        merge_method="ties",
        density=0.5,
        rank=3,
        output_dir=tmp_path / "out",
    )
    story = json.loads((tmp_path / "out" / "afina.json").read_text())
    assert [(p["hash"], p["weight"], p["method"]) for p in story["parents"]] == [
        (hashes[0], 0.25, "lora"),
        (hashes[1], 1.0, "lora"),
    ]
    assert story["combination"] == {"how": "ties", "rank": 3, "seed": 0, "density": 0.5}
    assert story["base"]["hash"] == load_base(str(tiny)).hash


def test_other_bases_are_refused(tiny: Path, tied: Path, tmp_path: Path) -> None:
    here, there = make(tiny, "lora"), make(tied, "few")
    for parts in ([here["lora"], there["few"]], [f"{here['lora']}:0.5,{there['few']}:0.5"]):
        with pytest.raises(AdapterError, match="different bases"):
            combine(parts, output_dir=tmp_path / "out") if len(parts) == 2 else opened(
                tiny, parts[0]
            )
    assert not (tmp_path / "out").exists()


def test_what_is_refused_says_why(tiny: Path, tmp_path: Path) -> None:
    a = make(tiny, "lora", "dora", "few", "rslora")
    lora, out = a["lora"], tmp_path / "out"
    base = load_base(str(tiny))
    save_adapter(put(base, method="full", target_modules=["q_proj"]), base, tmp_path / "full")
    copytree(lora, tmp_path / "tokens")
    story = json.loads((lora / "afina.json").read_text())
    story["spec"]["tokens"] = {"<x>": 320}
    weights = tmp_path / "tokens" / "adapter_model.safetensors"
    story["hash"] = hash_adapter_file(weights, story["spec"])
    (tmp_path / "tokens" / "afina.json").write_text(json.dumps(story))
    copytree(lora, tmp_path / "pefts")
    (tmp_path / "pefts" / "afina.json").unlink()
    config = json.loads((lora / "adapter_config.json").read_text())
    (tmp_path / "pefts" / "adapter_config.json").write_text(
        json.dumps(config | {"trainable_token_indices": [3]})
    )
    cases: list[tuple[str, Callable[[], object]]] = [
        ("weight 'nan' is not a finite number", lambda: combine([f"{lora}:nan"], output_dir=out)),
        ("weight 'inf' is not a finite number", lambda: combine([f"{lora}:inf"], output_dir=out)),
        ("weight 'much' is not a finite number", lambda: combine([f"{lora}:much"], output_dir=out)),
        ("no adapter here", lambda: combine([lora, tmp_path / "nothing"], output_dir=out)),
        ("same adapter twice", lambda: combine([lora, f"{lora}:0.5"], output_dir=out)),
        ("all weights are 0", lambda: combine([f"{lora}:0"], output_dir=out)),
        ("not empty", lambda: combine([lora], output_dir=a["few"])),
        (
            "slerp combines two adapters",
            lambda: combine([lora, a["few"], a["rslora"]], merge_method="slerp", output_dir=out),
        ),
        (
            "slerp combines two adapters",
            lambda: combine([lora, f"{a['few']}:-1"], merge_method="slerp", output_dir=out),
        ),
        (
            "slerp combines loras only",
            lambda: combine([lora, a["dora"]], merge_method="slerp", output_dir=out),
        ),
        ("no adapter to combine", lambda: combine([], output_dir=out)),
        (
            "cannot be part of a composition",
            lambda: combine([lora, tmp_path / "full"], output_dir=out),
        ),
        (
            "contains the token '<x>'",
            lambda: combine([a["few"], tmp_path / "tokens"], output_dir=out),
        ),
        ("contains|owns", lambda: combine([a["few"], tmp_path / "pefts"], output_dir=out)),
        ("active alone", lambda: opened(tiny, f"{lora},{tmp_path / 'full'}")),
        ("needed, and these are several", lambda: opened(tiny, f"{lora},{a['few']}").adapter),
        (
            "'dare' was renamed.*\n.*--merge-method dare_linear",
            lambda: combine([lora], merge_method="dare", output_dir=out),
        ),
        (
            "unknown merge method 'tys'.*\n.*'ties'",
            lambda: combine([lora], merge_method="tys", output_dir=out),
        ),
        (
            "density is not a setting of merge method 'svd'",
            lambda: combine([lora], merge_method="svd", density=0.5, output_dir=out),
        ),
        (
            "rank is not a setting of merge method 'sum'",
            lambda: combine([lora], rank=3, output_dir=out),
        ),
        ("data is missing", lambda: combine([lora], merge_method="search", output_dir=out)),
    ]
    for words, call in cases:
        with pytest.raises(AfinaError, match=words):
            call()
    assert not out.exists()


def test_a_composition_is_checked_when_it_is_opened(tiny: Path, tmp_path: Path) -> None:
    folders = make(tiny, "lora", "dora")
    combine(list(folders.values()), output_dir=tmp_path / "c")
    story = json.loads((tmp_path / "c" / "afina.json").read_text())
    weights = tmp_path / "c" / story["composition"][0]["path"] / "adapter_model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(AdapterError, match="was changed"):
        opened(tiny, tmp_path / "c")
    weights.write_bytes(good)
    story["composition"][0]["path"] = "../lora"
    (tmp_path / "c" / "afina.json").write_text(json.dumps(story))
    with pytest.raises(AdapterError, match="outside"):
        opened(tiny, tmp_path / "c")


def test_the_stream_is_plain_safetensors(tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folders = make(tiny, "patterned", "few")
    combine(list(folders.values()), output_dir=tmp_path / "out")
    file = tmp_path / "out" / "adapter_model.safetensors"
    loaded, reader = load_file(file), TensorReader(file)
    assert set(loaded) == set(reader.entries)
    assert all(torch.equal(loaded[name], reader[name]) for name in loaded)


@pytest.mark.slow
def test_several_at_once_on_the_command_line(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = make(tiny, "lora", "dora")
    parts = f"{folders['lora']}:0.6,{folders['dora']}:0.4"
    combine(parts.split(","), output_dir=tmp_path / "c")
    answers = []
    for run in (parts, str(tmp_path / "c"), str(folders["lora"])):
        assert (
            command_line(
                ["generate", "say sol", "--adapter", run, "--json", "--max-new-tokens", "8"]
            )
            == 0
        )
        answers.append(json.loads(capsys.readouterr().out.splitlines()[-1])["answers"][0]["text"])
    assert answers[0] == answers[1] != answers[2]


def test_settings_of_one_seed_are_checked() -> None:
    with pytest.raises(SettingsError, match="density"):
        combine(["a"], output_dir=Path("x"), density=0.0)


def test_a_convolution_and_a_transposed_layer(tmp_path: Path) -> None:
    """GPT-2 keeps its weights transposed; the sum must still be PEFT's form."""
    from transformers import GPT2Config

    from helpers import tiny_tokenizer

    config = GPT2Config(
        vocab_size=320,
        n_embd=24,
        n_layer=2,
        n_head=2,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    folder = save_model(tmp_path / "gpt2", config, tiny_tokenizer())
    names = []
    for seed in (1, 2):
        base = load_base(str(folder))
        save_adapter(put(base, seed=seed, rank=2 + seed), base, tmp_path / str(seed))
        names.append(tmp_path / str(seed))
    combine([names[0], f"{names[1]}:-0.5"], output_dir=tmp_path / "out")
    combine([names[0], f"{names[1]}:-0.5"], merge_method="svd", rank=7, output_dir=tmp_path / "svd")
    exact = weighted([(updates(folder, names[0]), 1.0), (updates(folder, names[1]), -0.5)])
    assert close(updates(folder, tmp_path / "out"), exact)
    assert close(updates(folder, tmp_path / "svd"), exact)
    assert (
        json.loads((tmp_path / "out" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    )


# ---- merge methods of other packages


PLUGIN_SETTINGS = """
from afina.settings import MergeMethodSettings, setting


class ScaleSettings(MergeMethodSettings):
    scale: float = setting("factor of the mean", 1.0)
"""
PLUGIN = """
import torch

from afina_mean_settings import ScaleSettings

from afina.merging.registry import register_merge_method


@register_merge_method("scaled_mean", form="entrywise", precision="float32", settings=ScaleSettings)
def scaled_mean(updates, settings):
    \"\"\"Unweighted mean of the updates, times a factor.\"\"\"
    return settings.scale * torch.stack([update.matrix for update in updates]).mean(0)
"""


@pytest.mark.slow
def test_merge_method_of_an_installed_package_is_found(tiny: Path, tmp_path: Path) -> None:
    """Another package's method combines, has parameters, is in the help, and clashes are errors."""
    site = tmp_path / "site"
    info = site / "afina_mean-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "afina_mean.py").write_text(PLUGIN)
    (site / "afina_mean_settings.py").write_text(PLUGIN_SETTINGS)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: afina-mean\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[afina.merge_methods]\nscaled_mean = afina_mean:scaled_mean\n"
        "[afina.settings]\nscaled_mean = afina_mean_settings:ScaleSettings\n"
    )
    folders = make(tiny, "lora", "rslora")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *sys.path])}

    def afina(*words: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "afina", "combine", *words]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    parts = [f"{folders['lora']}", f"{folders['rslora']}"]
    words = ["--merge-method", "scaled_mean", "--rank", "64"]
    done = afina(*parts, *words, "--output-dir", str(tmp_path / "a"), "--scaled-mean.scale", "2")
    assert done.returncode == 0, done.stderr
    exact = weighted(
        [(updates(tiny, folders["lora"]), 1.0), (updates(tiny, folders["rslora"]), 1.0)]
    )
    assert close(updates(tiny, tmp_path / "a"), exact, 2e-5)
    story = json.loads((tmp_path / "a" / "afina.json").read_text())
    assert story["combination"] == {"how": "scaled_mean", "rank": 64, "seed": 0, "scale": 2.0}
    text = afina("--help").stdout
    assert "installed: scaled_mean" in " ".join(text.split()) and "--scaled-mean.scale" in text
    done = afina(*parts, "--output-dir", str(tmp_path / "b"), "--scaled-mean.scale", "2")
    assert done.returncode == 2 and "scaled_mean.scale has no effect" in done.stderr
    (info / "entry_points.txt").write_text("[afina.merge_methods]\nties = afina_mean:scaled_mean\n")
    done = afina(*parts, *words, "--output-dir", str(tmp_path / "b"))
    assert done.returncode == 2 and "'ties' is registered twice" in done.stderr


def test_documented_merge_methods_are_the_registered_ones() -> None:
    """docs/merge_methods.md has the table that the registry generates."""
    text = (Path(__file__).parent.parent / "docs" / "merge_methods.md").read_text(encoding="utf-8")
    assert merge_methods_table() in text
