"""Fused modules of Llama-like layers, with the model's own weights under the model's own names.

`install_fast_modules` replaces norm, attention, feed-forward and linear modules of transformers;
only this file does so. The new ones contain the same submodules and parameters, so that paths,
state dict and adapters are unchanged.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from afina.kernels.elementwise import rms_norm, rotary, swiglu
from afina.kernels.skinny_gemm import linear_float32, skinny_linear

# classes of transformers with exactly the arithmetic below; Gemma's norms, for one, add 1 to the
# weight
NORMS = {
    "LlamaRMSNorm",
    "MistralRMSNorm",
    "Qwen2RMSNorm",
    "Qwen3RMSNorm",
    "Phi3RMSNorm",
    "Olmo2RMSNorm",
    "GraniteRMSNorm",
}
ATTENTIONS = {"LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention"}
MLPS = {"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "Olmo2MLP", "GraniteMLP", "StableLmMLP"}


class FastLinear(nn.Linear):
    """A Linear module that uses `skinny_linear` without gradients: decoding, few rows.

    There, float32 inputs of 16-bit weights (an output layer's) give float32 outputs.
    """

    @classmethod
    def in_place_of(cls, module: nn.Linear) -> "FastLinear":
        """Return a module with the parameters of `module`."""
        replaced = cls(module.in_features, module.out_features, bias=False, device="meta")
        replaced.weight, replaced.bias = module.weight, module.bias
        return replaced

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + b `(..., out)` of x `(..., in)`."""
        if x.dtype != self.weight.dtype and not torch.is_grad_enabled():
            return linear_float32(x.to(self.weight.dtype), self.weight, self.bias)
        return (
            F.linear(x, self.weight, self.bias)
            if torch.is_grad_enabled()
            else skinny_linear(x, self.weight, self.bias)
        )


LINEAR_TYPES = (nn.Linear, FastLinear)  # exactly y = W x + b


class FastNorm(nn.Module):
    """RMSNorm that saves only its input for backward."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight: nn.Parameter = norm.weight  # type: ignore[assignment]
        self.variance_epsilon = float(norm.variance_epsilon)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of x `(..., d)`."""
        return rms_norm(x, self.weight, self.variance_epsilon)


class FastMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), of which only gate and up are saved for backward."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.gate_proj: nn.Module = mlp.gate_proj  # type: ignore[assignment]
        self.up_proj: nn.Module = mlp.up_proj  # type: ignore[assignment]
        self.down_proj: nn.Module = mlp.down_proj  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """Return the feed-forward of x `(..., d)`."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class FastAttention(nn.Module):
    """Attention with fused rotary embeddings; the attention function is the model's own choice."""

    o_proj: nn.Module

    def __init__(self, attention: Any) -> None:
        super().__init__()
        for name, module in attention.named_children():  # projections, and norms of heads
            self.add_module(name, module)
        # what attention functions read of their module
        self.config, self.layer_idx, self.is_causal = (
            attention.config,
            attention.layer_idx,
            attention.is_causal,
        )
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        self.num_key_value_groups, self.attention_dropout = (
            attention.num_key_value_groups,
            attention.attention_dropout,
        )
        own = {"MistralAttention": getattr(attention.config, "sliding_window", None)}
        self.sliding_window = getattr(
            attention, "sliding_window", own.get(type(attention).__name__)
        )
        family: Any = sys.modules[type(attention).__module__]
        self._eager = family.eager_attention_forward

    def _heads(self, name: str, x: Tensor) -> Tensor:
        """Return `(batch, tokens, heads, head_dim)` of a projection, normalized as in the model."""
        heads = getattr(self, f"{name}_proj")(x).unflatten(-1, (-1, self.head_dim))
        return getattr(self, f"{name}_norm")(heads) if hasattr(self, f"{name}_norm") else heads

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **named: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attention of hidden_states `(batch, tokens, d)`, called as in transformers."""
        shape = hidden_states.shape[:-1]
        # (batch * tokens, head_dim)
        cos, sin = (angle.expand(*shape, -1).flatten(0, 1) for angle in position_embeddings)
        query, key = (self._heads(name, hidden_states) for name in ("q", "k"))
        query, key = (
            rotary(x.flatten(0, 1), cos, sin).view(x.shape).transpose(1, 2) for x in (query, key)
        )
        value = self._heads("v", hidden_states).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        if self.sliding_window is not None:
            named["sliding_window"] = self.sliding_window
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, self._eager
        )
        dropout = self.attention_dropout if self.training else 0.0
        out, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **named
        )
        return self.o_proj(out.reshape(*shape, -1).contiguous()), weights


def install_fast_modules(model: nn.Module) -> None:
    """Replace norms, attentions, SwiGLU feed-forwards and Linear modules of `model` in place."""
    replaced: dict[nn.Module, nn.Module] = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        name = type(module).__name__
        if module in replaced:
            fast = replaced[module]
        elif name in NORMS:
            fast = FastNorm(module)
        elif name in MLPS and _is_silu(module):
            fast = FastMLP(module)
        elif name in ATTENTIONS:
            fast = FastAttention(module)
        elif type(module) is nn.Linear:
            fast = FastLinear.in_place_of(module)
        else:
            continue
        replaced[module] = fast.train(module.training)
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, fast)


def _is_silu(mlp: nn.Module) -> bool:
    activation = getattr(mlp, "act_fn", None)
    return (
        isinstance(activation, nn.SiLU)
        or activation is F.silu
        or type(activation).__name__ in ("SiLU", "SiLUActivation")
    )
