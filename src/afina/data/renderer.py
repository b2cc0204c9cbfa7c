"""Rows to examples: token ids, and the loss mask of the tokens that are trained on.

The tokens before an answer are exactly those that generation is given, and the last target token of
an answer is its stop token. A loss mask that would be all on or all off is an error.
"""

from array import array
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import groupby, islice, pairwise
from typing import TYPE_CHECKING, Any

from afina.data.answers import Answer, check_history, find_answers, is_trained
from afina.data.chat_template import PROBE, Chat, ChatTemplate
from afina.data.control_tokens import restore
from afina.data.schemas import Message, Prompt, SFTRow, text_of
from afina.data.truncation import CutRows, cut_prompt
from afina.data.unread import list_unused
from afina.errors import DataError, pluralize
from afina.io.chat_format import ChatFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_CHECKED_ROWS = 16  # rows on which a template is checked before all are rendered


@dataclass(frozen=True)
class Example:
    """The tokens of one row.

    Attributes:
        where: Location of the row, "file:line".
        token_ids: Tokens of the row, of the last trained answer at most.
        loss_mask: Whether each token is a target; the first one never is.
        prompt_length: Number of tokens before the last answer, where generation starts.
        completion: The last answer as the template writes it, without its stop token; None for
            plain text.
    """

    where: str
    token_ids: list[int]
    loss_mask: list[bool]
    prompt_length: int
    completion: str | None

    def __reduce__(self) -> Any:
        """Return how an example is stored: four bytes a token, and one of the loss mask."""
        tokens, mask = array("i", self.token_ids).tobytes(), bytes(self.loss_mask)
        return _unpack, (self.where, tokens, mask, self.prompt_length, self.completion)


def _unpack(where: str, tokens: bytes, mask: bytes, *rest: Any) -> Example:
    return Example(where, array("i", tokens).tolist(), list(map(bool, mask)), *rest)


