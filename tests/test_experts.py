"""Fused experts: LoRA as PEFT has it, many adapters at once, NF4, merging, serving, refusals."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import afina
from afina.adapters.attach import attach, create_layers, detach
from afina.adapters.coverage import target_coverage
from afina.adapters.loading import load_adapter
from afina.adapters.saving import save_adapter
from afina.adapters.segments import NO_ADAPTERS, Segment, Segments
from afina.adapters.target_selection import resolve_target_modules
from afina.audit.audit import audit
from afina.engine.engine import Engine, EngineConfig, run_to_completion
from afina.engine.request import AdapterWeight, GenerationRequest, SamplingParams
from afina.errors import AfinaError, SettingsError
from afina.io.adapter_config import AdapterConfig
from afina.io.adapter_folder import AdapterFolder
from afina.merging.merge_into_base import merge_into_base
from afina.models.causal_lm import CausalLM
from afina.models.experts import expert_matrices, fused_experts
from afina.models.loading import load_base
from afina.models.nf4 import dequantize_model, quantizable_experts, quantize_model
from afina.models.nf4_experts import NF4Experts
from afina.planning.model_shape import read_model_shape
from afina.settings import TrainSettings
from helpers import flat_run, logits, one_by_one, put, save_model
from reference_decoder import reference_tokens

SIZES = dict(vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(num_key_value_heads=2, intermediate_size=40, pad_token_id=0)
SIZES |= dict(bos_token_id=1, eos_token_id=2)
FAMILIES: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: T.MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3": lambda: T.Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=24, num_experts=6, num_experts_per_tok=2, head_dim=8
    ),
    "olmoe": lambda: T.OlmoeConfig(**SIZES, num_experts=8, num_experts_per_tok=3),
    "transposed": lambda: T.GptOssConfig(
        **SIZES, num_local_experts=4, head_dim=8, sliding_window=5
    ),
}
RUN = flat_run((9, 5, 14, 6))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("mixtures")
    return {name: save_model(root / name, make(), tokenizer) for name, make in FAMILIES.items()}


@pytest.fixture(scope="module")
def bases(folders: dict[str, Path]) -> dict[str, CausalLM]:
    return {name: load_base(str(folder)) for name, folder in folders.items()}


@pytest.fixture
def base(bases: dict[str, CausalLM]) -> Iterator[CausalLM]:
    """A mixture whose modules are after the test as before."""
    modules = list(bases["qwen3"].model.modules())
    yield bases["qwen3"]
    assert list(bases["qwen3"].model.modules()) == modules


def alone(base: CausalLM, name: str) -> Tensor:
    on = Segments.on_all_tokens(name)
    return torch.cat([logits(base, run, on) for run in one_by_one(RUN)])


TARGETS = {
    "all": ["experts"],
    "with-modules": ["q_proj", "experts"],
    "one": ["down_proj"],
    "one-layer": ["v_proj", "model.layers.1.mlp.experts.gate_up_proj"],
    "module": ["model.layers.0.mlp.experts"],
}


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_ours_and_we_read_pefts(
    family: str, targets: str, bases: dict[str, CausalLM], folders: dict[str, Path], tmp_path: Path
) -> None:
    base = bases[family]
    adapter = put(base, target_modules=TARGETS[targets], rank=3, alpha=5.0)
    ours = logits(base, RUN, Segments.on_all_tokens("a"))
    save_adapter(adapter, base, tmp_path / "ours")
    paths = adapter.config.target_modules
    detach(base.model, adapter)
    assert (ours - logits(base, RUN)).abs().max() > 0.02
    model = T.AutoModelForCausalLM.from_pretrained(folders[family])
    theirs = PeftModel.from_pretrained(model, tmp_path / "ours").eval()
    with torch.no_grad():
        for (a, b), (tokens, _, _) in zip(
            zip(RUN[2], RUN[2][1:], strict=False), one_by_one(RUN), strict=True
        ):
            torch.testing.assert_close(
                theirs(tokens[None]).logits[0], ours[a:b], atol=2e-5, rtol=1e-4
            )
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_adapter(tmp_path / "theirs", base, "b")
    assert set(again.config.target_modules) == set(paths)
    torch.testing.assert_close(logits(base, RUN, Segments.on_all_tokens("b")), ours)
    detach(base.model, again)


def test_pefts_names_and_ranks_of_parameters_are_read(
    base: CausalLM, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = T.AutoModelForCausalLM.from_pretrained(folders["qwen3"])
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["k_proj"],
        target_parameters=["mlp.experts.down_proj", "gate_up_proj"],
        rank_pattern={"experts.down_proj": 2},
        alpha_pattern={"k_proj": 3},
        init_lora_weights=False,
        use_rslora=True,
    )
    theirs = get_peft_model(model, config).eval()
    theirs.save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path, base)
    with torch.no_grad():
        expected = theirs(RUN[0][None, :9]).logits[0]
    found = logits(base, one_by_one(RUN)[0], Segments.on_all_tokens("adapter"))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert adapter.num_parameters() == theirs.get_nb_trainable_parameters()[0]
    detach(base.model, adapter)


def test_many_adapters_in_one_batch_are_one_by_one(base: CausalLM) -> None:
    first = put(base, "a", ["experts"], rank=3)
    second = put(base, "b", ["q_proj", "down_proj"], rank=2, seed=5)
    b = RUN[2]
    spans = Segments(
        spans=(
            Segment(b[0], b[1], "a"),
            Segment(b[1], b[2], "b"),
            Segment(b[2] + 4, b[3], "a", 0.5),  # from a later token on, and two at once
            Segment(b[2] + 4, b[3], "b", 2.0),
        )
    )
    mixed = logits(base, RUN, spans)
    runs = one_by_one(RUN)
    tail = Segments(spans=(Segment(4, 14, "a", 0.5), Segment(4, 14, "b", 2.0)))
    expected = [Segments.on_all_tokens("a"), Segments.on_all_tokens("b"), tail, NO_ADAPTERS]
    for number, (run, segments) in enumerate(zip(runs, expected, strict=True)):
        found = mixed[b[number] : b[number + 1]]
        torch.testing.assert_close(found, logits(base, run, segments), atol=1e-5, rtol=1e-5)
    before = logits(base, runs[2])[:4]
    torch.testing.assert_close(mixed[b[2] : b[2] + 4], before, atol=1e-5, rtol=1e-5)
    detach(base.model, first)
    detach(base.model, second)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_dense_weights(family: str, folders: dict[str, Path]) -> None:
    base = load_base(str(folders[family]))
    adapter = put(base, target_modules=["experts"], rank=2)
    run = one_by_one(RUN)[2]
    with base.forward_context.use(Segments.on_all_tokens("a")):
        base.all_logits(*run).logsumexp(-1).sum().backward()
    found = {path: layer.a.grad.clone() for path, layer in adapter.layers.items()}
    detach(base.model, adapter)
    for path, layer in adapter.layers.items():  # W + s B A as one tensor, transformers' own pass
        parent, _, name = path.rpartition(".")
        owner: Any = base.model.get_submodule(parent)
        weight = owner._parameters.pop(name).detach()
        layer.zero_grad()
        merged = layer.merged_weight(weight.mT if owner.is_transposed else weight)
        setattr(owner, name, merged.mT if owner.is_transposed else merged)
    base.all_logits(*run).logsumexp(-1).sum().backward()
    for path, layer in adapter.layers.items():
        torch.testing.assert_close(layer.a.grad, found[path], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_is_adapted(family: str, quantization: str, folders: dict[str, Path]) -> None:
    base = load_base(str(folders[family]), quantization=quantization)
    adapter = put(base, target_modules=["all-linear", "experts"], rank=2)
    adapted = logits(base, RUN, Segments.on_all_tokens("a"))
    merge_into_base(base, adapter)
    torch.testing.assert_close(logits(base, RUN), adapted, atol=5e-5, rtol=1e-3)
    for _, owner, name in fused_experts(base.model):
        assert isinstance(getattr(owner, name), torch.nn.Parameter)


@pytest.mark.parametrize("family", FAMILIES)
def test_nf4_experts_are_their_dequantized_weights(
    family: str, folders: dict[str, Path], bases: dict[str, CausalLM]
) -> None:
    base = load_base(str(folders[family]), quantization="nf4")
    report = {error.path: error for error in base.quantization_report}
    quantized = logits(base, RUN)
    for path, owner, name in fused_experts(base.model):
        held: Any = getattr(owner, name)
        assert isinstance(held, NF4Experts) and report[path].bits < 6
        stored = sum(t.nbytes for t in held.parameters())
        assert report[path].bytes == held.nbytes == stored
    sizes = read_model_shape(
        TrainSettings(data=Path("rows.jsonl"), base=str(folders[family])), "cpu"
    ).weight_bytes("nf4")
    assert sizes == sum(p.nbytes for p in base.model.parameters())
    config = AdapterConfig("lora", ())
    assert (
        target_coverage(base.model, config).total
        == target_coverage(bases[family].model, config).total
    )
    dequantize_model(base.model)
    assert not any(isinstance(module, NF4Experts) for module in base.model.modules())
    torch.testing.assert_close(logits(base, RUN), quantized, atol=2e-5, rtol=1e-4)
    assert [error.path for error in quantize_model(base.model)] == list(report)


def test_each_expert_is_quantized_by_itself(bases: dict[str, CausalLM]) -> None:
    model = copy.deepcopy(bases["olmoe"].model)
    path, (owner, name) = next(iter(quantizable_experts(model).items()))
    with torch.no_grad():
        getattr(owner, name)[2] *= 1000.0  # one loud expert costs the others nothing
    before = getattr(owner, name).detach().clone()
    quantize_model(model)
    after = getattr(owner, name).dequantize()
    errors = (after - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)
    assert (errors < 0.11).all() and path.endswith("gate_up_proj")


def test_targets_name_experts_and_the_reached_share_counts_them(base: CausalLM) -> None:
    paths = resolve_target_modules(base.model, "experts", "last:1", False, experts=True)
    assert [path.rpartition(".")[2] for path in paths] == ["gate_up_proj", "down_proj"]
    assert (
        resolve_target_modules(base.model, ["gate_up_proj", "down_proj"], [1], False, True) == paths
    )
    found = target_coverage(base.model, AdapterConfig("lora", paths))
    assert found.reached == sum(base.model.get_parameter(path).numel() for path in paths)
    linear = resolve_target_modules(base.model, "all-linear", None, False, experts=True)
    assert not any("experts" in path for path in linear)


@pytest.mark.parametrize("method", ["dora", "mora", "full"])
def test_other_methods_name_what_they_do_not_adapt(method: str, base: CausalLM) -> None:
    path = "model.layers.0.mlp.experts.down_proj"
    with pytest.raises(AfinaError, match=f"{method} does not adapt the parameters of fused"):
        create_layers(base.model, AdapterConfig(method, (path,)))
    if method != "full":
        with pytest.raises(SettingsError, match="one weight matrix") as caught:
            resolve_target_modules(base.model, "experts", None, False)
        assert "lora or full" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("values", "field"),
    [({"dropout": 0.1}, "dropout"), ({"method_settings": {"restart_every": 5}}, "restart_steps")],
)
def test_what_experts_cannot_have_is_refused(
    values: dict[str, Any], field: str, base: CausalLM
) -> None:
    config = AdapterConfig("lora", ("model.layers.0.mlp.experts.down_proj",), **values)
    with pytest.raises(SettingsError, match=f"{field} is not supported at fused experts"):
        attach(base.model, base.forward_context, "a", config)


def test_a_trained_copy_and_a_lora_of_experts_share_a_module(base: CausalLM) -> None:
    full = put(base, "full", ["experts"], method="full")
    before = alone(base, "full")
    lora = put(base, "lora", ["experts"], rank=2)
    assert torch.equal(alone(base, "full"), before)
    both = Segments(global_adapters=(("full", 1.0), ("lora", 1.0)))
    with pytest.raises(SettingsError, match="must be active alone"):
        logits(base, RUN, both)
    detach(base.model, full)
    on = alone(base, "lora")
    assert not torch.allclose(on, before)
    detach(base.model, lora)


@pytest.fixture(scope="module")
def saved(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of experts and linear modules on the Qwen3 mixture."""
    base = load_base(str(folders["qwen3"]))
    adapter = put(base, target_modules=["all-linear", "experts"], rank=2, alpha=8.0)
    folder = tmp_path_factory.mktemp("saved")
    save_adapter(adapter, base, folder / "adapter")
    return folder / "adapter"


