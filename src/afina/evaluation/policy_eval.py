"""Did the reward rise, how often are its answers better than before, and how far did it go for that: before and after."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from afina.adapters.active import ActiveAdapters
from afina.adapters.load_run import LoadedRun
from afina.data.renderer import Renderer
from afina.data.schemas import PROMPT
from afina.data.table import read_table
from afina.errors import SettingsError, pluralize
from afina.evaluation.intervals import paired_change
from afina.evaluation.preference_eval import reload_init_adapter, wilson_interval
from afina.evaluation.results import EvalResult
from afina.evaluation.retention import BATCH_TOKENS, retention_loss
from afina.objectives.policy import PolicyObjective, TokenizedPrompt
from afina.objectives.policy_generator import PolicyGenerator
from afina.objectives.reference import select_reference
from afina.objectives.reward_functions import load_reward_functions
from afina.settings import EvalSettings, TrainSettings

SHOWN = 6  # answers beside each other in the report
MUCH = 1.5  # times the length: worth a word


def judge_policy(
    task: PolicyObjective, before: ActiveAdapters | None, after: ActiveAdapters | None
) -> dict[str, Any]:
    """Facts about the held-out prompts under both routes, who won, the reference, some answers, and sentences ("verdict").

    Rewards are those of the likeliest answers; `kl` and `entropy` (nats a token) are of sampled ones.
    """
    sides = {"before": before, "after": after}
    found = {name: task.eval_completions(task.eval_rows, route) for name, route in sides.items()}
    facts: dict[str, Any] = {}
    for name, route in sides.items():
        written, _, told = found[name]
        drift = task.sampled_metrics(route)
        facts[name] = {part: float(values.mean()) for part, values in told.items()} | {
            "length": sum(len(answer.token_ids) for answer in written) / len(written),
            "stopped": sum(answer.ended_by_stop for answer in written) / len(written),
            "sampled_reward": drift["reward"],
            "sampled_length": drift["length"],
            "kl": drift["kl"],
            "entropy": drift["entropy"],
        }
    rewards = [found[name][2]["reward"].tolist() for name in sides]
    facts |= _who_wins(rewards) | {"rows": len(task.eval_rows)}
    texts = zip(task.eval_rows, found["before"][0], found["after"][0], *rewards, strict=True)
    facts["examples"] = [
        {
            "prompt": query.row.text,
            "before": old.text,
            "after": new.text,
            "reward_before": r,
            "reward_after": s,
        }
        for query, old, new, r, s in list(texts)[:SHOWN]
    ]
    assert task.reference is not None
    facts |= {"reference": task.reference.to_dict(), "judges": task.rewards.about()}
    return facts | {"verdict": _said(facts, rewards)}


def _who_wins(rewards: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Prompts whose answer has the higher reward now, those where it had before, and ties; the share among the decided."""
    pairs = list(zip(*rewards, strict=True))
    wins, losses = sum(new > old for old, new in pairs), sum(new < old for old, new in pairs)
    decided = wins + losses
    return {
        "wins": wins,
        "losses": losses,
        "ties": len(pairs) - decided,
        "win_rate": wins / decided if decided else None,
        "interval": wilson_interval(wins, decided) if decided else None,
    }


def _said(facts: Mapping[str, Any], rewards: Sequence[Sequence[float]]) -> list[str]:
    before, after, rows = (
        facts["before"],
        facts["after"],
        pluralize(facts["rows"], "held-out prompt"),
    )
    moved = paired_change(rewards[0], rewards[1], [1] * len(rewards[0]))
    measured = f"from {before['reward']:.3f} to {after['reward']:.3f} on {rows}"
    if moved.interval is None:
        said = [f"Too few to tell whether it learned: the reward went {measured}. Hold out more."]
    else:
        low, high = moved.interval
        measured += f" ({moved.mean:+.3f}, 95% interval {low:+.3f} to {high:+.3f})"
        if low <= 0.0 <= high:
            said = [
                f"Too few to tell whether it learned: the mean reward went {measured}. Hold out more, or take more steps."
            ]
        elif moved.mean > 0:
            said = [f"It learned: the mean reward rose {measured}."]
        else:
            said = [
                f"It did not learn: the mean reward fell {measured}. Try a lower learning rate or a larger beta."
            ]
    if facts["win_rate"] is not None:
        low, high = (100 * bound for bound in facts["interval"])
        said.append(
            f"Its answer has the higher reward on {facts['wins']} of the {facts['wins'] + facts['losses']} prompts on "
            f"which the two differ ({100 * facts['win_rate']:.0f}%, 95% interval {low:.0f}% to {high:.0f}%); "
            f"{facts['ties']} are equal."
        )
    said.append(
        f"Its own answers are {after['kl']:.3f} nats a token from the reference (KL divergence), "
        f"{after['kl'] * after['sampled_length']:.2f} nats an answer."
    )
    times = after["length"] / max(before["length"], 1e-9)
    if not 1 / MUCH < times < MUCH:
        said.append(
            f"Its answers are {times:.1f} times as long as before ({before['length']:.0f} to {after['length']:.0f} tokens): "
            "read some of them, a reward can be had in ways that nobody meant."
        )
    return said


def evaluate_policy(opened: LoadedRun, settings: EvalSettings) -> EvalResult:
    """`afina eval` of a run that learned from rewards, on its held-out prompts or on others: facts and sentences."""
    base, story = opened.causal_lm, opened.run
    trained = TrainSettings(**story["settings"] | {"objective": story["objective"]})
    options = trained.group(trained.objective)
    own = settings.data is None
    if own and (settings.adapter is None or not (settings.adapter / "held_out.jsonl").is_file()):
        raise SettingsError(
            "this folder has no held-out prompts of its own",
            where=str(settings.adapter),
            hint="--data FILE",
        )
    file = Path(str(settings.adapter)) / "held_out.jsonl" if own else Path(str(settings.data))
    renderer = Renderer(base.tokenizer, opened.template, base.max_positions)
    rows = [
        TokenizedPrompt(row, renderer.prompt(row.prompt))
        for row in read_table(file, PROMPT, {} if own else settings.columns).rows
    ]
    rewards = load_reward_functions(options, base, opened.template)
    longest = max(len(query.token_ids) for query in rows) + options.max_new_tokens
    writer = PolicyGenerator(base, longest, renderer.stop_token_ids)
    task = PolicyObjective(
        story["objective"], options, base, rows, rows, rewards, writer, BATCH_TOKENS, trained.seed
    )
    before, digest = reload_init_adapter(opened, trained, story["policy"].get("start"))
    task.policy, task.reference = opened.active, select_reference(options, before, digest, 0.0)
    found = judge_policy(task, before, opened.active)
    for when, route in (("before", before), ("after", opened.active)):
        found[when]["general_loss"] = retention_loss(base, route)
    result: dict[str, Any] = {
        "base": base.name,
        "run": str(settings.adapter),
        "objective": story["objective"],
    }
    forgetting = found["after"]["general_loss"] - found["before"]["general_loss"]
    return EvalResult(**result, **found, forgetting=forgetting)
