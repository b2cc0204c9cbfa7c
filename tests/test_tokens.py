"""Tokens of an adapter's own: learned rows of the embedding and of the output layer, and nothing else of them."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import afina
from afina.adapters.attach import attach, detach
from afina.adapters.loading import load_adapter
from afina.adapters.saving import save_adapter
from afina.adapters.segments import Segment, Segments
from afina.adapters.target_selection import resolve_target_modules
from afina.errors import AdapterError, SettingsError
from afina.io.adapter_config import AdapterConfig
from afina.merging.merge_into_base import merge_into_base
from afina.models.causal_lm import CausalLM
from afina.models.loading import load_base
from helpers import flat_run, logits, put, same, state, write_rows

NAMES = ["<tool>", "<end-tool>"]


@pytest.fixture(params=["tiny", "tied"])
def grown(request: pytest.FixtureRequest) -> tuple[CausalLM, dict[str, int]]:
    """A base, its output layer tied or not, that has two tokens more."""
    base = load_base(str(request.getfixturevalue(request.param)))
    return base, base.add_tokens(NAMES)


def run_with(tokens: dict[str, int]) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Three sequences in which the new tokens occur."""
    run = flat_run((9, 3, 14))
    run[0][[2, 9, 15]] = torch.tensor([*tokens.values(), tokens[NAMES[0]]])
    return run


def test_a_new_token_is_one_token_and_the_others_stay(tiny: Path) -> None:
    base = load_base(str(tiny))
    before, run = base.model.get_input_embeddings().weight.clone(), flat_run()
    logits_before = logits(base, run)
    tokens = base.add_tokens(NAMES)
    assert list(tokens.values()) == [len(before), len(before) + 1]
    assert base.tokenizer("a <tool> b")["input_ids"].count(tokens["<tool>"]) == 1
    assert torch.equal(base.model.get_input_embeddings().weight[: len(before)], before)
    assert torch.equal(logits(base, run)[:, : len(before)], logits_before)
    assert base.add_tokens(NAMES) == tokens  # again: nothing happens
    assert len(base.model.get_input_embeddings().weight) == len(before) + 2
    assert not any(p.requires_grad for p in base.model.parameters())


def test_it_starts_as_the_base_and_only_its_rows_learn(
    grown: tuple[CausalLM, dict[str, int]],
) -> None:
    base, tokens = grown
    before, run = logits(base, run_with(tokens)), run_with(tokens)
    targets = resolve_target_modules(base.model, "all-linear", None, False)
    adapter = attach(
        base.model,
        base.forward_context,
        "a",
        AdapterConfig("lora", targets, rank=2, trainable_tokens=tokens),
    )
    torch.testing.assert_close(
        logits(base, run, Segments.on_all_tokens("a")), before, rtol=0, atol=1e-6
    )
    tied = base.model.config.tie_word_embeddings
    rows = [p for name, p in adapter.named_parameters() if name.endswith(".weight")]
    assert [tuple(p.shape) for p in rows] == [(2, 48)] * (1 if tied else 2)
    labels = run[0].roll(-1)
    with base.forward_context.use(Segments.on_all_tokens("a")):
        base.loss(*run, labels).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in rows)
    assert all(
        p.grad is None
        for p in base.model.parameters()
        if not any(p is q for q in adapter.parameters())
    )


def test_its_rows_act_where_the_route_says(grown: tuple[CausalLM, dict[str, int]]) -> None:
    base, tokens = grown
    run = run_with(tokens)
    put(base, trainable_tokens=tokens)
    on, off = logits(base, run, Segments.on_all_tokens("a")), logits(base, run)
    mixed = logits(base, run, Segments((), (Segment(0, 9, "a"), Segment(12, 26, "a"))))
    torch.testing.assert_close(mixed[:9], on[:9], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[12:], on[12:], rtol=1e-5, atol=1e-5)
    assert torch.equal(mixed[9:12], off[9:12])


@pytest.mark.slow
def test_saved_is_loaded_and_merged_is_adapted(
    grown: tuple[CausalLM, dict[str, int]], tmp_path: Path
) -> None:
    base, tokens = grown
    run = run_with(tokens)
    adapter = put(base, trainable_tokens=tokens, rank=4)
    on = logits(base, run, Segments.on_all_tokens("a"))
    save_adapter(adapter, base, tmp_path / "a")
    fresh = load_base(str(base.folder))
    again = load_adapter(tmp_path / "a", fresh, "a")
    assert dict(again.config.trainable_tokens) == tokens
    assert torch.equal(logits(fresh, run, Segments.on_all_tokens("a")), on)
    merge_into_base(fresh, again)
    torch.testing.assert_close(logits(fresh, run), on, rtol=1e-4, atol=1e-4)
    fresh.model.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert plain.config.tie_word_embeddings == base.model.config.tie_word_embeddings
    tokens_of, _, (_, end, *_) = run
    with torch.no_grad():
        torch.testing.assert_close(
            plain(input_ids=tokens_of[None, :end]).logits[0], on[:end], rtol=1e-4, atol=1e-4
        )


