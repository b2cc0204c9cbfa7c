"""Settings of `afina combine`."""

from pathlib import Path
from typing import Literal

from afina.settings.common import ModelSettings, setting


class CombineSettings(ModelSettings):
    """Settings of `afina combine`."""

    base: str | None = setting(
        "the frozen model; by default the one that the adapters were trained on"
    )  # type: ignore[assignment]
    adapters: list[str] = setting(
        "adapters or runs with their weights: A:0.6 B:0.4; a negative one takes a skill out", ...
    )
    output_dir: Path = setting("folder of the combination", ...)
    merge_method: Literal["sum", "svd", "slerp", "ties", "dare", "magnitude", "della", "search"] = (
        setting(
            "sum: exact; svd: the best of a rank; slerp: on the arc between two; ties, dare, magnitude, della: entry by entry; "
            "search: find the weights on --data",
            "sum",
        )
    )
    rank: int | None = setting(
        "largest rank of the result; by default the parts' ranks added up (sum: always)", ge=1
    )
    density: float = setting(
        "share of entries that ties, dare, magnitude and della keep", 0.5, gt=0.0, le=1.0
    )
    seed: int = setting("seed of dare, della and search", 0)
    data: Path | None = setting(
        "search: a few rows with answers; half of them check what was found on the other half"
    )
    columns: dict[str, str] = setting(
        "names of your columns, e.g. {prompt: question, completion: answer}", {}
    )
    l1_penalty: float = setting(
        "search: nats a token for each unit of |weights| (L1)", 0.05, ge=0.0
    )
    max_evals: int = setting("search: most times that the loss is measured", 60, ge=5)
    require_audit: bool = setting("accept only adapters that `afina audit` has approved", False)
