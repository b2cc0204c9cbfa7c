"""Preferences: which of two answers is better, or whether one answer is good. Formats in, one kind of row out.

OpenAI          {"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}
pairs           {"prompt": ..., "chosen": ..., "rejected": ...}          texts, messages, or lists of these
conversations   {"conversations" or "messages": [...], "chosen": {...}, "rejected": {...}}
whole chats     {"chosen": [...], "rejected": [...]}                     the prompt is what they share
Alpaca          {"instruction": ..., "input": ..., "chosen": ..., "rejected": ...}
labels (KTO)    {"messages": [...], "label": true}, {"prompt", "completion", "label"}, {"instruction", "output", "kto_tag"}
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from afina.data.formats import check_columns, first_record, read_records
from afina.data.rows import (
    Message,
    RawRecord,
    SFTRow,
    kind_of,
    read_history,
    read_turn,
    usable_text,
)
from afina.data.skipped import Made, parse_rows, summarize_skipped
from afina.errors import DataError

FIELDS = (
    "messages",
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "label",
    "instruction",
    "input",
    "output",
    "system",
    "history",
)
ALIASES = {
    "conversations": "messages",
    "preferred_output": "chosen",
    "non_preferred_output": "rejected",
    "kto_tag": "label",
}
PAIRS, LABELS = "pairs", "labels"
Prompt = str | tuple[Message, ...]
TRUTH = {"true": True, "false": False, "1": True, "0": False}  # what a cell of a CSV file says


@dataclass(frozen=True)
class PreferenceRow:
    """One row: a prompt, a good answer and a bad one; a row with a label has one of the two.

    The prompt is a text to go on with, or messages; an answer likewise.
    """

    where: str
    prompt: Prompt
    chosen: Prompt | None
    rejected: Prompt | None

    def row(self, answer: Prompt) -> SFTRow:
        """The prompt with an answer, of which only that is learned."""
        if isinstance(self.prompt, str) and isinstance(answer, str):
            return SFTRow(self.where, prompt=self.prompt, completion=answer)
        before = tuple(
            m | {"weight": "0"} if m["role"] == "assistant" else m
            for m in _messages(self.prompt, "user")
        )
        return SFTRow(self.where, messages=(*before, *_messages(answer, "assistant")))

    def record(self) -> dict[str, Any]:
        """The row for a file, as `read_preferences` reads it."""
        prompt = (
            {"prompt": self.prompt}
            if isinstance(self.prompt, str)
            else {"messages": list(self.prompt)}
        )
        good, bad = (list(a) if isinstance(a, tuple) else a for a in (self.chosen, self.rejected))
        if good is None or bad is None:
            return prompt | {"completion": bad if good is None else good, "label": good is not None}
        return prompt | {"chosen": good, "rejected": bad}


@dataclass(frozen=True)
class PreferenceTable:
    """The rows of one file, "pairs" or "labels", the rows left out ("file:line:field: what"), and the file's sha256."""

    path: Path
    format: str
    rows: list[PreferenceRow]
    skipped: list[str]
    digest: str


def preference_format(path: Path, columns: Mapping[str, str]) -> str | None:
    """ "pairs" or "labels" where the first row of a file says so, else None. Labels are true or false beside an answer."""
    if path.is_dir():
        return None
    try:
        first = first_record(
            path,
            lambda names: {"chosen", "rejected"} <= our_names(dict.fromkeys(names), columns).keys(),
        )
    except DataError:  # said again, and better, by who reads it all
        return None
    values = our_names(first, columns)
    if {"chosen", "rejected"} <= values.keys():
        return PAIRS
    answers = {"messages", "completion", "output"} & values.keys()
    return LABELS if answers and isinstance(values.get("label"), bool) else None


