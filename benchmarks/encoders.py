"""Encoders: what each task scores beside the simplest alternative, and what it costs. `python benchmarks/encoders.py PART`

The base is all-MiniLM-L6-v2 (--base FOLDER), LoRA r8 on all linear layers, in float32.

embed    MBPP: descriptions of functions and their code as pairs. sentence-transformers with PEFT trains on the same rows, with
         the same pairs a batch, rate, schedule, seeds and epochs, and its other defaults (--peer PYTHON, its environment).
         Sides run in turn, each in a process of its own. nDCG@10 of 100 other descriptions among their codes.
rerank   MBPP: a description with its code, and with 5 others that share most words with it. The alternative: the cosine of the
         frozen base's vectors on the same candidates. nDCG@10 of other descriptions.
tag      E2E: names, places, kinds of food ... tagged where the record of the restaurant has them. The alternative: the longest
         match in a list of all that is tagged in training, with its most frequent kind. Entity F1 on the test file.
serve    64 rows with an adapter each in one batch, beside the same 64 rows on the base alone, in turn.

Each part is published as encoders_PART.
"""

import argparse
import json
import math
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from common import SHARED, interleave, median, peak_mb, publish, roofline

PAIRS, RATE, EPOCHS, SEEDS, LENGTH = 32, 5e-4, 2, 2, 96
TRAIN_PAIRS, EVAL_QUERIES, RERANK_QUERIES, CANDIDATES = 256, 100, 80, 6
TAG_TRAIN, TAG_EVAL = 400, 200
LEARNING: dict[str, Any] = {  # of every run here; evaluated at the end only
    "rank": 8,
    "alpha": 16,
    "num_train_epochs": EPOCHS,
    "eval_steps": 10**6,
}
SERVED, SERVE_REPEATS = 64, 30
KINDS = ("name", "near", "food", "eatType", "area", "priceRange", "customer rating")
Rows = list[dict[str, Any]]


def write(rows: Rows, file: Path) -> Path:
    """Write rows as JSONL."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read(file: Path) -> Rows:
    """Read rows of JSONL."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def ndcg(ranks: list[int]) -> float:
    """Return the mean nDCG@10 in percent from the ranks, from 1, of the only relevant items."""
    return 100 * statistics.mean(1 / math.log2(1 + rank) if rank <= 10 else 0.0 for rank in ranks)


def mbpp_pairs() -> tuple[Rows, Rows]:
    """Return training and eval pairs of a description and its code."""
    rows = [
        {"anchor": r["text"], "positive": r["code"].replace("\r\n", "\n")}
        for r in read(SHARED / "data/mbpp/mbpp.jsonl")
    ]
    random.Random(0).shuffle(rows)
    return rows[EVAL_QUERIES:], rows[:EVAL_QUERIES]


# ---- embed


def ours_embed(folder: Path, base: str, seed: int) -> dict[str, float]:
    """Train embeddings by afina; the loop's seconds without loading and scores."""
    from afina.training.train import train

    begin = time.perf_counter()
    run = train(
        folder / "train.jsonl",
        base=base,
        objective="embed",
        eval_data=folder / "eval.jsonl",
        output_dir=folder / f"afina-{seed}",
        overwrite=True,
        learning_rate=RATE,
        lr_scheduler_type="linear",
        **LEARNING,
        max_length=LENGTH,
        truncate=True,
        seed=seed,
        embed={"pairs_per_batch": PAIRS},
    )
    seconds = time.perf_counter() - begin
    steps = read(run.folder / "metrics.jsonl")
    scores = run.record["embedding"]
    return {
        "before": scores["before"]["ndcg_at_10"],
        "after": scores["after"]["ndcg_at_10"],
        "train_seconds": sum(step.get("seconds", 0.0) for step in steps),
        "run_seconds": seconds,
        "steps": run.record["steps"],
        "peak_mb": peak_mb(),
    }


