"""Text of an answer, piece by piece, split into reasoning, content and tool calls.

    <think> a thought </think> some text <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>
            `reasoning´        `content´                      `call´            `arguments´

Nothing is emitted before it is certain: a piece that may begin a marker is kept.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic_core import from_json

# announcements of calls as JSON in published templates: Hermes and Qwen, Mistral, Llama, Phi,
# Granite, and the older function calls
KNOWN_MARKERS = (
    "<tool_call>",
    "[TOOL_CALLS]",
    "<|python_tag|>",
    "<|tool_call|>",
    "<function_call>",
)
NAME_KEYS, ARGUMENT_KEYS = ("name", "function"), ("arguments", "parameters", "args", "input")


@dataclass(frozen=True)
class Delta:
    """A certain piece of an answer.

    Attributes:
        kind: "call" begins a call (`text` is the name); "arguments" continues the latest call.
        index: number of the call.
    """

    kind: Literal["reasoning", "content", "call", "arguments"]
    text: str
    index: int = 0


class JsonScanner:
    """Finds the end of one JSON object or array in text that comes in pieces."""

    def __init__(self, depth: int = 0) -> None:
        self._depth, self._in_string, self._escaped = depth, False, False

    def find_end(self, text: str) -> int | None:
        """Return the index after the value's last character, or None where it continues."""
        for n, letter in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif letter == "\\":
                    self._escaped = True
                elif letter == '"':
                    self._in_string = False
            elif letter == '"':
                self._in_string = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return n + 1
        return None


class ReasoningSplitter:
    """Splits the text before `end` from the rest.

    Args:
        begin: marker that opens a thought at the start of an answer.
        is_open: whether the prompt has opened the thought already.
    """

    def __init__(self, begin: str, end: str, is_open: bool) -> None:
        self._begin, self._end, self._pending = begin, end, ""
        self._state = "opened" if is_open else "before"

    def add(self, text: str) -> list[tuple[bool, str]]:
        """Return certain pieces as (whether it is reasoning, text)."""
        pieces: list[tuple[bool, str]] = []
        self._pending += text
        if self._state == "before":
            start = self._pending.lstrip()
            if start.startswith(self._begin):
                self._state, self._pending = "opened", start[len(self._begin) :]
            elif self._begin.startswith(start):
                return []
            else:
                self._state = "after"
        if self._state == "opened":  # the empty lines before a thought
            self._pending = self._pending.lstrip("\n")
            if not self._pending:
                return []
            self._state = "inside"
        if self._state == "inside":
            thought, found, rest = self._pending.partition(self._end)
            if found:
                pieces.append((True, thought.rstrip("\n")))
                self._state, self._pending = "gap", rest
            else:
                cut = len(self._pending) - overlap(self._pending, ("\n" + self._end, self._end))
                cut = len(self._pending[:cut].rstrip("\n"))
                pieces.append((True, self._pending[:cut]))
                self._pending = self._pending[cut:]
                return [piece for piece in pieces if piece[1]]
        if self._state == "gap":  # the empty lines between thought and answer
            self._pending = self._pending.lstrip("\n")
            if self._pending:
                self._state = "after"
        if self._state == "after":
            pieces.append((False, self._pending))
            self._pending = ""
        return [piece for piece in pieces if piece[1]]

    def end(self) -> list[tuple[bool, str]]:
        """Return what is left after the last piece."""
        rest, self._pending = self._pending, ""
        return [(self._state == "inside", rest)] if rest else []


def overlap(text: str, markers: Sequence[str]) -> int:
    """Return how many characters at the end of `text` may begin one of the markers."""
    longest = min(len(text), max(map(len, markers), default=1) - 1)
    for n in range(longest, 0, -1):
        if any(marker.startswith(text[-n:]) for marker in markers):
            return n
    return 0