def read_preferences(
    path: Path, columns: Mapping[str, str], skip_bad_rows: bool = False
) -> PreferenceTable:
    """Read a file of pairs or of labelled answers; raises `DataError` with file:line:field.

    `columns` gives our field names the file's own. With `skip_bad_rows` a row that cannot be used is left out and listed.
    """
    check_columns(path, columns, FIELDS)
    wanted = {"chosen", "label"}
    records, digest = read_records(
        path, lambda names: bool(wanted & our_names(dict.fromkeys(names), columns).keys())
    )
    rows, skipped = usable_records(path, records, columns, _row, skip_bad_rows)
    kinds = {
        PAIRS if row.chosen is not None and row.rejected is not None else LABELS for row in rows
    }
    if len(kinds) > 1:
        raise DataError(
            "some rows are pairs and some have labels", where=str(path), hint="a file for each"
        )
    return PreferenceTable(Path(path), kinds.pop(), rows, skipped, digest)


def usable_records(
    path: Path,
    records: Iterable[tuple[str, Any]],
    columns: Mapping[str, str],
    make: Callable[[RawRecord], Made],
    skip: bool,
) -> tuple[list[Made], list[str]]:
    """Rows that `make` gives of records under our names, and those left out where `skip`; raises `DataError` for none."""
    skipped: list[str] = []
    rows = parse_rows(
        records,
        lambda where, r: make(RawRecord(where, our_names(r, columns), their_names(r, columns), r)),
        skipped if skip else None,
    )
    if not rows:
        raise DataError(
            "no row can be used",
            where=str(path),
            why=f"skipped: {summarize_skipped(skipped)}" if skipped else None,
        )
    return rows, skipped


def as_labels(rows: Sequence[PreferenceRow]) -> list[PreferenceRow]:
    """Pairs as two labelled rows each: a good answer and a bad one."""
    return [
        half
        for row in rows
        for half in (replace(row, rejected=None), replace(row, chosen=None))
        if half.chosen or half.rejected
    ]


def prompt_key(row: PreferenceRow) -> str:
    """What tells prompts apart: rows of one prompt are judged, or learned, together."""
    return hashlib.sha256(repr(row.prompt).encode()).hexdigest()


