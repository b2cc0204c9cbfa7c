"""What the serving benchmarks share: the shapes, random bases and adapters on disk, an engine on them."""

import json
import random
from pathlib import Path
from typing import Any

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPES: dict[str, dict[str, int]] = {
    "134M": dict(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
    ),
    "215M": dict(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2688,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=8192,
    ),
}


def make_model(shape: str) -> Any:
    """A random Llama of the shape, bf16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tied = shape == "134M"
    config = LlamaConfig(
        **SHAPES[shape], tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False).eval()


def make_folder(
    folder: Path,
    shape: str,
    adapters: int,
    rank: int = 8,
    ranks: tuple[int, ...] = (),
    **story: Any,
) -> None:
    """The base as a Hugging Face folder, and adapters a0, a1, ... as PEFT's files, of random numbers; once."""
    import torch
    from safetensors.torch import save_file

    if not (folder / "base").is_dir():
        make_model(shape).save_pretrained(folder / "base")
    size = SHAPES[shape]
    d, ffn = size["hidden_size"], size["intermediate_size"]
    kv = d // size["num_attention_heads"] * size["num_key_value_heads"]
    widths = {
        "q_proj": (d, d),
        "k_proj": (d, kv),
        "v_proj": (d, kv),
        "o_proj": (d, d),
        "gate_proj": (d, ffn),
        "up_proj": (d, ffn),
        "down_proj": (ffn, d),
    }
    for number in range(adapters):
        place = folder / f"a{number}"
        if place.is_dir():
            continue
        place.mkdir(parents=True)
        r = ranks[number % len(ranks)] if ranks else rank
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for layer in range(size["num_hidden_layers"]):
            for name in PROJECTIONS:
                path = f"base_model.model.model.layers.{layer}.{'mlp' if 'gate' in name or 'up' in name or 'down' in name else 'self_attn'}.{name}"
                inputs, outputs = widths[name]
                tensors[f"{path}.lora_A.weight"] = (
                    torch.randn(r, inputs, generator=generator).mul_(0.02).bfloat16()
                )
                tensors[f"{path}.lora_B.weight"] = (
                    torch.randn(outputs, r, generator=generator).mul_(0.02).bfloat16()
                )
        save_file(tensors, place / "adapter_model.safetensors", {"format": "pt"})
        config = (
            dict(
                peft_type="LORA",
                task_type="CAUSAL_LM",
                r=r,
                lora_alpha=16,
                lora_dropout=0.0,
                target_modules=PROJECTIONS,
                base_model_name_or_path=str(folder / "base"),
                bias="none",
                inference_mode=True,
            )
            | story
        )
        (place / "adapter_config.json").write_text(json.dumps(config))


class Words:
    """Stands for a tokenizer: the benchmarks give tokens and look at tokens."""

    eos_token_id = 2

    def decode(self, tokens: Any, **_: Any) -> str:
        return "x" * len(list(tokens))

    def convert_ids_to_tokens(self, token: int) -> str:
        return "x"


def make_engine(shape: str, storage: str = "plain", memory: int = 1 << 30, **settings: Any) -> Any:
    """An engine on the random base of the shape."""
    from afina.engine.engine import Engine, EngineConfig
    from afina.models.causal_lm import CausalLM
    from afina.models.fast_llama import install_fast_modules
    from afina.models.nf4 import quantize_model
    from afina.models.packed_attention import ATTENTION_NAME

    model = make_model(shape)
    model.set_attn_implementation(ATTENTION_NAME)
    if storage == "nf4":
        quantize_model(model)
    install_fast_modules(model)
    base = CausalLM(model, shape, tokenizer=Words(), quantization=storage)  # type: ignore[arg-type]
    return Engine(base, EngineConfig(pool_bytes=memory, **settings))


def prompts(count: int, length: int, seed: int = 1) -> list[tuple[int, ...]]:
    """Random prompts."""
    rng = random.Random(seed)
    return [tuple(rng.randrange(5, 30000) for _ in range(length)) for _ in range(count)]


def ask(engine: Any, texts: list[tuple[int, ...]], names: list[str | None], new: int) -> list[Any]:
    """Answer the prompts, each under its adapter (or none), `new` tokens each."""
    from afina.engine.engine import run_to_completion
    from afina.engine.request import AdapterWeight, GenerationRequest, SamplingParams

    sampling = SamplingParams(max_new_tokens=new, ignore_eos=True)
    return run_to_completion(
        engine,
        [
            GenerationRequest(
                text, sampling, (AdapterWeight(engine.registry.get(name).hash),) if name else ()
            )
            for text, name in zip(texts, names, strict=True)
        ],
    )
