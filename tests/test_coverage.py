"""The share of a base's parameters that targets reach, and which parameters they do not."""

from typing import Any

import pytest
import torch
import transformers as T
from torch import nn

from afina.adapters.attach import attach
from afina.adapters.coverage import count_base_parameters, target_coverage
from afina.adapters.segments import ForwardContext
from afina.adapters.target_selection import resolve_target_modules
from afina.errors import SettingsError
from afina.io.adapter_config import AdapterConfig
from afina.models.nf4 import quantizable_modules, quantize_model
from afina.models.parameters import describe_unquantized

SIZES = dict(vocab_size=96, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
MIXTURE = dict(num_key_value_heads=1, intermediate_size=24, moe_intermediate_size=8, head_dim=8)
CONFIGS = {
    "mixture": T.Qwen3MoeConfig(**SIZES, **MIXTURE, num_experts=4, num_experts_per_tok=2),
    "tied": T.LlamaConfig(**SIZES, intermediate_size=24, tie_word_embeddings=True),
    "transposed": T.GPT2Config(vocab_size=96, n_embd=16, n_layer=2, n_head=2),
}


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    return T.AutoModelForCausalLM.from_config(CONFIGS[name]).requires_grad_(False)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_reached_share_is_a_count_over_the_parameters(name: str, method: str) -> None:
    model = model_of(name)
    any_kind = method == "full"
    targets = resolve_target_modules(model, "all" if any_kind else "all-linear", None, any_kind)
    config = AdapterConfig(method, targets)
    found = target_coverage(model, config)
    total = sum(p.numel() for p in model.parameters())
    weights = {model.get_submodule(path).weight for path in targets} if not any_kind else set()
    reached = total if any_kind else sum(weight.numel() for weight in weights)
    assert (found.reached, found.total) == (reached, total)
    assert sum(found.to_dict()["unreached"].values()) == total - reached
    assert count_base_parameters(model) == total


def test_adapters_and_quantization_do_not_change_the_count() -> None:
    model = model_of("mixture")
    config = AdapterConfig("lora", resolve_target_modules(model, "all-linear", None, False))
    before = target_coverage(model, config)
    attach(model, ForwardContext(), "a", config)
    assert target_coverage(model, config) == before
    codes = model_of("mixture")
    names = quantizable_modules(codes)
    assert "gate_up_proj" in describe_unquantized(codes, names)
    quantize_model(codes)
    found = target_coverage(codes, config)
    assert (found.reached, found.total) == (before.reached, before.total)


def test_fused_experts_are_named_with_their_axes() -> None:
    model = model_of("mixture")
    targets = resolve_target_modules(model, "all-linear", None, False)
    text = target_coverage(model, AdapterConfig("lora", targets)).describe()
    assert "model.layers.*.mlp.experts.gate_up_proj" in text and "(3-D parameter)" in text
    for target in ("gate_up_proj", "experts", "model.layers.1.mlp.experts"):
        with pytest.raises(SettingsError, match="one weight matrix") as caught:
            resolve_target_modules(model, target, None, False)
        assert "(4, 16, 16)" in str(caught.value.why) or "(4, 16, 8)" in str(caught.value.why)
        assert caught.value.hint is not None and "full" in caught.value.hint


def test_a_parameter_next_to_modules_counts_once() -> None:
    model = nn.Module()
    model.scale = nn.Parameter(torch.ones(3))
    model.layer = nn.Linear(4, 3, bias=False)
    config = AdapterConfig("full", ("scale",))
    attach(model.requires_grad_(False), ForwardContext(), "a", config)
    found = target_coverage(model, config)
    assert (found.reached, found.total) == (3, 15)
