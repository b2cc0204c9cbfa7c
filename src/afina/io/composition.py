"""Several adapters that are active together, each with a weight; as text and as a folder.

    A:0.6,B:0.4              two adapters or runs on the same tokens, without any file

    COMPOSITION/afina.json             "composition": path, hash and weight of each part
    COMPOSITION/parts/1-tone/          the parts, complete copies: each is an adapter folder
    COMPOSITION/parts/2-law/

The updates are summed: y = y0 + sum over k of w_k D_k(x, y0), exact for any methods together.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import afina
from afina.errors import AdapterError, SettingsError
from afina.io.adapter_folder import CONFIG_FILE, WEIGHTS_FILE, AdapterFolder, adapter_folder
from afina.io.adapter_metadata import (
    FORMAT_VERSION,
    METADATA_FILE,
    RecordedBase,
    read_metadata,
)
from afina.io.atomic import atomic_directory, write_json
from afina.io.base_match import describe_base, same_base

PARTS_DIR = "parts"
MAX_PARTS = 64


@dataclass(frozen=True)
class WeightedAdapter:
    """One adapter of a combination: its folder and its weight."""

    folder: Path
    weight: float = 1.0


def parse_weighted(text: str | Path) -> tuple[Path, float]:
    """Return ("A", 0.6) for "A:0.6" and weight 1 for "A".

    Raises:
        SettingsError: the weight is not a finite number.
    """
    text = str(text)
    folder, colon, number = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise SettingsError(
            f"weight {number!r} is not a finite number",
            where=text,
            hint="FOLDER:0.6, or FOLDER:-1 to subtract an adapter",
        )
    return Path(folder), weight


def parse_weighted_list(run: Path) -> list[tuple[Path, float]]:
    """Return the adapters of `--adapter`: one folder, or several with weights, "A:0.6,B:0.4"."""
    if run.exists() or not set(":,") & set(str(run)):
        return [(run, 1.0)]
    return [parse_weighted(piece) for piece in str(run).split(",")]


def is_composition(folder: Path) -> bool:
    """Return whether the folder lists parts instead of being one adapter."""
    return not (folder / CONFIG_FILE).is_file() and (folder / METADATA_FILE).is_file()


def expand_composition(path: Path, weight: float = 1.0) -> list[WeightedAdapter]:
    """Return the adapter in `path`, or a composition's parts with weights times `weight`.

    Raises:
        AdapterError: a part is missing, lies outside the folder, or was changed.
    """
    if not is_composition(path):
        return [WeightedAdapter(adapter_folder(path), weight)]
    parts = []
    for folder, digest, own in composition_parts(path):
        if hash_adapter_folder(adapter_folder(folder)) != digest:
            why = f"its hash is not {str(digest)[:12]}, which the composition records"
            raise AdapterError(
                "a part was changed", where=str(folder), why=why, hint="combine the adapters again"
            )
        parts.append(WeightedAdapter(folder, weight * own))
    return parts


def composition_parts(path: Path) -> list[tuple[Path, str, float]]:
    """Return (folder, recorded hash, weight) of each part of the composition in `path`.

    Raises:
        AdapterError: afina.json lists no parts, too many, or one without path, hash and finite
            weight, or one that lies outside the folder.
    """
    where = f"{path / METADATA_FILE}: composition"
    lines = read_metadata(path).get("composition", [])
    if not isinstance(lines, list) or len(lines) > MAX_PARTS:
        raise AdapterError(f"not a list of at most {MAX_PARTS} parts", where=where)
    if not lines:
        hint = "give a run folder, or one with adapter_config.json"
        raise AdapterError("no adapter here", where=str(path), hint=hint)
    return [_parse_part(path, line, where) for line in lines]


def _parse_part(path: Path, line: Any, where: str) -> tuple[Path, str, float]:
    fields = line if isinstance(line, dict) else {}
    relative, digest = fields.get("path"), fields.get("hash")
    weight: Any = fields.get("weight")
    is_finite = type(weight) in (int, float) and math.isfinite(weight)
    if not isinstance(relative, str) or not isinstance(digest, str) or not is_finite:
        why = "path, hash and a finite weight are expected"
        raise AdapterError(f"a part is {line!r:.80}", where=where, why=why)
    folder = path / relative
    if "\0" in relative or not folder.resolve().is_relative_to(path.resolve()):
        location = f"{where}: {relative[:80]}"
        raise AdapterError("a part lies outside its composition", where=location)
    return folder, digest, float(weight)


def hash_adapter_folder(folder: Path) -> str:
    """Return the identity of the adapter in `folder`, computed from its files."""
    return AdapterFolder.open(folder).hash()


def composition_hash(parts: Sequence[tuple[str, float]]) -> str:
    """Return a composition's identity: SHA-256 (hex) of the sorted (hash, weight) of its parts."""
    return hashlib.sha256(json.dumps(sorted(parts)).encode()).hexdigest()


