"""Names of the objectives, and the settings of each that has its own."""

from importlib.metadata import entry_points
from typing import Literal

from pydantic import model_validator

from afina.errors import SettingsError
from afina.settings.common import setting
from afina.settings.groups import ObjectiveSettings, register_group

PREFERENCES = ("dpo", "kto", "orpo", "simpo", "reward")  # learn from labeled answers
POLICIES = ("grpo", "rloo", "ppo")  # learn from rewards of sampled answers
OBJECTIVES = (
    "auto",
    "sft",
    "pretrain",
    "classify",
    "embed",
    "rerank",
    "tag",
    "mlm",
    *PREFERENCES,
    *POLICIES,
)
ANSWERS_PER_STEP = 64  # sampled answers of a step, where prompts_per_step is not given


def objective_names() -> list[str]:
    """Return the objectives of this package and of others, whose code is not imported."""
    plugins = (point.name for point in entry_points(group="afina.objectives"))
    return list(dict.fromkeys([*OBJECTIVES, *plugins, *_declared]))


_declared: list[str] = []  # objectives that were registered in this process


def declare_objective(name: str) -> None:
    """Accept `name` as an objective: its class is registered in this process."""
    if name not in _declared:
        _declared.append(name)


@register_group("classify")
class ClassifySettings(ObjectiveSettings):
    """Settings of classification."""

    head_init: Literal["probe", "random"] = setting(
        "start of a new head. probe: logistic regression on the frozen base's features", "probe"
    )
    min_class_rows: int = setting("leave out classes with fewer rows", 1, ge=1)
    label_separator: str | None = setting(
        "what stands between the classes of a row, where its label is a text with several"
    )
    class_weights: Literal["equal", "balanced"] = setting(
        "weight of a row in the loss; balanced: classes with few rows count as much as others",
        "equal",
    )
    label_smoothing: float = setting(
        "ratio of the target's probability that is spread over all classes", 0.0, ge=0.0, lt=1.0
    )


@register_group("embed")
class EmbedSettings(ObjectiveSettings):
    """Settings of embeddings."""

    scale: float = setting(
        "factor of the cosine in the loss of pairs (1 / temperature)", 20.0, gt=0.0
    )
    pairs_per_batch: int | None = setting(
        "pairs of a micro-batch; the positives of the others are the negatives of each. By "
        "default as many as max_tokens_per_batch allows",
        ge=2,
    )
    pooling: Literal["auto", "mean", "cls", "max", "mean_sqrt_len", "weightedmean", "lasttoken"] = (
        setting("from tokens to one vector; auto: as in the base's files, else the mean", "auto")
    )
    max_score: float = setting(
        "scored pairs: the score of equal texts, a cosine of 1; scores are divided by it",
        1.0,
        gt=0.0,
    )


@register_group("rerank")
class RerankSettings(ObjectiveSettings):
    """Settings of rerankers."""

    head_init: Literal["probe", "random"] = setting(
        "start of a new head. probe: logistic regression on the frozen base's features", "probe"
    )
    max_score: float = setting(
        "the label of a relevant passage; labels are divided by it", 1.0, gt=0.0
    )


@register_group("tag")
class TagSettings(ObjectiveSettings):
    """Settings of token labels."""

    head_init: Literal["probe", "random"] = setting(
        "start of a new head. probe: logistic regression on the frozen base's features", "probe"
    )
    names: list[str] | None = setting("names of tags that are numbers: [O, B-PER, I-PER]")


class PreferenceSettings(ObjectiveSettings):
    """Settings of every objective that learns from preferences."""

    beta: float = setting("weight of the preference loss", 0.1, gt=0)


@register_group("dpo")
class DPOSettings(PreferenceSettings):
    """Settings of direct preference optimization (arXiv 2305.18290)."""

    beta: float = setting("strength of the penalty for leaving the reference policy", 0.1, gt=0)
    loss_type: Literal["sigmoid", "ipo", "hinge", "robust"] = setting(
        "loss on the margin between the chosen and the rejected answer", "sigmoid", job=True
    )
    label_smoothing: float = setting(
        "sigmoid and robust: ratio of pairs that are labeled the wrong way round",
        0.0,
        ge=0.0,
        lt=0.5,
        job=True,
    )
    sft_weight: float = setting(
        "weight of the chosen answer's own loss, against likelihood displacement",
        0.0,
        ge=0.0,
        job=True,
    )
    reference: Literal["auto", "base", "adapter", "precomputed"] = setting(
        "reference policy: the base, the adapter that training continues from, or its stored "
        "log-probabilities (precomputed: less time per step)",
        "auto",
    )

    @model_validator(mode="after")
    def _smoothing_fits_loss(self) -> "DPOSettings":
        if self.label_smoothing and self.loss_type not in ("sigmoid", "robust"):
            raise SettingsError(
                f"dpo.label_smoothing has no effect on the loss {self.loss_type!r}",
                hint="--dpo.loss-type sigmoid or robust, or leave dpo.label_smoothing out",
            )
        if self.loss_type == "robust" and not self.label_smoothing:
            raise SettingsError(
                "dpo.loss_type robust needs dpo.label_smoothing",
                why="it corrects for a ratio of pairs that are labeled the wrong way round",
                hint="--dpo.label-smoothing 0.1",
            )
        return self


