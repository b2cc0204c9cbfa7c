"""Does a LoRA move a vision model as well as full fine-tuning does? `python benchmarks/vision.py`

A small ViT and a small ResNet are made here by a recipe (trained from scratch on 4,000 of the 10,000 labelled MNIST test images),
then moved to a shifted task (other digits, turned by 30 degrees and inverted) by full fine-tuning and by LoRA. Of the shifted
rows 4,000 are learned from, 800 choose the learning rate (three trials of fewer epochs for each method, on a seed of their own)
and the state that is kept, and 1,200 are looked at once, at the end. Three seeds. Targets: LoRA trains at most 5% of full's
numbers, and comes within 2 points of its accuracy.
"""

import gzip
import io
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import SHARED, publish, roofline

SEEDS, EPOCHS = 3, 10
SEARCH_SEED, SEARCH_EPOCHS = 1000, 4
PARTS = {
    "upright": (0, 4000),
    "shifted": (4000, 8000),
    "choose": (8000, 8800),
    "final": (8800, 10000),
}
BASE = {
    "vit": dict(learning_rate=1e-3, num_train_epochs=20),
    "resnet": dict(learning_rate=2e-3, num_train_epochs=5),
}
FULL = (5e-4, 1e-3, 2e-3)
RATES = {
    "vit": {"full": FULL, "lora": (5e-3, 1e-2, 1.5e-2)},
    "resnet": {"full": FULL, "lora": (1e-2, 2e-2, 4e-2)},
}
# all that multiplies, the layer that reads the pixels among it: the light has been inverted
LORA: dict[str, dict[str, Any]] = {
    "vit": dict(rank=2, targets=["all-linear", "projection", "classifier"]),
    "resnet": dict(rank=3, targets=["all-linear", "resnet.embedder.embedder.convolution"]),
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
            image = ImageOps.invert(image.rotate(30))
        stream = io.BytesIO()
        image.save(stream, "PNG")
        encoded.append(stream.getvalue())
    pq.write_table(pa.table({"image": encoded, "label": [str(label) for _, label in rows]}), file)


def random_base(kind: str, folder: Path) -> None:
    """A model with random weights, in Hugging Face's form: what the recipe starts from."""
    from transformers import (
        ResNetConfig,
        ResNetForImageClassification,
        ViTConfig,
        ViTForImageClassification,
    )

    torch.manual_seed(0)
    if kind == "vit":
        model = ViTForImageClassification(
            ViTConfig(
                hidden_size=64,
                num_hidden_layers=4,
                num_attention_heads=4,
                intermediate_size=256,
                image_size=28,
                patch_size=7,
                num_channels=1,
                num_labels=10,
            )
        )
    else:
        model = ResNetForImageClassification(
            ResNetConfig(
                num_channels=1,
                embedding_size=16,
                hidden_sizes=[32, 64, 128],
                depths=[1, 1, 1],
                layer_type="basic",
                num_labels=10,
            )
        )
    model.save_pretrained(folder)
    size = {"height": 28, "width": 28}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"size": size, "image_mean": [0.5], "image_std": [0.5]})
    )


class Bench:
    """One kind of model: its base, its trials, its runs."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder, self.count = kind, folder, 0
        random_base(kind, folder / f"{kind}-random")

    def train(self, data: str, base: Path, **settings: Any) -> Any:
        from afina.training.train import train

        self.count += 1
        return train(
            self.folder / f"{data}.parquet",
            base=str(base),
            objective="classify",
            max_tokens_per_batch=640,
            output_dir=self.folder / f"{self.kind}-{self.count}",
            **settings,
        )

    def make_base(self) -> float:
        """Train from scratch, and merge; returns the held-out accuracy."""
        from afina.merging.merge_into_base import merge

        random = self.folder / f"{self.kind}-random"
        made = self.train("upright", random, method="full", **BASE[self.kind])
        self.base = self.folder / f"{self.kind}-base"
        merge(made.folder, output_dir=self.base)
        return made.record["classes"]["accuracy"]

    def move(self, method: str, rate: float, seed: int, epochs: int) -> Any:
        return self.train(
            "shifted",
            self.base,
            method=method,
            learning_rate=rate,
            seed=seed,
            num_train_epochs=epochs,
            eval_size=self.folder / "choose.parquet",
            **(LORA[self.kind] if method == "lora" else {}),
        )

    def search(self, method: str) -> dict[float, float]:
        """Accuracy on the choosing rows, for each rate."""
        rates = RATES[self.kind][method]
        return {
            rate: self.move(method, rate, SEARCH_SEED, SEARCH_EPOCHS).record["classes"]["accuracy"]
            for rate in rates
        }

    def final(self, method: str, rate: float, seed: int) -> dict[str, float]:
        from afina.evaluation.evaluate import evaluate

        run = self.move(method, rate, seed, EPOCHS)
        judged = evaluate(run.folder, data=self.folder / "final.parquet")["classes"]
        row = {"accuracy": judged["accuracy"], "f1": judged["f1"], "rate": rate}
        return row | {key: run.record[key] for key in ("trainable_parameters", "seconds")}


def main() -> None:
    rows = images()
    random.Random(0).shuffle(rows)
    repeats: dict[str, Any] = {}
    figures: dict[str, float] = {}
    targets: dict[str, tuple] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part, (start, end) in PARTS.items():
            write_rows(rows[start:end], part != "upright", folder / f"{part}.parquet")
        for kind in RATES:
            bench = Bench(kind, folder)
            figures[f"{kind}_base_accuracy"] = bench.make_base()
            print(kind, "base", figures[f"{kind}_base_accuracy"], flush=True)
            accuracy, size = {}, {}
            for method in RATES[kind]:
                trials = bench.search(method)
                print(kind, method, trials, flush=True)
                rate = max(trials, key=lambda r: trials[r])
                runs = [bench.final(method, rate, seed) for seed in range(SEEDS)]
                print(kind, method, runs, flush=True)
                repeats[f"{kind}-{method}"] = {
                    "trials": {str(r): a for r, a in trials.items()},
                    "runs": runs,
                }
                accuracy[method] = statistics.mean(run["accuracy"] for run in runs)
                size[method] = runs[0]["trainable_parameters"]
                figures[f"{kind}_{method}_accuracy"] = accuracy[method]
                figures[f"{kind}_{method}_spread"] = max(r["accuracy"] for r in runs) - min(
                    r["accuracy"] for r in runs
                )
            figures[f"{kind}_lora_below_full"] = accuracy["full"] - accuracy["lora"]
            figures[f"{kind}_size_ratio"] = size["lora"] / size["full"]
            targets |= {f"{kind}_lora_below_full": ("<=", 2.0), f"{kind}_size_ratio": ("<=", 0.05)}
    publish("vision", figures, targets, repeats, roofline())


if __name__ == "__main__":
    main()
