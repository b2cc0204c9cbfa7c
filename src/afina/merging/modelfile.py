"""A Modelfile alongside a GGUF file, from which `ollama create` makes a model.

    FROM ./model.gguf
    TEMPLATE    the chat template as a Go template, from what it writes around each message
    SYSTEM      the system message that the template writes by itself
    PARAMETER   stop: one for each stop token

The Go template is written only if chats put together from these texts are those of the template.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from afina.data.renderer import Renderer
from afina.errors import DataError
from afina.io.atomic import write_text
from afina.merging.gguf import export_model
from afina.merging.results import ExportResult
from afina.settings import ExportSettings

MODEL_FILE, MODELFILE = "model.gguf", "Modelfile"
SYSTEM, USER, ANSWER, NEXT = (f"<<{name}>>" for name in ("system", "user", "answer", "next"))
Turn = tuple[str, str]  # text before and after a message


@dataclass(frozen=True)
class TurnTexts:
    """What a chat template writes around the messages of each role.

    Attributes:
        start: Before all messages.
        system: Around a system message; where it is in the first user message, before and after it
            there.
        is_folded: Whether a system message is in the first user message.
        user: Around a user message.
        answer: Around an answer.
        generation: Before the answer that is to be generated.
        default_start: `start` without a system message.
        default_system: System message that is written where a chat has none.
    """

    start: str
    system: Turn
    is_folded: bool
    user: Turn
    answer: Turn
    generation: str
    default_start: str
    default_system: str

    @classmethod
    def of(cls, render: Callable[[Sequence[Mapping[str, str]], bool], str]) -> "TurnTexts":
        """Find the texts by rendering chats; raise `ValueError` where they are not of this form.

        Args:
            render: Chat and whether an answer is to be generated, to text.
        """
        user, answer = {"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}
        more = {"role": "user", "content": NEXT}
        plain = render([user], False)
        begin, after_user = _cut(plain, USER)
        generation = _after(render([user], True), plain)
        between, after_answer = _cut(_after(render([user, answer], False), begin + USER), ANSWER)
        before_answer = _after(between, after_user)
        middle = _after(render([user, answer, more], False), begin + USER + between + ANSWER)
        before_user = _after(_cut(middle, NEXT)[0], after_answer)
        if not begin.endswith(before_user):
            raise ValueError("it writes the first message otherwise than the others")
        default = begin.removesuffix(before_user)
        start, system, is_folded, own = default, ("", ""), False, ""
        try:
            with_system = render([{"role": "system", "content": SYSTEM}, user], False)
        except DataError:
            with_system = ""
        if SYSTEM in with_system:
            head, rest = _cut(with_system, SYSTEM)
            link = _cut(rest, USER)[0]
            is_folded = not link.endswith(before_user) and head.endswith(before_user)
            if is_folded:
                start, system = head.removesuffix(before_user), ("", link)
            else:
                close = link.removesuffix(before_user)
                # what a default system message has before it too
                start, opening = _split_start(head, default)
                system = (opening, close)
                own = default.removeprefix(head).removesuffix(close)
                own = own if head + own + close == default else ""
        return cls(
            start,
            system,
            is_folded,
            (before_user, after_user),
            (before_answer, after_answer),
            generation,
            default,
            own,
        )

    def write(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the prompt of a chat, put together from the texts."""
        system = "".join(m["content"] for m in messages if m["role"] == "system")
        text = self.start if system else self.default_start
        around = {"system": self.system, "user": self.user, "assistant": self.answer}
        if self.is_folded:
            around["system"] = ("", "")
        for number, message in enumerate(messages):
            before, after = around[message["role"]]
            content = "" if self.is_folded and message["role"] == "system" else message["content"]
            if self.is_folded and system and message["role"] == "user" and number <= 1:
                content = system + self.system[1] + content
            text += before + content + after
        return text + self.generation

    def go_template(self) -> str:
        """Return the texts as a Go template of Ollama."""
        content, user, system = "{{ $m.Content }}", "{{ $m.Content }}", ""
        if self.is_folded:
            inside = "{{ $.System }}" + self.system[1]
            user = "{{ if and $.System (le $i 1) }}" + inside + "{{ end }}" + user
        else:
            system = self.system[0] + content + self.system[1]
        head = self.start
        if self.start != self.default_start:
            head = "{{ if .System }}" + self.start + "{{ else }}" + self.default_start + "{{ end }}"
        return (
            head
            + "{{ range $i, $m := .Messages }}"
            + '{{ if eq $m.Role "system" }}'
            + system
            + '{{ else if eq $m.Role "user" }}'
            + content.join(self.user).replace(content, user)
            + '{{ else if eq $m.Role "assistant" }}'
            + content.join(self.answer)
            + "{{ end }}{{ end }}"
            + self.generation
        )

    @property
    def literals(self) -> str:
        """All texts, to look for marks in them."""
        pairs = (*self.system, *self.user, *self.answer)
        return "".join((self.start, self.default_start, *pairs, self.generation))