@register_group("kto")
class KTOSettings(PreferenceSettings):
    """Settings of Kahneman-Tversky optimization (arXiv 2402.01306)."""

    beta: float = setting("strength of the penalty for leaving the reference policy", 0.1, gt=0)
    desirable_weight: float = setting("weight of desirable answers", 1.0, ge=0.0)
    undesirable_weight: float = setting("weight of undesirable answers", 1.0, ge=0.0)
    reference: Literal["auto", "base", "adapter", "precomputed"] = setting(
        "reference policy: the base, the adapter that training continues from, or its stored "
        "log-probabilities (precomputed: less time per step)",
        "auto",
    )


@register_group("orpo")
class ORPOSettings(PreferenceSettings):
    """Settings of odds ratio preference optimization (arXiv 2403.07691)."""

    beta: float = setting("weight of the odds ratio loss", 0.1, gt=0)


@register_group("simpo")
class SimPOSettings(PreferenceSettings):
    """Settings of simple preference optimization (arXiv 2405.14734)."""

    beta: float = setting("factor of the margin between the two answers", 2.0, gt=0)
    gamma: float = setting("target margin of the chosen answer", 1.0, ge=0.0)
    sft_weight: float = setting(
        "weight of the chosen answer's own loss, against likelihood displacement", 0.0, ge=0.0
    )


class PolicySettings(ObjectiveSettings):
    """Settings of every objective that learns from rewards of sampled answers."""

    reward_funcs: str | dict[str, float] = setting(
        "reward functions: FILE.py:FUNCTION, the run of a reward model, a grader's FILE.json, or "
        "several with weights, {rules.py:form: 1, runs/reward: 0.5}",
        ...,
    )
    allow_python_graders: bool = setting("run the Python code in a grader's file", False)
    num_generations: int = setting(
        "answers sampled for each prompt (the group); at least 2", 8, ge=2, job=True
    )
    prompts_per_step: int | None = setting(
        "prompts of a step; by default as many as give 64 answers", ge=1, job=True
    )
    max_new_tokens: int = setting("longest answer in tokens", 64, ge=1, job=True)
    temperature: float = setting(
        "sampling temperature of the answers, and of the policy that is trained",
        1.0,
        gt=0,
        job=True,
    )
    num_iterations: int = setting("optimizer steps on the same answers", 1, ge=1, job=True)
    beta: float = setting(
        "weight of the KL divergence from the reference policy, in reward per nat",
        0.04,
        ge=0,
        job=True,
    )
    clip_range: float = setting(
        "clipping of the probability ratio: largest relative change that still counts",
        0.2,
        gt=0,
        lt=1,
        job=True,
    )
    reference: Literal["auto", "base", "adapter"] = setting(
        "reference policy: the base, or the adapter that training continues from", "auto"
    )

    @property
    def num_prompts(self) -> int:
        """Prompts of a step: as given, or as many as give `ANSWERS_PER_STEP` answers."""
        return self.prompts_per_step or max(1, ANSWERS_PER_STEP // self.num_generations)


@register_group("grpo")
class GRPOSettings(PolicySettings):
    """Settings of group relative policy optimization (arXiv 2402.03300)."""

    scale_rewards: bool = setting(
        "divide advantages by the standard deviation of their group's rewards", True, job=True
    )


@register_group("rloo")
class RLOOSettings(PolicySettings):
    """Settings of REINFORCE with a leave-one-out baseline (arXiv 2402.14740)."""


@register_group("ppo")
class PPOSettings(PolicySettings):
    """Settings of proximal policy optimization (arXiv 1707.06347)."""

    num_generations: int = setting("answers sampled for each prompt", 1, ge=1)
    whiten_advantages: bool = setting(
        "scale the advantages of a step to mean 0 and standard deviation 1", True
    )
    gamma: float = setting("discount factor of rewards, per token", 1.0, gt=0, le=1)
    lam: float = setting("lambda of generalized advantage estimation (GAE)", 0.95, ge=0, le=1)
    vf_coef: float = setting("weight of the value head's loss", 0.5, ge=0)
