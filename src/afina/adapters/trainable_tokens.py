"""Tokens of an adapter's own: their rows of the embedding, and of the output layer, are learned; all others stay.

    embedding       y[t] = E'[token]  where the token is one of them, else the base's row
    output layer    logit[token] = E'[token] h  for each of them

E' holds the rows themselves, and not what is added to them: a token that is new has no row that everybody's base shares.
In PEFT these are `trainable_token_indices`. An adapter has them beside its other deltas, whatever their method.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from afina.adapters.base import AdapterLayer, TargetModule
from afina.errors import AdapterError
from afina.io.adapter_config import AdapterConfig


class TrainableTokens(AdapterLayer):
    """Rows (n, d) of their own for the tokens of `Spec.tokens`; they start as the base's."""

    tensor_names = {"weight": "token_adapter.trainable_tokens_delta"}
    is_method: ClassVar[bool] = False

    def __init__(
        self, layer: TargetModule, spec: AdapterConfig, generator: torch.Generator
    ) -> None:
        super().__init__(layer, spec, generator)
        if not isinstance(layer.module, nn.Embedding | nn.Linear) or not layer.is_matrix:
            raise AdapterError(
                f"no token can have a row of its own in a {type(layer.module).__name__}",
                where=layer.path,
            )
        self.ids: Tensor
        self.register_buffer(
            "ids",
            torch.tensor(sorted(spec.trainable_tokens.values()), device=layer.device),
            persistent=False,
        )
        self.weight = nn.Parameter(layer.module.weight.detach()[self.ids].float())  # (n, d)

    def share(self, name: str, parameter: nn.Parameter) -> None:
        """Use the rows of another delta: those of a tied output layer are the embedding's."""
        setattr(self, name, parameter)

    def forward(self, x: Tensor, y0: Tensor, weight: float) -> Tensor:
        """Tokens x (...) to vectors (..., d), or vectors x (..., d) to logits (..., V)."""
        rows = self.weight.to(y0.dtype)
        if isinstance(self.layer.module, nn.Embedding):
            place = torch.searchsorted(self.ids, x).clamp(max=len(self.ids) - 1)  # (...)
            own = (self.ids[place] == x)[..., None]
            return torch.where(own, y0 + weight * (rows[place] - y0), y0)
        before, bias = y0[..., self.ids], self.layer.module.bias
        after = x @ rows.T if bias is None else x @ rows.T + bias[self.ids].to(y0.dtype)  # type: ignore[index]
        return y0.index_copy(-1, self.ids, before + weight * (after - before))

    def merged_weight(self, weight: Tensor) -> Tensor:
        """The matrix (out, in) with the rows in their places."""
        if isinstance(self.layer.module, nn.Embedding):
            return weight.index_copy(1, self.ids, self.weight.T.to(weight))
        return weight.index_copy(0, self.ids, self.weight.to(weight))

    @classmethod
    def tensor_shapes(
        cls, layer: TargetModule, config: AdapterConfig
    ) -> dict[str, tuple[int, ...]]:
        """Return the shape (n, d) of the rows."""
        embeds = isinstance(layer.module, nn.Embedding)
        width = layer.out_features if embeds else layer.in_features
        return {"weight": (len(config.trainable_tokens), width)}

    @classmethod
    def num_parameters(cls, layer: TargetModule, spec: AdapterConfig) -> int:
        """Tokens times the width of a row."""
        return len(spec.trainable_tokens) * (
            layer.out_features if isinstance(layer.module, nn.Embedding) else layer.in_features
        )
