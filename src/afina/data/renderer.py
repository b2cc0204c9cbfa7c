"""Rows to examples: token ids, and the loss mask of the tokens that are trained on.

The tokens before an answer are exactly those that generation is given, and the last target token of
an answer is its stop token. A loss mask that would be all on or all off is an error.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, pairwise
from typing import TYPE_CHECKING, Any

from afina.data.chat_template import PROBE, ChatTemplate
from afina.data.schemas import SFTRow
from afina.errors import DataError, pluralize
from afina.io.chat_format import ChatFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_CHECKED_ROWS = 16  # rows on which a template is checked before all are rendered


@dataclass(frozen=True)
class Example:
    """The tokens of one row.

    Attributes:
        where: Place of the row, "file:line".
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


class Renderer:
    """Rows and prompts to tokens, by one chat template.

    Args:
        tokenizer: The base model's tokenizer.
        template: How the model is asked; a text is the name or path of a template, and None is the
            tokenizer's own.
        max_length: Length of the longest example, in tokens.

    Raises:
        DataError: the template cannot be read.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        template: ChatFormat | str | None,
        max_length: int,
    ) -> None:
        asked = template if isinstance(template, ChatFormat) else ChatFormat(template)
        first = tokenizer("a")["input_ids"][:1]
        self._bos = tokenizer.bos_token_id if first == [tokenizer.bos_token_id] else None
        self.tokenizer, self.max_length = tokenizer, max_length
        self.template = ChatTemplate(tokenizer, asked, self._bos is not None)
        self.uses_chat_template = self.template.jinja is not None and asked.template != "plain"
        """Whether a prompt that is a text becomes a user's message."""

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """The tokens that end generation: end of text, and the stop token of this template."""
        ends = {self.tokenizer.eos_token_id}
        if self.uses_chat_template:
            # a template without a stop token cannot be trained on, but it can generate
            with suppress(DataError):
                ends.add(self.template.stop_token_id)
        return frozenset(end for end in ends if end is not None)

    @property
    def chat_format(self) -> ChatFormat:
        """How the model is asked, with the text of the template and its stop tokens."""
        template = self.template
        stops = tuple(map(str, self.tokenizer.convert_ids_to_tokens(sorted(self.stop_token_ids))))
        return replace(template.chat_format, jinja=template.jinja, stop_tokens=stops)

    def example(self, row: SFTRow) -> Example:
        """Return the tokens of a row, with its answers and their stop tokens as targets.

        Raises:
            DataError: the row is longer than `max_length`, has no answer, or cannot be rendered.
        """
        example = self._example(row)
        if len(example.token_ids) > self.max_length:
            length = pluralize(len(example.token_ids), "token")
            what = f"{length}, more than the {self.max_length:,} allowed"
            hint = "raise --max-length, shorten the row, or leave it out with --skip-bad-rows"
            raise DataError(what, where=row.where, hint=hint)
        return example

    def prompt(
        self,
        messages_or_text: Sequence[Mapping[str, Any]] | str,
        raw: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the tokens after which generation starts; raises `DataError`.

        A text becomes a user's message where there is a chat template, unless `raw`.

        Args:
            tools: functions in OpenAI's form, for templates that describe them.
            template_kwargs: further variables of the template.
        """
        if not isinstance(messages_or_text, str):
            given = messages_or_text, True, "the prompt", tools, template_kwargs
            return self._encode(self.template.render(*given))
        if self.uses_chat_template and not raw:
            return self.prompt([{"role": "user", "content": messages_or_text}])
        return self._with_bos(self._encode(messages_or_text))

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
            tokens = self._example(row).token_ids
        else:
            tokens = [*self._with_bos(self._encode(row.text)), self._eos(row.where)]
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
        first = [row for row in rows if row.text is None][:NUM_CHECKED_ROWS]
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
        """Return the example as text, with the target tokens between « and »."""
        parts = []
        pairs = zip(example.loss_mask, example.token_ids, strict=True)
        for is_target, group in groupby(pairs, key=lambda pair: pair[0]):
            text = self.tokenizer.decode([token for _, token in group], skip_special_tokens=False)
            parts.append(f"«{text}»" if is_target else str(text))
        return "".join(parts)

    def _example(self, row: SFTRow) -> Example:
        """The example of a row of any length; raises `DataError`."""
        if row.text is not None:
            why = "plain text has no prompt, so its mask would be all on"
            hint = "--objective pretrain"
            raise DataError("nothing to answer in this row", where=row.where, why=why, hint=hint)
        messages = row.messages
        if messages is None and self.uses_chat_template:
            turns = ("user", row.prompt), ("assistant", row.completion)
            messages = tuple({"role": role, "content": content or ""} for role, content in turns)
        loss_mask: list[bool] = []
        if messages is not None:
            text, cuts, answer = self.template.find_answers(messages, row.where)
            tokens, starts = self._encode_at(text, cuts)
            for start in starts:
                end = tokens.index(self.template.stop_token_id, start) + 1
                loss_mask += [False] * (start - len(loss_mask)) + [True] * (end - start)
            loss_mask += [False] * (len(tokens) - len(loss_mask))
        else:
            tokens, starts, answer = self._completion(row)
            loss_mask = [False] * starts[0] + [True] * (len(tokens) - starts[0])
        if all(loss_mask[tokens[0] == self._bos :]):
            what, hint = "the mask of this row is all on", "--objective pretrain"
            why = "no token of a prompt comes before the answer"
            raise DataError(what, where=row.where, why=why, hint=hint)
        return Example(row.where, tokens, loss_mask, starts[-1], answer)

    def _completion(self, row: SFTRow) -> tuple[list[int], list[int], str]:
        """Return tokens of prompt and completion without a template, the answer's start, and it."""
        prompt, completion = row.prompt or "", row.completion or ""
        encoded, starts = self._encode_at(prompt + completion, [len(prompt)])
        tokens, eos = self._with_bos(encoded), self._eos(row.where)
        start = starts[0] + len(tokens) - len(encoded)
        return tokens if tokens[-1] == eos else [*tokens, eos], [start], completion

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _encode_at(self, text: str, cuts: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return the tokens of `text`, and how many come before each of the characters `cuts`.

        Generation is given the tokens of text[:cut]. Where the tokens of the full text begin
        otherwise, since one would span the cut, the pieces are encoded separately.
        """
        tokens = self._encode(text)
        prefixes = [self._encode(text[:cut]) for cut in cuts]
        if all(tokens[: len(prefix)] == prefix for prefix in prefixes):
            return tokens, [len(prefix) for prefix in prefixes]
        pieces = [self._encode(text[a:b]) for a, b in pairwise([0, *cuts, len(text)])]
        starts = [*accumulate(len(piece) for piece in pieces[:-1])]
        return [token for piece in pieces for token in piece], starts

    def _with_bos(self, tokens: list[int]) -> list[int]:
        return tokens if self._bos is None or tokens[:1] == [self._bos] else [self._bos, *tokens]

    def _eos(self, where: str) -> int:
        if self.tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no end-of-text token", where=where, hint="set its eos_token"
            )
        return self.tokenizer.eos_token_id
