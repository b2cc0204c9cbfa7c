"""Trainable tokens: an adapter's own rows of the embedding and the output layer, for some tokens.

    embedding       y[t] = E'[token]  where the token is one of them, else the base's row
    output layer    logit[token] = E'[token] h  for each of them

E' holds the rows themselves, and not a difference: a new token has no row in the shared base. In
PEFT these are `trainable_token_indices`. An adapter of any method may have them.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from afina.adapters.base import AdapterLayer, TargetModule
from afina.errors import AdapterError
from afina.io.adapter_config import AdapterConfig


class TrainableTokens(AdapterLayer):
    """Rows `(n, d)` of the configured tokens, initialized as the base's."""

    tensor_names = {"weight": "token_adapter.trainable_tokens_delta"}
    is_method: ClassVar[bool] = False

    def __init__(
        self, layer: TargetModule, spec: AdapterConfig, generator: torch.Generator
    ) -> None:
        super().__init__(layer, spec, generator)
        if not isinstance(layer.module, nn.Embedding | nn.Linear) or not layer.is_matrix:
            raise AdapterError(
                f"a {type(layer.module).__name__} cannot have trainable tokens",
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
        """Use the rows of another layer: those of a tied output layer are the embedding's."""
        setattr(self, name, parameter)

    def forward(self, x: Tensor, y0: Tensor, weight: float) -> Tensor:
        """Return vectors `(..., d)` of tokens x, or logits `(..., V)` of vectors x `(..., d)`."""
        rows = self.weight.to(y0.dtype)
        if isinstance(self.layer.module, nn.Embedding):
            index = torch.searchsorted(self.ids, x).clamp(max=len(self.ids) - 1)  # (...)
            own = (self.ids[index] == x)[..., None]
            return torch.where(own, y0 + weight * (rows[index] - y0), y0)
        before = y0[..., self.ids]
        bias: Any = self.layer.module.bias
        after = x @ rows.T if bias is None else x @ rows.T + bias[self.ids].to(y0.dtype)
        return y0.index_copy(-1, self.ids, before + weight * (after - before))

    def merged_weight(self, weight: Tensor) -> Tensor:
        """Return the matrix `(out, in)` with the trained rows."""
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
        """Return the number of tokens times the width of a row."""
        return len(spec.trainable_tokens) * (
            layer.out_features if isinstance(layer.module, nn.Embedding) else layer.in_features
        )
