"""The file gate: the content of an adapter's folder, before any of it is loaded.

    adapter_config.json, adapter_model.safetensors      required
    afina.json, afina.manifest.json, afina.sig,         optional
    profile.safetensors (routing profile),
    README.md, LICENSE, .gitattributes
    everything else                                     blocks: code and templates by name, the rest
                                                        as unknown

No torch, no network, no pickle. Each tensor is read once, in pieces; the same pass hashes it and
checks its values.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from afina.audit.base_files import BaseFiles, widened
from afina.audit.configuration import check_configuration
from afina.audit.metadata_check import check_metadata
from afina.audit.report import Gate
from afina.io.adapter_config import AdapterConfig
from afina.io.adapter_folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterFolder,
)
from afina.io.adapter_formats import (
    BASE_TENSORS,
    EXTRA_TENSORS,
    PEFT_LORA,
    AdapterFormat,
    ModuleSizes,
    adapter_formats,
    tensor_name_pattern,
)
from afina.io.adapter_metadata import METADATA_FILE
from afina.io.hashing import combine_tensor_hashes, start_tensor_hash
from afina.io.peft_config import PeftConfig
from afina.io.regular_file import open_regular_file
from afina.io.safetensors import TensorEntry, read_chunks, read_open_header
from afina.io.strict_json import AUDIT_JSON, read_json_object

MANIFEST, SIGNATURE, PROFILE = "afina.manifest.json", "afina.sig", "profile.safetensors"
ALLOWED_FILES = {
    CONFIG_FILE,
    WEIGHTS_FILE,
    METADATA_FILE,
    MANIFEST,
    SIGNATURE,
    PROFILE,
    "README.md",
    "LICENSE",
    ".gitattributes",
}
DANGEROUS_FILES = (  # (pattern of a name, what such a file does)
    (
        r".*\.(bin|pt|pth|pkl|pickle|ckpt|joblib|npy|npz|h5|keras|pb|onnx|mar|dill)",
        "it may run code when it is opened",
    ),
    (r".*\.(py|pyc|so|dll|dylib|sh|ps1|bat|exe|js|wasm|whl|jar)", "it is code"),
    (r"(chat_template|.*\.jinja2?$).*", "a template is code that shapes every prompt"),
    (
        r"(tokenizer|special_tokens|added_tokens|vocab|merges|generation_config|config\.json"
        r"|preprocessor).*",
        "it would replace the base's own",
    ),
)
MAX_WEIGHTS_BYTES, MAX_OTHER_BYTES = 4 << 30, 1 << 20
CHUNK_BYTES = 1 << 22  # per read: it stays in the cache between the hash and numpy
MAX_ABSOLUTE = 1e3  # elements of trained adapters are far below


@dataclass
class AuditedFolder:
    """An adapter's files as the gate read them.

    Attributes:
        folder: The folder.
        config: The content of adapter_config.json.
        metadata: The content of afina.json; {} for an adapter that PEFT wrote.
        opened: The adapter, by the one reader; None until configuration and metadata passed.
        tensors_hash: Hash of the tensors, as `afina.io.hashing.hash_tensor_files` returns it.
        digests: SHA-256 (hex) of each tensor's dtype, shape and bytes, by name.
        norms: Frobenius norm of each tensor, by name.
    """

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    opened: AdapterFolder | None = None
    tensors_hash: str = ""
    digests: dict[str, str] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        """The tensors, by name."""
        return {} if self.opened is None else self.opened.entries

    @property
    def method(self) -> str:
        """Name of the adapter method that adapter_config.json has."""
        return PeftConfig.method_of(self.config)

    @property
    def adapter_config(self) -> AdapterConfig:
        """The adapter's configuration, without PEFT's trained tokens."""
        assert self.opened is not None
        return self.opened.config_without_tokens

    def rank_of(self, path: str = "") -> int:
        """Return the configured rank at the module `path`."""
        return self.adapter_config.rank_of(path)

    def scale_of(self, path: str) -> float:
        """Return the factor of the update at the module `path`."""
        return self.adapter_config.scale_of(path)

    @property
    def fused_experts(self) -> frozenset[str]:
        """Paths of the adapted parameters of fused experts."""
        return frozenset() if self.opened is None else self.opened.fused_experts

    def modules(self) -> dict[str, dict[str, TensorEntry]]:
        """Return the tensors by module path, and there by kind: {"lora_A.weight": ...}."""
        return {} if self.opened is None else self.opened.modules()


def check_files(folder: Path, base: BaseFiles | None, gate: Gate) -> AuditedFolder:
    """Check every file of the adapter in `folder`, and add findings to `gate`.

    Raises:
        AfinaError: a file is so malformed that nothing after it can be checked.
    """
    package = AuditedFolder(folder)
    names = _list(folder, gate)
    for needed in (CONFIG_FILE, WEIGHTS_FILE):
        if needed not in names:
            gate.block("missing", f"{needed} is missing", str(folder))
    if gate.blocked:
        return package
    package.config = read_json_object(folder / CONFIG_FILE, AUDIT_JSON)
    check_configuration(package.config, gate, CONFIG_FILE, base.vocab_size if base else None)
    if gate.blocked:  # a value that was rejected must not decide what is read next
        return package
    if METADATA_FILE in names:
        package.metadata = read_json_object(folder / METADATA_FILE, AUDIT_JSON)
        check_metadata(package.metadata, package.config, package.method, gate, METADATA_FILE)
    elif package.config.get("peft_type") != "LORA":
        what = f"{METADATA_FILE} is missing, which holds what PEFT's format cannot"
        gate.block("missing", what, str(folder))
    if PROFILE in names:
        _check_profile(folder / PROFILE, gate)
    if gate.blocked:
        return package
    package.opened = AdapterFolder.read(folder, strict=True)
    with open_regular_file(folder / WEIGHTS_FILE) as stream:
        _check_names(package, gate)
        if not gate.blocked:
            _check_ranks(package, gate)
        if base is not None and not gate.blocked:
            _check_shapes(package, base, gate)
        _check_values(package, stream, gate)
    package.tensors_hash = combine_tensor_hashes(package.digests)
    gate.measured |= {
        "tensors": len(package.entries),
        "numbers": sum(entry.num_elements for entry in package.entries.values()),
    }
    return package


def _check_profile(file: Path, gate: Gate) -> None:
    """Check the routing profile of an adapter: one tensor of points, and nothing else."""
    with open_regular_file(file) as stream:
        entries = read_open_header(stream, PROFILE)
    if list(entries) != ["points"] or len(entries["points"].shape) != 3:
        gate.block("profile", "a profile is one tensor, points (k, parts, d)", PROFILE)


def _list(folder: Path, gate: Gate) -> set[str]:
    """Return the names in the folder; links, folders and foreign files block."""
    names = set()
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        shown = ascii(entry.name)[1:-1][:80]
        names.add(entry.name)
        about = entry.stat(follow_symlinks=False)
        if entry.is_symlink():
            gate.block("link", "a link: what it points to may change after the audit", shown)
        elif entry.is_dir(follow_symlinks=False):
            gate.block("folder", "a folder: an adapter has none", shown)
        elif not entry.is_file(follow_symlinks=False):
            gate.block("special-file", "neither a file nor a folder", shown)
        elif about.st_nlink > 1:
            gate.block(
                "link",
                "a file with several names (hard links): it may be changed by another of them",
                shown,
            )
        elif about.st_size > (MAX_WEIGHTS_BYTES if entry.name == WEIGHTS_FILE else MAX_OTHER_BYTES):
            gate.block("size", f"{about.st_size:,} bytes are more than such a file may have", shown)
        elif entry.name not in ALLOWED_FILES:
            whys = (
                why for pattern, why in DANGEROUS_FILES if re.fullmatch(pattern, entry.name.lower())
            )
            why = next(whys, "no adapter has this file")
            gate.block("foreign-file", f"does not belong into an adapter: {why}", shown)
    return names


def _check_names(package: AuditedFolder, gate: Gate) -> None:
    """Block tensors that the method does not have; `modules_to_save` may bring full modules."""
    pattern, form = tensor_name_pattern(), adapter_formats()[package.method]
    for name in package.entries:
        if not pattern.fullmatch(name):
            where = f"{WEIGHTS_FILE}: {name[:120]}"
            gate.block("tensor-name", "not the name of a tensor of an adapter", where)
    saved = [str(name) for name in package.config.get("modules_to_save") or ()]
    for path, parts in package.modules().items():
        names, location = set(parts) - set(EXTRA_TENSORS), f"{WEIGHTS_FILE}: {path}"
        is_saved = names <= set(BASE_TENSORS) and any(f".{n}." in f".{path}." for n in saved)
        if form.replaces_base and not names <= set(BASE_TENSORS):
            what = f"{', '.join(sorted(names))} in an adapter of full weights"
            gate.block("tensor-name", what, location)
        elif names and not form.replaces_base and not is_saved:
            _check_pair(form, names, gate, location)
        if names and (form.replaces_base or not is_saved) and _is_vocabulary(path):
            gate.review(
                "vocabulary", "it changes what tokens mean or how they are chosen", location
            )
    if sum(len(parts) for parts in package.modules().values()) != len(package.entries):
        gate.block("tensor-name", "two names mean the same tensor", WEIGHTS_FILE)


def _check_pair(form: AdapterFormat, names: set[str], gate: Gate, location: str) -> None:
    """Block where the tensors of a module are not exactly those of the method."""
    own = frozenset(form.aliases.get(name, name) for name in names)
    if own not in form.tensor_sets() or len(own) != len(names):
        expected = " or ".join(", ".join(sorted(each)) for each in form.tensor_sets())
        found = ", ".join(sorted(names))
        gate.block(
            "tensor-pair", f"{form.method} has {expected} at a module, not {found}", location
        )


def _check_ranks(package: AuditedFolder, gate: Gate) -> None:
    """Block where a configured rank is not that of the tensors: loaders trust one or the other."""
    assert package.opened is not None
    for name, rank, configured in package.opened.rank_mismatches():
        what = f"rank {rank:,} in its tensors, {configured:,} in its configuration"
        gate.block("rank", what, f"{WEIGHTS_FILE}: {name}")


def _is_vocabulary(path: str) -> bool:
    return path.rpartition(".")[2] in (
        "lm_head",
        "embed_tokens",
        "wte",
        "embed_out",
        "shared",
        "word_embeddings",
    )


def _check_shapes(package: AuditedFolder, base: BaseFiles, gate: Gate) -> None:
    """Block tensors whose shapes do not fit the base or the configured ranks."""
    modules = package.modules()
    fused = package.fused_experts
    known = {path: base.shape(path) for path in modules}
    if not base.has_shapes or not (any(known.values()) or fused):
        what = (
            "none of its layers is in the base's files by that name: shapes could not be compared"
        )
        gate.review("base-shapes", what, WEIGHTS_FILE)
        return
    for path, parts in modules.items():
        shape, location = known[path], f"{WEIGHTS_FILE}: {path}"
        if path in fused:
            what = "factors of fused experts, which the base may store one by one: not compared"
            gate.review("base-shapes", what, location)
            continue
        if shape is None:
            if not set(parts) <= {"weight", "bias"}:
                gate.block("base-layer", "the base has no such layer", location)
            continue
        wrong = _wrong_shapes(path, parts, shape, package)
        if wrong:
            gate.block("base-shape", f"{wrong}; the base's weight is {list(shape)}", location)


def _broken_rule(
    form: AdapterFormat, shapes: dict[str, tuple[int, ...]], weight: tuple[int, ...], rank: int
) -> str | None:
    """Return what breaks the method's shape rules at a module with this weight; None: nothing.

    An embedding's matrix is stored transposed. Configurations of types that PEFT does not have do
    not record the orientation of the base's weights: either is accepted.
    """
    weights = [weight]
    if len(weight) == 2 and set(shapes) & set(form.embedding_names.values()):
        weights = [weight[::-1]]
    elif len(weight) == 2 and form.peft_type != PEFT_LORA:
        weights.append(weight[::-1])
    options = [ModuleSizes.from_weight(each, rank) for each in weights]
    for part, shape in shapes.items():
        if form.canonical_name(part) in form.tensors:
            expected = [shape for sizes in options for shape in form.shapes(part, sizes)]
            if shape not in expected:
                return f"{part} is {list(shape)}, expected {list(expected[0])}"
    return None


def _wrong_shapes(
    path: str, parts: dict[str, TensorEntry], weight: tuple[int, ...], package: AuditedFolder
) -> str | None:
    """Return what does not fit a base's weight; convolutions and embeddings have PEFT's layouts."""
    if package.config.get("fan_in_fan_out") and len(weight) == 2:
        weight = weight[::-1]
    out, inner = weight[0], math.prod(weight[1:])
    shapes = {part: entry.shape for part, entry in parts.items()}
    form = adapter_formats()[package.method]
    if wrong := _broken_rule(form, shapes, weight, package.rank_of(path)):
        return wrong
    weight_shape = shapes.get("weight")
    if weight_shape and form.replaces_base and weight_shape != weight:
        return f"it brings {list(weight_shape)}"
    tall = shapes.get("accumulated.weight")
    return f"what it accumulated is {list(tall)}" if tall and tall != (out, inner) else None


def _check_values(package: AuditedFolder, stream: BinaryIO, gate: Gate) -> None:
    """Hash every tensor, and block elements that are not finite or absurdly large."""
    for entry in sorted(package.entries.values(), key=lambda entry: entry.begin):
        location = f"{WEIGHTS_FILE}: {entry.name}"
        digest = start_tensor_hash(entry)
        squares = largest = 0.0
        for raw in read_chunks(stream, entry.begin, entry.end, location, CHUNK_BYTES):
            digest.update(raw)
            values = widened(raw, entry.dtype)
            with np.errstate(over="ignore", invalid="ignore"):
                dot = float(np.dot(values, values))
            if not math.isfinite(dot):
                if not np.isfinite(values).all():
                    gate.block("not-finite", "an element is infinite or NaN", location)
                dot = float(np.square(values.astype(np.float64)).sum())
            squares += dot
            largest = max(largest, float(values.max()), -float(values.min()))
        package.digests[entry.name] = digest.hexdigest()
        package.norms[entry.name] = math.sqrt(squares) if math.isfinite(squares) else math.inf
        if largest > MAX_ABSOLUTE:
            what = f"an element of {largest:.3g}, more than {MAX_ABSOLUTE:g}"
            gate.block("too-large", what, location)
