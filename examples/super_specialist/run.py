"""Two specialists into one, measured: `python examples/super_specialist/run.py`

On the embedded base, from the lexicon of the recipes: one adapter learns to mend verbs, another one articles
and adjectives. A sentence with both kinds of mistake needs both. For each parent, each way of combining, weights found by
search, and one adapter trained on both kinds of rows, it counts the sentences corrected without a fault, and writes the table
to results.json and into README.md.
"""

import argparse
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from afina.adapters.active import BASE_ONLY, ActiveAdapters
from afina.adapters.attach import detach
from afina.adapters.loading import load_adapter
from afina.data.renderer import Renderer
from afina.engine.engine import generate_completions
from afina.engine.request import SamplingParams
from afina.evaluation.metrics import exact_match
from afina.io.atomic import write_json, write_text
from afina.io.composition import expand_composition
from afina.merging.combine import combine
from afina.models.causal_lm import CausalLM
from afina.models.loading import load_base
from afina.settings import ModelSettings, TrainSettings
from afina.training.train import train

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

from lexicon import LANGUAGES
from sentences import EVERYTHING, MISTAKES, Clause, draw_clause, write

HERE = Path(__file__).parent
VERBS, AGREEMENT = MISTAKES[:1], MISTAKES[1:3]  # the verb's number; articles and adjectives
ASK = {"en": "Correct: ", "es": "Corrige: "}
SKILLS = ("verbs", "agreement", "both in one")
ROWS, TESTED, FEW = 6000, 150, 80
RANK = 16

Row = dict[str, Any]
Draw = Callable[[random.Random], tuple[str, str, str]]  # (language, wrong, right)


def one_mistake(kinds: Sequence[Any], rng: random.Random) -> tuple[str, str, str]:
    """A sentence with one mistake of `kinds`."""
    while True:
        clause, language = draw_clause(rng, EVERYTHING), rng.choice(LANGUAGES)
        wrong = rng.choice(kinds)(rng, clause, language)
        if wrong is not None and wrong != write(clause, language):
            return language, wrong, write(clause, language)


def both_mistakes(rng: random.Random) -> tuple[str, str, str]:
    """A sentence with one mistake of each family."""
    while True:
        clause, language = draw_clause(rng, EVERYTHING), rng.choice(LANGUAGES)
        wrong = mixed(rng, clause, language)
        if wrong is not None:
            return language, wrong, write(clause, language)


def mixed(rng: random.Random, clause: Clause, language: str) -> str | None:
    """The clause with both: each word as the family that changed it has it; None where one cannot apply."""
    right = write(clause, language)
    first, second = VERBS[0](rng, clause, language), rng.choice(AGREEMENT)(rng, clause, language)
    if first is None or second is None or right in (first, second):
        return None
    columns = list(zip(right.split(), first.split(), second.split(), strict=False))
    if not len(right.split()) == len(first.split()) == len(second.split()) == len(columns):
        return None
    return " ".join(b if b != a else c for a, b, c in columns)


def rows(draw: Draw, count: int, seed: int, without: set[str]) -> list[Row]:
    """`count` chat rows with different answers, none of them among `without`, which they join."""
    rng, made = random.Random(seed), []
    while len(made) < count:
        language, wrong, right = draw(rng)
        if right not in without:
            without.add(right)
            messages = [
                {"role": "user", "content": ASK[language] + wrong},
                {"role": "assistant", "content": right},
            ]
            made.append({"messages": messages})
    return made


