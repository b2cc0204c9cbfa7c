"""Rows become examples: tokens, with a label for each token that is to be learned.

The tokens before an answer are exactly those that generation is given, and the last label of an answer is the
token that stops it. A mask that would be all on or all off is an error.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import TYPE_CHECKING

from afina.data.chat_template import PROBE, ChatTemplate
from afina.data.schemas import SFTRow
from afina.errors import DataError, pluralize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIRST_ROWS = 16  # rows on which a template is tried before all are rendered


@dataclass(frozen=True)
class Example:
    """The tokens of one row; labels[i] says that token i is to be predicted (labels[0] never is).

    `prompt_tokens` is the length of the prefix before the last answer, where generation starts; `answer` is
    that answer as the template writes it, without the stop token; None for plain text.
    """

    where: str
    token_ids: list[int]
    loss_mask: list[bool]
    prompt_length: int
    completion: str | None


class Renderer:
    """Rows and prompts to tokens, by one template: the tokenizer's own (None), "plain", "chatml", or a jinja file.

    `max_length` is the longest example in tokens. Raises `DataError` for a template that cannot be read.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", template: str | None, max_length: int
    ) -> None:
        first = tokenizer("a")["input_ids"][:1]
        self._bos = tokenizer.bos_token_id if first == [tokenizer.bos_token_id] else None
        self.tokenizer, self.max_length = tokenizer, max_length
        self.template = ChatTemplate(tokenizer, template, self._bos is not None)
        self.uses_chat_template = self.template.jinja is not None and template != "plain"
        """Whether a prompt is put as a user's message."""

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """The tokens that end generation: the end of the text, and that of an answer under this template."""
        ends = {self.tokenizer.eos_token_id}
        if self.uses_chat_template:
            with suppress(
                DataError
            ):  # a template without a stop token cannot be trained on, but it can be asked
                ends.add(self.template.stop)
        return frozenset(end for end in ends if end is not None)

    def example(self, row: SFTRow) -> Example:
        """The tokens of a row, its answers labelled up to and including their stop tokens; raises `DataError`."""
        example = self._example(row)
        if len(example.token_ids) > self.max_length:
            what = f"{pluralize(len(example.token_ids), 'token')}, more than the {self.max_length:,} allowed"
            hint = "raise --max-length, shorten the row, or leave it out with --skip-bad-rows"
            raise DataError(what, where=row.where, hint=hint)
        return example

    def prompt(
        self, messages_or_text: Sequence[Mapping[str, str]] | str, raw: bool = False
    ) -> list[int]:
        """The tokens after which generation starts; raises `DataError`.

        A text is put as a user's message where there is a chat template, unless it is `raw`.
        """
        if not isinstance(messages_or_text, str):
            return self._encode(self.template.text(messages_or_text, True, "the prompt"))
        if self.uses_chat_template and not raw:
            return self.prompt([{"role": "user", "content": messages_or_text}])
        return self._with_bos(self._encode(messages_or_text))

    def invocation(self, text: str | None) -> list[int]:
        """The tokens of `text`, or of what the template writes between a question and its answer."""
        if text is not None:
            return self._encode(text)
        if not self.uses_chat_template:
            return []
        asked = [{"role": "user", "content": "a"}]
        before, after = (
            self.template.text(asked, False, "the template"),
            self.template.text(asked, True, "the template"),
        )
        return self._encode(after[len(before) :]) if after.startswith(before) else []

    def chunk_text(self, row: SFTRow, chunk: int) -> list[Example]:
        """A row as text to go on with: chunks of at most `chunk` (and `max_length`) tokens, all labelled.

        The first token of a chunk has nothing before it and is not. A chat or a prompt is the text it renders to.
        """
        if row.text is None:
            tokens = self._example(row).token_ids
        else:
            tokens = [*self._with_bos(self._encode(row.text)), self._eos(row.where)]
        size = max(2, min(chunk, self.max_length))
        cuts = [*range(0, len(tokens), size), len(tokens)]
        if len(cuts) > 2 and cuts[-1] - cuts[-2] == 1 and size > 2:
            cuts[-2] -= 1  # a last token alone would have no label
        parts = [tokens[start:end] for start, end in pairwise(cuts)]
        return [
            Example(row.where, p, [False] + [True] * (len(p) - 1), 0, None)
            for p in parts
            if len(p) > 1
        ]

    def check_template(self, rows: Sequence[SFTRow]) -> None:
        """Try the template before the first step, on an invented row and on the first of `rows`.

        Raises `DataError` when an answer has no stop token, a prefix does not render as a prefix, or none of the
        first rows can be labelled. A single bad row is `example`'s to refuse, since it may be left out.
        """
        first = [row for row in rows if row.text is None][:FIRST_ROWS]
        if any(row.messages is not None or self.uses_chat_template for row in first):
            self._example(SFTRow(self.template.name, messages=PROBE))
        errors = []
        for row in first:
            try:
                self._example(row)
            except DataError as error:
                errors.append(error)
        if errors and len(errors) == len(first):
            raise errors[0]

    def format_loss_mask(self, example: Example) -> str:
        """The example as text, what is learned between « and »."""
        parts = []
        for label, group in groupby(
            zip(example.loss_mask, example.token_ids, strict=True), key=lambda pair: pair[0]
        ):
            text = self.tokenizer.decode([token for _, token in group], skip_special_tokens=False)
            parts.append(f"«{text}»" if label else str(text))
        return "".join(parts)

    def _example(self, row: SFTRow) -> Example:
        """The example of a row of any length; raises `DataError`."""
        if row.text is not None:
            why, hint = (
                "plain text has no prompt, so its mask would be all on",
                "--objective pretrain",
            )
            raise DataError("nothing to answer in this row", where=row.where, why=why, hint=hint)
        messages = row.messages
        if messages is None and self.uses_chat_template:
            turns = ("user", row.prompt), ("assistant", row.completion)
            messages = tuple({"role": role, "content": content or ""} for role, content in turns)
        labels: list[bool] = []
        if messages is not None:
            text, cuts, answer = self.template.answers(messages, row.where)
            tokens, starts = self._encode_at(text, cuts)
            for start in starts:
                end = tokens.index(self.template.stop, start) + 1
                labels += [False] * (start - len(labels)) + [True] * (end - start)
            labels += [False] * (len(tokens) - len(labels))
        else:
            tokens, starts, answer = self._completion(row)
            labels = [False] * starts[0] + [True] * (len(tokens) - starts[0])
        if all(labels[tokens[0] == self._bos :]):
            why = "no token of a prompt comes before the answer"
            raise DataError(
                "the mask of this row is all on",
                where=row.where,
                why=why,
                hint="--objective pretrain",
            )
        return Example(row.where, tokens, labels, starts[-1], answer)

    def _completion(self, row: SFTRow) -> tuple[list[int], list[int], str]:
        """Prompt and completion as they are, then the end of the text: tokens, where the answer starts, the answer."""
        prompt, completion = row.prompt or "", row.completion or ""
        tokens, starts = self._encode_at(prompt + completion, [len(prompt)])
        whole, eos = self._with_bos(tokens), self._eos(row.where)
        start = starts[0] + len(whole) - len(tokens)
        return whole if whole[-1] == eos else [*whole, eos], [start], completion

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _encode_at(self, text: str, cuts: Sequence[int]) -> tuple[list[int], list[int]]:
        """The tokens of `text`, and how many of them stand before each of the characters `cuts`.

        Generation is given the tokens of text[:cut]. Where those of the whole begin otherwise (a token would
        reach over the cut) the pieces are encoded one by one.
        """
        tokens = self._encode(text)
        prefixes = [self._encode(text[:cut]) for cut in cuts]
        if all(tokens[: len(prefix)] == prefix for prefix in prefixes):
            return tokens, [len(prefix) for prefix in prefixes]
        pieces = [
            self._encode(text[a:b]) for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)
        ]
        return [token for piece in pieces for token in piece], [*accumulate(map(len, pieces[:-1]))]

    def _with_bos(self, tokens: list[int]) -> list[int]:
        return tokens if self._bos is None or tokens[:1] == [self._bos] else [self._bos, *tokens]

    def _eos(self, where: str) -> int:
        if self.tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no end-of-text token", where=where, hint="set its eos_token"
            )
        return self.tokenizer.eos_token_id
