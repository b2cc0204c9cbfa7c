"""Target modules: from names, patterns and groups in the settings to module paths."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

from torch import nn
from torch.nn.utils import parametrize

from afina.adapters.attach import ModuleWithAdapters, frozen_experts
from afina.adapters.coverage import frozen_parameters
from afina.adapters.target_module import ExpertMatrices, FreeParameter, TargetModule
from afina.errors import SettingsError, did_you_mean
from afina.io.name_patterns import NamePattern
from afina.models.experts import expert_matrices

Value = TypeVar("Value")
GROUPS = ("all-linear", "experts", "all", "norms", "embeddings")


def matches(pattern: str, path: str) -> bool:
    """Return whether `pattern`, a module's name or a regular expression, matches `path`."""
    if path == pattern or path.endswith("." + pattern):
        return True
    return _parsed(pattern).fullmatch(path)


@lru_cache(maxsize=1024)
def _parsed(pattern: str) -> NamePattern:
    return NamePattern(pattern, "pattern", SettingsError)


def match_patterns(
    values: Mapping[str, Value], paths: Iterable[str], where: str
) -> dict[str, Value]:
    """Return the values of patterns by path; the last matching pattern wins.

    Raises:
        SettingsError: a pattern matches no path.
    """
    paths = list(paths)
    result: dict[str, Value] = {}
    for pattern, value in values.items():
        hits = [path for path in paths if matches(pattern, path)]
        if not hits:
            raise SettingsError(
                f"{pattern!r} matches no adapted module",
                where=where,
                hint=did_you_mean(pattern, leaf_names(paths)),
            )
        result |= dict.fromkeys(hits, value)
    return result


def leaf_names(paths: Iterable[str]) -> set[str]:
    """Return the last parts of the paths: q_proj, down_proj, ..."""
    return {path.rpartition(".")[2] for path in paths}


def layer_index(path: str) -> int | None:
    """Return the index of the layer of `path`: 3 for model.layers.3.mlp.up_proj; None outside."""
    numbers = re.findall(r"\.(\d+)\.", path + ".")
    return int(numbers[0]) if numbers else None


def resolve_layers(layers: str | Sequence[int] | None, count: int) -> set[int] | None:
    """Return the indices that `layers` selects of `count` layers; None: all.

    Args:
        layers: Indices (negative ones from the end), "last:4", "first:4", or None for all.
        count: Number of layers.

    Raises:
        SettingsError: the value is malformed, or a layer does not exist.
    """
    if layers is None:
        return None
    if isinstance(layers, str):
        side, _, number = layers.partition(":")
        if side not in ("last", "first") or not number.isdigit() or not 1 <= int(number) <= count:
            raise SettingsError(
                f"layers {layers!r} is neither a list of indices nor last:N or first:N",
                hint=f"--layers last:N, with N from 1 to {count}",
            )
        return set(range(count - int(number), count)) if side == "last" else set(range(int(number)))
    outside = [n for n in layers if not -count <= n < count]
    if outside:
        raise SettingsError(
            f"the model has no layer {outside[0]}",
            where="layers",
            why=f"its layers are 0 to {count - 1}",
        )
    return {n % count for n in layers}


def resolve_target_modules(
    model: nn.Module,
    targets: str | Sequence[str],
    layers: str | Sequence[int] | None,
    any_kind: bool,
    experts: bool = False,
) -> tuple[str, ...]:
    """Return the paths of the modules to adapt, in the order of the model.

    Args:
        model: The base.
        targets: "all-linear" (all linear modules in the layers), "experts" (the matrices of a
            mixture's experts), names ("q_proj"), regular expressions, and with `any_kind` also
            "all", "norms" and "embeddings".
        layers: Selected layers, see `resolve_layers`.
        any_kind: Whether the method supports modules of any kind, and parameters.
        experts: Whether it supports the parameters of fused experts; the name of their module
            selects all of them.

    Raises:
        SettingsError: a target matches no module, or none is in the selected layers.
    """
    candidates = _candidates(model, any_kind, experts)
    blocks = {number for path in candidates if (number := layer_index(path)) is not None}
    chosen = resolve_layers(layers, max(blocks, default=-1) + 1)
    wanted: set[str] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        hits = _hits(target, candidates, model)
        if not hits:
            raise _unmatched(target, candidates, model, any_kind)
        wanted |= hits
    paths = tuple(
        p for p in candidates if p in wanted and (chosen is None or layer_index(p) in chosen)
    )
    if not paths:
        raise SettingsError(
            "no module is selected",
            where="layers",
            why="no target module is in the selected layers",
        )
    return paths


