"""A chat template: messages to text, and where in that text the answers begin and end.

    prompt of answer 1   answer 1       between              answer 2
    <user> hi <bot>      hello <end>    <user> and? <bot>    fine <end>     nothing after it
    . . . . . . . .      x x x x x      . . . . . . . .      x x x x        trained

Two things are demanded of a template, and a breach is an error before the first step: what generation will be
given (the messages so far, asking for an answer) is how the trained text begins; and an answer ends with a
token of its own, the stop token, which is trained with it.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from afina.data.schemas import Message
from afina.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{{ '<|im_end|>' }}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = (
    "{% for message in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n' }}{% endif %}"
)
PROBE: tuple[Message, ...] = (
    {"role": "user", "content": "question"},
    {"role": "assistant", "content": "probe-of-afina"},
)
ANOTHER = "--chat-template chatml, or a template file that"


class ChatTemplate:
    """One template of one tokenizer: its own (None), "plain", "chatml", or a jinja file.

    `jinja` is its text, None where the tokenizer has none. `bos`: whether the built-in ones begin with the
    tokenizer's first token. Raises `DataError` for a file that cannot be read.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", template: str | None, bos: bool
    ) -> None:
        self.tokenizer = tokenizer
        self.name = f"--chat-template {template}" if template else "the tokenizer's chat template"
        self.jinja = self._find(template, "{{ bos_token }}" if bos else "")

    def _find(self, template: str | None, bos: str) -> str | None:
        if template is None:
            return self.tokenizer.get_chat_template() if self.tokenizer.chat_template else None
        if template == "plain":
            return bos + PLAIN
        if template == "chatml":
            known = (
                len(self._encode("<|im_end|>")) == 1
            )  # elsewhere it is a string of letters: no stop token
            return bos + (CHATML if known else CHATML.replace("'<|im_end|>'", "eos_token"))
        try:
            return Path(template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            hint = "'plain', 'chatml', or the path of a jinja file"
            raise DataError(
                f"cannot read the template: {error}", where=self.name, hint=hint
            ) from None

    def text(self, messages: Sequence[Mapping[str, str]], asks: bool, where: str) -> str:
        """The messages as text; with `asks`, up to where the next answer begins. Raises `DataError`."""
        if self.jinja is None:
            hint = "--chat-template chatml, --chat-template plain, or data with a prompt and a completion"
            raise DataError("this base has no chat template", where=where, hint=hint)
        given = [dict(message) for message in messages]
        try:
            text: Any = self.tokenizer.apply_chat_template(
                given, chat_template=self.jinja, add_generation_prompt=asks, tokenize=False
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            hint = "change the roles or their order, or --chat-template chatml"
            raise DataError(
                f"{self.name} refuses these messages", where=where, why=str(error), hint=hint
            ) from None
        return text

    def answers(self, messages: Sequence[Message], where: str) -> tuple[str, list[int], str]:
        """A chat up to its last answer: its text, the character at which each answer begins, the last answer.

        An answer that opens the chat, or that has weight 0, is context and not learned. Raises `DataError`.
        """
        learned = [
            n
            for n, m in enumerate(messages)
            if n and m["role"] == "assistant" and m.get("weight") != "0"
        ]
        if not learned:
            why = "an answer needs a message before it, and a weight that is not 0"
            raise DataError(
                "nothing to learn in this row: its mask is all off", where=where, why=why
            )
        messages = messages[: learned[-1] + 1]
        full, cuts, answer = self.text(messages, False, where), [], ""
        for n in learned:
            if self.stop_text in messages[n]["content"]:
                hint = "take it out of the answer: the template writes it"
                raise DataError(
                    f"the answer holds the stop token {self.stop_text}", where=where, hint=hint
                )
            prompt = self.text(messages[:n], True, where)
            shown = full if n == learned[-1] else self.text(messages[: n + 1], False, where)
            answer = self._answer(prompt, shown, full, where)
            cuts.append(len(prompt))
        return full, cuts, answer

    def _answer(self, prompt: str, shown: str, full: str, where: str) -> str:
        """The answer that follows `prompt` in `shown` (where it comes last) and in `full` (the whole chat)."""
        self._same(prompt, shown, where)
        answer, stop, _ = shown[len(prompt) :].partition(self.stop_text)
        if not stop:
            raise self._no_stop(answer, where)
        self._same(prompt + answer + stop, full, where)
        return answer

    def _same(self, prefix: str, whole: str, where: str) -> None:
        if whole.startswith(prefix):
            return
        pairs = zip(prefix, whole, strict=False)
        at = max(
            0,
            next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(prefix), len(whole)))
            - 20,
        )
        raise DataError(
            f"a prefix does not render as a prefix: {self.name} writes messages otherwise once more follow",
            where=where,
            why=f"{prefix[at : at + 60]!r} became {whole[at : at + 60]!r}, and generation is given the first",
            hint=f"{ANOTHER} writes each message alike wherever it stands",
        )

    def _no_stop(self, written: str, where: str) -> DataError:
        return DataError(
            "the stop token is not trained: the template does not end an answer with one",
            where=where,
            why=f"an answer is written as {written[-60:]!r}; the model would not learn to stop",
            hint=f"{ANOTHER} writes {{{{ eos_token }}}} after each answer",
        )

    @cached_property
    def stop(self) -> int:
        """The token that ends an answer under this template; raises `DataError` when there is none.

        It is found by writing an invented answer: the first token after it that is the end of the text or one
        of the tokenizer's added tokens (<|im_end|>, <end_of_turn>, ...).
        """
        shown = self.text(PROBE, False, self.name)
        _, found, after = shown.rpartition(PROBE[1]["content"])
        if not found:
            raise DataError(
                "the template does not write the answer",
                where=self.name,
                hint=f"{ANOTHER} writes it",
            )
        tokenizer = self.tokenizer
        begins = {tokenizer.bos_token_id, tokenizer.unk_token_id} - {tokenizer.eos_token_id}
        ends = {tokenizer.eos_token_id, *getattr(tokenizer, "added_tokens_decoder", {})} - begins
        stop = next((token for token in self._encode(after) if token in ends), None)
        if stop is None:
            raise self._no_stop(shown, self.name)
        return stop

    @cached_property
    def stop_text(self) -> str:
        """The stop token as the template writes it."""
        return str(self.tokenizer.convert_ids_to_tokens(self.stop))

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