def peer_embed(folder: Path, base: str, seed: int) -> dict[str, float]:
    """Train the same by sentence-transformers and PEFT."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    begin = time.perf_counter()
    model = SentenceTransformer(base, device="cpu")
    model.max_seq_length = LENGTH
    pairs, held = read(folder / "train.jsonl"), read(folder / "eval.jsonl")

    def score() -> float:
        sides = [
            model.encode([row[name] for row in held], convert_to_tensor=True)
            for name in ("anchor", "positive")
        ]
        a, b = (torch.nn.functional.normalize(side, dim=-1) for side in sides)
        cosines = a @ b.T
        own = cosines.diagonal()[:, None]
        return ndcg(((cosines > own).sum(1) + 1).tolist())

    before = score()
    names = ["query", "key", "value", "dense"]
    torch.manual_seed(seed)
    model.add_adapter(
        LoraConfig(task_type="FEATURE_EXTRACTION", r=8, lora_alpha=16, target_modules=names)
    )
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder / "peer"),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=PAIRS,
        learning_rate=RATE,
        warmup_ratio=0.05,
        seed=seed,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(pairs),
        loss=MultipleNegativesRankingLoss(model),
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    after = score()
    return {
        "before": before,
        "after": after,
        "train_seconds": seconds,
        "run_seconds": time.perf_counter() - begin,
        "steps": trainer.state.global_step,
        "peak_mb": peak_mb(),
    }


def embed(folder: Path, base: str, peer: str) -> None:
    """Publish the part `embed`."""
    train_rows, eval_rows = mbpp_pairs()
    train_rows = train_rows[:TRAIN_PAIRS]
    write(train_rows, folder / "train.jsonl")
    write(eval_rows, folder / "eval.jsonl")
    common = ["--folder", str(folder), "--base", base]
    runs: dict[str, list[dict[str, float]]] = {"afina": [], "peer": []}
    for seed in range(SEEDS):
        own = [*common, "--seed", str(seed)]
        found = interleave(
            {
                "afina": (sys.executable, [__file__, "ours-embed", *own]),
                "peer": (peer, [__file__, "peer-embed", *own]),
            },
            1,
        )
        for name in runs:
            runs[name] += found[name]
    ours, theirs = (
        {key: median(runs[name], key) for key in runs[name][0]} for name in ("afina", "peer")
    )
    figures = {
        "pairs": len(train_rows),
        "eval_queries": len(eval_rows),
        "base_ndcg": ours["before"],
        "base_ndcg_peer": theirs["before"],
        "ndcg": statistics.mean(run["after"] for run in runs["afina"]),
        "ndcg_peer": statistics.mean(run["after"] for run in runs["peer"]),
        "train_seconds": ours["train_seconds"],
        "train_seconds_peer": theirs["train_seconds"],
        "peak_mb": ours["peak_mb"],
        "peak_mb_peer": theirs["peak_mb"],
    }
    figures |= {
        "below_peer": figures["ndcg_peer"] - figures["ndcg"],
        "speed_ratio": theirs["train_seconds"] / ours["train_seconds"],
        "run_ratio": theirs["run_seconds"] / ours["run_seconds"],
        "memory_ratio": ours["peak_mb"] / theirs["peak_mb"],
    }
    targets = {
        "below_peer": ("<=", 1.0),
        "speed_ratio": (">=", 5.0),
        "memory_ratio": ("<=", 1.0),
    }
    publish("encoders_embed", figures, targets, runs, roofline())


# ---- rerank


def candidates(rows: Rows, pool: list[str]) -> Rows:
    """Return each description with its code and the others of `pool` that share most words."""
    words = [set(re.findall(r"[a-z]{3,}", code.lower())) for code in pool]
    counts = Counter(word for own in words for word in own)
    found = []
    for row in rows:
        asked = set(re.findall(r"[a-z]{3,}", row["anchor"].lower()))
        shared = [sum(1 / counts[word] for word in asked & own) for own in words]
        near = sorted(range(len(pool)), key=lambda n: -shared[n])
        others = [pool[n] for n in near if pool[n] != row["positive"]][: CANDIDATES - 1]
        for code, label in [(row["positive"], 1), *((code, 0) for code in others)]:
            found.append({"query": row["anchor"], "passage": code, "label": label})
    return found


def cosine_ndcg(base: str, rows: Rows) -> float:
    """Return the nDCG@10 of ranking by the cosine of the frozen base's vectors."""
    import torch

    from afina.models.encoder import load_encoder

    encoder = load_encoder(base)
    texts = list(dict.fromkeys(t for r in rows for t in (r["query"], r["passage"])))
    vectors = []
    with torch.no_grad():
        for start in range(0, len(texts), 32):
            tokens = [encoder.encode(t)[:LENGTH] for t in texts[start : start + 32]]
            vectors.append(encoder.embed(encoder.batch(tokens)))
    units = torch.nn.functional.normalize(torch.cat(vectors), dim=-1)
    of = {text: units[n] for n, text in enumerate(texts)}
    by_query: dict[str, Rows] = {}
    for row in rows:
        by_query.setdefault(row["query"], []).append(row)
    ranks = []
    for own in by_query.values():
        scores = [float(of[r["query"]] @ of[r["passage"]]) for r in own]
        relevant = next(s for s, r in zip(scores, own, strict=True) if r["label"])
        ranks.append(1 + sum(score > relevant for score in scores))
    return ndcg(ranks)


