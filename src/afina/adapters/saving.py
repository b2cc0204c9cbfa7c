"""Write adapters: PEFT's two files, and afina.json with what PEFT's format cannot hold.

adapter_config.json          what PEFT, vLLM and llama.cpp's converter read
adapter_model.safetensors    the tensors, under PEFT's names
afina.json                   full configuration, hashes of adapter and base, lineage
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import afina
from afina.adapters.attach import Adapter, ModuleWithAdapters, frozen_module, vocabulary_layers
from afina.adapters.base import AdapterLayer
from afina.adapters.coverage import frozen_parameters
from afina.adapters.registry import get_method
from afina.io.adapter_folder import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from afina.io.adapter_metadata import FORMAT_VERSION, METADATA_FILE
from afina.io.atomic import atomic_directory, write_json
from afina.io.hashing import hash_adapter_file
from afina.io.peft_config import peft_config_json
from afina.models.causal_lm import SCORE, CausalLM
from afina.models.frozen import FrozenModel


def tensors_of(adapter: Adapter) -> dict[str, Tensor]:
    """Return the adapter's tensors on the CPU under their names on disk, a tied one once."""
    return {name: view.cpu().contiguous() for name, view in tensor_views(adapter).items()}


def tensor_views(adapter: Adapter) -> dict[str, Tensor]:
    """Return views of the adapter's tensors in their shapes on disk, by name, a tied one once."""
    seen: set[int] = set()
    views: dict[str, Tensor] = {}
    for layer in adapter.layers.values():
        shapes = layer.tensor_shapes(layer.layer, adapter.config)
        for name, tensor in layer_tensors(layer).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                shape = shapes.get(name, tensor.shape)
                views[tensor_name(layer, name)] = tensor.detach().view(shape)
    return views


def layer_tensors(layer: AdapterLayer) -> dict[str, Tensor]:
    """Return an adapter layer's parameters, and what restarts have merged into it."""
    restart = {} if layer.restart_delta is None else {"accumulated": layer.restart_delta}
    return dict(layer.named_parameters()) | restart


def tensor_name(layer: AdapterLayer, name: str) -> str:
    """Return the name on disk of the parameter `name` of an adapter layer."""
    return (
        f"{PREFIX}{layer.disk_path}.{layer.names_on_disk(layer.layer).get(name, f'{name}.weight')}"
    )


def save_adapter(
    adapter: Adapter, base: FrozenModel, folder: Path, metadata: Mapping[str, Any] | None = None
) -> str:
    """Write the adapter to `folder`, completely or not at all.

    Args:
        adapter: The adapter.
        base: The base that it is attached to.
        folder: The folder, which is replaced where it exists.
        metadata: Further keys of afina.json.

    Returns:
        The adapter's hash.
    """
    with atomic_directory(folder) as new:
        save_file(tensors_of(adapter), new / WEIGHTS_FILE, {"format": "pt"})
        config = adapter.config.canonical()
        digest = hash_adapter_file(new / WEIGHTS_FILE, config)
        write_json(new / CONFIG_FILE, peft_config(adapter, base))
        is_nf4 = getattr(base, "quantization", "none") == "nf4"
        origin = {
            "name": base.name,
            "revision": base.revision,
            "hash": base.hash,
            "remote_code": base.remote_code,
            "storage": "nf4" if is_nf4 else "plain",
        }
        about = {
            "format_version": FORMAT_VERSION,
            "afina": afina.__version__,
            "hash": digest,
            "spec": config,
            "base": origin,
        }
        write_json(new / METADATA_FILE, about | {"parents": []} | dict(metadata or {}))
    return digest


def peft_config(adapter: Adapter, base: FrozenModel) -> dict[str, Any]:
    """Return the adapter_config.json with which PEFT builds the same adapter."""
    config = adapter.config
    vocabulary = vocabulary_layers(base.model) if config.trainable_tokens else []
    skipped = (*vocabulary, *config.modules_to_save)
    paths = [path for path in adapter.layers if path not in skipped]
    fused = [path for path in paths if adapter.layers[path].layer.is_experts]
    paths = [path for path in paths if path not in fused]
    names = sorted({path.rpartition(".")[2] for path in paths})
    all_paths = [
        path
        for path, _ in base.model.named_modules()
        if path.rpartition(".")[2] in names and not _is_inside_wrapper(base.model, path)
    ]
    stored = {frozen_module(base.model, path) for path in paths}
    is_restarted = bool(config.method_settings.get("restarts"))
    return peft_config_json(
        config,
        None if is_restarted else get_method(config.method).peft_fields,
        target_modules=names if sorted(all_paths) == sorted(paths) else paths,
        target_parameters=_parameter_names(base.model, fused),
        task_type=_task_type(adapter, base),
        base=base.name,
        revision=base.revision,
        is_transposed=bool(stored)
        and all(isinstance(module, Conv1D | nn.Embedding) for module in stored),
        token_layers=[path.rpartition(".")[2] for path in vocabulary],
    )


def _parameter_names(model: nn.Module, paths: list[str]) -> list[str]:
    """Return PEFT's names of these parameters of fused experts: short where they are all."""
    names = sorted({".".join(path.split(".")[-2:]) for path in paths})
    every = [one.path for one in frozen_parameters(model) if one.path.endswith(tuple(names))]
    return names if sorted(every) == sorted(paths) else paths


def _task_type(adapter: Adapter, base: FrozenModel) -> str | None:
    """Return PEFT's task type; a decoder with a score head is a classifier with num_labels=1."""
    if isinstance(base, CausalLM) and SCORE in adapter.config.modules_to_save:
        return "SEQ_CLS"
    return "CAUSAL_LM" if hasattr(base.model, "prepare_inputs_for_generation") else None


def _is_inside_wrapper(model: nn.Module, path: str) -> bool:
    """Return whether `path` is inside an adapted module: its frozen part or an adapter layer."""
    parent = path.rpartition(".")[0]
    while parent:
        if isinstance(model.get_submodule(parent), ModuleWithAdapters):
            return True
        parent = parent.rpartition(".")[0]
    return False
