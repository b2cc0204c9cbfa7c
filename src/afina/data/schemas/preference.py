"""Preference rows: a better and a worse answer to one prompt, or one answer with a label.

OpenAI          {"input": {"messages": [...]}, "preferred_output": [...],
                 "non_preferred_output": [...]}
pairs           {"prompt": ..., "chosen": ..., "rejected": ...}  texts, messages, or lists of these
conversations   {"conversations" or "messages": [...], "chosen": {...}, "rejected": {...}}
full chats      {"chosen": [...], "rejected": [...]}   the prompt is their shared beginning,
                up to the last turn that both have; the chats can be texts with speakers
Alpaca          {"instruction": ..., "input": ..., "chosen": ..., "rejected": ...}
labels (KTO)    {"messages": [...], "label": true}, {"prompt", "completion", "label"},
                {"instruction", "output", "kto_tag"}
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from afina.data.columns import ColumnMapping, RawRecord, list_columns, usable_text
from afina.data.schemas.base import Schema, register_schema
from afina.data.schemas.messages import (
    ROLES,
    Message,
    Prompt,
    as_messages,
    parse_prompt,
    parse_tools,
    parse_turns,
)
from afina.data.schemas.sft import SFTRow
from afina.errors import DataError

PAIRS, LABELS = "pairs", "labels"  # the formats of preference rows
ANSWER_FIELDS = ("chosen", "rejected")
# a turn of a chat that is written as one text, as in Anthropic's HH-RLHF
_TURN = re.compile(
    r"(?:^|\n)[ \t]*(?:###[ \t]*)?"
    r"(Human|User|Usuario|Humano|Assistant|Asistente|System|Sistema)[ \t]*:",
    re.IGNORECASE,
)
_SPEAKERS = {"usuario": "user", "humano": "user", "asistente": "assistant", "sistema": "system"}
PROMPT_RULE = "the prompt is in its own column"
CHATS_RULE = "the prompt is the beginning of both chats, up to the last turn that both have"
TEXTS_RULE = "two chats as texts, split at the last turn that both have"
LABEL_RULE = "one answer a row, with a label"
BOOLEAN_TEXTS = {"true": True, "false": False, "1": True, "0": False}  # labels in a CSV file


@dataclass(frozen=True)
class PreferenceRow:
    """A prompt, a better answer and a worse one; a row with a label has one of the two.

    The prompt is a text to continue, or messages; an answer likewise.
    """

    where: str
    prompt: Prompt
    chosen: Prompt | None
    rejected: Prompt | None
    tools: tuple[dict[str, Any], ...] = ()

    def row(self, answer: Prompt) -> SFTRow:
        """Return the prompt with an answer, of which only the answer is trained on."""
        if isinstance(self.prompt, str) and isinstance(answer, str) and not self.tools:
            return SFTRow(self.where, prompt=self.prompt, completion=answer)
        context = tuple(_without_loss(message) for message in as_messages(self.prompt, "user"))
        return SFTRow(
            self.where, messages=(*context, *as_messages(answer, "assistant")), tools=self.tools
        )

    def answered(self, prompt: Prompt) -> list[SFTRow]:
        """Return the rows of both answers, or of the one that there is, after another prompt."""
        row = replace(self, prompt=prompt)
        return [row.row(answer) for answer in (self.chosen, self.rejected) if answer is not None]

    def record(self) -> dict[str, Any]:
        """Return the row as a record that `read_table` reads again as this row."""
        is_text = isinstance(self.prompt, str)
        prompt: dict[str, Any] = {"tools": list(self.tools)} if self.tools else {}
        prompt |= {"prompt": self.prompt} if is_text else {"messages": list(self.prompt)}
        chosen, rejected = (_to_json(answer) for answer in (self.chosen, self.rejected))
        if chosen is not None and rejected is not None:
            return prompt | {"chosen": chosen, "rejected": rejected}
        is_good = chosen is not None
        return prompt | {"completion": chosen if is_good else rejected, "label": is_good}


def _without_loss(message: Message) -> Message:
    return message | {"weight": 0} if message["role"] == "assistant" else message


def _to_json(answer: Prompt | None) -> Any:
    return list(answer) if isinstance(answer, tuple) else answer


def split_pairs(rows: Sequence[PreferenceRow]) -> list[PreferenceRow]:
    """Return pairs as two labeled rows each, one per answer, as KTO needs them."""
    halves = [
        half for row in rows for half in (replace(row, rejected=None), replace(row, chosen=None))
    ]
    return [half for half in halves if half.chosen or half.rejected]


@register_schema("preference")
class PreferenceSchema(Schema[PreferenceRow]):
    """Pairs of answers, and answers with a label."""

    name = "preference"
    fields = (
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
        "tools",
    )
    aliases = {
        "tools": ("functions", "input.tools"),
        "messages": ("conversations", "input.messages"),
        "chosen": ("preferred_output",),
        "rejected": ("non_preferred_output",),
        "label": ("kto_tag",),
    }

    def is_header(self, fields: set[str]) -> bool:
        """Return whether a CSV header names an answer or a label."""
        return bool({"chosen", "label"} & fields)

    def recognizes(self, records: Sequence[RawRecord]) -> str | None:
        """Return "pairs" for two answers, "labels" for an answer with a boolean, else None."""
        if not records:
            return None
        first = records[0]
        fields = first.mapping.fields_in(first.raw)
        if set(ANSWER_FIELDS) <= fields:
            return PAIRS
        has_answer = bool({"messages", "completion", "output"} & fields)
        return LABELS if has_answer and isinstance(first.peek("label"), bool) else None

    def objective(self, format: str) -> str:
        """Return "dpo" for pairs and "kto" for labels."""
        return "dpo" if format == PAIRS else "kto"

    def find_format(self, path: Path, mapping: ColumnMapping) -> str:
        """Return "": each row is a pair or has a label."""
        return ""

    def parse(self, record: RawRecord) -> PreferenceRow:
        """Return the pair or the labeled answer of a record; raises `DataError`."""
        if any(record.has(name) for name in ANSWER_FIELDS):
            return _parse_pair(record)
        if not record.has_column("label"):
            hint = (
                "chosen and rejected, or label; "
                "map yours: --columns '{chosen: better, rejected: worse}'"
            )
            why = f"columns found: {list_columns(map(str, record.raw))}"
            what = "neither a pair of answers nor a label"
            raise DataError(what, where=record.where, why=why, hint=hint)
        return _parse_labeled(record)

    def reading_rule(self, record: RawRecord) -> str:
        """Return how a record is split into prompt and answers."""
        if not any(record.has(name) for name in ANSWER_FIELDS):
            return LABEL_RULE
        if any(record.has(name) for name in ("messages", "prompt", "instruction")):
            return PROMPT_RULE
        return TEXTS_RULE if isinstance(record.peek("chosen"), str) else CHATS_RULE

    def format_of_rows(
        self, path: Path, format: str, records: Sequence[RawRecord], rows: Sequence[PreferenceRow]
    ) -> str:
        """Return "pairs" or "labels"; raises `DataError` where the rows are of both kinds."""
        kinds = {LABELS if row.chosen is None or row.rejected is None else PAIRS for row in rows}
        if len(kinds) > 1:
            what = "some rows are pairs and some have labels"
            raise DataError(what, where=str(path), hint="one file for each")
        return kinds.pop()


def _parse_pair(record: RawRecord) -> PreferenceRow:
    for name in ANSWER_FIELDS:
        if not record.has(name):
            raise DataError("the field is missing", where=record.field_location(name))
    if not any(record.has(name) for name in ("messages", "prompt", "instruction")):
        return _parse_full_chats(record)
    prompt = parse_prompt(record, has_answers=True)
    chosen, rejected = (_parse_answer(record, name, prompt) for name in ANSWER_FIELDS)
    chosen, rejected = _without_prompt(prompt, chosen, rejected)
    return _check_pair(PreferenceRow(record.where, prompt, chosen, rejected, parse_tools(record)))


def _parse_full_chats(record: RawRecord) -> PreferenceRow:
    """Return two full chats as a pair, with their shared beginning as the prompt."""
    chosen, rejected = (_parse_full_chat(record, name) for name in ANSWER_FIELDS)
    pairs = zip(chosen, rejected, strict=False)
    num_shared = next((n for n, (a, b) in enumerate(pairs) if a != b), None)
    if num_shared is None:
        num_shared = min(len(chosen), len(rejected))
    ends = [n for n in range(1, num_shared + 1) if chosen[n - 1]["role"] != "assistant"]
    if not ends:
        raise DataError(
            "the two chats do not begin alike",
            where=record.field_location("chosen"),
            hint="add the prompt: {prompt: ..., chosen: ..., rejected: ...}",
        )
    cut = ends[-1]
    answers = chosen[cut:], rejected[cut:]
    return _check_pair(PreferenceRow(record.where, chosen[:cut], *answers, parse_tools(record)))


def _parse_full_chat(record: RawRecord, name: str) -> tuple[Message, ...]:
    """Return a chat, also one that is written as a text with its speakers."""
    value, where = record.get(name), record.field_location(name)
    if not isinstance(value, str):
        return parse_turns(value, where, "assistant")
    turns = list(_TURN.finditer(value))
    if not turns or value[: turns[0].start()].strip():
        return parse_turns(value, where, "assistant")
    ends = [turn.start() for turn in turns[1:]] + [len(value)]
    messages = []
    for turn, end in zip(turns, ends, strict=True):
        speaker = turn[1].lower()
        content = usable_text(value[turn.end() : end].strip(), where)
        messages.append({"role": ROLES[_SPEAKERS.get(speaker, speaker)], "content": content})
    return tuple(messages)


def _without_prompt(prompt: Prompt, chosen: Prompt, rejected: Prompt) -> tuple[Prompt, Prompt]:
    """Return two answers without the prompt, where both are texts that repeat it."""
    if not (isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str)):
        return chosen, rejected
    rest = tuple(answer.removeprefix(prompt) for answer in (chosen, rejected))
    repeats = all(
        0 < len(r) < len(answer) for r, answer in zip(rest, (chosen, rejected), strict=True)
    )
    return (rest[0], rest[1]) if repeats and " " in prompt.strip() else (chosen, rejected)


def _check_pair(row: PreferenceRow) -> PreferenceRow:
    for answer, name in ((row.chosen, "chosen"), (row.rejected, "rejected")):
        if not answer:
            raise DataError("the answer is missing", where=f"{row.where}:{name}")
    if row.chosen == row.rejected:
        hint = "leave it out with --skip-bad-rows"
        raise DataError("the two answers are the same", where=row.where, hint=hint)
    return row


def _parse_labeled(record: RawRecord) -> PreferenceRow:
    label = record.get("label")
    text = str(label).strip().lower()
    is_good = label if isinstance(label, bool) else BOOLEAN_TEXTS.get(text)
    if is_good is None:
        raise DataError(
            "a label is true (a good answer) or false",
            where=record.field_location("label"),
            why=f"found {label!r}",
        )
    name = next((name for name in ("output", "completion") if record.has(name)), None)
    prompt = parse_prompt(record, has_answers=name is not None)
    if name is not None:
        answer = _parse_answer(record, name, prompt)
    else:
        prompt, answer = _cut_last_answer(prompt, record)
    chosen, rejected = (answer, None) if is_good else (None, answer)
    return PreferenceRow(record.where, prompt, chosen, rejected, parse_tools(record))


def _parse_answer(record: RawRecord, name: str, prompt: Prompt) -> Prompt:
    """Return an answer, a text or messages, without the prompt where its messages repeat it."""
    value, where = record.get(name), record.field_location(name)
    if isinstance(value, str):
        return usable_text(value, where)
    turns = parse_turns(value, where, "assistant")
    context = as_messages(prompt, "user")
    if turns[: len(context)] == context:
        turns = turns[len(context) :]
    begins_well = bool(turns) and turns[0]["role"] in ("assistant", "tool")
    if not begins_well or all(message["role"] != "assistant" for message in turns):
        raise DataError(
            "the answer does not follow the prompt",
            where=where,
            why="it has to begin with the assistant's turn",
        )
    return turns


def _cut_last_answer(prompt: Prompt, record: RawRecord) -> tuple[Prompt, Prompt]:
    """Return a full chat as the prompt and its last answer."""
    where = record.field_location("messages")
    if isinstance(prompt, str) or not prompt or prompt[-1]["role"] != "assistant":
        hint = "a last turn of the assistant, or a completion"
        raise DataError("no answer that the label applies to", where=where, hint=hint)
    if len(prompt) < 2:
        raise DataError("no prompt comes before the answer", where=where)
    return prompt[:-1], prompt[-1:]
