"""A decoding step of eight sequences: with eight adapters, with one, with none, and with none attached.

`python benchmarks/decode_step.py` takes a minute or two. A random Llama of 134M (30 x 576, 9 heads, 3 of keys), adapters of
rank 8 on all linear layers, 100 tokens of context. The sides run in turn, in one process; ratios are medians of the rounds'.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from common import publish
from transformers import LlamaConfig, LlamaForCausalLM

from afina.adapters.attach import attach
from afina.adapters.segments import NO_ADAPTERS, Segment, Segments
from afina.adapters.target_selection import resolve_target_modules
from afina.engine.block_pool import BLOCK_SIZE, BlockPool
from afina.engine.kv_cache import kv_layer_shapes
from afina.io.adapter_config import AdapterConfig
from afina.models.causal_lm import CausalLM
from afina.models.fast_llama import install_fast_modules
from afina.models.nf4 import quantize_model
from afina.models.packed_attention import AttentionMetadata
from afina.models.paged_kv import PagedKV

ROWS, PAST = 8, 100
SHAPE = dict(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
    tie_word_embeddings=True,
)
TABLES = {
    "base": NO_ADAPTERS,
    "unused": NO_ADAPTERS,
    "one": Segments.on_all_tokens("a0"),
    "mixed": Segments(spans=tuple(Segment(i, i + 1, f"a{i}") for i in range(ROWS))),
}


def make_base(storage: str, dtype: torch.dtype, adapters: int) -> CausalLM:
    """The model with adapters that do something; its random weights are always the same."""
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(LlamaConfig(**SHAPE), attn_implementation="afina").to(
        dtype
    )
    model.requires_grad_(False).eval()
    if storage == "nf4":
        quantize_model(model)
    install_fast_modules(model)
    base = CausalLM(model, "random")
    for i in range(adapters):
        adapter = attach(
            model,
            base.forward_context,
            f"a{i}",
            AdapterConfig("lora", resolve_target_modules(model, "all-linear", None, False), rank=8),
        )
        adapter.train(False)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.normal_(0, 0.01)
    return base


def step_of(base: CausalLM, segments: Segments) -> Callable[[], None]:
    layers = kv_layer_shapes(base)
    per_row = PAST // BLOCK_SIZE + 1
    pool = BlockPool(ROWS * per_row, layers.values(), base.dtype, base.device)
    tables = torch.arange(ROWS * per_row, dtype=torch.int32).view(ROWS, per_row)
    slots = tables[:, -1].long() * BLOCK_SIZE + PAST % BLOCK_SIZE
    paged = PagedKV(dict(zip(layers, pool.views(), strict=True)), slots, [PAST] * ROWS, tables)
    metadata = AttentionMetadata(tuple(range(ROWS + 1)), paged)
    tokens, positions = torch.arange(ROWS) + 5, torch.full((ROWS,), PAST)

    @torch.no_grad()
    def step() -> None:
        with base.forward_context.use(segments):
            base.next_token_logits(tokens, positions, metadata)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    rounds = parser.parse_args().rounds
    figures: dict[str, float] = {}
    runs: dict[str, dict[str, list[float]]] = {}
    for storage, dtype in (
        ("bf16", torch.bfloat16),
        ("float32", torch.float32),
        ("nf4", torch.bfloat16),
    ):
        bases = {side: make_base(storage, dtype, 0 if side == "base" else ROWS) for side in TABLES}
        steps = {side: step_of(bases[side], table) for side, table in TABLES.items()}
        seconds: dict[str, list[float]] = {side: [] for side in steps}
        for turn in range(rounds + 2):
            for side, step in steps.items():
                start = time.perf_counter()
                step()
                if turn > 1:
                    seconds[side].append(time.perf_counter() - start)
        runs[storage] = seconds
        for side in ("unused", "one", "mixed"):
            ratios = [a / b for a, b in zip(seconds[side], seconds["base"], strict=True)]
            figures[f"{side}_over_base_{storage}"] = statistics.median(ratios)
        figures[f"tokens_per_second_{storage}"] = ROWS / statistics.median(seconds["base"])
        print(
            storage,
            {side: f"{1e3 * statistics.median(times):.1f} ms" for side, times in seconds.items()},
            flush=True,
        )
    targets = {f"mixed_over_base_{s}": ("<=", 1.15) for s in runs} | {
        f"unused_over_base_{s}": ("<=", 1.02) for s in runs
    }
    publish("decode_step", figures, targets, runs, {"threads": float(torch.get_num_threads())})


if __name__ == "__main__":
    main()
