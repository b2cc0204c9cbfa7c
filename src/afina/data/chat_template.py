"""Chat templates: messages to text, and where in that text the answers begin and end.

    prompt of answer 1   answer 1       between              answer 2
    <user> hi <bot>      hello <end>    <user> and? <bot>    fine <end>     nothing after it
    . . . . . . . .      x x x x x      . . . . . . . .      x x x x        trained

A template has to keep two promises; otherwise training stops with an error before the first step.
The trained text begins with what generation is given: the messages so far and the opening of an
answer. An answer ends with a token of its own, the stop token, which is trained with it.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from afina.data.schemas import Message
from afina.errors import DataError
from afina.io.chat_format import ChatFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{{ '<|im_end|>' }}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = (
    "{% for message in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}"
    "{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n' }}{% endif %}"
)
PROBE: tuple[Message, ...] = (
    {"role": "user", "content": "question"},
    {"role": "assistant", "content": "probe-of-afina"},
)
ALTERNATIVES = "--chat-template chatml, or a template file that"


class ChatTemplate:
    """The template of one tokenizer.

    Args:
        tokenizer: The base model's tokenizer.
        chat_format: The template, or its text where a run has recorded it, and its arguments.
        has_bos: Whether built-in templates begin with the tokenizer's first (BOS) token.

    Attributes:
        jinja: The text of the template; None where the tokenizer has none.

    Raises:
        DataError: the file cannot be read.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", chat_format: ChatFormat, has_bos: bool
    ) -> None:
        self.tokenizer, self.chat_format = tokenizer, chat_format
        template = chat_format.template
        self.name = f"--chat-template {template}" if template else "the tokenizer's chat template"
        found = chat_format.jinja or self._find(template, "{{ bos_token }}" if has_bos else "")
        self.jinja = found

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

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        opens_answer: bool,
        where: str,
        tools: Sequence[Mapping[str, Any]] = (),
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the messages as text; with `opens_answer`, up to where the next answer begins.

        Args:
            tools: functions in OpenAI's form, for templates that describe them.
            template_kwargs: further variables of the template.

        Raises:
            DataError: there is no template, or it rejects these messages.
        """
        if self.jinja is None:
            hint = "--chat-template chatml or plain, or data with a prompt and a completion"
            raise DataError("this base has no chat template", where=where, hint=hint)
        given = [dict(message) for message in messages]
        try:
            text: Any = self.tokenizer.apply_chat_template(
                given,
                chat_template=self.jinja,
                add_generation_prompt=opens_answer,
                tokenize=False,
                tools=[dict(tool) for tool in tools] or None,
                **{**self.chat_format.kwargs, **(template_kwargs or {})},
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            what = f"{self.name} rejects these messages"
            hint = "change the roles or their order, or --chat-template chatml"
            raise DataError(what, where=where, why=str(error), hint=hint) from None
        return text

    def find_answers(self, messages: Sequence[Message], where: str) -> tuple[str, list[int], str]:
        """Return a chat up to its last trained answer, and where its answers are.

        An answer that opens the chat, or that has weight 0, is context and not trained on.

        Returns:
            The text, the index of the character at which each trained answer begins, and the last
            trained answer without its stop token.

        Raises:
            DataError: there is nothing to train on, or the template breaks one of its two promises.
        """
        trained = [n for n, message in enumerate(messages) if n and _is_trained(message)]
        if not trained:
            what = "nothing to train on in this row: its mask is all off"
            why = "an answer needs a message before it, and a weight that is not 0"
            raise DataError(what, where=where, why=why)
        messages = messages[: trained[-1] + 1]
        full, starts, answer = self.render(messages, False, where), [], ""
        for n in trained:
            if self.stop_text in messages[n]["content"]:
                what = f"the answer contains the stop token {self.stop_text}"
                hint = "remove it from the answer: the template writes it"
                raise DataError(what, where=where, hint=hint)
            prompt = self.render(messages[:n], True, where)
            is_last = n == trained[-1]
            until_answer = full if is_last else self.render(messages[: n + 1], False, where)
            answer = self._find_answer(prompt, until_answer, full, where)
            starts.append(len(prompt))
        return full, starts, answer

    def _find_answer(self, prompt: str, until_answer: str, full: str, where: str) -> str:
        """Return the answer that follows `prompt`, as the last message and in the full chat."""
        self._check_prefix(prompt, until_answer, where)
        answer, stop, _ = until_answer[len(prompt) :].partition(self.stop_text)
        if not stop:
            raise self._no_stop_error(answer, where)
        self._check_prefix(prompt + answer + stop, full, where)
        return answer

    def _check_prefix(self, prefix: str, text: str, where: str) -> None:
        if text.startswith(prefix):
            return
        pairs = zip(prefix, text, strict=False)
        first_difference = next((n for n, (a, b) in enumerate(pairs) if a != b), None)
        if first_difference is None:
            first_difference = min(len(prefix), len(text))
        at = max(0, first_difference - 20)
        shown = f"{prefix[at : at + 60]!r} became {text[at : at + 60]!r}"
        raise DataError(
            "a prefix does not render as a prefix: "
            f"{self.name} writes messages differently once more follow",
            where=where,
            why=f"{shown}, and generation is given the first",
            hint=f"{ALTERNATIVES} writes each message alike wherever it stands",
        )

    def _no_stop_error(self, written: str, where: str) -> DataError:
        return DataError(
            "the stop token is not trained: the template does not end an answer with one",
            where=where,
            why=f"an answer is written as {written[-60:]!r}; the model would not learn to stop",
            hint=f"{ALTERNATIVES} writes {{{{ eos_token }}}} after each answer",
        )

    @cached_property
    def stop_token_id(self) -> int:
        """The token that ends an answer under this template; raises `DataError` without one.

        It is found by rendering an invented answer: the first token after it that is the
        end-of-text token or one of the tokenizer's added tokens (<|im_end|>, <end_of_turn>, ...).
        """
        rendered = self.render(PROBE, False, self.name)
        _, found, after = rendered.rpartition(PROBE[1]["content"])
        if not found:
            what, hint = "the template does not write the answer", f"{ALTERNATIVES} writes it"
            raise DataError(what, where=self.name, hint=hint)
        tokenizer = self.tokenizer
        begins = {tokenizer.bos_token_id, tokenizer.unk_token_id} - {tokenizer.eos_token_id}
        ends = {tokenizer.eos_token_id, *getattr(tokenizer, "added_tokens_decoder", {})} - begins
        stop = next((token for token in self._encode(after) if token in ends), None)
        if stop is None:
            raise self._no_stop_error(rendered, self.name)
        return stop

    @cached_property
    def stop_text(self) -> str:
        """The stop token as the template writes it."""
        return str(self.tokenizer.convert_ids_to_tokens(self.stop_token_id))

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _is_trained(message: Message) -> bool:
    return message["role"] == "assistant" and message.get("weight") != "0"
