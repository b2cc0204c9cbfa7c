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

from afina.delta.contract import Cost, Delta, Layer, Spec
from afina.errors import SettingsError, nearest

OPERATORS = ("truncation", "sharing", "decoupling", "rotation")
GROUPINGS = ("strided", "adjacent")
SMALL = 64  # rotation up to this rank, sharing beyond: the paper's choices at 8 and 256 (table 5)


class MoRA(Delta):
    """A square update. Options: `operator` (else by rank), `grouping` (of sharing), `use_alpha` (s as LoRA's)."""

    keys = {"m": "mora_M.weight"}
    options = ("operator", "grouping", "use_alpha")
    cos: Tensor
    sin: Tensor

    def __init__(self, layer: Layer, spec: Spec, generator: torch.Generator) -> None:
        super().__init__(layer, spec, generator)
        self.operator = operator_of(layer, spec)
        self._first = _known(spec.options.get("grouping", GROUPINGS[0]), GROUPINGS, "grouping")
        self.size = size = size_of(layer, spec)  # q
        self.scale = spec.scale_of(layer.path) if spec.options.get("use_alpha") else 1.0
        self.dropout = spec.dropout
        blocks, self.outs = math.ceil(layer.in_features / size), math.ceil(layer.out_features / size)
        self.slots = min(blocks, self.outs) if self.operator in ("decoupling", "rotation") else 1  # p
        self.m = nn.Parameter(torch.zeros(size, size, device=layer.device))  # (q, q), float32
        if self.operator == "rotation":
            angles = torch.arange(blocks)[:, None] / 10000 ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
            self.register_buffer("cos", angles.cos().float().to(layer.device), persistent=False)  # (blocks, q / 2)
            self.register_buffer("sin", angles.sin().float().to(layer.device), persistent=False)

    @property
    def grouping(self) -> str:
        """How sharing groups now: each restart changes it, or the rank of the sum could not grow."""
        return GROUPINGS[(GROUPINGS.index(self._first) + self.restarts) % 2]

    @torch.no_grad()
    def restart(self, generator: torch.Generator) -> None:
        """M zero; the other operators refuse, since two deltas of theirs add up to one."""
        if self.operator != "sharing":
            why = f"with {self.operator} what is learned after is of the same form as before: nothing is gained"
            raise SettingsError("only sharing can merge and restart", where="restart_every", why=why, hint="operator: sharing")
        self.m.zero_()

    def forward(self, x: Tensor, y0: Tensor, weight: float) -> Tensor:
        """y0 + weight * D(x), in the dtype of y0."""
        y0 = self.carried(x, y0, weight)
        if x.is_floating_point():
            x = F.dropout(x, self.dropout) if self.dropout and self.training else x
            low = self.compress(self.layer.rows(x).flatten(0, -2).to(y0.dtype))  # (T, p, q)
        else:
            low = self.compress_index(x.flatten(), y0.dtype)
        m = (weight * self.scale * self.m).to(y0.dtype)
        return y0 + self.decompress(F.linear(low, m)).view(y0.shape)

    def compress(self, x: Tensor) -> Tensor:
        """x (T, in) as vectors that M takes: (T, p, q)."""
        size, width = self.size, x.shape[-1]
        if self.operator == "truncation":
            return F.pad(x[:, :size], (0, max(0, size - width)))[:, None]
        if self.operator == "sharing" and self.grouping == "adjacent":
            run, longer = divmod(width, size)
            first, rest = x.tensor_split([longer * (run + 1)], 1)
            sums = first.unflatten(1, (longer, run + 1)).sum(2), rest.unflatten(1, (size - longer, run)).sum(2)
            return torch.cat(sums, 1)[:, None]
        blocks = F.pad(x, (0, -width % size)).unflatten(1, (-1, size))  # (T, blocks, q)
        if self.operator == "rotation":
            blocks = turn(blocks, self.cos, self.sin)
        return fold(blocks, self.slots)

    def compress_index(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`compress` of the one-hot vectors of x (T) integers, without writing them out over all inputs."""
        if self.operator == "truncation":
            return F.one_hot(x.clamp(max=self.size), self.size + 1)[:, None, :-1].to(dtype)
        if self.operator == "sharing":
            return F.one_hot(self.groups(self.layer.in_features)[x], self.size)[:, None].to(dtype)
        low = F.one_hot(x % self.size, self.size).to(dtype)  # (T, q)
        block = x // self.size
        if self.operator == "rotation":
            low = turn(low, self.cos[block], self.sin[block])
        return F.one_hot(block % self.slots, self.slots).to(dtype)[..., None] * low[:, None]

    def decompress(self, z: Tensor) -> Tensor:
        """Outputs (T, out) of what M gave, z (T, p, q)."""
        out = self.layer.out_features
        if self.operator == "truncation":
            return F.pad(z[:, 0, :out], (0, max(0, out - self.size)))
        if self.operator == "sharing" and self.grouping == "adjacent":
            run, longer = divmod(out, self.size)
            first, rest = z[:, 0, :, None].tensor_split([longer], 1)
            return torch.cat([first.expand(-1, -1, run + 1).flatten(1), rest.expand(-1, -1, run).flatten(1)], 1)
        return z.repeat(1, math.ceil(self.outs / self.slots), 1).flatten(1)[:, :out]

    def groups(self, count: int) -> Tensor:
        """g of `count` outputs or inputs, as sharing groups them now: (count)."""
        index = torch.arange(count, device=self.m.device)
        if self.grouping == "strided":
            return index % self.size
        run, longer = divmod(count, self.size)
        return torch.where(index < longer * (run + 1), index // (run + 1), (index - longer) // max(1, run))

    def dense(self) -> Tensor:
        """The update as a matrix (out, in), in the dtype of M, entry by entry as the module's docstring says."""
        out, width, m, size = self.layer.out_features, self.layer.in_features, self.scale * self.m, self.size
        if self.operator == "truncation":
            return F.pad(m[:out, :width], (0, max(0, width - size), 0, max(0, out - size)))
        if self.operator == "sharing":
            return m[self.groups(out)][:, self.groups(width)]
        o, i = torch.arange(out, device=m.device), torch.arange(width, device=m.device)
        blocks = m[:, None].expand(-1, math.ceil(width / size), -1)  # (q, blocks, q)
        if self.operator == "rotation":
            blocks = turn(blocks, self.cos, -self.sin)  # a row of M R is R^T times that row of M
        together = (o // size % self.slots)[:, None] == i // size % self.slots
        return blocks.flatten(1)[:, :width][o % size] * together

    def merged(self, weight: Tensor) -> Tensor:
        """W + D."""
        return self.with_carried(weight) + self.dense().to(weight)

    @classmethod
    def count(cls, layer: Layer, spec: Spec) -> int:
        """q^2, q = floor(sqrt((out + in) r)), for rotation the next even number below."""
        return size_of(layer, spec) ** 2

    @classmethod
    def cost(cls, layer: Layer, spec: Spec) -> Cost:
        """What M reads is kept, p vectors of q numbers a token, and x only where it is cut by truncation."""
        size, operator = size_of(layer, spec), operator_of(layer, spec)
        blocks = min(math.ceil(layer.in_features / size), math.ceil(layer.out_features / size))
        slots = blocks if operator in ("decoupling", "rotation") else 1
        dropped = 2 * layer.in_features if spec.dropout else 0
        works = 2.0 * layer.in_features if operator == "rotation" else 0.0  # inputs padded, and turned
        return Cost(operator == "truncation", slots * size + dropped, float(slots * size**2), works=works)


def operator_of(layer: Layer, spec: Spec) -> str:
    """The operator asked for, or the paper's choice for the rank."""
    chosen = spec.options.get("operator") or ("rotation" if spec.rank_of(layer.path) <= SMALL else "sharing")
    return _known(chosen, OPERATORS, "operator")


def size_of(layer: Layer, spec: Spec) -> int:
    """q, the width of M."""
    size = math.isqrt((layer.out_features + layer.in_features) * spec.rank_of(layer.path))
    return max(2, size - size % 2) if operator_of(layer, spec) == "rotation" else size


def fold(blocks: Tensor, slots: int) -> Tensor:
    """Blocks (T, n, q) added round and round into `slots` of them: (T, slots, q)."""
    if blocks.shape[1] == slots:
        return blocks
    return F.pad(blocks, (0, 0, 0, -blocks.shape[1] % slots)).unflatten(1, (-1, slots)).sum(1)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., q) with each pair, q / 2 apart, turned by its angle; cos and sin (..., q / 2).

    The paper writes pairs of neighbours: the same but for the order of inputs, and 3 times slower (512 x 1024, bf16).
    """
    first, second = x.chunk(2, -1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([torch.addcmul(first * cos, second, -sin), torch.addcmul(first * sin, second, cos)], -1)


def _known(value: Any, names: tuple[str, ...], where: str) -> str:
    if value not in names:
        raise SettingsError(f"{where} cannot be {value!r}", where=f"options.{where}", hint=nearest(str(value), names))
    return str(value)
