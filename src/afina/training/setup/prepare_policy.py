"""From settings to a language model, prompts to answer on it, and who judges the answers."""

from afina.adapters.active import last_start
from afina.adapters.presets import get_preset
from afina.data.packing import train_eval_split
from afina.data.renderer import Renderer
from afina.data.schemas import PROMPT, PromptRow, prompt_key
from afina.data.table import parse_rows, read_table, summarize_skipped
from afina.errors import DataError, SettingsError, pluralize
from afina.models.causal_lm import CausalLM
from afina.models.loading import load_base
from afina.objectives.policy import PolicyObjective, TokenizedPrompt
from afina.objectives.policy_generator import PolicyGenerator
from afina.objectives.reward_functions import RewardFunctions, load_reward_functions
from afina.settings import PolicySettings, TrainSettings
from afina.training.setup.prepared import (
    PreparedData,
    Units,
    describe_data,
    resolve_invocation,
)
from afina.training.setup.processes import world


def prepare_policy(settings: TrainSettings, base: CausalLM | None) -> PreparedData:
    """Load, read, render and check; raises the error of the first thing that is wrong."""
    options = settings.group(settings.objective)
    _refuse(settings, options)
    table = read_table(settings.data, PROMPT, settings.columns, settings.skip_bad_rows)
    base = base or load_base(
        settings.base,
        settings.revision,
        settings.trust_remote_code,
        settings.dtype,
        settings.place,
        get_preset(settings.method, 1).quantization,
    )
    _check_temperature(options, base)
    own_tokens = base.add_tokens(settings.new_tokens)
    modules = (base.add_score_head(),) if settings.objective == "ppo" else ()
    rewards = load_reward_functions(options, base, settings.chat_template)
    renderer = Renderer(
        base.tokenizer,
        settings.chat_template,
        min(settings.max_length or base.max_positions, base.max_positions),
    )
    invocation = (
        resolve_invocation(renderer, settings)
        if get_preset(settings.method, 1).is_activated
        else ()
    )
    skipped = list(table.skipped)
    leave_out = skipped if settings.skip_bad_rows else None
    train, held = (
        make_queries(renderer, rows, leave_out, invocation, options.max_new_tokens, rewards)
        for rows in _split(settings, table.rows, skipped)
    )
    longest = max(len(query.token_ids) for query in (*train, *held)) + options.max_new_tokens
    task = PolicyObjective(
        settings.objective,
        options,
        base,
        train,
        held,
        rewards,
        PolicyGenerator(base, longest, renderer.stop_token_ids),
        settings.max_tokens_per_batch,
        settings.seed,
    )
    return PreparedData(
        base=base,
        task=task,
        objective=settings.objective,
        data_info=describe_data(table, len(held)),
        skipped=skipped,
        example=str(base.tokenizer.decode(train[0].token_ids)) + "«...»",
        eval_records=[query.row.record(rewards.needs_items) for query in held],
        invocation=invocation,
        modules_to_save=modules,
        trainable_tokens=own_tokens,
        max_length=renderer.max_length,
        counts={
            "train": len(train),
            "held_out": len(held),
            "tokens": sum(len(query.token_ids) for query in train),
            "longest": longest,
        },
        words=Units("answer", ""),
        reward_hash=rewards.content_hash,
    )


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
        tokens = renderer.prompt(row.prompt)
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


def _split(
    settings: TrainSettings, rows: list[PromptRow], skipped: list[str]
) -> tuple[list[PromptRow], list[PromptRow]]:
    """Prompts to learn from and prompts to judge by; the same one is on one side."""
    if settings.eval_data is None:
        return train_eval_split(rows, settings.eval_size, settings.seed, prompt_key)
    other = read_table(settings.eval_data, PROMPT, settings.columns, settings.skip_bad_rows)
    skipped += other.skipped
    return rows, other.rows


def _refuse(settings: TrainSettings, options: PolicySettings) -> None:
    """Raise `SettingsError` for what does not go together."""
    if world().size > 1 or settings.fsdp:
        why = "each process would write and judge all answers for itself"
        raise SettingsError(
            f"{settings.objective} runs in one process so far", where="torchrun", why=why
        )
    if settings.gradient_accumulation_steps > 1:
        why = "a step learns from all answers to its prompts, in as many passes as they need"
        raise SettingsError(
            "accumulate means nothing here",
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


def _check_temperature(options: PolicySettings, base: CausalLM) -> None:
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
