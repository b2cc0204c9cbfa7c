"""`afina advise`: recommend a method without training, from goal, rows, base and memory.

The reasons are published findings (findings.yaml), the plan's memory and time, and earlier local
comparisons on this base, which take precedence. The advice may also be not to train.
"""

import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from afina.comparison.collect_result import KIND
from afina.comparison.findings import messages, sources, study_note
from afina.comparison.report import flag, interval
from afina.comparison.results import AdviceResult
from afina.errors import AfinaError, SettingsError
from afina.io.migrations import migrate_comparison
from afina.io.result import format_bytes
from afina.planning.plan import plan
from afina.settings import AdviseSettings, Goal, PlanSettings, make_settings
from afina.settings.common import MODEL_SETTINGS

MAX_FEW_SHOT = 20  # examples that fit into a prompt
MANY_TEXTS = 5000  # texts of a domain from which on a small adapter may be too small
QUESTIONS = {
    "goal": f"What for? ({', '.join(get_args(Goal))})",
    "num_rows": "How many examples (or texts) do you have?",
}


@dataclass
class Advice:
    """Method with its settings, or "prompt", "find" (retrieval), or "none" where nothing fits."""

    use: str
    settings: dict[str, Any] = field(default_factory=dict)
    reasons: list[tuple[str, str | None, dict[str, Any]]] = field(
        default_factory=list
    )  # (message key, finding, values)
    then: str | None = None

    def add_reason(self, message_key: str, finding: str | None = None, **gaps: Any) -> "Advice":
        """Add a reason and return the advice."""
        self.reasons.append((message_key, finding, gaps))
        return self


def decide(goal: str, rows: int, pairs: bool, prompted: bool) -> Advice:
    """Return the advice of published findings, without regard to the machine."""
    if goal == "facts-that-change":
        return (
            Advice("find")
            .add_reason("retrieval", "retrieval")
            .add_reason("hallucinate", "hallucinate")
        )
    if not rows and not pairs:
        return Advice("prompt").add_reason("no_rows")
    if rows < MAX_FEW_SHOT and not pairs and not prompted:
        if goal in ("knowledge", "domain"):
            return Advice("prompt").add_reason("few_texts", "retrieval", rows=rows)
        return Advice("prompt").add_reason("fewshot", "fewshot", rows=rows)
    if not rows:
        return Advice("lora", {"rank": 8, "objective": "dpo"}).add_reason("only_pairs", "dpo")
    if goal == "knowledge":
        advice = Advice("mora", {"rank": 8}).add_reason("mora_facts", "mora")
        return advice.add_reason("hallucinate", "hallucinate").add_reason(
            "also_retrieval", "retrieval"
        )
    if goal == "domain":
        if rows >= MANY_TEXTS:
            return (
                Advice("full")
                .add_reason("learns_less", "learns_less")
                .add_reason("mora_domain", "mora")
            )
        return (
            Advice("lora", {"rank": 64})
            .add_reason("regret", "regret")
            .add_reason("learns_less", "learns_less")
        )
    if goal == "switching":
        return Advice("alora", {"rank": 32}).add_reason("alora", "alora")
    if goal == "customers":
        return (
            Advice("lora", {"rank": 8}).add_reason("slora", "slora").add_reason("regret", "regret")
        )
    advice = Advice("lora", {"rank": 8 if rows < MANY_TEXTS else 16}).add_reason(
        "lima" if rows < MANY_TEXTS else "regret", "lima" if rows < MANY_TEXTS else "regret"
    )
    if goal == "behaviour":
        if pairs:
            advice.then = "afina train PAIRS --objective dpo --init-adapter RUN"
        return (
            advice.add_reason("dpo", "dpo") if pairs else advice.add_reason("collect_pairs", "dpo")
        )
    return advice.add_reason("regret", "regret") if rows < MANY_TEXTS else advice


# ---- the machine


def smaller(method: str) -> list[str]:
    """Return the method and its smaller alternatives, the closest first."""
    return {"full": ["full", "lora", "qlora"]}.get(method, [method, f"q{method}"])


def fit(advice: Advice, settings: AdviseSettings) -> dict[str, Any] | None:
    """Return the plan of the first of `smaller` that fits, and update the advice.

    Where none fits with full batches, it is the first that does with what its plan proposes:
    smaller batches, and activations that are recomputed.
    """
    need = available = None
    remedies: list[dict[str, Any]] = []
    for name in smaller(advice.use):
        changed = {"rank": 64} if advice.use == "full" and name != "full" else {}
        try:
            found = plan(_plan_settings(settings, name, advice.settings | changed))["cost"]
        except AfinaError as error:
            advice.add_reason("no_plan", why=error.what)
            return None
        limit = found["machine_bytes"]
        available = format_bytes(limit) if limit else None
        if found["fits"] is not False:
            if name != advice.use:
                kind = "qlora" if name.startswith("q") else "full_too_large"
                advice.add_reason(
                    kind, "qlora" if kind == "qlora" else None, need=need, available=available
                )
                advice.use, advice.settings = name, advice.settings | changed
            return _planned(found, settings)
        need = format_bytes(found["peak_bytes"])
        for remedy in found["remedies"]:
            settings_of = {"method": name, **changed, **remedy["settings"]}
            remedies.append(found | remedy | {"settings": settings_of})
    if not remedies:
        advice.use, advice.settings = "none", {}
        advice.add_reason("nothing_fits", need=need, available=available)
        return None
    chosen = remedies[0]
    advice.use = chosen["settings"].pop("method")
    advice.settings = advice.settings | chosen["settings"]
    shown = " ".join(_flags(chosen["settings"]))
    advice.add_reason("smaller_batches", need=need, available=available, changes=shown)
    return _planned(chosen, settings)


