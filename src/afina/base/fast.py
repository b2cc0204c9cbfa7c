"""The fast Llama-like block: the model's own weights under the model's own names, in fewer and leaner operations.

`speed_up` puts afina's norm and feed-forward modules in the places of transformers', openly and in this one file.
They hold the very same submodules and parameters, so paths, state dict and adapters do not see a difference.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from afina.kernels.elementwise import rms_norm, swiglu

# classes of transformers whose arithmetic is exactly the one below; Gemma's norms, say, add one to the weight
NORMS = {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Phi3RMSNorm", "Olmo2RMSNorm", "GraniteRMSNorm"}
MLPS = {"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "Olmo2MLP", "GraniteMLP", "StableLmMLP"}


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


def speed_up(model: nn.Module) -> None:
    """Replace the norms and SwiGLU feed-forwards of `model` by the fast ones, in place."""
    for path, module in list(model.named_modules()):
        name = type(module).__name__
        if name in NORMS:
            fast: nn.Module = FastNorm(module)
        elif name in MLPS and _is_silu(module):
            fast = FastMLP(module)
        else:
            continue
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, fast.train(module.training))


def _is_silu(mlp: nn.Module) -> bool:
    act = getattr(mlp, "act_fn", None)
    return isinstance(act, nn.SiLU) or act is F.silu or type(act).__name__ in ("SiLU", "SiLUActivation")
