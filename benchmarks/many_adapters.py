"""Eight adapters at once against eight runs, step for step. `python benchmarks/many_adapters.py`

LoRA of ranks 4 to 16 on all linear layers, each with its own batch and optimizer: on the embedded base with 64 and 256 tokens a
step, and on a random Llama of 215M (12 x 1024, bf16) with 64. Steps together and one after another are taken in turn, in one
process. Memory: the peak of the eight together beside that of one adapter with all their tokens, in processes of their own.
"""

import argparse
import json
import sys
import time

from common import interleave, median, peak_mb, publish, roofline
from train_vs_trl import DENSE

COUNT, ROUNDS = 8, 7
CASES = {
    "embedded_64": ("embedded", 64),
    "embedded_256": ("embedded", 256),
    "215m_64": ("215m", 64),
}


def side(case: str, kind: str) -> None:
    """`both`: seconds of a step of all, together and one by one. `together`, `one`: the peak of that alone."""
    import torch

    torch.set_num_threads(2)
    from afina.adapters.attach import attach
    from afina.adapters.target_selection import resolve_target_modules
    from afina.data.renderer import Example
    from afina.io.adapter_config import AdapterConfig
    from afina.models.causal_lm import CausalLM
    from afina.models.fast_llama import install_fast_modules
    from afina.models.loading import load_base
    from afina.objectives.language_modeling import LanguageModelingObjective
    from afina.objectives.multi_adapter import multi_adapter_losses
    from afina.training.setup.optimizer import AdapterOptimizer

    name, tokens = CASES[case]
    torch.manual_seed(0)
    if name == "embedded":
        base = load_base()
    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        model = LlamaForCausalLM._from_config(LlamaConfig(**DENSE), attn_implementation="afina").to(
            torch.bfloat16
        )
        install_fast_modules(model.requires_grad_(False).eval())
        base = CausalLM(model, "random")
    targets = resolve_target_modules(base.model, "all-linear", None, False)
    adapters = []
    for number in range(1 if kind == "one" else COUNT):
        adapter = attach(
            base.model,
            base.forward_context,
            f"a{number}",
            AdapterConfig("lora", targets, rank=(4, 8, 16)[number % 3]),
        )
        length, sequences = (tokens // 2, 2 * COUNT) if kind == "one" else (tokens // 2, 2)
        rows = torch.randint(5, 4000, (sequences, length)).tolist()
        examples = [Example("", row, [False] + [True] * (length - 1), 0, None) for row in rows]
        task = LanguageModelingObjective(base, examples, examples[:1], 10**6, 1, 0)
        adapters.append(
            (task, task.step_batches(0)[0], adapter, AdapterOptimizer(adapter, 1e-3, {}, 0.0))
        )

    def take(some: list) -> None:
        losses = multi_adapter_losses(
            [(task, batch, adapter.route) for task, batch, adapter, _ in some]
        )
        torch.stack(
            [loss / batch.num_targets for loss, (_, batch, _, _) in zip(losses, some, strict=True)]
        ).sum().backward()
        for *_, optimizer in some:
            optimizer.step(1.0, 1.0)

    seconds: dict[str, list[float]] = {"together": [], "one_by_one": []}
    for turn in range(ROUNDS + 1):
        for which in seconds if kind == "both" else ["together"]:
            start = time.perf_counter()
            for some in [adapters] if which == "together" else [[one] for one in adapters]:
                take(some)
            if turn:
                seconds[which].append(time.perf_counter() - start)
    states = (
        sum(12 * adapter.count() for _, _, adapter, _ in adapters) / 1e6
    )  # values and two moments, float32
    print(
        json.dumps(
            {which: sorted(s)[len(s) // 2] for which, s in seconds.items() if s}
            | {"peak_mb": peak_mb(), "states_mb": states}
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--kind", choices=("both", "together", "one"))
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.case:
        return side(arguments.case, arguments.kind)
    machine = roofline()
    kinds = ("both", "together", "one")
    sides = {
        f"{c}-{k}": (sys.executable, [__file__, "--case", c, "--kind", k])
        for c in CASES
        for k in kinds
    }
    runs = interleave(sides, arguments.repeats)
    figures: dict[str, float] = {}
    for case in CASES:
        together, one = runs[f"{case}-together"], runs[f"{case}-one"]
        figures[f"{case}_ratio"] = median(runs[f"{case}-both"], "one_by_one") / median(
            runs[f"{case}-both"], "together"
        )
        figures[f"{case}_ms_together"] = 1e3 * median(runs[f"{case}-both"], "together")
        own = median(together, "states_mb") - median(one, "states_mb")
        figures[f"{case}_memory_ratio"] = (median(together, "peak_mb") - own) / median(
            one, "peak_mb"
        )
    targets = {
        "embedded_64_ratio": (">=", 2.5),
        "embedded_256_ratio": (">=", 2.5),
        "215m_64_ratio": (">=", 1.5),
    }
    publish(
        "many_adapters",
        figures,
        targets | {f"{c}_memory_ratio": ("<=", 1.1) for c in CASES},
        runs,
        machine,
    )


if __name__ == "__main__":
    main()
