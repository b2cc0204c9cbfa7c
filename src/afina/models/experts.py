"""Fused experts of a mixture: the matrices of all experts in 3-D parameters (transformers 5).

    y[t] = sum over the top-k experts e of t of  p[t, e] * W2[e] f(W1[e] x[t])

    W1   gate_up_proj (E, 2 * inner, hidden), or up_proj without a gate
    W2   down_proj    (E, hidden, inner)            each transposed where `is_transposed`

The forward pass here takes the matrices of one expert at a time, so that they may be in 4 bits, and
lets adapters add to each product. Modules of other shapes are not fused experts.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EXPERT_MATRICES = ("gate_up_proj", "up_proj", "down_proj")  # in the order of the modules

# y + what adapters add: (name of the parameter, expert, x (n, in), y (n, out), tokens (n,)) -> y
Add = Callable[[str, int, Tensor, Tensor, Tensor], Tensor]


def expert_matrices(module: Any) -> tuple[str, ...]:
    """Return the names of the fused matrices of `module`; empty where it has no fused experts."""
    known = ("num_experts", "is_transposed", "has_bias", "has_gate", "has_post_expert_norm")
    if not all(hasattr(module, name) for name in (*known, "_apply_gate")):
        return ()
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    fused = (getattr(getattr(module, name, None), "ndim", 0) == 3 for name in names)
    return names if all(fused) else ()


def experts_forward(
    module: Any,  # fused experts
    hidden_states: Tensor,  # (num_tokens, hidden)
    top_k_index: Tensor,  # (num_tokens, k)
    top_k_weights: Tensor,  # (num_tokens, k)
    *,
    add: Add = lambda name, expert, x, y, tokens: y,
) -> Tensor:
    """Return the output `(num_tokens, hidden)` of fused experts, one expert after another."""
    top_k = top_k_index.shape[-1]
    chosen = top_k_index.flatten()
    order = chosen.argsort(stable=True)  # of pairs (token, expert), by expert
    counts = torch.bincount(chosen, minlength=module.num_experts).tolist()
    first, second = expert_matrices(module)
    parts, start = [hidden_states[:0]], 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        tokens = order[start : start + count] // top_k
        start += count
        x = hidden_states[tokens]
        inner = _product(module, first, expert, x, tokens, add)
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        y = _product(module, second, expert, inner, tokens, add)
        parts.append(module.post_expert_norm(y) if module.has_post_expert_norm else y)
    weighted = torch.cat(parts) * top_k_weights.flatten()[order, None]
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    total = weighted[inverse].view(-1, top_k, weighted.shape[-1]).sum(1)
    return total.to(hidden_states.dtype)


def _product(module: Any, name: str, expert: int, x: Tensor, tokens: Tensor, add: Add) -> Tensor:
    """Return W[expert] x + bias, and what adapters add."""
    weight = getattr(module, name)
    bias = getattr(module, f"{name}_bias")[expert].to(x.dtype) if module.has_bias else None
    if isinstance(weight, Tensor):
        matrix = weight[expert]
        y = F.linear(x, matrix.T if module.is_transposed else matrix, bias)
    else:
        y = weight.product(expert, x, bias)
    return add(name, expert, x, y, tokens)


def fused_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield path, owner and name of each fused matrix of a model."""
    for path, module in model.named_modules():
        for name in expert_matrices(module):
            yield f"{path}.{name}".lstrip("."), module, name
