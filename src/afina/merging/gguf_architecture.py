"""How llama.cpp stores a model: its family, the names of its tensors, and the order of their rows.

llama.cpp rotates neighboring elements of a head by one angle where transformers rotates elements i
and i + d/2. In its "llama" family the rows of query and key projections are therefore stored in the
order 0, d/2, 1, d/2 + 1, ...
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from afina.errors import BaseError, SettingsError

# transformers' name -> llama.cpp's
FAMILIES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# rotary embeddings that are one factor per frequency, and nothing else
ROTARY = ("default", "linear", "llama3")


@dataclass(frozen=True)
class GGUFArchitecture:
    """Family, tensor names and attention heads of a model in llama.cpp."""

    family: str
    names: Any  # gguf's map from transformers' names
    heads: int
    key_heads: int
    tied: bool

    def name(self, name: str) -> str | None:
        """Return llama.cpp's name of a parameter; None where it has none."""
        found = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        return None if found is None else str(found)

    def order(self, name: str, rows: int) -> Tensor | None:
        """Return the row stored at each index `(rows,)`; None where the order is unchanged."""
        layer = name.split(".")[-2]
        if self.family != "llama" or layer not in ("q_proj", "k_proj"):
            return None
        heads = self.heads if layer == "q_proj" else self.key_heads
        return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


def library() -> Any:
    """Return the gguf package; raise `SettingsError` where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise SettingsError(
            "the gguf package is missing", where="format", hint="pip install 'afina[gguf]'"
        ) from None
    return gguf


def gguf_architecture(config: PretrainedConfig, name: str) -> GGUFArchitecture:
    """Return llama.cpp's architecture of a configuration.

    Raises:
        BaseError: llama.cpp would compute something else.
    """
    family = FAMILIES.get(config.model_type)
    why = None
    if family is None:
        why = f"its family is {config.model_type!r}; known are {', '.join(FAMILIES)}"
    elif config.hidden_act != "silu":
        why = f"its activation is {config.hidden_act!r}, and llama.cpp's is silu"
    elif _slides(config):
        why = f"it has a sliding window of {config.sliding_window} tokens, and llama.cpp's has none"
    elif (kind := config.rope_parameters["rope_type"]) not in ROTARY[
        : None if family == "llama" else 1
    ]:
        why = f"its rotary embedding is of the kind {kind!r}"
    elif config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        why = "its rotary embedding rotates a part of each head only"
    if why is not None:
        hint = "--format hf, and llama.cpp's own convert_hf_to_gguf.py on that folder"
        raise BaseError("this base cannot be written as GGUF", where=name, why=why, hint=hint)
    gguf = library()
    names = gguf.get_tensor_name_map(
        getattr(gguf.MODEL_ARCH, str(family).upper()), config.num_hidden_layers
    )
    return GGUFArchitecture(
        str(family),
        names,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.tie_word_embeddings,
    )


def _slides(config: PretrainedConfig) -> bool:
    """Return whether attention has a window smaller than the context."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    slides = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    return bool(slides and window and window < config.max_position_embeddings)


def write_gguf(writer: Any, tensors: Sequence[tuple[str, Tensor, torch.dtype]]) -> None:
    """Write metadata, then the tensors (name, value, dtype), one at a time."""
    kinds = library().GGMLQuantizationType
    there = {torch.float32: kinds.F32, torch.bfloat16: kinds.BF16, torch.float16: kinds.F16}
    for name, tensor, dtype in tensors:
        size = tensor.numel() * dtype.itemsize
        writer.add_tensor_info(
            name, list(tensor.shape), np.dtype(np.float32), size, raw_dtype=there[dtype]
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, tensor, dtype in tensors:
            writer.write_tensor_data(
                tensor.detach().cpu().to(dtype).contiguous().view(torch.uint8).numpy()
            )
    finally:
        writer.close()
