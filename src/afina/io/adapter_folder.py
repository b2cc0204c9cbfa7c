"""The one reader of adapter folders: configuration, metadata, tensor names, shapes and hashes.

    adapter_config.json          what PEFT, vLLM and llama.cpp's converter read
    adapter_model.safetensors    the tensors, under PEFT's names
    afina.json                   full configuration, hashes of adapter and base, lineage

Loading, serving, merging, exporting, `show` and the audit open an adapter here. No tensor is read
before header, length, names, ranks and shapes are checked.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from afina.errors import AdapterError
from afina.io.adapter_config import WRAPPER_SUFFIX, AdapterConfig
from afina.io.adapter_formats import tensor_name_pattern
from afina.io.adapter_metadata import (
    METADATA_FILE,
    AdapterMetadata,
    RecordedBase,
    read_metadata,
)
from afina.io.hashing import adapter_hash, combine_tensor_hashes, hash_entries
from afina.io.name_patterns import NamePattern
from afina.io.peft_config import PeftConfig
from afina.io.safetensors import (
    ADAPTER_LIMITS,
    FORMAT_LIMITS,
    SafetensorsReader,
    TensorEntry,
    read_header,
)
from afina.io.strict_json import ADAPTER_JSON, AUDIT_JSON

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
EXPERT_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")  # in the order of their module
PREFIX = "base_model.model."
FIRST_TENSORS = (".lora_A.weight", ".lora_embedding_A")  # one of them names each adapted module
FROZEN_SUFFIX = ".base_layer.weight"
ADAPTER_TENSORS = (
    *FIRST_TENSORS,
    ".lora_B.weight",
    ".lora_embedding_B",
    ".lora_magnitude_vector",
    ".lora_magnitude_vector.weight",
    ".token_adapter.trainable_tokens_delta",
    FROZEN_SUFFIX,
)
# model.state_dict() has the adapter's name after these, save_pretrained leaves it out
RAW_NAME = re.compile(
    r"\.(lora_[AB]|modules_to_save)\.(?!weight$|bias$)[^.]+\.|\.original_module\."
)
RANK_TENSORS = {  # the dimension that is the rank
    "lora_A.weight": 0,
    "lora_B.weight": 1,
    "lora_embedding_A": 0,
    "lora_embedding_B": 1,
}


def adapter_folder(path: Path) -> Path:
    """Return the adapter's folder, given it or the run folder that holds it.

    Raises:
        AdapterError: neither `path` nor `path`/adapter has an adapter_config.json.
    """
    for folder in (path, path / "adapter"):
        if (folder / CONFIG_FILE).is_file():
            return folder
    raise AdapterError(
        "no adapter here",
        where=str(path),
        hint="give a run folder, or one with adapter_config.json",
    )


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter on disk whose files were checked; its tensors are not read yet.

    Attributes:
        path: The folder.
        peft: adapter_config.json.
        metadata: afina.json; None for an adapter that PEFT wrote.
        entries: The tensors of the safetensors file, by name.
        paths: The modules with a low-rank adapter, from the tensors' names.
    """

    path: Path
    peft: PeftConfig
    metadata: AdapterMetadata | None
    entries: Mapping[str, TensorEntry]

    @classmethod
    def open(cls, path: Path, strict: bool = False) -> "AdapterFolder":
        """Open the adapter in `path`, an adapter folder or a run folder.

        Args:
            path: The folder.
            strict: Apply the audit's limits besides: regular files of limited size, float32,
                float16 and bfloat16 tensors with plain names.

        Raises:
            AdapterError: a file is missing, damaged, incomplete or contradicts another, with file
                and field.
        """
        found = cls.read(path, strict)
        found.check_ranks()
        return found

    @classmethod
    def read(cls, path: Path, strict: bool = False) -> "AdapterFolder":
        """Read the adapter in `path` as `open` does, but without comparing ranks, for the audit."""
        folder = adapter_folder(path)
        limits = AUDIT_JSON if strict else ADAPTER_JSON
        peft = PeftConfig.from_file(folder / CONFIG_FILE, limits)
        values = read_metadata(folder, limits)
        where = str(folder / METADATA_FILE)
        metadata = AdapterMetadata.from_json(values, where) if "spec" in values else None
        if metadata is None and not peft.is_lora:
            raise AdapterError(
                f"{METADATA_FILE} is missing",
                where=str(folder),
                why=f"{CONFIG_FILE} cannot hold what an adapter of type {peft.peft_type} needs",
            )
        header_limits = ADAPTER_LIMITS if strict else FORMAT_LIMITS
        entries = read_header(_weights_file(folder), header_limits, AdapterError)
        if not entries:
            raise AdapterError("the file has no tensor", where=str(folder / WEIGHTS_FILE))
        if metadata is None:
            _check_names(list(entries), str(folder / WEIGHTS_FILE))
        return cls(folder, peft, metadata, entries)

    @property
    def weights_file(self) -> Path:
        """The safetensors file."""
        return self.path / WEIGHTS_FILE

    @property
    def method(self) -> str:
        """Name of the adapter method."""
        return self.peft.method if self.metadata is None else self.metadata.spec.method

    @cached_property
    def paths(self) -> tuple[str, ...]:
        """The modules with a low-rank adapter, from the tensors' names."""
        found = [self.parameter_paths.get(path, path) for path in self._paths_on_disk]
        order = {path: index for index, path in enumerate(self.parameter_paths.values())}
        return tuple(sorted(found, key=lambda path: order.get(path, -1)))

    @property
    def _paths_on_disk(self) -> list[str]:
        suffixes = ((name, end) for name in self.entries for end in FIRST_TENSORS)
        return [
            name.removeprefix(PREFIX).removesuffix(end)
            for name, end in suffixes
            if name.endswith(end)
        ]

    @cached_property
    def parameter_paths(self) -> dict[str, str]:
        """Paths of adapted parameters of fused experts, in their order, by the path on disk.

        PEFT names parameters in adapter_config.json only: see `AdapterConfig.wrapper_path`.

        Raises:
            AdapterError: a parameter is none of fused experts, or names and tensors differ.
        """
        found: dict[str, str] = {}
        targets = self.peft.target_parameters or []
        unused, modules = set(targets), dict[str, list[str]]()
        for path in self._paths_on_disk if targets else ():
            modules.setdefault(path.replace(WRAPPER_SUFFIX, ""), []).append(path)
        for module, paths in modules.items():
            if self._is_target_module(module):  # a bare name of a parameter fits any module
                continue
            own = {t: leaf for t in targets if (leaf := _targeted_parameter(module, t))}
            unused -= own.keys()
            names = sorted(set(own.values()), key=_position)
            if names and names != ["weight"]:
                expected = [module + WRAPPER_SUFFIX * n for n in reversed(range(len(names)))]
                if sorted(expected) != sorted(paths) or not set(names) <= set(EXPERT_PARAMETERS):
                    supported = ", ".join(EXPERT_PARAMETERS)
                    raise self._bad_parameters(f"{module} has {', '.join(names)}", supported)
                found |= {one: f"{module}.{n}" for one, n in zip(expected, names, strict=True)}
        if unused:
            raise self._bad_parameters(f"no tensors of {min(unused)}", "parameters with tensors")
        return found

    def _is_target_module(self, path: str) -> bool:
        """Return whether `target_modules` selects the module: PEFT adapts no parameter of it."""
        targets = self.peft.target_modules or []
        if isinstance(targets, str):
            where = f"{self.path / CONFIG_FILE}: target_modules"
            return NamePattern(targets, where, AdapterError).fullmatch(path)
        return any(f".{path}".endswith(f".{target}") for target in targets)

    @property
    def fused_experts(self) -> frozenset[str]:
        """Paths of the adapted parameters of fused experts."""
        return frozenset(self.parameter_paths.values())

    def _bad_parameters(self, why: str, supported: str) -> AdapterError:
        return AdapterError(
            f"target_parameters={self.peft.target_parameters!r:.80} is not supported",
            where=f"{self.path / CONFIG_FILE}: target_parameters",
            why=f"{why}; supported are {supported} of fused experts",
        )

    def config(self, tokenizer: Any = None) -> AdapterConfig:
        """Return the adapter's configuration.

        Args:
            tokenizer: The base's tokenizer. PEFT records trained tokens by id; the tokenizer has
                their texts.

        Raises:
            AdapterError: trained tokens have no text, or there is no tokenizer to look them up in.
        """
        if self.metadata is not None:
            return self.metadata.adapter_config()
        where = str(self.path / CONFIG_FILE)
        tokens = _token_texts(self.peft, tokenizer, where)
        modules = saved_modules(self.peft.modules_to_save or (), list(self.entries))
        return self.peft.adapter_config(self.paths, modules, tokens, where)

    def modules(self) -> dict[str, dict[str, TensorEntry]]:
        """Return the tensors by module path, and there by kind: {"lora_A.weight": ...}."""
        found: dict[str, dict[str, TensorEntry]] = {}
        pattern = tensor_name_pattern()
        for name, entry in self.entries.items():
            match = pattern.fullmatch(name)
            if match:
                path = self.parameter_paths.get(match["path"], match["path"])
                found.setdefault(path, {})[match["part"]] = entry
        return found

    def layer_shapes(self) -> dict[str, tuple[int, int]]:
        """Return (out_features, in_features) of each module whose tensors determine them."""
        found = {}
        for path, parts in self.modules().items():
            for first, second in (
                ("lora_A.weight", "lora_B.weight"),
                ("lora_embedding_A", "lora_embedding_B"),
            ):
                if first in parts and second in parts and parts[second].shape:
                    in_features = math.prod(parts[first].shape[1:])
                    found[path] = (parts[second].shape[0], in_features)
        return found

    def rank_mismatches(self) -> list[tuple[str, int, int]]:
        """Return (tensor's name, its rank, configured rank) of each tensor where they differ."""
        if self.method not in ("lora", "dora"):
            return []
        config = self.config_without_tokens
        found = []
        for path, parts in self.modules().items():
            for part, dimension in RANK_TENSORS.items():
                if part in parts:
                    rank, own = (*parts[part].shape, 0, 0)[dimension], config.rank_of(path)
                    # of all experts: their number is not known without the base
                    fused = path in self.fused_experts and rank and rank % own == 0
                    if rank != own and not fused:
                        found.append((parts[part].name, rank, config.rank_of(path)))
        return found

    @cached_property
    def config_without_tokens(self) -> AdapterConfig:
        """The configuration; of an adapter of PEFT without saved modules and trained tokens."""
        if self.metadata is not None:
            return self.metadata.adapter_config()
        return self.peft.adapter_config(self.paths, (), {}, str(self.path / CONFIG_FILE))

    def check_ranks(self) -> None:
        """Raise `AdapterError` where a configured rank is not that of the tensors.

        Ranks are compared here, before a module of the configured rank is allocated.
        """
        for name, rank, configured in self.rank_mismatches():
            file = CONFIG_FILE if self.metadata is None else METADATA_FILE
            raise AdapterError(
                f"{name} has the wrong shape",
                where=str(self.weights_file),
                why=f"rank {rank:,} in the file, rank {configured:,} in {file}",
            )

    def reader(self) -> SafetensorsReader:
        """Return a reader of the tensors; the header is not read again."""
        return SafetensorsReader(self.weights_file, entries=self.entries)

    @cached_property
    def tensors_hash(self) -> str:
        """SHA-256 (hex) of the tensors; the file is read once."""
        with self.weights_file.open("rb") as stream:
            digests = hash_entries(stream, self.entries.values(), str(self.weights_file))
        return combine_tensor_hashes(digests)

    def hash(self, tokenizer: Any = None) -> str:
        """Return the adapter's identity (hex), computed from its files."""
        return adapter_hash(self.tensors_hash, self.config(tokenizer).canonical())

    def verified_hash(self, tokenizer: Any = None) -> str:
        """Return the adapter's identity (hex), and compare it with the recorded one.

        Raises:
            AdapterError: afina.json records another hash: a file was changed after it was written.
        """
        digest = self.hash(tokenizer)
        recorded = None if self.metadata is None else self.metadata.hash
        if recorded is not None and recorded != digest:
            raise AdapterError(
                "the adapter's files were changed",
                where=f"{self.path / METADATA_FILE}: hash",
                why=f"recorded hash {recorded[:12]}, computed hash {digest[:12]}",
                hint="copy the adapter again",
            )
        return digest

    @property
    def base(self) -> RecordedBase:
        """The base that the files record."""
        if self.metadata is not None:
            return self.metadata.base
        name, revision = self.peft.base_model_name_or_path, self.peft.revision
        return RecordedBase(name=name, revision=revision, hash=None, storage="plain")


