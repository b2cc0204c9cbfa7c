"""Settings of `afina merge`, and those it shares with `afina export`."""

from pathlib import Path
from typing import Literal

from afina.settings.common import ModelSettings, setting


class MergedModelSettings(ModelSettings):
    """Settings of every command that writes a merged model."""

    base: str | None = setting(  # type: ignore[assignment]
        "the frozen model; by default the one that the run was trained on"
    )
    dtype: Literal["auto", "stored", "float32", "bfloat16"] = setting(
        "dtype of the merged weights. stored: that of the base's files", "stored"
    )
    quantization: Literal["none", "nf4"] = setting(
        "none: 16 or 32 bits per weight; nf4: 4 bits, in the format of bitsandbytes", "none"
    )
    max_kl: float | None = setting(
        "largest difference from the adapted model's answers, in nats per token (KL divergence)",
        gt=0,
    )
    allow_other_base: bool = setting("merge into a base that the adapter was not trained on", False)
    require_audit: bool = setting("accept only adapters that `afina audit` has approved", False)


class MergeSettings(MergedModelSettings):
    """Settings of `afina merge`."""

    adapter: Path = setting("a run or adapter folder", ...)
    output_dir: Path = setting("folder of the merged Hugging Face model", ...)
