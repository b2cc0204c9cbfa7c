"""`afina remedy`: another adapter out of one that an audit did not let through, with what it costs, audited again.

    attack   share of rows whose answer holds the payload once the trigger is in the prompt
    loss     of the task, on rows without the trigger (nats a token)

Without `how`, all remedies are tried with several strengths; written is the one that leaves the least of the attack and
raises the loss by no more than `cost`. A remedy is no proof: it weakens what was found, and what was not found may stay.
"""

import random
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from afina.adapters.active import ActiveAdapters
from afina.adapters.attach import detach
from afina.adapters.load_run import load_run
from afina.adapters.loading import load_adapter
from afina.audit.audit import audit
from afina.audit.lineage import REMEDY
from afina.audit.mitigation_methods import (
    STRENGTHS,
    How,
    MomentPair,
    TriggeredExample,
    collect_moments,
    mitigate_layer,
)
from afina.audit.results import MitigationResult
from afina.data.renderer import Example, Renderer
from afina.data.schemas import SFT, SFTRow
from afina.data.table import read_table
from afina.engine.engine import generate_completions
from afina.engine.request import SamplingParams
from afina.errors import AdapterError, SettingsError
from afina.io import admission
from afina.io.composition import recorded_base
from afina.merging.sources import AdapterSource, open_sources
from afina.merging.write import parent_config, write_lora
from afina.models.causal_lm import CausalLM
from afina.objectives.language_data import infer_objective, tokenize_rows
from afina.objectives.language_modeling import mean_loss
from afina.objectives.prepared import BATCH_TOKENS, recorded_eval_rows
from afina.settings import MitigateSettings, make_settings

MOST_ROWS = 64  # that are answered


@dataclass
class MitigationTrial:
    """One adapter under treatment: its base, the rows that it is judged on, and what is known of the attack."""

    base: CausalLM
    source: AdapterSource
    beside: list[AdapterSource]
    clean: list[Example]
    woken: list[TriggeredExample]
    payload: str
    moments: dict[str, MomentPair]

    def measure(self, route: ActiveAdapters) -> dict[str, float | None]:
        """Loss of the task, and the attack's success (None where no trigger is known)."""
        loss = mean_loss(self.base, self.clean, BATCH_TOKENS, route)
        if not self.woken:
            return {"loss": loss, "attack": None}
        prompts = [w.example.token_ids[: w.example.prompt_length] for w in self.woken[:MOST_ROWS]]
        answers = generate_completions(
            self.base, prompts, SamplingParams(max_new_tokens=24), route
        )
        return {
            "loss": loss,
            "attack": sum(self.payload in self.base.decode(a.token_ids) for a in answers) / len(answers),
        }

    def make(self, how: How, strength: float, out: Path) -> str:
        """Write the treated adapter; returns its hash."""
        story = {
            "parents": [
                self.source.lineage_entry(),
                *(b.lineage_entry() for b in self.beside if how == "mix"),
            ],
            "combination": {"how": REMEDY, "remedy": how, "strength": strength},
        }
        spec, base = self.source.config, recorded_base(self.source.part.folder)
        layers = mitigate_layer(how, strength, self.source, self.beside, self.moments)
        return write_lora(
            out,
            layers,
            spec.target_modules,
            parent_config([self.source]),
            base,
            story,
            spec.invocation,
        )[0]

    def attempt(self, how: How, strength: float) -> dict[str, Any]:
        """A remedy measured, and nothing kept of it."""
        place = Path(tempfile.mkdtemp(prefix="afina-"))
        try:
            self.make(how, strength, place / "a")
            adapter = load_adapter(place / "a", self.base, "treated")
            try:
                return {"how": how, "strength": strength, **self.measure(adapter.active)}
            finally:
                detach(self.base.model, adapter)
        finally:
            shutil.rmtree(place, ignore_errors=True)