def test_the_engine_serves_it(base: CausalLM, saved: Path) -> None:
    engine = Engine(base, EngineConfig(pool_bytes=1 << 22))
    part = AdapterWeight(engine.registry.add("experts", saved).hash)
    sampling, prompt = SamplingParams(max_new_tokens=6), tuple(range(20, 29))
    on: list[tuple[AdapterWeight, ...]] = [(part,), (), (part,)]
    requests = [GenerationRequest(prompt, sampling, parts) for parts in on]
    found = [tokens for _, tokens, _ in run_to_completion(engine, requests)]
    engine.registry.remove("experts")
    engine.stop()
    loaded = load_adapter(saved, base)
    expected = reference_tokens(base, [prompt], sampling, loaded.active)[0]
    detach(base.model, loaded)
    plain = reference_tokens(base, [prompt], sampling)[0]
    assert found == [expected, plain, expected] and plain != expected


def test_merge_writes_a_model_that_transformers_loads(
    base: CausalLM, saved: Path, tmp_path: Path
) -> None:
    result = afina.merge(saved, output_dir=tmp_path / "merged", dtype="float32")
    assert result.kl < 1e-5 and result.greedy_agreement == 1.0
    adapter = load_adapter(saved, base)
    adapted = logits(base, one_by_one(RUN)[0], Segments.on_all_tokens("adapter"))
    detach(base.model, adapter)
    merged = T.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        found = merged(RUN[0][None, :9]).logits[0]
    torch.testing.assert_close(found, adapted, atol=5e-5, rtol=1e-3)


