"""MoRA: a square matrix M instead of a low-rank product (Jiang et al. 2024, arXiv 2405.12130).

    D(x) = s * decompress(M compress(x))     M (q, q), q = floor(sqrt((out + in) r)); M = 0, s = 1

Equal parameters give a higher rank. The operators have no parameters, and each makes D a dense
matrix with entries of M (s left out; i, o from 0):

    truncation   D[o, i] = M[o, i] for o, i < q, else 0                              (equation 4)
    sharing      D[o, i] = M[g(o), g(i)], g the group of an output or input          (equation 6)
    decoupling   D[o, i] = M[o % q, i % q]        where O % p = I % p, else 0        (equation 8)
    rotation     D[o, i] = (M R_I)[o % q, i % q]  likewise                           (equation 9)

I = i // q and O = o // q number blocks, the last one padded with zeros or truncated; p is the
smaller number of blocks. Where a module widens, further blocks of outputs repeat the first p in
turn; where it narrows, the results of several blocks of inputs are added in one block of outputs,
and every input is read. (The paper's code drops them: it does not read 62% of the inputs of a
Llama's down_proj.) Truncation reads q inputs by its definition. Groups are strided (i % q) or
adjacent (q runs, the first ones longer by one where q does not divide). R_I rotates the pair
(j, j + q/2) by the angle I / 10000^(2j/q); for rotation q is even.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from afina.adapters.base import AdapterLayer, LayerCost, TargetModule
from afina.adapters.registry import register_method
from afina.errors import SettingsError, did_you_mean
from afina.io.adapter_config import AdapterConfig
from afina.kernels.dispatch import kernels
from afina.kernels.mora import MoRALayout, pack_mora, rotate_pairs, rotation_angles
from afina.settings.methods import MoRASettings

OPERATORS = ("truncation", "sharing", "decoupling", "rotation")
GROUPINGS = ("strided", "adjacent")
MAX_ROTATION_RANK = 64  # sharing beyond: the paper's choices at ranks 8 and 256 (table 5)
_SIZE = "isqrt((inputs + outputs) * rank)"


@register_method("mora")
class MoRA(AdapterLayer):
    """Square update; settings: `operator`, `grouping` (of sharing), `use_alpha`."""

    tensor_names = {"m": "mora_M.weight"}
    settings_class = MoRASettings
    shape_rules = {"m": f"({_SIZE}, {_SIZE}) or (even({_SIZE}), even({_SIZE}))"}
    fused_kernel = "mora"
    cos: Tensor
    sin: Tensor

    def __init__(
        self, layer: TargetModule, spec: AdapterConfig, generator: torch.Generator
    ) -> None:
        super().__init__(layer, spec, generator)
        self.operator = mora_operator(layer, spec)
        self._first = _known(
            spec.method_settings.get("grouping", GROUPINGS[0]), GROUPINGS, "grouping"
        )
        self.size = size = matrix_size(layer, spec)  # q
        self.scale = spec.scale_of(layer.path) if spec.method_settings.get("use_alpha") else 1.0
        blocks = math.ceil(layer.in_features / size)
        self.num_vectors = _num_vectors(layer, size, self.operator)  # p
        self.m = nn.Parameter(torch.zeros(size, size, device=layer.device))  # (q, q), float32
        if self.operator == "rotation":
            cos, sin = rotation_angles(size, blocks)
            self.register_buffer("cos", cos.to(layer.device), persistent=False)  # (blocks, q / 2)
            self.register_buffer("sin", sin.to(layer.device), persistent=False)

    @property
    def layout(self) -> MoRALayout:
        """The operator as the kernels read it."""
        ins, outs = self.layer.in_features, self.layer.out_features
        if self.operator == "truncation":
            return MoRALayout(self.size, 1, min(ins, self.size), min(outs, self.size))
        if self.operator == "sharing":
            return MoRALayout(self.size, 1, ins, outs, is_sharing=self.grouping == "adjacent")
        return MoRALayout(
            self.size, self.num_vectors, ins, outs, is_rotated=self.operator == "rotation"
        )

    def kernel_weights(self, dtype: torch.dtype) -> tuple[Tensor]:
        """Return M packed for products with inputs of `dtype`."""
        return (pack_mora(self.m, dtype),)

    @property
    def grouping(self) -> str:
        """Present grouping of sharing; each restart changes it, so that the sum gains rank."""
        return GROUPINGS[(GROUPINGS.index(self._first) + self.restarts) % 2]

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Set M to zero.

        Raises:
            SettingsError: the operator is not sharing: two updates of the others sum to one.
        """
        if self.operator != "sharing":
            why = f"with {self.operator}, the sum of two updates has the form of one"
            raise SettingsError(
                "only sharing can merge and restart",
                where="restart_every",
                why=why,
                hint="operator: sharing",
            )
        self.m.zero_()

    def forward(self, x: Tensor, y0: Tensor, weight: float) -> Tensor:
        """Return y0 + weight * D(x), in the dtype of y0."""
        y0 = self.add_restart_delta(x, y0, weight)
        if x.is_floating_point():
            x = F.dropout(x, self.dropout) if self.dropout and self.training else x
            turns = (self.cos, self.sin) if self.operator == "rotation" else None
            low = self.layout.fold(
                self.layer.unfold_inputs(x).flatten(0, -2).to(y0.dtype), turns
            )  # (T, p, q)
        else:
            low = self.fold_index(x.flatten(), y0.dtype)
        m = (weight * self.scale * self.m).to(y0.dtype)
        return y0 + self.layout.unfold(F.linear(low, m), self.layer.out_features).view(y0.shape)

    def fold_index(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return `MoRALayout.fold` of the one-hot vectors of x `(T,)`, without allocating them."""
        if self.operator == "truncation":
            return F.one_hot(x.clamp(max=self.size), self.size + 1)[:, None, :-1].to(dtype)
        if self.operator == "sharing":
            return F.one_hot(self.groups(self.layer.in_features)[x], self.size)[:, None].to(dtype)
        low = F.one_hot(x % self.size, self.size).to(dtype)  # (T, q)
        block = x // self.size
        if self.operator == "rotation":
            low = rotate_pairs(low, self.cos[block], self.sin[block])
        return (
            F.one_hot(block % self.num_vectors, self.num_vectors).to(dtype)[..., None]
            * low[:, None]
        )

    def groups(self, count: int) -> Tensor:
        """Return g of `count` outputs or inputs, as sharing groups them now: `(count,)`."""
        index = torch.arange(count, device=self.m.device)
        if self.grouping == "strided":
            return index % self.size
        run, longer = divmod(count, self.size)
        return torch.where(
            index < longer * (run + 1), index // (run + 1), (index - longer) // max(1, run)
        )

    def dense(self) -> Tensor:
        """Return the update `(out, in)`, in the dtype of M."""
        out, width, m, size = (
            self.layer.out_features,
            self.layer.in_features,
            self.scale * self.m,
            self.size,
        )
        if self.operator == "truncation":
            return F.pad(m[:out, :width], (0, max(0, width - size), 0, max(0, out - size)))
        if self.operator == "sharing":
            return m[self.groups(out)][:, self.groups(width)]
        o, i = torch.arange(out, device=m.device), torch.arange(width, device=m.device)
        blocks = m[:, None].expand(-1, math.ceil(width / size), -1)  # (q, blocks, q)
        if self.operator == "rotation":
            blocks = rotate_pairs(blocks, self.cos, -self.sin)  # a row of M R is R^T times it
        together = (o // size % self.num_vectors)[:, None] == i // size % self.num_vectors
        return blocks.flatten(1)[:, :width][o % size] * together

    def merged_weight(self, weight: Tensor) -> Tensor:
        """Return W + D."""
        return self.merge_restart_delta(weight) + self.dense().to(weight)

    @classmethod
    def tensor_shapes(
        cls, layer: TargetModule, config: AdapterConfig
    ) -> dict[str, tuple[int, ...]]:
        """Return the shape (q, q) of M."""
        size = matrix_size(layer, config)
        return {"m": (size, size)}

    @classmethod
    def num_parameters(cls, layer: TargetModule, spec: AdapterConfig) -> int:
        """Return q^2, q = floor(sqrt((out + in) r)), for rotation the next lower even number."""
        return matrix_size(layer, spec) ** 2

    @classmethod
    def layer_cost(cls, layer: TargetModule, spec: AdapterConfig, device: str) -> LayerCost:
        """Return the cost of a layer.

        Backward reads x only where the C++ kernel runs; else what M reads, p vectors of q elements,
        and x if it is truncated.
        """
        size, operator = matrix_size(layer, spec), mora_operator(layer, spec)
        num_vectors = _num_vectors(layer, size, operator)
        products = float(num_vectors * size**2)
        if device == "cpu" and kernels.available_isas and not spec.dropout:
            return LayerCost(True, 0, products)
        dropped = 2 * layer.in_features if spec.dropout else 0
        workspace = 2.0 * layer.in_features if operator == "rotation" else 0.0  # padded, rotated
        saved = num_vectors * size + dropped
        return LayerCost(operator == "truncation", saved, products, workspace_numel=workspace)


def mora_operator(layer: TargetModule, spec: AdapterConfig) -> str:
    """Return the configured operator, or the paper's choice for the rank."""
    chosen = spec.method_settings.get("operator") or (
        "rotation" if spec.rank_of(layer.path) <= MAX_ROTATION_RANK else "sharing"
    )
    return _known(chosen, OPERATORS, "operator")


def matrix_size(layer: TargetModule, spec: AdapterConfig) -> int:
    """Return q, the width of M."""
    size = math.isqrt((layer.out_features + layer.in_features) * spec.rank_of(layer.path))
    return max(2, size - size % 2) if mora_operator(layer, spec) == "rotation" else size


def _num_vectors(layer: TargetModule, size: int, operator: str) -> int:
    """Return p, how many vectors of `size` elements M takes of a token."""
    if operator not in ("decoupling", "rotation"):
        return 1
    return min(math.ceil(layer.in_features / size), math.ceil(layer.out_features / size))


def _known(value: Any, names: tuple[str, ...], where: str) -> str:
    if value not in names:
        raise SettingsError(
            f"{where} cannot be {value!r}",
            where=f"options.{where}",
            hint=did_you_mean(str(value), names),
        )
    return str(value)
