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

from afina import admission
from afina.audit.audit import audit
from afina.audit.lineage import REMEDY
from afina.audit.remedies import STRENGTHS, How, Moments, Woken, treated, watch
from afina.base.model import Base
from afina.combining.parts import Source, open_sources
from afina.combining.write import parent_config, write_lora
from afina.config import RemedySettings, make_settings
from afina.data.formats import read_table
from afina.data.rows import Row
from afina.data.template import Example, Renderer
from afina.delta.attach import detach
from afina.delta.composition import told_base
from afina.delta.files import load_adapter
from afina.delta.opening import open_run
from afina.engine.generate import generate_tokens
from afina.engine.request import Sampling
from afina.errors import AdapterError, SettingsError
from afina.judge.evaluate import HELD_OUT
from afina.judge.losses import BATCH_TOKENS
from afina.objective.language import choose, make_examples, mean_loss
from afina.route.invocation import Route

MOST_ROWS = 64  # that are answered


@dataclass
class Trial:
    """One adapter under treatment: its base, the rows that it is judged on, and what is known of the attack."""

    base: Base
    source: Source
    beside: list[Source]
    clean: list[Example]
    woken: list[Woken]
    payload: str
    moments: dict[str, Moments]

    def measure(self, route: Route) -> dict[str, float | None]:
        """Loss of the task, and the attack's success (None where no trigger is known)."""
        loss = mean_loss(self.base, self.clean, BATCH_TOKENS, route)
        if not self.woken:
            return {"loss": loss, "attack": None}
        prompts = [w.example.tokens[: w.example.prompt_tokens] for w in self.woken[:MOST_ROWS]]
        answers = generate_tokens(self.base, prompts, Sampling(max_new_tokens=24), route)
        return {"loss": loss, "attack": sum(self.payload in self.base.text(a) for a in answers) / len(answers)}

    def make(self, how: How, strength: float, out: Path) -> str:
        """Write the treated adapter; returns its hash."""
        story = {
            "parents": [self.source.as_parent(), *(b.as_parent() for b in self.beside if how == "mix")],
            "combination": {"how": REMEDY, "remedy": how, "strength": strength},
        }
        spec, base = self.source.spec, told_base(self.source.part.folder)
        layers = treated(how, strength, self.source, self.beside, self.moments)
        return write_lora(out, layers, spec.targets, parent_config([self.source]), base, story, spec.invocation)[0]

    def attempt(self, how: How, strength: float) -> dict[str, Any]:
        """A remedy measured, and nothing kept of it."""
        place = Path(tempfile.mkdtemp(prefix="afina-"))
        try:
            self.make(how, strength, place / "a")
            adapter = load_adapter(place / "a", self.base, "treated")
            try:
                return {"how": how, "strength": strength, **self.measure(adapter.route)}
            finally:
                detach(self.base.model, adapter)
        finally:
            shutil.rmtree(place, ignore_errors=True)


def remedy(run: str | Path | RemedySettings, **values: Any) -> dict[str, Any]:
    """Treat the lora in `run`, write the result to `out`, audit it again; settings as in `afina remedy --help`.

    Returns the measures before and after, all that was tried, and the new verdict. Raises `SettingsError` where a remedy
    needs a trigger, rows or benign adapters that were not given, `AdapterError` for an adapter that is no lora.
    """
    settings = run if isinstance(run, RemedySettings) else make_settings(RemedySettings, {"run": run, **values})
    if settings.out.exists() and (not settings.out.is_dir() or any(settings.out.iterdir())):
        raise SettingsError("this folder is not empty", where=str(settings.out), hint="choose another --out")
    [source, *others] = open_sources([settings.run])
    beside = open_sources([str(folder) for folder in settings.beside]) if settings.beside else []
    for one in (source, *beside):
        if not one.is_low or others:
            hint = "afina extract makes a lora of any adapter, afina combine --how svd one of several"
            raise AdapterError("remedies are for one lora", where=str(one.part.folder), hint=hint)
    triggers, payload = _attack(settings, source.hash)
    how = settings.how
    if how == "mix" and not beside:
        raise SettingsError("with which benign adapters?", where="beside", hint="--beside FOLDER, of the same base and task")
    if how in ("auto", "remove") and not triggers:
        hint = "--trigger TEXT --payload TEXT, or afina audit first: what it finds is used"
        raise SettingsError("no trigger is known", where="trigger", hint=hint)
    opened = open_run(settings.run, settings)
    base, route = opened.language, opened.route
    assert route is not None
    payload = as_read(base, payload)
    if triggers and not payload:
        raise SettingsError("what the trigger brings has no words", where="payload", hint="--trigger TEXT --payload TEXT")
    rows = _rows(settings)
    renderer = Renderer(base.tokenizer, opened.template, min(base.context, 2048))
    clean = make_examples(choose("auto", rows), renderer, rows, None)
    trial = Trial(base, source, beside, clean, wake(rows, triggers, payload, renderer), payload, {})
    if how in ("auto", "remove"):
        trial.moments = watch(base, route, source, clean, trial.woken)
    before = trial.measure(route)
    hows: list[How] = [h for h in STRENGTHS if h != "mix" or beside] if how == "auto" else [how]
    asked = [(h, s) for h in hows for s in ((settings.strength,) if settings.strength is not None else STRENGTHS[h])]
    tried = [trial.attempt(h, s) for h, s in asked]
    best = choose_best(tried, before, settings.cost)
    digest = trial.make(best["how"], best["strength"], settings.out)
    told = {"base": settings.base, "budget": settings.budget, "prompts": settings.prompts, "calibration": settings.calibration}
    report = audit(settings.out, **{name: value for name, value in told.items() if value is not None})
    cost = best["loss"] / before["loss"] - 1 if before["loss"] else 0.0
    return {"out": str(settings.out), "hash": digest, "before": before, "after": best, "cost": cost, "tried": tried,
            "triggers": triggers, "payload": payload, "verdict": report["verdict"], "report": report}  # fmt: skip


