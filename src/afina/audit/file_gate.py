"""The file gate: what lies in an adapter's folder, before anything of it is loaded. No torch, no network, no pickle.

    adapter_config.json, adapter_model.safetensors      must be there
    afina.json, afina.manifest.json, afina.sig,         may be
    profile.safetensors (what the adapter is for),
    README.md, LICENSE, .gitattributes
    everything else                                     blocks: code and templates by name, the rest as unknown

Each tensor is read once, in pieces; in the same pass it is hashed, and its numbers are looked at.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from afina.audit.base_files import BaseFiles, widened
from afina.audit.configuration import PEFT_TYPES, check_configuration
from afina.audit.header import TensorEntry, read_header
from afina.audit.report import Gate
from afina.audit.story import check_story
from afina.errors import AuditError
from afina.io.atomic import open_regular_file
from afina.io.name_patterns import Patterns
from afina.io.strict_json import read_json_object

CONFIG, WEIGHTS, STORY, MANIFEST, SIGNATURE, PROFILE = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "afina.json",
    "afina.manifest.json",
    "afina.sig",
    "profile.safetensors",
)
ALLOWED = {
    CONFIG,
    WEIGHTS,
    STORY,
    MANIFEST,
    SIGNATURE,
    PROFILE,
    "README.md",
    "LICENSE",
    ".gitattributes",
}
DANGER = (  # what a name tells: (pattern, what it is)
    (
        r".*\.(bin|pt|pth|pkl|pickle|ckpt|joblib|npy|npz|h5|keras|pb|onnx|mar|dill)",
        "it may run code when it is opened",
    ),
    (r".*\.(py|pyc|so|dll|dylib|sh|ps1|bat|exe|js|wasm|whl|jar)", "it is code"),
    (r"(chat_template|.*\.jinja2?$).*", "a template is code that shapes every prompt"),
    (
        r"(tokenizer|special_tokens|added_tokens|vocab|merges|generation_config|config\.json|preprocessor).*",
        "it would take the place of the base's own",
    ),
)
MAX_WEIGHTS, MAX_OTHER = 4 << 30, 1 << 20  # bytes
PIECE = 1 << 22  # bytes read at a time: what numpy looks at stays in the cache of the hash
LARGE = 1e3  # no number of an adapter that was trained and works is near this
PREFIX = "base_model.model."
NAME = re.compile(
    r"(base_model\.model\.)?(?P<path>[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*?)\.(?P<part>"
    r"lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B|lora_magnitude_vector(\.weight)?|mora_M\.weight"
    r"|accumulated\.weight|token_adapter\.trainable_tokens_delta|base_layer\.weight|weight|bias)"
)


@dataclass
class AdapterFolder:
    """An adapter's files as the gate read them. `tensors` is the hash of its tensors, as in `afina.io.safetensors`."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    story: dict[str, Any] = field(default_factory=dict)
    entries: dict[str, TensorEntry] = field(default_factory=dict)
    tensors: str = ""
    digests: dict[str, str] = field(
        default_factory=dict
    )  # sha256 of each tensor, of its dtype, shape and bytes
    norms: dict[str, float] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """lora, dora, mora or full, as the configuration tells."""
        return PEFT_TYPES.get(self.config.get("peft_type", ""), None) or (
            "dora" if self.config.get("use_dora") else "lora"
        )

    def rank_of(self, path: str = "") -> int:
        """The rank at a layer, as afina.json or PEFT's patterns tell it; patterns were checked to be plain."""
        return int(self._told(path, "rank", "ranks", "r", "rank_pattern"))

    def scale_of(self, path: str) -> float:
        """Factor of the update at a layer: alpha / r, or alpha / sqrt(r) for rsLoRA."""
        rank, alpha = (
            self.rank_of(path),
            float(self._told(path, "alpha", "alphas", "lora_alpha", "alpha_pattern")),
        )
        rooted = (
            self.story["spec"].get("scaling") == "rslora"
            if self.story
            else self.config.get("use_rslora")
        )
        return alpha / (rank**0.5 if rooted else rank)

    def _told(self, path: str, one: str, many: str, theirs: str, pattern: str) -> Any:
        if self.story:
            spec = self.story["spec"]
            return (spec.get(many) or {}).get(path, spec.get(one))
        return self._patterns[pattern].of(path, self.config[theirs])

    @cached_property
    def _patterns(self) -> dict[str, Patterns]:
        return {
            name: Patterns(self.config.get(name) or {})
            for name in ("rank_pattern", "alpha_pattern")
        }

    def modules(self) -> dict[str, dict[str, TensorEntry]]:
        """Tensors by the path of their layer, and there by what they are: {"lora_A.weight": ...}."""
        found: dict[str, dict[str, TensorEntry]] = {}
        for name, entry in self.entries.items():
            match = NAME.fullmatch(name)
            if match:
                found.setdefault(match["path"], {})[match["part"]] = entry
        return found


