"""Fused experts with adapters: each product of an expert plus the updates of the active adapters.

    W1[e] x + sum over adapters k of  w_k s_k B_k[e] A_k[e] x        the same for W2

The own forward pass of the module multiplies by entire parameters and knows no adapters: with one
active, `afina.models.experts.experts_forward` runs, and each adapter sees its tokens only.
"""

from typing import Any

import torch
from torch import Tensor, nn

from afina.adapters.modules import ModuleWithAdapters, token_indices
from afina.adapters.segments import ForwardContext, Segments
from afina.adapters.target_module import TargetModule
from afina.errors import SettingsError
from afina.models.experts import expert_matrices, experts_forward


class ExpertLayers(nn.Module):
    """The adapter layers at one parameter of fused experts.

    Attributes:
        deltas: Adapter layers by the adapter's name.
        module: Path of the module that has the parameter.
    """

    def __init__(self, owner: "ExpertsWithAdapters") -> None:
        super().__init__()
        self.deltas, self.module = nn.ModuleDict(), owner.layer.path
        self._owner = [owner]  # in a list: the module that contains this is no part of it

    @property
    def owner(self) -> "ExpertsWithAdapters":
        """The experts with adapters."""
        return self._owner[0]


class ExpertsWithAdapters(ModuleWithAdapters):
    """Frozen fused experts, and adapter layers at their parameters."""

    def __init__(self, layer: TargetModule, context: ForwardContext) -> None:
        super().__init__(layer, context)
        self._at = {name: ExpertLayers(self) for name in expert_matrices(layer.module)}
        self.parameter_layers = nn.ModuleList(self._at.values())

    def layers_at(self, name: str) -> ExpertLayers:
        """Return the adapter layers at the parameter `name`."""
        return self._at[name]

    @property
    def is_empty(self) -> bool:
        """Whether no adapter is left."""
        return not self.deltas and not any(one.deltas for one in self._at.values())

    def forward(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        """Return the output of the experts with the active adapters.

        Args:
            x: `(num_tokens, hidden)`.
            others: Experts and weights of each token, `(num_tokens, k)` each.
            named: The same by name.

        Raises:
            SettingsError: an adapter that replaces the module is active next to another, or the
                tokens of a padded batch are not known.
        """
        segments = self._context.segments
        adapters = {name for name, _ in segments.global_adapters}
        adapters |= {span.adapter for span in segments.spans}
        active = {n: one.deltas for n, one in self._at.items() if adapters & one.deltas.keys()}
        if not active:
            return super().forward(x, *others, **named)
        if adapters & self.deltas.keys():
            what = "an adapter that replaces a module must be active alone, on all tokens"
            raise SettingsError(what, where=self.layer.path)
        updates = _Updates(active, segments, x, self.layer.path)
        return experts_forward(self.base, x, *others, **named, add=updates.add)


class _Updates:
    """The updates of one forward pass: the factors of each expert, and the tokens they apply to."""

    def __init__(self, active: Any, segments: Segments, x: Tensor, where: str) -> None:
        if segments.spans and segments.unit == "row":
            what = "adapters of fused experts cannot be active on some rows of a padded batch"
            raise SettingsError(what, where=where)
        # None: all tokens
        pairs: list[tuple[tuple[str, float], Tensor | None]] = [
            (pair, None) for pair in segments.global_adapters
        ]
        for pair, index in token_indices(list(segments.spans), x.device).items():
            mask = torch.zeros(len(x), dtype=torch.bool, device=x.device)
            mask[index] = True
            pairs.append((pair, mask))
        self._updates: dict[str, list[tuple[list[Any], Tensor | None]]] = {
            parameter: [
                (deltas[name].expert_factors(x.dtype, weight), mask)
                for (name, weight), mask in pairs
                if name in deltas
            ]
            for parameter, deltas in active.items()
        }

    def add(self, parameter: str, expert: int, x: Tensor, y: Tensor, tokens: Tensor) -> Tensor:
        """Return y `(n, out)` plus the updates of an expert on its inputs x `(n, in)`."""
        for factors, mask in self._updates.get(parameter, ()):
            a, bt = factors[expert]
            if mask is None:
                y = torch.addmm(y, torch.mm(x, a.T), bt)
            elif len(at := mask[tokens].nonzero().flatten()):
                y = y.index_add(0, at, torch.mm(torch.mm(x[at], a.T), bt))
        return y
