"""Parameters of a base by path: quantized ones with their matrix's shape, adapters left out."""

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from afina.models.nf4 import NF4Linear
from afina.models.nf4_experts import NF4Experts

MIN_SHARE = 0.01  # of all parameters: smaller ones (norms, biases) are named only if they are 3-D
MAX_NAMED = 4  # parameters named in one sentence


@dataclass(frozen=True)
class BaseParameter:
    """A parameter of the base.

    Attributes:
        path: Its path in the base.
        key: Its identity, equal for tied ones.
        shape: Its shape; that of the matrix where it is quantized.
    """

    path: str
    key: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def pattern(self) -> str:
        """The path with `*` for the indices of layers and experts."""
        return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", self.path)


def base_parameters(
    model: nn.Module, unwrap: Callable[[nn.Module], nn.Module] = lambda module: module
) -> Iterator[BaseParameter]:
    """Yield the parameters in the order of the model, tied ones each time.

    Args:
        model: The base.
        unwrap: Returns the frozen module of one with adapters, and other modules as they are.
    """
    yield from _parameters(model, "", unwrap)


def _parameters(
    module: Any, prefix: str, unwrap: Callable[[nn.Module], nn.Module]
) -> Iterator[BaseParameter]:
    module = unwrap(module)
    own = dict(module.named_parameters(recurse=False))
    if isinstance(module, NF4Linear):
        shape = (module.out_features, module.in_features)
        yield BaseParameter(f"{prefix}weight", id(module.codes), shape)
        own = {} if module.bias is None else {"bias": module.bias}
    elif parametrize.is_parametrized(module):
        wrapped = module.parametrizations
        own |= {name: one.original for name, one in wrapped.items()}
    for name, parameter in own.items():
        yield BaseParameter(f"{prefix}{name}", id(parameter), tuple(parameter.shape))
    for name, child in module.named_children():
        if isinstance(child, NF4Experts):
            yield BaseParameter(f"{prefix}{name}", id(child.codes), child.shape)
        elif name != "parametrizations":
            yield from _parameters(child, f"{prefix}{name}.", unwrap)


def count_by_pattern(parameters: Iterable[BaseParameter]) -> dict[str, int]:
    """Return the elements of parameters by `BaseParameter.pattern`, the largest first."""
    counts: Counter[str] = Counter()
    for one in {one.key: one for one in parameters}.values():
        counts[one.pattern] += one.numel
    return dict(counts.most_common())


def describe_largest(parameters: Collection[BaseParameter], total: int) -> str:
    """Return the largest of `parameters`, and all with 3 or more axes, with their shares."""
    shapes = {one.pattern: one.shape for one in parameters}
    shares = {name: count / total for name, count in count_by_pattern(parameters).items()}
    fused = [name for name in shares if len(shapes[name]) > 2]
    large = [name for name in shares if shares[name] >= MIN_SHARE and name not in fused]
    named = [f"{name} {shares[name]:.1%}" for name in large[:MAX_NAMED]]
    named += [f"{name} {shares[name]:.1%} ({len(shapes[name])}-D parameter)" for name in fused]
    return ", ".join(named)


def describe_unquantized(model: nn.Module, quantized: Collection[str]) -> str:
    """Return which parameters keep their dtype where `quantized` is in 4 bits: modules, experts."""
    codes = {f"{path}.weight" for path in quantized} | set(quantized)
    every = {one.key: one for one in base_parameters(model)}
    others = [one for one in every.values() if one.path not in codes]
    count, total = sum(one.numel for one in others), sum(one.numel for one in every.values())
    share = f"{count:,} of {total:,} parameters ({count / total:.1%})"
    return f"not quantized: {share}: {describe_largest(others, total)}"
