"""The reference study: `afina compare` on made tasks, in parts that go on where they were cut off.

    python studies/study.py smoke        run a part (runs/study-smoke), write studies/results/smoke.json
    python studies/study.py rest         run all that have no result yet, in the order of parts.yaml, the long ones last
    python studies/study.py --page       write studies/README.md and docs/study.md from the results, its pictures, and what
                                         `afina advise` tells of them; no figure in them is written by hand

A result is compare.json without what is long (curves, examples) and what names this machine's folders.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from claims import CLAIMS
from summary import draw, summary
from tasks import TASKS, make_rows
from verdicts import verdicts

from afina.comparison.compare import compare
from afina.comparison.report import view
from afina.io.atomic import write_json, write_text
from afina.io.migrations import migrate_comparison
from afina.settings import CompareSettings, make_settings

HERE = Path(__file__).parent
RESULTS = HERE / "results"
DOCS = HERE.parent / "docs"
STUDIED = (
    HERE.parent / "src" / "afina" / "comparison" / "study.json"
)  # what `afina advise` tells of the study
SEED = 7  # of the rows; runs have their own


def parts() -> dict[str, dict[str, Any]]:
    """What parts.yaml says, by name."""
    return dict(yaml.safe_load((HERE / "parts.yaml").read_text(encoding="utf-8")))


def settings_of(name: str, part: Mapping[str, Any], runs: Path) -> CompareSettings:
    """The comparison of a part."""
    told = {key: value for key, value in part.items() if key not in ("task", "rows")}
    return make_settings(
        CompareSettings,
        told | {"data": runs / f"study-{name}.jsonl", "output_dir": runs / f"study-{name}"},
    )


def run(name: str, runs: Path = Path("runs"), results: Path = RESULTS) -> Path:
    """Run a part, or go on with it; returns the file of its result."""
    part = parts()[name]
    settings = settings_of(name, part, runs)
    rows = make_rows(part["task"], part["rows"], SEED)
    write_text(settings.data, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    found = compare(settings, log=lambda text: print(f"{name}: {text}", flush=True))
    write_json(results / f"{name}.json", shortened(found, name, part))
    return results / f"{name}.json"


def shortened(found: Mapping[str, Any], name: str, part: Mapping[str, Any]) -> dict[str, Any]:
    """A result as it is kept."""
    methods = {
        m: {k: v for k, v in own.items() if k not in ("curves", "verdicts")}
        for m, own in found["methods"].items()
    }
    private = ("data", "output_dir", "retention_text")
    settings = {k: v for k, v in found["settings"].items() if k not in private}
    kept = {k: v for k, v in found.items() if k not in ("folder", "examples")}
    return {"part": name, "task": part["task"]} | kept | {"methods": methods, "settings": settings}


def read_results(results: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """The results that are there, by the name of their part."""
    return {
        file.stem: migrate_comparison(json.loads(file.read_text(encoding="utf-8")))
        for file in sorted(results.glob("*.json"))
    }


def page(done: Mapping[str, Mapping[str, Any]]) -> str:
    """The page of all results."""
    lines = [
        "# The reference study",
        "",
        "Made by `python studies/study.py --page` from the files in `results/`; nothing here is written by hand. Each part is one",
        "comparison on the embedded base: the same rows, trials and seeds for every method. A part runs again with",
        "`python studies/study.py PART`, and goes on where it was cut off. `smoke` only proves that the frame works. The parts ran",
        "beside other work of the machine: seconds are rough, the other figures are not touched by it. In plain words:",
        "[what the study found](../docs/study.md).",
        "",
        "## Claims",
        "",
        "What guides and papers say, and what our figures say to it. The rules were written before the figures were there; the",
        "margin is 5 points of a score, or 0.05 nats of a loss. All of it speaks of one small base.",
        "",
        _row(["claim", "who says it", "rule", "figures", "verdict"]),
        _row(["---"] * 5),
    ]
    for claim, verdict, points in verdicts(CLAIMS, done):
        marks = {True: "for", False: "against", None: "neither"}
        figures = "<br>".join(f"{p.part}: {p.figures} ({marks[p.holds]})" for p in points)
        who = f"[{claim.who}]({claim.link})" if claim.link else claim.who
        waiting = [part for part in claim.parts if part not in done]
        figures += ("<br>" if figures and waiting else "") + (
            f"not run yet: {', '.join(waiting)}" if waiting else ""
        )
        lines.append(_row([claim.says, who, claim.rule, figures, f"**{verdict}**"]))
    lines += [""]
    for name, part in parts().items():
        lines += [
            f"## {name}",
            "",
            f"Task `{part['task']}`: {(TASKS[part['task']].__doc__ or '').strip()}",
            "",
        ]
        if name not in done:
            lines += [f"Not run yet: `python studies/study.py {name}`", ""]
            continue
        told = view(done[name] | {"folder": "", "examples": []}, "en")
        lines += [
            f"**{told['answer']}**",
            "",
            *(f"- {line}" for line in [*told["reasons"], *told["notes"]]),
            "",
        ]
        for table in (told["quality"], told["cost"]):
            lines += [
                _row(table["head"]),
                _row(["---"] * len(table["head"])),
                *map(_row, table["rows"]),
                "",
                table["about"],
                "",
            ]
    return "\n".join(lines)


def heard(done: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """What the claims that have run say, in short: `afina advise` tells it beside what others found."""
    told = {
        claim.name: (verdict, points) for claim, verdict, points in verdicts(CLAIMS, done) if points
    }
    return {
        name: {"verdict": verdict, "figures": "; ".join(f"{p.part}: {p.figures}" for p in points)}
        for name, (verdict, points) in told.items()
    }


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(arguments: list[str]) -> int:
    """The command."""
    if arguments == ["--page"]:
        done = read_results()
        write_text(HERE / "README.md", page(done))
        write_text(DOCS / "study.md", summary(done))
        write_json(STUDIED, heard(done))
        for name, picture in draw(done).items():
            write_text(DOCS / "study" / f"{name}.svg", picture)
    elif arguments == ["rest"]:
        for name, part in parts().items():
            if not Path(part.get("base", HERE)).exists():
                print(
                    f"{name}: left out, {part['base']} is not there; parts.yaml says how to make it"
                )
            elif not (RESULTS / f"{name}.json").is_file():
                print(run(name))
    elif len(arguments) == 1 and arguments[0] in parts():
        print(run(arguments[0]))
    else:
        print(f"{__doc__}\nparts: {', '.join(parts())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
