"""Prompt rows to tokenized prompts: checked, and split into training and eval prompts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from afina.adapters.active import last_start
from afina.data.packing import train_eval_split
from afina.data.renderer import Renderer
from afina.data.schemas import PROMPT, Prompt, PromptRow, prompt_key
from afina.data.several_files import file_number
from afina.data.table import Table, parse_rows, read_table, summarize_skipped
from afina.errors import DataError, SettingsError, pluralize
from afina.models.causal_lm import CausalLM
from afina.objectives.reward_functions import RewardFunctions
from afina.settings import PolicySettings, TrainSettings


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt as token ids."""

    row: PromptRow
    token_ids: list[int]

    @property
    def where(self) -> str:
        """Location of the row, `file:line`."""
        return self.row.where


def make_queries(
    renderer: Renderer,
    rows: Sequence[PromptRow],
    skipped: list[str] | None,
    invocation: tuple[int, ...],
    max_new_tokens: int,
    rewards: RewardFunctions,
) -> Sequence[TokenizedPrompt]:
    """Return prompts as token ids.

    Args:
        renderer: Renders the prompts.
        rows: The rows.
        skipped: Rows that cannot be used or scored are added here; None makes them an error.
        invocation: Token ids that have to occur in each prompt.
        max_new_tokens: Tokens that a completion may take of `max_length`.
        rewards: The reward functions.

    Raises:
        DataError: A row cannot be used or scored, or none is left.
    """

    def make(where: str, row: PromptRow) -> TokenizedPrompt:
        rewards.check(row)

        def num_tokens(prompt: Prompt) -> int:
            return len(renderer.prompt(prompt, tools=row.tools)) + max_new_tokens

        fitted = renderer.fit_prompt(row.prompt, num_tokens, where)
        row = replace(row, prompt=fitted)
        tokens = renderer.prompt(row.prompt, tools=row.tools)
        if len(tokens) + max_new_tokens > renderer.max_length:
            what = f"{pluralize(len(tokens), 'token')}, and {max_new_tokens:,} for the answer"
            why = f"more than the {renderer.max_length:,} allowed"
            raise DataError(
                what,
                where=where,
                why=why,
                hint="a smaller max_new_tokens of the objective, or --truncate",
            )
        if invocation and last_start(tokens, invocation) is None:
            hint = "--invocation TEXT that stands in every prompt, or --skip-bad-rows"
            raise DataError("the invocation does not occur in this prompt", where=where, hint=hint)
        return TokenizedPrompt(row, tokens)

    tokenized = parse_rows(((row.where, row) for row in rows), make, skipped)
    if not tokenized:
        raise DataError(
            "no prompt is left to train on", why=f"skipped: {summarize_skipped(skipped or [])}"
        )
    return tokenized


def split_prompts(
    settings: TrainSettings, table: Table[PromptRow], skipped: list[str]
) -> tuple[Sequence[PromptRow], Sequence[PromptRow]]:
    """Return training and eval prompts; equal prompts are on one side."""
    if settings.eval_data is None:
        file_of = file_number(table.files)
        return train_eval_split(table.rows, settings.eval_size, settings.seed, prompt_key, file_of)
    other = read_table(settings.eval_data, PROMPT, settings.columns, settings.skip_bad_rows)
    skipped += other.skipped
    return table.rows, other.rows


def check_policy_settings(settings: TrainSettings, options: PolicySettings) -> None:
    """Raise `SettingsError` for settings that cannot be combined."""
    if settings.gradient_accumulation_steps > 1:
        why = "a step uses all completions of its prompts, in as many micro-batches as they need"
        raise SettingsError(
            f"gradient_accumulation_steps is {settings.gradient_accumulation_steps}",
            where="gradient_accumulation_steps",
            why=why,
            hint=f"--{settings.objective}.prompts-per-step",
        )
    if settings.eval_steps and settings.eval_steps % options.num_iterations:
        why = f"no state can be saved within {options.num_iterations} steps on the same completions"
        multiple = options.num_iterations * -(-settings.eval_steps // options.num_iterations)
        hint = f"--eval-steps {multiple}"
        raise SettingsError(
            f"eval_steps is {settings.eval_steps}", where="eval_steps", why=why, hint=hint
        )


def check_temperature(options: PolicySettings, base: CausalLM) -> None:
    """Raise `SettingsError` where scaling hidden states does not scale the logits."""
    scalable = (
        base.has_hidden_states
        and base.softcap is None
        and getattr(base.lm_head, "bias", None) is None
    )
    if options.temperature != 1.0 and not scalable:
        why = "its output layer has a bias or a soft cap"
        raise SettingsError(
            f"a temperature of {options.temperature}",
            where="temperature",
            why=why,
            hint="{temperature: 1}",
        )
