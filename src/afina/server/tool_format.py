"""How a base writes tool calls: literals found by rendering probe calls with its chat template.

    <tool_call>\\n{"name": "weather", "arguments": {"city": "Lima"}}\\n</tool_call>
    `------ begin -------´ name  `--- between --´`---- JSON -----´`---- end ----´

A served call therefore has the form in which calls were trained. Templates without tools get the
form above, and a system text that describes it.
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from afina.engine.grammar import JSON_FORM
from afina.server.tools import Tool, ToolChoice

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_CALLS = 16  # of a required answer: small models repeat calls without end
PROBE_NAME, PROBE_ID = "zq_probe", "zqprobe12"  # nine letters and digits: Mistral's form of ids
PROBE_ARGUMENTS = {"zq_key": "zq_value"}
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": PROBE_NAME,
        "description": "probe",
        "parameters": {"type": "object", "properties": {"zq_key": {"type": "string"}}},
    },
}
# messages, tools, whether the answer is opened -> text; raises where the template rejects them
Render = Callable[[Sequence[dict[str, Any]], Sequence[dict[str, Any]], bool], str]


@dataclass(frozen=True)
class ToolFormat:
    """Literals around name and arguments of the calls of one answer.

    Attributes:
        begin: text before the name of the first call.
        between: text between a name and its arguments, which are a JSON object.
        middle: text between the arguments of a call and the next name; None: one call only.
        end: text after the arguments of the last call.
        has_ids: whether the template writes the calls' ids (nine letters and digits).
        is_native: whether the chat template knows tools.
    """

    begin: str
    between: str
    middle: str | None
    end: str
    has_ids: bool = False
    is_native: bool = True

    @property
    def marker(self) -> str:
        """Text that announces a call: `begin` up to its JSON."""
        return self.begin.partition("{")[0].rstrip(" \n[") if self.is_json else self.begin.strip()

    @property
    def is_json(self) -> bool:
        """Whether a call is a JSON object that contains its name."""
        return "{" in self.begin


FALLBACK = ToolFormat(
    begin='<tool_call>\n{"name": "',
    between='", "arguments": ',
    middle='}\n</tool_call>\n<tool_call>\n{"name": "',
    end="}\n</tool_call>",
    is_native=False,
)


def find_tool_format(render: Render, stop_text: str | None) -> ToolFormat:
    """Return the format of a template's calls, or `FALLBACK` where it has none in JSON."""
    try:
        question = [{"role": "user", "content": "q"}]
        prompt = render(question, [PROBE_TOOL], True)
        if PROBE_NAME not in prompt:
            return FALLBACK
        one = _answer(render, question, prompt, 1, stop_text)
        begin, between, end = _parts(one)
    except Exception:  # a template raises errors of any kind, and each of them means "no calls"
        return FALLBACK
    try:
        middle = _middle(_answer(render, question, prompt, 2, stop_text), begin, between)
    except Exception:  # some templates allow one call only
        middle = None
    return ToolFormat(begin, between, middle, end, PROBE_ID in one)


def _answer(
    render: Render, question: list[dict[str, Any]], prompt: str, calls: int, stop_text: str | None
) -> str:
    """Return how the template writes an answer with `calls` equal calls."""
    function = {"name": PROBE_NAME, "arguments": PROBE_ARGUMENTS}
    call = {"id": PROBE_ID, "type": "function", "function": function}
    turn = {"role": "assistant", "content": "", "tool_calls": [call] * calls}
    full = render([*question, turn], [PROBE_TOOL], False)
    start = len(prompt)
    if not full.startswith(prompt):  # the prompt opens something that the history does not show
        common = os.path.commonprefix([prompt, full])  # noqa: RUF071 (characters are meant)
        start = max(common.rfind("\n"), common.rfind(">"), common.rfind("]")) + 1
    return full[start:].partition(stop_text)[0] if stop_text else full[start:]


def _parts(answer: str) -> tuple[str, str, str]:
    begin, name, rest = answer.partition(PROBE_NAME)
    start, end = _find_arguments(rest)
    if not name:
        raise ValueError("the template does not write the name")
    return begin, rest[:start], rest[end:]


def _middle(answer: str, begin: str, between: str) -> str | None:
    """Return the text between two calls of an answer that has two."""
    rest = answer.removeprefix(begin + PROBE_NAME + between)
    _, end = _find_arguments(rest)
    middle, name, _ = rest[end:].partition(PROBE_NAME)
    return middle if name else None


def _find_arguments(text: str) -> tuple[int, int]:
    """Return start and end of the first JSON object that is the probe's arguments."""
    decoder = json.JSONDecoder()
    start = text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
            if value == PROBE_ARGUMENTS:
                return start, end
        except ValueError:
            pass
        start = text.find("{", start + 1)
    raise ValueError("the template does not write the arguments as JSON")


def describe_tools(tools: Sequence[Tool]) -> str:
    """Return the system text for templates without tools."""
    functions = "\n".join(
        json.dumps(tool.to_template()["function"], ensure_ascii=False) for tool in tools
    )
    example = f"{FALLBACK.begin}NAME{FALLBACK.between}{{...}}{FALLBACK.end}"
    return f"Available functions:\n{functions}\nA call is written as:\n{example}"


