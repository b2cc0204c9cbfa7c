"""Settings of the objectives."""

from typing import Literal

from afina.settings.common import Settings, setting


class PreferenceOptions(Settings):
    """What `options` can tell a preference objective; which of it each one reads is in `PREFERENCES`."""

    loss_type: Literal["sigmoid", "ipo", "hinge", "robust"] = setting(
        "dpo: the loss on the margin", "sigmoid"
    )
    beta: float | None = setting(
        "how closely it is held to the reference: 0.1, for simpo 2 (orpo: weight of the odds)", gt=0
    )
    label_smoothing: float = setting(
        "dpo, sigmoid and robust: share of pairs that are the wrong way round", 0.0, ge=0.0, lt=0.5
    )
    gamma: float = setting("simpo: margin that the better answer should have", 1.0, ge=0.0)
    desirable_weight: float = setting("kto: weight of good answers", 1.0, ge=0.0)
    undesirable_weight: float = setting("kto: weight of bad answers", 1.0, ge=0.0)
    sft_weight: float = setting(
        "dpo, simpo: weight of the better answer's own loss, against its becoming unlikely",
        0.0,
        ge=0.0,
    )
    reference: Literal["auto", "base", "adapter", "precomputed"] = setting(
        "dpo, kto: what it is compared with", "auto"
    )


PREFERENCES: dict[str, tuple[str, ...]] = {
    "dpo": ("loss_type", "beta", "label_smoothing", "sft_weight", "reference"),
    "kto": ("beta", "desirable_weight", "undesirable_weight", "reference"),
    "orpo": ("beta",),
    "simpo": ("beta", "gamma", "sft_weight"),
    "reward": (),
}


class PolicyOptions(Settings):
    """What `options` can tell an objective that learns from rewards; which of it each one reads is in `POLICIES`."""

    reward_funcs: str | dict[str, float] = setting(
        "who judges: FILE.py:FUNCTION, a reward model's run, a grader's FILE.json, or several with weights, "
        "{rules.py:form: 1, runs/judge: 0.5}",
        ...,
    )
    allow_python_graders: bool = setting("run the Python that stands in a grader's file", False)
    num_generations: int | None = setting("answers to each prompt: 8, for ppo 1", ge=1)
    prompts_per_step: int | None = setting(
        "prompts of a step; by default as many as make 64 answers", ge=1
    )
    max_new_tokens: int = setting("longest answer in tokens", 64, ge=1)
    temperature: float = setting("of its own answers, and of the policy that is learned", 1.0, gt=0)
    num_iterations: int = setting("optimizer steps on the same answers", 1, ge=1)
    beta: float = setting(
        "how closely it is held to the reference: nats a token cost so much reward", 0.04, ge=0
    )
    clip_range: float = setting(
        "how far a token's probability may move before it counts no more", 0.2, gt=0, lt=1
    )
    scale_rewards: bool = setting(
        "grpo: divide by the deviation of the group's rewards; ppo: of the step's advantages", True
    )
    gamma: float = setting("ppo: how much less a later reward counts, a token", 1.0, gt=0, le=1)
    lam: float = setting("ppo: how far advantages look ahead (GAE's lambda)", 0.95, ge=0, le=1)
    vf_coef: float = setting("ppo: weight of the value head's loss", 0.5, ge=0)
    reference: Literal["auto", "base", "adapter"] = setting("what it is compared with", "auto")


_ANSWERS = (
    "reward_funcs",
    "allow_python_graders",
    "prompts_per_step",
    "max_new_tokens",
    "temperature",
    "num_iterations",
    "beta",
    "clip_range",
    "reference",
    "num_generations",
)


POLICIES: dict[str, tuple[str, ...]] = {
    "grpo": (*_ANSWERS, "scale_rewards"),
    "rloo": _ANSWERS,
    "ppo": (*_ANSWERS, "scale_rewards", "gamma", "lam", "vf_coef"),
}
