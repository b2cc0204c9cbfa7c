"""From imitation to what is wanted, measured: `python examples/rlhf/run.py`

On the embedded base, with the sentences of `afina demo`. The rows to imitate correct sentences in three manners; one is wanted
("Here it is: ..."), one has a word that is not. Over the adapter that imitates, which stays frozen, others learn what is
wanted: from pairs (dpo), and from a reward model and a rule (grpo, with rank 1 and rank 16). Each is judged on new sentences
by the rules; then the adapter that imitates and the one that was aligned over it are put together in every way (stacked.py).
What is done already is read from --work, so that a run that was cut goes on.
"""

import argparse
import json
import random
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stacked import stack, stack_markdown

from afina.adapters.attach import detach
from afina.adapters.loading import load_adapter
from afina.data.renderer import Renderer
from afina.data.schemas import PromptRow
from afina.evaluation.intervals import wilson_interval
from afina.io.atomic import write_json, write_text
from afina.io.strict_json import read_json_object
from afina.models.loading import load_base
from afina.objectives.policy_data import TokenizedPrompt
from afina.objectives.policy_generator import PolicyGenerator
from afina.objectives.policy_gradients import GRPOObjective
from afina.objectives.reference import ReferencePolicy
from afina.objectives.reward_functions import load_reward_functions
from afina.settings import GRPOSettings, ModelSettings
from afina.training.train import train
from afina.training.trainer import read_metrics

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

from lexicon import LANGUAGES
from sentences import TAUGHT, corrupt, draw_clause, write

HERE = Path(__file__).parent
RULES = {name: f"{HERE / 'rules.py'}:{name}" for name in ("form", "clean", "right")}
MANNERS = ("Here it is: {}", "{}", "Well, {}")  # wanted, plain, with the unwanted word
SHARES = (2, 5, 3)  # how often each is imitated, of ten
ASK = {"en": "Correct: ", "es": "Corrige: "}
NEW_TOKENS = 40
RANKS = (1, 16)
# twice the larger rank, for both: alpha / rank makes up for the fewer columns. By default alpha is twice the rank itself, and
# at the same rate a rank-1 adapter moves a sixteenth as far: in 24 steps at 1e-3 its reward rose from 1.427 to 1.437 only
ALPHA = 32
STAGES = ("sft", "dpo", *(f"grpo, rank {rank}" for rank in RANKS))
NAMES = {
    "reward": "reward",
    "form": "wanted form",
    "clean": "no unwanted word",
    "right": "task score",
}


def sentences(count: int, seed: int, without: set[str]) -> list[tuple[str, str]]:
    """(question, right sentence); none is among `without`, which they join."""
    rng, made = random.Random(seed), []
    while len(made) < count:
        clause, language = draw_clause(rng), rng.choice(LANGUAGES)
        right = write(clause, language)
        if right not in without:
            without.add(right)
            made.append((ASK[language] + corrupt(rng, clause, language, TAUGHT), right))
    return made


def make_data(folder: Path, sizes: dict[str, int], seed: int) -> dict[str, Path]:
    """The files of one seed: rows to imitate, pairs, prompts to answer, and those to judge by."""
    seen: set[str] = set()
    made = {
        name: sentences(count, 10 * seed + n, seen) for n, (name, count) in enumerate(sizes.items())
    }
    rng = random.Random(seed)

    def pair(question: str, right: str) -> dict[str, str]:
        worse = rng.choice(MANNERS[1:])
        return {
            "prompt": question,
            "chosen": MANNERS[0].format(right),
            "rejected": worse.format(right),
        }

    makers: dict[str, Callable[[str, str], dict[str, str]]] = {
        "sft": lambda q, r: {"prompt": q, "completion": rng.choices(MANNERS, SHARES)[0].format(r)},
        "pairs": pair,
        "prompts": lambda q, r: {"prompt": q, "reference": r},
        "test": lambda q, r: {"prompt": q, "reference": r},
    }
    files = {}
    for name, rows in made.items():
        files[name] = folder / f"{name}.jsonl"
        write_text(
            files[name],
            "".join(json.dumps(makers[name](*row), ensure_ascii=False) + "\n" for row in rows),
        )
    return files


