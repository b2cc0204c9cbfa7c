"""From a chat request to the tokens of its prompt, its grammar, and the parser of its answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from typing import Any

from jinja2 import Environment, TemplateError, meta

from afina.data.renderer import Renderer
from afina.errors import DataError, did_you_mean
from afina.server.output_parser import CallParser, OutputParser, ReasoningSplitter
from afina.server.schemas import ChatCompletionRequest
from afina.server.tool_format import (
    FALLBACK,
    PROBE_ID,
    GrammarWriter,
    ToolFormat,
    describe_tools,
    find_tool_format,
    plain_history,
)
from afina.server.tools import ToolChoice
from afina.server.validation import invalid

# begin and end of a thought in published templates
THOUGHT_MARKERS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<reasoning>", "</reasoning>"),
)
# variables that the server itself sets
OWN_VARIABLES = {"messages", "tools", "add_generation_prompt", "chat_template", "tokenize"}
NUM_TAIL_TOKENS = 16  # of a prompt: whether its last words open a thought


@dataclass(frozen=True)
class ChatPrompt:
    """Tokens of a prompt, and what its answer is read by.

    Attributes:
        grammar: grammar of the answer, or None.
        json_schema: JSON schema of the answer where nothing else is constrained.
        skip_special_tokens: false where markers of calls or thoughts are special tokens.
    """

    tokens: list[int]
    choice: ToolChoice
    format: ToolFormat
    thought: tuple[str, str] | None
    is_thought_open: bool
    special_texts: tuple[str, ...] = ()
    grammar: str | None = None
    json_schema: Mapping[str, Any] | None = None
    skip_special_tokens: bool = True

    def parser(self) -> OutputParser:
        """Return a parser of one answer."""
        reasoning = self.thought and ReasoningSplitter(*self.thought, self.is_thought_open)
        calls = None
        if self.choice.mode != "none":
            form = self.format
            names = [tool.function.name for tool in self.choice.tools]
            between = None if form.is_json else form.between
            closers = [text for text in (form.end, form.middle) if text]
            calls = CallParser(names, (form.marker,), between, closers, self.choice.parallel)
        return OutputParser(reasoning or None, calls, self.special_texts)


class ChatPrompts:
    """Prompts of one chat template."""

    def __init__(self, renderer: Renderer) -> None:
        self.renderer = renderer

    @cached_property
    def format(self) -> ToolFormat:
        """Form of the template's tool calls."""
        try:
            stop: str | None = self.renderer.template.stop_text
        except DataError:
            stop = None
        return find_tool_format(
            lambda messages, tools, opens: self.renderer.template.render(
                messages, opens, "the template", tools
            ),
            stop,
        )

    @cached_property
    def variables(self) -> frozenset[str]:
        """Variables that the template reads."""
        try:
            syntax = Environment().parse(self.renderer.template.jinja or "")
        except TemplateError:  # tags of transformers' own: the names are searched in the text
            return frozenset()
        return frozenset(meta.find_undeclared_variables(syntax))

    @cached_property
    def thought(self) -> tuple[str, str] | None:
        """Markers around a thought, where the template writes them."""
        jinja = self.renderer.template.jinja or ""
        return next((pair for pair in THOUGHT_MARKERS if pair[1] in jinja), None)

    def build(self, body: ChatCompletionRequest) -> ChatPrompt:
        """Return the prompt of a request.

        Raises:
            DataError: the template rejects the messages.
        """
        choice = body.choice_of_tools
        tokens = self._tokens(body, choice)
        thought = self.thought if body.separate_reasoning else None
        is_open = self.thought is not None and self._ends_with(tokens, self.thought[0])
        special = self._special_texts(choice, thought)
        prompt = ChatPrompt(
            tokens,
            choice,
            self.format,
            thought,
            is_open,
            special,
            skip_special_tokens=body.skip_special_tokens and not special,
        )
        return self._constrained(prompt, body.schema_of_text, is_open)

    def template_kwargs(self, body: ChatCompletionRequest) -> dict[str, Any]:
        """Return the variables of the template: the request's, and those of `reasoning_effort`."""
        given = dict(body.chat_template_kwargs)
        for name in given:
            if name in OWN_VARIABLES or not isinstance(name, str):
                what = f"chat_template_kwargs: {name!r} is set by the server"
                raise invalid(f"chat_template_kwargs.{name}", what)
            if self.variables and name not in self.variables:
                own = self.variables - OWN_VARIABLES
                what = f"chat_template_kwargs: the template has no variable {name!r}"
                raise invalid(f"chat_template_kwargs.{name}", f"{what}; {did_you_mean(name, own)}")
        if body.reasoning_effort is not None:
            if "reasoning_effort" in self.variables:
                given.setdefault("reasoning_effort", body.reasoning_effort)
            elif "enable_thinking" in self.variables:
                given.setdefault("enable_thinking", body.reasoning_effort != "none")
        return given

    def uses_effort(self) -> bool:
        """Return whether `reasoning_effort` changes the prompt of this template."""
        return bool({"reasoning_effort", "enable_thinking"} & self.variables)

    def _tokens(self, body: ChatCompletionRequest, choice: ToolChoice) -> list[int]:
        messages = [message.to_template() for message in body.messages]
        prefill = messages.pop()["content"] if body.continues else ""
        tools = choice.tools if choice.mode != "none" else ()
        has_calls = any(m["role"] == "tool" or "tool_calls" in m for m in messages)
        native = self.format.is_native if tools or has_calls else True
        if not native:
            messages = plain_history(messages)
            if tools:
                messages = _with_system_text(messages, describe_tools(tools))
        elif self.format.has_ids:
            messages = [_with_short_ids(message) for message in messages]
        described = [tool.to_template() for tool in tools] if native else []
        tokens = self.renderer.prompt(
            messages, tools=described, template_kwargs=self.template_kwargs(body)
        )
        if prefill:
            tokens = tokens + self.renderer.encode_content(prefill)
        return tokens

    def _ends_with(self, tokens: Sequence[int], marker: str) -> bool:
        tail = list(tokens[-NUM_TAIL_TOKENS:])
        text = str(self.renderer.tokenizer.decode(tail, skip_special_tokens=False))
        return text.rstrip().endswith(marker)

    def _special_texts(
        self, choice: ToolChoice, thought: tuple[str, str] | None
    ) -> tuple[str, ...]:
        """Return the special tokens, where the markers to be parsed are among them."""
        special = tuple(self.renderer.tokenizer.all_special_tokens)
        form = self.format if choice.mode != "none" else FALLBACK
        texts = [form.begin, form.between, form.middle or "", form.end, *(thought or ())]
        return special if any(s in text for s in special for text in texts) else ()

    def _constrained(
        self, prompt: ChatPrompt, schema: Mapping[str, Any] | None, is_thought_open: bool
    ) -> ChatPrompt:
        """Return the prompt with the grammar of its calls and JSON schema."""
        choice = prompt.choice
        is_required = choice.mode == "required"
        is_strict = choice.mode == "auto" and choice.is_strict and schema is None
        if not is_required and schema is None and not is_strict:
            return prompt
        if not is_required and choice.mode == "none" and not is_thought_open:
            return replace(prompt, json_schema=schema)
        writer = GrammarWriter(self.renderer.tokenizer, self.format)
        rules, body = [], []
        if schema is not None and not is_required:
            rules.append(writer.json_rule(schema))
            body.append("text")
        if is_strict:
            rules.append(writer.text_or_calls(choice))
            body.append("strict")
        elif choice.mode != "none":
            rules.append(writer.calls(choice))
            body.append("calls")
        end = self.thought[1] if self.thought is not None and is_thought_open else None
        answer = f"({' | '.join(body)})"
        return replace(prompt, grammar=writer.answer(answer, "\n".join(rules), end))


def _with_system_text(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """Return messages with a text at the end of the system's message."""
    if messages and messages[0]["role"] == "system":
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _with_short_ids(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message whose call ids have the length that the template accepts."""
    message = dict(message)
    if "tool_calls" in message:
        calls = message["tool_calls"]
        message["tool_calls"] = [{**call, "id": short_id(call["id"])} for call in calls]
    if "tool_call_id" in message:
        message["tool_call_id"] = short_id(message["tool_call_id"])
    return message


def short_id(call_id: str) -> str:
    """Return an id of nine letters and digits: the id itself where it has this form."""
    is_short = len(call_id) == len(PROBE_ID) and call_id.isalnum() and call_id.isascii()
    return call_id if is_short else sha256(call_id.encode()).hexdigest()[: len(PROBE_ID)]
