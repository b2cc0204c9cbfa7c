"""Report of a comparison: one HTML page without external resources, and the same as Markdown.

Everything is rendered from compare.json; `afina compare` on a finished comparison, with another
--lang, renders it again. Texts of models are escaped, as an answer may contain anything.
"""

import html
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml

from afina.comparison.analysis import BASE, min_rows_to_differ
from afina.comparison.cost_probe import WATTS
from afina.comparison.messages import Words, words
from afina.comparison.plots import pictures
from afina.io.atomic import write_text
from afina.io.result import format_bytes, format_seconds, markdown_cell
from afina.settings import CompareSettings

MIN_TEST_ROWS = 50  # below which the report warns
HEADINGS = (
    "summary",
    "quality",
    "cost",
    "between",
    "examples",
    "pictures",
    "ran",
    "again",
    "limits",
    "question",
    "expected",
    "base",
)
TEMPLATES_DIR = Path(__file__).parent


def write_report(result: Mapping[str, Any], folder: Path, lang: str) -> None:
    """Write report.html and report.md into `folder`."""
    for name in ("report.html", "report.md"):
        write_text(folder / name, render_report(result, name, lang))


def render_report(result: Mapping[str, Any], template: str, lang: str) -> str:
    """Return the report in "en" or "es" from the template "report.html" or "report.md"."""
    environment = jinja2.Environment(
        autoescape=False, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"h": lambda text: html.escape(str(text)), "cell": markdown_cell}
    figures = pictures(result, words(lang)) if template == "report.html" else []
    source = (TEMPLATES_DIR / f"{template}.j2").read_text(encoding="utf-8")
    shown = view(result, lang) | {"pictures": figures, "lang": lang}
    return environment.from_string(source).render(shown)


def view(result: Mapping[str, Any], lang: str) -> dict[str, Any]:
    """Return all texts and table rows of a report, ready for the templates to lay out."""
    write = words(lang)
    methods, metric, schedule = result["methods"], result["metric"], result["schedule"]
    sign = 1 if metric == "loss" else -1
    names = sorted(methods, key=lambda name: sign * methods[name]["score"]["mean"])
    limits = [write("about_limits", rank=result["settings"]["rank"], steps=schedule["steps"])]
    if "forgetting" in result["base_figures"]:
        limits.append(write("about_general"))
    reasons = result["recommendation"]["reasons"]
    return {
        "w": {key: write(key) for key in HEADINGS},
        "title": write("title", data=result["data"]["name"]),
        "answer": _answer(result, write),
        "reasons": [_reason(key, gaps, metric, write) for key, gaps in reasons],
        "notes": _notes(result, write),
        "quality": _quality_table(result, names, write),
        "cost": _cost_table(result, names, write),
        "tests": _test_table(result, write),
        "examples": [_example(one, names, write) for one in result["examples"]],
        "facts": _facts(result, write),
        "search": write("about_search", trials=schedule["trials"], choose=result["data"]["choose"]),
        "command": command(result),
        "limits": limits,
    }


def _quality_table(result: Mapping[str, Any], names: list[str], write: Words) -> dict[str, Any]:
    metric = result["metric"]
    about = write(
        "about_quality",
        seeds=result["schedule"]["seeds_done"],
        rows=result["data"]["test"],
        scored=result["score_rows"],
        metric=write(f"metric_{metric}"),
    )
    rows = [_quality(write("base"), result["base_figures"], metric, True)]
    if nf4 := result.get("nf4_figures"):
        rows.append(_quality(write("base_nf4"), nf4, metric))
    rows += [_quality(name, result["methods"][name], metric) for name in names]
    head = ("method", "score", "loss", "forgetting", "overfitting")
    return {"about": about, "head": [write(key) for key in head], "rows": rows}


def _cost_table(result: Mapping[str, Any], names: list[str], write: Words) -> dict[str, Any]:
    methods = result["methods"]
    sources = sorted({methods[name]["energy_source"] for name in names})
    about = [
        write("about_cost", steps=result["schedule"]["steps"]),
        *(write(f"energy_{source}", watts=WATTS) for source in sources),
    ]
    head = ("method", "numbers", "file", "memory", "time", "energy", "rate")
    rows = [_cost(name, methods[name]) for name in names]
    return {"about": " ".join(about), "head": [write(key) for key in head], "rows": rows}


def _test_table(result: Mapping[str, Any], write: Words) -> dict[str, Any]:
    tests = sorted(result["tests"], key=lambda test: test["p"])
    head = ("pair", "difference", "chance", "significant")
    return {
        "about": write("about_tests", pairs=len(tests)),
        "head": [write(key) for key in head],
        "rows": [_test(test, result["metric"], write) for test in tests],
    }


def _example(example: Mapping[str, Any], names: list[str], write: Words) -> dict[str, Any]:
    answers = [(name, example["answers"][name]) for name in names]
    return {
        "prompt": example["prompt"],
        "expected": example["expected"],
        "answers": [(write("base"), example["base"]), *answers],
    }


def _answer(result: Mapping[str, Any], write: Words) -> str:
    advice = result["recommendation"]
    if advice["use"] == BASE:
        return write("use_base", base=result["base"]["name"])
    return write("use_cheapest" if advice["kind"] == "cheapest" else "use", use=advice["use"])