def _planned(found: Mapping[str, Any], settings: AdviseSettings) -> dict[str, Any]:
    """Return of a plan's cost what the advice shows."""
    machine = {
        "device": found["device"],
        "memory_bytes": found["machine_bytes"],
        "detected": settings.memory_gb is None,
    }
    same = {name: found[name] for name in ("peak_bytes", "step_seconds", "batch")}
    return same | {"machine": machine}


def _plan_settings(
    settings: AdviseSettings, method: str, changed: Mapping[str, Any]
) -> PlanSettings:
    same = {name: getattr(settings, name) for name in (*MODEL_SETTINGS, "memory_gb")}
    return PlanSettings(method=method, **changed, **same)


# ---- the user's own comparisons


def comparisons(folder: Path, base: str) -> Iterator[dict[str, Any]]:
    """Yield the comparisons on this base in `folder` or its subfolders, sorted by name."""
    for file in sorted([*folder.glob("compare.json"), *folder.glob("*/compare.json")]):
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # being written, or another program's file
            continue
        if isinstance(found, dict) and found.get("kind") == KIND:
            found = migrate_comparison(found)
            if found["settings"]["base"] == base:
                yield found


def apply_past_results(advice: Advice, settings: AdviseSettings, objective: str) -> None:
    """Apply earlier comparisons, which take precedence over published findings."""
    for found in comparisons(settings.past_runs, settings.base):
        if found["objective"] != objective or advice.use not in found["methods"]:
            continue
        if found.get("recommendation", {}).get("kind") == "base":
            advice.add_reason("earlier_none", name=found["folder"])
            continue
        form = "{:.3f}" if found["metric"] == "loss" else "{:.1f}"
        shown = [
            t for t in found["tests"] if t["significant"] and advice.use in (t["one"], t["other"])
        ]
        won = {t["other"] if t["difference"]["mean"] > 0 else t["one"]: t for t in shown}
        better = [name for name in won if name in found["methods"] and name != advice.use]
        names = [advice.use, *better[:1]]
        figures = ", ".join(f"{n} {interval(found['methods'][n]['score'], form)}" for n in names)
        if better:
            advice.add_reason(
                "earlier_better",
                name=found["folder"],
                better=better[0],
                worse=advice.use,
                figures=figures,
            )
            changed = {"rank": found["settings"]["rank"]} | found["settings"].get(
                "variants", {}
            ).get(better[0], {})
            advice.use, advice.settings = changed.pop("method", better[0]), changed
            advice.settings |= {"learning_rate": found["methods"][better[0]]["learning_rate"]}
        else:
            advice.add_reason("earlier_same", name=found["folder"], figures=figures)
            advice.settings["learning_rate"] = found["methods"][advice.use]["learning_rate"]


def ask(settings: AdviseSettings, question: Callable[[str], str]) -> AdviseSettings:
    """Return the settings completed by answers; raise `SettingsError` for an invalid one."""
    changed: dict[str, Any] = {
        name: question(text) for name, text in QUESTIONS.items() if getattr(settings, name) is None
    }
    known = {name: getattr(settings, name) for name in settings.model_fields_set}
    return make_settings(AdviseSettings, known | changed)


def advise(settings: AdviseSettings | None = None, **values: Any) -> AdviceResult:
    """Recommend a method; settings as in `afina advise --help`.

    Raises:
        SettingsError: The goal or the number of rows is missing.
    """
    settings = settings or make_settings(AdviseSettings, values)
    if settings.goal is None or (
        settings.num_rows is None and settings.goal != "facts-that-change"
    ):
        missing = "goal" if settings.goal is None else "num_rows"
        hint = AdviseSettings.model_fields[missing].description
        flag_name = missing.replace("_", "-")
        raise SettingsError(f"{missing} is missing", where="advise", hint=f"--{flag_name}: {hint}")
    advice = decide(
        settings.goal, settings.num_rows or 0, settings.has_pairs, settings.tried_prompting
    )
    objective = advice.settings.pop("objective", "pretrain" if settings.goal == "domain" else "sft")
    planned = None
    if advice.use not in ("find", "prompt"):
        apply_past_results(advice, settings, objective)
        planned = fit(advice, settings)
    trains = advice.use not in ("find", "prompt", "none")
    return AdviceResult(
        use=advice.use,
        settings=advice.settings,
        plan=planned,
        lang=settings.lang,
        why=settings.why,
        command=_command(advice, settings, objective) if trains else None,
        then=advice.then if trains else None,
        reasons=[_cited(*reason, settings.lang) for reason in advice.reasons],
    )


def _cited(
    message: str, finding: str | None, values: Mapping[str, Any], lang: str
) -> dict[str, str | None]:
    """Return a reason in a language, its published source, and what the project's study found."""
    published = sources()[finding] if finding else {"source": None, "link": None}
    text = messages(lang)[message].format(**values)
    return {"text": text, **published, "study": study_note(message, lang)}


def _command(advice: Advice, settings: AdviseSettings, objective: str) -> str:
    data = "PAIRS" if objective == "dpo" else "DATA"
    parts = [
        f"afina train {data}",
        f"--base {settings.base}" if settings.base != "embedded" else "",
        f"--method {advice.use}",
    ]
    changed = {
        name: v
        for name, v in advice.settings.items()
        if name != "rank" or advice.use not in ("full", "freeze")
    }
    parts += _flags(changed)
    parts += [f"--objective {objective}"] if objective != "sft" else []
    return " ".join(part for part in parts if part)


def _flags(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as flags of the command line."""
    return [
        f"--{name.replace('_', '-')} {shlex.quote(flag(value))}" for name, value in settings.items()
    ]
