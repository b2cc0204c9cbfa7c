"""Settings of `afina merge`."""

from pathlib import Path
from typing import Literal

from afina.settings.common import ModelSettings, setting


class MergedModelSettings(ModelSettings):
    """What `afina merge` and `afina export` share: a base, an adapter, and how exact they are."""

    base: str | None = setting("the frozen model; by default the one that the run was trained on")  # type: ignore[assignment]
    adapter: Path = setting("a run or adapter folder", ...)
    quantization: Literal["none", "nf4"] = setting(
        "none: 16 or 32 bits per weight; nf4: 4 bits, in the format of bitsandbytes", "none"
    )
    max_kl: float | None = setting(
        "how far its answers may be from the adapted model's, nats a token (KL)", gt=0
    )
    allow_other_base: bool = setting("merge into a base that the adapter was not trained on", False)
    require_audit: bool = setting("accept only adapters that `afina audit` has approved", False)


class MergeSettings(MergedModelSettings):
    """Settings of `afina merge`."""

    output_dir: Path = setting("folder of the merged Hugging Face model", ...)
