"""The configuration of an adapter: method, target modules, ranks, and what else makes its identity.

An adapter's identity is the SHA-256 of its tensors' hash and of `AdapterConfig.canonical()`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CANONICAL_KEYS = {  # key in afina.json -> attribute of `AdapterConfig`
    "method": "method",
    "targets": "target_modules",
    "rank": "rank",
    "alpha": "alpha",
    "scaling": "scaling",
    "dropout": "dropout",
    "ranks": "rank_pattern",
    "alphas": "alpha_pattern",
    "modules": "modules_to_save",
    "invocation": "invocation",
    "tokens": "trainable_tokens",
    "options": "method_settings",
}
TUPLE_KEYS = ("targets", "modules", "invocation")
WRAPPER_SUFFIX = ".base_layer"  # of PEFT's path of a wrapped module
MAPPING_KEYS = ("ranks", "alphas", "tokens", "options")


@dataclass(frozen=True)
class AdapterConfig:
    """Everything about an adapter but its tensors; both together are the adapter's identity.

    Attributes:
        method: Name of a registered adapter method, such as "lora".
        target_modules: Resolved paths of the adapted modules.
        rank: Rank of every module that `rank_pattern` does not name.
        alpha: Scaling numerator of every module that `alpha_pattern` does not name.
        scaling: "lora" (alpha / r) or "rslora" (alpha / sqrt(r)).
        dropout: Dropout probability of the adapter's input, 0 to 1.
        rank_pattern: Ranks that differ, by module path.
        alpha_pattern: Alphas that differ, by module path.
        modules_to_save: Paths of modules trained in full, such as a classification head.
        invocation: aLoRA token ids; the adapter is active after their last occurrence.
        trainable_tokens: Token texts with trained embedding rows, and their ids.
        method_settings: Settings of one method only, such as MoRA's operator.
    """

    method: str
    target_modules: tuple[str, ...]
    rank: int = 8
    alpha: float = 16.0
    scaling: str = "lora"
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    invocation: tuple[int, ...] = ()
    trainable_tokens: Mapping[str, int] = field(default_factory=dict)
    method_settings: Mapping[str, Any] = field(default_factory=dict)

    def rank_of(self, path: str) -> int:
        """Return the rank at the module `path`."""
        return self.rank_pattern.get(path, self.rank)

    def wrapper_path(self, path: str) -> str:
        """Return the path on disk of the tensors at `path`, a parameter of fused experts.

        As in PEFT, each adapted parameter of a module wraps the module again: tensors of the last
        one have the module's own path, those of earlier ones end in .base_layer.
        """
        module = path.rpartition(".")[0]
        own = [one for one in self.target_modules if one.rpartition(".")[0] == module]
        return module + WRAPPER_SUFFIX * (len(own) - 1 - own.index(path))

    def scale_of(self, path: str) -> float:
        """Return the factor of the update at `path`: alpha / r, or alpha / sqrt(r) for rsLoRA.

        References:
            rsLoRA: arXiv 2312.03732.
        """
        rank, alpha = self.rank_of(path), self.alpha_pattern.get(path, self.alpha)
        return alpha / (rank**0.5 if self.scaling == "rslora" else rank)

    def canonical(self) -> dict[str, Any]:
        """Return plain values under the keys of afina.json, which the adapter's hash is of.

        The keys never change: another name would change the hash of every adapter.
        """
        values = {field: getattr(self, name) for field, name in CANONICAL_KEYS.items()}
        lists = {name: list(values[name]) for name in TUPLE_KEYS}
        maps = {name: dict(values[name]) for name in MAPPING_KEYS}
        return values | lists | maps

    @classmethod
    def from_canonical(cls, values: Mapping[str, Any]) -> "AdapterConfig":
        """Return the configuration that `canonical` wrote."""
        tuples = {name: tuple(values.get(name, ())) for name in TUPLE_KEYS}
        return cls(**{CANONICAL_KEYS[name]: value for name, value in {**values, **tuples}.items()})
