"""Settings of `afina audit`."""

from pathlib import Path

from afina.settings.common import ModelSettings, setting


class AuditSettings(ModelSettings):
    """Settings of `afina audit`."""

    base: str | None = setting(
        "folder of the base: shapes, weights and behaviour are looked at beside it"
    )  # type: ignore[assignment]
    adapter: Path = setting(
        "a run, an adapter, a composition, or a sum that a server may be asked for, A:0.6,B:0.4",
        ...,
    )
    strict: bool = setting("what asks for a review is blocked", False)
    public_key: Path | None = setting("public key (PEM) of a signer that you trust")
    calibration: Path | None = setting(
        "file or folder of benign adapters' statistics; by default afina's own"
    )
    max_false_positive_rate: float = setting(
        "share of benign adapters of its kind that may be sent to review", 0.05, gt=0.0, lt=1.0
    )
    time_budget_seconds: float = setting(
        "seconds for looking at what it does; 0 leaves that out, and asks for a review",
        30.0,
        ge=0.0,
    )
    prompts: Path | None = setting(
        "a few prompts of its task, one a line: a trigger may work only there"
    )
    sarif_file: Path | None = setting("write the report as SARIF 2.1.0 too")
    accept: str | None = setting(
        "accept a verdict of review: who looked, and why it is harmless; kept in the log"
    )