def rerank(folder: Path, base: str, peer: str) -> None:
    """Publish the part `rerank`."""
    from afina.training.train import train

    train_rows, eval_rows = mbpp_pairs()
    pool = [row["positive"] for row in train_rows[RERANK_QUERIES:]]
    held = candidates(eval_rows[:60], pool)
    write(candidates(train_rows[:RERANK_QUERIES], pool), folder / "train.jsonl")
    write(held, folder / "eval.jsonl")
    runs = []
    for seed in range(SEEDS):
        run = train(
            folder / "train.jsonl",
            base=base,
            objective="rerank",
            eval_data=folder / "eval.jsonl",
            output_dir=folder / f"rerank-{seed}",
            **LEARNING,
            max_length=LENGTH,
            truncate=True,
            seed=seed,
        )
        scores = run.record["classes"]
        runs.append(
            {
                "ndcg": scores["ndcg_at_10"],
                "probe": scores["probe"]["ndcg_at_10"],
                "average_precision": scores["average_precision"],
                "seconds": run.record["seconds"],
            }
        )
        print(runs[-1], flush=True)
    figures = {
        "rows": RERANK_QUERIES * CANDIDATES,
        "eval_queries": 60,
        "ndcg": statistics.mean(run["ndcg"] for run in runs),
        "probe_ndcg": statistics.mean(run["probe"] for run in runs),
        "cosine_ndcg": cosine_ndcg(base, held),
        "peak_mb": peak_mb(),
    }
    figures["above_cosine"] = figures["ndcg"] - figures["cosine_ndcg"]
    targets = {"above_cosine": (">=", 0.0)}
    publish("encoders_rerank", figures, targets, {"runs": runs}, roofline())


# ---- tag


