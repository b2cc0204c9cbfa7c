"""Settings of `afina audit`."""

from pathlib import Path

from afina.settings.common import ModelSettings, setting


class AuditSettings(ModelSettings):
    """Settings of `afina audit`."""

    base: str | None = setting(  # type: ignore[assignment]
        "folder of the base: shapes, weights and behavior are compared with it"
    )
    adapter: Path = setting(
        "a run, an adapter, a composition, or a weighted sum as in a request, A:0.6,B:0.4",
        ...,
    )
    strict: bool = setting("block instead of review", False)
    public_key: Path | None = setting("public key (PEM) of a trusted signer")
    calibration: Path | None = setting(
        "file or folder of benign adapters' statistics; by default afina's own"
    )
    max_false_positive_rate: float = setting(
        "ratio of benign adapters of its kind that may be flagged for review", 0.05, gt=0.0, lt=1.0
    )
    time_budget_seconds: float = setting(
        "seconds for the behavior gate; 0 leaves it out, which leads to a review",
        30.0,
        ge=0.0,
    )
    prompts: Path | None = setting(
        "a few prompts of its task, one per line: a trigger may work only there"
    )
    sarif_file: Path | None = setting("write the report as SARIF 2.1.0 too")
    accept: str | None = setting(
        "accept a verdict of review: reviewer and reason; recorded in the log"
    )