def test_off_is_the_base_bit_for_bit(grown: tuple[CausalLM, dict[str, int]]) -> None:
    base, tokens = grown
    before, weights = logits(base, run_with(tokens)), state(base.model)
    adapter = put(base, trainable_tokens=tokens)
    assert torch.equal(logits(base, run_with(tokens)), before)
    detach(base.model, adapter)
    assert same(state(base.model), weights)


def assert_apart_by_rounding(ours: torch.Tensor, peft_model: Any, tokens: torch.Tensor) -> None:
    """Our logits and PEFT's are PEFT's in float64, but for rounding, whatever the machine's products.

    Ours may be four times as far from them as PEFT's float32 ones, and one rounding of the largest
    logit more: orders of sums differ between kernels, numbers of sums do not.
    """
    with torch.no_grad():
        theirs = peft_model(input_ids=tokens[None]).logits[0]
        exact = copy.deepcopy(peft_model).double()(input_ids=tokens[None]).logits[0]
    step = torch.finfo(torch.float32).eps * float(exact.abs().max())
    allowed = 4 * float((theirs - exact).abs().max()) + step
    assert float((ours - exact).abs().max()) <= allowed
    assert allowed < 100 * step  # float64 is near enough for a mistake to be more than rounding


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tiny", "tied"])
def test_peft_reads_ours_and_we_read_theirs(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    folder = request.getfixturevalue(kind)
    base = load_base(str(folder))
    tokens = base.add_tokens(NAMES)
    run = run_with(tokens)
    save_adapter(put(base, trainable_tokens=tokens, rank=4), base, tmp_path / "ours")
    on = logits(base, run, Segments.on_all_tokens("a"))
    end = run[2][1]

    def resized() -> Any:
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        model.resize_token_embeddings(len(base.tokenizer), mean_resizing=False)
        return model

    theirs = peft.PeftModel.from_pretrained(resized(), tmp_path / "ours")
    assert_apart_by_rounding(on[:end], theirs, run[0][:end])

    rows = list(tokens.values())
    indices: Any = rows if kind == "tied" else {"embed_tokens": rows, "lm_head": rows}
    config = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "up_proj"],
        init_lora_weights=False,
        trainable_token_indices=indices,
        task_type="CAUSAL_LM",
    )
    made = peft.get_peft_model(resized(), config)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.normal_(0, 0.2)
    made.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    model = resized()
    model.save_pretrained(tmp_path / "base")
    reader = load_base(str(tmp_path / "base"))
    adapter = load_adapter(tmp_path / "theirs", reader, "b")
    assert dict(adapter.config.trainable_tokens) == tokens
    read = logits(reader, run, Segments.on_all_tokens("b"))[:end]
    assert_apart_by_rounding(read, made, run[0][:end])


@pytest.mark.slow
def test_a_run_teaches_a_token_that_the_base_never_saw(
    tiny: Path, general: Path, tmp_path: Path
) -> None:
    rows = [
        {"prompt": f"use {word}", "completion": f"<tool>{word}<end-tool>"}
        for word in ("sol", "mar", "pan", "luna") * 8
    ]
    data = write_rows(tmp_path / "rows.jsonl", *rows)
    run = afina.train(
        data,
        base=str(tiny),
        output_dir=tmp_path / "run",
        new_tokens=NAMES,
        max_steps=30,
        learning_rate=1e-2,
        retention_text=general,
        max_tokens_per_batch=256,
    )
    assert run.record["losses"]["eval_loss_after"] < run.record["losses"]["eval_loss_before"] - 1
    names = load_file(run.folder / "adapter/adapter_model.safetensors")
    assert sum(name.endswith("trainable_tokens_delta") for name in names) == 2
    answer = afina.generate(adapter=run.folder, prompts=["use sol"], max_new_tokens=8)
    assert "<tool>" in str(answer)


def test_what_cannot_be_is_refused(
    tiny: Path, chats: Path, grown: tuple[CausalLM, dict[str, int]], tmp_path: Path
) -> None:
    base, tokens = grown
    with pytest.raises(AdapterError, match="is a target, and has rows"):
        put(base, target_modules=["embed_tokens", "q_proj"], trainable_tokens=tokens)
    with pytest.raises(SettingsError, match="new_tokens"):
        afina.train(chats, base=str(tiny), output_dir=tmp_path / "run", new_tokens=3)
    save_adapter(put(base, "b", trainable_tokens=tokens), base, tmp_path / "b")
    other = load_base(str(base.folder))
    other.add_tokens(["<another>"])
    with pytest.raises(AdapterError, match="tokens"):
        load_adapter(tmp_path / "b", other)
