"""Cross-entropy of a linear output layer, in chunks, so that the full logits are never allocated.

With N target positions, width d and vocabulary V, plain PyTorch keeps about 4 * N * V floats
(logits, their float32 copy, log-probabilities, gradient): 4 GB for N = 2,000 and V = 128,000. Here
one chunk is allocated at a time, and the gradient of each row's own loss with respect to the hidden
states is computed in the same pass; the backward pass only scales it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_ELEMENTS = 8 * 1024 * 1024  # logits per chunk: 16 MB in bfloat16, for large products
BLOCK_ROWS = 32  # rows per softmax, so that its six passes stay in the cache


def _block_loss(logits: Tensor, target: Tensor, softcap: float | None, needs_grad: bool) -> Tensor:
    """Return cross-entropies `(n,)` of rows, float32.

    `logits` `(n, V)` are overwritten by their gradient if `needs_grad`.
    """
    exact = logits.float()
    if softcap is not None:
        capped = torch.tanh(exact / softcap)
        exact = capped * softcap
    peak = exact.amax(-1, keepdim=True)
    picked = exact.gather(-1, target)
    exact = exact.sub_(peak) if exact is not logits else exact - peak
    norm = exact.exp_().sum(-1, keepdim=True)
    loss = (norm.log() + peak - picked)[:, 0]
    if needs_grad:
        exact.div_(norm).scatter_add_(
            -1, target, torch.full_like(picked, -1.0)
        )  # softmax - one-hot
        logits.copy_(exact if softcap is None else exact.mul_(1 - capped * capped))
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        softcap: float | None,
    ) -> Tensor:  # type: ignore[override]
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = (
            torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needs_bias else None
        )
        losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        rows = max(16, CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, hidden.shape[0], rows):
            part, target = hidden[start : start + rows], labels[start : start + rows, None]
            logits = F.linear(part, weight, bias)  # (n, V); becomes its own gradient
            needs_grad = any(ctx.needs_input_grad[:3])
            parts = losses[start : start + rows].split(BLOCK_ROWS)
            for block, goal, part_loss in zip(
                logits.split(BLOCK_ROWS), target.split(BLOCK_ROWS), parts, strict=True
            ):
                part_loss.copy_(_block_loss(block, goal, softcap, needs_grad))
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[start : start + rows])
            if grad_weight is not None:
                grad_weight += logits.T @ part
            if grad_bias is not None:
                grad_bias += logits.sum(0, dtype=torch.float32)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.weight_dtype = weight.dtype
        return losses

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_output: Tensor
    ) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        # the output layer's gradient is summed already, so all rows must have equal weights
        shared = grad_output[:1]
        if (grad_weight is not None or grad_bias is not None) and not torch.equal(
            grad_output, shared.expand_as(grad_output)
        ):
            raise RuntimeError("a trained output layer needs losses that are summed or averaged")
        return (
            None
            if grad_hidden is None
            else grad_hidden * grad_output[:, None].to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * shared).to(ctx.weight_dtype),
            None if grad_bias is None else (grad_bias * shared).to(ctx.weight_dtype),
            None,
            None,
        )


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float | None = None,
) -> Tensor:
    """Return -log softmax(hidden weight^T + bias)[label] of each row, `(N,)` float32.

    Gradients reach hidden, weight and bias as in PyTorch; the last two only where all rows' losses
    have equal weights, as in a sum.

    Args:
        hidden: `(N, d)`.
        weight: `(V, d)`.
        bias: `(V,)` or None.
        labels: `(N,)` int64 in 0..V-1.
        softcap: c, with which logits z become c tanh(z / c) first (Gemma 2).
    """
    return _LinearCrossEntropy.apply(hidden, weight, bias, labels, softcap)
