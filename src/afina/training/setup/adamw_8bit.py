"""AdamW whose two moments take one byte a parameter each, instead of four (Dettmers et al. 2021, arXiv 2110.02861).

    state = 2 * (1 + 4/256) = 2.03 bytes a parameter, against 8

Each moment is held in 8 bits, blockwise (`afina.kernels.int8_blockwise`), and written out in float32 during a tensor's own
step only; on a CPU a block's (`kernels/cpp/adamw8.h`), which never leaves the first cache. Small tensors keep float32
moments, as in bitsandbytes: they cost nothing, and norms and biases are touchy.

The "paged" optimizers of QLoRA (arXiv 2305.14314) let the moments leave the GPU when its memory runs out. On a CPU
there is nothing to do: the state is in RAM, where the system pages it. On a GPU, `offload=True` keeps it in the host's
memory, pinned, and moves one tensor's at a time there and back in each step: 4.1 bytes a parameter over the bus, which
adapters of some million parameters do not notice, and full fine-tuning does.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from afina.kernels.dispatch import TYPES, data_pointer, kernels
from afina.kernels.int8_blockwise import (
    BLOCK,
    dequantize8,
    dynamic_levels,
    nearest_codes,
    quantize8,
    search_tables,
)

SMALLEST = 4096  # parameters of a tensor whose moments are held in 8 bits


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101) with moments in 8 bits; arguments as in torch."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        offload: bool = False,
        smallest: int = SMALLEST,
    ) -> None:
        """`offload` keeps the moments in the host's memory; tensors of less than `smallest` numbers keep float32 ones."""
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        self.offload, self.smallest = offload, smallest
        super().__init__(params, defaults)

    def state_dict(self) -> dict[str, Any]:
        """As in torch; waits until offloaded moments have arrived."""
        if self.offload and torch.cuda.is_available():
            torch.cuda.synchronize()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, which would turn codes into floats."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            kept = {name: t.clone() for name, t in state_dict["state"].get(number, {}).items()}
            self.state[parameter] = {
                n: t if n == "step" else self.home(t, parameter.device) for n, t in kept.items()
            }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step, a tensor at a time."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        """The step of one tensor, in float32."""
        state = self.state[parameter]
        if not state:
            self._start(parameter, state)
        state["step"] += 1
        if "first_scales" in state and kernels.cpp_accepts(parameter) and parameter.is_contiguous():
            self._update_at_once(parameter, state, group)
            return
        gradient = parameter.grad.float()  # type: ignore[union-attr]
        step, (beta1, beta2) = float(state["step"]), group["betas"]
        first = self._load(state, "first", parameter).lerp_(gradient, 1 - beta1)
        second = (
            self._load(state, "second", parameter)
            .mul_(beta2)
            .addcmul_(gradient, gradient, value=1 - beta2)
        )
        size = (second / (1 - beta2**step)).sqrt_().add_(group["eps"])
        value = parameter.float().mul_(1 - group["lr"] * group["weight_decay"])
        parameter.copy_(value.addcdiv_(first, size, value=-group["lr"] / (1 - beta1**step)))
        self._store(state, "first", first)
        self._store(state, "second", second)

    def _update_at_once(
        self, parameter: nn.Parameter, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """The same, a block at a time in C++."""
        gradient = parameter.grad.contiguous()  # type: ignore[union-attr]
        if gradient.dtype not in TYPES:
            gradient = gradient.float()
        step, (beta1, beta2) = float(state["step"]), group["betas"]
        kernels.adamw8(
            data_pointer(parameter),
            TYPES[parameter.dtype],
            data_pointer(gradient),
            TYPES[gradient.dtype],
            parameter.numel(),
            _addresses(state, "first"),
            _addresses(state, "second"),
            1 - beta1,
            beta2,
            1 - beta2,
            1 - beta2**step,
            group["eps"],
            1 - group["lr"] * group["weight_decay"],
            -group["lr"] / (1 - beta1**step),
        )

    def _start(self, parameter: nn.Parameter, state: dict[str, Any]) -> None:
        device = parameter.device
        state["step"] = torch.tensor(0.0)
        for name in ("first", "second"):
            if parameter.numel() < self.smallest:
                state[name] = self.home(torch.zeros_like(parameter, dtype=torch.float32), device)
                continue
            numbers, zero = (
                parameter.numel(),
                nearest_codes(torch.zeros(1, device=device), _levels(name, device)),
            )
            codes = zero.to(torch.uint8).repeat(numbers)
            scales = torch.zeros(math.ceil(numbers / BLOCK), device=device)
            state[name], state[f"{name}_scales"] = (
                self.home(codes, device),
                self.home(scales, device),
            )

    def home(self, tensor: Tensor, device: torch.device) -> Tensor:
        """A state tensor where it stays between steps, for a parameter on `device`."""
        if not self.offload:
            return tensor.to(device)
        return tensor.cpu().pin_memory() if device.type == "cuda" else tensor.cpu()

    def _load(self, state: dict[str, Any], name: str, parameter: nn.Parameter) -> Tensor:
        """A moment in float32, in the shape of `parameter`, for this step."""
        device, stored = parameter.device, state[name]
        if f"{name}_scales" not in state:
            return stored.to(device, non_blocking=True)
        scales = state[f"{name}_scales"].to(device, non_blocking=True)
        codes = stored.to(device, non_blocking=True)
        return dequantize8(codes, scales, _levels(name, device)).view(parameter.shape)

    def _store(self, state: dict[str, Any], name: str, moment: Tensor) -> None:
        """Put a moment back, in place."""
        if f"{name}_scales" not in state:
            state[name].copy_(moment, non_blocking=True)
            return
        codes, scales = quantize8(moment.flatten(), _levels(name, moment.device))
        if name == "second":  # never rounded to zero: the first moment over nothing would be a leap
            codes.clamp_(min=1)
        state[name].copy_(codes, non_blocking=True)
        state[f"{name}_scales"].copy_(scales, non_blocking=True)


def _addresses(state: dict[str, Any], name: str) -> list[int]:
    """Where the C++ kernel finds a moment."""
    tensors = (
        state[name],
        state[f"{name}_scales"],
        _levels(name, torch.device("cpu")),
        *search_tables(name == "first"),
    )
    return [data_pointer(tensor) for tensor in tensors]


def _levels(name: str, device: torch.device) -> Tensor:
    return dynamic_levels(name == "first", device)
