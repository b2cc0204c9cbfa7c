"""A base that we did not make: stories260K. Its reference tokens, and a LoRA and a full fine-tune on Shakespeare."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import afina
from afina.adapters.loading import load_adapter
from afina.adapters.segments import Segments
from afina.engine.request import SamplingParams
from afina.models.causal_lm import CausalLM
from afina.models.loading import load_base
from helpers import SHARED, flat_run, generate_tokens, logits

pytestmark = pytest.mark.shared
FOLDER = SHARED / "models" / "stories260k"


@pytest.fixture
def stories() -> CausalLM:
    return load_base(str(FOLDER), dtype="float32", device="cpu")


@pytest.mark.slow
def test_greedy_tokens_are_the_reference_ones(stories: CausalLM) -> None:
    """199 tokens after the first one, by text: the file says what llama2.c writes."""
    tokens = generate_tokens(stories, [[1]], SamplingParams(max_new_tokens=199))[0]
    expected = (SHARED / "data" / "ref-vectors" / "stories260K_greedy_200.txt").read_text()
    assert len(tokens) == 199
    text = stories.decode(tokens).strip()
    assert expected.strip().startswith(text)
    assert len(expected.strip()) - len(text) < 6  # the file goes one token further


@pytest.mark.slow
def test_greedy_tokens_do_not_depend_on_the_batch(stories: CausalLM) -> None:
    prompts = [[1], [1, 403, 407], [1, 403]]
    alone = [
        generate_tokens(stories, [prompt], SamplingParams(max_new_tokens=40))[0]
        for prompt in prompts
    ]
    assert generate_tokens(stories, prompts, SamplingParams(max_new_tokens=40)) == alone


@pytest.mark.slow
def test_lora_and_full_learn_shakespeare(tmp_path: Path, stories: CausalLM) -> None:
    """Both lower the held-out loss, full more than LoRA r8; with the adapter off the logits are the base's bit for bit."""
    text = tmp_path / "shakespeare.txt"
    text.write_text((SHARED / "data" / "tinyshakespeare" / "input.txt").read_text()[:60_000])
    shared: dict[str, Any] = dict(
        base=str(FOLDER),
        dtype="float32",
        max_steps=60,
        max_length=256,
        max_tokens_per_batch=2048,
        eval_steps=20,
    )
    runs = {
        "lora": afina.train(
            text, method="lora", rank=8, learning_rate=5e-3, output_dir=tmp_path / "lora", **shared
        ),
        "full": afina.train(
            text, method="full", learning_rate=1e-3, output_dir=tmp_path / "full", **shared
        ),
    }
    losses = {name: run.record["losses"] for name, run in runs.items()}
    before = losses["lora"]["eval_loss_before"]
    assert losses["full"]["eval_loss_before"] == pytest.approx(before, rel=1e-6)
    assert losses["full"]["eval_loss_after"] < losses["lora"]["eval_loss_after"] < before - 0.5
    run, expected = (
        flat_run((60,), low=3, high=500),
        logits(stories, flat_run((60,), low=3, high=500)),
    )
    for name, trained in runs.items():
        base = load_base(str(FOLDER), dtype="float32", device="cpu")
        adapter = load_adapter(trained.folder, base)
        assert torch.equal(logits(base, run), expected), name
        assert not torch.equal(logits(base, run, Segments.on_all_tokens(adapter.name)), expected), (
            name
        )
        assert (
            json.loads((trained.folder / "run.json").read_text())["trainable_parameters"]
            == adapter.num_parameters()
        )