def e2e_rows(file: Path) -> Rows:
    """Return sentences with tags where the words of a record's values stand."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        record, _, text = line.partition("||")
        words = text.split()
        tags = ["O"] * len(words)
        slots = dict(part.strip().split(" : ", 1) for part in record.split("|") if " : " in part)
        for kind in KINDS:
            value = slots.get(kind, "").lower().split()
            for start in range(len(words) - len(value) + 1):
                there = [word.lower() for word in words[start : start + len(value)]]
                if value and there == value and set(tags[start : start + len(value)]) == {"O"}:
                    short = kind.replace(" ", "_").upper()
                    tags[start : start + len(value)] = [f"B-{short}"] + [f"I-{short}"] * (
                        len(value) - 1
                    )
        rows.append({"tokens": words, "tags": tags})
    return rows


def list_tags(train_rows: Rows, rows: Rows) -> list[list[str]]:
    """Return the tags of the longest matches in a list of what is tagged in training."""
    known: dict[tuple[str, ...], Counter[str]] = {}
    for row in train_rows:
        start = 0
        while start < len(row["tags"]):
            end = start + 1
            if row["tags"][start] != "O":
                while end < len(row["tags"]) and row["tags"][end].startswith("I-"):
                    end += 1
                words = tuple(word.lower() for word in row["tokens"][start:end])
                known.setdefault(words, Counter())[row["tags"][start][2:]] += 1
            start = end
    longest = max(map(len, known))
    found = []
    for row in rows:
        words, tags, at = [word.lower() for word in row["tokens"]], ["O"] * len(row["tokens"]), 0
        while at < len(words):
            spans = range(min(longest, len(words) - at), 0, -1)
            sizes = (n for n in spans if tuple(words[at : at + n]) in known)
            size = next(sizes, 0)
            if size:
                kind = known[tuple(words[at : at + size])].most_common(1)[0][0]
                tags[at : at + size] = [f"B-{kind}"] + [f"I-{kind}"] * (size - 1)
            at += max(1, size)
        found.append(tags)
    return found


def tag(folder: Path, base: str, peer: str) -> None:
    """Publish the part `tag`."""
    from afina.objectives.entity_scores import tag_scores
    from afina.training.train import train

    train_rows, held = (e2e_rows(SHARED / f"data/e2e-nlg/{n}.txt") for n in ("valid", "test"))
    for rows, size in ((train_rows, TAG_TRAIN), (held, TAG_EVAL)):
        random.Random(0).shuffle(rows)
        del rows[size:]
    write(train_rows, folder / "train.jsonl")
    write(held, folder / "eval.jsonl")
    listed = tag_scores(
        [tuple(tags) for tags in list_tags(train_rows, held)], [tuple(r["tags"]) for r in held]
    )
    runs = []
    for seed in range(SEEDS):
        run = train(
            folder / "train.jsonl",
            base=base,
            objective="tag",
            eval_data=folder / "eval.jsonl",
            output_dir=folder / f"tag-{seed}",
            **LEARNING,
            skip_bad_rows=True,
            seed=seed,
        )
        scores = run.record["classes"]
        probe = (scores.get("probe") or {}).get("f1")
        runs.append({"f1": scores["f1"], "probe": probe, "seconds": run.record["seconds"]})
        print(runs[-1], flush=True)
    figures = {
        "rows": len(train_rows),
        "eval_rows": len(held),
        "entity_f1": statistics.mean(run["f1"] for run in runs),
        "list_f1": listed["f1"],
        "peak_mb": peak_mb(),
    }
    if all(run["probe"] is not None for run in runs):
        figures["probe_f1"] = statistics.mean(run["probe"] for run in runs)
    figures["above_list"] = figures["entity_f1"] - figures["list_f1"]
    targets = {"above_list": (">=", 0.0)}
    publish("encoders_tag", figures, targets, {"runs": runs}, roofline())


# ---- serve


def serve(folder: Path, base: str, peer: str) -> None:
    """Publish the part `serve`."""
    import torch

    from afina.adapters.attach import attach, detach
    from afina.adapters.saving import save_adapter
    from afina.adapters.target_selection import resolve_target_modules
    from afina.engine.encoder_engine import EncoderEngine
    from afina.engine.request import AdapterWeight
    from afina.io.adapter_config import AdapterConfig
    from afina.models.encoder import EMBEDDING_KEY, load_encoder
    from afina.models.encoder_views import load_encoder_views
    from afina.settings import ServeSettings

    vectors = load_encoder(base)
    targets = resolve_target_modules(vectors.model, "all-linear", None, False)
    for number in range(SERVED):
        torch.manual_seed(number)
        config = AdapterConfig("lora", targets, rank=8, alpha=16)
        adapter = attach(vectors.model, vectors.forward_context, "a", config)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.normal_(std=0.02)
        about = {EMBEDDING_KEY: vectors.embedding.record()}
        save_adapter(adapter, vectors, folder / str(number) / "adapter", about)
        detach(vectors.model, adapter)
    del vectors
    engine = EncoderEngine(load_encoder_views(ServeSettings(base=base, dtype="float32")))
    for number in range(SERVED):
        engine.registry.add(str(number), folder / str(number))
    texts = [" ".join(row["tokens"]) for row in e2e_rows(SHARED / "data/e2e-nlg/test.txt")[:SERVED]]

    def seconds(with_adapters: bool) -> float:
        futures = []
        for number, text in enumerate(texts):
            entry = engine.registry.get(str(number))
            own = (AdapterWeight(entry.hash),) if with_adapters and entry else ()
            rows = [engine.view(own, True).encode(text)]
            futures.append(engine.submit(rows, own, is_embedding=True))
        steps, busy = engine.steps, engine.busy_seconds
        while not all(future.done() for future in futures):
            engine.step()
        assert engine.steps == steps + 1, "more than one batch"
        return engine.busy_seconds - busy

    for which in (True, False):
        seconds(which)
    runs = [
        {"adapters_ms": 1e3 * seconds(True), "base_ms": 1e3 * seconds(False)}
        for _ in range(SERVE_REPEATS)
    ]
    figures = {
        "adapters": SERVED,
        "tokens": sum(len(engine.view((), True).encode(text)) for text in texts),
        "adapters_ms": median(runs, "adapters_ms"),
        "base_ms": median(runs, "base_ms"),
    }
    figures["rate_ratio"] = statistics.median(r["base_ms"] / r["adapters_ms"] for r in runs)
    publish("encoders_serve", figures, {"rate_ratio": (">=", 0.9)}, {"runs": runs}, roofline())


PARTS = {"embed": embed, "rerank": rerank, "tag": tag, "serve": serve}
SIDES = {"ours-embed": ours_embed, "peer-embed": peer_embed}


def main() -> None:
    """Run a part, or one of its sides."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=[*PARTS, *SIDES])
    parser.add_argument("--base", default=str(Path.home() / ".cache/afina-real/minilm"))
    parser.add_argument("--peer", default=sys.executable, help="python with sentence-transformers")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.part in SIDES:
        print(json.dumps(SIDES[options.part](options.folder, options.base, options.seed)))
        return
    with tempfile.TemporaryDirectory() as name:
        PARTS[options.part](Path(name), options.base, options.peer)


if __name__ == "__main__":
    main()
