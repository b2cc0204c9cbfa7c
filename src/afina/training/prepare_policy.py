"""From settings to a language model, prompts to answer on it, and who judges the answers."""

from pathlib import Path

from afina.base.load import load_base
from afina.base.model import Base
from afina.config import PolicyOptions, TrainSettings
from afina.data.batches import holdout_share, split
from afina.data.prompts import Asked, asked_key, read_asked
from afina.data.skipped import reasons, usable
from afina.data.template import Renderer
from afina.delta.contract import method
from afina.delta.presets import preset
from afina.engine.writing import EngineWriter
from afina.errors import DataError, SettingsError, counted
from afina.objective.policy import policy_options
from afina.objective.rollout import PolicyTask, Query
from afina.objective.scoring import Rewards, make_rewards
from afina.route.invocation import last_start
from afina.training.distributed import world
from afina.training.prepared import Prepared, Words, find_invocation, new_tokens, source_of


def prepare_policy(settings: TrainSettings, base: Base | None) -> Prepared:
    """Load, read, render and check; raises the error of the first thing that is wrong."""
    options = policy_options(settings)
    _refuse(settings, options)
    table = read_asked(settings.data, settings.columns, settings.skip_bad_rows)
    base = base or load_base(
        settings.base, settings.revision, settings.trust_remote_code, settings.dtype, settings.place,
        preset(settings.method, 1).storage,
    )  # fmt: skip
    _check_temperature(options, base)
    own_tokens = base.add_tokens(new_tokens(settings))
    modules = (base.add_score(),) if settings.objective == "ppo" else ()
    rewards = make_rewards(options, base, settings.template)
    renderer = Renderer(base.tokenizer, settings.template, min(settings.max_length or base.context, base.context))
    invocation = find_invocation(renderer, settings) if preset(settings.method, 1).activated else ()
    skipped = list(table.skipped)
    leave_out = skipped if settings.skip_bad_rows else None
    train, held = (
        make_queries(renderer, rows, leave_out, invocation, options.max_new_tokens, rewards)
        for rows in _split(settings, table.rows, skipped)
    )
    longest = max(len(query.tokens) for query in (*train, *held)) + options.max_new_tokens
    whole = method(preset(settings.method, 1).delta).replaces
    task = PolicyTask(
        settings.objective, options, base, train, held, rewards, EngineWriter(base, longest, renderer.stops, whole),
        settings.batch_tokens, settings.seed,
    )  # fmt: skip
    return Prepared(
        base=base,
        task=task,
        objective=settings.objective,
        source=source_of(table, len(held)),
        skipped=skipped,
        example=str(base.tokenizer.decode(train[0].tokens)) + "«...»",
        held_records=[query.row.record(rewards.reads_items) for query in held],
        invocation=invocation,
        modules=modules,
        tokens=own_tokens,
        max_length=renderer.max_length,
        counts={"train": len(train), "held_out": len(held), "tokens": sum(len(query.tokens) for query in train),
                "longest": longest},
        words=Words("answer", ""),
        judges=rewards.content,
    )  # fmt: skip


def make_queries(
    renderer: Renderer, rows: list[Asked], skipped: list[str] | None, invocation: tuple[int, ...], max_new_tokens: int,
    rewards: Rewards,
) -> list[Query]:  # fmt: skip
    """Prompts as tokens. One that cannot be used, or judged, is an error, or is listed in `skipped` when that is given."""

    def make(where: str, row: Asked) -> Query:
        rewards.check(row)
        tokens = renderer.prompt(row.prompt)
        if len(tokens) + max_new_tokens > renderer.max_length:
            what = f"{counted(len(tokens), 'token')}, and {max_new_tokens:,} for the answer"
            why = f"more than the {renderer.max_length:,} allowed"
            raise DataError(what, where=where, why=why, hint="a smaller max_new_tokens among the options")
        if invocation and last_start(tokens, invocation) is None:
            hint = "--invocation TEXT that stands in every prompt, or --skip-bad-rows"
            raise DataError("the invocation does not occur in this prompt", where=where, hint=hint)
        return Query(row, tokens)

    made = usable(((row.where, row) for row in rows), make, skipped)
    if not made:
        raise DataError("no prompt is left to answer", why=f"skipped: {reasons(skipped or [])}")
    return made


def _split(settings: TrainSettings, rows: list[Asked], skipped: list[str]) -> tuple[list[Asked], list[Asked]]:
    """Prompts to learn from and prompts to judge by; the same one is on one side."""
    share = holdout_share(settings.holdout)
    if share is not None:
        return split(rows, share, settings.seed, asked_key)
    other = read_asked(Path(str(settings.holdout)), settings.columns, settings.skip_bad_rows)
    skipped += other.skipped
    return rows, other.rows


def _refuse(settings: TrainSettings, options: PolicyOptions) -> None:
    """Raise `SettingsError` for what does not go together."""
    if world().size > 1 or settings.sharded:
        why = "each process would write and judge all answers for itself"
        raise SettingsError(f"{settings.objective} runs in one process so far", where="torchrun", why=why)
    if settings.accumulate > 1:
        why = "a step learns from all answers to its prompts, in as many passes as they need"
        raise SettingsError("accumulate means nothing here", where="accumulate", why=why, hint="prompts among the options")
    if settings.check_every and settings.check_every % options.updates:
        why = f"between two of {options.updates} updates there is no state to go on from"
        hint = f"--check-every {options.updates * -(-settings.check_every // options.updates)}"
        raise SettingsError(f"check_every is {settings.check_every}", where="check_every", why=why, hint=hint)


def _check_temperature(options: PolicyOptions, base: Base) -> None:
    """Raise `SettingsError` where logits cannot be had at another temperature by scaling what the output layer reads."""
    scalable = base.gives_hidden and base.softcap is None and getattr(base.head, "bias", None) is None
    if options.temperature != 1.0 and not scalable:
        why = "its output layer has a bias or a soft cap"
        raise SettingsError(f"a temperature of {options.temperature}", where="options", why=why, hint="{temperature: 1}")