def _unmatched(
    target: str, candidates: Mapping[str, nn.Module], model: nn.Module, any_kind: bool
) -> SettingsError:
    """Return the error of a target that no supported module matches."""
    for one in frozen_parameters(model):
        if (target not in GROUPS or target == "experts") and (
            matches(target, one.path) or matches(target, one.path.rpartition(".")[0])
        ):
            is_fused = frozen_experts(model, one.path)[0] is not None
            return SettingsError(
                f"{target!r} is not a module with one weight matrix, which the method needs",
                where="target_modules",
                why=f"{one.path} is a parameter of shape {one.shape}",
                hint=f"--method {'lora or ' * is_fused}full, or other target modules",
            )
    if target == "experts":
        what = "the base has no experts that the method can adapt"
        return SettingsError(what, where="target_modules", hint="--target-modules all-linear")
    why = None if any_kind or target not in GROUPS else f"{target!r} needs --method full"
    return SettingsError(
        f"{target!r} matches no module that can be adapted",
        where="target_modules",
        why=why,
        hint=did_you_mean(target, sorted(leaf_names(candidates))),
    )


def _candidates(model: Any, any_kind: bool, experts: bool) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if (path.startswith(inside) and inside) or ".parametrizations" in f".{path}":
            continue
        if isinstance(module, ModuleWithAdapters):
            inside, module = (path + ".",), module.base
        own = any(True for _ in module.parameters(recurse=False))
        leaf = not any(
            True
            for child in module.children()
            for _ in child.parameters()
            if child not in _parametrizations(module)
        )
        if TargetModule(path, module).is_matrix or (any_kind and own and leaf):
            found[path] = module
        elif experts and (names := expert_matrices(module)):
            found |= {
                f"{path}.{name}": ExpertMatrices(getattr(module, name), module.is_transposed)
                for name in names
            }
        elif any_kind:  # parameters next to modules: a class token, positions, a scale
            found |= {
                f"{path}.{name}".lstrip("."): FreeParameter(value) for name, value in _loose(module)
            }
    return found


def _parametrizations(module: Any) -> list[nn.Module]:
    """Return the child that is no module of the model but the wrapper of adapted parameters."""
    return [module.parametrizations] if parametrize.is_parametrized(module) else []


def _loose(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the module's own parameters, with or without adapters on them."""
    wrapped: Any = module.parametrizations if _parametrizations(module) else {}
    over = {name: parametrization.original for name, parametrization in wrapped.items()}
    return [*module.named_parameters(recurse=False), *over.items()]


def _hits(target: str, candidates: Mapping[str, nn.Module], model: Any) -> set[str]:
    if target == "all":
        return set(candidates)
    if target == "all-linear":
        # a network that is no sequence of layers has no indices
        blocks = any(layer_index(p) is not None for p in candidates)
        return {
            p
            for p, m in candidates.items()
            if TargetModule(p, m).is_matrix
            and not isinstance(m, nn.Embedding)
            and (layer_index(p) is not None or not blocks)
        }
    if target == "norms":
        return {p for p, m in candidates.items() if "norm" in type(m).__name__.lower()}
    if target == "embeddings":
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        return {p for p, m in candidates.items() if isinstance(m, nn.Embedding) or m is head}
    if target == "experts":
        return {p for p in candidates if "experts" in p.split(".")}
    owners = {
        p
        for p, m in candidates.items()
        if isinstance(m, ExpertMatrices) and matches(target, _owner(p))
    }
    return owners | {p for p in candidates if matches(target, p)}


def _owner(path: str) -> str:
    return path.rpartition(".")[0]