def learn(
    files: dict[str, Path], folder: Path, steps: dict[str, int], seed: int
) -> dict[str, Path]:
    """Train all stages of one seed that are not there yet; returns the run folders of those that learned over the first."""
    over = {"frozen_adapter": folder / "sft"}
    judged = {
        "reward_funcs": {str(folder / "judge"): 1.0, RULES["right"]: 2.0},
        "max_new_tokens": NEW_TOKENS,
        "beta": 0.02,
    }
    plans: dict[str, tuple[Path, dict[str, Any]]] = {
        "sft": (files["sft"], {"objective": "sft", "rank": 16, "learning_rate": 2e-3}),
        "judge": (files["pairs"], {"objective": "reward", "rank": 8, "learning_rate": 1e-3}),
        "dpo": (
            files["pairs"],
            {"objective": "dpo", "rank": 16, "learning_rate": 2e-4, "dpo": {"sft_weight": 0.2}}
            | over,
        ),
    }
    for rank in RANKS:
        told = {
            "objective": "grpo",
            "rank": rank,
            "alpha": ALPHA,
            "learning_rate": 1e-3,
            "grpo": judged,
        } | over
        plans[f"grpo-{rank}"] = files["prompts"], told
    for name, (data, values) in plans.items():
        out, count = folder / name, steps[name.partition("-")[0]]
        if (out / "README.md").is_file():
            continue
        begun = (out / "settings.yaml").is_file()
        train(
            data,
            output_dir=out,
            seed=seed,
            max_steps=count,
            eval_steps=max(1, count // 4),
            max_tokens_per_batch=2048,
            eval_size=0.05,
            resume=begun,
            **values,
        )
        print(f"seed {seed}: {name}", flush=True)
    return dict(
        zip(
            STAGES[1:],
            (folder / name for name in ("dpo", *(f"grpo-{rank}" for rank in RANKS))),
            strict=True,
        )
    )


def judge(sft: Path, runs: dict[str, Path], test: Path) -> dict[str, dict[str, Any]]:
    """Each run, learned over `sft`, and this itself on new sentences by the rules: rewards, KL, wins against `sft`."""
    base = load_base(**ModelSettings().model_dump())
    renderer = Renderer(base.tokenizer, None, base.max_positions)
    rows = [
        PromptRow(f"{test}:{n}", line["prompt"], line["reference"])
        for n, line in enumerate(map(json.loads, test.open()), 1)
    ]
    queries = [TokenizedPrompt(row, renderer.prompt(row.prompt)) for row in rows]
    options = GRPOSettings(
        reward_funcs=dict.fromkeys(RULES.values(), 1.0),
        max_new_tokens=NEW_TOKENS,
        num_generations=2,
        prompts_per_step=1,
    )
    longest = max(len(query.token_ids) for query in queries) + NEW_TOKENS
    writer = PolicyGenerator(base, longest, renderer.stop_token_ids)
    task = GRPOObjective(
        options,
        base,
        queries,
        queries,
        load_reward_functions(options, base, None),
        writer,
        2048,
        0,
    )
    below = load_adapter(sft, base, "sft").active
    task.reference = ReferencePolicy("adapter", "the adapter that imitates", below)
    before = task.eval_completions(queries, below)[2]["reward"]
    found: dict[str, dict[str, Any]] = {}
    for stage, run in {"sft": sft, **runs}.items():
        adapter = load_adapter(run, base, "aligned")
        adapter.frozen_companions = () if stage == "sft" else (below,)
        told, drift = (
            task.eval_completions(queries, adapter.active)[2],
            task.sampled_metrics(adapter.active),
        )
        reward = told["reward"]
        wins, losses = int((reward > before).sum()), int((reward < before).sum())
        found[stage] = (
            {
                "reward": float(reward.mean()),
                "kl": drift["kl"] * drift["length"],
                "length": drift["length"],
            }
            | {name: float(told[f"reward_{rule}"].mean()) for name, rule in RULES.items()}
            | {"wins": wins, "losses": losses, "ties": len(queries) - wins - losses}
        )
        detach(base.model, adapter)
    return found


def curves(runs: dict[str, Path]) -> dict[str, list[tuple[float, float]]]:
    """(KL in nats an answer, reward) of the steps of each run that learned from rewards."""
    return {
        name: [(tick["kl"] * tick["length"], tick["reward"]) for tick in read_metrics(run)]
        for name, run in runs.items()
        if name.startswith("grpo")
    }


def draw(seeds: Sequence[dict[str, Any]], file: Path) -> None:
    """Reward against KL as means of a fifth of a run's steps, a line a run, from left to right. PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    colours = {"grpo, rank 1": "tab:orange", "grpo, rank 16": "tab:blue"}
    for n, seed in enumerate(seeds):
        for name, points in seed["curves"].items():
            size = max(1, len(points) // 5)
            fifths = [points[i : i + size] for i in range(0, size * (len(points) // size), size)]
            means = [
                [sum(column) / len(part) for column in zip(*part, strict=True)] for part in fifths
            ]
            axes.plot(
                *zip(*means, strict=True),
                "o-",
                color=colours[name],
                alpha=0.6,
                label=name if n == 0 else None,
            )
    axes.set_xlabel("KL from the adapter that imitates (nats an answer)")
    axes.set_ylabel("reward of its sampled answers")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)


def apart(low: Sequence[int], high: Sequence[int]) -> str:
    """How much more often the lower rank wins, from [wins, losses] of both, with the 95% interval of Newcombe's method 10.

    Newcombe 1998, Statistics in Medicine 17:873; as if the prompts were not the same, which makes it wider.
    """
    shares = [wins / max(1, wins + losses) for wins, losses in (low, high)]
    bounds = [wilson_interval(wins, wins + losses) for wins, losses in (low, high) if wins + losses]
    if len(bounds) < len(shares):
        return "Too few answers differ to compare the ranks."
    gap = shares[0] - shares[1]
    below = ((shares[0] - bounds[0][0]) ** 2 + (bounds[1][1] - shares[1]) ** 2) ** 0.5
    above = ((bounds[0][1] - shares[0]) ** 2 + (shares[1] - bounds[1][0]) ** 2) ** 0.5
    interval = f"95% interval {100 * (gap - below):+.1f} to {100 * (gap + above):+.1f}"
    return f"Wins of rank {RANKS[0]} less those of rank {RANKS[1]}: {100 * gap:+.1f} points ({interval})."


def markdown(story: dict[str, Any]) -> str:
    """The tables: means over the seeds; wins of all seeds together with their 95% interval."""
    tables = [seed["table"] for seed in story["seeds"]]
    heads = ["", *NAMES.values(), "wins against sft", "KL (nats an answer)"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for stage in STAGES:
        mean = {name: sum(t[stage][name] for t in tables) / len(tables) for name in (*NAMES, "kl")}
        wins, losses = (sum(t[stage][name] for t in tables) for name in ("wins", "losses"))
        share = ""
        if wins + losses:
            low, high = wilson_interval(wins, wins + losses)
            share = f"{100 * wins / (wins + losses):.1f}% ({100 * low:.1f} to {100 * high:.1f})"
        cells = [
            f"{mean['reward']:.3f}",
            *(f"{100 * mean[name]:.1f}%" for name in RULES),
            share,
            f"{mean['kl']:.2f}",
        ]
        lines.append(f"| {stage} | " + " | ".join(cells) + " |")
    lines += [
        "",
        apart(
            *(
                [sum(t[f"grpo, rank {r}"][k] for t in tables) for k in ("wins", "losses")]
                for r in RANKS
            )
        ),
    ]
    tested = f"{story['tested']} new sentences a seed, {len(tables)} seeds"
    spent = (
        f"{tested}; {story['seconds']} s in all, of which {story['cpu_seconds']} s of computing."
    )
    return "\n".join([*lines, "", stack_markdown(story["seeds"]), "", spent])


def main() -> None:
    """Run all of it and write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of everything, to see that it runs"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("runs/rlhf"), help="where the runs lie")
    parser.add_argument(
        "--out",
        type=Path,
        default=HERE,
        help="where results.json, the table and the picture are written",
    )
    told = parser.parse_args()
    sizes = {"sft": 3000, "pairs": 600, "prompts": 400, "test": 200}
    steps, count = {"sft": 120, "judge": 30, "dpo": 30, "grpo": 24}, told.seeds
    if told.quick:
        sizes, steps = (
            {name: max(8, size // 25) for name, size in sizes.items()},
            dict.fromkeys(steps, 2),
        )
        count = 2
    start, seeds = time.perf_counter(), []
    before = (
        read_json_object(told.work / "spent.json")
        if (told.work / "spent.json").is_file()
        else {"seconds": 0, "cpu_seconds": 0}
    )

    def spent() -> dict[str, int]:
        now = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time()}
        return {name: round(before[name] + value) for name, value in now.items()}

    folders = [told.work / f"seed-{seed}" for seed in range(count)]
    for seed, folder in enumerate(folders):
        if not (folder / "judged.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            files = make_data(folder, sizes, seed)
            runs = learn(files, folder, steps, seed)
            write_json(
                folder / "judged.json",
                {"table": judge(folder / "sft", runs, files["test"]), "curves": curves(runs)},
            )
            write_json(told.work / "spent.json", spent())
        seeds.append(read_json_object(folder / "judged.json"))
    aligned = f"grpo-{RANKS[-1]}"
    for seed, folder in enumerate(folders):
        other = folders[(seed + 1) % len(folders)]
        if not (folder / "stacked.json").is_file():
            write_json(
                folder / "stacked.json",
                stack(folder, folder / aligned, other / aligned, NEW_TOKENS),
            )
            write_json(told.work / "spent.json", spent())
        seeds[seed]["stacked"] = read_json_object(folder / "stacked.json")
    story = spent() | {"tested": sizes["test"], "steps": steps, "seeds": seeds}
    write_json(told.out / "results.json", story)
    draw(seeds, told.out / "reward-kl.png")
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
