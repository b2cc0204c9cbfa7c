"""The report of objectives that maximize a reward: reward, win rate, divergence, with sentences."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afina.engine.request import Completion
from afina.evaluation.intervals import wilson_interval
from afina.io.atomic import write_json
from afina.objectives.task_score import TaskScore

if TYPE_CHECKING:
    from afina.objectives.policy import PolicyObjective

NUM_EXAMPLES = 6  # completions before and after that are reported
NUM_SAVED_COMPLETIONS = 4  # of each check
LENGTH_RATIO = 1.5  # a change of the length that is reported


def save_completions(
    folder: Path,
    step: int,
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    rewards: Sequence[float],
) -> None:
    """Write the first completions of a check, with their prompts and rewards, into `folder`."""
    lines = [
        {"prompt": prompt, "answer": one.text, "reward": reward}
        for prompt, one, reward in zip(prompts, completions, rewards, strict=True)
    ]
    answers = lines[:NUM_SAVED_COMPLETIONS]
    write_json(folder / f"{step:06d}.json", {"step": step, "answers": answers})


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
    score = TaskScore.of_rows(
        "mean reward", *rewards, unit="", counts_right=False, row_kind="eval prompt"
    )
    return facts | {"verdict": _sentences(facts), "score": score}


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


def _sentences(facts: Mapping[str, Any]) -> list[str]:
    before, after = facts["before"], facts["after"]
    sentences = []
    if facts["win_rate"] is not None:
        low, high = (100 * bound for bound in facts["interval"])
        sentences.append(
            f"Win rate against the baseline: {100 * facts['win_rate']:.0f}% (95% CI {low:.0f}% to "
            f"{high:.0f}%) of the {facts['wins'] + facts['losses']} prompts whose rewards differ; "
            f"{facts['ties']} ties."
        )
    sentences.append(
        f"KL divergence from the reference: {after['kl']:.3f} nats per token, "
        f"{after['kl'] * after['sampled_length']:.2f} nats per completion."
    )
    times = after["length"] / max(before["length"], 1e-9)
    if not 1 / LENGTH_RATIO < times < LENGTH_RATIO:
        sentences.append(
            f"Completions are {times:.1f} times as long as before ({before['length']:.0f} to "
            f"{after['length']:.0f} tokens): read some of them, as a policy can raise the reward "
            "in ways that were not intended (reward hacking)."
        )
    return sentences
