"""Adapters on disk: PEFT's two files, and beside them what PEFT's format cannot say.

    adapter_config.json          what PEFT, vLLM and llama.cpp's converter read
    adapter_model.safetensors    the tensors, under PEFT's names
    afina.json                   format version, spec, hashes of adapter and base, lineage

An adapter is its content: `hash` is that of its tensors and its spec; names are labels. Reading is strict: a key
that is missing, left over or of the wrong shape is an error.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import afina
from afina.adapters.attach import (
    Adapter,
    ModuleWithAdapters,
    attach,
    detach,
    frozen_module,
    vocabulary_layers,
)
from afina.adapters.base import AdapterConfig, AdapterLayer
from afina.adapters.registry import get_method, registered_methods
from afina.adapters.target_module import TargetModule
from afina.errors import AdapterError, BaseError, pluralize
from afina.io.atomic import atomic_directory, write_json
from afina.io.migrations import migrate_settings
from afina.io.safetensors import check_safetensors, hash_tensor_files
from afina.models.causal_lm import SCORE, CausalLM
from afina.models.frozen import FrozenModel

FORMAT_VERSION = 1
PREFIX = "base_model.model."
CONFIG, WEIGHTS, METADATA_FILE = "adapter_config.json", "adapter_model.safetensors", "afina.json"
# what a PEFT configuration may say that changes the result and that we do not (yet) follow
UNSUPPORTED_PEFT_KEYS = {
    "bias": "none",
    "lora_bias": False,
    "layer_replication": None,
    "target_parameters": None,
    "use_qalora": False,
    "use_bdlora": None,
    "kasa_config": None,
    "arrow_config": None,
    "monteclora_config": None,
}
FIRST = (".lora_A.weight", ".lora_embedding_A")  # one of these names every adapted layer
# the starts of PEFT that leave the base as it was; the others (pissa, olora, ...) take something out of it
SUPPORTED_INITS = (True, False, "gaussian", "eva", "orthogonal")


def tensors_of(adapter: Adapter) -> dict[str, Tensor]:
    """The adapter's tensors under their names on disk; a tied one once."""
    return {name: view.cpu().contiguous() for name, view in _views(adapter).items()}


def _views(adapter: Adapter) -> dict[str, Tensor]:
    """The adapter's own tensors, each seen in its shape on disk; a tied one once."""
    seen: set[int] = set()
    views: dict[str, Tensor] = {}
    for path, delta in adapter.layers.items():
        names = delta.names_on_disk(delta.layer)
        shapes = delta.tensor_shapes(delta.layer, adapter.config)
        for name, tensor in _own(delta).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                key = names.get(name, f"{name}.weight")
                shape = shapes.get(name, tensor.shape)
                views[f"{PREFIX}{path}.{key}"] = tensor.detach().view(shape)
    return views


def _own(delta: AdapterLayer) -> dict[str, Tensor]:
    """Parameters, and what restarts have accumulated."""
    accumulated = {} if delta.restart_delta is None else {"accumulated": delta.restart_delta}
    return dict(delta.named_parameters()) | accumulated


def hash_adapter_file(weights: Path, spec: Mapping[str, Any]) -> str:
    """Identity of an adapter: sha256 (hex) over the hash of its tensors and its spec."""
    return adapter_hash(hash_tensor_files([weights]), spec)


def adapter_hash(tensors: str, spec: Mapping[str, Any]) -> str:
    """The same, from the hash of its tensors."""
    return hashlib.sha256((tensors + json.dumps(spec, sort_keys=True)).encode()).hexdigest()


def save_adapter(
    adapter: Adapter, base: FrozenModel, folder: Path, story: Mapping[str, Any] | None = None
) -> str:
    """Write the adapter to `folder`, whole or not at all; returns its hash. `story` is added to afina.json."""
    with atomic_directory(folder) as new:
        save_file(tensors_of(adapter), new / WEIGHTS, {"format": "pt"})
        spec = adapter.config.canonical()
        digest = hash_adapter_file(new / WEIGHTS, spec)
        write_json(new / CONFIG, peft_config(adapter, base))
        origin = {
            "name": base.name,
            "revision": base.revision,
            "hash": base.hash,
            "remote_code": base.remote_code,
            "storage": "nf4" if getattr(base, "quantization", "none") == "nf4" else "plain",
        }
        about = {
            "format_version": FORMAT_VERSION,
            "afina": afina.__version__,
            "hash": digest,
            "spec": spec,
            "base": origin,
        }
        write_json(new / METADATA_FILE, about | {"parents": []} | dict(story or {}))
    return digest