def check_files(folder: Path, base: BaseFiles | None, gate: Gate) -> AdapterFolder:
    """Look at every file of the adapter in `folder`; what is wrong goes to `gate`. Raises `AuditError` where it must stop."""
    package = AdapterFolder(folder)
    names = _list(folder, gate)
    for needed in (CONFIG, WEIGHTS):
        if needed not in names:
            gate.block("missing", f"{needed} is missing", str(folder))
    if gate.blocked:
        return package
    package.config = read_json_object(folder / CONFIG)
    check_configuration(package.config, gate, CONFIG, base.vocabulary if base else None)
    if gate.blocked:  # what was read must not steer what is read next
        return package
    if STORY in names:
        package.story = read_json_object(folder / STORY)
        check_story(package.story, package.config, package.method, gate, STORY)
    elif package.config.get("peft_type") != "LORA":
        gate.block(
            "missing", f"{STORY} is missing, which tells what PEFT's format cannot", str(folder)
        )
    if PROFILE in names:
        _check_profile(folder / PROFILE, gate)
    if gate.blocked:
        return package
    with open_regular_file(folder / WEIGHTS) as stream:
        package.entries = read_header(stream, WEIGHTS)
        _check_names(package, gate)
        if not gate.blocked:
            _check_ranks(package, gate)
        if base is not None and not gate.blocked:
            _check_shapes(package, base, gate)
        _read_numbers(package, stream, gate)
    lines = "".join(f"{name} {package.digests[name]}\n" for name in sorted(package.digests))
    package.tensors = hashlib.sha256(lines.encode()).hexdigest()
    gate.measured |= {
        "tensors": len(package.entries),
        "numbers": sum(e.numbers for e in package.entries.values()),
    }
    return package


def _check_profile(file: Path, gate: Gate) -> None:
    """What "auto" reads when it chooses an adapter: one tensor of points, and nothing else."""
    with open_regular_file(file) as stream:
        entries = read_header(stream, PROFILE)
    if list(entries) != ["points"] or len(entries["points"].shape) != 3:
        gate.block("profile", "a profile is one tensor, points (k, parts, d)", PROFILE)


def content_hash(tensors: str, spec: dict[str, Any]) -> str:
    """Identity of an adapter, of the hash of its tensors and its spec: that of `afina.adapters.loading`, without torch."""
    return hashlib.sha256((tensors + json.dumps(spec, sort_keys=True)).encode()).hexdigest()


def _list(folder: Path, gate: Gate) -> set[str]:
    """Names in the folder; links, folders and files that do not belong there block."""
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
        elif about.st_size > (MAX_WEIGHTS if entry.name == WEIGHTS else MAX_OTHER):
            gate.block("size", f"{about.st_size:,} bytes are more than such a file may have", shown)
        elif entry.name not in ALLOWED:
            whys = (why for pattern, why in DANGER if re.fullmatch(pattern, entry.name.lower()))
            why = next(whys, "no adapter has this file")
            gate.block("foreign-file", f"does not belong into an adapter: {why}", shown)
    return names


WHOLE = {
    "lora": ({"lora_A.weight", "lora_B.weight"}, {"lora_embedding_A", "lora_embedding_B"}),
    "dora": ({"lora_A.weight", "lora_B.weight"}, {"lora_embedding_A", "lora_embedding_B"}),
    "mora": ({"mora_M.weight"},),
}
LENGTHS = {"lora_magnitude_vector", "lora_magnitude_vector.weight"}
BESIDE = {"accumulated.weight", "token_adapter.trainable_tokens_delta", "base_layer.weight"}


def _check_names(package: AdapterFolder, gate: Gate) -> None:
    """Every tensor is one that its method has, and has its partner; `modules_to_save` may bring whole ones."""
    for name in package.entries:
        if not NAME.fullmatch(name):
            gate.block(
                "tensor-name", "not the name of a tensor of an adapter", f"{WEIGHTS}: {name[:120]}"
            )
    owned = [str(name) for name in package.config.get("modules_to_save") or ()]
    for path, parts in package.modules().items():
        told = set(parts) - BESIDE
        place = f"{WEIGHTS}: {path}"
        if package.method == "full" or (
            told and told <= {"weight", "bias"} and any(f".{o}." in f".{path}." for o in owned)
        ):
            if not told <= {"weight", "bias"}:
                gate.block(
                    "tensor-name",
                    f"{', '.join(sorted(told))} in an adapter of whole weights",
                    place,
                )
            if package.method == "full" and _is_vocabulary(path):
                gate.review(
                    "vocabulary", "it changes what tokens mean or how they are chosen", place
                )
            continue
        if package.method == "dora" and len(told & LENGTHS) == 1:
            told -= LENGTHS
        elif package.method == "dora" and told:
            gate.block("tensor-pair", "no length vector, which dora has at every layer", place)
        if told and told not in WHOLE[package.method]:
            gate.block(
                "tensor-pair",
                f"{package.method} does not have {', '.join(sorted(told))} at a layer",
                place,
            )
        if _is_vocabulary(path) and told:
            gate.review("vocabulary", "it changes what tokens mean or how they are chosen", place)
    if sum(len(parts) for parts in package.modules().values()) != len(package.entries):
        gate.block("tensor-name", "two names mean the same tensor", WEIGHTS)