def write_composition(
    out: Path,
    parts: Sequence[WeightedAdapter],
    base: Mapping[str, Any],
    metadata: Mapping[str, Any],
) -> str:
    """Copy the parts to `out` and list them in its afina.json; return the composition's hash."""
    hashes = [AdapterFolder.open(part.folder).verified_hash() for part in parts]
    digest = composition_hash([(h, part.weight) for h, part in zip(hashes, parts, strict=True)])
    with atomic_directory(out) as folder:
        lines = []
        for number, (part, content) in enumerate(zip(parts, hashes, strict=True), 1):
            relative = f"{PARTS_DIR}/{number}-{display_name(part.folder)}"
            (folder / relative).mkdir(parents=True)
            for name in (CONFIG_FILE, WEIGHTS_FILE, METADATA_FILE):
                if (part.folder / name).is_file():
                    shutil.copy2(part.folder / name, folder / relative / name)
            lines.append({"path": relative, "hash": content, "weight": part.weight})
        about = {
            "format_version": FORMAT_VERSION,
            "afina": afina.__version__,
            "hash": digest,
            "composition": lines,
        }
        write_json(folder / METADATA_FILE, about | {"base": dict(base)} | dict(metadata))
    return digest


def display_name(folder: Path) -> str:
    """Return a short name for an adapter's folder: that of its run where it lies in one."""
    resolved = folder.resolve()
    name = resolved.parent.name if resolved.name == "adapter" else resolved.name
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name).lstrip(".") or "adapter"


def recorded_base(folder: Path) -> dict[str, Any]:
    """Return what an adapter records about its base: name, revision, hash (None: PEFT), storage."""
    return as_plain_values(AdapterFolder.open(folder).base)


def as_plain_values(base: RecordedBase) -> dict[str, Any]:
    """Return a recorded base under the keys of afina.json, those that were recorded."""
    return base.model_dump(exclude_unset=True)


def common_base(parts: Sequence[WeightedAdapter], allow_other_base: bool = False) -> dict[str, Any]:
    """Return the base of all parts, in 4 bits where all were trained so.

    Hashes decide where both are known, else recorded names, else the shapes of each module.

    Raises:
        AdapterError: two parts record different bases.
    """
    folders = [AdapterFolder.open(part.folder) for part in parts]
    for number, folder in enumerate(folders):
        for other in folders[:number]:
            if not allow_other_base:
                _check_same_base(other, folder)
    bases = [folder.base for folder in folders]
    hashed = [base for base in bases if base.hash]
    storages = {base.storage or "plain" for base in bases}
    chosen = as_plain_values(hashed[0] if hashed else bases[0])
    return chosen | {"storage": "nf4" if storages == {"nf4"} else "plain"}


def _check_same_base(first: AdapterFolder, second: AdapterFolder) -> None:
    """Raise `AdapterError` where two adapters record, or have the shapes of, different bases."""
    bases = f"{first.path} was trained on {describe_base(first.base)}, "
    bases += f"this one on {describe_base(second.base)}"
    same = same_base(first.base, second.base)
    if same and first.base.hash and second.base.hash:
        return
    if same is not False:
        shapes, others = first.layer_shapes(), second.layer_shapes()
        differing = [path for path in shapes if others.get(path, shapes[path]) != shapes[path]]
        if not differing:
            return
        path = differing[0]
        bases += f"; the weight of {path} is {shapes[path]} in one and {others[path]} in the other"
    raise AdapterError(
        "these adapters have different bases",
        where=str(second.path),
        why=bases,
        hint="train them on the same base",
    )
