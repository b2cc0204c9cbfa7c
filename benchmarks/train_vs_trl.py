"""How fast and how lean is training, beside what a user would type instead? `make bench-train`

Real rows: 160 Alpaca rows, a random Llama of 134M (30 x 576), bf16, LoRA r8 on all linear layers, 8 rows a step, at
most 512 tokens; TRL's SFTTrainer + PEFT with its defaults. Dense step: a random Llama of 215M (12 x 1024), 2 x 256
tokens, bf16, LoRA r8; PEFT + AdamW. Sides run in turn, each in a process of its own.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from common import PEERS, SHARED, interleave, median, peak_mb, publish, roofline

ROWS, MAX_LENGTH = 160, 512
CONFIG = dict(
    vocab_size=50257,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
)
DENSE = dict(
    vocab_size=32000,
    hidden_size=1024,
    intermediate_size=2688,
    num_hidden_layers=12,
    num_attention_heads=16,
    num_key_value_heads=16,
    max_position_embeddings=2048,
)


def make_base(folder: Path) -> None:
    """The 134M base with GPT-2's tokenizer, and the rows, as both sides read them."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = ByteLevelBPETokenizer(
        str(SHARED / "data/tok-gpt2/encoder.json"), str(SHARED / "data/tok-gpt2/vocab.bpe")
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    wrapped.save_pretrained(folder / "base")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**CONFIG, bos_token_id=None, eos_token_id=50256)).to(
        torch.bfloat16
    ).save_pretrained(folder / "base")
    rows = json.loads((SHARED / "data/llamafactory-demo/alpaca_en_demo.json").read_text())[:ROWS]
    pairs = [
        {
            "prompt": (r["instruction"] + "\n" + r.get("input", "")).strip() + "\n",
            "completion": r["output"],
        }
        for r in rows
    ]
    kept = []
    for pair in (
        pairs
    ):  # both sides see the same tokens: the longest rows are cut here, as TRL would cut them
        prompt = wrapped(pair["prompt"])["input_ids"]
        whole = wrapped(pair["prompt"] + pair["completion"])["input_ids"]
        if len(whole) + 1 > MAX_LENGTH:
            pair["completion"] = wrapped.decode(whole[len(prompt) : MAX_LENGTH - 2])
        kept.append(pair)
    (folder / "rows.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in kept))
    (folder / "held.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in kept[:2]))


def ours_rows(folder: Path) -> None:
    """Our side of the real rows: `afina.train`'s own set-up and loop; 8 rows a step on average, in two passes."""
    import torch

    torch.set_num_threads(2)
    from afina.adapters.active import BASE_ONLY
    from afina.data.packing import pack_examples
    from afina.objectives.language_modeling import batch_loss
    from afina.settings import TrainSettings
    from afina.training.setup.set_up import set_up_run
    from afina.training.trainer import StepMetrics, Trainer

    with tempfile.TemporaryDirectory() as run:
        setup = set_up_run(
            TrainSettings(
                data=folder / "rows.jsonl",
                eval_size=folder / "held.jsonl",
                base=str(folder / "base"),
                chat_template="plain",
                output_dir=Path(run),
                rank=8,
                alpha=16,
                num_train_epochs=1,
                learning_rate=1e-4,
                max_length=MAX_LENGTH,
                eval_steps=10**6,
                max_tokens_per_batch=705,
                gradient_accumulation_steps=2,
                warmup_ratio=0.0,
            )
        )
        first = pack_examples(setup.prepared.task.train[:8])
        with torch.no_grad():
            start_loss = (
                batch_loss(setup.prepared.base, first, BASE_ONLY).item() / first.num_targets
            )
        ticks: list[StepMetrics] = []
        Trainer(setup, Path(run), {}, ticks.append, lambda _: None).train()
    tokens, seconds = sum(t.tokens for t in ticks), sum(t.seconds for t in ticks)
    report(
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        peak_mb=peak_mb(),
        loss0=start_loss,
        steps=len(ticks),
    )


def trl_rows(folder: Path) -> None:
    """The peer's side: SFTTrainer with its defaults (activation checkpointing on)."""
    import os

    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(2)
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    arguments = SFTConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=8,
        max_length=MAX_LENGTH,
        num_train_epochs=1,
        learning_rate=1e-4,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=True,
        logging_steps=1000,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    with torch.no_grad():
        start_loss = trainer.compute_loss(trainer.model, dict(batch)).item()
    tokens = sum(len(row["input_ids"]) for row in trainer.train_dataset)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    report(
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        peak_mb=peak_mb(),
        loss0=start_loss,
        steps=trainer.state.global_step,
    )


def ours_dense(_: Path) -> None:
    """Our side of the dense step."""
    import torch

    torch.set_num_threads(2)
    from transformers import LlamaConfig, LlamaForCausalLM

    from afina.adapters.attach import attach
    from afina.adapters.target_selection import resolve_target_modules
    from afina.data.packing import pack_examples
    from afina.data.renderer import Example
    from afina.io.adapter_config import AdapterConfig
    from afina.models.causal_lm import CausalLM
    from afina.models.fast_llama import install_fast_modules
    from afina.objectives.language_modeling import batch_loss
    from afina.training.setup.optimizer import AdapterOptimizer

    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(LlamaConfig(**DENSE), attn_implementation="afina").to(
        torch.bfloat16
    )
    model.requires_grad_(False).eval()
    install_fast_modules(model)
    base = CausalLM(model, "random")
    adapter = attach(
        model,
        base.forward_context,
        "a",
        AdapterConfig(
            "lora", resolve_target_modules(model, "all-linear", None, False), rank=8, alpha=16
        ),
    )
    optimizer = AdapterOptimizer(adapter, 1e-4, {}, 0.01)
    rows = torch.randint(0, 32000, (2, 256)).tolist()
    batch = pack_examples([Example("", row, [False] + [True] * 255, 0, None) for row in rows])

    def step() -> float:
        loss = batch_loss(base, batch, adapter.active) / batch.num_targets
        loss.backward()
        optimizer.step(1.0, 1.0)
        return loss.item()

    time_steps(step, 512)


def peft_dense(_: Path) -> None:
    """The peer's side of the dense step."""
    import torch

    torch.set_num_threads(2)
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(
        LlamaForCausalLM(LlamaConfig(**DENSE)).to(torch.bfloat16),
        LoraConfig(r=8, lora_alpha=16, target_modules=names),
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    x = torch.randint(0, 32000, (2, 256))

    def step() -> float:
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    time_steps(step, 512)


def time_steps(step, tokens: int, repeats: int = 12) -> None:
    step()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    middle = statistics.median(seconds)
    report(tokens=tokens, seconds=middle, tokens_per_second=tokens / middle, peak_mb=peak_mb())


def report(**figures: float) -> None:
    print(json.dumps(figures))


SIDES = {
    "ours-rows": ours_rows,
    "trl-rows": trl_rows,
    "ours-dense": ours_dense,
    "peft-dense": peft_dense,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--repeats", type=int, default=3)

    arguments = parser.parse_args()
    if arguments.side:
        SIDES[arguments.side](arguments.folder)
        return
    if not PEERS.exists():
        sys.exit("the peers' environment is missing: make peers")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        machine = roofline()
        side = lambda python, which: (python, [__file__, "--side", which, "--folder", name])  # noqa: E731
        dense = interleave(
            {"ours": side(sys.executable, "ours-dense"), "peft": side(PEERS, "peft-dense")},
            max(3, arguments.repeats),
        )
        make_base(folder)
        rows = interleave(
            {"ours": side(sys.executable, "ours-rows"), "trl": side(PEERS, "trl-rows")},
            arguments.repeats,
        )
    flops = (
        4 * 182e6
    )  # products of one token, forward and backward to the activations, 215M less its embedding
    figures = {
        "real_tokens_ratio": median(rows["ours"], "tokens_per_second")
        / median(rows["trl"], "tokens_per_second"),
        "memory_ratio": median(rows["ours"], "peak_mb") / median(rows["trl"], "peak_mb"),
        "loss0_difference": abs(rows["ours"][0]["loss0"] - rows["trl"][0]["loss0"]),
        "ours_tokens_per_second": median(rows["ours"], "tokens_per_second"),
        "trl_tokens_per_second": median(rows["trl"], "tokens_per_second"),
        "ours_peak_mb": median(rows["ours"], "peak_mb"),
        "trl_peak_mb": median(rows["trl"], "peak_mb"),
        "dense_ratio": median(dense["ours"], "tokens_per_second")
        / median(dense["peft"], "tokens_per_second"),
        "dense_memory_ratio": median(dense["ours"], "peak_mb") / median(dense["peft"], "peak_mb"),
        "dense_tokens_per_second": median(dense["ours"], "tokens_per_second"),
        "dense_share_of_roofline": median(dense["ours"], "tokens_per_second")
        * flops
        / machine["bf16_gflops"]
        / 1e9,
    }
    targets = {
        "real_tokens_ratio": (">=", 8),
        "memory_ratio": ("<=", 0.25),
        "loss0_difference": ("<=", 1e-3),
        "dense_ratio": (">=", 1.4),
    }
    publish("train_vs_trl", figures, targets, {"rows": rows, "dense": dense}, machine)


if __name__ == "__main__":
    main()
