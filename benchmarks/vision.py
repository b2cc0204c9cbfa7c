"""Does a LoRA move a vision model as well as full fine-tuning does? `python benchmarks/vision.py`

A small ViT and a small ResNet are made here by a recipe (trained from scratch on half of the 10,000 labelled MNIST test
images), then moved to a shifted task (the same digits turned by 90 degrees and inverted; 4,000 rows to learn from, 1,000 held
out) by full fine-tuning and by LoRA, three seeds each. Targets: LoRA trains at most 5% of full's numbers, and comes within 2
points of its accuracy.
"""

import gzip
import io
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from common import SHARED, publish, roofline

SEEDS = 3
METHODS = {
    "vit": {"full": dict(learning_rate=1e-3), "lora": dict(rank=4, learning_rate=1e-2, targets="query,value,fc1")},
    "resnet": {"full": dict(learning_rate=2e-3), "lora": dict(rank=2, learning_rate=2e-2, targets="convolution")},
}


def images() -> list[tuple[bytes, int]]:
    folder = SHARED / "data/mnist"
    pixels = gzip.open(folder / "t10k-images-idx3-ubyte.gz").read()[16:]
    labels = gzip.open(folder / "t10k-labels-idx1-ubyte.gz").read()[8:]
    return [(pixels[784 * i : 784 * (i + 1)], label) for i, label in enumerate(labels)]


def write_rows(rows: list[tuple[bytes, int]], shifted: bool, file: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image, ImageOps

    encoded = []
    for pixels, _ in rows:
        image = Image.frombytes("L", (28, 28), pixels)
        if shifted:
            image = ImageOps.invert(image.rotate(90))
        stream = io.BytesIO()
        image.save(stream, "PNG")
        encoded.append(stream.getvalue())
    pq.write_table(pa.table({"image": encoded, "label": [str(label) for _, label in rows]}), file)


def random_base(kind: str, folder: Path) -> None:
    """A model with random weights, in Hugging Face's form: what the recipe starts from."""
    from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    if kind == "vit":
        model = ViTForImageClassification(ViTConfig(
            hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=192, image_size=28, patch_size=4,
            num_channels=1, num_labels=10,
        ))  # fmt: skip
    else:
        model = ResNetForImageClassification(ResNetConfig(
            num_channels=1, embedding_size=16, hidden_sizes=[32, 64, 128], depths=[1, 1, 1], layer_type="basic", num_labels=10,
        ))  # fmt: skip
    model.save_pretrained(folder)
    size = {"height": 28, "width": 28}
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": size, "image_mean": [0.5], "image_std": [0.5]}))


def main() -> None:
    from afina.combining.merge import merge
    from afina.training.run import train

    rows = images()
    random.Random(0).shuffle(rows)
    repeats: dict[str, list[dict]] = {}
    figures: dict[str, float] = {}
    targets: dict[str, tuple] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(rows[:5000], False, folder / "upright.parquet")
        write_rows(rows[5000:9000], True, folder / "shifted.parquet")
        write_rows(rows[9000:], True, folder / "held.parquet")
        for kind, methods in METHODS.items():
            random_base(kind, folder / f"{kind}-random")
            common = dict(objective="classify", batch_tokens=400, schedule="cosine")
            made = train(folder / "upright.parquet", base=str(folder / f"{kind}-random"), method="full", learning_rate=2e-3, epochs=6,
                         out=folder / f"{kind}-run", **common)  # fmt: skip
            merge(folder / f"{kind}-run", out=folder / f"{kind}-base")
            (folder / f"{kind}-base" / "preprocessor_config.json").write_bytes(
                (folder / f"{kind}-random" / "preprocessor_config.json").read_bytes()
            )
            figures[f"{kind}_base_accuracy"] = made.story["classes"]["accuracy"]
            for method, settings in methods.items():
                for seed in range(SEEDS):
                    run = train(folder / "shifted.parquet", base=str(folder / f"{kind}-base"), method=method, holdout=folder / "held.parquet",
                                epochs=4, seed=seed, out=folder / f"{kind}-{method}-{seed}", **common, **settings)  # fmt: skip
                    row = {
                        "accuracy": run.story["classes"]["accuracy"],
                        "trainable": run.story["trainable_parameters"],
                        "seconds": run.story["seconds"],
                    }
                    repeats.setdefault(f"{kind}-{method}", []).append(row)
                    print(kind, method, seed, row, flush=True)
            accuracy = {m: statistics.mean(r["accuracy"] for r in repeats[f"{kind}-{m}"]) for m in methods}
            size = {m: repeats[f"{kind}-{m}"][0]["trainable"] for m in methods}
            figures |= {f"{kind}_full_accuracy": accuracy["full"], f"{kind}_lora_accuracy": accuracy["lora"]}
            figures |= {
                f"{kind}_lora_below_full": accuracy["full"] - accuracy["lora"],
                f"{kind}_size_ratio": size["lora"] / size["full"],
            }
            targets |= {f"{kind}_lora_below_full": ("<=", 2.0), f"{kind}_size_ratio": ("<=", 0.05)}
    publish("vision", figures, targets, repeats, roofline())


if __name__ == "__main__":
    sys.exit(main())
