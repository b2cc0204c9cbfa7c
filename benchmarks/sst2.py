"""Does a LoRA on an encoder classify as well as full fine-tuning does? `python benchmarks/sst2.py`

A small BERT-like encoder is made here: a word-piece vocabulary learned from the training rows of SST-2, then masked-token learning
on the longer ones, without their labels, by afina's own `mlm`. Then `classify` on 20,000 rows, full and lora, three seeds each;
2,000 other rows choose the learning rate (as many trials for each method, on a seed of their own) and the state that is kept, and
the development rows are looked at once, at the end. Beside them a bag of words: logistic regression on which words occur, its
strength of decay chosen on the same 2,000 rows. Targets: lora within 2 points of full, both above the bag of words.

With --base FOLDER a published encoder is trained instead, on 1,500 rows, the rates chosen on 300 others; lora has to be within 1
point of full. The linear probe is the head that training begins with, on the frozen encoder's features.

The rows are phrases of parsed sentences, and those of one sentence are on both sides of the split: all three sides gain by that.
"""

import argparse
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import SHARED, publish, roofline
from torch import Tensor
from torch.nn import functional as F

SEEDS, SEARCH_SEED = 3, 1000
DECAYS = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4)
LONG = 10  # words of a row from which masked-token learning can learn something
Rows = list[tuple[str, int]]


class Sizes(NamedTuple):
    """What an encoder is trained on: rows to learn from and to choose by, and the rates tried."""

    learn: int
    choose: int
    rates: dict[str, tuple[float, ...]]
    search_steps: int
    epochs: int
    batch_tokens: int


OWN = Sizes(
    20_000,  # of 60,614: what one thread goes over in time
    2000,
    # lora at 5e-3 and above answers one class to all
    {"full": (5e-4, 1e-3, 2e-3), "lora": (1e-3, 2e-3, 4e-3)},
    300,
    3,
    512,
)
PUBLISHED = Sizes(1500, 300, {"full": (3e-5, 1e-4), "lora": (3e-4, 1e-3)}, 15, 2, 1024)


def read(name: str) -> Rows:
    lines = (SHARED / "data/sst2" / name).read_text(encoding="utf-8").splitlines()[1:]
    return [(text.strip(), int(label)) for text, label in (line.rsplit("\t", 1) for line in lines)]


def write(rows: Rows, file: Path) -> None:
    file.write_text(
        "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows), encoding="utf-8"
    )


def bag_of_words(train: Rows, choose: Rows, final: Rows) -> dict[str, float]:
    """Accuracy of logistic regression on which words occur (those seen twice or more), by L-BFGS."""
    counts: dict[str, int] = {}
    for text, _ in train:
        for word in set(text.split()):
            counts[word] = counts.get(word, 0) + 1
    number = {word: i for i, word in enumerate(word for word, n in counts.items() if n > 1)}

    def matrix(rows: Rows) -> tuple[Tensor, Tensor]:
        cells = [
            (i, number[w])
            for i, (text, _) in enumerate(rows)
            for w in set(text.split())
            if w in number
        ]
        x = torch.sparse_coo_tensor(
            torch.tensor(cells).T, torch.ones(len(cells)), (len(rows), len(number))
        )
        return x.coalesce().to_sparse_csr(), torch.tensor([[float(label)] for _, label in rows])

    parts = [matrix(rows) for rows in (train, choose, final)]

    x, y = parts[0]
    turned = (
        x.to_sparse_coo().T.coalesce().to_sparse_csr()
    )  # for the gradient, which autograd takes minutes for

    def fit(decay: float) -> list[float]:
        w, b = torch.zeros(len(number), 1, requires_grad=True), torch.zeros(1, requires_grad=True)
        optimizer = torch.optim.LBFGS([w, b], max_iter=100, line_search_fn="strong_wolfe")

        @torch.no_grad()
        def closure() -> Tensor:
            scores = x @ w + b
            wrong = (scores.sigmoid() - y) / len(y)
            w.grad, b.grad = turned @ wrong + 2 * decay * w, wrong.sum(0)
            return F.binary_cross_entropy_with_logits(scores, y) + decay * (w**2).sum()

        optimizer.step(closure)  # type: ignore[arg-type]
        with torch.no_grad():
            return [100 * float(((x @ w + b > 0) == (y > 0.5)).float().mean()) for x, y in parts]

    fits = {decay: fit(decay) for decay in DECAYS}
    best = max(fits, key=lambda decay: fits[decay][1])
    return {"decay": best, "choose": fits[best][1], "accuracy": fits[best][2], "words": len(number)}