def peft_config(adapter: Adapter, base: FrozenModel) -> dict[str, Any]:
    """The adapter_config.json that makes PEFT build the same adapter."""
    spec = adapter.config
    rows = vocabulary_layers(base.model) if spec.trainable_tokens else []
    paths = [path for path in adapter.layers if path not in (*rows, *spec.modules_to_save)]
    leaves = sorted({path.rpartition(".")[2] for path in paths})
    everywhere = [
        p
        for p, _ in base.model.named_modules()
        if p.rpartition(".")[2] in leaves and not _inside(base.model, p)
    ]
    transposed = {
        isinstance(frozen_module(base.model, p), Conv1D | nn.Embedding) for p in paths
    } == {True}
    known = None if spec.method_settings.get("restarts") else get_method(spec.method).peft_fields
    shared = {
        "peft_type": "LORA" if known is not None else f"AFINA_{spec.method.upper()}",
        "task_type": _task_type(adapter, base),
        "base_model_name_or_path": base.name,
        "revision": base.revision,
        "target_modules": leaves if sorted(everywhere) == sorted(paths) else paths,
        "modules_to_save": list(spec.modules_to_save) or None,
        "inference_mode": True,
    }
    if known is None:
        return shared
    return shared | {
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout,
        "use_rslora": spec.scaling == "rslora",
        "rank_pattern": {
            path.replace(".", r"\."): rank for path, rank in spec.rank_pattern.items()
        },
        "alpha_pattern": {
            path.replace(".", r"\."): alpha for path, alpha in spec.alpha_pattern.items()
        },
        "bias": "none",
        "fan_in_fan_out": transposed,
        "alora_invocation_tokens": list(spec.invocation) or None,
        "init_lora_weights": True,
        "trainable_token_indices": {
            path.rpartition(".")[2]: sorted(spec.trainable_tokens.values()) for path in rows
        }
        or None,
        **known,
    }


def _task_type(adapter: Adapter, base: FrozenModel) -> str | None:
    """What PEFT would do with it. A decoder with a score is a classifier of one class (num_labels=1): a reward model."""
    if isinstance(base, CausalLM) and SCORE in adapter.config.modules_to_save:
        return "SEQ_CLS"
    return "CAUSAL_LM" if hasattr(base.model, "prepare_inputs_for_generation") else None


def _inside(model: nn.Module, path: str) -> bool:
    """Whether `path` is within an adapted module (its frozen part, a delta), not a place of the model itself."""
    parent = path.rpartition(".")[0]
    while parent:
        if isinstance(model.get_submodule(parent), ModuleWithAdapters):
            return True
        parent = parent.rpartition(".")[0]
    return False


def adapter_folder(path: Path) -> Path:
    """The adapter's folder, given it or the run folder that holds it."""
    for folder in (path, path / "adapter"):
        if (folder / CONFIG).is_file():
            return folder
    raise AdapterError(
        "no adapter here",
        where=str(path),
        hint="give a run folder, or one with adapter_config.json",
    )


def read_json_object(file: Path) -> dict[str, Any]:
    """A JSON object from disk; raises `AdapterError` where it is missing or damaged."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError("cannot be read", where=str(file), why=str(error)) from error
    if not isinstance(content, dict):
        raise AdapterError("not a JSON object", where=str(file))
    return content


def read_metadata(folder: Path) -> dict[str, Any]:
    """afina.json of an adapter, or an empty one for PEFT's; raises where its format is newer than ours."""
    if not (folder / METADATA_FILE).is_file():
        return {}
    story = read_json_object(folder / METADATA_FILE)
    if story.get("format_version", 0) > FORMAT_VERSION:
        why = f"its format is version {story['format_version']}, this afina reads up to {FORMAT_VERSION}"
        raise AdapterError(
            "made by a newer afina",
            where=str(folder / METADATA_FILE),
            why=why,
            hint="pip install -U afina",
        )
    return story


def read_run_record(folder: Path) -> dict[str, Any]:
    """run.json of a run, or an empty one where there is none; raises `AdapterError` where its format is newer than ours."""
    file = folder / "run.json"
    story = read_json_object(file) if file.is_file() else {}
    if story.get("format_version", 0) > FORMAT_VERSION:
        why = f"its format is version {story['format_version']}, this afina reads up to {FORMAT_VERSION}"
        raise AdapterError(
            "written by a newer afina", where=str(file), why=why, hint="pip install -U afina"
        )
    if "settings" in story:
        story["settings"] = migrate_settings(story["settings"])
    return story


