"""The reference study: `afina compare` on made tasks, in parts that go on where they were cut off.

    python studies/study.py smoke        run a part (runs/study-smoke), write studies/results/smoke.json
    python studies/study.py --page       write studies/README.md from the results; no figure in it is written by hand

A result is compare.json without what is long (curves, examples) and what names this machine's folders.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from tasks import TASKS, make_rows

from afina.comparing.compare import compare
from afina.comparing.report import view
from afina.config import CompareSettings, make_settings
from afina.disk import write_json, write_text

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SEED = 7  # of the rows; runs have their own


def parts() -> dict[str, dict[str, Any]]:
    """What parts.yaml says, by name."""
    return dict(yaml.safe_load((HERE / "parts.yaml").read_text(encoding="utf-8")))


def settings_of(name: str, part: Mapping[str, Any], runs: Path) -> CompareSettings:
    """The comparison of a part."""
    told = {key: value for key, value in part.items() if key not in ("task", "rows")}
    return make_settings(CompareSettings, told | {"data": runs / f"study-{name}.jsonl", "out": runs / f"study-{name}"})


def run(name: str, runs: Path = Path("runs"), results: Path = RESULTS) -> Path:
    """Run a part, or go on with it; returns the file of its result."""
    part = parts()[name]
    settings = settings_of(name, part, runs)
    rows = make_rows(part["task"], part["rows"], SEED)
    write_text(settings.data, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    found = compare(settings, say=lambda text: print(f"{name}: {text}", flush=True))
    write_json(results / f"{name}.json", shortened(found, name, part))
    return results / f"{name}.json"


def shortened(found: Mapping[str, Any], name: str, part: Mapping[str, Any]) -> dict[str, Any]:
    """A result as it is kept."""
    methods = {m: {k: v for k, v in own.items() if k not in ("curves", "verdicts")} for m, own in found["methods"].items()}
    settings = {k: v for k, v in found["settings"].items() if k not in ("data", "out", "general")}
    kept = {k: v for k, v in found.items() if k not in ("folder", "examples")}
    return {"part": name, "task": part["task"]} | kept | {"methods": methods, "settings": settings}


def page(results: Path = RESULTS) -> str:
    """The page of all results."""
    lines = [
        "# The reference study", "",
        "Made by `python studies/study.py --page` from the files in `results/`; nothing here is written by hand. Each part is one",
        "comparison on the embedded base: the same rows, trials and seeds for every method. A part runs again with",
        "`python studies/study.py PART`, and goes on where it was cut off. `smoke` only proves that the frame works.", "",
    ]  # fmt: skip
    done = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(results.glob("*.json"))}
    for name, part in parts().items():
        lines += [f"## {name}", "", f"Task `{part['task']}`: {(TASKS[part['task']].__doc__ or '').strip()}", ""]
        if name not in done:
            lines += ["Not run yet.", ""]
            continue
        told = view(done[name] | {"folder": "", "examples": []}, "en")
        lines += [f"**{told['answer']}**", "", *(f"- {line}" for line in [*told["reasons"], *told["notes"]]), ""]
        for table in (told["quality"], told["cost"]):
            lines += [_row(table["head"]), _row(["---"] * len(table["head"])), *map(_row, table["rows"]), "", table["about"], ""]
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(arguments: list[str]) -> int:
    """The command."""
    if arguments == ["--page"]:
        write_text(HERE / "README.md", page())
    elif len(arguments) == 1 and arguments[0] in parts():
        print(run(arguments[0]))
    else:
        print(f"{__doc__}\nparts: {', '.join(parts())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
