"""AdamW over an adapter's parameters: in float32 or with 8-bit moments, a learning rate a group, a schedule, clipping."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from afina.adapters import relora as restart
from afina.adapters.attach import Adapter
from afina.training.setup.adamw_8bit import AdamW8bit

RESTARTS = "restarts/"  # before the names of what merge-and-restart keeps


def schedule_factor(kind: str, step: int, steps: int, warmup: float) -> float:
    """Factor of the learning rate at `step` (0-based) of `steps`: a linear rise, then the fall named by `kind`."""
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
    """AdamW with float32 masters for parameters held in 16 bits (full fine-tuning of a bf16 base).

    `rates` gives learning rates of their own to modules, by path; weight decay leaves vectors alone. `kind` is one of
    the setting `optimizer`.
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
        """One step at `factor` times the peak rates; gradients are clipped to the norm `clip` and cleared.

        Returns the norm before clipping. A norm that is not finite leaves everything as it was.
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
            # fused AdamW does not tell that it wrote, and what is kept for inference must not be used then
            torch.autograd.graph.increment_version(list(self.parameters.values()))
        self.adamw.zero_grad(set_to_none=True)
        return norm

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, by name."""
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
        """Take back what `state` gave, values of the parameters included."""
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
                        name: self._place(value, master) for name, value in kept.items()
                    }

    def _place(self, value: Tensor, master: Tensor) -> Tensor:
        """A tensor of the optimizer's state where it lies between steps; counts of steps stay on the CPU."""
        if not value.ndim:
            return value.clone()
        home = self.adamw.home if isinstance(self.adamw, AdamW8bit) else Tensor.to
        return home(value.clone(), master.device)