def read_adapter_config(folder: Path, names: list[str], tokenizer: Any = None) -> AdapterConfig:
    """The spec of an adapter on disk, from afina.json or from PEFT's configuration and the tensors' `names`.

    PEFT gives tokens with rows of their own by their numbers; `tokenizer` tells what they are.
    """
    story = read_metadata(folder)
    if "spec" in story:
        return AdapterConfig.from_canonical(story["spec"])
    config = read_json_object(folder / CONFIG)
    where = str(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise AdapterError(
            f"adapters of type {config.get('peft_type')!r} are not known", where=where
        )
    for key, neutral in UNSUPPORTED_PEFT_KEYS.items():
        if config.get(key, neutral) not in (neutral, None, [], {}, False):
            raise AdapterError(f"{key}={config[key]!r} is not supported yet", where=where)
    if (start := config.get("init_lora_weights", True)) not in SUPPORTED_INITS:
        why = "it acts on a base that this start has changed"
        hint = "in PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        raise AdapterError(
            f"init_lora_weights={start!r} is not supported", where=where, why=why, hint=hint
        )
    paths = tuple(
        n.removeprefix(PREFIX).removesuffix(s) for n in names for s in FIRST if n.endswith(s)
    )
    told = {
        name: kind.peft_fields
        for name, kind in registered_methods().items()
        if kind.peft_fields is not None
    }
    return AdapterConfig(
        method=next(
            name
            for name, marks in told.items()
            if all(bool(config.get(k)) == v for k, v in marks.items())
        ),
        target_modules=paths,
        rank=config["r"],
        alpha=config["lora_alpha"],
        scaling="rslora" if config.get("use_rslora") else "lora",
        dropout=config.get("lora_dropout", 0.0),
        rank_pattern=_from_pattern(config.get("rank_pattern"), paths),
        alpha_pattern=_from_pattern(config.get("alpha_pattern"), paths),
        modules_to_save=_whole_modules(config.get("modules_to_save") or (), names),
        invocation=tuple(config.get("alora_invocation_tokens") or ()),
        trainable_tokens=_own_tokens(config.get("trainable_token_indices"), tokenizer, where),
    )


def _own_tokens(indices: Any, tokenizer: Any, where: str) -> dict[str, int]:
    """PEFT's trainable tokens by name: the same list for the embedding and the output layer, where both are told."""
    lists = list(indices.values()) if isinstance(indices, dict) else [indices] if indices else []
    if any(sorted(other) != sorted(lists[0]) for other in lists):
        raise AdapterError(
            "different tokens are trained in the embedding and the output layer", where=where
        )
    names = (
        {}
        if not lists
        else {tokenizer.convert_ids_to_tokens(number): number for number in sorted(lists[0])}
    )
    if None in names:
        why = f"the vocabulary ends at {len(tokenizer)}"
        raise AdapterError(
            f"token {names[None]} has no name in the base's tokenizer", where=where, why=why
        )
    return names


