"""How llama.cpp stores a model: its architecture, names and order of its tensors, its metadata.

llama.cpp rotates neighboring elements of a head by one angle where transformers rotates elements i
and i + d/2. In its "llama" and "granite" architectures the rows of query and key projections are
therefore stored in the order 0, d/2, 1, d/2 + 1, ... Where transformers multiplies by 1 + w in a
norm (Gemma), the file has 1 + w.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from afina.errors import BaseError
from afina.io.extras import import_extra

LONGROPE = "longrope"


@dataclass(frozen=True)
class GGUFFamily:
    """What llama.cpp computes in one of its architectures.

    Attributes:
        name: Its name of the architecture.
        permutes: Rows of query and key projections have its own order.
        norm_offset: Added to the weights of norms.
        activations: Those of transformers that equal its own.
        rotary: Kinds of rotary embedding; those besides "default" as the file stores them.
        window_period: Every n-th layer attends to all tokens, the others within a window; 0: none.
        has_biases: It reads biases.
        has_output: It reads an output layer; without one the embedding is used.
        keys: Its keys of metadata, written by `add_KEY`, and the attribute of config.json.
        fixed: Attributes of config.json that must have this value.
    """

    name: str
    permutes: bool = False
    norm_offset: float = 0.0
    activations: tuple[str, ...] = ("silu", "swish")
    rotary: tuple[str, ...] = ("default",)
    window_period: int = 0
    has_biases: bool = False
    has_output: bool = True
    keys: tuple[tuple[str, str], ...] = (("layer_norm_rms_eps", "rms_norm_eps"),)
    fixed: tuple[tuple[str, Any], ...] = ()


_RMS = ("layer_norm_rms_eps", "rms_norm_eps")
_LAYER_NORM = ("layer_norm_eps", "layer_norm_eps")
_GELU = ("gelu_pytorch_tanh", "gelu_new")
_LLAMA = GGUFFamily("llama", True, rotary=("default", "linear", "llama3"), has_biases=True)
_WINDOW = ("sliding_window", "sliding_window")
_GRANITE = (
    ("embedding_scale", "embedding_multiplier"),
    ("residual_scale", "residual_multiplier"),
    ("attention_scale", "attention_multiplier"),
    ("logit_scale", "logits_scaling"),
)
_GEMMA2 = (
    _WINDOW,
    ("attn_logit_softcapping", "attn_logit_softcapping"),
    ("final_logit_softcapping", "final_logit_softcapping"),
)
_GEMMA3_FIXED = (
    ("attn_logit_softcapping", None),
    ("final_logit_softcapping", None),
    ("use_bidirectional_attention", False),
)
# by transformers' name
FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": GGUFFamily("qwen2", has_biases=True),
    "qwen3": GGUFFamily("qwen3"),
    "gemma": GGUFFamily("gemma", norm_offset=1.0, activations=_GELU, has_output=False),
    "gemma2": GGUFFamily(
        "gemma2",
        norm_offset=1.0,
        activations=_GELU,
        window_period=2,
        has_output=False,
        keys=(_RMS, *_GEMMA2),
    ),
    "gemma3_text": GGUFFamily(
        "gemma3",
        norm_offset=1.0,
        activations=_GELU,
        rotary=("default", "linear"),
        window_period=6,
        keys=(_RMS, _WINDOW),
        fixed=_GEMMA3_FIXED,
    ),
    "phi": GGUFFamily(
        "phi2",
        activations=_GELU,
        has_biases=True,
        keys=(_LAYER_NORM,),
        fixed=(("qk_layernorm", False),),
    ),
    "phi3": GGUFFamily("phi3", rotary=("default", LONGROPE)),
    "granite": GGUFFamily("granite", permutes=True, keys=(_RMS, *_GRANITE)),
    "olmo2": GGUFFamily("olmo2"),
    "cohere": GGUFFamily(
        "command-r",
        has_output=False,
        keys=(_LAYER_NORM, ("logit_scale", "logit_scale")),
        fixed=(("use_qk_norm", False),),
    ),
}


@dataclass(frozen=True)
class GGUFArchitecture:
    """Architecture, tensor names and attention heads of one model in llama.cpp."""

    family: GGUFFamily
    names: Any  # gguf's map from transformers' names
    heads: int
    key_heads: int
    tied: bool

    def name(self, name: str) -> str | None:
        """Return llama.cpp's name of a parameter; None where it has none."""
        if name.endswith(".bias") and not self.family.has_biases:
            return None
        found = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        return None if found is None else str(found)

    def order(self, name: str, rows: int) -> Tensor | None:
        """Return the row stored at each index `(rows,)`; None where the order is unchanged."""
        layer = name.split(".")[-2]
        if not self.family.permutes or layer not in ("q_proj", "k_proj"):
            return None
        heads = self.heads if layer == "q_proj" else self.key_heads
        return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()

    def stored(self, name: str, tensor: Tensor) -> Tensor:
        """Return a parameter as the file has it."""
        order = self.order(name, len(tensor))
        rows = tensor if order is None else tensor[order.to(tensor.device)]
        return rows.float() + self._offset(name) if self._offset(name) else rows

    def restored(self, name: str, stored: Tensor) -> Tensor:
        """Return a parameter of transformers from what the file has."""
        order = self.order(name, len(stored))
        return (stored if order is None else stored[order.argsort()]) - self._offset(name)

    def _offset(self, name: str) -> float:
        return self.family.norm_offset if name.endswith("norm.weight") else 0.0