def random_encoder(train: Rows, folder: Path) -> None:
    """A random BERT and its word pieces, in Hugging Face's form."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = (
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
    )
    trainer = trainers.WordPieceTrainer(
        vocab_size=4000, special_tokens=special, show_progress=False
    )
    core.train_from_iterator([text for text, _ in train if len(text.split()) >= LONG], trainer)
    core.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(
        zip(
            ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True
        )
    )
    PreTrainedTokenizerFast(tokenizer_object=core, **names).save_pretrained(folder)
    torch.manual_seed(0)
    BertForMaskedLM(
        BertConfig(
            vocab_size=core.get_vocab_size(),
            hidden_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=192,
            max_position_embeddings=128,
        )
    ).save_pretrained(folder)


def own_encoder(rows: Rows, folder: Path) -> dict[str, float]:
    """Make the encoder by masked-token learning; return its losses."""
    from afina.merging.merge_into_base import merge
    from afina.training.train import train

    text = folder / "text.txt"
    text.write_text("\n\n\n".join(t for t, _ in rows if len(t.split()) >= LONG), encoding="utf-8")
    random_encoder(rows, folder / "random")
    made = train(
        text,
        base=str(folder / "random"),
        objective="mlm",
        method="full",
        learning_rate=2e-3,
        num_train_epochs=8,
        max_length=64,
        eval_size=0.02,
        max_tokens_per_batch=1024,
        output_dir=folder / "mlm",
    )
    merge(made.folder, output_dir=folder / "encoder")
    losses = made.record["losses"]
    print("mlm", losses, made.record["seconds"], flush=True)
    return {
        "mlm_loss_before": losses["eval_loss_before"],
        "mlm_loss_after": losses["eval_loss_after"],
    }


def main() -> None:
    from afina.evaluation.evaluate import evaluate
    from afina.training.train import train

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--share",
        type=float,
        default=1.0,
        help="of the rows and steps, to see whether it runs; not published",
    )
    parser.add_argument("--base", help="a published encoder instead, as sst2_NAME")
    options = parser.parse_args()
    share, sizes = options.share, PUBLISHED if options.base else OWN
    rows = read("sst-2_train.tsv")
    random.Random(0).shuffle(rows)
    rows = rows[: int(share * len(rows))]
    num_choose = min(sizes.choose, len(rows) // 4)
    choose, learn = rows[:num_choose], rows[num_choose : num_choose + sizes.learn]
    final = read("sst-2_dev.tsv")
    figures: dict[str, float] = {"rows": len(learn), "eval_rows": len(final)}
    repeats: dict[str, Any] = {"bag_of_words": bag_of_words(learn, choose, final)}
    print(repeats["bag_of_words"], flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part, of in {"learn": learn, "choose": choose, "final": final}.items():
            write(of, folder / f"{part}.tsv")
        if options.base is None:
            figures |= own_encoder(rows[num_choose:], folder)
        base = options.base or str(folder / "encoder")

        def move(method: str, rate: float, seed: int, **more: Any) -> Any:
            return train(
                folder / "learn.tsv",
                base=base,
                objective="classify",
                method=method,
                rank=8,
                seed=seed,
                learning_rate=rate,
                eval_data=folder / "choose.tsv",
                max_tokens_per_batch=sizes.batch_tokens,
                output_dir=folder / f"{method}-{rate}-{seed}",
                **more,
            )

        def accuracy_of(run: Any) -> float:
            return evaluate(run.folder, data=folder / "final.tsv").classes["accuracy"]

        probe = move("lora", 1e-12, SEARCH_SEED, max_steps=1)  # the head alone, as it begins
        figures["probe_accuracy"] = accuracy_of(probe)
        for method, rates in sizes.rates.items():
            steps = max(2, int(share * sizes.search_steps))
            trials = {
                r: move(method, r, SEARCH_SEED, max_steps=steps).record["classes"]["accuracy"]
                for r in rates
            }
            rate = max(trials, key=lambda r: trials[r])
            print(method, trials, flush=True)
            runs = []
            for seed in range(SEEDS):
                run = move(method, rate, seed, num_train_epochs=sizes.epochs)
                runs.append(
                    {
                        "accuracy": accuracy_of(run),
                        "rate": rate,
                        "seconds": run.record["seconds"],
                        "trainable": run.record["trainable_parameters"],
                    }
                )
                print(method, seed, runs[-1], flush=True)
            repeats[method] = {"trials": {str(r): a for r, a in trials.items()}, "runs": runs}
            figures[f"{method}_accuracy"] = statistics.mean(run["accuracy"] for run in runs)
            figures[f"{method}_spread"] = max(r["accuracy"] for r in runs) - min(
                r["accuracy"] for r in runs
            )
    words = repeats["bag_of_words"]["accuracy"]
    figures |= {
        "bag_of_words_accuracy": words,
        "lora_below_full": figures["full_accuracy"] - figures["lora_accuracy"],
        "full_above_words": figures["full_accuracy"] - words,
        "lora_above_words": figures["lora_accuracy"] - words,
        "size_ratio": repeats["lora"]["runs"][0]["trainable"]
        / repeats["full"]["runs"][0]["trainable"],
    }
    targets = {
        "lora_below_full": ("<=", 1.0 if options.base else 2.0),
        "full_above_words": (">=", 0.0),
        "lora_above_words": (">=", 0.0),
    }
    if share == 1.0:
        name = f"sst2_{Path(options.base).name}" if options.base else "sst2"
        publish(name, figures, targets, repeats, roofline())
    else:
        print(figures)


if __name__ == "__main__":
    main()