def our_names(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A record by our field names."""
    taken = {theirs: ours for ours, theirs in columns.items()}
    kept = {name: value for name, value in record.items() if name in taken or name not in columns}
    named = {taken.get(name) or ALIASES.get(name, name): value for name, value in kept.items()}
    if isinstance(named.get("input"), dict) and "messages" not in named:  # OpenAI's
        named["messages"] = named.pop("input").get("messages")
    return named


def their_names(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, str]:
    """What the file calls our fields, for errors."""
    names = {ours: theirs for theirs, ours in ALIASES.items() if theirs in record}
    return (
        ({"messages": "input.messages"} if isinstance(record.get("input"), dict) else {})
        | names
        | dict(columns)
    )


def _row(record: RawRecord) -> PreferenceRow:
    values = record.values
    if values.get("chosen") is not None or values.get("rejected") is not None:
        return _pair(record)
    if "label" not in values:
        found = ", ".join(map(str, values))
        hint = "chosen and rejected, or label; name yours: --columns '{chosen: better, rejected: worse}'"
        raise DataError(
            "neither a pair of answers nor a label",
            where=record.where,
            why=f"fields: {found}",
            hint=hint,
        )
    label = values["label"]
    truth = label if isinstance(label, bool) else TRUTH.get(str(label).strip().lower())
    if truth is None:
        raise DataError(
            "a label is true (a good answer) or false",
            where=record.field_location("label"),
            why=f"found {label!r}",
        )
    prompt, answer = read_prompt(record), None
    for field in ("completion", "output"):
        if values.get(field) is not None:
            answer = _answer(values[field], record.field_location(field), prompt)
    if answer is None:
        prompt, answer = _last_answer(prompt, record)
    return PreferenceRow(record.where, prompt, answer if truth else None, None if truth else answer)


def _pair(record: RawRecord) -> PreferenceRow:
    for field in ("chosen", "rejected"):
        if record.values.get(field) is None:
            raise DataError("the field is missing", where=record.field_location(field))
    if not {"messages", "prompt", "instruction"} & {
        n for n, v in record.values.items() if v is not None
    }:
        return _implicit(record)
    prompt = read_prompt(record)
    good, bad = (
        _answer(record.values[f], record.field_location(f), prompt) for f in ("chosen", "rejected")
    )
    return _different(PreferenceRow(record.where, prompt, good, bad))


def _implicit(record: RawRecord) -> PreferenceRow:
    """Two whole chats: the prompt is what both begin with."""
    good, bad = (
        _turns(record.values[f], record.field_location(f), "assistant")
        for f in ("chosen", "rejected")
    )
    pairs = zip(good, bad, strict=False)
    shared = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(good), len(bad)))
    ends = [n for n in range(1, shared + 1) if good[n - 1]["role"] != "assistant"]
    if not ends:
        hint = "add the prompt: {prompt: ..., chosen: ..., rejected: ...}"
        raise DataError(
            "the two chats do not begin alike", where=record.field_location("chosen"), hint=hint
        )
    cut = ends[-1]
    return _different(PreferenceRow(record.where, good[:cut], good[cut:], bad[cut:]))


def _different(row: PreferenceRow) -> PreferenceRow:
    for answer, name in ((row.chosen, "chosen"), (row.rejected, "rejected")):
        if not answer:
            raise DataError("the answer is missing", where=f"{row.where}:{name}")
    if row.chosen == row.rejected:
        raise DataError(
            "the two answers are the same",
            where=row.where,
            hint="leave it out with --skip-bad-rows",
        )
    return row


def read_prompt(record: RawRecord) -> Prompt:
    """Messages, a text, or Alpaca's instruction; with the system message where there is one."""
    values = record.values
    system = record.optional("system").strip()
    opening = ({"role": "system", "content": system},) if system else ()
    if values.get("messages") is not None:
        return (*opening, *_turns(values["messages"], record.field_location("messages"), "user"))
    if values.get("prompt") is None:
        return read_history(record)
    if isinstance(values["prompt"], str):
        text = record.text("prompt")
        return (*opening, {"role": "user", "content": text}) if opening else text
    return (*opening, *_turns(values["prompt"], record.field_location("prompt"), "user"))


def _answer(value: Any, place: str, prompt: Prompt) -> Prompt:
    """An answer: a text, or its messages, without the prompt where they repeat it; raises `DataError`."""
    if isinstance(value, str):
        return usable_text(value, place)
    turns = _turns(value, place, "assistant")
    before = _messages(prompt, "user")
    if turns[: len(before)] == before:
        turns = turns[len(before) :]
    if (
        not turns
        or turns[0]["role"] not in ("assistant", "tool")
        or not any(m["role"] == "assistant" for m in turns)
    ):
        raise DataError(
            "the answer does not follow the prompt",
            where=place,
            why="it has to begin with the assistant's turn",
        )
    return turns


def _last_answer(prompt: Prompt, record: RawRecord) -> tuple[Prompt, Prompt]:
    """A whole chat, cut before its last answer."""
    place = record.field_location("messages")
    if isinstance(prompt, str) or not prompt or prompt[-1]["role"] != "assistant":
        hint = "a last turn of the assistant, or a completion"
        raise DataError("there is no answer for the label to be about", where=place, hint=hint)
    if len(prompt) < 2:
        raise DataError("no prompt comes before the answer", where=place)
    return prompt[:-1], prompt[-1:]


def _turns(value: Any, place: str, role: str) -> tuple[Message, ...]:
    """A text, one message or a list of them, as messages; a text is the `role`'s."""
    if isinstance(value, str):
        return ({"role": role, "content": usable_text(value, place)},)
    listed = [value] if isinstance(value, dict) else value
    if not isinstance(listed, list) or not listed:
        raise DataError(f"expected a text or messages, found {kind_of(value)}", where=place)
    return tuple(m for n, turn in enumerate(listed) if (m := read_turn(turn, f"{place}[{n}]")))


def _messages(prompt: Prompt, role: str) -> tuple[Message, ...]:
    return ({"role": role, "content": prompt},) if isinstance(prompt, str) else prompt