def _check_ranks(package: AdapterFolder, gate: Gate) -> None:
    """Each layer has the rank that is told: a loader that trusts the one must not read the other."""
    for path, parts in package.modules().items():
        a = parts.get("lora_A.weight") or parts.get("lora_embedding_A")
        if a is not None and a.shape[0] != package.rank_of(path):
            what = f"rank {a.shape[0]:,} in its tensors, {package.rank_of(path):,} told"
            gate.block("rank", what, f"{WEIGHTS}: {path}")


def _is_vocabulary(path: str) -> bool:
    return path.rpartition(".")[2] in (
        "lm_head",
        "embed_tokens",
        "wte",
        "embed_out",
        "shared",
        "word_embeddings",
    )


def _check_shapes(package: AdapterFolder, base: BaseFiles, gate: Gate) -> None:
    """Shapes as the base's weights ask for; ranks as the configuration tells."""
    modules = package.modules()
    known = {path: base.shape(path) for path in modules}
    if not base.has_shapes or not any(known.values()):
        what = (
            "none of its layers is in the base's files by that name: shapes could not be compared"
        )
        gate.review("base-shapes", what, WEIGHTS)
        return
    for path, parts in modules.items():
        shape, place = known[path], f"{WEIGHTS}: {path}"
        if shape is None:
            if not set(parts) <= {"weight", "bias"}:
                gate.block("base-layer", "the base has no such layer", place)
            continue
        wrong = _wrong_shapes(path, parts, shape, package)
        if wrong:
            gate.block("base-shape", f"{wrong}; the base's weight is {list(shape)}", place)


def _wrong_shapes(
    path: str, parts: dict[str, TensorEntry], weight: tuple[int, ...], package: AdapterFolder
) -> str | None:
    """What does not fit a base's weight; convolutions and embeddings have the forms of PEFT."""
    if package.config.get("fan_in_fan_out") and len(weight) == 2:
        weight = weight[::-1]
    out, inner = weight[0], math.prod(weight[1:])
    shapes = {part: entry.shape for part, entry in parts.items()}
    a, b = shapes.get("lora_A.weight"), shapes.get("lora_B.weight")
    if (
        a
        and b
        and (math.prod(a[1:]) != inner or b[0] != out or a[0] != b[1] or math.prod(b[2:]) != 1)
    ):
        return f"A is {list(a)}, B is {list(b)}"
    a, b = shapes.get("lora_embedding_A"), shapes.get("lora_embedding_B")
    if a and b and (a[1:] != (weight[0],) or b[:1] != (weight[1],) or a[0] != b[1]):
        return f"A is {list(a)}, B is {list(b)}"
    m = shapes.get("mora_M.weight")
    if m:
        size = math.isqrt(
            (out + inner) * package.rank_of(path)
        )  # for rotation the next even number below
        if m not in ((size, size), (size - size % 2, size - size % 2)):
            return f"M is {list(m)}"
    for part in LENGTHS & set(shapes):
        if math.prod(shapes[part]) != out:
            return f"{part} is {list(shapes[part])}"
    whole = shapes.get("weight")
    if whole and package.method == "full" and whole != weight:
        return f"it brings {list(whole)}"
    tall = shapes.get("accumulated.weight")
    return f"what it accumulated is {list(tall)}" if tall and tall != (out, inner) else None


def _read_numbers(package: AdapterFolder, stream: BinaryIO, gate: Gate) -> None:
    """Hash every tensor, and see that its numbers are finite and not absurd."""
    for entry in sorted(package.entries.values(), key=lambda entry: entry.begin):
        stream.seek(entry.begin)
        digest = hashlib.sha256(json.dumps([entry.dtype, list(entry.shape)]).encode())
        squares = largest = 0.0
        for raw in _pieces(stream, entry):
            digest.update(raw)
            numbers = widened(raw, entry.dtype)
            with np.errstate(over="ignore", invalid="ignore"):
                dot = float(np.dot(numbers, numbers))
            if not math.isfinite(dot):
                if not np.isfinite(numbers).all():
                    gate.block(
                        "not-finite",
                        "it holds a number that is infinite, or none",
                        f"{WEIGHTS}: {entry.name}",
                    )
                dot = float(np.square(numbers.astype(np.float64)).sum())
            squares += dot
            largest = max(largest, float(numbers.max()), -float(numbers.min()))
        package.digests[entry.name] = digest.hexdigest()
        package.norms[entry.name] = math.sqrt(squares) if math.isfinite(squares) else math.inf
        if largest > LARGE:
            gate.block(
                "too-large",
                f"a number of {largest:.3g}: it drowns what the base says",
                f"{WEIGHTS}: {entry.name}",
            )


def _pieces(stream: BinaryIO, entry: TensorEntry) -> Iterator[bytes]:
    left = entry.end - entry.begin
    while left:
        raw = stream.read(min(PIECE, left))
        if not raw:
            raise AuditError(
                "it became shorter while it was read", where=f"{WEIGHTS}: {entry.name}"
            )
        left -= len(raw)
        yield raw
