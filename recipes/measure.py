"""Run the recipes, measure before and after, and write recipes/README.md from what was found.

python recipes/measure.py            all that have no result yet; killed and started again, it goes on
python recipes/measure.py tone       these once more
python recipes/measure.py --page     the page from recipes/results.json, without running anything
"""

import hashlib
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import afina
from afina.io.atomic import write_json, write_text
from afina.settings import TrainSettings, make_settings, read_yaml

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results.json", HERE / "README.md"
CONTROL = re.compile(r"<\|\w+\|>")  # control tokens of the embedded base's chat template
MARKS = re.compile(r"(?<=<!-- table -->\n).*?(?=<!-- end -->)", re.DOTALL)
NAMES = {
    "exact_match": "answers without a fault",
    "accuracy": "right label",
    "preferred": "better answer preferred",
}


def names() -> list[str]:
    """The recipes, in the order of their files."""
    return sorted(file.stem for file in HERE.glob("*.yaml"))


def settings_of(name: str, **told: Any) -> TrainSettings:
    """The settings of a recipe; paths in it are from the project's folder, where it is to be run."""
    file = HERE / f"{name}.yaml"
    return make_settings(TrainSettings, read_yaml(file) | told, where=str(file))


def measure(name: str, longest: int = 64, **told: Any) -> dict[str, Any]:
    """Run one recipe, its answers of `longest` tokens at most: {"metric", "before", "after" (percent), "rows", "forgetting", "cpu_seconds", "example", ...}."""
    settings = settings_of(name, **told)
    if settings.output_dir.exists():
        shutil.rmtree(settings.output_dir)
    start, cpu = time.perf_counter(), time.process_time()
    run = afina.train(settings)
    spent = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    judged = afina.evaluate(run.folder, max_new_tokens=longest)
    losses = run.record["losses"]
    about = {
        "what": described(name),
        "made_of": made_of(name),
        "method": settings.method,
        "rank": settings.rank,
        "steps": settings.max_steps,
        **spent,
    }
    about |= {
        "adapter_kb": run.record["adapter_kb"],
        "verdict": run.record["verdict"],
        "held_out": judged["rows"],
    }
    about |= {
        key: losses[key]
        for key in ("eval_loss_before", "eval_loss_after", "forgetting")
        if losses.get(key) is not None
    }
    return about | scores(judged, settings)


def scores(judged: dict[str, Any], settings: TrainSettings) -> dict[str, Any]:
    """The figure that counts, before and after, in percent; a classifier's base has no head yet, so chance stands for it."""
    if settings.objective == "classify":
        labels = judged["classes"]["labels"]
        return {
            "metric": "accuracy",
            "before": 100 / len(labels),
            "after": judged["classes"]["accuracy"],
            "example": None,
        }
    if settings.objective == "dpo":
        after = judged["after"]
        return {
            "metric": "preferred",
            "before": 50.0,
            "after": 100 * after["rewards/accuracies"],
            "example": None,
        }
    example = next(
        (e for e in judged["examples"] if e["after"] == e["expected"]), judged["examples"][0]
    )
    chrf = {f"chrf_{when}": judged[when]["chrf"] for when in ("before", "after")}
    return {
        "metric": "exact_match",
        "before": judged["before"]["exact_match"],
        "after": judged["after"]["exact_match"],
        **chrf,
        "example": example,
    }


def described(name: str) -> str:
    """The first line of a recipe: what it is for."""
    return (
        (HERE / f"{name}.yaml")
        .read_text(encoding="utf-8")
        .splitlines()[0]
        .removeprefix("#")
        .strip()
    )


def made_of(name: str) -> str:
    """The hash of a recipe's settings and rows: what was measured with others does not count."""
    files = (HERE / f"{name}.yaml", HERE.parent / settings_of(name).data)
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def found() -> dict[str, Any]:
    """What was measured so far, of recipes as they are now."""
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    return {
        name: result
        for name, result in results.items()
        if name in names() and result["made_of"] == made_of(name)
    }


def page(results: dict[str, Any]) -> str:
    """recipes/README.md with the table and the examples of these results."""
    lines = [
        "| recipe | use | method, steps | counted | before | after | likeness | forgetting | CPU |",
        "|" + "---|" * 9,
    ]
    for name in names():
        if name not in results:
            lines.append(
                f"| `{name}` | {described(name).rstrip('.')} | not measured yet |" + " |" * 6
            )
            continue
        r = results[name]
        alike = f"{r['chrf_before']:.0f} → {r['chrf_after']:.0f}" if "chrf_after" in r else ""
        forgot = f"{r['forgetting']:+.2f}" if "forgetting" in r else ""
        lines.append(
            f"| `{name}` | {r['what'].rstrip('.')} | {r['method']}, {r['steps']} | {NAMES[r['metric']]} (of {r['held_out']}) "
            f"| {r['before']:.1f}% | **{r['after']:.1f}%** | {alike} | {forgot} | {r['cpu_seconds']:.0f} s |"
        )
    lines += [
        "",
        "One held-out question of each, with the answer of the base and of the adapter:",
        "",
    ]
    for name, r in sorted(results.items()):
        if r["example"]:
            said = {
                key: " ".join(CONTROL.sub(" ", str(r["example"][key])).split())
                for key in ("prompt", "before", "after")
            }
            lines.append(
                f"- `{name}`: *{said['prompt']}*  \n  base: {said['before'][:90] or '(nothing)'}  \n  adapter: **{said['after']}**"
            )
    return MARKS.sub(lambda _: "\n".join(lines) + "\n", PAGE.read_text(encoding="utf-8"))


def main(told: list[str]) -> None:
    """Measure what is asked for, or what is missing, and write the page."""
    wanted = [word for word in told if not word.startswith("-")] or [
        name for name in names() if name not in found()
    ]
    for name in [] if "--page" in told else wanted:
        result = measure(name)
        write_json(RESULTS, dict(sorted((found() | {name: result}).items())))
        print(
            f"{name}: {result['before']:.1f} -> {result['after']:.1f} ({result['cpu_seconds']:.0f} s of CPU)",
            flush=True,
        )
    write_text(PAGE, page(found()))


if __name__ == "__main__":
    main(sys.argv[1:])