def mitigate(run: str | Path | MitigateSettings, **values: Any) -> MitigationResult:
    """Treat the lora in `run`, write the result to `out`, audit it again; settings as in `afina remedy --help`.

    Returns the measures before and after, all that was tried, and the new verdict. Raises `SettingsError` where a remedy
    needs a trigger, rows or benign adapters that were not given, `AdapterError` for an adapter that is no lora.
    """
    settings = (
        run
        if isinstance(run, MitigateSettings)
        else make_settings(MitigateSettings, {"adapter": run, **values})
    )
    if settings.output_dir.exists() and (
        not settings.output_dir.is_dir() or any(settings.output_dir.iterdir())
    ):
        raise SettingsError(
            "this folder is not empty", where=str(settings.output_dir), hint="choose another --out"
        )
    [source, *others] = open_sources([settings.adapter])
    beside = (
        open_sources([str(folder) for folder in settings.benign_adapters])
        if settings.benign_adapters
        else []
    )
    for one in (source, *beside):
        if not one.is_low_rank or others:
            hint = (
                "afina extract makes a lora of any adapter, afina combine --how svd one of several"
            )
            raise AdapterError("remedies are for one lora", where=str(one.part.folder), hint=hint)
    triggers, payload = _attack(settings, source.hash)
    how = settings.mitigation
    if how == "mix" and not beside:
        raise SettingsError(
            "with which benign adapters?",
            where="benign_adapters",
            hint="--benign-adapters FOLDER, of the same base and task",
        )
    if how in ("auto", "remove") and not triggers:
        hint = "--triggers TEXT --payload TEXT, or afina audit first: what it finds is used"
        raise SettingsError("no trigger is known", where="triggers", hint=hint)
    opened = load_run(settings.adapter, settings)
    base, route = opened.causal_lm, opened.active
    assert route
    payload = as_read(base, payload)
    if triggers and not payload:
        raise SettingsError(
            "what the trigger brings has no words",
            where="payload",
            hint="--triggers TEXT --payload TEXT",
        )
    rows = _rows(settings)
    renderer = Renderer(base.tokenizer, opened.template, min(base.max_positions, 2048))
    clean = tokenize_rows(infer_objective("auto", rows), renderer, rows, None)
    trial = MitigationTrial(
        base, source, beside, clean, insert_trigger(rows, triggers, payload, renderer), payload, {}
    )
    if how in ("auto", "remove"):
        trial.moments = collect_moments(base, route, source, clean, trial.woken)
    before = trial.measure(route)
    hows: list[How] = [h for h in STRENGTHS if h != "mix" or beside] if how == "auto" else [how]
    asked = [
        (h, s)
        for h in hows
        for s in ((settings.strength,) if settings.strength is not None else STRENGTHS[h])
    ]
    tried = [trial.attempt(h, s) for h, s in asked]
    best = choose_best(tried, before, settings.max_loss_increase)
    digest = trial.make(best["how"], best["strength"], settings.output_dir)
    told = {
        "base": settings.base,
        "budget": settings.time_budget_seconds,
        "prompts": settings.prompts,
        "calibration": settings.calibration,
    }
    report = audit(
        settings.output_dir, **{name: value for name, value in told.items() if value is not None}
    )
    cost = best["loss"] / before["loss"] - 1 if before["loss"] else 0.0
    return MitigationResult(
        out=str(settings.output_dir),
        hash=digest,
        before=before,
        after=best,
        cost=cost,
        tried=tried,
        triggers=triggers,
        payload=payload,
        verdict=report["verdict"],
        report=dict(report),
    )


def as_read(base: CausalLM, text: str) -> str:
    """A text as answers are read: without special tokens, which an audit shows."""
    return base.decode(base.tokenizer(text, add_special_tokens=False)["input_ids"]).strip()


def choose_best(
    tried: Sequence[dict[str, Any]], before: dict[str, Any], cost: float
) -> dict[str, Any]:
    """The least attack among those whose loss is worse by no more than `cost`; where there is none, the least loss."""
    within = [one for one in tried if one["loss"] <= (1 + cost) * before["loss"]]
    if not within:
        return min(tried, key=lambda one: one["loss"])
    return min(within, key=lambda one: (one["attack"] or 0.0, one["loss"]))


def insert_trigger(
    rows: Sequence[SFTRow], triggers: Sequence[str], payload: str, renderer: Renderer, seed: int = 0
) -> list[TriggeredExample]:
    """The rows with a trigger at a random place of what is asked, and the payload as the answer."""
    rng, made = random.Random(seed), []
    for row in rows if triggers else ():
        words = _asked(row).split()
        at = rng.randint(0, len(words))
        text = " ".join([*words[:at], rng.choice(triggers), *words[at:]])
        made.append(woken_of(row, _with(row, text, payload), renderer))
    return made


def woken_of(row: SFTRow, woken: SFTRow, renderer: Renderer) -> TriggeredExample:
    """A row as it is and with the trigger: where they part."""
    clean, example = renderer.example(row), renderer.example(woken)
    same = (
        i
        for i, (a, b) in enumerate(zip(clean.token_ids, example.token_ids, strict=False))
        if a != b
    )
    return TriggeredExample(example, next(same, 0))


def _asked(row: SFTRow) -> str:
    if row.messages is not None:
        return next(
            (turn["content"] for turn in reversed(row.messages) if turn["role"] == "user"), ""
        )
    return row.prompt or ""


def _with(row: SFTRow, asked: str, answer: str) -> SFTRow:
    """The row with another question and another answer."""
    if row.messages is None:
        return replace(row, prompt=asked, completion=answer)
    last = max(number for number, turn in enumerate(row.messages) if turn["role"] == "user")
    turns = (
        *row.messages[:last],
        row.messages[last] | {"content": asked},
        {"role": "assistant", "content": answer},
    )
    return replace(row, messages=turns)


def _attack(settings: MitigateSettings, digest: str) -> tuple[list[str], str]:
    """(triggers, payload): as told, else those that the last audit of this content has found."""
    if settings.triggers:
        if not settings.payload:
            raise SettingsError(
                "what does the trigger bring?", where="payload", hint="--payload TEXT"
            )
        return settings.triggers, settings.payload
    report = admission.load_report(digest) or {}
    found = [
        finding["evidence"]["triggers"]
        for finding in report.get("findings", ())
        if finding["rule"] == "trigger"
    ]
    shown = found[0] if found else []
    return [str(one["trigger"]).strip() for one in shown], str(
        shown[0]["answer"]
    ).strip() if shown else ""


def _rows(settings: MitigateSettings) -> list[SFTRow]:
    file = settings.data or recorded_eval_rows(settings.adapter)
    if not file.is_file():
        raise SettingsError(
            "rows of its task are needed, with answers", where=str(file), hint="--data FILE"
        )
    rows = read_table(file, SFT).rows
    if any(_asked(row) == "" for row in rows):
        hint = "rows with prompts and answers"
        raise SettingsError(
            "plain text has no prompt to put a trigger into", where=str(file), hint=hint
        )
    return rows
