"""Causal attention of packed sequences, forward and backward: training and uncached prompts.

    query (T, heads, head_dim)     key, value (T, kv_heads, head_dim)     T: tokens of all sequences

Query head h reads head h * kv_heads // heads of keys and values. Nothing is padded, sorted or
repeated. The backward pass reads the three inputs and one float32 per token and head, the base 2
logarithm of the softmax denominator. On CPUs with bfloat16 products the C++ kernel uses them for
16-bit inputs, with scores, softmax, their gradients and all sums in float32.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from afina.kernels.dispatch import TYPES, data_pointer, kernels, register_op

LOG2E = 1.4426950408889634
# Instruction sets in which the kernel is 1.2 to 5 times as fast as PyTorch's attention; plain C++
# has 0.3 of its rate, AVX2 less.
FAST_ISAS = ("avx512bf16", "avx512")


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Sequence[int],
    scaling: float,
    window: int | None = None,
) -> Tensor:
    """Return softmax(scaling * query key^T, causal) value of each sequence, `(T, heads, head_dim)`.

    Args:
        query: `(T, heads, head_dim)`.
        key: `(T, kv_heads, head_dim)`.
        value: `(T, kv_heads, head_dim)`.
        cu_seqlens: Cumulative sequence lengths: 0, the end of the first sequence, ..., T.
        scaling: Factor of the scores.
        window: How many last keys a query sees; None: all.

    Raises:
        ValueError: shapes do not fit.
    """
    tokens, heads, width = query.shape
    if key.shape != value.shape or key.shape[::2] != (tokens, width) or heads % key.shape[1]:
        shapes = f"keys {tuple(key.shape)} and values {tuple(value.shape)}"
        raise ValueError(f"queries {tuple(query.shape)} and {shapes} do not fit")
    if (
        not cu_seqlens
        or cu_seqlens[0] != 0
        or cu_seqlens[-1] != tokens
        or any(end < start for start, end in pairwise(cu_seqlens))
    ):
        raise ValueError(f"cu_seqlens {tuple(cu_seqlens)} do not divide {tokens} tokens")
    return _attention(query, key, value, list(cu_seqlens), scaling, window or 0)[0]


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Return causal attention of sequences of one length: `(sequences, heads, tokens, head_dim)`.

    Keys and values may have fewer heads.
    """
    sequences, heads, tokens, _ = query.shape
    if is_fast(query, key, value):
        query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        cu_seqlens = range(0, sequences * tokens + 1, tokens) if tokens else (0,)
        out = varlen_attention(query, key, value, cu_seqlens, scaling)
        return out.unflatten(0, (sequences, tokens)).transpose(1, 2)
    repeats = heads // key.shape[1]
    key, value = (x if repeats == 1 else x.repeat_interleave(repeats, 1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)


def is_fast(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return whether `varlen_attention` is faster for these than PyTorch's attention."""
    return kernels.isa in FAST_ISAS and _fits(query, key, value)


# ---- references


def varlen_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Sequence[int],
    scaling: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    """Return `varlen_attention` and the logarithms `(T, heads)`, in PyTorch."""
    sum_dtype = torch.promote_types(query.dtype, torch.float32)
    repeats = query.shape[1] // key.shape[1]
    outputs, logs = (
        [query.new_empty(0, *query.shape[1:])],
        [query.new_empty(0, query.shape[1], dtype=sum_dtype)],
    )
    for start, end in pairwise(cu_seqlens):
        q, k, v = (x[start:end].transpose(0, 1).to(sum_dtype) for x in (query, key, value))
        k, v = k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
        seen = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).tril_()
        seen = seen.triu_(1 - window) if window else seen
        scores = (q @ k.mT * scaling).masked_fill(~seen, float("-inf"))
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1).to(query.dtype))
        logs.append(scores.logsumexp(-1).T * LOG2E)
    return torch.cat(outputs), torch.cat(logs)


def varlen_backward_reference(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Sequence[int],
    scaling: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `varlen_attention` with respect to query, key and value."""
    if not grad.numel():
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (query, key, value))
        out, _ = varlen_reference(q, k, v, cu_seqlens, scaling, window)
        grad_query, grad_key, grad_value = torch.autograd.grad(out, (q, k, v), grad)
    return grad_query, grad_key, grad_value


# ---- kernels


def _fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return kernels.uses_cpp(query) and kernels.cpp_accepts(query, key, value)


def _addresses(*tensors: Tensor) -> list[tuple[int, int, int]]:
    return [(data_pointer(x), x.stride(0), x.stride(1)) for x in tensors]


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _run(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: list[int], scaling: float, window: int
) -> tuple[Tensor, Tensor]:
    if not _fits(query, key, value):
        return varlen_reference(query, key, value, cu_seqlens, scaling, window)
    query, key, value = (_rows(x) for x in (query, key, value))
    out, logs = _empty(query, key, value, cu_seqlens, scaling, window)
    kernels.attention(
        TYPES[query.dtype],
        query.shape[1],
        key.shape[1],
        query.shape[2],
        cu_seqlens,
        scaling,
        window,
        _addresses(query, key, value, out),
        data_pointer(logs),
    )
    return out, logs


def _empty(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: list[int], scaling: float, window: int
) -> tuple[Tensor, Tensor]:
    sum_dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=sum_dtype)


def _run_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logs: Tensor,
    cu_seqlens: list[int],
    scaling: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    if not _fits(query, key, value) or grad.dtype != query.dtype:
        return varlen_backward_reference(grad, query, key, value, cu_seqlens, scaling, window)
    grad, query, key, value = (_rows(x) for x in (grad, query, key, value))
    gradients = _empty_backward(grad, query, key, value)
    kernels.attention_backward(
        TYPES[query.dtype],
        query.shape[1],
        key.shape[1],
        query.shape[2],
        cu_seqlens,
        scaling,
        window,
        _addresses(query, key, value, grad, *gradients),
        data_pointer(logs),
    )
    return gradients


def _empty_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], output[1])
    ctx.rest = inputs[3:]
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    return *_attention_backward(grad, *ctx.saved_tensors, *ctx.rest), None, None, None


_attention = register_op(
    "varlen_attention(Tensor query, Tensor key, Tensor value, int[] cu_seqlens, float scaling, "
    "int window) -> (Tensor, Tensor)",
    _run,
    _empty,
    _gradients,
    _keep,
)
_attention_backward = register_op(
    "varlen_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor logs, "
    "int[] cu_seqlens, float scaling, int window) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _empty_backward,
)
