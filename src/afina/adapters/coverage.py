"""Which of a base's parameters the target modules of an adapter reach, and which they do not.

Methods on matrices do not reach parameters outside linear modules, and only LoRA reaches the
experts that transformers fuses into 3-D parameters. `afina plan` and the model card report them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from afina.adapters.modules import ModuleWithAdapters
from afina.adapters.registry import get_method
from afina.io.adapter_config import AdapterConfig
from afina.models.parameters import (
    BaseParameter,
    base_parameters,
    count_by_pattern,
    describe_largest,
)


@dataclass(frozen=True)
class TargetCoverage:
    """Elements of the base's parameters in target modules, and the other parameters.

    Attributes:
        reached: Elements in target modules.
        total: Elements of the base; tied parameters count once.
        unreached: The other parameters.
    """

    reached: int
    total: int
    unreached: tuple[BaseParameter, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return what results and run records contain of it."""
        return {
            "reached_parameters": self.reached,
            "unreached": count_by_pattern(self.unreached),
            "coverage": self.describe(),
        }

    def describe(self) -> str:
        """Return one sentence with the reached share and the largest other parameters."""
        text = f"target modules have {self.reached / self.total:.1%} of the base's parameters"
        others = describe_largest(self.unreached, self.total)
        return f"{text}; not reached: {others}" if others else text


def frozen_parameters(model: nn.Module) -> Iterator[BaseParameter]:
    """Yield the base's parameters, without adapters, tied ones each time."""
    return base_parameters(model, lambda m: m.base if isinstance(m, ModuleWithAdapters) else m)


def count_base_parameters(model: nn.Module) -> int:
    """Return the number of elements of the base, quantized ones included, tied ones once."""
    return sum({one.key: one.numel for one in frozen_parameters(model)}.values())


def target_coverage(model: nn.Module, config: AdapterConfig) -> TargetCoverage:
    """Return which parameters of the base `model` the targets of an adapter reach.

    A method on matrices reaches the weight of a target module, others and `modules_to_save` all of
    its parameters; trainable tokens reach rows, which are not counted.
    """
    complete = set(config.modules_to_save)
    if get_method(config.method).supported_modules == "any":
        complete |= set(config.target_modules)
    names = {f"{path}.weight" for path in config.target_modules} | complete
    names |= set(config.target_modules)  # parameters of fused experts
    every: dict[int, BaseParameter] = {}
    reached: dict[int, int] = {}
    for one in frozen_parameters(model):
        every.setdefault(one.key, one)
        if one.path in names or one.path.rpartition(".")[0] in complete:
            reached[one.key] = one.numel
    others = tuple(one for key, one in every.items() if key not in reached)
    total = sum(one.numel for one in every.values())
    return TargetCoverage(sum(reached.values()), total, others)
