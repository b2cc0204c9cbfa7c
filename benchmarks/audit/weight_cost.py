"""What the file and weight gates cost on an adapter of a 70B model's shape (rank 64, 560 layers, 1.66 GB), without its base.

    python benchmarks/audit/weight_cost.py [--blocks 80] [--folder DIR] [--publish]

Goal: 20 s and 200 MB for the weight gate on two cores; 50 ms for each 10 MB in the file gate. AdapterSentry 2.0.1 tells 18 to
20 s on 8 cores and 160 MB for its own statistics of such a file. The file is made of random numbers, and thrown away.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import common

from afina.audit.file_gate import check_files
from afina.audit.report import Gate
from afina.audit.weight_gate import measure

D, KV, FF, RANK = 8192, 1024, 28672, 64  # Llama 70B
LAYERS = {
    "self_attn.q_proj": (D, D),
    "self_attn.k_proj": (KV, D),
    "self_attn.v_proj": (KV, D),
    "self_attn.o_proj": (D, D),
    "mlp.gate_proj": (FF, D),
    "mlp.up_proj": (FF, D),
    "mlp.down_proj": (D, FF),
}
TARGETS = {
    "weight_gate_s": ("<=", 20),
    "peak_mb": ("<=", 200),
    "file_gate_ms_per_10_mb": ("<=", 50),
}


def make(folder: Path, blocks: int) -> float:
    """Write the adapter; returns its size in MB."""
    import torch

    from afina.merging.stream import open_tensor_writer

    names = [f"base_model.model.model.layers.{i}.{name}" for i in range(blocks) for name in LAYERS]
    keys = [f"{name}.lora_{side}.weight" for name in names for side in "AB"]
    numbers = torch.randn(FF * RANK, generator=torch.Generator().manual_seed(0)) * 0.01
    with open_tensor_writer(folder / "adapter_model.safetensors", keys) as writer:
        for name in names:
            out, inner = LAYERS[name.partition("layers.")[2].partition(".")[2]]
            writer.add(f"{name}.lora_A.weight", numbers[: RANK * inner].view(RANK, inner))
            writer.add(f"{name}.lora_B.weight", numbers[: out * RANK].flip(0).view(out, RANK))
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": [n.partition(".")[2] for n in LAYERS],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return (folder / "adapter_model.safetensors").stat().st_size / 1e6


def main() -> None:
    """Make the file, run both gates once, print what they took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--blocks", type=int, default=80)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument(
        "--side", action="store_true", help="measure in this process: the folder is there already"
    )
    parser.add_argument("--publish", action="store_true")
    told = parser.parse_args()
    if told.side:
        assert "torch" not in sys.modules  # neither gate needs it, and it is 400 MB
        start = time.perf_counter()
        gate = Gate("files")
        package = check_files(told.folder, None, gate)
        middle = time.perf_counter()
        measured = measure(package, None)
        end = time.perf_counter()
        assert not gate.findings
        assert np.isfinite(list(measured.features.values())).all()
        print(
            json.dumps(
                {
                    "file_gate_s": middle - start,
                    "weight_gate_s": end - middle,
                    "peak_mb": common.peak_mb(),
                    "cpu_s": time.process_time(),
                    "layers": len(measured.layers),
                }
            )
        )
        return
    folder = Path(tempfile.mkdtemp(dir=told.folder))
    try:
        size = make(folder, told.blocks)
        figures = common.run_side(sys.executable, [__file__, "--side", "--folder", str(folder)])
    finally:
        shutil.rmtree(folder)
    figures |= {"mb": size, "file_gate_ms_per_10_mb": 1e4 * figures["file_gate_s"] / size}
    if told.publish:
        common.publish(
            "audit_weight_cost", figures, TARGETS, {"blocks": told.blocks}, common.roofline()
        )
    else:
        print(json.dumps({"name": "audit_weight_cost", "figures": figures, "targets": TARGETS}))


if __name__ == "__main__":
    main()
