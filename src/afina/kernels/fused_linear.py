"""A frozen layer and the adapters that act on it as one operation: no copy of y, no sum of gradients, by C++ alone."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from afina.kernels.dispatch import kernels
from afina.kernels.lora import LoRAGroup, check_rows
from afina.kernels.mora import MoRAGroup

Product = Callable[[Tensor], Tensor]
AdapterGroup = LoRAGroup | MoRAGroup


def linear_with_adapters(
    x: Tensor, product: Product, back: Product, groups: Sequence[AdapterGroup]
) -> Tensor:
    """product(x) plus the parts of each group, adapters of one kind, for x (..., in): (..., out).

    `product` is frozen and linear, its result (..., out) new and contiguous in the dtype of x; `back` takes the gradient of
    that to the gradient of x. Gradients reach x and all that the groups learn.
    """
    if not kernels.cpp_accepts(x):
        raise ValueError(f"x {tuple(x.shape)} on {x.device} does not fit, or there are no kernels")
    for group in groups:
        check_rows(group.rows, x.shape[:-1].numel(), group.adapters)
    return _Adapted.apply(x, product, back, groups, *(t for group in groups for t in group.learned))


class _Adapted(Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        product: Product,
        back: Product,
        groups: Sequence[AdapterGroup],
        *learned: Tensor,
    ) -> Tensor:
        y, flat = product(x), x.flatten(0, -2).contiguous()
        kept = [group.add(y, flat) for group in groups]
        ctx.save_for_backward(x, *(t for tensors in kept for t in tensors))
        ctx.back, ctx.groups, ctx.dtypes = back, groups, [t.dtype for t in learned]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *kept = ctx.saved_tensors
        grad, flat = grad.contiguous(), x.flatten(0, -2).contiguous()
        grad_x = ctx.back(grad).contiguous() if ctx.needs_input_grad[0] else None
        made: list[Tensor] = []
        for group in ctx.groups:
            count = len(group.learned)  # a group keeps as many tensors as it learns
            made += group.backward(grad, flat, grad_x, kept[:count])
            kept = kept[count:]
        return (
            grad_x,
            None,
            None,
            None,
            *(t.to(dtype) for t, dtype in zip(made, ctx.dtypes, strict=True)),
        )