class CallParser:
    """Splits content from tool calls.

    Args:
        names: functions that may be called; a call of another is text.
        markers: texts that announce calls; JSON at the start of an answer is a call without one.
        between: text between name and arguments where a call is no JSON object.
        closers: texts that end a call, which are no content.
        parallel: whether calls after the first are calls too; otherwise they are dropped.
    """

    def __init__(
        self,
        names: Sequence[str],
        markers: Sequence[str] = (),
        between: str | None = None,
        closers: Sequence[str] = (),
        parallel: bool = True,
    ) -> None:
        self.num_calls = 0
        self._markers = tuple(dict.fromkeys(m for m in (*markers, *KNOWN_MARKERS) if m))
        self._parallel = parallel
        self._names = set(names)
        alternatives = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
        name_keys, argument_keys = "|".join(NAME_KEYS), "|".join(ARGUMENT_KEYS)
        self._header = re.compile(
            rf'\{{\s*(?:"(?:type|id)"\s*:\s*"[^"]*"\s*,\s*)*"(?:{name_keys})"\s*:\s*'
            rf'"(?P<name>{alternatives})"\s*,\s*"(?:{argument_keys})"\s*:\s*(?=\{{)'
        )
        self._literal_header: re.Pattern[str] | None = None
        if between is not None:
            gap = r"\s*".join(re.escape(part) for part in between.split())
            self._literal_header = re.compile(
                rf"(?<![\w-])(?P<name>{alternatives})\s*{gap}\s*(?=\{{)"
            )
        ends = (*closers, *self._markers, *(m.replace("<", "</", 1) for m in self._markers))
        tolerant = [r"\s*".join(map(re.escape, end.split())) for end in ends if end.strip()]
        self._closers = re.compile("(?:" + "|".join([*tolerant, r"[\s\[\]{},;]"]) + ")*")
        self._pending, self._raw = "", ""  # raw: the text since the marker, in case it is no call
        self._state: Callable[[list[Delta]], bool] = self._at_start
        self._scanner = JsonScanner()
        self._is_dropped = self._is_object = False

    def add(self, text: str) -> list[Delta]:
        """Return the certain pieces after `text`."""
        self._pending += text
        deltas: list[Delta] = []
        while self._state(deltas):
            pass
        return [delta for delta in deltas if delta.text or delta.kind == "call"]

    def end(self) -> list[Delta]:
        """Return what is left after the last piece of text."""
        if self._state == self._in_arguments:
            rest, self._pending = self._pending, ""
            return [] if self._is_dropped or not rest else [self._argument(rest)]
        rest, self._pending = self._raw + self._pending, ""
        if self.num_calls and self._state == self._before_call:
            rest = self._closers.sub("", rest, count=1).strip()
        return [Delta("content", rest)] if rest else []

    def _at_start(self, deltas: list[Delta]) -> bool:
        """Before any text: JSON here is a call without a marker."""
        text = self._pending.lstrip()
        if not text:
            return False
        if overlap(text, self._markers) == len(text) or text == "[":
            return False
        is_object = re.match(r"\[?\s*\{", text) is not None
        if is_object or re.fullmatch(r"\[\s*", text):
            self._state = self._before_call
            return True
        self._state = self._in_text
        return True

    def _in_text(self, deltas: list[Delta]) -> bool:
        positions = [(at, m) for m in self._markers if (at := self._pending.find(m)) >= 0]
        if positions:
            at, marker = min(positions)
            content = self._pending[:at].rstrip()
            deltas.append(Delta("content", content))
            self._raw = self._pending[len(content) : at + len(marker)]
            self._pending = self._pending[at + len(marker) :]
            self._state = self._before_call
            return True
        cut = len(self._pending) - overlap(self._pending, self._markers)
        cut = len(self._pending[:cut].rstrip())  # white space before a call is no content
        deltas.append(Delta("content", self._pending[:cut]))
        self._pending = self._pending[cut:]
        return False

    def _before_call(self, deltas: list[Delta]) -> bool:
        """After a marker or a call: the header of a call, or an object to be read completely."""
        for header in (self._header, self._literal_header):
            found = header.search(self._pending) if header else None
            if header and found and self._is_glue(self._pending[: found.start()], header):
                self._begin(deltas, found["name"])
                self._pending = self._pending[found.end() :]
                self._scanner, self._state = JsonScanner(), self._in_arguments
                self._is_object = header is self._header
                return True
        start = self._pending.find("{")
        if start < 0:
            return False
        end = JsonScanner().find_end(self._pending[start:])
        if end is None:
            return False
        return self._read_object(deltas, start, start + end)

    def _is_glue(self, text: str, header: "re.Pattern[str]") -> bool:
        """Return whether the text before a header belongs to the calls' form."""
        return header is self._literal_header or "{" not in text

    def _read_object(self, deltas: list[Delta], start: int, end: int) -> bool:
        """Read a complete object whose keys are in another order."""
        call = _read_call(self._pending[start:end], self._names)
        if call is None:
            if self.num_calls:
                self._raw, self._pending = self._raw + self._pending[:end], self._pending[end:]
                return bool(self._pending)
            deltas.append(Delta("content", self._raw + self._pending[:end]))
            self._raw, self._pending, self._state = "", self._pending[end:], self._in_text
            return True
        self._begin(deltas, call[0])
        if not self._is_dropped:
            deltas.append(self._argument(call[1]))
        self._raw, self._pending = "", self._pending[end:]
        return bool(self._pending)

    def _in_arguments(self, deltas: list[Delta]) -> bool:
        end = self._scanner.find_end(self._pending)
        piece = self._pending if end is None else self._pending[:end]
        self._pending = self._pending[len(piece) :]
        if not self._is_dropped:
            deltas.append(self._argument(piece))
        if end is None:
            return False
        self._raw, self._state = "", self._before_call
        if self._is_object:  # further keys, such as an id, up to the end of the call
            self._scanner, self._state = JsonScanner(depth=1), self._in_rest
        return bool(self._pending)

    def _in_rest(self, deltas: list[Delta]) -> bool:
        end = self._scanner.find_end(self._pending)
        self._pending = "" if end is None else self._pending[end:]
        if end is not None:
            self._state = self._before_call
        return bool(self._pending)

    def _begin(self, deltas: list[Delta], name: str) -> None:
        self._is_dropped = self.num_calls > 0 and not self._parallel
        if not self._is_dropped:
            self.num_calls += 1
            deltas.append(Delta("call", name, self.num_calls - 1))
        self._raw = ""

    def _argument(self, text: str) -> Delta:
        return Delta("arguments", text, self.num_calls - 1)


