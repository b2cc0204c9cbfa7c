"""Two adapters into one: how exact, how fast, how lean, beside PEFT's add_weighted_adapter? `python benchmarks/combine.py`

A block of a 1B Llama (hidden 2048, ffn 5632, 4 KV heads: TinyLlama's shape), random loras of rank 16 and 64 on its seven
matrices, weights 0.6 and 0.4; then the same pair with rsLoRA's scaling. Errors are of the update, relative, against the
sum in float64. The svd cuts to the rank of one part. Then eight adapters of ranks 4 to 64 for a 7B Llama (32 x 4096, ffn
11008), combined on disk, layer by layer. Sides run in processes of their own, one thread each. PEFT's svd of one block
takes about a minute, which is why it is timed on one and once for each rank.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import peak_mb, publish, roofline, run_side

WEIGHTS = (0.6, 0.4)
RANKS = (16, 64)
CONFIG = dict(
    vocab_size=256,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=1,
    num_attention_heads=32,
    num_key_value_heads=4,
)
EIGHT = (4, 8, 8, 16, 16, 32, 32, 64)
LARGE = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 4096),
    "self_attn.v_proj": (4096, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}


def model() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**CONFIG))


def make_adapters(folder: Path) -> None:
    """Random adapters in PEFT's own files: a-16, b-16, a-64, b-64, and b-rs-16 with rsLoRA's scaling."""
    import torch
    from peft import LoraConfig, get_peft_model

    for seed, (name, rank, rslora) in enumerate(
        (f"{who}{'-rs' if rs else ''}-{rank}", rank, rs)
        for rank in RANKS
        for who, rs in (("a", False), ("b", False), ("b", True))
    ):
        base = model()
        torch.manual_seed(seed)
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules="all-linear",
            use_rslora=rslora,
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        get_peft_model(base, config).save_pretrained(folder / name)


def exact(folder: Path, parts: list[str]) -> dict[str, Any]:
    """The sum in float64, by layer, straight from the files."""
    from safetensors.torch import load_file

    total: dict[str, Any] = {}
    for part, weight in zip(parts, WEIGHTS):
        tensors = load_file(folder / part / "adapter_model.safetensors")
        config = json.loads((folder / part / "adapter_config.json").read_text())
        scale = config["lora_alpha"] / (
            math.sqrt(config["r"]) if config["use_rslora"] else config["r"]
        )
        for name in tensors:
            if ".lora_A." in name:
                path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                update = (
                    weight
                    * scale
                    * tensors[name.replace("_A.", "_B.")].double()
                    @ tensors[name].double()
                )
                total[path] = total[path] + update if path in total else update
    return total


def error(made: dict[str, Any], truth: dict[str, Any]) -> float:
    """||made - truth|| / ||truth|| over all layers."""
    apart = sum(float((made[path].double() - truth[path]).square().sum()) for path in truth)
    return math.sqrt(apart / sum(float(t.square().sum()) for t in truth.values()))


def ours(folder: Path, rank: int) -> dict[str, float]:
    from afina.merging.combine import combine
    from afina.merging.low_rank import LowRankUpdate
    from afina.merging.stream import TensorReader

    def read(out: Path) -> dict[str, Any]:
        reader, made = TensorReader(out / "adapter_model.safetensors"), {}
        for name in reader.entries:
            if ".lora_A." in name:
                path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                made[path] = LowRankUpdate(
                    reader[name.replace("_A.", "_B.")].double(), reader[name].double()
                ).dense()
        return made

    figures: dict[str, float] = {}
    for kind, other in (("", f"b-{rank}"), ("rs_", f"b-rs-{rank}")):
        parts = [f"a-{rank}", other]
        named = [f"{folder / part}:{weight}" for part, weight in zip(parts, WEIGHTS)]
        for how in ("sum", "svd"):
            start = time.perf_counter()
            combine(
                named,
                merge_method=how,
                rank=rank if how == "svd" else None,
                output_dir=folder / f"ours-{kind}{how}-{rank}",
            )
            figures[f"{kind}{how}_seconds"] = time.perf_counter() - start
    figures["peak_mb"] = peak_mb()  # before anything is built to check it
    for kind, other in (("", f"b-{rank}"), ("rs_", f"b-rs-{rank}")):
        truth = exact(folder, [f"a-{rank}", other])
        for how in ("sum", "svd"):
            figures[f"{kind}{how}_error"] = error(read(folder / f"ours-{kind}{how}-{rank}"), truth)
    return figures


def theirs(folder: Path, rank: int) -> dict[str, float]:
    from peft import PeftModel

    figures: dict[str, float] = {}
    for kind, other in (("", f"b-{rank}"), ("rs_", f"b-rs-{rank}")):
        loaded: Any = PeftModel.from_pretrained(model(), folder / f"a-{rank}", adapter_name="a")
        loaded.load_adapter(folder / other, adapter_name="b")
        truth = exact(folder, [f"a-{rank}", other])
        for how in ("linear", "cat", "svd") if not kind else ("linear", "cat"):
            start = time.perf_counter()
            loaded.add_weighted_adapter(
                ["a", "b"],
                list(WEIGHTS),
                how,
                combination_type=how,
                svd_rank=rank if how == "svd" else None,
            )
            figures[f"{kind}{how}_seconds"] = time.perf_counter() - start
            layers = dict(loaded.base_model.model.named_modules())
            figures[f"{kind}{how}_error"] = error(
                {path: layers[path].get_delta_weight(how).detach() for path in truth}, truth
            )
    figures["peak_mb"] = peak_mb()
    return figures


def large(folder: Path, how: str) -> dict[str, float]:
    """Eight adapters of a 7B model, on disk already: combined, time and peak memory."""
    from afina.merging.combine import combine

    start = time.perf_counter()
    parts = [f"{folder / f'large{n}'}:{1 / len(EIGHT)}" for n in range(len(EIGHT))]
    result = combine(
        parts,
        merge_method=how,
        rank=32 if how == "svd" else None,
        output_dir=folder / f"large-{how}",
    )
    return {"seconds": time.perf_counter() - start, "peak_mb": peak_mb(), "rank": result["rank"]}


def make_large(folder: Path) -> None:
    """Written a layer at a time, in bfloat16's precision so that numbers compress to nothing special."""
    import torch

    from afina.merging.low_rank import LowRankUpdate
    from afina.merging.write import LoRATensorLayout, PeftContext, write_lora

    for number, rank in enumerate(EIGHT):
        generator = torch.Generator().manual_seed(number)
        shapes = {
            f"model.layers.{block}.{name}": shape
            for block in range(32)
            for name, shape in LARGE.items()
        }
        layers = (
            (
                path,
                LowRankUpdate(
                    torch.randn(out, rank, generator=generator) * 0.01,
                    torch.randn(rank, width, generator=generator),
                ),
                LoRATensorLayout(),
            )
            for path, (out, width) in shapes.items()
        )
        base = {"name": "7b", "revision": None, "hash": "7b", "storage": "plain"}
        write_lora(
            folder / f"large{number}",
            layers,
            list(shapes),
            PeftContext("CAUSAL_LM"),
            base,
            {"parents": []},
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=["make", "make-large", "ours", "theirs", "sum", "svd"])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rank", type=int)
    arguments = parser.parse_args()
    if arguments.side:
        import torch

        torch.set_num_threads(1)
        print(json.dumps(do(arguments.side, arguments.folder, arguments.rank)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run("make", folder)  # apart: a process inherits the peak of the one that starts it
        found: dict[str, Any] = {}
        for rank in RANKS:
            for side in ("theirs", "ours"):
                found[f"{side}_{rank}"] = run(side, folder, rank)
        run("make-large", folder)
        for how in ("sum", "svd"):
            found[f"large_{how}"] = run(how, folder)
    figures, targets = summary(found)
    publish("combine", figures, targets, found, roofline())


def do(name: str, folder: Path, rank: int) -> dict[str, float]:
    """The work of one process."""
    if name.startswith("make"):
        (make_adapters if name == "make" else make_large)(folder)
        return {"peak_mb": peak_mb()}
    if name in ("sum", "svd"):
        return large(folder, name)
    return (ours if name == "ours" else theirs)(folder, rank)


def run(side: str, folder: Path, rank: int = 0) -> dict[str, Any]:
    figures = run_side(
        sys.executable, [__file__, "--side", side, "--folder", str(folder), "--rank", str(rank)]
    )
    print(
        side, rank or "", {key: float(f"{value:.3g}") for key, value in figures.items()}, flush=True
    )
    return figures


def summary(found: dict[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
    figures: dict[str, float] = {}
    for rank in RANKS:
        mine, peers = found[f"ours_{rank}"], found[f"theirs_{rank}"]
        for how in ("sum", "rs_sum"):
            figures[f"{how}_error_{rank}_times_1e9"] = 1e9 * mine[f"{how}_error"]
        for kind in ("", "rs_"):
            figures[f"peft_{kind}cat_error_{rank}_times_1e9"] = 1e9 * peers[f"{kind}cat_error"]
            figures[f"peft_{kind}linear_error_{rank}"] = peers[f"{kind}linear_error"]
        figures[f"svd_error_{rank}"], figures[f"peft_svd_error_{rank}"] = (
            mine["svd_error"],
            peers["svd_error"],
        )
        figures[f"svd_speed_ratio_{rank}"] = peers["svd_seconds"] / mine["svd_seconds"]
        figures[f"svd_seconds_{rank}"], figures[f"peft_svd_seconds_{rank}"] = (
            mine["svd_seconds"],
            peers["svd_seconds"],
        )
        figures[f"memory_ratio_{rank}"] = mine["peak_mb"] / peers["peak_mb"]
    for how in ("sum", "svd"):
        figures[f"eight_of_7b_{how}_peak_gb"] = found[f"large_{how}"]["peak_mb"] / 1e3
        figures[f"eight_of_7b_{how}_seconds"] = found[f"large_{how}"]["seconds"]
    targets: dict[str, Any] = {f"svd_speed_ratio_{rank}": (">=", 100) for rank in RANKS}
    targets |= {
        f"{how}_error_{rank}_times_1e9": ("<=", 1000) for rank in RANKS for how in ("sum", "rs_sum")
    }
    return figures, targets | {f"eight_of_7b_{how}_peak_gb": ("<=", 2) for how in ("sum", "svd")}


if __name__ == "__main__":
    main()
