"""A step of learning from rewards beside TRL's: `python benchmarks/grpo.py`

A random Llama of 215M (12 x 1024) in bf16, LoRA r16 on all linear layers, one GRPO update a step: 4 prompts of 128 tokens, 8
answers each, 64 tokens long, sampled at temperature 1, the same Python function as reward, and a reference (adapter off, beta
0.04). Both sides train as their user would type it, in a process of its own; what is timed is the whole step, and in it the
writing of the answers. TRL saves no activations by default; it may keep them here, which is faster and takes more memory.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import PEERS, interleave, median, peak_mb, publish, roofline
from dpo import SMALL
from train_vs_trl import DENSE

STEPS, PROMPTS, GROUP, PROMPT, ANSWER, RANK, BETA = (
    4,
    4,
    8,
    128,
    64,
    16,
    0.04,
)  # the first step warms up
PASS = 8 * (
    PROMPT + ANSWER
)  # tokens of a forward and backward: eight answers with their prompts, on both sides
SIZE = PROMPTS * GROUP * (PROMPT + ANSWER)


def make_base(folder: Path, shape: dict[str, int]) -> None:
    """The base with a tokenizer of whole words, and the prompts, as both sides read them."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {"<pad>": 0, "<unk>": 1, "<s>": 2, "</s>": 3} | {
        f"w{n}": n for n in range(4, shape["vocab_size"])
    }
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")
    tokenizer.save_pretrained(folder / "base")
    torch.manual_seed(0)
    config = LlamaConfig(**shape, bos_token_id=None, eos_token_id=3, pad_token_id=0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "base")
    asked = torch.randint(5, shape["vocab_size"], (STEPS * PROMPTS, PROMPT)).tolist()
    lines = [json.dumps({"prompt": " ".join(f"w{n}" for n in row)}) for row in asked]
    (folder / "asked.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "held.jsonl").write_text(lines[0] + "\n")


def even(prompt: str, answer: str, reference: str | None) -> float:
    """The reward: the share of words with an even number."""
    words = answer.split()
    return sum(word[-1] in "02468" for word in words) / max(1, len(words))


def report(seconds: list[float], writing: list[float], answered: float) -> None:
    """`answered`: mean length of the answers; a random model ends one of 32,000 / 64 by itself."""
    assert answered > 0.97 * ANSWER, answered
    told = {
        "seconds": statistics.median(seconds[1:]),
        "writing": statistics.median(writing[1:]),
        "peak_mb": peak_mb(),
    }
    print(json.dumps(told | {"answered": answered}))


def ours(folder: Path) -> None:
    """`afina.train`'s own set-up and loop."""
    import torch

    torch.set_num_threads(2)
    from afina.objectives.policy import PolicyObjective
    from afina.settings import TrainSettings
    from afina.training.setup.set_up import set_up_run
    from afina.training.trainer import StepMetrics, Trainer

    options = {
        "reward_funcs": f"{__file__}:even",
        "num_generations": GROUP,
        "prompts_per_step": PROMPTS,
        "max_new_tokens": ANSWER,
        "beta": BETA,
    }
    with tempfile.TemporaryDirectory() as run:
        setup = set_up_run(
            TrainSettings(
                data=folder / "asked.jsonl",
                eval_data=folder / "held.jsonl",
                base=str(folder / "base"),
                chat_template="plain",
                output_dir=Path(run),
                objective="grpo",
                grpo=options,
                rank=RANK,
                alpha=2 * RANK,
                learning_rate=1e-5,
                max_steps=STEPS,
                eval_steps=10**6,
                max_tokens_per_batch=PASS,
                warmup_ratio=0.0,
                dtype="bfloat16",
            )
        )
        task, ticks, written = setup.prepared.task, [], [0.0]
        assert isinstance(task, PolicyObjective)

        def note(tick: StepMetrics) -> None:
            ticks.append(tick)
            written.append(task.seconds["writing"])

        loop = Trainer(setup, Path(run), {}, note, lambda _: None)
        loop._check = lambda tick: tick  # type: ignore[method-assign]  # judging is no part of a step
        loop.train()
    assert all(abs(tick.tokens - SIZE) < 0.02 * SIZE for tick in ticks), [
        tick.tokens for tick in ticks
    ]
    writing = [after - before for before, after in itertools.pairwise(written)]
    report(
        [tick.seconds for tick in ticks],
        writing,
        statistics.mean(tick.metrics["length"] for tick in ticks),
    )


def trl(folder: Path) -> None:
    """TRL's GRPOTrainer with PEFT."""
    import torch

    torch.set_num_threads(2)
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    rows = [json.loads(line) for line in (folder / "asked.jsonl").read_text().splitlines()]
    seconds, writing, lengths = [0.0] * STEPS, [0.0] * STEPS, []

    def judged(
        prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any
    ) -> list[float]:
        lengths.extend(len(ids) for ids in completion_ids)
        return [
            even(prompt, answer, None) for prompt, answer in zip(prompts, completions, strict=True)
        ]

    arguments = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=GROUP,
        gradient_accumulation_steps=PROMPTS,
        max_steps=STEPS,
        num_generations=GROUP,
        max_completion_length=ANSWER,
        beta=BETA,
        temperature=1.0,
        learning_rate=1e-5,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=True,
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    trainer = GRPOTrainer(
        model,
        judged,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"),
    )

    def timed(call: Any, into: list[float]) -> Any:
        def run(*given: Any, **named: Any) -> Any:
            start = time.perf_counter()
            told = call(*given, **named)
            into[trainer.state.global_step] += time.perf_counter() - start
            return told

        return run

    trainer.training_step = timed(trainer.training_step, seconds)
    trainer._generate = timed(trainer._generate, writing)
    trainer.train()
    report(seconds, writing, statistics.mean(lengths))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=("ours", "trl"))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--small",
        action="store_true",
        help="a model of 8M, one repeat, nothing published: does it run?",
    )
    arguments = parser.parse_args()
    if arguments.side:
        return ours(arguments.folder) if arguments.side == "ours" else trl(arguments.folder)
    if not PEERS.exists():
        sys.exit("the peers' environment is missing: make peers")
    with tempfile.TemporaryDirectory() as name:
        make_base(Path(name), DENSE | (SMALL if arguments.small else {}))
        sides = {"ours": sys.executable, "trl": PEERS}
        runs = interleave(
            {
                side: (python, [__file__, "--side", side, "--folder", name])
                for side, python in sides.items()
            },
            1 if arguments.small else arguments.repeats,
        )
    seconds, writing = (
        {side: median(rows, key) for side, rows in runs.items()} for key in ("seconds", "writing")
    )
    learning = {side: seconds[side] - writing[side] for side in runs}
    figures = {
        "times_faster": seconds["trl"] / seconds["ours"],
        "writing_times_faster": writing["trl"] / writing["ours"],
        "learning_times_faster": learning["trl"] / learning["ours"],
        **{f"{side}_writing_percent": 100 * writing[side] / seconds[side] for side in runs},
        **{f"{side}_seconds": value for side, value in seconds.items()},
        **{f"{side}_peak_mb": median(rows, "peak_mb") for side, rows in runs.items()},
    }
    if arguments.small:
        print(json.dumps(figures))
        return
    publish("grpo", figures, {"times_faster": (">=", 3)}, runs, roofline())


if __name__ == "__main__":
    main()
