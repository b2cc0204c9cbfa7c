"""MoRA: one square matrix M in place of two thin ones, high rank for the same count (Jiang et al. 2024, arXiv 2405.12130).

    D(x) = s * decompress(M compress(x))        M (q, q), q = floor(sqrt((out + in) r)), zero at the start; s = 1

The operators have no parameters, and each makes D a dense matrix with entries of M (s left out; i, o from 0):

    truncation   D[o, i] = M[o, i] for o, i < q, else 0                                                 (equation 4)
    sharing      D[o, i] = M[g(o), g(i)], g the group of an output or input                             (equation 6)
    decoupling   D[o, i] = M[o % q, i % q]        where O % p = I % p, else 0                           (equation 8)
    rotation     D[o, i] = (M R_I)[o % q, i % q]  likewise                                              (equation 9)

I = i // q and O = o // q number blocks, the last one filled with zeros or cut off; p is the smaller number of blocks.
So where a layer widens, further blocks of outputs repeat the first p round and round; where it narrows, the results of
several blocks of inputs are added in one of outputs, and every input is read. (The paper's code drops them: it does not
read 62% of the inputs of a Llama's down_proj.) Truncation reads q inputs by its definition. Groups are strided (i % q)
or adjacent (q runs, those in front longer by one where q does not divide). R_I turns the pair (j, j + q/2) by the angle
I / 10000^(2j/q); for rotation q is even.
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
from afina.kernels.mora import MoRALayout, pack_weight, rotate_pairs, rotation_angles
from afina.settings.methods import MoRASettings

OPERATORS = ("truncation", "sharing", "decoupling", "rotation")
GROUPINGS = ("strided", "adjacent")
SMALL = 64  # rotation up to this rank, sharing beyond: the paper's choices at 8 and 256 (table 5)
_SIZE = "isqrt((inputs + outputs) * rank)"


@register_method("mora")
class MoRA(AdapterLayer):
    """A square update. Options: `operator` (else by rank), `grouping` (of sharing), `use_alpha` (s as LoRA's)."""

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
        self.dropout = spec.dropout
        self._inference_cache: tuple[object, Tensor] | None = None  # what `units` keeps
        blocks, self.outs = (
            math.ceil(layer.in_features / size),
            math.ceil(layer.out_features / size),
        )
        self.num_vectors = (
            min(blocks, self.outs) if self.operator in ("decoupling", "rotation") else 1
        )  # p
        self.m = nn.Parameter(torch.zeros(size, size, device=layer.device))  # (q, q), float32
        if self.operator == "rotation":
            cos, sin = rotation_angles(size, blocks)
            self.register_buffer("cos", cos.to(layer.device), persistent=False)  # (blocks, q / 2)
            self.register_buffer("sin", sin.to(layer.device), persistent=False)

    @property
    def layout(self) -> MoRALayout:
        """The operator as the kernels know it."""
        ins, outs = self.layer.in_features, self.layer.out_features
        if self.operator == "truncation":
            return MoRALayout(self.size, 1, min(ins, self.size), min(outs, self.size))
        if self.operator == "sharing":
            return MoRALayout(self.size, 1, ins, outs, is_sharing=self.grouping == "adjacent")
        return MoRALayout(
            self.size, self.num_vectors, ins, outs, is_rotated=self.operator == "rotation"
        )

    @torch.no_grad()
    def units(self, dtype: torch.dtype) -> Tensor:
        """M transposed as the kernels' product with rows of `dtype` reads it, for inference: kept until M changes."""
        state = (
            dtype,
            kernels.isa,
            self.m.data_ptr(),
            0 if self.m.is_inference() else self.m._version,
        )
        if self._inference_cache is None or self._inference_cache[0] != state:
            self._inference_cache = (state, pack_weight(self.m, dtype, True))
        return self._inference_cache[1]

    def train(self, mode: bool = True) -> "MoRA":
        """As of any module; what was kept for inference is forgotten."""
        self._inference_cache = None
        return super().train(mode)

    @property
    def grouping(self) -> str:
        """How sharing groups now: each restart changes it, or the rank of the sum could not grow."""
        return GROUPINGS[(GROUPINGS.index(self._first) + self.restarts) % 2]

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """M zero; the other operators refuse, since two deltas of theirs add up to one."""
        if self.operator != "sharing":
            why = f"with {self.operator} what is learned after is of the same form as before: nothing is gained"
            raise SettingsError(
                "only sharing can merge and restart",
                where="restart_every",
                why=why,
                hint="operator: sharing",
            )
        self.m.zero_()

    def forward(self, x: Tensor, y0: Tensor, weight: float) -> Tensor:
        """y0 + weight * D(x), in the dtype of y0."""
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
        """`Form.fold` of the one-hot vectors of x (T) integers, without writing them out over all inputs."""
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
        """g of `count` outputs or inputs, as sharing groups them now: (count)."""
        index = torch.arange(count, device=self.m.device)
        if self.grouping == "strided":
            return index % self.size
        run, longer = divmod(count, self.size)
        return torch.where(
            index < longer * (run + 1), index // (run + 1), (index - longer) // max(1, run)
        )

    def dense(self) -> Tensor:
        """The update as a matrix (out, in), in the dtype of M, entry by entry as the module's docstring says."""
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
            blocks = rotate_pairs(
                blocks, self.cos, -self.sin
            )  # a row of M R is R^T times that row of M
        together = (o // size % self.num_vectors)[:, None] == i // size % self.num_vectors
        return blocks.flatten(1)[:, :width][o % size] * together

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W + D."""
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
        """q^2, q = floor(sqrt((out + in) r)), for rotation the next even number below."""
        return matrix_size(layer, spec) ** 2

    @classmethod
    def layer_cost(cls, layer: TargetModule, spec: AdapterConfig, device: str) -> LayerCost:
        """x alone is kept where the C++ kernel runs; else what M reads, p vectors of q numbers, and x if truncation cuts it."""
        size, operator = matrix_size(layer, spec), mora_operator(layer, spec)
        blocks = min(math.ceil(layer.in_features / size), math.ceil(layer.out_features / size))
        slots = blocks if operator in ("decoupling", "rotation") else 1
        products = float(slots * size**2)
        if device == "cpu" and kernels.available_isas and not spec.dropout:
            return LayerCost(True, 0, products)
        dropped = 2 * layer.in_features if spec.dropout else 0
        works = (
            2.0 * layer.in_features if operator == "rotation" else 0.0
        )  # inputs padded, and turned
        return LayerCost(
            operator == "truncation", slots * size + dropped, products, workspace_numel=works
        )


def mora_operator(layer: TargetModule, spec: AdapterConfig) -> str:
    """The operator asked for, or the paper's choice for the rank."""
    chosen = spec.method_settings.get("operator") or (
        "rotation" if spec.rank_of(layer.path) <= SMALL else "sharing"
    )
    return _known(chosen, OPERATORS, "operator")


def matrix_size(layer: TargetModule, spec: AdapterConfig) -> int:
    """q, the width of M."""
    size = math.isqrt((layer.out_features + layer.in_features) * spec.rank_of(layer.path))
    return max(2, size - size % 2) if mora_operator(layer, spec) == "rotation" else size


def _known(value: Any, names: tuple[str, ...], where: str) -> str:
    if value not in names:
        raise SettingsError(
            f"{where} cannot be {value!r}",
            where=f"options.{where}",
            hint=did_you_mean(str(value), names),
        )
    return str(value)