def _reason(key: str, gaps: Mapping[str, Any], metric: str, write: Words) -> str:
    shown: dict[str, Any] = {
        name: ", ".join(value) if isinstance(value, list) else value for name, value in gaps.items()
    }
    if "amount" in shown:
        shown["amount"] = (
            f"{shown['amount']:.3f} nats" if metric == "loss" else f"{shown['amount']:.1f} %"
        )
    if "value" in shown:
        shown["value"] = {
            "peak_mb": format_bytes(1e6 * shown["value"]),
            "adapter_kb": format_bytes(1e3 * shown["value"]),
            "run_seconds": format_seconds(shown["value"]),
        }[key]
    return write(key, **shown)


def _notes(result: Mapping[str, Any], write: Words) -> list[str]:
    """Return the notes that limit what the figures show."""
    schedule, methods = result["schedule"], result["methods"]
    notes = [
        write("failed", method=name, why=why.rstrip(".")) for name, why in result["failed"].items()
    ]
    if schedule["cut"]:
        what = ", ".join(write(f"cut_{name}") for name in schedule["cut"])
        notes.append(write("cut", budget=result["settings"]["time_budget"], what=what))
    notes += [write(key, **gaps) for key, gaps in result["notes"]]
    if edge := [name for name, found in methods.items() if found["at_search_boundary"]]:
        notes.append(write("at_search_boundary", methods=", ".join(edge)))
    if schedule["seeds_done"] == 1:
        notes.append(write("one_seed"))
    if result["metric"] != "loss" and result["score_rows"] < (
        need := min_rows_to_differ(len(result["tests"]))
    ):
        notes.append(
            write("cannot_show", rows=result["score_rows"], pairs=len(result["tests"]), need=need)
        )
    elif result["score_rows"] < MIN_TEST_ROWS:
        notes.append(write("few_rows", rows=result["score_rows"]))
    return notes


def interval(figure: Mapping[str, float | None], form: str) -> str:
    """Return a figure with its interval: 84.1 [80.2, 87.9]."""
    mean, low, high = figure["mean"], figure["low"], figure["high"]
    shown = form.format(mean)
    if low is None or high is None:
        return shown
    return f"{shown} [{form.format(low)}, {form.format(high)}]"


def _quality(name: str, found: Mapping[str, Any], metric: str, base: bool = False) -> list[str]:
    score = interval(found["score"], "{:.4f}" if metric == "loss" else "{:.1f}")
    changes = [
        interval(found[key], "{:+.3f}") if key in found and not base else ""
        for key in ("forgetting", "overfitting")
    ]
    return [name, score, interval(found["loss"], "{:.4f}"), *changes]


def _cost(name: str, found: Mapping[str, Any]) -> list[str]:
    joules = found["joules"]
    energy = (
        "?" if joules is None else f"{joules / 3600:.2f} Wh" if joules > 360 else f"{joules:.0f} J"
    )
    return [
        name,
        f"{found['trainable_parameters']:,}",
        format_bytes(1e3 * found["adapter_kb"]),
        format_bytes(1e6 * found["peak_mb"]),
        format_seconds(found["run_seconds"]),
        energy,
        f"{found['learning_rate']:.2g}",
    ]


def _test(test: Mapping[str, Any], metric: str, write: Words) -> list[str]:
    """Return the row of a test, the method with the better figure first."""
    one, other, shown = test["one"], test["other"], test["difference"]
    if (shown["mean"] or 0.0) < 0:
        one, other = other, one
        low, high = (None if shown[end] is None else -shown[end] for end in ("high", "low"))
        shown = {"mean": -shown["mean"], "low": low, "high": high}
    names = [write("base") if name == BASE else name for name in (other, one)]
    form = "{:+.4f}" if metric == "loss" else "{:+.1f}"
    p = "< 0.001" if test["corrected"] < 0.001 else f"{test['corrected']:.3f}"
    return [
        f"{names[0]} − {names[1]}",
        interval(shown, form),
        p,
        write("yes") if test["significant"] else write("no"),
    ]


def _facts(result: Mapping[str, Any], write: Words) -> list[tuple[str, str]]:
    schedule, data, base = result["schedule"], result["data"], result["base"]
    where = result["environment"]
    counts = ", ".join(f"{data[kind]:,}" for kind in ("train", "choose", "test"))
    return [
        (write("fact_base"), f"{base['name']} ({base['hash'][:16]}, {base['dtype']})"),
        (write("fact_data"), f"{data['name']} (sha256 {data['sha256'][:16]})"),
        (write("fact_rows"), counts),
        (
            write("fact_plan"),
            f"{schedule['trials']}, {schedule['steps']}, {schedule['seeds_done']}",
        ),
        (write("fact_budget"), result["settings"]["time_budget"]),
        (write("fact_time"), format_seconds(schedule["seconds_spent"])),
        (
            write("fact_machine"),
            f"{where['machine']}, {where['threads']} threads, Python {where['python']}, "
            f"torch {where['torch']}, afina {result['afina']}",
        ),
    ]


def command(result: Mapping[str, Any]) -> str:
    """Return the command that runs the comparison again."""
    parts = ["afina", "compare", shlex.quote(result["data"]["name"])]
    for name, value in result["settings"].items():
        default = CompareSettings.model_fields[name].get_default()
        if name in ("data", "output_dir") or value == default or value in (None, {}):
            continue
        parts += ["--" + name.replace("_", "-"), shlex.quote(flag(value))]
    return " ".join(parts)


def flag(value: Any) -> str:
    """Return the value of a setting as a flag takes it."""
    if isinstance(value, dict):
        return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6).strip()
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