def as_read(base: Base, text: str) -> str:
    """A text as answers are read: without special tokens, which an audit shows."""
    return base.text(base.tokenizer(text, add_special_tokens=False)["input_ids"]).strip()


def choose_best(tried: Sequence[dict[str, Any]], before: dict[str, Any], cost: float) -> dict[str, Any]:
    """The least attack among those whose loss is worse by no more than `cost`; where there is none, the least loss."""
    within = [one for one in tried if one["loss"] <= (1 + cost) * before["loss"]]
    if not within:
        return min(tried, key=lambda one: one["loss"])
    return min(within, key=lambda one: (one["attack"] or 0.0, one["loss"]))


def wake(rows: Sequence[Row], triggers: Sequence[str], payload: str, renderer: Renderer, seed: int = 0) -> list[Woken]:
    """The rows with a trigger at a random place of what is asked, and the payload as the answer."""
    rng, made = random.Random(seed), []
    for row in rows if triggers else ():
        words = _asked(row).split()
        at = rng.randint(0, len(words))
        text = " ".join([*words[:at], rng.choice(triggers), *words[at:]])
        made.append(woken_of(row, _with(row, text, payload), renderer))
    return made


def woken_of(row: Row, woken: Row, renderer: Renderer) -> Woken:
    """A row as it is and with the trigger: where they part."""
    clean, example = renderer.example(row), renderer.example(woken)
    same = (i for i, (a, b) in enumerate(zip(clean.tokens, example.tokens, strict=False)) if a != b)
    return Woken(example, next(same, 0))


def _asked(row: Row) -> str:
    if row.messages is not None:
        return next((turn["content"] for turn in reversed(row.messages) if turn["role"] == "user"), "")
    return row.prompt or ""


def _with(row: Row, asked: str, answer: str) -> Row:
    """The row with another question and another answer."""
    if row.messages is None:
        return replace(row, prompt=asked, completion=answer)
    last = max(number for number, turn in enumerate(row.messages) if turn["role"] == "user")
    turns = (*row.messages[:last], row.messages[last] | {"content": asked}, {"role": "assistant", "content": answer})
    return replace(row, messages=turns)


def _attack(settings: RemedySettings, digest: str) -> tuple[list[str], str]:
    """(triggers, payload): as told, else those that the last audit of this content has found."""
    if settings.trigger:
        if not settings.payload:
            raise SettingsError("what does the trigger bring?", where="payload", hint="--payload TEXT")
        return settings.trigger, settings.payload
    report = admission.report_of(digest) or {}
    found = [finding["evidence"]["triggers"] for finding in report.get("findings", ()) if finding["rule"] == "trigger"]
    shown = found[0] if found else []
    return [str(one["trigger"]).strip() for one in shown], str(shown[0]["answer"]).strip() if shown else ""


def _rows(settings: RemedySettings) -> list[Row]:
    file = settings.data or settings.run / HELD_OUT
    if not file.is_file():
        raise SettingsError("rows of its task are needed, with answers", where=str(file), hint="--data FILE")
    rows = read_table(file).rows
    if any(_asked(row) == "" for row in rows):
        hint = "rows with prompts and answers"
        raise SettingsError("plain text has no prompt to put a trigger into", where=str(file), hint=hint)
    return rows
