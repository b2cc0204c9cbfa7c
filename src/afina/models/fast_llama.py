"""The fast Llama-like block: the model's own weights under the model's own names, in fewer and leaner operations.

`speed_up` puts afina's norm, attention, feed-forward and linear modules in the places of transformers', openly and in this
one file. They hold the very same submodules and parameters, so paths, state dict and adapters do not see a difference.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from afina.kernels.elementwise import rms_norm, rotary, swiglu
from afina.kernels.skinny_gemm import skinny_linear

# classes of transformers whose arithmetic is exactly the one below; Gemma's norms, say, add one to the weight
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
    """A Linear layer whose product with few rows, where nothing is learned, runs at the speed of reading its weight."""

    @classmethod
    def in_place_of(cls, module: nn.Linear) -> "FastLinear":
        """The layer with the very same parameters."""
        made = cls(module.in_features, module.out_features, bias=False, device="meta")
        made.weight, made.bias = module.weight, module.bias
        return made

    def forward(self, x: Tensor) -> Tensor:
        """W x + b (..., out) of x (..., in)."""
        return (
            F.linear(x, self.weight, self.bias)
            if torch.is_grad_enabled()
            else skinny_linear(x, self.weight, self.bias)
        )


LINEAR_TYPES = (nn.Linear, FastLinear)  # layers that are y = W x + b and no more


class FastNorm(nn.Module):
    """RMSNorm that keeps only its input for the backward pass."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight: nn.Parameter = norm.weight  # type: ignore[assignment]
        self.variance_epsilon = float(norm.variance_epsilon)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """The norm of x (..., d)."""
        return rms_norm(x, self.weight, self.variance_epsilon)


class FastMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), keeping gate and up only."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.gate_proj: nn.Module = mlp.gate_proj  # type: ignore[assignment]
        self.up_proj: nn.Module = mlp.up_proj  # type: ignore[assignment]
        self.down_proj: nn.Module = mlp.down_proj  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """The feed-forward of x (..., d)."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class FastAttention(nn.Module):
    """Attention whose queries and keys are turned in one pass each; the attention itself is the model's own choice."""

    o_proj: nn.Module

    def __init__(self, attention: Any) -> None:
        super().__init__()
        for (
            name,
            module,
        ) in attention.named_children():  # projections, and norms of heads where there are any
            self.add_module(name, module)
        # what attention functions look for in their module
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
        self._eager = sys.modules[type(attention).__module__].eager_attention_forward  # type: ignore[attr-defined]

    def _heads(self, name: str, x: Tensor) -> Tensor:
        """(batch, tokens, heads, head_dim) of a projection, normed where the model does so."""
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
        """The attention of hidden_states (batch, tokens, d), called as transformers calls it."""
        shape = hidden_states.shape[:-1]
        cos, sin = (
            angle.expand(*shape, -1).flatten(0, 1) for angle in position_embeddings
        )  # (batch * tokens, head_dim)
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
    """Replace the norms, attentions, SwiGLU feed-forwards and plain Linear layers of `model` by the fast ones, in place."""
    made: dict[nn.Module, nn.Module] = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        name = type(module).__name__
        if module in made:
            fast = made[module]
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
        made[module] = fast.train(module.training)
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, fast)


def _is_silu(mlp: nn.Module) -> bool:
    act = getattr(mlp, "act_fn", None)
    return (
        isinstance(act, nn.SiLU)
        or act is F.silu
        or type(act).__name__ in ("SiLU", "SiLUActivation")
    )
