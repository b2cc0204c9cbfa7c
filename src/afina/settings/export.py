"""Settings of `afina export`."""

from pathlib import Path
from typing import Literal

from afina.settings.common import setting
from afina.settings.merge import MergedModelSettings


class ExportSettings(MergedModelSettings):
    """Settings of `afina export`."""

    adapter: Path | None = setting(
        "a run or adapter folder; without it, for gguf and ollama, the base without an adapter"
    )
    output: Path = setting(
        "the folder to write; for gguf and gguf-lora also a file, FILE.gguf", ...
    )
    format: Literal["hf", "peft", "gguf", "gguf-lora", "ollama", "mlx", "onnx"] = setting(
        "hf, gguf, ollama, onnx: a merged model, for transformers, llama.cpp, Ollama or ONNX "
        "Runtime; peft, gguf-lora, mlx: the adapter alone, for PEFT, llama.cpp or mlx-lm",
        "hf",
    )
    outtype: Literal["auto", "f32", "bf16", "f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"] = (
        setting(
            "gguf, ollama: number format of the weights, q8_0 to q4_0 in 8 to 4 bits; "
            "by default as the base's",
            "auto",
        )
    )