def _targeted_parameter(module: str, target: str) -> str | None:
    """Return the name of the parameter of `module` that PEFT's `target` names, if it does."""
    leaf = target.rpartition(".")[2]
    return leaf if f".{module}.{leaf}".endswith(f".{target}") else None


def _position(name: str) -> tuple[int, str]:
    """Return the position of a parameter in its module, for sorting."""
    known = EXPERT_PARAMETERS.index(name) if name in EXPERT_PARAMETERS else -1
    return known, name


def _check_names(names: list[str], where: str) -> None:
    """Raise `AdapterError` for names that PEFT's `save_pretrained` does not write."""
    raw = next((name for name in names if not name.startswith(PREFIX)), None)
    infix = next((name for name in names if RAW_NAME.search(name)), None)
    if raw is not None or infix is not None:
        why = f"{raw} does not begin with {PREFIX}"
        if infix is not None:
            why = f"{infix} contains the name that the adapter had in PEFT"
        what = "the tensors have the names of a raw state dict"
        hint = "in PEFT: model.save_pretrained(folder), or rename the tensors"
        raise AdapterError(what, where=where, why=why, hint=hint)


def _weights_file(folder: Path) -> Path:
    file = folder / WEIGHTS_FILE
    if file.is_file():
        return file
    pickled = any(folder.glob("*.bin"))
    hint = "only safetensors are read; load it in PEFT and save it again" if pickled else None
    raise AdapterError(f"no {WEIGHTS_FILE}", where=str(folder), hint=hint)