def _whole_modules(told: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """Paths of the layers that PEFT's `modules_to_save` brings whole, by the tensors' names."""
    owners = dict.fromkeys(name.removeprefix(PREFIX).rpartition(".")[0] for name in names)
    return tuple(path for path in owners if any(f".{module}." in f".{path}." for module in told))


def _from_pattern(patterns: Mapping[str, Any] | None, paths: tuple[str, ...]) -> dict[str, Any]:
    """PEFT's patterns by path: the first pattern that fits the end of a path wins, as there."""
    import re

    result = {}
    for path in paths:
        for pattern, value in (patterns or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                result[path] = value
                break
    return result


def load_adapter(
    folder: Path, base: FrozenModel, name: str = "adapter", allow_other_base: bool = False
) -> Adapter:
    """Attach the adapter in `folder` (or in a run folder) to `base`.

    Raises `AdapterError` where a tensor is missing, unknown or of the wrong shape, or where the adapter belongs to
    another base, unless `allow_other_base`.
    """
    folder = adapter_folder(folder)
    if not (folder / WEIGHTS).is_file():
        hint = (
            "only safetensors are read; load it in PEFT and save it again"
            if list(folder.glob("*.bin"))
            else None
        )
        raise AdapterError("no adapter_model.safetensors", where=str(folder), hint=hint)
    try:
        check_safetensors(folder / WEIGHTS)
    except BaseError as error:
        raise AdapterError(
            error.what, where=error.where, why=error.why, hint="copy the adapter again"
        ) from error
    made_for = read_metadata(folder).get("base", {}).get("hash")
    if made_for and base.hash and made_for != base.hash and not allow_other_base:
        raise AdapterError(
            "made for another base",
            where=str(folder),
            why=f"base hash {made_for[:12]}, this one is {base.hash[:12]}",
            hint="give the base that it was trained on, or --allow-other-base",
        )
    tensors = _without_frozen(load_file(folder / WEIGHTS), base, str(folder / WEIGHTS))
    spec = read_adapter_config(folder, list(tensors), getattr(base, "tokenizer", None))
    if spec.trainable_tokens:
        _make_room(base, spec, str(folder))
    if SCORE in spec.modules_to_save and isinstance(base, CausalLM):
        base.add_score_head()
    adapter = attach(base.model, base.forward_context, name, spec)
    try:
        load_state(adapter, tensors, str(folder / WEIGHTS))
    except AdapterError:
        detach(base.model, adapter)
        raise
    adapter.train(False)
    return adapter


def _make_room(base: FrozenModel, spec: AdapterConfig, where: str) -> None:
    """Give the base the adapter's tokens; raises `AdapterError` where they would get other numbers than it trained with."""
    if not isinstance(base, CausalLM):
        raise AdapterError(
            "tokens of its own, on a model without a vocabulary to answer in", where=where
        )
    names = sorted(spec.trainable_tokens, key=lambda name: spec.trainable_tokens[name])
    if (given := base.add_tokens(names)) != dict(spec.trainable_tokens):
        why = (
            f"here they would be {given}: the base's tokenizer has tokens that it did not have then"
        )
        raise AdapterError(
            f"the adapter's tokens are {dict(spec.trainable_tokens)}", where=where, why=why
        )


def _without_frozen(tensors: dict[str, Tensor], base: FrozenModel, where: str) -> dict[str, Tensor]:
    """The tensors without the frozen weights that PEFT saves along with adapted embeddings and output layers.

    Raises `AdapterError` where such a weight is not the base's own: it was trained, or the vocabulary resized.
    """
    suffix = ".base_layer.weight"
    for name in [name for name in tensors if name.endswith(suffix)]:
        frozen = TargetModule(
            "", frozen_module(base.model, name.removeprefix(PREFIX).removesuffix(suffix))
        ).module.weight
        brought = tensors.pop(name)
        if not isinstance(frozen, Tensor) or not torch.equal(brought.to(frozen), frozen):
            why = "the adapter brings a changed layer of the base"
            raise AdapterError(f"{name} is not the base's weight", where=where, why=why)
    return tensors


def load_state(adapter: Adapter, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy `tensors`, named as on disk, into the adapter; every name and shape must fit."""
    own = _fitting(adapter, tensors, where)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


def assign_state(adapter: Adapter, tensors: Mapping[str, Tensor], where: str) -> None:
    """Make `tensors`, named as on disk, the adapter's own numbers, without a copy; every name and shape must fit."""
    _fitting(adapter, tensors, where)
    for path, delta in adapter.layers.items():
        names = delta.names_on_disk(delta.layer)
        for name, tensor in _own(delta).items():
            key = f"{PREFIX}{path}.{names.get(name, f'{name}.weight')}"
            if key in tensors:  # a tied one is there once
                tensor.data = tensors[key].view(tensor.shape)


def _fitting(adapter: Adapter, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The adapter's tensors under their names on disk; raises `AdapterError` where `tensors` has others or other shapes."""
    own = _views(adapter)
    missing, unknown = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    if missing or unknown:
        name = (missing or unknown)[0]
        what = f"{'missing' if missing else 'without a place'}: {pluralize(len(missing or unknown), 'tensor')}"
        raise AdapterError(
            f"{what}, the first: {name}",
            where=where,
            why="the adapter does not fit this base or its configuration",
        )
    for name, parameter in own.items():
        if parameter.shape != tensors[name].shape:
            why = f"{tuple(tensors[name].shape)} in the file, {tuple(parameter.shape)} in the model"
            raise AdapterError(f"{name} has the wrong shape", where=where, why=why)
    return own
