"""Load adapters from disk and attach them to a base.

Reading is strict: a tensor that is missing, left over or of the wrong shape is an error, and names,
shapes and the base are compared before anything is allocated.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from afina.adapters.attach import Adapter, attach, detach, frozen_module
from afina.adapters.registry import get_method
from afina.adapters.saving import layer_tensors, tensor_name, tensor_views
from afina.adapters.target_module import TargetModule
from afina.errors import AdapterError, pluralize
from afina.io.adapter_config import AdapterConfig
from afina.io.adapter_folder import FROZEN_SUFFIX, PREFIX, AdapterFolder
from afina.io.adapter_metadata import RecordedBase
from afina.io.base_match import describe_base, same_base
from afina.io.safetensors import TensorEntry
from afina.models.causal_lm import SCORE, CausalLM
from afina.models.frozen import FrozenModel

MAX_EXCESS = 4  # allocated parameters per stored one; beyond it, shapes cannot match

LOG = logging.getLogger("afina.adapters")


def load_adapter(
    folder: Path, base: FrozenModel, name: str = "adapter", allow_other_base: bool = False
) -> Adapter:
    """Load the adapter in `folder` (or in a run folder) and attach it to `base`.

    Args:
        folder: An adapter folder or a run folder.
        base: The base; a failed load leaves it unchanged.
        name: Name of the adapter in the base.
        allow_other_base: Accept an adapter that records another base.

    Raises:
        AdapterError: a file is damaged, a tensor is missing, unknown or of the wrong shape, or the
            adapter was trained on another base.
    """
    opened = AdapterFolder.open(folder)
    if not allow_other_base:
        check_base(opened, base)
    where = str(opened.weights_file)
    tokenizer = getattr(base, "tokenizer", None)
    config = opened.config(tokenizer)
    check_modules(config, opened.entries, base, where)
    frozen = frozen_copies(config, opened.entries, base)
    tensors = load_file(opened.weights_file)
    for tensor, path in frozen.items():
        check_frozen_copy(tensor, tensors.pop(tensor), base, path, where)
    if config.trainable_tokens:
        _add_tokens(base, config, str(opened.path))
    if SCORE in config.modules_to_save and isinstance(base, CausalLM):
        base.add_score_head()
    adapter = attach(base.model, base.forward_context, name, config)
    try:
        drop_tied_copies(adapter, tensors, base, where)
        load_state(adapter, tensors, where)
        opened.verified_hash(tokenizer)
    except AdapterError:
        detach(base.model, adapter)
        raise
    adapter.train(False)
    return adapter


def check_base(folder: AdapterFolder, base: FrozenModel, require_known: bool = False) -> None:
    """Raise `AdapterError` where the adapter records another base than `base`.

    Hashes are compared where both are known, else names; where neither is known, a warning is
    logged and the shapes decide (`check_modules`).

    Args:
        folder: The adapter.
        base: The loaded base.
        require_known: Raise also where the recorded base cannot be compared.
    """
    recorded = folder.base
    loaded = RecordedBase(name=base.name, hash=base.hash or None)
    same = same_base(recorded, loaded)
    if same is False:
        raise AdapterError(
            "trained on another base",
            where=str(folder.path),
            why=f"trained on {describe_base(recorded)}, this base is {describe_base(loaded)}",
            hint="give the base that it was trained on, or --allow-other-base",
        )
    if same is None and require_known:
        raise AdapterError(
            "the base of this adapter is not known",
            where=str(folder.path),
            why=f"recorded is {describe_base(recorded)}, this base is {describe_base(loaded)}",
        )
    if same is None:
        LOG.info(
            "%s: recorded base %s, this base is %s: compared by shapes only",
            folder.path,
            describe_base(recorded),
            describe_base(loaded),
        )


def check_modules(
    config: AdapterConfig, entries: Mapping[str, TensorEntry], base: FrozenModel, where: str
) -> None:
    """Raise `AdapterError` where a module is not in the base, or needs more than the file holds.

    Nothing is allocated here: an absurd rank is rejected by the number of parameters it needs.
    """
    method = get_method(config.method)
    num_stored = sum(entry.num_elements for entry in entries.values())
    num_needed = 0
    for path in config.target_modules:
        try:
            layer = TargetModule(path, frozen_module(base.model, path))
        except AdapterError as error:
            raise _explain_missing_module(error, path, base, where) from None
        if method.supports(layer):
            num_needed += method.num_parameters(layer, config)
    if num_needed > MAX_EXCESS * num_stored:
        raise AdapterError(
            "the tensors do not have the configured shapes",
            where=where,
            why=f"rank {config.rank:,} on this base needs {num_needed:,} parameters, "
            f"the file holds {num_stored:,}",
        )


def _explain_missing_module(
    error: AdapterError, path: str, base: FrozenModel, where: str
) -> AdapterError:
    """Return the error of a module that the base lacks, naming one whose name ends alike."""
    parts = path.split(".")
    known = [name for name, _ in base.model.named_modules()]
    for start in range(1, len(parts) - 1):
        tail = ".".join(parts[start:])
        match = next((name for name in known if f".{name}".endswith(f".{tail}")), None)
        if match is not None:
            why = f"only the names differ: {path} in the file, {match} in the base"
            return AdapterError(error.what, where=f"{where}: {path}", why=why)
    match = next((name for name in known if name and name.endswith(f".{path}")), None)
    if match is not None:
        why = f"only the names differ: {path} in the file, {match} in the base"
        return AdapterError(error.what, where=f"{where}: {path}", why=why)
    return AdapterError(error.what, where=f"{where}: {path}", why=error.why)


def frozen_copies(
    config: AdapterConfig, entries: Mapping[str, TensorEntry], base: FrozenModel
) -> dict[str, str]:
    """Return the tensors that are copies of the base's weights, with the path of their module.

    PEFT saves the frozen embedding or output layer along with an adapter on it, or on request.
    """
    vocabulary = [base.model.get_input_embeddings()] if _has_vocabulary(base.model) else []
    vocabulary += [base.model.get_output_embeddings()] if vocabulary else []
    found = {}
    for name in entries:
        path, _, kind = name.removeprefix(PREFIX).rpartition(".")
        if name.endswith(FROZEN_SUFFIX):
            found[name] = name.removeprefix(PREFIX).removesuffix(FROZEN_SUFFIX)
        elif kind == "weight" and path not in (*config.target_modules, *config.modules_to_save):
            module = _module_at(base.model, path)
            if module is not None and any(module is layer for layer in vocabulary):
                found[name] = path
    return found


def _has_vocabulary(model: Any) -> bool:
    try:
        return model.get_input_embeddings() is not None
    except (AttributeError, NotImplementedError):
        return False


def _module_at(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return frozen_module(model, path)
    except AdapterError:
        return None


def check_frozen_copy(name: str, tensor: Tensor, base: FrozenModel, path: str, where: str) -> None:
    """Raise `AdapterError` where the tensor `name` is not the weight of the module `path`."""
    weight = TargetModule("", frozen_module(base.model, path)).module.weight
    assert isinstance(weight, Tensor)
    if tensor.shape == weight.shape and torch.equal(tensor.to(weight), weight):
        return
    why = "the adapter brings a changed module of the base"
    if tensor.shape != weight.shape and tensor.dim() == 2:
        why = f"{len(tensor):,} rows in the file, {len(weight):,} in the base: the vocabulary "
        why += "was resized"
    raise AdapterError(f"{name} is not the base's weight", where=where, why=why)


def drop_tied_copies(
    adapter: Adapter, tensors: dict[str, Tensor], base: FrozenModel, where: str
) -> None:
    """Remove tensors of modules that are tied in the base and stored twice, as PEFT does.

    Raises:
        AdapterError: the two copies differ; one tied weight cannot have both values.
    """
    own = tensor_views(adapter)
    for name in sorted(set(tensors) - set(own)):
        twin = _tied_twin(name, own, base)
        if twin is None or twin not in tensors:
            continue
        if not torch.equal(tensors[name], tensors[twin]):
            why = "they are one tied weight in this base, and two different ones in the file"
            raise AdapterError(f"{name} differs from {twin}", where=where, why=why)
        del tensors[name]


def _tied_twin(name: str, own: Mapping[str, Tensor], base: FrozenModel) -> str | None:
    """Return the adapter's tensor whose module shares the weight of the module of `name`."""
    module = _module_at(base.model, name.removeprefix(PREFIX).removesuffix(".weight"))
    weight = getattr(module, "weight", None)
    if weight is None:
        return None
    for other in own:
        twin = _module_at(base.model, other.removeprefix(PREFIX).removesuffix(".weight"))
        if twin is not None and getattr(twin, "weight", None) is weight:
            return other
    return None


