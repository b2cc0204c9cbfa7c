"""Activated adapters: found at the last occurrence, silent before it, the same in PEFT, trained and used like any other."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from afina.adapters.active import ActiveAdapter, ActiveAdapters, last_occurrences
from afina.adapters.attach import Adapter, attach
from afina.adapters.loading import load_adapter
from afina.adapters.presets import get_preset
from afina.adapters.saving import save_adapter
from afina.adapters.target_selection import resolve_target_modules
from afina.engine.request import SamplingParams
from afina.errors import AfinaError, SettingsError
from afina.io.adapter_config import AdapterConfig
from afina.models.causal_lm import CausalLM
from afina.models.loading import load_base
from afina.models.packed_attention import AttentionMetadata
from afina.training.train import train
from helpers import generate_tokens

INVOCATION = (7, 9)


def shaken(base: CausalLM, spec: AdapterConfig) -> Adapter:
    """An adapter that does something."""
    adapter = attach(base.model, base.forward_context, "a", spec)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(0, 0.1)
    return adapter


def spec_of(base: CausalLM, method: str = "lora") -> AdapterConfig:
    return AdapterConfig(
        method,
        resolve_target_modules(base.model, "all-linear", None, False),
        rank=4,
        invocation=INVOCATION,
    )


def run_of(*sequences: list[int]) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    bounds = [0]
    for sequence in sequences:
        bounds.append(bounds[-1] + len(sequence))
    positions = torch.cat([torch.arange(len(s)) for s in sequences])
    return torch.tensor([t for s in sequences for t in s]), positions, tuple(bounds)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=5),
    st.lists(st.integers(0, 2), min_size=1, max_size=3),
)
def test_last_occurrence_is_that_of_a_plain_search(
    sequences: list[list[int]], invocation: list[int]
) -> None:
    tokens, _, bounds = run_of(*sequences)
    expected = []
    for start, sequence in zip(bounds, sequences, strict=False):
        hits = [
            i
            for i in range(len(sequence) - len(invocation) + 1)
            if sequence[i : i + len(invocation)] == invocation
        ]
        expected.append(start + hits[-1] if hits else None)
    assert last_occurrences(tokens, bounds, invocation) == expected


def layer_outputs(base: CausalLM, name: str, run: tuple, route: ActiveAdapters | None) -> Tensor:
    seen: list[Tensor] = []
    module = base.model.get_submodule(f"model.layers.3.self_attn.{name}")
    handle = module.register_forward_hook(lambda _, __, output: seen.append(output.detach()))
    from afina.adapters.segments import NO_ADAPTERS

    with (
        base.forward_context.use(NO_ADAPTERS if route is None else route.segments(run[0], run[2])),
        torch.no_grad(),
    ):
        base.hidden_states(*run)
    handle.remove()
    return seen[0].flatten(0, -2)


@pytest.mark.parametrize("name", ["k_proj", "v_proj"])
def test_keys_and_values_before_the_invocation_are_the_bases_bit_for_bit(
    base: CausalLM, name: str
) -> None:
    adapter = shaken(base, spec_of(base))
    run = run_of([5, 6, 11, 7, 9, 12, 13], [5, 7, 9, 20, 7, 9, 8])
    off, on = layer_outputs(base, name, run, None), layer_outputs(base, name, run, adapter.active)
    before = torch.tensor([0, 1, 2, 7, 8, 9, 10])
    assert torch.equal(on[before], off[before])
    after = torch.tensor([3, 4, 5, 6, 11, 12, 13])
    assert not torch.isclose(on[after], off[after]).all(-1).any()


def test_a_sequence_without_the_invocation_is_left_to_the_base_or_refused(base: CausalLM) -> None:
    adapter = shaken(base, spec_of(base))
    tokens, positions, bounds = run_of([5, 6, 8], [5, 7, 9, 4])
    with base.forward_context.use(adapter.active.segments(tokens, bounds)), torch.no_grad():
        mixed = base.all_logits(tokens, positions, bounds)
    with torch.no_grad():
        assert torch.equal(mixed[:3], base.all_logits(tokens, positions, bounds)[:3])
    with pytest.raises(AfinaError, match="row 1"):
        adapter.active.segments(tokens, bounds, where=["row 1", "row 2"])


def gradients(base: CausalLM, adapter: Adapter, run: tuple, checkpointing: bool) -> list[Tensor]:
    labels = torch.cat([run[0][1:], torch.tensor([-100])])
    with (
        base.gradient_checkpointing(checkpointing),
        base.forward_context.use(adapter.active.segments(run[0], run[2])),
    ):
        loss = base.loss(*run, labels)
    loss.backward()
    found = [p.grad.clone() for p in adapter.parameters() if p.grad is not None]
    for p in adapter.parameters():
        p.grad = None
    return found


def test_checkpointing_changes_no_gradient(base: CausalLM) -> None:
    adapter = shaken(base, spec_of(base))
    run = run_of([5, 6, 7, 9, 12, 13, 14])
    plain, recomputed = gradients(base, adapter, run, False), gradients(base, adapter, run, True)
    assert len(plain) == len(adapter.parameters()) and any(g.abs().max() > 0 for g in plain)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, recomputed, strict=True))


def test_several_forwards_may_come_before_a_backward(base: CausalLM) -> None:
    adapter = shaken(base, spec_of(base))
    runs = [run_of([5, 6, 7, 9, 12, 13]), run_of([5, 7, 9, 8, 11])]
    alone = [gradients(base, adapter, run, True) for run in runs]
    losses = []
    for run in runs:
        labels = torch.cat([run[0][1:], torch.tensor([-100])])
        with (
            base.gradient_checkpointing(True),
            base.forward_context.use(adapter.active.segments(run[0], run[2])),
        ):
            losses.append(base.loss(*run, labels))
    with base.gradient_checkpointing(True):
        sum(losses).backward()  # type: ignore[union-attr]
    for p, a, b in zip(adapter.parameters(), *alone, strict=True):
        assert torch.allclose(p.grad, a + b, atol=1e-5)


def test_embeddings_may_come_in_the_place_of_tokens(base: CausalLM) -> None:
    adapter = shaken(base, spec_of(base))
    tokens, positions, bounds = run_of([5, 6, 7, 9, 12, 13])
    with base.forward_context.use(adapter.active.segments(tokens, bounds)), torch.no_grad():
        expected = base.all_logits(tokens, positions, bounds)
        embedded = base.model.get_input_embeddings()(tokens)[None]
        logits = base.model(
            inputs_embeds=embedded,
            position_ids=positions[None],
            use_cache=False,
            flat=AttentionMetadata(bounds),
        ).logits[0]
    assert torch.allclose(logits, expected, atol=1e-6)


@pytest.mark.parametrize("direction", ["ours", "theirs"])
def test_peft_reads_ours_and_we_read_theirs(
    base: CausalLM, tiny: Path, tmp_path: Path, direction: str
) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tiny)
    if direction == "ours":
        adapter = shaken(base, spec_of(base))
        save_adapter(adapter, base, tmp_path / "a")
        peft = PeftModel.from_pretrained(plain, tmp_path / "a").eval()
    else:
        config = LoraConfig(
            r=4,
            target_modules=["q_proj", "up_proj"],
            alora_invocation_tokens=list(INVOCATION),
            task_type="CAUSAL_LM",
        )
        peft = get_peft_model(plain, config).eval()
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0, 0.1)
        peft.save_pretrained(tmp_path / "a")
        adapter = load_adapter(tmp_path / "a", base)
    assert adapter.config.invocation == INVOCATION
    tokens, positions, bounds = run_of([5, 6, 7, 9, 11, 7, 9, 12, 13])
    with base.forward_context.use(adapter.active.segments(tokens, bounds)), torch.no_grad():
        ours = base.all_logits(tokens, positions, bounds)
        theirs = peft(input_ids=tokens[None]).logits[0]
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_cached_generation_equals_the_recomputed_one(base: CausalLM) -> None:
    adapter = shaken(base, spec_of(base))
    prompts = [[5, 6, 7, 9], [5, 11, 12, 8], [7, 9, 5, 6, 14]]
    cached = generate_tokens(base, prompts, SamplingParams(8), adapter.active)
    for prompt, answer in zip(prompts, cached, strict=True):
        sequence = list(prompt)
        for token in answer:
            tokens, positions, bounds = run_of(sequence)
            (invoked,) = adapter.active.is_invoked(prompt)
            with (
                base.forward_context.use(
                    ActiveAdapters((ActiveAdapter("a", INVOCATION),)).segments(tokens, bounds)
                    if invoked
                    else base.forward_context.segments
                ),
                torch.no_grad(),
            ):
                assert int(base.all_logits(tokens, positions, bounds)[-1].argmax()) == token
            sequence.append(token)


@pytest.mark.slow
def test_alora_trains_saves_and_loads(tiny: Path, chats: Path, tmp_path: Path) -> None:
    run = train(
        chats,
        base=str(tiny),
        method="alora",
        rank=4,
        max_steps=6,
        learning_rate=1e-2,
        output_dir=tmp_path / "run",
    )
    losses = run.record["losses"]
    assert losses["eval_loss_after"] < losses["eval_loss_before"]
    config = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    loaded = load_adapter(tmp_path / "run", load_base(str(tiny)))
    assert config["alora_invocation_tokens"] == list(loaded.config.invocation)
    assert loaded.config.invocation


def test_names_are_presets_and_full_refuses_them() -> None:
    assert (
        get_preset("qalora", 4).quantization == "nf4"
        and get_preset("qalora", 4).is_activated
        and get_preset("qalora", 4).method == "lora"
    )
    assert get_preset("amora", 4).method == "mora"
    for name in ("qfull", "afull"):
        with pytest.raises(SettingsError, match="cannot be combined"):
            get_preset(name, 4)
