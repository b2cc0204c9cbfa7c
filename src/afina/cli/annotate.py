"""`afina annotate`: a person chooses the better of two answers, without seeing their source.

    FOLDER/session.json        what generates the answers, how, with which seed: checked on resume
    FOLDER/judgements.jsonl    a line per prompt: both answers, their sources, order and choice
    FOLDER/pairs.jsonl         the decided ones, as rows for `afina train --objective dpo`

Answers and their order are a pure function of the seed and the prompt: an interrupted session
continues, whatever the order of the prompts.
"""

import hashlib
import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from afina.adapters.active import BASE_ONLY, ActiveAdapters
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
from afina.io.atomic import write_json, write_text
from afina.io.jsonl import append_jsonl, read_jsonl, to_jsonl, write_jsonl
from afina.io.migrations import migrate_judgement
from afina.io.result import Content, Result, ResultTable
from afina.io.strict_json import read_json_object
from afina.settings import AnnotateSettings

SESSION, JUDGEMENTS, PAIRS = "session.json", "judgements.jsonl", "pairs.jsonl"
CHOICES = {"1": "first", "2": "second"} | {
    key: word for word in ("tie", "skip", "quit") for key in (word, word[0])
}
QUESTION = "1, 2, (t)ie, (s)kip or (q)uit? "


@dataclass(frozen=True)
class Responder:
    """Source of answers: its name, the hash of its adapter, and the active adapters."""

    name: str
    hash: str | None
    active: ActiveAdapters


@dataclass(frozen=True, eq=False)
class AnnotateResult(Result):
    """Counts of a session: pairs, ties, skipped, left, and how often the first responder won."""

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
    """Request a choice for each prompt that has none; return the counts and the win rate.

    Raises:
        SettingsError: Both answers would be equal, or the folder's judgements are of other answers.
    """
    rows = [row.prompt for row in read_table(settings.prompts, PROMPT).rows]
    opened = load_run(settings.adapter, settings)
    sides = _sides(settings, opened)
    folder = settings.output_dir or Path("preferences") / settings.prompts.stem
    _same_session(folder, settings, opened, sides)
    done = _read_judgements(folder / JUDGEMENTS)
    judged = {line["key"] for line in done}
    left = [
        (key, row) for key, row in {_key(row): row for row in rows}.items() if key not in judged
    ]
    console = Console(stderr=True)
    console.print(
        f"{len(left):,} prompts to annotate, {len(done):,} done; "
        "the two answers are in random order.",
        highlight=False,
    )
    for number, (key, prompt) in enumerate(left):
        answers = _answers(settings, opened, sides, key, prompt)
        line = _ask(console, f"{number + 1}/{len(left)}", prompt, answers, key, settings.seed)
        if line is None:
            break
        done.append(line)
        append_jsonl(folder / JUDGEMENTS, line)
        write_text(folder / PAIRS, to_jsonl(_pairs(done)))
    return _summary(folder, done, len(left) + len(judged) - len(done), sides)


def _sides(settings: AnnotateSettings, opened: LoadedRun) -> tuple[Responder, Responder]:
    """Return the two sources of answers."""
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
        return one, Responder("base", None, BASE_ONLY)
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
    """Record the sources of answers; raise `SettingsError` where they are not the recorded ones."""
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
    """Return both answers in the order of `sides`; a pure function of seed, prompt and side."""
    base = opened.causal_lm
    renderer = Renderer(base.tokenizer, opened.chat_format, base.max_positions)
    answers = []
    for number, side in enumerate(sides):
        seed = int(hashlib.sha256(f"{settings.seed}:{key}:{number}".encode()).hexdigest()[:8], 16)
        sampling = SamplingParams(
            settings.max_new_tokens, settings.temperature, top_p=settings.top_p, seed=seed
        )
        [given] = generate_completions(
            base, [renderer.prompt(prompt)], sampling, side.active, renderer.stop_token_ids
        )
        answers.append({"responder": side.name, "text": given.text})
    return answers


def _ask(
    console: Console, count: str, prompt: Prompt, answers: list[dict[str, str]], key: str, seed: int
) -> dict[str, Any] | None:
    """Print a prompt and its answers, and read the choice; return None to stop.

    Equal answers are a tie without a question; a pair with an empty answer is skipped.
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
            word = input(QUESTION if sys.stdin.isatty() else "").strip().lower()
        except EOFError:
            return None
        if word in CHOICES:
            choice = CHOICES[word]
            return None if choice == "quit" else line | {"choice": choice}
        console.print(QUESTION, highlight=False)


def _text(prompt: Prompt) -> str:
    return (
        prompt
        if isinstance(prompt, str)
        else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
    )


def _read_judgements(file: Path) -> list[dict[str, Any]]:
    """Return the judgements so far; an incomplete last line is removed from the file."""
    done = [migrate_judgement(line) for line in read_jsonl(file)]
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if text.count("\n") != len(done) or (text and text[-1] != "\n"):
        write_jsonl(file, done)
    return done


def _pairs(done: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the decided judgements as rows of pairs."""
    rows = []
    for line in done:
        if line["choice"] in ("first", "second"):
            texts = [answer["text"] for answer in line["answers"]]
            chosen, rejected = texts if line["choice"] == "first" else texts[::-1]
            prompt = line["prompt"] if isinstance(line["prompt"], str) else tuple(line["prompt"])
            rows.append(PreferenceRow("", prompt, chosen, rejected).record())
    return rows


def _summary(
    folder: Path, done: Sequence[dict[str, Any]], left: int, sides: tuple[Responder, Responder]
) -> AnnotateResult:
    """Return counts, and the ratio of decided pairs that the first side won, with its 95% CI."""
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
