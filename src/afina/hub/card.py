"""The card of an adapter on the Hub: its README.md with base, license, data and evaluation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from afina.io.adapter_folder import AdapterFolder
from afina.io.run_record import read_run_record

HUB_PREFIX = "hf:"
FENCE = "---\n"


def card_metadata(
    adapter: AdapterFolder, run: Path, license: str | None, datasets: Sequence[str]
) -> dict[str, Any]:
    """Return the metadata of a card, under the names that the Hub reads.

    Args:
        adapter: The adapter.
        run: Its run folder, or the adapter's own.
        license: License of the adapter; None is that of the base.
        datasets: Names of data sets on the Hub; by default those that the run read there.
    """
    record = read_run_record(run)
    base = record.get("base", {})
    name = adapter.base.name or base.get("name")
    stated = license or base.get("licence")
    found: dict[str, Any] = {"base_model": name, "base_model_relation": "adapter"}
    found |= {"library_name": "peft", "tags": ["afina", adapter.method]}
    found |= {"license": str(stated).lower()} if stated else {}
    names = [*datasets] or _hub_names(record)
    found |= {"datasets": names} if names else {}
    results = _results(record)
    if results:
        found["model-index"] = [{"name": run.name, "results": results}]
    return found


def _hub_names(record: Mapping[str, Any]) -> list[str]:
    """Return the names of a run's data sets on the Hub."""
    data = record.get("data", {})
    files = [one.get("path", "") for one in data.get("files", ())] or [data.get("path") or ""]
    hub = [str(path).removeprefix(HUB_PREFIX) for path in files if str(path).startswith(HUB_PREFIX)]
    return [name.partition("[")[0].partition(":")[0] for name in hub]


def _results(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return eval loss and score of a run in the form of the Hub's model index."""
    losses = record.get("losses", {})
    score = record.get("score") or losses.get("score") or {}
    metrics = []
    if (loss := losses.get("eval_loss_after")) is not None:
        metrics.append({"type": "loss", "name": "eval loss", "value": round(loss, 4)})
    if isinstance(score, Mapping) and score.get("after") is not None:
        name = str(score.get("name", "score"))
        metrics.append({"type": name.replace(" ", "_"), "name": name, "value": score["after"]})
    if not metrics:
        return []
    data = record.get("data", {})
    name = Path(str(data.get("path") or "rows")).name.removeprefix(HUB_PREFIX)
    return [
        {
            "task": {"type": _task(str(record.get("objective")))},
            "dataset": {"name": f"{name}, eval rows", "type": name},
            "metrics": metrics,
        }
    ]


def _task(objective: str) -> str:
    """Return the Hub's name for the task of an objective."""
    tasks = {
        "classify": "text-classification",
        "embed": "sentence-similarity",
        "rerank": "text-ranking",
        "tag": "token-classification",
        "mlm": "fill-mask",
    }
    return tasks.get(objective, "text-generation")


def card_text(metadata: Mapping[str, Any], readme: Path) -> str:
    """Return the card: the metadata, and the text of the run's README.md where there is one."""
    body = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    if body.startswith(FENCE):
        body = body[len(FENCE) :].partition(f"\n{FENCE}")[2]
    body = body.strip() or f"# An adapter of {metadata['base_model']}\n\nTrained with afina."
    head = yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True)
    return f"{FENCE}{head}{FENCE}\n{body}\n"
