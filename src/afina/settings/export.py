"""Settings of `afina export`."""

from pathlib import Path
from typing import Literal

from afina.settings.common import setting
from afina.settings.merge import MergedModelSettings


class ExportSettings(MergedModelSettings):
    """Settings of `afina export`."""

    adapter: Path | None = setting(
        "a run or adapter folder; without it, for gguf, the base without an adapter"
    )
    output: Path = setting(
        "the folder to write; for gguf and gguf-lora also a file, FILE.gguf", ...
    )
    format: Literal["hf", "peft", "gguf", "gguf-lora"] = setting(
        "hf, gguf: a merged model, for transformers or llama.cpp; peft, gguf-lora: the adapter, "
        "without its base",
        "hf",
    )
    outtype: Literal[
        "auto", "f32", "bf16", "f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"
    ] = setting(
        "gguf: number format of the weights, q8_0 to q4_0 in 8 to 4 bits; by default as the base's",
        "auto",
    )
