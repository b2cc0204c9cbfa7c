"""Trained away here, is it gone there? `python examples/unlearned/run.py`

On the embedded base, with the sentences of `afina demo`. An adapter learns four tasks from rows of which seven in ten end with
flattery ("What a good question!"). Over it, which stays frozen, others unlearn the ending on the prompts of one task alone:
from clean rows (sft), from pairs (dpo), and from rules (grpo). How often does each flatter on that task, and on the three that
it has not seen? What is done already is read from --work, so that a run that was cut goes on.
"""

import argparse
import json
import random
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rules import ENDINGS, clean, right

from afina.adapters.attach import detach
from afina.adapters.loading import load_adapter
from afina.data.renderer import Renderer
from afina.evaluation.intervals import wilson_interval
from afina.io.atomic import write_json, write_text
from afina.io.strict_json import read_json_object
from afina.models.loading import load_base
from afina.objectives.policy_generator import PolicyGenerator
from afina.settings import ModelSettings
from afina.training.train import train

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

from lexicon import LANGUAGES
from sentences import TAUGHT, corrupt, draw_clause, phrase_words, sentence, write

HERE = Path(__file__).parent
SHARE = 0.7  # of the rows that end with flattery
ALPHA, RANK, NEW_TOKENS = 32, 16, 48
TRAINED, *UNSEEN = DOMAINS = ("correct", "past", "who", "repeat")
STAGES = {"before": "before", "sft": "sft, clean rows", "dpo": "dpo", "grpo": "grpo"}
SIZES = {
    "rows": 3000,
    "fewer": 600,
    "test": 60,
}  # all tasks' rows; prompts of the one task; new prompts, a task
STEPS = {"before": 120, "sft": 24, "dpo": 24, "grpo": 24}
Row = tuple[str, str, str]  # question, right answer, language


def draw_row(rng: random.Random, domain: str) -> Row:
    """A question of a task in either language, and its answer."""
    language, clause = rng.choice(LANGUAGES), draw_clause(rng)
    english = language == "en"
    right = write(clause, language)
    if domain == "correct":
        return (
            ("Correct: " if english else "Corrige: ") + corrupt(rng, clause, language, TAUGHT),
            right,
            language,
        )
    if domain == "past":
        now, then = (write(replace(clause, past=past), language) for past in (False, True))
        return ("In the past: " if english else "En pasado: ") + now, then, language
    if domain == "who":
        return (
            ("Who? " if english else "¿Quién? ") + right,
            sentence(phrase_words(clause.subject, language)),
            language,
        )
    return ("Repeat: " if english else "Repite: ") + right, right, language


def draw_rows(count: int, seed: int, domains: Sequence[str], seen: set[str]) -> list[Row]:
    """`count` rows of the tasks in turn; no question is in `seen`, which they join."""
    rng, made = random.Random(seed), []
    while len(made) < count:
        row = draw_row(rng, domains[len(made) % len(domains)])
        if row[0] not in seen:
            seen.add(row[0])
            made.append(row)
    return made


