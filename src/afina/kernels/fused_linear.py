"""A frozen linear module and its adapters as one operation, in C++.

There is no copy of y in the forward pass and no sum of gradients in the backward pass.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from afina.kernels.adapter_group import AdapterGroup
from afina.kernels.dispatch import kernels

Product = Callable[[Tensor], Tensor]


def linear_with_adapters(
    x: Tensor, product: Product, grad_product: Product, groups: Sequence[AdapterGroup]
) -> Tensor:
    """Return product(x) plus the outputs of the adapters in `groups`: `(..., out)`.

    Gradients reach x and the groups' parameters.

    Args:
        x: `(..., in)`, on the CPU.
        product: A frozen linear function, whose result is new and contiguous, in the dtype of x.
        grad_product: Maps the gradient of product(x) to that of x.
        groups: The adapters, one group per kernel.

    Raises:
        ValueError: no C++ kernel takes x, or a group does not fit it.
    """
    if not kernels.cpp_accepts(x):
        raise ValueError(f"x {tuple(x.shape)} on {x.device} does not fit, or there are no kernels")
    parameters = [parameter for group in groups for parameter in group.parameters]
    return _LinearWithAdapters.apply(x, product, grad_product, groups, *parameters)


class _LinearWithAdapters(Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        product: Product,
        grad_product: Product,
        groups: Sequence[AdapterGroup],
        *parameters: Tensor,
    ) -> Tensor:
        y, flat = product(x), x.flatten(0, -2).contiguous()
        saved: list[Tensor] = []
        for group in groups:
            weights = [layer.kernel_weights(x.dtype) for layer in group.layers]
            group.prepare(flat, y.shape[-1], weights).add(y, flat)
            saved += group.saved_tensors(weights)
        ctx.save_for_backward(x, *saved)
        ctx.grad_product, ctx.groups = grad_product, groups
        ctx.dtypes = [t.dtype for t in parameters]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *saved = ctx.saved_tensors
        grad, flat = grad.contiguous(), x.flatten(0, -2).contiguous()
        grad_x = ctx.grad_product(grad).contiguous() if ctx.needs_input_grad[0] else None
        gradients: list[Tensor] = []
        for group in ctx.groups:
            count = len(group.parameters)
            gradients += group.backward(grad.flatten(0, -2), flat, grad_x, saved[:count])
            saved = saved[count:]
        parameters = (t.to(dtype) for t, dtype in zip(gradients, ctx.dtypes, strict=True))
        return grad_x, None, None, None, *parameters
