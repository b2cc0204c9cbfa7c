"""Families of transformers, each as a tiny random model: packed, cached, adapted, merged = one by one in eager attention."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from afina.adapters.attach import detach
from afina.adapters.saving import save_adapter
from afina.adapters.segments import Segments
from afina.engine.engine import Engine, EngineConfig, run_to_completion
from afina.engine.request import AdapterWeight, GenerationRequest, SamplingParams
from afina.errors import BaseError
from afina.merging.merge_into_base import merge_into_base
from afina.models.causal_lm import CausalLM
from afina.models.loading import load_base
from helpers import flat_run, generate_tokens, logits, one_by_one, put, same, save_model, state
from reference_decoder import reference_tokens

V = {"vocab_size": 320, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {
    **V,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED = {**WIDE, "num_key_value_heads": 2, "intermediate_size": 64}
OLD = {**V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}

# name: (configuration, whether it takes flat runs; the others run row by row)
FAMILIES: dict[str, tuple[Callable[[], Any], bool]] = {
    "gpt2": (lambda: T.GPT2Config(**OLD), True),
    "llama": (lambda: T.LlamaConfig(**GROUPED), True),
    "mistral": (lambda: T.MistralConfig(**GROUPED, sliding_window=5, head_dim=8), True),
    "mixtral": (lambda: T.MixtralConfig(**GROUPED, num_local_experts=4), True),
    "qwen2": (
        lambda: T.Qwen2Config(
            **GROUPED, use_sliding_window=True, sliding_window=5, max_window_layers=1
        ),
        True,
    ),
    "qwen3": (lambda: T.Qwen3Config(**GROUPED, head_dim=8), True),
    "gemma2": (
        lambda: T.Gemma2Config(
            **GROUPED,
            head_dim=8,
            sliding_window=5,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=3.0,
            query_pre_attn_scalar=8,
        ),
        True,
    ),
    "gemma3": (
        lambda: T.Gemma3TextConfig(
            **GROUPED, head_dim=8, sliding_window=5, query_pre_attn_scalar=8
        ),
        True,
    ),
    "phi": (lambda: T.PhiConfig(**WIDE, intermediate_size=64), True),
    "phi3": (lambda: T.Phi3Config(**GROUPED), True),
    "opt": (lambda: T.OPTConfig(**WIDE, ffn_dim=64, word_embed_proj_dim=32), True),
    "gpt_neox": (lambda: T.GPTNeoXConfig(**WIDE, intermediate_size=64), True),
    "olmo2": (lambda: T.Olmo2Config(**GROUPED), True),
    "granite": (lambda: T.GraniteConfig(**GROUPED, logits_scaling=4.0), True),
    "cohere": (lambda: T.CohereConfig(**GROUPED, logit_scale=0.5), True),
    "gpt_bigcode": (lambda: T.GPTBigCodeConfig(**OLD), True),
    "deepseek_v3": (
        lambda: T.DeepseekV3Config(
            **{**GROUPED, "num_key_value_heads": 4},
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            moe_intermediate_size=16,
            first_k_dense_replace=1,
        ),
        True,
    ),
    "deepseek_v3_values_narrower": (
        lambda: T.DeepseekV3Config(
            **{**GROUPED, "num_key_value_heads": 4},
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            moe_intermediate_size=16,
            first_k_dense_replace=1,
        ),
        False,
    ),
    "falcon": (lambda: T.FalconConfig(**WIDE, alibi=False), False),
    "falcon_alibi": (lambda: T.FalconConfig(**WIDE, alibi=True), False),
    "stablelm": (lambda: T.StableLmConfig(**GROUPED), False),
    "bloom": (lambda: T.BloomConfig(**V, hidden_size=32, n_layer=2, n_head=4), False),
    "codegen": (lambda: T.CodeGenConfig(**OLD, rotary_dim=4), False),
    "gpt_oss": (
        lambda: T.GptOssConfig(**GROUPED, num_local_experts=4, head_dim=8, sliding_window=5),
        False,
    ),
    "llama4_text": (
        lambda: T.Llama4TextConfig(
            **GROUPED,
            num_local_experts=2,
            head_dim=8,
            attention_chunk_size=4,
            intermediate_size_mlp=64,
            no_rope_layers=[1, 1],
        ),
        False,
    ),
    "mamba": (lambda: T.MambaConfig(**V, hidden_size=32, num_hidden_layers=2, state_size=4), False),
    "recurrent_gemma": (
        lambda: T.RecurrentGemmaConfig(
            **{**GROUPED, "num_hidden_layers": 3}, lru_width=32, attention_window_size=5
        ),
        False,
    ),
}
LENGTHS = (9, 11, 1, 17)


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> Callable[[str], Path]:
    """The folder of a family's model, made when it is first asked for."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = save_model(
                tmp_path_factory.mktemp(family), FAMILIES[family][0](), tokenizer
            )
        return made[family]

    return folder


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def of_family(family: str, folders: Callable[[str], Path]) -> CausalLM:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_base(str(folders(family)))