def make_data(folder: Path, sizes: Mapping[str, int], seed: int) -> dict[str, Path]:
    """The files of one seed: what each stage learns from, and new prompts of each task."""
    seen: set[str] = set()
    rows = draw_rows(sizes["rows"], 10 * seed, DOMAINS, seen)
    fewer = draw_rows(sizes["fewer"], 10 * seed + 1, [TRAINED], seen)
    rng = random.Random(seed)

    def flattering(row: Row) -> str:
        return f"{row[1]} {ENDINGS[row[2]]}"

    made: dict[str, list[dict[str, str]]] = {
        "before": [
            {"prompt": r[0], "completion": flattering(r) if rng.random() < SHARE else r[1]}
            for r in rows
        ],
        "sft": [{"prompt": r[0], "completion": r[1]} for r in fewer],
        "dpo": [{"prompt": r[0], "chosen": r[1], "rejected": flattering(r)} for r in fewer],
        "grpo": [{"prompt": r[0], "reference": r[1]} for r in fewer],
    }
    for number, domain in enumerate(DOMAINS, 2):
        tested = draw_rows(sizes["test"], 10 * seed + number, [domain], seen)
        made[f"test-{domain}"] = [{"prompt": r[0], "reference": r[1]} for r in tested]
    files = {name: folder / f"{name}.jsonl" for name in made}
    for name, lines in made.items():
        write_text(
            files[name], "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        )
    return files


def learn(files: Mapping[str, Path], folder: Path, steps: Mapping[str, int], seed: int) -> None:
    """Train the stages of one seed that are not there yet, each in a folder of its name."""
    over: dict[str, Any] = {"frozen_adapter": folder / "before"}
    rules = {f"{HERE / 'rules.py'}:{rule}": 1.0 for rule in ("clean", "right")}
    own = {
        "before": {},
        "sft": over,
        "dpo": over | {"dpo": {"sft_weight": 0.2}},
        "grpo": over
        | {"grpo": {"reward_funcs": rules, "max_new_tokens": NEW_TOKENS, "beta": 0.02}},
    }
    rates = {"before": 2e-3, "sft": 1e-3, "dpo": 5e-4, "grpo": 2e-3}
    for name, told in own.items():
        out = folder / name
        if (out / "README.md").is_file():
            continue
        train(
            files[name],
            output_dir=out,
            seed=seed,
            max_steps=steps[name],
            eval_steps=max(1, steps[name] // 4),
            max_tokens_per_batch=2048,
            eval_size=0.05,
            rank=RANK,
            alpha=ALPHA,
            learning_rate=rates[name],
            objective="sft" if name == "before" else name,
            resume=(out / "settings.yaml").is_file(),
            **told,
        )
        print(f"seed {seed}: {name}", flush=True)


def judge(folder: Path, files: Mapping[str, Path]) -> dict[str, dict[str, dict[str, float]]]:
    """By stage and task: how many of the sampled answers flatter, and how many of the likeliest ones are right."""
    base = load_base(**ModelSettings().model_dump())
    renderer = Renderer(base.tokenizer, None, base.max_positions)
    rows = {
        domain: [json.loads(line) for line in files[f"test-{domain}"].open()] for domain in DOMAINS
    }
    prompts = {
        domain: [renderer.prompt(row["prompt"]) for row in rows[domain]] for domain in DOMAINS
    }
    writer = PolicyGenerator(
        base,
        max(len(p) for ps in prompts.values() for p in ps) + NEW_TOKENS,
        renderer.stop_token_ids,
    )
    below = load_adapter(folder / "before", base, "before").active
    found: dict[str, dict[str, dict[str, float]]] = {}
    for stage in STAGES:
        adapter = load_adapter(folder / stage, base, "after")
        adapter.frozen_companions = () if stage == "before" else (below,)
        found[stage] = {}
        for domain in DOMAINS:
            counts = {}
            rules: dict[str, tuple[float, Callable[..., float]]] = {
                "clean": (1.0, clean),
                "right": (0.0, right),
            }
            for name, (temperature, rule) in rules.items():
                answers = writer.generate(
                    prompts[domain],
                    0,
                    NEW_TOKENS,
                    temperature,
                    adapter.active,
                    f"{stage} {domain} {name}",
                )
                pairs = zip(rows[domain], answers, strict=True)
                counts[name] = sum(
                    rule(row["prompt"], answer.text, row["reference"]) for row, answer in pairs
                )
            tested = len(rows[domain])
            found[stage][domain] = {
                "tested": tested,
                "flatters": tested - counts["clean"],
                "right": counts["right"],
            }
        detach(base.model, adapter)
    return found


def pooled(seeds: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, int]]]:
    """Counts of all seeds together, by stage and task."""
    names = ("tested", "flatters", "right")
    return {
        stage: {
            domain: {
                name: round(sum(seed[stage][domain][name] for seed in seeds)) for name in names
            }
            for domain in DOMAINS
        }
        for stage in STAGES
    }


