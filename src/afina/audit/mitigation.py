"""`afina mitigate`: write a mitigated copy of an adapter, measure its cost and audit it.

    attack   ratio of rows whose answer contains the payload when the trigger is in the prompt
    loss     loss of the task on rows without the trigger, in nats per token

By default all mitigations are tried with several strengths; the one written leaves the least of the
attack and increases the loss by at most `max_loss_increase`. Mitigation is no proof: it weakens
what was found, and what was not found may remain.
"""

import random
import tempfile
from collections.abc import Iterator, Sequence
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
from afina.io.atomic import require_new_directory
from afina.io.composition import recorded_base
from afina.merging.sources import AdapterSource, chat_record, open_sources
from afina.merging.write import parent_config, write_lora
from afina.models.causal_lm import CausalLM
from afina.objectives.language_data import infer_objective, tokenize_rows
from afina.objectives.language_modeling import mean_loss
from afina.objectives.prepared import BATCH_TOKENS, recorded_eval_rows, run_renderer
from afina.settings import MitigateSettings, as_settings

MAX_TRIGGERED_ROWS = 64  # prompts with a trigger that are completed


@dataclass
class MitigationTrial:
    """Adapter to mitigate: its base, the rows that measure it, and the known attack."""

    base: CausalLM
    source: AdapterSource
    benign: list[AdapterSource]
    clean: Sequence[Example]
    triggered: list[TriggeredExample]
    payload: str
    moments: dict[str, MomentPair]

    def measure(self, active: ActiveAdapters) -> dict[str, float | None]:
        """Return the task's loss and the attack's success (None where no trigger is known)."""
        loss = mean_loss(self.base, self.clean, BATCH_TOKENS, active)
        if not self.triggered:
            return {"loss": loss, "attack": None}
        prompts = [
            w.example.token_ids[: w.example.prompt_length]
            for w in self.triggered[:MAX_TRIGGERED_ROWS]
        ]
        sampling = SamplingParams(max_new_tokens=24)
        answers = generate_completions(self.base, prompts, sampling, active)
        hits = sum(self.payload in self.base.decode(answer.token_ids) for answer in answers)
        return {"loss": loss, "attack": hits / len(answers)}

    def write(self, mitigation: Mitigation, strength: float, out: Path) -> str:
        """Write the mitigated adapter and return its hash."""
        recipe = {"how": REMEDY, "remedy": RECORDED_NAMES[mitigation], "strength": strength}
        parents = [self.source, *(self.benign if mitigation == "blend" else ())]
        record = {"parents": [one.lineage_entry() for one in parents], "combination": recipe}
        record |= chat_record([self.source])
        config, base = self.source.config, recorded_base(self.source.part.folder)
        layers = mitigate_layer(mitigation, strength, self.source, self.benign, self.moments)
        context = parent_config([self.source])
        return write_lora(
            out, layers, config.target_modules, context, base, record, config.invocation
        )[0]

    def attempt(self, mitigation: Mitigation, strength: float) -> dict[str, Any]:
        """Return the measures of one mitigation, written to a temporary folder."""
        with tempfile.TemporaryDirectory(prefix="afina-") as temporary:
            folder = Path(temporary) / "adapter"
            self.write(mitigation, strength, folder)
            adapter = load_adapter(folder, self.base, "treated")
            try:
                return {"how": mitigation, "strength": strength, **self.measure(adapter.active)}
            finally:
                detach(self.base.model, adapter)


def mitigate(run: str | Path | MitigateSettings, **values: Any) -> MitigationResult:
    """Write a mitigated copy of the LoRA adapter in `run` and audit it.

    Args:
        run: A run, an adapter, or all settings.
        values: Settings of `afina mitigate`.

    Returns:
        The measures before and after, every attempt, and the verdict of the new audit.

    Raises:
        SettingsError: A mitigation needs a trigger, rows or benign adapters that were not given.
        AdapterError: The adapter is not one LoRA adapter.
    """
    settings = as_settings(MitigateSettings, run, "adapter", values)
    require_new_directory(settings.output_dir)
    source, benign = _open_sources(settings)
    triggers, payload = _attack(settings, source.hash)
    _check_choice(settings, benign, triggers)
    opened = load_run(settings.adapter, settings)
    base, active = opened.causal_lm, opened.active
    payload = as_read(base, payload)
    if triggers and not payload:
        raise SettingsError(
            "the payload has no text besides special tokens",
            where="payload",
            hint="--triggers TEXT --payload TEXT",
        )
    rows = _rows(settings)
    renderer = run_renderer(opened, base)
    clean = tokenize_rows(infer_objective("auto", rows), renderer, rows, None)
    triggered = insert_trigger(rows, triggers, payload, renderer)
    trial = MitigationTrial(base, source, benign, clean, triggered, payload, {})
    if settings.mitigation in ("auto", "project"):
        trial.moments = collect_moments(base, active, source, clean, triggered)
    before = trial.measure(active)
    tried = [trial.attempt(name, strength) for name, strength in _attempts(settings, benign)]
    best = choose_best(tried, before, settings.max_loss_increase)
    digest = trial.write(best["how"], best["strength"], settings.output_dir)
    report = _audit_result(settings)
    return MitigationResult(
        out=str(settings.output_dir),
        hash=digest,
        before=before,
        after=best,
        cost=best["loss"] / before["loss"] - 1 if before["loss"] else 0.0,
        tried=tried,
        triggers=triggers,
        payload=payload,
        verdict=report["verdict"],
        report=report,
    )