def plain_history(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages with calls and their results as text, for templates without tools."""
    plain: list[dict[str, Any]] = []
    for message in messages:
        calls = message.get("tool_calls", [])
        texts = [message["content"]] if message["content"] else []
        for call in calls:
            function = call["function"]
            arguments = json.dumps(function["arguments"], ensure_ascii=False)
            texts.append(
                f"{FALLBACK.begin}{function['name']}{FALLBACK.between}{arguments}{FALLBACK.end}"
            )
        role, text = message["role"], "\n".join(texts)
        if role == "tool":
            role, text = "user", f"<tool_response>\n{text}\n</tool_response>"
        if plain and plain[-1]["role"] == role == "user":  # several results: one turn
            plain[-1]["content"] += f"\n{text}"
        else:
            own = {k: v for k, v in message.items() if k not in ("tool_calls", "tool_call_id")}
            plain.append({**own, "role": role, "content": text})
    return plain


class GrammarWriter:
    """Grammars, in llguidance's form of Lark, of answers with calls or JSON."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", form: ToolFormat) -> None:
        self._tokenizer, self._format = tokenizer, form
        self._added = set(getattr(tokenizer, "added_tokens_decoder", {}))

    def literal(self, text: str) -> str:
        """Return a literal; added tokens in it are matched as tokens, and not as their letters."""
        parts: list[str | int] = []
        pending: list[int] = []

        def flush() -> None:
            if pending:
                parts.append(str(self._tokenizer.decode(pending, skip_special_tokens=False)))
                pending.clear()

        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if not self._added.intersection(ids):
            return json.dumps(text, ensure_ascii=False)
        for token in ids:
            if token in self._added:
                flush()
                parts.append(token)
            else:
                pending.append(token)
        flush()
        return " ".join(
            f"<[{part}]>" if isinstance(part, int) else json.dumps(part, ensure_ascii=False)
            for part in parts
        )

    def calls(self, choice: ToolChoice, begin: str | None = None) -> str:
        """Return the rules `calls` and its parts: at least one call of an allowed function.

        Args:
            choice: the allowed functions; where they are not required, a schema that is not strict
                allows any object.
            begin: text before the first name; by default that of the format.
        """
        form, lines = self._format, []
        begin = form.begin if begin is None else begin
        after = self._with_id(form.end)
        middle = None if form.middle is None else self._with_id(form.middle)
        more = (
            f" ({middle} call){{0,{MAX_CALLS - 1}}}"
            if choice.parallel and middle is not None
            else ""
        )
        opening = f"{self.literal(begin)} " if begin else ""
        lines.append(f"calls: {opening}call{more} {after}")
        lines.append("call: " + " | ".join(f"call_{n}" for n in range(len(choice.tools))))
        for n, tool in enumerate(choice.tools):
            head = self.literal(tool.function.name + form.between)
            is_free = choice.mode == "auto" and not tool.function.strict
            own = {"type": "object"} if is_free else tool.function.json_schema
            schema = json.dumps(_formed(own), ensure_ascii=False)
            lines.append(f"call_{n}: {head} arguments_{n}")
            lines.append(f"arguments_{n}: %json {schema}")
        return "\n".join(lines)

    def text_or_calls(self, choice: ToolChoice) -> str:
        """Return the rule `strict`: any text, in which what opens a call is followed by calls."""
        marker, begin = self._format.marker, self._format.begin.lstrip()
        any_text = r"/(.|\n)*/"
        if not marker or not begin.startswith(marker):  # a call begins with its JSON
            return f"strict: calls | FREE\nFREE: /([^{{](.|\\n)*)?/\n{self.calls(choice)}"
        if self.literal(marker).startswith("<["):  # a token of its own: text cannot contain it
            return f"strict: FREE calls?\nFREE: {any_text}\n{self.calls(choice, begin)}"
        pattern = re.escape(marker).replace("/", r"\/").replace("\n", "n")
        inside = f"{any_text[:-1]}{pattern}{any_text[1:]}"
        return (
            f"strict: FREE | before calls\nFREE: {any_text} & ~{inside}\n"
            f"before[suffix={json.dumps(marker, ensure_ascii=False)}]: TEXT\nTEXT: {any_text}\n"
            f"{self.calls(choice, begin.removeprefix(marker))}"
        )

    def answer(self, body: str, rules: str, thought_end: str | None) -> str:
        """Return a grammar whose answer is `body`, after a thought where one is open."""
        if thought_end is None:
            return f"start: {body}\n{rules}"
        end = self.literal(thought_end)
        if end.startswith("<["):  # a token of its own: text cannot contain it
            return f"start: THOUGHT {end} SPACE {body}\nTHOUGHT: /(.|\\n)*/\nSPACE: /\\n*/\n{rules}"
        stop = json.dumps(thought_end, ensure_ascii=False)
        return (
            f"start: thought SPACE {body}\nthought[suffix={stop}]: THOUGHT\n"
            f"THOUGHT: /(.|\\n)*/\nSPACE: /\\n*/\n{rules}"
        )

    def json_rule(self, schema: Any) -> str:
        """Return the rule `text` of a JSON schema; an empty one allows any object."""
        return f"text: %json {json.dumps(_formed(schema or {'type': 'object'}))}"

    def _with_id(self, text: str) -> str:
        """Return a literal in which the probe's id may be any id."""
        if PROBE_ID not in text:
            return self.literal(text)
        before, _, after = text.partition(PROBE_ID)
        return f"{self.literal(before)} /[A-Za-z0-9]{{9}}/ {self.literal(after)}"


def _formed(schema: Any) -> dict[str, Any]:
    return {**schema, "x-guidance": JSON_FORM}