def reference(folder: Path) -> Callable[[Tensor], Tensor]:
    """transformers' own eager attention, one sequence at a time: tokens (n) to logits (n, V)."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()

    @torch.no_grad()
    def run(tokens: Tensor) -> Tensor:
        return model(input_ids=tokens[None], use_cache=False).logits[0]

    return run


def test_packed_is_one_by_one(
    of_family: CausalLM, family: str, folders: Callable[[str], Path]
) -> None:
    run, eager = flat_run(LENGTHS), reference(folders(family))
    assert of_family.supports_packing is FAMILIES[family][1]
    expected = torch.cat([eager(tokens) for tokens, _, _ in one_by_one(run)])
    assert expected.std() > 0.05
    assert (logits(of_family, run) - expected).abs().max() < 1e-4


def test_cached_generation_is_recomputed(
    of_family: CausalLM, family: str, folders: Callable[[str], Path]
) -> None:
    eager = reference(folders(family))
    prompts = [flat_run((n,), seed=n)[0].tolist() for n in (2, 11, 6)]
    expected = []
    for prompt in prompts:
        tokens = list(prompt)
        while len(tokens) < len(prompt) + 10 and (len(tokens) == len(prompt) or tokens[-1] != 2):
            tokens.append(int(eager(torch.tensor(tokens))[-1].argmax()))
        expected.append(tokens[len(prompt) :])
    assert generate_tokens(of_family, prompts, SamplingParams(max_new_tokens=10)) == expected


@pytest.mark.slow
def test_served_is_alone(of_family: CausalLM, family: str, tmp_path: Path) -> None:
    """The serving engine, with and without an adapter, prompts in chunks: what each gives alone."""
    engine = Engine(of_family, EngineConfig(pool_bytes=1 << 22, max_num_batched_tokens=7))
    adapter = put(of_family)
    save_adapter(adapter, of_family, tmp_path / "a")
    prompts = [flat_run((n,), seed=n)[0].tolist() for n in (2, 19, 11, 20)]
    sampling = SamplingParams(max_new_tokens=8)
    expected = [
        reference_tokens(of_family, [p], sampling, r)[0]
        for p, r in zip(prompts, [None, adapter.active] * 2, strict=True)
    ]
    detach(of_family.model, adapter)
    part = AdapterWeight(engine.registry.add("a", tmp_path / "a").hash)
    requests = [
        GenerationRequest(tuple(p), sampling, parts)
        for p, parts in zip(prompts, [(), (part,)] * 2, strict=True)
    ]
    assert [tokens for _, tokens, _ in run_to_completion(engine, requests)] == expected
    engine.stop()


def test_lora_trains_and_merges(of_family: CausalLM) -> None:
    """A LoRA on all linear layers (GPT-2's Conv1D among them): a step lowers the loss; checkpointing changes nothing."""
    base, run = of_family, flat_run(LENGTHS)
    adapter = put(base)
    labels = torch.cat([torch.cat([part[0][1:], torch.tensor([-100])]) for part in one_by_one(run)])
    on = Segments.on_all_tokens("a")

    def loss(checkpointing: bool = False) -> Tensor:
        with base.gradient_checkpointing(checkpointing), base.forward_context.use(on):
            return base.loss(*run, labels)

    before = loss()
    before.backward()
    gradients = [p.grad for p in adapter.parameters()]
    assert sum(g is not None and bool(g.abs().max() > 0) for g in gradients) >= 0.7 * len(gradients)
    if base.model.supports_gradient_checkpointing and base.model.config.model_type != "mamba":
        again = torch.autograd.grad(
            loss(True), [p for p in adapter.parameters() if p.grad is not None]
        )
        assert all(
            torch.equal(a, b)
            for a, b in zip(again, [g for g in gradients if g is not None], strict=True)
        )
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.grad is not None:
                parameter -= 1e-4 * parameter.grad / parameter.grad.norm()
    assert loss() < before
    with torch.no_grad():
        expected = logits(base, run, on)
        assert (expected - logits(base, run)).abs().max() > 1e-3
        if (
            base.model.config.model_type != "mamba"
        ):  # its slow path multiplies by dt_proj's weight directly
            merge_into_base(base, adapter)
            assert (logits(base, run) - expected).abs().max() < 1e-4


def test_full_trains_and_merges(of_family: CausalLM) -> None:
    """All that has numbers: experts, learned positions, and parameters beside other layers (sinks, Mamba's A)."""
    base, run = of_family, flat_run(LENGTHS)
    total = sum(p.numel() for p in base.model.parameters())
    before = state(base.model)
    adapter = put(base, target_modules="all", method="full")
    assert adapter.num_parameters() == total
    on = Segments.on_all_tokens("a")
    with base.forward_context.use(on):
        base.loss(*run, run[0].roll(-1)).backward()
    assert all(p.grad is not None for p in adapter.parameters())
    expected = logits(base, run, on)
    detach(base.model, adapter)
    assert same(state(base.model), before)
    attached_again = put(base, target_modules="all", method="full")
    assert torch.equal(logits(base, run, on), expected)
    merge_into_base(base, attached_again)
    assert (logits(base, run) - expected).abs().max() < 1e-4


def test_an_encoder_decoder_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = T.T5Config(
        vocab_size=320,
        d_model=16,
        d_kv=4,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    T.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(BaseError, match="t5 is an encoder-decoder"):
        load_base(str(tmp_path))


def test_an_encoder_that_reads_ahead_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    config = T.BertConfig(
        vocab_size=320,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
    )
    save_model(tmp_path, config, tokenizer)
    with pytest.raises(BaseError, match="is not causal"):
        load_base(str(tmp_path))