def _open_sources(settings: MitigateSettings) -> tuple[AdapterSource, list[AdapterSource]]:
    """Return the adapter and the benign ones; raise `AdapterError` where one is no single LoRA."""
    [source, *others] = open_sources([settings.adapter])
    folders = [str(folder) for folder in settings.benign_adapters or ()]
    benign = open_sources(folders) if folders else []
    for one in (source, *benign):
        if not one.is_low_rank or others:
            raise AdapterError(
                "mitigation needs one LoRA adapter",
                where=str(one.part.folder),
                hint="afina extract writes a lora of any adapter, "
                "afina combine --merge-method svd one of several",
            )
    return source, benign


def _check_choice(
    settings: MitigateSettings, benign: Sequence[AdapterSource], triggers: Sequence[str]
) -> None:
    """Raise `SettingsError` where the chosen mitigation lacks what it needs."""
    if settings.mitigation == "blend" and not benign:
        raise SettingsError(
            "blend needs benign adapters",
            where="benign_adapters",
            hint="--benign-adapters FOLDER, of the same base and task",
        )
    if settings.mitigation in ("auto", "project") and not triggers:
        hint = (
            "--triggers TEXT --payload TEXT, or afina audit first: the triggers it finds are used"
        )
        raise SettingsError("no trigger is known", where="triggers", hint=hint)


def _attempts(
    settings: MitigateSettings, benign: Sequence[AdapterSource]
) -> Iterator[tuple[Mitigation, float]]:
    """Yield each mitigation that is to be tried, with each of its strengths."""
    for name, strengths in STRENGTHS.items():
        if settings.mitigation == name or (
            settings.mitigation == "auto" and (name != "blend" or benign)
        ):
            for strength in strengths if settings.strength is None else (settings.strength,):
                yield name, strength


def _audit_result(settings: MitigateSettings) -> dict[str, Any]:
    """Audit the adapter that was written, with the settings that both commands have."""
    names = ("base", "time_budget_seconds", "prompts", "calibration")
    given = {name: getattr(settings, name) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    return dict(audit(settings.output_dir, **given))


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
        words = _prompt_of(row).split()
        at = rng.randint(0, len(words))
        text = " ".join([*words[:at], rng.choice(triggers), *words[at:]])
        examples.append(to_triggered(row, _with(row, text, payload), renderer))
    return examples


def to_triggered(row: SFTRow, woken: SFTRow, renderer: Renderer) -> TriggeredExample:
    """Return the triggered example and its first token that differs from the clean row."""
    clean, example = renderer.examples(row)[-1], renderer.examples(woken)[-1]
    same = (
        i
        for i, (a, b) in enumerate(zip(clean.token_ids, example.token_ids, strict=False))
        if a != b
    )
    return TriggeredExample(example, next(same, 0))


def _prompt_of(row: SFTRow) -> str:
    if row.messages is not None:
        return next(
            (turn["content"] for turn in reversed(row.messages) if turn["role"] == "user"), ""
        )
    return row.prompt or ""


def _with(row: SFTRow, prompt_text: str, answer: str) -> SFTRow:
    """Return the row with another prompt and another answer."""
    if row.messages is None:
        return replace(row, prompt=prompt_text, completion=answer)
    last = max(number for number, turn in enumerate(row.messages) if turn["role"] == "user")
    turns = (
        *row.messages[:last],
        row.messages[last] | {"content": prompt_text},
        {"role": "assistant", "content": answer},
    )
    return replace(row, messages=turns)


def _attack(settings: MitigateSettings, digest: str) -> tuple[list[str], str]:
    """Return (triggers, payload): as given, else as the last audit of this hash found them."""
    if settings.triggers:
        if not settings.payload:
            raise SettingsError(
                "the payload of the triggers is missing", where="payload", hint="--payload TEXT"
            )
        return settings.triggers, settings.payload
    report = admission.load_report(digest) or {}
    findings = [one for one in report.get("findings", ()) if one["rule"] == "trigger"]
    found = findings[0]["evidence"]["triggers"] if findings else []
    payload = str(found[0]["answer"]).strip() if found else ""
    return [str(one["trigger"]).strip() for one in found], payload


def _rows(settings: MitigateSettings) -> Sequence[SFTRow]:
    file = settings.data or recorded_eval_rows(settings.adapter)
    if not file.is_file():
        raise SettingsError(
            "rows of its task are needed, with answers", where=str(file), hint="--data FILE"
        )
    rows = read_table(file, SFT).rows
    if any(_prompt_of(row) == "" for row in rows):
        hint = "rows with prompts and answers"
        raise SettingsError(
            "plain text has no prompt to put a trigger into", where=str(file), hint=hint
        )
    return rows
