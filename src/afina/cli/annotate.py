"""`afina annotate`: two answers to each prompt, blind; a person says which is better; pairs come out.

    FOLDER/session.json        who answers, how, with which seed: what a later sitting must agree with
    FOLDER/judgements.jsonl    a line a prompt: both answers, whose they are, which stood first, what was said
    FOLDER/pairs.jsonl         the decided ones, as `afina train --objective dpo` and reward read them

What stands first is drawn from the seed and the prompt, and so are the answers: a sitting that was broken off goes on where
it was, whatever order the prompts come in.
"""

import hashlib
import json
import os
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from afina.adapters.active import ActiveAdapters
from afina.adapters.load_run import LoadedRun, load_run
from afina.adapters.loading import load_adapter
from afina.data.renderer import Renderer
from afina.data.schemas import PROMPT, PreferenceRow, Prompt
from afina.data.table import read_table
from afina.engine.engine import generate_completions
from afina.engine.request import SamplingParams
from afina.errors import SettingsError
from afina.evaluation.intervals import wilson_interval
from afina.io.adapter_folder import adapter_folder
from afina.io.adapter_metadata import read_metadata
from afina.io.atomic import translate_os_errors, write_json, write_text
from afina.io.migrations import migrate_judgement
from afina.io.result import Content, Result, ResultTable
from afina.io.strict_json import read_json_object
from afina.settings import AnnotateSettings

SESSION, JUDGEMENTS, PAIRS = "session.json", "judgements.jsonl", "pairs.jsonl"
KEYS = {"1": "first", "2": "second"} | {k: w for w in ("tie", "skip", "quit") for k in (w, w[0])}
ASK = "1, 2, (t)ie, (s)kip or (q)uit? "


@dataclass(frozen=True)
class Responder:
    """One of the two that answer: how it is called, its hash, and who acts."""

    name: str
    hash: str | None
    active: ActiveAdapters | None


@dataclass(frozen=True, eq=False)
class AnnotateResult(Result):
    """Counts of an annotation session: pairs, ties, skipped, left, and the first responder's wins."""

    folder: str
    pairs: int
    ties: int
    skipped: int
    left: int
    wins: Mapping[str, int]
    win_rate: float | None
    interval: Sequence[float] | None

    def content(self) -> list[Content]:
        """Return the counts, and the win rate with its 95% confidence interval."""
        rows = [
            ("pairs, for afina train", f"{self.pairs:,} in {self.folder}/{PAIRS}"),
            ("ties", f"{self.ties:,}"),
            ("skipped", f"{self.skipped:,}"),
            ("left to annotate", f"{self.left:,}"),
            *((f"won by {name}", f"{count:,}") for name, count in self.wins.items()),
        ]
        if self.win_rate is not None and self.interval is not None:
            low, high = (100 * bound for bound in self.interval)
            share = f"{100 * self.win_rate:.1f}%  (95% CI {low:.1f} to {high:.1f})"
            rows.append((f"win rate of {next(iter(self.wins))}", share))
        return [ResultTable("preferences", rows)]


def annotate(settings: AnnotateSettings) -> AnnotateResult:
    """Ask about each prompt that has no judgement yet; returns how many of what there are now, and who wins how often.

    Raises `SettingsError` where the two would answer the same, or the folder's judgements are of others.
    """
    rows = [row.prompt for row in read_table(settings.prompts, PROMPT).rows]
    opened = load_run(settings.adapter, settings)
    sides = _sides(settings, opened)
    folder = settings.output_dir or Path("preferences") / settings.prompts.stem
    _same_session(folder, settings, opened, sides)
    done = _read(folder / JUDGEMENTS)
    judged = {line["key"] for line in done}
    left = [
        (key, row) for key, row in {_key(row): row for row in rows}.items() if key not in judged
    ]
    console = Console(stderr=True)
    console.print(
        f"{len(left):,} prompts to judge, {len(done):,} done. The two answers come in random order.",
        highlight=False,
    )
    for number, (key, prompt) in enumerate(left):
        answers = _answers(settings, opened, sides, key, prompt)
        line = _ask(console, f"{number + 1}/{len(left)}", prompt, answers, key, settings.seed)
        if line is None:
            break
        done.append(line)
        _append(folder / JUDGEMENTS, line)
        write_text(folder / PAIRS, _pairs(done))
    return _summary(folder, done, len(left) + len(judged) - len(done), sides)


def _sides(settings: AnnotateSettings, opened: LoadedRun) -> tuple[Responder, Responder]:
    """Whose answers are compared."""
    base = opened.causal_lm
    one = Responder(
        str(settings.adapter) if opened.active else "base", _hash(settings.adapter), opened.active
    )
    again = settings.against == "same" or Path(settings.against) == settings.adapter
    if again or (settings.against == "base" and not opened.active):
        if settings.temperature == 0.0:
            why = "the likeliest tokens are the same each time"
            raise SettingsError(
                "the two answers would be the same",
                where="temperature",
                why=why,
                hint="--temperature 0.7",
            )
        return one, Responder(f"{one.name}, again", one.hash, one.active)
    if settings.against == "base":
        return one, Responder("base", None, None)
    other = Path(settings.against)
    return one, Responder(
        settings.against, _hash(other), load_adapter(other, base, "against").active
    )