def test_sums_of_adapters_refuse_experts(saved: Path, tmp_path: Path) -> None:
    doors: dict[str, Callable[[], Any]] = {
        "combine": lambda: afina.combine([saved], output_dir=tmp_path / "c"),
        "extract": lambda: afina.extract(saved, max_rank=2, output_dir=tmp_path / "e"),
        "gguf": lambda: afina.export(saved, format="gguf-lora", output=tmp_path / "g"),
    }
    for name, door in doors.items():
        with pytest.raises(AfinaError, match="fused experts") as caught:
            door()
        assert "afina merge" in str(caught.value.hint), name
    assert not list(tmp_path.iterdir())


def test_the_audit_names_what_it_did_not_measure(saved: Path, folders: dict[str, Path]) -> None:
    report = audit(saved, base=str(folders["qwen3"]), time_budget_seconds=0)
    found = [finding["text"] for finding in report["findings"]]
    assert any("factors of fused experts" in what for what in found)
    assert any("could not be measured" in what and "experts" in what for what in found)
    assert report["verdict"] == "review"


def test_training_reaches_the_experts(folders: dict[str, Path], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "{n}+1?", "completion": "{n + 1}"}}\n' for n in range(8)))
    targets = ["all-linear", "experts"]
    afina.train(
        data=rows, base=str(folders["olmoe"]), target_modules=targets, rank=2, max_steps=2,
        output_dir=tmp_path / "run", learning_rate=5e-3, dtype="float32",
    )  # fmt: skip
    opened = AdapterFolder.open(tmp_path / "run")
    name = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_B.weight"
    tensor = opened.reader()[name] if hasattr(opened.reader(), "__getitem__") else None
    assert opened.entries[name].shape == (80, 16)
    assert tensor is None or tensor.abs().max() > 0


def test_fused_experts_are_told_from_other_modules(bases: dict[str, CausalLM]) -> None:
    for base in bases.values():
        assert sum(bool(expert_matrices(module)) for module in base.model.modules()) == 2
    assert expert_matrices(torch.nn.Linear(2, 2)) == ()