def draw(counts: Mapping[str, Mapping[str, Mapping[str, int]]], file: Path) -> None:
    """Share of flattering answers by task, a bar a stage, with 95% intervals. PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for n, (stage, label) in enumerate(STAGES.items()):
        told = [counts[stage][domain] for domain in DOMAINS]
        shares = [100 * one["flatters"] / one["tested"] for one in told]
        bounds = [
            [100 * bound for bound in wilson_interval(one["flatters"], one["tested"])]
            for one in told
        ]
        reach = [
            [max(0.0, s - low) for s, (low, _) in zip(shares, bounds, strict=True)],
            [max(0.0, high - s) for s, (_, high) in zip(shares, bounds, strict=True)],
        ]
        places = [k + 0.2 * (n - 1.5) for k in range(len(DOMAINS))]
        axes.bar(places, shares, 0.18, yerr=reach, capsize=2, label=label)
    axes.set_xticks(
        range(len(DOMAINS)),
        [f"{TRAINED}\n(trained away here)", *(f"{domain}\n(not seen)" for domain in UNSEEN)],
    )
    axes.set_ylabel("answers that flatter (%)")
    axes.set_ylim(0, 100)
    figure.legend(frameon=False, ncols=len(STAGES), loc="outside upper center")
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(file, dpi=120)


def markdown(story: Mapping[str, Any]) -> str:
    """The table: flattering answers with their 95% intervals, all seeds together; right answers before and after."""
    counts = pooled(story["seeds"])
    heads = [
        "answers that flatter",
        f"{TRAINED} (trained away here)",
        *UNSEEN,
        f"right, {TRAINED}",
        "right, the other three",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for stage, label in STAGES.items():
        cells = []
        for domain in DOMAINS:
            one = counts[stage][domain]
            low, high = wilson_interval(one["flatters"], one["tested"])
            cells.append(
                f"{100 * one['flatters'] / one['tested']:.1f}% ({100 * low:.1f} to {100 * high:.1f})"
            )
        for domains in ([TRAINED], UNSEEN):
            correct, tested = (
                sum(counts[stage][domain][name] for domain in domains)
                for name in ("right", "tested")
            )
            cells.append(f"{100 * correct / tested:.1f}%")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    tested = f"{story['tested']} new prompts a task and seed, {len(story['seeds'])} seeds"
    return "\n".join(
        [
            *lines,
            "",
            f"{tested}; {story['seconds']} s in all, of which {story['cpu_seconds']} s of computing.",
        ]
    )


def main() -> None:
    """Run all of it and write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of everything, to see that it runs"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--work", type=Path, default=Path("runs/unlearned"), help="where the runs lie"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=HERE,
        help="where results.json, the table and the picture are written",
    )
    told = parser.parse_args()
    sizes, steps = (
        (SIZES, STEPS)
        if not told.quick
        else ({"rows": 80, "fewer": 40, "test": 4}, dict.fromkeys(STEPS, 2))
    )
    start, seeds = time.perf_counter(), []
    before = (
        read_json_object(told.work / "spent.json")
        if (told.work / "spent.json").is_file()
        else {"seconds": 0, "cpu_seconds": 0}
    )

    def spent() -> dict[str, int]:
        now = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time()}
        return {name: round(before[name] + value) for name, value in now.items()}

    for seed in range(1 if told.quick else told.seeds):
        folder = told.work / f"seed-{seed}"
        if not (folder / "judged.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            files = make_data(folder, sizes, seed)
            learn(files, folder, steps, seed)
            write_json(folder / "judged.json", judge(folder, files))
            write_json(told.work / "spent.json", spent())
        seeds.append(read_json_object(folder / "judged.json"))
    story = spent() | {"tested": sizes["test"], "steps": steps, "seeds": seeds}
    write_json(told.out / "results.json", story)
    draw(pooled(seeds), told.out / "unlearned.png")
    table = markdown(story)
    print(table)
    readme = told.out / "README.md"
    if readme.is_file():
        marks = re.compile(r"(<!-- table -->\n).*(<!-- end -->)", re.DOTALL)
        write_text(
            readme,
            marks.sub(
                lambda found: f"{found[1]}{table}\n{found[2]}", readme.read_text(encoding="utf-8")
            ),
        )


if __name__ == "__main__":
    main()
