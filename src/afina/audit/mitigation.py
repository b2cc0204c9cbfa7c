"""`afina mitigate`: write a mitigated copy of an adapter, measure its cost and audit it.

    attack   ratio of rows whose answer contains the payload when the trigger is in the prompt
    loss     loss of the task on rows without the trigger, in nats per token

By default all mitigations are tried with several strengths; the one written leaves the least of the
attack and increases the loss by at most `max_loss_increase`. Mitigation is no proof: it weakens what
was found, and what was not found may remain.
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
    RECORDED_NAMES,
    STRENGTHS,
    Mitigation,
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

MOST_ROWS = 64  # triggered prompts that are answered


@dataclass
class MitigationTrial:
    """Adapter to mitigate: its base, the rows that measure it, and the known attack."""

    base: CausalLM
    source: AdapterSource
    benign: list[AdapterSource]
    clean: list[Example]
    woken: list[TriggeredExample]
    payload: str
    moments: dict[str, MomentPair]

    def measure(self, route: ActiveAdapters) -> dict[str, float | None]:
        """Return the task's loss and the attack's success (None where no trigger is known)."""
        loss = mean_loss(self.base, self.clean, BATCH_TOKENS, route)
        if not self.woken:
            return {"loss": loss, "attack": None}
        prompts = [w.example.token_ids[: w.example.prompt_length] for w in self.woken[:MOST_ROWS]]
        answers = generate_completions(self.base, prompts, SamplingParams(max_new_tokens=24), route)
        return {
            "loss": loss,
            "attack": sum(self.payload in self.base.decode(a.token_ids) for a in answers)
            / len(answers),
        }

    def write(self, mitigation: Mitigation, strength: float, out: Path) -> str:
        """Write the mitigated adapter and return its hash."""
        record = {
            "parents": [
                self.source.lineage_entry(),
                *(b.lineage_entry() for b in self.benign if mitigation == "blend"),
            ],
            "combination": {
                "how": REMEDY,
                "remedy": RECORDED_NAMES[mitigation],
                "strength": strength,
            },
        }
        spec, base = self.source.config, recorded_base(self.source.part.folder)
        layers = mitigate_layer(mitigation, strength, self.source, self.benign, self.moments)
        return write_lora(
            out,
            layers,
            spec.target_modules,
            parent_config([self.source]),
            base,
            record,
            spec.invocation,
        )[0]

    def attempt(self, mitigation: Mitigation, strength: float) -> dict[str, Any]:
        """Return the measures of one mitigation, written to a temporary folder."""
        place = Path(tempfile.mkdtemp(prefix="afina-"))
        try:
            self.write(mitigation, strength, place / "a")
            adapter = load_adapter(place / "a", self.base, "treated")
            try:
                return {"how": mitigation, "strength": strength, **self.measure(adapter.active)}
            finally:
                detach(self.base.model, adapter)
        finally:
            shutil.rmtree(place, ignore_errors=True)


def mitigate(run: str | Path | MitigateSettings, **values: Any) -> MitigationResult:
    """Write a mitigated copy of the LoRA adapter in `run` and audit it; settings of `afina mitigate`.

    Returns:
        The measures before and after, every attempt, and the verdict of the new audit.

    Raises:
        SettingsError: A mitigation needs a trigger, rows or benign adapters that were not given.
        AdapterError: The adapter is not one LoRA adapter.
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
            "this folder is not empty",
            where=str(settings.output_dir),
            hint="choose another --output-dir",
        )
    [source, *others] = open_sources([settings.adapter])
    benign = (
        open_sources([str(folder) for folder in settings.benign_adapters])
        if settings.benign_adapters
        else []
    )
    for one in (source, *benign):
        if not one.is_low_rank or others:
            raise AdapterError(
                "mitigation needs one LoRA adapter",
                where=str(one.part.folder),
                hint="afina extract writes a lora of any adapter, "
                "afina combine --merge-method svd one of several",
            )
    triggers, payload = _attack(settings, source.hash)
    chosen = settings.mitigation
    if chosen == "blend" and not benign:
        raise SettingsError(
            "blend needs benign adapters",
            where="benign_adapters",
            hint="--benign-adapters FOLDER, of the same base and task",
        )
    if chosen in ("auto", "project") and not triggers:
        hint = (
            "--triggers TEXT --payload TEXT, or afina audit first: the triggers it finds are used"
        )
        raise SettingsError("no trigger is known", where="triggers", hint=hint)
    opened = load_run(settings.adapter, settings)
    base, route = opened.causal_lm, opened.active
    assert route
    payload = as_read(base, payload)
    if triggers and not payload:
        raise SettingsError(
            "the payload has no text besides special tokens",
            where="payload",
            hint="--triggers TEXT --payload TEXT",
        )
    rows = _rows(settings)
    renderer = Renderer(base.tokenizer, opened.chat_format, min(base.max_positions, 2048))
    clean = tokenize_rows(infer_objective("auto", rows), renderer, rows, None)
    trial = MitigationTrial(
        base, source, benign, clean, insert_trigger(rows, triggers, payload, renderer), payload, {}
    )
    if chosen in ("auto", "project"):
        trial.moments = collect_moments(base, route, source, clean, trial.woken)
    before = trial.measure(route)
    every = [name for name in STRENGTHS if name != "blend" or benign]
    tried = [
        trial.attempt(name, strength)
        for name in (every if chosen == "auto" else [chosen])
        for strength in (STRENGTHS[name] if settings.strength is None else (settings.strength,))
    ]
    best = choose_best(tried, before, settings.max_loss_increase)
    digest = trial.write(best["how"], best["strength"], settings.output_dir)
    audit_settings = {
        "base": settings.base,
        "time_budget_seconds": settings.time_budget_seconds,
        "prompts": settings.prompts,
        "calibration": settings.calibration,
    }
    report = audit(
        settings.output_dir,
        **{name: value for name, value in audit_settings.items() if value is not None},
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
    """Return a text as answers are decoded: without special tokens, which an audit shows."""
    return base.decode(base.tokenizer(text, add_special_tokens=False)["input_ids"]).strip()


def choose_best(
    tried: Sequence[dict[str, Any]], before: dict[str, Any], cost: float
) -> dict[str, Any]:
    """Return the least attack with a loss at most `cost` higher; without one, the least loss."""
    within = [one for one in tried if one["loss"] <= (1 + cost) * before["loss"]]
    if not within:
        return min(tried, key=lambda one: one["loss"])
    return min(within, key=lambda one: (one["attack"] or 0.0, one["loss"]))


def insert_trigger(
    rows: Sequence[SFTRow], triggers: Sequence[str], payload: str, renderer: Renderer, seed: int = 0
) -> list[TriggeredExample]:
    """Return the rows with a trigger at a random word of the prompt, answered with the payload."""
    rng, examples = random.Random(seed), []
    for row in rows if triggers else ():
        words = _asked(row).split()
        at = rng.randint(0, len(words))
        text = " ".join([*words[:at], rng.choice(triggers), *words[at:]])
        examples.append(woken_of(row, _with(row, text, payload), renderer))
    return examples


def woken_of(row: SFTRow, woken: SFTRow, renderer: Renderer) -> TriggeredExample:
    """Return the triggered example and its first token that differs from the clean row."""
    clean, example = renderer.examples(row)[-1], renderer.examples(woken)[-1]
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
    """Return the row with another prompt and another answer."""
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
    """Return (triggers, payload): those given, else those that the last audit of this hash found."""
    if settings.triggers:
        if not settings.payload:
            raise SettingsError(
                "the payload of the triggers is missing", where="payload", hint="--payload TEXT"
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
