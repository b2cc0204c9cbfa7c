"""Prompt rows to tokenized prompts: checked, and split into training and eval prompts."""

from dataclasses import dataclass

from afina.adapters.active import last_start
from afina.data.packing import train_eval_split
from afina.data.renderer import Renderer
from afina.data.schemas import PROMPT, PromptRow, prompt_key
from afina.data.table import parse_rows, read_table, summarize_skipped
from afina.errors import DataError, SettingsError, pluralize
from afina.models.causal_lm import CausalLM
from afina.objectives.reward_functions import RewardFunctions
from afina.settings import PolicySettings, TrainSettings


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt as tokens."""

    row: PromptRow
    token_ids: list[int]

    @property
    def where(self) -> str:
        """Where it stands in the data."""
        return self.row.where


def make_queries(
    renderer: Renderer,
    rows: list[PromptRow],
    skipped: list[str] | None,
    invocation: tuple[int, ...],
    max_new_tokens: int,
    rewards: RewardFunctions,
) -> list[TokenizedPrompt]:
    """Prompts as tokens. One that cannot be used, or judged, is an error, or is listed in `skipped` when that is given."""

    def make(where: str, row: PromptRow) -> TokenizedPrompt:
        rewards.check(row)
        tokens = renderer.prompt(row.prompt, tools=row.tools)
        if len(tokens) + max_new_tokens > renderer.max_length:
            what = f"{pluralize(len(tokens), 'token')}, and {max_new_tokens:,} for the answer"
            why = f"more than the {renderer.max_length:,} allowed"
            raise DataError(
                what, where=where, why=why, hint="a smaller max_new_tokens of the objective"
            )
        if invocation and last_start(tokens, invocation) is None:
            hint = "--invocation TEXT that stands in every prompt, or --skip-bad-rows"
            raise DataError("the invocation does not occur in this prompt", where=where, hint=hint)
        return TokenizedPrompt(row, tokens)

    made = parse_rows(((row.where, row) for row in rows), make, skipped)
    if not made:
        raise DataError(
            "no prompt is left to answer", why=f"skipped: {summarize_skipped(skipped or [])}"
        )
    return made


def split_prompts(
    settings: TrainSettings, rows: list[PromptRow], skipped: list[str]
) -> tuple[list[PromptRow], list[PromptRow]]:
    """Prompts to learn from and prompts to judge by; the same one is on one side."""
    if settings.eval_data is None:
        return train_eval_split(rows, settings.eval_size, settings.seed, prompt_key)
    other = read_table(settings.eval_data, PROMPT, settings.columns, settings.skip_bad_rows)
    skipped += other.skipped
    return rows, other.rows


def check_policy_settings(settings: TrainSettings, options: PolicySettings) -> None:
    """Raise `SettingsError` for what does not go together."""
    if settings.gradient_accumulation_steps > 1:
        why = "a step learns from all answers to its prompts, in as many passes as they need"
        raise SettingsError(
            f"gradient_accumulation_steps is {settings.gradient_accumulation_steps}",
            where="gradient_accumulation_steps",
            why=why,
            hint=f"--{settings.objective}.prompts-per-step",
        )
    if settings.eval_steps and settings.eval_steps % options.num_iterations:
        why = f"between two of {options.num_iterations} updates there is no state to go on from"
        hint = f"--eval-steps {options.num_iterations * -(-settings.eval_steps // options.num_iterations)}"
        raise SettingsError(
            f"eval_steps is {settings.eval_steps}", where="eval_steps", why=why, hint=hint
        )


def check_temperature(options: PolicySettings, base: CausalLM) -> None:
    """Raise `SettingsError` where logits cannot be had at another temperature by scaling what the output layer reads."""
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
