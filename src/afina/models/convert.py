"""Convert a folder of pickled weights (.bin) to safetensors: python -m afina.models.convert OLD NEW

The files are read with torch's restricted loader (tensors only), never with pickle itself.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file


def convert(old: Path, new: Path) -> None:
    """Write the weights of `old` to `new` as one safetensors file, with its other files."""
    new.mkdir(parents=True)
    tensors: dict[str, torch.Tensor] = {}
    weights = [*old.glob("pytorch_model*.bin")] or [
        *old.glob("*.bin"),
        *old.glob("*.pt"),
        *old.glob("*.pth"),
    ]
    for file in sorted(weights):  # a trainer's folder also has training_args.bin and optimizer.pt
        tensors |= torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    config = json.loads((old / "config.json").read_text())
    if config.get("tie_word_embeddings", False):
        tensors.pop("lm_head.weight", None)
    save_file(
        {k: v.clone().contiguous() for k, v in tensors.items()},
        new / "model.safetensors",
        {"format": "pt"},
    )
    for file in [
        *old.glob("*.json"),
        *old.glob("*.model"),
        *old.glob("*.txt"),
        *old.glob("*.jinja"),
    ]:
        if not file.name.endswith(".index.json"):
            shutil.copy2(file, new / file.name)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
    print(f"written: {sys.argv[2]}")