def _read_call(text: str, names: set[str]) -> tuple[str, str] | None:
    """Return name and arguments of a call as JSON, or None for another object."""
    try:
        value: Any = from_json(text)
    except ValueError:
        return None
    if isinstance(value.get("function"), dict):
        value = value["function"]
    name = next((value[key] for key in NAME_KEYS if key in value), None)
    arguments: Any = next((value[key] for key in ARGUMENT_KEYS if key in value), {})
    if not isinstance(name, str) or name not in names:
        return None
    if isinstance(arguments, str):
        return name, arguments
    return name, json.dumps(arguments, ensure_ascii=False)


class OutputParser:
    """Splits an answer into reasoning, content and calls, as the request wants it."""

    def __init__(
        self, reasoning: ReasoningSplitter | None, calls: CallParser | None, special: Sequence[str]
    ) -> None:
        """`special`: texts of special tokens, which are no content."""
        self._reasoning, self._calls, self._special = reasoning, calls, special

    @property
    def num_calls(self) -> int:
        """Calls so far."""
        return self._calls.num_calls if self._calls else 0

    def add(self, text: str) -> list[Delta]:
        """Return the certain pieces after `text`."""
        pieces = self._reasoning.add(text) if self._reasoning else [(False, text)]
        return self._deltas(pieces)

    def end(self) -> list[Delta]:
        """Return what is left after the last text."""
        deltas = self._deltas(self._reasoning.end()) if self._reasoning else []
        return deltas + (self._cleaned(self._calls.end()) if self._calls else [])

    def _deltas(self, pieces: list[tuple[bool, str]]) -> list[Delta]:
        deltas: list[Delta] = []
        for is_reasoning, text in pieces:
            if is_reasoning:
                deltas.append(Delta("reasoning", text))
            elif self._calls:
                deltas += self._calls.add(text)
            elif text:
                deltas.append(Delta("content", text))
        return self._cleaned(deltas)

    def _cleaned(self, deltas: list[Delta]) -> list[Delta]:
        """Return the pieces without special tokens in content."""
        if not self._special:
            return deltas
        cleaned = []
        for delta in deltas:
            text = delta.text
            if delta.kind == "content":
                for special in self._special:
                    text = text.replace(special, "")
            if text or delta.kind == "call":
                cleaned.append(Delta(delta.kind, text, delta.index))
        return cleaned
