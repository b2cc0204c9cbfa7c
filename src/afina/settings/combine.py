"""Settings of `afina combine`, and of its merge methods."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from afina.settings.common import Settings, setting
from afina.settings.groups import GroupedSettings, MergeMethodSettings


class SeedSettings(Settings):
    """The seed of merge methods with random choices."""

    seed: int = setting("dare_linear, della, search: seed of the random choices", 0)


class DensitySettings(Settings):
    """Settings of merge methods that keep some entries of each update."""

    density: float = setting(
        "ties, magnitude_prune, dare_linear, della: ratio of entries kept", 0.5, gt=0.0, le=1.0
    )


class RandomDensitySettings(DensitySettings, SeedSettings):
    """Settings of merge methods that drop entries at random."""


class WeightSearchSettings(SeedSettings):
    """Settings of the search for weights."""

    data: Path | None = setting(
        "search: a few rows with answers; half of them check what was found on the other half"
    )
    columns: dict[str, str | list[str] | None] = setting(
        "search: names of the columns, e.g. {prompt: question, completion: answer}", {}
    )
    l1_penalty: float = setting(
        "search: nats per token for each unit of |weights| (L1)", 0.05, ge=0.0
    )
    max_evals: int = setting("search: largest number of loss evaluations", 60, ge=5)


class CombineSettings(WeightSearchSettings, RandomDensitySettings, GroupedSettings):
    """Settings of `afina combine`.

    The settings of this package's merge methods are its own; those of other packages are groups.
    """

    group_fields: ClassVar[Mapping[type[Settings], str]] = {MergeMethodSettings: "merge_method"}

    base: str | None = setting(  # type: ignore[assignment]
        "the frozen model; by default the one that the adapters were trained on"
    )
    adapters: list[str] = setting(
        "adapters or runs with their weights: A:0.6 B:0.4; a negative weight removes a skill", ...
    )
    output_dir: Path = setting("folder of the combination", ...)
    merge_method: str = setting(
        "sum: exact; svd: the best of a rank; slerp: on the arc between two; ties, dare_linear, "
        "magnitude_prune, della: entry by entry; search: find the weights on --data",
        "sum",
        plugins="afina.merge_methods",
    )
    rank: int | None = setting(
        "largest rank of the result (not of sum); by default the sum of the adapters' ranks", ge=1
    )
    allow_other_base: bool = setting(
        "combine adapters that record other bases; every module must have the same shape", False
    )
    require_audit: bool = setting("accept only adapters that `afina audit` has approved", False)