def _token_texts(peft: PeftConfig, tokenizer: Any, where: str) -> dict[str, int]:
    """Return the trained tokens of a PEFT configuration: text to id."""
    location = f"{where}: trainable_token_indices"
    try:
        token_ids = peft.token_ids
    except ValueError as error:
        raise AdapterError(str(error), where=location) from None
    if not token_ids:
        return {}
    if tokenizer is None:
        why = "PEFT records tokens by id, and only the base's tokenizer has their texts"
        raise AdapterError("this adapter owns tokens", where=location, why=why)
    if token_ids[-1] >= len(tokenizer):
        why = f"the vocabulary ends at {len(tokenizer):,}"
        raise AdapterError(
            f"token {token_ids[-1]:,} has no name in the base's tokenizer", where=location, why=why
        )
    texts = {tokenizer.convert_ids_to_tokens(token_id): token_id for token_id in token_ids}
    if None in texts:
        why = f"the vocabulary ends at {len(tokenizer):,}"
        raise AdapterError(
            f"token {texts[None]:,} has no name in the base's tokenizer", where=location, why=why
        )
    return texts


def saved_modules(names: tuple[str, ...] | list[str], tensors: list[str]) -> tuple[str, ...]:
    """Return the modules that PEFT's `modules_to_save` saves in full, from the tensors' names.

    As in PEFT, a module is saved where the end of its path is one of `names`; modules inside it are
    saved with it.
    """
    owners = dict.fromkeys(
        name.removeprefix(PREFIX).rpartition(".")[0]
        for name in tensors
        if not name.endswith(ADAPTER_TENSORS)
    )
    return tuple(path for path in owners if _is_inside(path, names))


def _is_inside(path: str, names: tuple[str, ...] | list[str]) -> bool:
    while path:
        if any(name and path.endswith(name) for name in names):
            return True
        path = path.rpartition(".")[0]
    return False
