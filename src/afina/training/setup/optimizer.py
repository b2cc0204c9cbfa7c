"""AdamW over an adapter: float32 or 8-bit moments, learning rates by module, schedule, clipping."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from afina.adapters import relora as restart
from afina.adapters.attach import Adapter
from afina.training.setup.adamw_8bit import AdamW8bit

RESTARTS = "restarts/"  # prefix of the names of what merge-and-restart stores


def schedule_factor(kind: str, step: int, steps: int, warmup: float) -> float:
    """Return the factor of the learning rate at `step` (0-based): linear warmup, then the decay."""
    rise = round(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    done = (step - rise) / max(1, steps - rise)
    return {
        "constant": 1.0,
        "linear": 1.0 - done,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
    }[kind]


class AdapterOptimizer:
    """AdamW with float32 master weights for 16-bit parameters (full fine-tuning of a bf16 base).

    Args:
        adapter: The adapter.
        rate: Peak learning rate.
        rates: Peak learning rates of modules, by path.
        weight_decay: Weight decay of matrices; vectors have none.
        kind: Value of the setting `optimizer`.
    """

    def __init__(
        self,
        adapter: Adapter,
        rate: float,
        rates: Mapping[str, float],
        weight_decay: float,
        kind: str = "adamw",
    ) -> None:
        self._adapter = adapter
        self.parameters = dict(adapter.named_parameters())
        self.master_weights = {
            name: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
            for name, p in self.parameters.items()
        }
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, master in self.master_weights.items():
            own = rates.get(name.rpartition(".")[0], rate)
            groups.setdefault((own, weight_decay if master.ndim > 1 else 0.0), []).append(master)
        listed = [
            {"params": ps, "lr": lr, "weight_decay": decay, "peak": lr}
            for (lr, decay), ps in groups.items()
        ]
        self.adamw: torch.optim.Optimizer = (
            torch.optim.AdamW(listed, fused=True)
            if kind == "adamw"
            else AdamW8bit(listed, offload=kind.endswith("_offload"))
        )

    def step(self, factor: float, clip: float) -> float:
        """Take one step at `factor` times the peak rates; clip gradients to the norm `clip`.

        Gradients are cleared. Where their norm is not finite, nothing else is changed.

        Returns:
            The norm before clipping.
        """
        for name, parameter in self.parameters.items():
            master = self.master_weights[name]
            if master is not parameter and parameter.grad is not None:
                master.grad, parameter.grad = parameter.grad.float(), None
        norm = float(torch.nn.utils.clip_grad_norm_(self.master_weights.values(), clip))
        if math.isfinite(norm):
            for group in self.adamw.param_groups:
                group["lr"] = group["peak"] * factor
            self.adamw.step()
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    if self.master_weights[name] is not parameter:
                        parameter.copy_(self.master_weights[name])
            # fused AdamW bumps no version, by which cached inference weights are invalidated
            torch.autograd.graph.increment_version(list(self.parameters.values()))
        self.adamw.zero_grad(set_to_none=True)
        return norm

    def zero_grad(self) -> None:
        """Clear the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Return every tensor that a resumed run needs, by name."""
        tensors: dict[str, Tensor] = {}
        for name, master in self.master_weights.items():
            tensors[f"{name}:value"] = master.detach()
            tensors |= {
                f"{name}:{key}": value for key, value in self.adamw.state.get(master, {}).items()
            }
        return tensors | {
            RESTARTS + name: value for name, value in restart.state(self._adapter).items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the result of `state`, values of the parameters included."""
        restart.load(
            self._adapter,
            {n.removeprefix(RESTARTS): t for n, t in tensors.items() if n.startswith(RESTARTS)},
        )
        with torch.no_grad():
            for name, master in self.master_weights.items():
                master.copy_(tensors[f"{name}:value"])
                self.parameters[name].copy_(master)
                kept = {
                    key.rpartition(":")[2]: value
                    for key, value in tensors.items()
                    if key.rpartition(":")[0] == name
                }
                kept.pop("value")
                if kept:
                    self.adamw.state[master] = {
                        name: self._to_home(value, master) for name, value in kept.items()
                    }

    def _to_home(self, value: Tensor, master: Tensor) -> Tensor:
        """Return a state tensor on the device where it is kept; counts of steps stay on the CPU."""
        if not value.ndim:
            return value.clone()
        home = self.adamw.home if isinstance(self.adamw, AdamW8bit) else Tensor.to
        return home(value.clone(), master.device)