def library() -> ModuleType:
    """Return the gguf package; raise `SettingsError` where it is not installed."""
    return import_extra("gguf", "gguf")


def rope_of(config: Any) -> dict[str, Any]:
    """Return the rotary embedding of a configuration, of Gemma 3 that without a window."""
    found = config.rope_parameters
    return dict(found.get("full_attention", found))


def head_size(config: Any) -> int:
    """Return the width of an attention head."""
    own = getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def gguf_architecture(config: PretrainedConfig, name: str) -> GGUFArchitecture:
    """Return llama.cpp's architecture of a configuration.

    Raises:
        BaseError: llama.cpp would compute something else.
    """
    family = FAMILIES.get(config.model_type)
    why: str | None
    if family is None:
        why = f"its family is {config.model_type!r}; known are {', '.join(FAMILIES)}"
    else:
        why = _difference(family, config)
    if why is not None:
        hint = "--format hf, and llama.cpp's own convert_hf_to_gguf.py on that folder"
        raise BaseError("this base cannot be written as GGUF", where=name, why=why, hint=hint)
    assert family is not None
    gguf = library()
    kinds = {text: kind for kind, text in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[family.name], config.num_hidden_layers)
    tied = config.tie_word_embeddings
    return GGUFArchitecture(
        family, names, config.num_attention_heads, config.num_key_value_heads, tied
    )


def _difference(family: GGUFFamily, config: Any) -> str | None:
    """Return why llama.cpp would compute something else; None where it does not."""
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    rope, head = rope_of(config), head_size(config)
    if activation not in family.activations:
        return f"its activation is {activation!r}, and llama.cpp's is {family.activations[0]}"
    if why := _window_difference(family, config):
        return why
    if rope["rope_type"] not in family.rotary:
        return f"its rotary embedding is of the kind {rope['rope_type']!r}"
    if rope.get("partial_rotary_factor", 1.0) != 1.0 and family.name not in ("phi2", "phi3"):
        return "its rotary embedding rotates a part of each head only"
    if not family.has_output and not config.tie_word_embeddings:
        return "its output layer is not the embedding, and llama.cpp has none here"
    for key, value in family.fixed:
        if getattr(config, key, value) != value:
            return f"its {key} is {getattr(config, key)}, and llama.cpp's is {value}"
    scalar = getattr(config, "query_pre_attn_scalar", head)
    largest = {"gemma2": 46, "gemma3": 62}.get(family.name)  # layers of the 27B models
    if config.num_hidden_layers == largest:
        head = config.hidden_size // config.num_attention_heads
    if scalar != head:
        return f"its query_pre_attn_scalar is {scalar}, and llama.cpp's is {head}"
    local = getattr(config, "rope_parameters", {}).get("sliding_attention", {})
    if local.get("rope_theta", 1e4) != 1e4 or local.get("rope_type", "default") != "default":
        return "its rotary embedding within a window is not of base 10,000"
    missing = [key for _, key in family.keys if getattr(config, key, None) is None]
    return f"it has no {missing[0]}, and llama.cpp has" if missing else None


def _window_difference(family: GGUFFamily, config: Any) -> str | None:
    """Return how the windows of attention differ from llama.cpp's; None where they do not."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if not window or window >= config.max_position_embeddings:
        return None
    if not kinds:
        uses = getattr(config, "use_sliding_window", True)
        kinds = ["sliding_attention" if uses else ""] * config.num_hidden_layers
    slides = [kind == "sliding_attention" for kind in kinds]
    period = family.window_period
    if not period and any(slides):
        return f"it has a sliding window of {window} tokens, and llama.cpp's has none"
    if period and slides != [bool((number + 1) % period) for number in range(len(slides))]:
        return f"llama.cpp expects a layer without a sliding window after each {period - 1} others"
    return None


def add_architecture(writer: Any, model: Any, form: GGUFArchitecture) -> None:
    """Write the configuration of a decoder under llama.cpp's names."""
    config = model.config
    head, rope = head_size(config), rope_of(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    for key, attribute in form.family.keys:
        getattr(writer, f"add_{key}")(getattr(config, attribute))
    if rope["rope_type"] == "linear" and form.family.name == "gemma3":
        writer.add_rope_scaling_type(library().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == LONGROPE:
        writer.add_rope_scaling_type(library().RopeScalingType.LONGROPE)
        writer.add_rope_scaling_attn_factors(model.rotary_emb.attention_scaling)
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def rotary_tensors(model: Any, form: GGUFArchitecture) -> dict[str, Tensor]:
    """Return what llama.cpp divides the frequencies of the rotary embedding by, by name."""
    config = model.config
    rope = rope_of(config)
    if rope["rope_type"] == LONGROPE:
        return {
            f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"], dtype=torch.float32)
            for kind in ("long", "short")
        }
    if rope["rope_type"] == "default" or not form.family.permutes:
        return {}
    frequencies = model.rotary_emb.inv_freq.double().cpu()
    exponents = torch.arange(len(frequencies), dtype=torch.float64) / len(frequencies)
    return {"rope_freqs.weight": rope["rope_theta"] ** -exponents / frequencies}