class Renderer:
    """Rows and prompts to tokens, by one chat template.

    Args:
        tokenizer: The base model's tokenizer.
        template: The chat format; a text is the name or path of a template, and None is the
            tokenizer's own.
        max_length: Length of the longest example, in tokens.
        truncates: Whether longer rows are cut, their answers kept, instead of an error.

    Raises:
        DataError: the template cannot be read.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        template: ChatFormat | str | None,
        max_length: int,
        truncates: bool = False,
    ) -> None:
        chat_format = template if isinstance(template, ChatFormat) else ChatFormat(template)
        first = tokenizer("a")["input_ids"][:1]
        self._bos = tokenizer.bos_token_id if first == [tokenizer.bos_token_id] else None
        self.tokenizer, self.max_length = tokenizer, max_length
        self.template = ChatTemplate(tokenizer, chat_format, self._bos is not None)
        has_jinja = self.template.jinja is not None
        self.uses_chat_template = has_jinja and chat_format.template != "plain"
        """Whether a prompt that is a text becomes a user's message."""
        self.cut_rows = CutRows() if truncates else None
        """Rows that were cut to `max_length`; None where longer ones are errors."""
        self.unused_keys: dict[str, set[str]] = {}
        """Keys of messages that the template does not read, with the locations of their rows."""
        self.control_rows: dict[str, set[str]] = {}
        """Locations of rows whose texts contain control tokens, by how these are read."""
        self.split_rows: set[str] = set()
        """Locations of chats that are more than one example."""

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """The tokens that end generation: end of text, and the stop tokens of this template."""
        ends = {self.tokenizer.eos_token_id}
        if self.uses_chat_template:
            ends |= {stop.token_id for stop in self.template.stops}
        return frozenset(end for end in ends if end is not None)

    @property
    def chat_format(self) -> ChatFormat:
        """The chat format, with the text of the template and its stop tokens."""
        template = self.template
        stops = tuple(map(str, self.tokenizer.convert_ids_to_tokens(sorted(self.stop_token_ids))))
        return replace(template.chat_format, jinja=template.jinja, stop_tokens=stops)

    def examples(self, row: SFTRow) -> list[Example]:
        """Return the tokens of a row, with its answers and their stop tokens as targets.

        A chat is one example, unless the template writes an earlier answer or its history otherwise
        once more turns follow: then such an answer is an example of its own, whose tokens before
        the answer are those of `prompt`. Every answer is a target in one example.

        Raises:
            DataError: an example is longer than `max_length`, has no answer, or cannot be rendered.
        """
        examples = self._examples(row)
        if self.cut_rows is not None and self._excess(examples) > 0:
            return self._cut_examples(row, self.cut_rows)
        for example in examples:
            if len(example.token_ids) > self.max_length:
                length = pluralize(len(example.token_ids), "token")
                what = f"{length}, more than the {self.max_length:,} allowed"
                hint = "raise --max-length, cut the prompt with --truncate, or leave the row out"
                hint += " with --skip-bad-rows"
                raise DataError(what, where=row.where, hint=hint)
        return examples

    def example(self, row: SFTRow) -> Example:
        """Return the only example of a row; raises `DataError` as `examples`, or for several."""
        examples = self.examples(row)
        if len(examples) > 1:
            raise DataError(
                f"{self.template.name} needs an example for each of {len(examples)} answers",
                where=row.where,
                why="it writes earlier turns otherwise, and here all answers are one sequence",
                hint="one answer a row, or --chat-template chatml",
            )
        return examples[0]

    def _excess(self, examples: Sequence[Example]) -> int:
        """Return the tokens by which the longest of some examples is too long."""
        return max(len(example.token_ids) for example in examples) - self.max_length

    def _cut_examples(self, row: SFTRow, cut_rows: CutRows) -> list[Example]:
        """Return the examples of a row that is too long: cut before its last answer.

        Turns that are cut off are a row of their own as far as they have trained answers. Where the
        answer alone is too long, it keeps half of the length and loses its end.

        Raises:
            DataError: not even the beginning of an answer fits.
        """
        prompt, with_prompt = self._split(row)
        from_middle = self.uses_chat_template
        cut = cut_prompt(
            prompt, lambda p: self._excess(self._examples(with_prompt(p))), from_middle
        )
        examples = self._examples(with_prompt(cut.prompt))
        cut_rows.rows.add(row.where)
        if self._excess(examples) > 0:
            limit = self.max_length // 2

            def excess(prompt: Prompt) -> int:
                lengths = (e.prompt_length for e in self._examples(with_prompt(prompt)))
                return max(lengths) - limit

            cut = cut_prompt(prompt, excess, from_middle)
            cut_rows.answers.add(row.where)
            uncut = self._examples(with_prompt(cut.prompt))
            examples = [self._cut_end(example) for example in uncut]
        if any(is_trained(n, message) for n, message in enumerate(cut.dropped)):
            return [*self.examples(replace(row, messages=cut.dropped)), *examples]
        return examples

    def fit_prompt(self, prompt: Prompt, num_tokens: Callable[[Prompt], int], where: str) -> Prompt:
        """Return a prompt cut to `max_length`, as far as it can be, where rows are cut at all.

        Args:
            prompt: A text, or messages.
            num_tokens: Returns the tokens of a prompt with what follows it.
            where: Location of the row.
        """
        if self.cut_rows is None or num_tokens(prompt) <= self.max_length:
            return prompt
        self.cut_rows.rows.add(where)
        is_question = self.uses_chat_template
        return cut_prompt(prompt, lambda p: num_tokens(p) - self.max_length, is_question).prompt

    def num_tokens(self, rows: Sequence[SFTRow]) -> int:
        """Return the tokens of the longest example of some rows, whatever `max_length` is."""
        return max(len(e.token_ids) for row in rows for e in self._examples(row))

    @property
    def without_cutting(self) -> "Renderer":
        """This renderer, for which longer rows are errors."""
        strict = copy(self)
        strict.cut_rows = None
        return strict

    def _split(self, row: SFTRow) -> tuple[Prompt, Callable[[Prompt], SFTRow]]:
        """Return the text before the last trained answer, and the row with another such prompt."""
        messages = self._messages(row)
        if messages is None:
            return row.prompt or "", lambda prompt: replace(row, prompt=prompt)
        end = [n for n, message in enumerate(messages) if is_trained(n, message)][-1]
        complete = replace(row, messages=messages, prompt=None, completion=None)
        answer = messages[end:]
        return messages[:end], lambda prompt: replace(complete, messages=(*prompt, *answer))

    def _cut_end(self, example: Example) -> Example:
        """Return an example without the tokens after `max_length`, its stop token among them."""
        mask = example.loss_mask[: self.max_length]
        if not any(mask[example.prompt_length :]):
            raise DataError(
                f"no answer fits into {self.max_length:,} tokens",
                where=example.where,
                why=f"{pluralize(example.prompt_length, 'token')} come before it",
                hint="raise --max-length, or leave the row out with --skip-bad-rows",
            )
        kept = example.token_ids[: self.max_length]
        return replace(example, token_ids=kept, loss_mask=mask)

    def prompt(
        self,
        messages_or_text: Sequence[Mapping[str, Any]] | str,
        raw: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the tokens after which generation starts; raises `DataError`.

        A text becomes a user's message where there is a chat template, unless `raw`. Control tokens
        in messages stay text; in a raw text they are read as tokens.

        Args:
            messages_or_text: Messages in OpenAI's form, or a text.
            raw: Whether a text is continued as it stands.
            tools: Functions in OpenAI's form, for templates that describe them.
            template_kwargs: Arguments of the template, in place of the format's own.
        """
        if not isinstance(messages_or_text, str):
            chat = self.template.chat(messages_or_text, "the prompt", tools, template_kwargs)
            text = self.template.write(chat, len(chat.messages), True)
            return self._encode(text, chat.hidden)
        if self.uses_chat_template and not raw:
            return self.prompt([{"role": "user", "content": messages_or_text}])
        return self._with_bos(self._encode(messages_or_text))

    def encode_content(self, text: str) -> list[int]:
        """Return the tokens of a text that continues a message: control tokens in it stay text."""
        hidden: list[str] = []
        if not self.template.chat_format.allow_control_tokens:
            text = self.template.control.hide(text, hidden)
        return self._encode(text, hidden)

    def invocation(self, text: str | None) -> list[int]:
        """Return the tokens of `text`; without it, of what the template writes before an answer."""
        if text is not None:
            return self._encode(text)
        if not self.uses_chat_template:
            return []
        question = [{"role": "user", "content": "a"}]
        before, after = (
            self.template.render(question, opens, "the template") for opens in (False, True)
        )
        return self._encode(after[len(before) :]) if after.startswith(before) else []

    def chunk_text(self, row: SFTRow, chunk: int) -> list[Example]:
        """Return a row as text for pretraining, in chunks.

        A chat, or a prompt with its completion, is the text that it renders to.

        Args:
            row: The row.
            chunk: Length of a chunk in tokens; `max_length` is an upper bound.

        Returns:
            One example per chunk. All its tokens are targets but the first, which has none before
            it.
        """
        if row.text is None:
            tokens = self._sequence(row)
        else:
            self._note_control_tokens(row, row.text, raw=True)
            tokens = self._ended(self._with_bos(self._encode(row.text)), row.where)
        size = max(2, min(chunk, self.max_length))
        cuts = [*range(0, len(tokens), size), len(tokens)]
        if len(cuts) > 2 and cuts[-1] - cuts[-2] == 1 and size > 2:
            cuts[-2] -= 1  # a chunk of one token would have no target
        chunks = [tokens[start:end] for start, end in pairwise(cuts) if end - start > 1]
        return [Example(row.where, c, [False] + [True] * (len(c) - 1), 0, None) for c in chunks]

    def check_template(self, rows: Sequence[SFTRow]) -> None:
        """Check the template before the first step, on an invented row and on the first `rows`.

        Raises:
            DataError: an answer has no stop token, a prefix does not render as a prefix, or none of
                the first rows can be rendered. A single bad row is an error in `example`, since it
                may be left out.
        """
        first = list(islice((row for row in rows if row.text is None), NUM_CHECKED_ROWS))
        if any(row.messages is not None or self.uses_chat_template for row in first):
            self._examples(SFTRow(self.template.name, messages=PROBE))
        errors = []
        for row in first:
            try:
                self._examples(row)
            except DataError as error:
                errors.append(error)
        if errors and len(errors) == len(first):
            raise errors[0]

    def format_loss_mask(self, example: Example) -> str:
        """Return the example as text, with the target tokens between « and »."""
        parts = []
        pairs = zip(example.loss_mask, example.token_ids, strict=True)
        for is_target, group in groupby(pairs, key=lambda pair: pair[0]):
            text = self.tokenizer.decode([token for _, token in group], skip_special_tokens=False)
            parts.append(f"«{text}»" if is_target else str(text))
        return "".join(parts)

    def _examples(self, row: SFTRow) -> list[Example]:
        """Return the examples of a row of any length; raises `DataError`."""
        if row.text is not None:
            why = "plain text has no prompt, so its mask would be all on"
            hint = "--objective pretrain"
            raise DataError("nothing to answer in this row", where=row.where, why=why, hint=hint)
        messages = self._messages(row)
        if messages is None:
            tokens, start, completion = self._completion(row)
            mask = [False] * start + [True] * (len(tokens) - start)
            examples = [Example(row.where, tokens, mask, start, completion)]
        else:
            examples = self._chat_examples(messages, row)
        for example in examples:
            if all(example.loss_mask[example.token_ids[0] == self._bos :]):
                what, hint = "the mask of this row is all on", "--objective pretrain"
                why = "no token of a prompt comes before the answer"
                raise DataError(what, where=row.where, why=why, hint=hint)
        return examples

    def _messages(self, row: SFTRow) -> tuple[Message, ...] | None:
        """Return a row as messages; None where it is a prompt to continue."""
        if row.messages is not None or not self.uses_chat_template:
            return row.messages
        turns = ("user", row.prompt), ("assistant", row.completion)
        return tuple({"role": role, "content": content or ""} for role, content in turns)

    def _chat_examples(self, messages: Sequence[Message], row: SFTRow) -> list[Example]:
        """Return the examples of a chat, in the order of their last answers.

        An answer that opens the chat, or that has weight 0, is context and not trained on.
        """
        numbers = [n for n, message in enumerate(messages) if is_trained(n, message)]
        if not numbers:
            what = "nothing to train on in this row: its mask is all off"
            why = "an answer needs a message before it, and a weight that is not 0"
            raise DataError(what, where=row.where, why=why)
        messages = [self._without_stop(message, row.where) for message in messages]
        chat = self.template.chat(messages[: numbers[-1] + 1], row.where, row.tools)
        answers = find_answers(self.template, chat, numbers)
        for key in check_history(self.template, chat, numbers, answers[-1].prompt):
            self.unused_keys.setdefault(key, set()).add(row.where)
        if chat.hidden or self.template.chat_format.allow_control_tokens:
            self._note_control_tokens(row, *map(text_of, messages))
        examples: list[Example] = []
        while answers:
            example, answers = self._join(answers, chat)
            examples.insert(0, example)
        if len(examples) > 1:
            self.split_rows.add(row.where)
        return examples

    def _without_stop(self, message: Message, where: str) -> Message:
        """Return an answer without stop tokens at its end: the template writes the one there is."""
        content = message.get("content")
        if message["role"] != "assistant" or not isinstance(content, str):
            return message
        ends = tuple(filter(None, self.template.stop_texts))
        if not content.rstrip().endswith(ends):
            return message
        cut = content.rstrip()
        while cut.endswith(ends):
            cut = cut.removesuffix(next(end for end in ends if cut.endswith(end))).rstrip()
        if not cut and not message.get("tool_calls"):
            hint = "--skip-bad-rows leaves the row out"
            raise DataError("an answer is a stop token alone", where=where, hint=hint)
        self.control_rows.setdefault("stop_tokens_in_answers", set()).add(where)
        return message | {"content": cut}

    def _note_control_tokens(self, row: SFTRow, *texts: str, raw: bool = False) -> None:
        if self.template.control.occur_in(*texts):
            is_token = raw or self.template.chat_format.allow_control_tokens
            kind = "control_tokens_as_tokens" if is_token else "control_tokens_as_text"
            self.control_rows.setdefault(kind, set()).add(row.where)

    @property
    def counts(self) -> dict[str, Any]:
        """Counts of the rows rendered so far that a plan reports; without those that are zero."""
        counts: dict[str, Any] = {kind: len(rows) for kind, rows in self.control_rows.items()}
        counts |= self.cut_rows.counts if self.cut_rows else {}
        if self.split_rows:
            counts["split_chats"] = len(self.split_rows)
        if self.unused_keys:
            unused = {key: len(rows) for key, rows in self.unused_keys.items()}
            counts["unused_message_keys"] = list_unused(unused)
        return counts

    def _join(self, answers: list[Answer], chat: Chat) -> tuple[Example, list[Answer]]:
        """Return an example of the last answer and those that its text contains, and the others."""
        *earlier, last = answers
        full = last.prompt + last.text + last.rest
        tokens, prompt = (self._encode(text, chat.hidden) for text in (full, last.prompt))
        if tokens[: len(prompt)] != prompt:  # a token would span the start of the answer
            tokens = prompt + self._encode(last.text + last.rest, chat.hidden)
        spans, left = [_span(tokens, len(prompt), last)], []
        for answer in earlier:
            start = self._encode(answer.prompt, chat.hidden)
            is_alike = full.startswith(answer.prompt + answer.text)
            if is_alike and tokens[: len(start)] == start:
                spans.append(_span(tokens, len(start), answer))
            else:
                left.append(answer)
        mask = [False] * len(tokens)
        for start_index, end in spans:
            mask[start_index:end] = [True] * (end - start_index)
        completion = restore(last.completion, chat.hidden)
        return Example(chat.where, tokens, mask, len(prompt), completion), left

    def _sequence(self, row: SFTRow) -> list[int]:
        """Return the tokens of a chat to its last trained answer, or of prompt and completion."""
        messages = self._messages(row)
        if messages is None:
            return self._completion(row)[0]
        trained = [n for n, message in enumerate(messages) if is_trained(n, message)]
        end = trained[-1] + 1 if trained else len(messages)
        chat = self.template.chat(messages[:end], row.where, row.tools)
        return self._encode(self.template.write(chat, end, False), chat.hidden)

    def _completion(self, row: SFTRow) -> tuple[list[int], int, str]:
        """Return the tokens of a prompt and its completion, where the latter begins, and it.

        Generation is given the tokens of the prompt: where a token of the full text would span its
        end, the two are encoded separately.
        """
        prompt, completion = row.prompt or "", row.completion or ""
        self._note_control_tokens(row, prompt, completion, raw=True)
        tokens, start = self._encode(prompt + completion), self._encode(prompt)
        if tokens[: len(start)] != start:
            tokens = start + self._encode(completion)
        with_bos = self._with_bos(tokens)
        num_before = len(start) + len(with_bos) - len(tokens)
        prompt_tokens, answer = with_bos[:num_before], with_bos[num_before:]
        return [*prompt_tokens, *self._ended(answer, row.where)], num_before, completion

    def _encode(self, text: str, hidden: Sequence[str] = ()) -> list[int]:
        return self.template.control.encode(text, hidden)

    def _with_bos(self, tokens: list[int]) -> list[int]:
        return tokens if self._bos is None or tokens[:1] == [self._bos] else [self._bos, *tokens]

    def _ended(self, tokens: list[int], where: str) -> list[int]:
        """Return tokens with one end-of-text token at their end, however many the text has."""
        eos, end = self._eos(where), len(tokens)
        while end and tokens[end - 1] == eos:
            end -= 1
        return [*tokens[:end], eos]

    def _eos(self, where: str) -> int:
        if self.tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no end-of-text token", where=where, hint="set its eos_token"
            )
        return self.tokenizer.eos_token_id


def _span(tokens: list[int], start: int, answer: Answer) -> tuple[int, int]:
    """Return where an answer begins and ends; its last token is its stop token."""
    end = start
    for _ in range(answer.text.count(answer.stop.text)):
        end = tokens.index(answer.stop.token_id, end) + 1
    return start, end
