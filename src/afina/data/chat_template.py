"""Chat templates: messages to text, as transformers' `apply_chat_template` renders them.

A template decides what it reads: some know tools, some want the parts of a content as a list, some
want the arguments of a call as text. What a template takes is found by rendering invented messages,
once, and messages are handed over in that form.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, TemplateError, meta

from afina.data.builtin_templates import CHATML, PLAIN
from afina.data.control_tokens import ControlTokens, restore
from afina.data.schemas import Message
from afina.errors import DataError, did_you_mean
from afina.io.chat_format import ChatFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE_TEXT = "probe-of-afina"
PROBE: tuple[Message, ...] = (
    {"role": "user", "content": "question"},
    {"role": "assistant", "content": PROBE_TEXT},
)
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "A probe.",
        "parameters": {
            "type": "object",
            "properties": {"q": {"type": "string", "description": "A text."}},
            "required": ["q"],
        },
    },
}
ALTERNATIVES = "--chat-template chatml, or a template file that"
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError)
# parameters of `apply_chat_template` and of the renderer, which no template argument can be named
OWN_ARGUMENTS = frozenset(
    {
        *("conversation", "messages", "tools", "add_generation_prompt", "continue_final_message"),
        *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "chat_template", "tokenizer_kwargs"),
        *("bos_token", "eos_token", "pad_token", "unk_token"),
    }
)


@dataclass(frozen=True)
class Chat:
    """Messages as the template gets them, with placeholders for control tokens in their texts.

    Attributes:
        messages: The messages, without weights.
        where: Location of the row, for errors.
        tools: Functions in OpenAI's form; empty where there are none.
        kwargs: Arguments of the template.
        hidden: Control tokens of the texts; the nth has the nth placeholder.
    """

    messages: tuple[Message, ...]
    where: str
    tools: tuple[Mapping[str, Any], ...] = ()
    kwargs: Mapping[str, Any] | None = None
    hidden: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stop:
    """How an answer ends.

    Attributes:
        text: The stop token, as text.
        token_id: Its id.
        is_next_turn: Whether the token is the first of the next turn, and not of the answer.
        between: What stands between the answer and that token.
        num_dropped: Characters after an answer that are not written once a turn follows.
    """

    text: str
    token_id: int
    is_next_turn: bool = False
    between: str = ""
    num_dropped: int = 0


class ChatTemplate:
    """The template of one tokenizer.

    Args:
        tokenizer: The base model's tokenizer.
        chat_format: The template, or its text where a run has recorded it, and its arguments.
        has_bos: Whether built-in templates begin with the tokenizer's first (BOS) token.

    Attributes:
        jinja: The text of the template; None where the tokenizer has none.
        control: The control tokens, which stay text in messages.

    Raises:
        DataError: the file cannot be read, or the template lacks one of the arguments.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", chat_format: ChatFormat, has_bos: bool
    ) -> None:
        self.tokenizer, self.chat_format = tokenizer, chat_format
        self.control = ControlTokens(tokenizer)
        template = chat_format.template
        self.name = f"--chat-template {template}" if template else "the tokenizer's chat template"
        found = chat_format.jinja or self._find(template, "{{ bos_token }}" if has_bos else "")
        self.jinja = found
        self._check_arguments()

    def _find(self, template: str | None, bos: str) -> str | None:
        if template is None:
            return self.tokenizer.get_chat_template() if self.tokenizer.chat_template else None
        if template == "plain":
            return bos + PLAIN
        if template == "chatml":
            # where <|im_end|> is not one token, it is a string of letters and no stop token
            is_token = len(self._encode("<|im_end|>")) == 1
            return bos + (CHATML if is_token else CHATML.replace("'<|im_end|>'", "eos_token"))
        try:
            return Path(template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            what = f"cannot read the template: {error}"
            hint = "'plain', 'chatml', or the path of a jinja file"
            raise DataError(what, where=self.name, hint=hint) from None

    def _check_arguments(self) -> None:
        for name in self.chat_format.kwargs:
            if name in OWN_ARGUMENTS or not self.mentions(name):
                known = self.arguments
                raise DataError(
                    f"{self.name} has no argument {name!r}",
                    where="template_kwargs",
                    why="its arguments: " + (", ".join(known) or "none"),
                    hint=did_you_mean(name, known) if known else "leave out --template-kwargs",
                )

    @cached_property
    def arguments(self) -> list[str]:
        """Names of the template's own arguments, such as `enable_thinking`."""
        without_marks = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", self.jinja or "")
        try:
            syntax = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(without_marks)
        except TemplateError:
            return []
        own = OWN_ARGUMENTS | {"raise_exception", "strftime_now"}
        return sorted(meta.find_undeclared_variables(syntax) - own)

    def mentions(self, name: str) -> bool:
        """Return whether a word occurs in the text of the template."""
        return re.search(rf"\b{re.escape(name)}\b", self.jinja or "") is not None

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        where: str,
        tools: Sequence[Mapping[str, Any]] = (),
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Chat:
        """Return messages as the template takes them.

        Args:
            messages: Messages in OpenAI's form; arguments of calls can be objects.
            where: Location of the row, for errors.
            tools: Functions in OpenAI's form.
            template_kwargs: Arguments, besides and in place of those of the format.
        """
        hidden: list[str] = []
        given = []
        for message in messages:
            own = {key: value for key, value in message.items() if key != "weight"}
            if isinstance(own.get("content"), list):  # joined first: parts can make up a token
                own["content"] = join_parts(own["content"])
            if not self.chat_format.allow_control_tokens:
                is_answer = message["role"] == "assistant"
                kept = self.read_in_answers if is_answer else frozenset()
                own = self.control.hide(own, hidden, kept)
            given.append(self._adapt(own))
        kwargs = {**self.chat_format.kwargs, **(template_kwargs or {})}
        if tools and not self.chat_format.allow_control_tokens:
            tools = self.control.hide(list(tools), hidden)
        return Chat(tuple(given), where, tuple(tools), kwargs, tuple(hidden))

    def write(self, chat: Chat, num_messages: int, opens_answer: bool) -> str:
        """Return the first messages of a chat as text with placeholders.

        Args:
            chat: The chat.
            num_messages: How many of its messages.
            opens_answer: Whether the text ends where the next answer begins.

        Raises:
            DataError: there is no template, or it rejects these messages.
        """
        if self.jinja is None:
            hint = "--chat-template chatml or plain, or data with a prompt and a completion"
            raise DataError("this base has no chat template", where=chat.where, hint=hint)
        try:
            return self._apply(chat.messages[:num_messages], opens_answer, chat.tools, chat.kwargs)
        except TEMPLATE_ERRORS as error:
            what = f"{self.name} rejects these messages"
            hint = "change the roles or their order, or --chat-template chatml"
            raise DataError(what, where=chat.where, why=str(error), hint=hint) from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        opens_answer: bool,
        where: str,
        tools: Sequence[Mapping[str, Any]] = (),
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Return messages as text; with `opens_answer`, up to where the next answer begins.

        Args:
            messages: Messages in OpenAI's form.
            opens_answer: Whether the text ends where the next answer begins.
            where: Location of the row, for errors.
            tools: Functions in OpenAI's form.
            template_kwargs: Arguments, besides and in place of those of the format.

        Raises:
            DataError: there is no template, or it rejects these messages.
        """
        chat = self.chat(messages, where, tools, template_kwargs)
        return restore(self.write(chat, len(messages), opens_answer), chat.hidden)

    def _apply(
        self,
        messages: Sequence[Mapping[str, Any]],
        opens_answer: bool,
        tools: Sequence[Mapping[str, Any]] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        text: Any = self.tokenizer.apply_chat_template(
            list(map(dict, messages)),
            tools=list(map(dict, tools)) or None,
            chat_template=self.jinja,
            add_generation_prompt=opens_answer,
            tokenize=False,
            **(self.chat_format.kwargs if kwargs is None else kwargs),
        )
        return str(text)

    def try_to_write(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> str | None:
        """Return messages as text; None where the template rejects them."""
        try:
            return self._apply(messages, False, tools)
        except TEMPLATE_ERRORS:
            return None

    # ---- what the template takes

    def _adapt(self, message: Message) -> Message:
        """Return a message in the form that the template takes."""
        content = message.get("content")
        if message["role"] == "developer" and not self._takes_developer:
            message = message | {"role": "system"}
        if message.get("tool_calls"):
            form = self._call_form
            if content is None and not form.takes_null:
                content = ""
            if form.takes_text:
                calls = [_with_text_arguments(call) for call in message["tool_calls"]]
                message = message | {"tool_calls": calls}
        if isinstance(content, str) and self._takes_parts:
            return message | {"content": [{"type": "text", "text": content}]}
        return message | {"content": content}

    def _writes(self, *messages: Message) -> bool:
        text = self.try_to_write(messages, [PROBE_TOOL] if "tool_calls" in messages[-1] else ())
        return text is not None and PROBE_TEXT in text

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether a content has to be a list of parts, as in templates for pictures and text."""
        parts = [{"type": "text", "text": PROBE_TEXT}]
        return (
            self.jinja is not None
            and not self._writes({"role": "user", "content": PROBE_TEXT})
            and self._writes({"role": "user", "content": parts})
        )

    @cached_property
    def _takes_developer(self) -> bool:
        """Whether a developer's message is written; elsewhere it is the system's."""
        developer = {"role": "developer", "content": PROBE_TEXT}
        return self._writes(developer, {"role": "user", "content": "question"})

    @cached_property
    def _call_form(self) -> "_CallForm":
        """The form of calls that is written; that of most templates where none is."""
        for form in _CALL_FORMS:
            text = self.try_to_write(form.probe(), [PROBE_TOOL])
            has_python = text is not None and ("None" in text or "{'q'" in text)
            if text is not None and PROBE_TEXT in text and not has_python:
                return form
        return _CallForm(takes_null=False, takes_text=False)

    @cached_property
    def read_in_answers(self) -> frozenset[str]:
        """Control tokens by which the template splits an answer, such as `</think>`."""
        looks = r"(?:split|replace|startswith|endswith|strip|lstrip|rstrip|find)\(\s*"
        jinja = self.jinja or ""
        quoted = {
            text: rf"(['\"]){re.escape(text)}\1"
            for text in self.control.texts - self.stop_texts
            if text in jinja
        }
        return frozenset(
            text
            for text, quote in quoted.items()
            if re.search(rf"{quote}\s+(?:not\s+)?in\b", jinja) or re.search(looks + quote, jinja)
        )

    # ---- where an answer ends

    @cached_property
    def stop(self) -> Stop:
        """How an answer of text ends; raises `DataError` where it does not."""
        probe = Chat(tuple(self._adapt(message) for message in PROBE), self.name)
        rendered = self.write(probe, len(PROBE), False)
        if PROBE_TEXT not in rendered:
            what, hint = "the template does not write the answer", f"{ALTERNATIVES} writes it"
            raise DataError(what, where=self.name, hint=hint)
        found = self._find_stop(PROBE, {"role": "user", "content": "and?"})
        if found is None:
            raise self.no_stop_error(rendered, self.name)
        return found

    @cached_property
    def stop_of_calls(self) -> Stop | None:
        """How an answer with tool calls ends; None where the template does not write calls."""
        called = self._call_form.probe()
        result = {"role": "tool", "name": "probe_tool", "content": "1"}
        if not self.mentions("tool_calls") or not self._writes(*called):
            return None
        return self._find_stop(called, result | {"tool_call_id": called[-1]["tool_calls"][0]["id"]})

    def _find_stop(self, messages: Sequence[Message], following: Message) -> Stop | None:
        """Return how the last of `messages` ends.

        The stop token is the last one that is written whether or not another turn follows. Without
        such a token it is the first one where no turn follows, and else the first of the next turn.
        """
        tools = [PROBE_TOOL] if "tool_calls" in messages[-1] else []
        given = [self._adapt(message) for message in messages]
        last = (self.try_to_write(given, tools) or "").rpartition(PROBE_TEXT)[2]
        followed = self.try_to_write([*given, self._adapt(following)], tools) or ""
        before, found, after = followed.rpartition(PROBE_TEXT)
        opening = before.rpartition(PROBE[0]["content"])[2]
        for is_end in self._stop_candidates:
            own, next_ones = (list(is_end.finditer(text)) for text in (last, after))
            shared = [
                a
                for a, b in zip(own, next_ones, strict=False)
                if last[: a.end()] == after[: b.end()]
            ]
            if shared or own:
                stop = (shared or own[:1])[-1][0]
                return Stop(stop, self._id_of(stop))
            # a token that opens this answer as well opens any turn, and ends none
            if found and next_ones and next_ones[0][0] not in opening:
                stop, shared_length = next_ones[0][0], common_length(last, after)
                between = after[shared_length : next_ones[0].start()]
                num_dropped = len(last) - shared_length
                return Stop(stop, self._id_of(stop), True, between, num_dropped)
        return None

    @cached_property
    def _stop_candidates(self) -> list[re.Pattern[str]]:
        """Patterns of tokens that can end an answer: special tokens, else all added ones."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        begins = {self.tokenizer.bos_token, self.tokenizer.unk_token} - {self.tokenizer.eos_token}
        all_added = {token.content for token in added.values()} | set(self.control.texts)
        return [
            re.compile("|".join(map(re.escape, sorted(texts - begins, key=len, reverse=True))))
            for texts in (self.control.texts, all_added)
            if texts - begins
        ]

    def _id_of(self, text: str) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(text))  # type: ignore[arg-type]

    @cached_property
    def stop_texts(self) -> frozenset[str]:
        """The texts of all stop tokens."""
        return frozenset(stop.text for stop in self.stops) | {str(self.tokenizer.eos_token)}

    @cached_property
    def stops(self) -> tuple[Stop, ...]:
        """How answers of text and of tool calls end, as far as they do."""
        return tuple(stop for stop in (_or_none(lambda: self.stop), self.stop_of_calls) if stop)

    @property
    def stop_token_id(self) -> int:
        """The token that ends an answer of text; raises `DataError` without one."""
        return self.stop.token_id

    @property
    def stop_text(self) -> str:
        """The token that ends an answer of text, as text; raises `DataError` without one."""
        return self.stop.text

    def no_stop_error(self, written: str, where: str) -> DataError:
        """Return the error of an answer that does not end with a stop token."""
        return DataError(
            "the stop token is not trained: the template does not end an answer with one",
            where=where,
            why=f"an answer is written as {written[-60:]!r}; the model would not learn to stop",
            hint=f"{ALTERNATIVES} writes {{{{ eos_token }}}} after each answer",
        )

    def _encode(self, text: str) -> list[int]:
        return self.control.encode(text)


def common_length(*texts: str) -> int:
    """Return how many characters texts have in common at their beginning."""
    shortest = min(map(len, texts))
    pairs = enumerate(zip(*texts, strict=False))
    return next((n for n, letters in pairs if len(set(letters)) > 1), shortest)


def join_parts(parts: Sequence[Any]) -> str:
    """Return the text of content parts; parts that are not text are left out."""
    texts = (part.get("text", "") if isinstance(part, Mapping) else part for part in parts)
    return "".join(map(str, texts))


@dataclass(frozen=True)
class _CallForm:
    """How a message with calls is handed over: null as its content, arguments as text."""

    takes_null: bool
    takes_text: bool

    def probe(self) -> list[Message]:
        """Return a question, and an answer that calls the probe's tool."""
        arguments: Any = {"q": PROBE_TEXT}
        function = {
            "name": "probe_tool",
            "arguments": json.dumps(arguments) if self.takes_text else arguments,
        }
        call = {"id": "probe0001", "type": "function", "function": function}
        content = None if self.takes_null else ""
        return [PROBE[0], {"role": "assistant", "content": content, "tool_calls": [call]}]


_CALL_FORMS = [_CallForm(null, text) for text in (False, True) for null in (True, False)]


def _with_text_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    if not isinstance(function.get("arguments"), str):
        function["arguments"] = json.dumps(function.get("arguments"), ensure_ascii=False)
    return {**call, "function": function}


def _or_none(find: Callable[[], Stop]) -> Stop | None:
    # a template without a stop token cannot be trained on, but it can generate
    try:
        return find()
    except DataError:
        return None