def _add_tokens(base: FrozenModel, config: AdapterConfig, where: str) -> None:
    """Add the adapter's tokens to the base; raise `AdapterError` where their ids would differ."""
    if not isinstance(base, CausalLM):
        why = "it is not a causal language model"
        raise AdapterError("tokens of its own on a model without them", where=where, why=why)
    tokens = dict(config.trainable_tokens)
    added = base.add_tokens(sorted(tokens, key=lambda text: tokens[text]))
    if added != tokens:
        why = f"in this base they are {added}: its tokenizer has further tokens"
        raise AdapterError(f"the adapter's tokens are {tokens}", where=where, why=why)


def load_state(adapter: Adapter, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy `tensors`, named as on disk, into the adapter; every name and shape must match."""
    own = matching_views(adapter, {name: t.shape for name, t in tensors.items()}, where)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


def assign_state(adapter: Adapter, tensors: Mapping[str, Tensor], where: str) -> None:
    """Make `tensors`, named as on disk, the adapter's parameters without a copy."""
    matching_views(adapter, {name: t.shape for name, t in tensors.items()}, where)
    for layer in adapter.layers.values():
        for name, tensor in layer_tensors(layer).items():
            key = tensor_name(layer, name)
            if key in tensors:  # a tied one is stored once
                tensor.data = tensors[key].view(tensor.shape)


def matching_views(
    adapter: Adapter, shapes: Mapping[str, tuple[int, ...]], where: str
) -> dict[str, Tensor]:
    """Return views of the adapter's tensors by name on disk.

    Raises:
        AdapterError: `shapes`, those of the file by name, has other names or other shapes.
    """
    own = tensor_views(adapter)
    missing, unknown = sorted(set(own) - set(shapes)), sorted(set(shapes) - set(own))
    if missing or unknown:
        kind = "missing" if missing else "without a module"
        found = missing or unknown
        raise AdapterError(
            f"{kind}: {pluralize(len(found), 'tensor')}, the first: {found[0]}",
            where=where,
            why="the adapter does not fit this base or its configuration",
        )
    for name, parameter in own.items():
        if tuple(parameter.shape) != tuple(shapes[name]):
            why = f"{tuple(shapes[name])} in the file, {tuple(parameter.shape)} in the model"
            raise AdapterError(f"{name} has the wrong shape", where=where, why=why)
    return own