def _cut(text: str, mark: str) -> tuple[str, str]:
    """Return what is before and after the one occurrence of `mark`."""
    before, found, after = text.partition(mark)
    if not found or mark in after:
        raise ValueError("it changes the messages")
    return before, after


def _after(text: str, start: str) -> str:
    if not text.startswith(start):
        raise ValueError("it rewrites earlier messages")
    return text.removeprefix(start)


CHECKS = (  # chats on which the texts are compared with the template, by their roles
    ("user",),
    ("user", "assistant", "user"),
    ("user", "assistant", "user", "assistant", "user"),
    ("system", "user"),
    ("system", "user", "assistant", "user"),
)


def _split_start(head: str, default: str) -> Turn:
    """Return the start of all chats, and what comes before a system message."""
    if default and head.startswith(default):
        return default, head.removeprefix(default)
    return "", head


def go_template(renderer: Renderer, adds_bos: bool) -> tuple[str | None, str, str]:
    """Return the Go template of a renderer, the default system message, and why there is none."""
    tokenizer, template = renderer.tokenizer, renderer.chat_format.exported_jinja
    if template is None:
        return None, "", "the model has no chat template"
    tokenizer.chat_template = template
    bos = str(tokenizer.bos_token or "") if adds_bos else ""  # Ollama adds it

    def render(messages: Sequence[Mapping[str, str]], opens: bool) -> str:
        try:
            text = tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=opens
            )
        except Exception as error:  # jinja's own and those that a template raises
            raise DataError(str(error)) from None
        return str(text).removeprefix(bos)

    try:
        texts = TurnTexts.of(render)
        for roles in CHECKS:
            chat = [{"role": role, "content": f"{role} {n}?"} for n, role in enumerate(roles)]
            knows_system = texts.system != ("", "") or texts.is_folded
            if (roles[0] != "system" or knows_system) and texts.write(chat) != render(chat, True):
                raise ValueError(f"a chat of {', '.join(roles)} is written otherwise")
    except (ValueError, DataError) as error:
        return None, "", str(error)
    if "{{" in texts.literals or '"""' in texts.literals:
        return None, "", "it has marks of Go templates or Modelfiles"
    return texts.go_template(), texts.default_system, ""


def modelfile(template: str | None, system: str, why: str, stops: Sequence[str]) -> str:
    """Return the text of a Modelfile."""
    lines = [f"FROM ./{MODEL_FILE}"]
    if template is None:
        lines.append(f"# no TEMPLATE: {why}. Ollama looks for one by that of the file")
    else:
        lines.append(f'TEMPLATE """{template}"""')
    if system:
        lines.append(f'SYSTEM """{system}"""')
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    return "\n".join(lines) + "\n"


def export_ollama(settings: ExportSettings, folder: Path) -> ExportResult:
    """Write the GGUF file of `export_model` and a Modelfile into `folder`; return its proof."""
    folder.mkdir(parents=True, exist_ok=True)
    renderers: list[Renderer] = []
    result = export_model(settings, folder / MODEL_FILE, renderers.append)
    [renderer] = renderers
    tokenizer = renderer.tokenizer
    adds_bos = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    stops = [str(s) for s in tokenizer.convert_ids_to_tokens(sorted(renderer.stop_token_ids))]
    text = modelfile(*go_template(renderer, adds_bos), stops)
    write_text(folder / MODELFILE, text)
    return replace(result, out=str(folder))
