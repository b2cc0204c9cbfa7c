"""Prompts that are to be answered, each perhaps with a reference that a judge may look at.

a text              one prompt a line
prompt              {"prompt": ..., "completion" (or "output", "reference"): ...}     the prompt a text or messages
chats               {"messages": [...]}     a last answer is the reference
Alpaca              {"instruction": ..., "input": ..., "output": ...}
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from afina.data.formats import check_columns, file_bytes, read_records
from afina.data.preferences import Prompt, our_names, read_prompt, usable_records
from afina.data.readers import decode, looks_like_json
from afina.data.rows import RawRecord, usable_text
from afina.errors import DataError

FIELDS = (
    "messages",
    "prompt",
    "completion",
    "output",
    "reference",
    "instruction",
    "input",
    "system",
    "history",
)
TABLES = (".csv", ".tsv", ".parquet")
ITEM = "item"  # in rows of our own, the row from which they were made


@dataclass(frozen=True)
class PromptRow:
    """One prompt, a text to go on with or messages, and the answer that it is judged by, where there is one.

    `item` is the whole row as the file has it: a grader may look at any of its fields.
    """

    where: str
    prompt: Prompt
    reference: str | None = None
    item: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The prompt for a judge: as it is, a single message's content, or the chat with its roles."""
        if isinstance(self.prompt, str):
            return self.prompt
        if len(self.prompt) == 1:
            return self.prompt[0]["content"]
        return "\n".join(f"{message['role']}: {message['content']}" for message in self.prompt)

    def record(self, whole: bool = False) -> dict[str, Any]:
        """The row for a file, as `read_asked` reads it; `whole` with its item."""
        prompt = self.prompt if isinstance(self.prompt, str) else list(self.prompt)
        reference = {} if self.reference is None else {"reference": self.reference}
        return {"prompt": prompt} | reference | ({ITEM: dict(self.item)} if whole else {})


@dataclass(frozen=True)
class AskedTable:
    """The rows of one file, the rows left out ("file:line:field: what"), and the file's sha256."""

    path: Path
    rows: list[PromptRow]
    skipped: list[str]
    digest: str
    format: str = "prompts"


def read_asked(path: Path, columns: Mapping[str, str], skip_bad_rows: bool = False) -> AskedTable:
    """Read a file of prompts; raises `DataError` with file:line:field.

    `columns` gives our field names the file's own. With `skip_bad_rows` a row that cannot be used is left out and listed.
    """
    check_columns(path, columns, FIELDS)
    data = file_bytes(path)
    if (
        data[:4] != b"PAR1"
        and path.suffix.lower() not in TABLES
        and not looks_like_json(path, text := decode(path, data))
    ):
        lines = [
            (f"{path}:{number}", line.strip()) for number, line in enumerate(text.splitlines(), 1)
        ]
        asked = [PromptRow(where, line) for where, line in lines if line]
        return AskedTable(Path(path), asked, [], hashlib.sha256(data).hexdigest())
    records, digest = read_records(
        path, lambda names: "prompt" in our_names(dict.fromkeys(names), columns)
    )
    rows, skipped = usable_records(path, records, columns, _asked, skip_bad_rows)
    return AskedTable(Path(path), rows, skipped, digest)


def _asked(record: RawRecord) -> PromptRow:
    values = record.values
    if not {"messages", "prompt", "instruction"} & values.keys():
        hint = "prompt, messages, or plain text with a prompt a line"
        raise DataError("no prompt", where=record.where, hint=hint)
    prompt, reference = read_prompt(record), None
    while isinstance(prompt, tuple) and prompt and prompt[-1]["role"] == "assistant":
        reference, prompt = prompt[-1]["content"], prompt[:-1]
    if not prompt:
        raise DataError("no prompt", where=record.where, why="there is nothing to answer")
    for name in ("completion", "output", "reference"):
        if values.get(name) is not None:
            reference = usable_text(values[name], record.field_location(name))
    item = record.raw.get(ITEM)
    ours = isinstance(item, dict) and record.raw.keys() <= {"prompt", "reference", ITEM}
    return PromptRow(record.where, prompt, reference, item if ours and item else record.raw)


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts alone; raises `DataError` where a record has none."""
    return [row.prompt for row in read_asked(path, {}).rows]


def prompt_key(row: PromptRow) -> str:
    """What tells prompts apart: rows of one prompt are judged, or learned, together."""
    return hashlib.sha256(repr(row.prompt).encode()).hexdigest()