def save(path: Path, made: Sequence[Row]) -> Path:
    """A JSONL file."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made))
    return path


def make_data(folder: Path) -> tuple[dict[str, Path], dict[str, list[Row]]]:
    """(training files by adapter and the few rows for the search, test rows by skill); no answer comes twice."""
    draws: dict[str, Draw] = {
        "verbs": lambda rng: one_mistake(VERBS, rng),
        "agreement": lambda rng: one_mistake(AGREEMENT, rng),
        "both in one": both_mistakes,
    }
    seen: set[str] = set()
    tests = {skill: rows(draw, TESTED, 1, seen) for skill, draw in draws.items()}
    few = rows(draws["both in one"], FEW, 2, seen)
    learn = {skill: rows(draws[skill], ROWS, 3, seen) for skill in ("verbs", "agreement")}
    learn["trained on both"] = [row for pair in zip(*learn.values(), strict=True) for row in pair]
    files = {
        name: save(folder / f"{name.replace(' ', '-')}.jsonl", made) for name, made in learn.items()
    }
    return files | {"few": save(folder / "few.jsonl", few)}, tests


def learn(files: dict[str, Path], folder: Path, steps: int) -> Iterator[tuple[str, Path]]:
    """Train the two specialists and the one adapter on both, alike."""
    for name in ("verbs", "agreement", "trained on both"):
        settings = TrainSettings(
            data=files[name],
            eval_size=0.01,
            output_dir=folder / name.replace(" ", "-"),
            method="lora",
            rank=RANK,
            learning_rate=2e-3,
            max_steps=steps,
            max_tokens_per_batch=2048,
            eval_steps=steps,
        )
        yield name, train(settings).folder


def score(base: CausalLM, tests: dict[str, list[Row]], route: ActiveAdapters) -> dict[str, float]:
    """Percent of sentences corrected without a fault, by skill."""
    renderer = Renderer(base.tokenizer, None, base.max_positions)
    result = {}
    for skill, made in tests.items():
        prompts = [renderer.prompt(row["messages"][:1]) for row in made]
        answers = generate_completions(
            base, prompts, SamplingParams(48), route, renderer.stop_token_ids
        )
        result[skill] = exact_match(
            [a.text for a in answers], [row["messages"][1]["content"] for row in made]
        )
    return result


def score_folder(base: CausalLM, tests: dict[str, list[Row]], folder: Path) -> dict[str, float]:
    """The same with the adapter in `folder`."""
    (part,) = expand_composition(folder)
    adapter = load_adapter(part.folder, base)
    try:
        return score(base, tests, adapter.active)
    finally:
        detach(base.model, adapter)


def combinations(
    runs: dict[str, Path], few: Path, folder: Path
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each way of combining, by the name that the table shows."""
    a, b = runs["verbs"], runs["agreement"]
    half, one = [f"{a}:0.5", f"{b}:0.5"], [str(a), str(b)]
    ways: dict[str, dict[str, Any]] = {
        "mean (sum of halves)": {"parts": half, "merge_method": "sum"},
        "sum": {"parts": one, "merge_method": "sum"},
        f"svd, rank {RANK}": {"parts": one, "merge_method": "svd", "rank": RANK},
        "slerp": {"parts": one, "merge_method": "slerp"},
        "ties": {"parts": one, "merge_method": "ties"},
        "magnitude_prune": {"parts": one, "merge_method": "magnitude_prune"},
        "dare_linear": {"parts": one, "merge_method": "dare_linear", "density": 0.9},
        "della": {"parts": one, "merge_method": "della", "density": 0.9},
        "searched weights": {
            "parts": one,
            "merge_method": "search",
            "data": few,
            "l1_penalty": 0.005,
            "max_evals": 40,
        },
    }
    for number, (name, settings) in enumerate(ways.items()):
        out = folder / f"way-{number}"
        yield name, combine(settings.pop("parts"), output_dir=out, **settings)


def main() -> None:
    """Run all of it and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each adapter")
    parser.add_argument(
        "--out", type=Path, default=HERE, help="where results.json and README.md are written"
    )
    arguments = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files, tests = make_data(folder)
        base = load_base(**ModelSettings().model_dump())
        table: dict[str, dict[str, float]] = {"base": score(base, tests, BASE_ONLY)}
        runs = dict(learn(files, folder, arguments.steps))
        for label, run in runs.items():
            table[label if label.startswith("trained") else f"{label} alone"] = score_folder(
                base, tests, run
            )
            print(label, table, flush=True)
        about: dict[str, Any] = {}
        for label, made in combinations(runs, files["few"], folder):
            table[label] = score_folder(base, tests, Path(made["out"]))
            weights = [parent["weight"] for parent in made["parents"]]
            about[label] = {"weights": weights, "energy": made.get("energy", {}).get("mean", 1.0)}
            print(label, table[label], weights, flush=True)
    seconds = time.perf_counter() - start
    story = {
        "seconds": round(seconds),
        "cpu_seconds": round(time.process_time()),
        "steps": arguments.steps,
        "tested": TESTED,
        "table": table,
        "combinations": about,
    }
    write_json(arguments.out / "results.json", story)
    publish(arguments.out / "README.md", markdown(story))


def kept(table: dict[str, dict[str, float]], row: str) -> float:
    """The least share of a parent's gain on its own skill that a row keeps, percent."""
    gain = lambda who, skill: table[who][skill] - table["base"][skill]
    return min(100 * gain(row, skill) / gain(f"{skill} alone", skill) for skill in SKILLS[:2])


def markdown(story: dict[str, Any]) -> str:
    """The table, percent of sentences corrected without a fault."""
    lines = [
        "| | verbs | agreement | both in one | weights | energy kept | least gain kept |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, scores in story["table"].items():
        about = story["combinations"].get(row)
        more = (
            [", ".join(f"{w:g}" for w in about["weights"]), f"{100 * about['energy']:.0f}%"]
            if about
            else ["", ""]
        )
        share = f"{kept(story['table'], row):.0f}%" if about or row.startswith("trained") else ""
        lines.append(
            f"| {row} | " + " | ".join([*(f"{scores[s]:.1f}" for s in SKILLS), *more, share]) + " |"
        )
    time_taken = f"{story['seconds']} s in all, of which {story['cpu_seconds']} s of computing"
    lines += [
        "",
        f"{story['tested']} new sentences a column; {story['steps']} steps an adapter; {time_taken}.",
    ]
    return "\n".join(lines)


def publish(readme: Path, table: str) -> None:
    """Put the table between the marks of the README, or print it where there is none."""
    print(table)
    if readme.is_file():
        text = readme.read_text(encoding="utf-8")
        marks = re.compile(r"(<!-- table -->\n).*(\n<!-- end -->)", re.DOTALL)
        write_text(readme, marks.sub(lambda found: found[1] + table + found[2], text))


if __name__ == "__main__":
    main()
