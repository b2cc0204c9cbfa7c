"""AdamW whose two moments take one byte per parameter each, instead of four.

    state = 2 * (1 + 4/256) = 2.03 bytes per parameter, against 8

Each moment is quantized to 8 bits blockwise (`afina.kernels.int8_blockwise`) and dequantized to
float32 only in the step of its tensor; on a CPU block by block (`kernels/cpp/adamw8.h`), within the
L1 cache. Small tensors keep float32 moments, as in bitsandbytes: norms and biases are sensitive.

The paged optimizers of QLoRA move the moments out of the GPU when its memory runs out. On a CPU the
state is in RAM, where the operating system pages it. On a GPU, `offload=True` keeps it in pinned
host memory and transfers one tensor at a time in each step: 4.1 bytes per parameter over the bus,
which is negligible for adapters of some million parameters, and not for full fine-tuning.

References:
    8-bit moments: Dettmers et al. 2021, arXiv 2110.02861. QLoRA: arXiv 2305.14314.
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

SMALLEST = 4096  # parameters of a tensor whose moments are quantized


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) with moments in 8 bits; arguments as in torch."""

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
        """Create the optimizer.

        Args:
            params: Parameters or parameter groups.
            lr: Learning rate.
            betas: Decay rates of the two moments.
            eps: Added to the denominator.
            weight_decay: Decoupled weight decay.
            offload: Keep the moments in the host's memory.
            smallest: Parameters of a tensor from which on its moments are quantized.
        """
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        self.offload, self.smallest = offload, smallest
        super().__init__(params, defaults)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch does; wait until offloaded moments have arrived."""
        if self.offload and torch.cuda.is_available():
            torch.cuda.synchronize()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state; torch's own method would convert codes to floats."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            kept = {name: t.clone() for name, t in state_dict["state"].get(number, {}).items()}
            self.state[parameter] = {
                n: t if n == "step" else self.home(t, parameter.device) for n, t in kept.items()
            }

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Take one step, tensor by tensor."""
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
        """Take the step of one tensor, in float32."""
        state = self.state[parameter]
        if not state:
            self._start(parameter, state)
        state["step"] += 1
        if "first_scales" in state and kernels.cpp_accepts(parameter) and parameter.is_contiguous():
            self._update_in_cpp(parameter, state, group)
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

    def _update_in_cpp(
        self, parameter: nn.Parameter, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Take the step of one tensor in C++, block by block."""
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
            zero = nearest_codes(torch.zeros(1, device=device), _levels(name, device))
            codes = zero.to(torch.uint8).repeat(parameter.numel())
            scales = torch.zeros(math.ceil(parameter.numel() / BLOCK), device=device)
            state[name] = self.home(codes, device)
            state[f"{name}_scales"] = self.home(scales, device)

    def home(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Return a state tensor on the device where it is kept, for a parameter on `device`."""
        if not self.offload:
            return tensor.to(device)
        return tensor.cpu().pin_memory() if device.type == "cuda" else tensor.cpu()

    def _load(self, state: dict[str, Any], name: str, parameter: nn.Parameter) -> Tensor:
        """Return a moment in float32, in the shape of `parameter`."""
        device, stored = parameter.device, state[name]
        if f"{name}_scales" not in state:
            return stored.to(device, non_blocking=True)
        scales = state[f"{name}_scales"].to(device, non_blocking=True)
        codes = stored.to(device, non_blocking=True)
        return dequantize8(codes, scales, _levels(name, device)).view(parameter.shape)

    def _store(self, state: dict[str, Any], name: str, moment: Tensor) -> None:
        """Store a moment, in place."""
        if f"{name}_scales" not in state:
            state[name].copy_(moment, non_blocking=True)
            return
        codes, scales = quantize8(moment.flatten(), _levels(name, moment.device))
        if name == "second":  # never zero: the update would be unbounded
            codes.clamp_(min=1)
        state[name].copy_(codes, non_blocking=True)
        state[f"{name}_scales"].copy_(scales, non_blocking=True)


def _addresses(state: dict[str, Any], name: str) -> list[int]:
    """Return the addresses of a moment's tensors, for the C++ kernel."""
    tensors = (
        state[name],
        state[f"{name}_scales"],
        _levels(name, torch.device("cpu")),
        *search_tables(name == "first"),
    )
    return [data_pointer(tensor) for tensor in tensors]


def _levels(name: str, device: torch.device) -> Tensor:
    return dynamic_levels(name == "first", device)
