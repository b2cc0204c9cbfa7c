"""Causal attention of sequences that lie end to end in one run, forwards and backwards: training, and plain prompts.

    query (T, heads, head_dim)     key, value (T, kv_heads, head_dim)     T = tokens of all sequences, at `bounds`

Query head h reads head h * kv_heads // heads of keys and values. Nothing is padded, sorted or repeated. Kept for the
backward pass: the three inputs, and a float32 a token and head, the logarithm to base 2 of the softmax's
denominator. On CPUs that multiply bfloat16 the C++ kernel takes 16-bit inputs to those products, with scores, softmax,
their gradients and all sums in float32.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from afina.kernels.dispatch import TYPES, data_pointer, kernels, register_op

LOG2E = 1.4426950408889634
# instruction sets in which the kernel beats PyTorch's attention, 1.2 to 5 times; plain C++ has 0.3 of its rate, AVX2 less
WIDE = ("avx512bf16", "avx512")


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Sequence[int],
    scaling: float,
    window: int | None = None,
) -> Tensor:
    """softmax(scaling * query key^T, causal) value within each sequence: (T, heads, head_dim), as the module says.

    bounds = (0, end of the first sequence, ..., T); `window` w lets a query see its last w keys only. Raises `ValueError`
    where shapes do not fit.
    """
    tokens, heads, width = query.shape
    if key.shape != value.shape or key.shape[::2] != (tokens, width) or heads % key.shape[1]:
        shapes = f"keys {tuple(key.shape)} and values {tuple(value.shape)}"
        raise ValueError(f"queries {tuple(query.shape)} and {shapes} do not fit")
    if (
        not bounds
        or bounds[0] != 0
        or bounds[-1] != tokens
        or any(end < start for start, end in pairwise(bounds))
    ):
        raise ValueError(f"bounds {tuple(bounds)} do not cut {tokens} tokens")
    return _attention(query, key, value, list(bounds), scaling, window or 0)[0]


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """The same for sequences of one length: (sequences, heads, tokens, head_dim); keys may have fewer heads."""
    sequences, heads, tokens, _ = query.shape
    if fast(query, key, value):
        query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        bounds = range(0, sequences * tokens + 1, tokens) if tokens else (0,)
        out = varlen_attention(query, key, value, bounds, scaling)
        return out.unflatten(0, (sequences, tokens)).transpose(1, 2)
    repeats = heads // key.shape[1]
    key, value = (x if repeats == 1 else x.repeat_interleave(repeats, 1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)


def fast(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `varlen_attention` is what to call for these, and not PyTorch's attention."""
    return kernels.isa in WIDE and _fits(query, key, value)


# ---- references


def varlen_reference(
    query: Tensor, key: Tensor, value: Tensor, bounds: Sequence[int], scaling: float, window: int
) -> tuple[Tensor, Tensor]:
    """`varlen_attention` and the logarithms (T, heads), in PyTorch, at least in float32."""
    wide = torch.promote_types(query.dtype, torch.float32)
    repeats = query.shape[1] // key.shape[1]
    outputs, logs = (
        [query.new_empty(0, *query.shape[1:])],
        [query.new_empty(0, query.shape[1], dtype=wide)],
    )
    for start, end in pairwise(bounds):
        q, k, v = (x[start:end].transpose(0, 1).to(wide) for x in (query, key, value))
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
    bounds: Sequence[int],
    scaling: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Its gradients with respect to query, key and value."""
    if not grad.numel():
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (query, key, value))
        out, _ = varlen_reference(q, k, v, bounds, scaling, window)
        grad_query, grad_key, grad_value = torch.autograd.grad(out, (q, k, v), grad)
    return grad_query, grad_key, grad_value


# ---- kernels


def _fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return kernels.uses_cpp(query) and kernels.cpp_accepts(query, key, value)


def _places(*tensors: Tensor) -> list[tuple[int, int, int]]:
    return [(data_pointer(x), x.stride(0), x.stride(1)) for x in tensors]


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _run(
    query: Tensor, key: Tensor, value: Tensor, bounds: list[int], scaling: float, window: int
) -> tuple[Tensor, Tensor]:
    if not _fits(query, key, value):
        return varlen_reference(query, key, value, bounds, scaling, window)
    query, key, value = (_rows(x) for x in (query, key, value))
    out, logs = _empty(query, key, value, bounds, scaling, window)
    kernels.attention(
        TYPES[query.dtype],
        query.shape[1],
        key.shape[1],
        query.shape[2],
        bounds,
        scaling,
        window,
        _places(query, key, value, out),
        data_pointer(logs),
    )
    return out, logs


def _empty(
    query: Tensor, key: Tensor, value: Tensor, bounds: list[int], scaling: float, window: int
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=wide)


def _run_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logs: Tensor,
    bounds: list[int],
    scaling: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    if not _fits(query, key, value) or grad.dtype != query.dtype:
        return varlen_backward_reference(grad, query, key, value, bounds, scaling, window)
    grad, query, key, value = (_rows(x) for x in (grad, query, key, value))
    made = _empty_backward(grad, query, key, value)
    kernels.attention_backward(
        TYPES[query.dtype],
        query.shape[1],
        key.shape[1],
        query.shape[2],
        bounds,
        scaling,
        window,
        _places(query, key, value, grad, *made),
        data_pointer(logs),
    )
    return made


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
    "varlen_attention(Tensor query, Tensor key, Tensor value, int[] bounds, float scaling, int window) -> (Tensor, Tensor)",
    _run,
    _empty,
    _gradients,
    _keep,
)
_attention_backward = register_op(
    "varlen_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor logs, int[] bounds, "
    "float scaling, int window) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _empty_backward,
)
