"""The report of objectives that maximize a reward: reward, win rate, divergence, with sentences."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from afina.errors import pluralize
from afina.evaluation.intervals import paired_change, wilson_interval

if TYPE_CHECKING:
    from afina.objectives.policy import PolicyObjective

NUM_EXAMPLES = 6  # completions before and after that are reported
LENGTH_RATIO = 1.5  # a change of the length that is reported


def policy_report(
    objective: "PolicyObjective", before: dict[str, Any], after: dict[str, Any]
) -> dict[str, Any]:
    """Return metrics before and after, wins, the reference, examples, and sentences as `verdict`.

    Rewards are those of greedy completions; `kl` and `entropy` (nats per token) of sampled ones.
    """
    before, after = dict(before), dict(after)
    old, new = before.pop("completions"), after.pop("completions")
    for side in (before, after):
        del side["loss"]
    rewards = [[reward for _, reward in side] for side in (old, new)]
    facts: dict[str, Any] = {"before": before, "after": after} | count_wins(rewards)
    facts["rows"] = len(objective.eval_rows)
    rows = zip(objective.eval_rows, old, new, strict=True)
    facts["examples"] = [
        {
            "prompt": query.row.text,
            "before": first,
            "after": second,
            "reward_before": r,
            "reward_after": s,
        }
        for query, (first, r), (second, s) in list(rows)[:NUM_EXAMPLES]
    ]
    assert objective.reference is not None
    facts["reference"] = objective.reference.to_dict()
    facts["reward_functions"] = objective.rewards.to_dicts()
    return facts | {"verdict": _sentences(facts, rewards)}


def count_wins(rewards: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Count prompts whose reward rose, fell or stayed; the win rate is among those that differ."""
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


def _sentences(facts: Mapping[str, Any], rewards: Sequence[Sequence[float]]) -> list[str]:
    before, after = facts["before"], facts["after"]
    sentences = [_reward_sentence(facts, rewards)]
    if facts["win_rate"] is not None:
        low, high = (100 * bound for bound in facts["interval"])
        sentences.append(
            f"Its answer has the higher reward on {facts['wins']} of the "
            f"{facts['wins'] + facts['losses']} prompts on which the two differ "
            f"({100 * facts['win_rate']:.0f}%, 95% interval {low:.0f}% to {high:.0f}%); "
            f"{facts['ties']} are equal."
        )
    sentences.append(
        f"Its own answers are {after['kl']:.3f} nats a token from the reference (KL divergence), "
        f"{after['kl'] * after['sampled_length']:.2f} nats an answer."
    )
    times = after["length"] / max(before["length"], 1e-9)
    if not 1 / LENGTH_RATIO < times < LENGTH_RATIO:
        sentences.append(
            f"Its answers are {times:.1f} times as long as before ({before['length']:.0f} to "
            f"{after['length']:.0f} tokens): read some of them, a reward can be had in ways that "
            "nobody meant."
        )
    return sentences


def _reward_sentence(facts: Mapping[str, Any], rewards: Sequence[Sequence[float]]) -> str:
    before, after = facts["before"], facts["after"]
    rows = pluralize(facts["rows"], "held-out prompt")
    moved = paired_change(rewards[0], rewards[1], [1] * len(rewards[0]))
    measured = f"from {before['reward']:.3f} to {after['reward']:.3f} on {rows}"
    if moved.interval is None:
        return f"Too few to tell whether it learned: the reward went {measured}. Hold out more."
    low, high = moved.interval
    measured += f" ({moved.mean:+.3f}, 95% interval {low:+.3f} to {high:+.3f})"
    if low <= 0.0 <= high:
        return (
            f"Too few to tell whether it learned: the mean reward went {measured}. "
            "Hold out more, or take more steps."
        )
    if moved.mean > 0:
        return f"It learned: the mean reward rose {measured}."
    return (
        f"It did not learn: the mean reward fell {measured}. "
        "Try a lower learning rate or a larger beta."
    )
