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

FEW = 50  # test rows below which the report warns
HERE = Path(__file__).parent


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
    drawn = pictures(result, words(lang)) if template == "report.html" else []
    source = (HERE / f"{template}.j2").read_text(encoding="utf-8")
    shown = view(result, lang) | {"pictures": drawn, "lang": lang}
    return environment.from_string(source).render(shown)


def view(result: Mapping[str, Any], lang: str) -> dict[str, Any]:
    """All texts and table rows of a report, written out: what the templates lay out."""
    say = words(lang)
    methods, metric, schedule = result["methods"], result["metric"], result["schedule"]
    names = sorted(
        methods, key=lambda n: methods[n]["score"]["mean"] * (1 if metric == "loss" else -1)
    )
    rows, asked, settings = result["data"]["test"], result["score_rows"], result["settings"]
    sources = {methods[name]["energy_source"] for name in names}
    return {
        "w": {
            key: say(key)
            for key in (
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
        },
        "title": say("title", data=result["data"]["name"]),
        "answer": _answer(result, say),
        "reasons": [
            _reason(key, gaps, metric, say) for key, gaps in result["recommendation"]["reasons"]
        ],
        "notes": _notes(result, say),
        "quality": {
            "about": say(
                "about_quality",
                seeds=schedule["seeds_done"],
                rows=rows,
                asked=asked,
                metric=say(f"metric_{metric}"),
            ),
            "head": [
                say("method"),
                say("score"),
                say("loss"),
                say("forgetting"),
                say("overfitting"),
            ],
            "rows": [
                _quality(say("base"), result["base_figures"], metric, True),
                *(
                    [_quality(say("base_nf4"), quantised, metric)]
                    if (quantised := result.get("nf4_figures"))
                    else []
                ),
                *(_quality(name, methods[name], metric) for name in names),
            ],
        },
        "cost": {
            "about": " ".join(
                [
                    say("about_cost", steps=schedule["steps"]),
                    *(say(f"energy_{source}", watts=WATTS) for source in sorted(sources)),
                ]
            ),
            "head": [
                say(k) for k in ("method", "numbers", "file", "memory", "time", "energy", "rate")
            ],
            "rows": [_cost(name, methods[name]) for name in names],
        },
        "tests": {
            "about": say("about_tests", pairs=len(result["tests"])),
            "head": [say("pair"), say("difference"), say("chance"), say("significant")],
            "rows": [
                _test(test, metric, say) for test in sorted(result["tests"], key=lambda t: t["p"])
            ],
        },
        "examples": [
            {
                "prompt": e["prompt"],
                "expected": e["expected"],
                "answers": [
                    (say("base"), e["base"]),
                    *((name, e["answers"][name]) for name in names),
                ],
            }
            for e in result["examples"]
        ],
        "facts": _facts(result, say),
        "search": say("about_search", trials=schedule["trials"], choose=result["data"]["choose"]),
        "command": command(result),
        "limits": [say("about_limits", rank=settings["rank"], steps=schedule["steps"])]
        + ([say("about_general")] if "forgetting" in result["base_figures"] else []),
    }


def _answer(result: Mapping[str, Any], say: Words) -> str:
    advice = result["recommendation"]
    if advice["use"] == BASE:
        return say("use_base", base=result["base"]["name"])
    return say("use_cheapest" if advice["kind"] == "cheapest" else "use", use=advice["use"])


def _reason(key: str, gaps: Mapping[str, Any], metric: str, say: Words) -> str:
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
    return say(key, **shown)


def _notes(result: Mapping[str, Any], say: Words) -> list[str]:
    """What the reader has to know before believing anything."""
    schedule, methods = result["schedule"], result["methods"]
    notes = [
        say("failed", method=name, why=why.rstrip(".")) for name, why in result["failed"].items()
    ]
    if schedule["cut"]:
        what = ", ".join(say(f"cut_{name}") for name in schedule["cut"])
        notes.append(say("cut", budget=result["settings"]["time_budget"], what=what))
    notes += [say(key, **gaps) for key, gaps in result["notes"]]
    if edge := [name for name, found in methods.items() if found["at_search_boundary"]]:
        notes.append(say("at_search_boundary", methods=", ".join(edge)))
    if schedule["seeds_done"] == 1:
        notes.append(say("one_seed"))
    if result["metric"] != "loss" and result["score_rows"] < (
        need := min_rows_to_differ(len(result["tests"]))
    ):
        notes.append(
            say("cannot_show", rows=result["score_rows"], pairs=len(result["tests"]), need=need)
        )
    elif result["score_rows"] < FEW:
        notes.append(say("few_rows", rows=result["score_rows"]))
    return notes


def interval(figure: Mapping[str, float | None], form: str) -> str:
    """A figure with its interval: 84.1 [80.2, 87.9]."""
    mean, low, high = figure["mean"], figure["low"], figure["high"]
    shown = form.format(mean)
    if low is None or high is None:
        return shown
    return f"{shown} [{form.format(low)}, {form.format(high)}]"


def _quality(name: str, found: Mapping[str, Any], metric: str, base: bool = False) -> list[str]:
    score = interval(found["score"], "{:.4f}" if metric == "loss" else "{:.1f}")
    other = (
        []
        if base
        else [
            interval(found[k], "{:+.3f}") if k in found else ""
            for k in ("forgetting", "overfitting")
        ]
    )
    return [name, score, interval(found["loss"], "{:.4f}"), *(other or ["", ""])]


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


def _test(test: Mapping[str, Any], metric: str, say: Words) -> list[str]:
    """The pair with the better figure first."""
    one, other, shown = test["one"], test["other"], test["difference"]
    if (shown["mean"] or 0.0) < 0:
        one, other = other, one
        low, high = (None if shown[end] is None else -shown[end] for end in ("high", "low"))
        shown = {"mean": -shown["mean"], "low": low, "high": high}
    names = [say("base") if name == BASE else name for name in (other, one)]
    form = "{:+.4f}" if metric == "loss" else "{:+.1f}"
    p = "< 0.001" if test["corrected"] < 0.001 else f"{test['corrected']:.3f}"
    return [
        f"{names[0]} − {names[1]}",
        interval(shown, form),
        p,
        say("yes") if test["significant"] else say("no"),
    ]


def _facts(result: Mapping[str, Any], say: Words) -> list[tuple[str, str]]:
    schedule, data, base, where = (
        result["schedule"],
        result["data"],
        result["base"],
        result["environment"],
    )
    counts = ", ".join(f"{data[kind]:,}" for kind in ("train", "choose", "test"))
    return [
        (say("fact_base"), f"{base['name']} ({base['hash'][:16]}, {base['dtype']})"),
        (say("fact_data"), f"{data['name']} (sha256 {data['sha256'][:16]})"),
        (say("fact_rows"), counts),
        (say("fact_plan"), f"{schedule['trials']}, {schedule['steps']}, {schedule['seeds_done']}"),
        (say("fact_budget"), result["settings"]["time_budget"]),
        (say("fact_time"), format_seconds(schedule["seconds_spent"])),
        (
            say("fact_machine"),
            f"{where['machine']}, {where['threads']} threads, Python {where['python']}, "
            f"torch {where['torch']}, afina {result['afina']}",
        ),
    ]


def command(result: Mapping[str, Any]) -> str:
    """The command that runs the comparison again."""
    parts = ["afina", "compare", shlex.quote(result["data"]["name"])]
    for name, value in result["settings"].items():
        default = CompareSettings.model_fields[name].get_default()
        if name in ("data", "output_dir") or value == default or value in (None, {}):
            continue
        parts += ["--" + name.replace("_", "-"), shlex.quote(flag(value))]
    return " ".join(parts)


def flag(value: Any) -> str:
    """A setting as its flag is written."""
    if isinstance(value, dict):
        return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6).strip()
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