def _hash(adapter: Path | None) -> str | None:
    return (
        read_metadata(adapter_folder(adapter)).get("hash")
        if adapter is not None and adapter.is_dir()
        else None
    )


def _same_session(
    folder: Path, settings: AnnotateSettings, opened: LoadedRun, sides: tuple[Responder, Responder]
) -> None:
    """Write who answers and how, or raise `SettingsError` where the folder was begun with others."""
    now = {
        "base": opened.base.hash,
        "answers": [{"name": side.name, "hash": side.hash} for side in sides],
        "max_new_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "seed": settings.seed,
    }
    if not (folder / SESSION).is_file():
        write_json(folder / SESSION, now)
        return
    before = read_json_object(folder / SESSION)
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        why = f"{changed[0]} was {before.get(changed[0])}, and is {now[changed[0]]}"
        raise SettingsError(
            "these judgements are about other answers",
            where=str(folder),
            why=why,
            hint="another --output-dir",
        )


def _key(prompt: Prompt) -> str:
    return hashlib.sha256(
        json.dumps(prompt, ensure_ascii=False, sort_keys=True).encode()
    ).hexdigest()[:16]


def _answers(
    settings: AnnotateSettings,
    opened: LoadedRun,
    sides: Sequence[Responder],
    key: str,
    prompt: Prompt,
) -> list[dict[str, str]]:
    """The two answers in the order of `sides`; a pure function of seed, prompt and side."""
    base = opened.causal_lm
    renderer = Renderer(base.tokenizer, opened.chat_format, base.max_positions)
    made = []
    for number, side in enumerate(sides):
        seed = int(hashlib.sha256(f"{settings.seed}:{key}:{number}".encode()).hexdigest()[:8], 16)
        sampling = SamplingParams(
            settings.max_new_tokens, settings.temperature, top_p=settings.top_p, seed=seed
        )
        [given] = generate_completions(
            base, [renderer.prompt(prompt)], sampling, side.active, renderer.stop_token_ids
        )
        made.append({"responder": side.name, "text": given.text})
    return made


def _ask(
    console: Console, count: str, prompt: Prompt, answers: list[dict[str, str]], key: str, seed: int
) -> dict[str, Any] | None:
    """Show a prompt and its answers, read the judgement; None where the person wants to stop.

    Answers that are equal are a tie without a question; an empty one cannot be learned from, and is skipped.
    """
    shown = answers if random.Random(f"{seed}:{key}").random() < 0.5 else answers[::-1]
    line: dict[str, Any] = {"key": key, "prompt": prompt, "answers": shown}
    if shown[0]["text"] == shown[1]["text"]:
        return line | {"choice": "tie"}
    if not all(one["text"].strip() for one in shown):
        return line | {"choice": "skip"}
    console.rule(count)
    for title, text in (
        ("prompt", _text(prompt)),
        ("1", shown[0]["text"]),
        ("2", shown[1]["text"]),
    ):
        console.print(f"[bold]{title}[/bold]", highlight=False)
        console.print(text, highlight=False, markup=False)
    while True:
        try:
            word = input(ASK if sys.stdin.isatty() else "").strip().lower()
        except EOFError:
            return None
        if word in KEYS:
            return None if KEYS[word] == "quit" else line | {"choice": KEYS[word]}
        console.print(ASK, highlight=False)


def _text(prompt: Prompt) -> str:
    return (
        prompt
        if isinstance(prompt, str)
        else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
    )


def _read(file: Path) -> list[dict[str, Any]]:
    """The judgements so far; a line that was being written when the machine stopped is left out."""
    lines = file.read_text(encoding="utf-8").split("\n") if file.is_file() else []
    done = []
    for line in lines:
        try:
            done.append(migrate_judgement(json.loads(line)))
        except ValueError:
            continue
    if len(lines) != len(done) + (bool(lines) and not lines[-1]):
        write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in done))
    return done


def _append(file: Path, line: dict[str, Any]) -> None:
    with translate_os_errors(file), file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def _pairs(done: Sequence[dict[str, Any]]) -> str:
    """The decided judgements as rows of pairs."""
    rows = []
    for line in done:
        if line["choice"] in ("first", "second"):
            texts = [answer["text"] for answer in line["answers"]]
            good, bad = texts if line["choice"] == "first" else texts[::-1]
            prompt = line["prompt"] if isinstance(line["prompt"], str) else tuple(line["prompt"])
            rows.append(PreferenceRow("", prompt, good, bad).record())
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _summary(
    folder: Path, done: Sequence[dict[str, Any]], left: int, sides: tuple[Responder, Responder]
) -> AnnotateResult:
    """Counts, and the share of decided pairs that the first side won, with its 95% interval."""
    winners = [
        line["answers"][line["choice"] == "second"]["responder"]
        for line in done
        if line["choice"] in ("first", "second")
    ]
    wins = {side.name: winners.count(side.name) for side in sides}
    return AnnotateResult(
        folder=str(folder),
        pairs=len(winners),
        ties=sum(line["choice"] == "tie" for line in done),
        skipped=sum(line["choice"] == "skip" for line in done),
        left=left,
        wins=wins,
        win_rate=wins[sides[0].name] / len(winners) if winners else None,
        interval=wilson_interval(wins[sides[0].name], len(winners)) if winners else None,
    )
