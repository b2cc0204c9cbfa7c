"""DPO with an adapter beside full fine-tuning with two copies: memory and time. `python benchmarks/dpo.py`

A random Llama of 215M (12 x 1024) in bf16, pairs of 2 x 256 tokens of which half are answers to one prompt, adapters of rank 64 on
all linear layers. Each side is a process of its own; its peak is VmHWM. What the reference costs is a difference of two sides: DPO from a
new adapter against SimPO, which has no reference; DPO that goes on from an adapter, and so holds a frozen copy of it, against
DPO from a new one. Times are of the same tokens, DPO against SFT, whose rows share nothing.

What sharing prompts gains is the time of the same step with it and without ("apart"): DPO of a pair; DPO of an activated adapter,
invoked at the prompt's end; and a step of policy gradient, a group of 8 answers of 64 tokens to a prompt of 128, read by the
reference and learned from.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import PEERS, interleave, median, peak_mb, publish, roofline
from train_vs_trl import DENSE

STEPS, PROMPT, ANSWER, RANK, PAIRS = 5, 128, 128, 64, 8
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
GROUP, SHORT, INVOCATION = 8, 64, (5, 6)
SHARING = ("dpo", "dpo_apart", "alora", "alora_apart", "group", "group_apart")
OURS = ("libraries", "sft", "simpo", "dpo_precomputed", "dpo_continued", "dpo_full", *SHARING)


def ours(side: str, shape: dict[str, int]) -> None:
    """Median seconds of a step, peak memory, and bytes of the adapter."""
    import torch

    torch.set_num_threads(2)
    from transformers import LlamaConfig, LlamaForCausalLM

    from afina.adapters.active import BASE_ONLY
    from afina.adapters.attach import attach
    from afina.adapters.loading import load_state
    from afina.adapters.saving import tensors_of
    from afina.adapters.target_selection import resolve_target_modules
    from afina.data.packing import PackedBatch, pack_examples
    from afina.data.renderer import Example
    from afina.io.adapter_config import AdapterConfig
    from afina.models.causal_lm import CausalLM
    from afina.models.fast_llama import install_fast_modules
    from afina.objectives.language_modeling import LanguageModelingObjective
    from afina.objectives.preference_data import PreferenceExample
    from afina.objectives.reference import ReferencePolicy, sequence_logprobs
    from afina.objectives.registry import get_objective
    from afina.settings import settings_groups
    from afina.training.setup.optimizer import AdapterOptimizer

    if side == "libraries":
        print(json.dumps({"peak_mb": peak_mb()}))
        return
    if side.endswith("_apart"):
        PackedBatch.shared_prefixes = property(
            lambda batch: tuple((n, 0) for n in range(len(batch.bounds) - 1))
        )  # type: ignore[assignment]
        side = side.removesuffix("_apart")
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(
        LlamaConfig(**shape), attn_implementation="afina", dtype=torch.bfloat16
    )
    model.requires_grad_(False).eval()
    install_fast_modules(model)
    base = CausalLM(model, "random")
    full = side == "dpo_full"
    spec = AdapterConfig(
        "full" if full else "lora",
        resolve_target_modules(model, "all" if full else "all-linear", None, full),
        rank=RANK,
        invocation=INVOCATION if side == "alora" else (),
    )
    adapter = attach(model, base.forward_context, "policy", spec)
    route = BASE_ONLY
    if side == "dpo_continued":
        frozen = attach(model, base.forward_context, "start", spec)
        load_state(frozen, tensors_of(adapter), "")
        for parameter in frozen.parameters():
            parameter.requires_grad_(False)
        route = frozen.active
    many, length = (GROUP, SHORT) if side == "group" else (2, ANSWER)
    prompts = torch.randint(10, 32000, (PAIRS, PROMPT)).tolist()
    examples = [
        [
            Example(
                str(n),
                [*prompts[n][:-4], *INVOCATION, *prompts[n][-2:], *tokens],
                [False] * PROMPT + [True] * length,
                PROMPT,
                None,
            )
            for tokens in answers
        ]
        for n, answers in enumerate(torch.randint(10, 32000, (PAIRS, many, length)).tolist())
    ]
    size = 2 * (PROMPT + ANSWER)
    if side in ("sft", "group"):
        task: Any = LanguageModelingObjective(
            base, [e for both in examples for e in both], [], size, 1, 0
        )
    else:
        objective = "simpo" if side == "simpo" else "dpo"
        options = settings_groups.get(objective)(beta=0.1)
        rows = [PreferenceExample(good.where, good, bad) for good, bad in examples]
        task = get_objective(objective)(options, base, rows, [], size, 1, 0)
        if objective == "dpo":
            task.reference = ReferencePolicy(
                "precomputed" if side == "dpo_precomputed" else "base", "", route
            )
    optimizer = AdapterOptimizer(adapter, 1e-5, {}, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        if side == "dpo_precomputed":
            task.settle(Path(folder))
    seconds = []
    for step in range(STEPS + 1):
        start = time.perf_counter()
        if side == "group":
            flat = pack_examples(examples[step % PAIRS])
            with torch.no_grad():
                known = sequence_logprobs(base, flat, BASE_ONLY)[0]
            (
                (sequence_logprobs(base, flat, adapter.active)[0] - known).square().sum()
                / flat.num_targets
            ).backward()
        else:
            batches = task.step_batches(step)
            assert [task.size(batch) for batch in batches] == [size]
            (task.loss(batches[0], adapter.active) / task.count(batches[0])).backward()
        optimizer.step(1.0, 1.0)
        seconds.append(time.perf_counter() - start)
    held = sum(p.numel() * p.element_size() for p in adapter.parameters())
    print(
        json.dumps(
            {
                "seconds": statistics.median(seconds[1:]),
                "peak_mb": peak_mb(),
                "adapter_mb": held / 1e6,
            }
        )
    )


def trl(shape: dict[str, int]) -> None:
    """TRL's DPOTrainer, all weights trained, its reference a second copy of the model."""
    import torch

    torch.set_num_threads(2)
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    words = {"<pad>": 0, "<unk>": 1, "<s>": 2, "</s>": 3} | {f"w{n}": n for n in range(4, 32000)}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", bos_token="<s>"
    )
    torch.manual_seed(0)
    numbers = torch.randint(5, 32000, (PAIRS, 3, PROMPT)).tolist()
    texts = [[" ".join(f"w{n}" for n in part) for part in row] for row in numbers]
    rows = [
        {
            "prompt": p,
            "chosen": f" {c.rpartition(' ')[0]} </s>",
            "rejected": f" {r.rpartition(' ')[0]} </s>",
        }
        for p, c, r in texts
    ]
    model = LlamaForCausalLM(LlamaConfig(**shape)).to(torch.bfloat16)
    reference = LlamaForCausalLM(LlamaConfig(**shape)).to(torch.bfloat16)
    reference.load_state_dict(model.state_dict())
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=1,
            max_steps=STEPS + 1,
            learning_rate=1e-6,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            max_length=PROMPT + ANSWER,
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = DPOTrainer(
            model,
            reference,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        step = trainer.training_step

        def timed(*given: Any, **named: Any) -> Any:
            start = time.perf_counter()
            assert given[1]["input_ids"].numel() == 2 * (PROMPT + ANSWER), given[1][
                "input_ids"
            ].shape
            loss = step(*given, **named)
            seconds.append(time.perf_counter() - start)
            return loss

        trainer.training_step = timed
        trainer.train()
    print(json.dumps({"seconds": statistics.median(seconds[1:]), "peak_mb": peak_mb()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=(*OURS, "trl_full"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--small",
        action="store_true",
        help="a model of 10M, one repeat, nothing published: does it run?",
    )
    arguments = parser.parse_args()
    shape = DENSE | (SMALL if arguments.small else {})
    if arguments.side:
        return trl(shape) if arguments.side == "trl_full" else ours(arguments.side, shape)
    if not PEERS.exists():
        sys.exit("the peers' environment is missing: make peers")
    pythons = dict.fromkeys(OURS, sys.executable) | {"trl_full": PEERS}
    small = ["--small"] if arguments.small else []
    runs = interleave(
        {side: (python, [__file__, "--side", side, *small]) for side, python in pythons.items()},
        1 if small else arguments.repeats,
    )
    peak = {side: median(rows, "peak_mb") for side, rows in runs.items()}
    seconds = {side: median(rows, "seconds") for side, rows in runs.items() if side != "libraries"}
    adapter = runs["dpo"][0]["adapter_mb"]
    figures = {
        "memory_below_trl_full_percent": 100 * (1 - peak["dpo"] / peak["trl_full"]),
        "memory_below_our_full_percent": 100 * (1 - peak["dpo"] / peak["dpo_full"]),
        "new_reference_in_adapters": (peak["dpo"] - peak["simpo"]) / adapter,
        "continued_reference_in_adapters": (peak["dpo_continued"] - peak["dpo"]) / adapter,
        "dpo_over_sft": seconds["dpo"] / seconds["sft"],
        "precomputed_over_sft": seconds["dpo_precomputed"] / seconds["sft"],
        **{
            f"{side}_sharing_gain": seconds[f"{side}_apart"] / seconds[side]
            for side in SHARING[::2]
        },
        "adapter_mb": adapter,
        **{f"{side}_peak_mb": value for side, value in peak.items()},
        **{f"{side}_seconds": value for side, value in seconds.items()},
    }
    targets = {
        "memory_below_trl_full_percent": (">=", 45),
        "memory_below_our_full_percent": (">=", 45),
        "new_reference_in_adapters": ("<=", 1),
        "continued_reference_in_adapters": ("<=", 1),
        "dpo_over_sft": ("<=", 1.6),
    }
    if small:
        print(json.dumps(figures))
        return
    publish("dpo", figures, targets, runs, roofline())


if __name__ == "__main__":
    main()
