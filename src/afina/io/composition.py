"""Several adapters that act together, each with a weight: as the user types them, and as a folder.

    A:0.6,B:0.4              two adapters or runs over the same tokens, without any file

    COMPOSITION/afina.json             "composition": a line a part: its path, its hash, its weight
    COMPOSITION/parts/1-tone/          the parts, copied whole: each an adapter folder of its own
    COMPOSITION/parts/2-law/

The outputs' parts are summed: y = y0 + sum over k of w_k D_k(x, y0), exact for any methods side by side.
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
from afina.adapters.base import AdapterConfig
from afina.adapters.loading import (
    CONFIG,
    FORMAT_VERSION,
    METADATA_FILE,
    WEIGHTS,
    adapter_folder,
    hash_adapter_file,
    read_adapter_config,
    read_json_object,
    read_metadata,
)
from afina.errors import AdapterError, SettingsError
from afina.io.atomic import atomic_directory, write_json
from afina.io.safetensors import read_header

PARTS = "parts"


@dataclass(frozen=True)
class WeightedAdapter:
    """One adapter of a combination: the folder with its files, and its weight."""

    folder: Path
    weight: float = 1.0


def parse_weighted(text: str | Path) -> tuple[Path, float]:
    """("A", 0.6) from "A:0.6", weight 1 from "A"; raises `SettingsError` where the weight is no finite number."""
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
            f"a weight cannot be {number!r}",
            where=text,
            hint="FOLDER:0.6, or FOLDER:-1 to take a skill out",
        )
    return Path(folder), weight


def parse_weighted_list(run: Path) -> list[tuple[Path, float]]:
    """The adapters meant by `--run`: one folder, or several with weights, "A:0.6,B:0.4"."""
    if run.exists() or not set(":,") & set(str(run)):
        return [(run, 1.0)]
    return [parse_weighted(piece) for piece in str(run).split(",")]


def is_composition(folder: Path) -> bool:
    """Whether the folder names its parts instead of being one adapter."""
    return not (folder / CONFIG).is_file() and (folder / METADATA_FILE).is_file()


def expand_composition(path: Path, weight: float = 1.0) -> list[WeightedAdapter]:
    """The adapters in `path`: itself, or a composition's parts, whose weights are multiplied by `weight`.

    Raises `AdapterError` where a part is missing, outside the folder, or not the one that was put there.
    """
    if not is_composition(path):
        return [WeightedAdapter(adapter_folder(path), weight)]
    parts = []
    for line in read_metadata(path).get("composition", ()):
        try:
            folder, digest, own = path / line["path"], line["hash"], float(line["weight"])
        except (KeyError, TypeError, ValueError) as error:
            raise AdapterError(
                "a part is not described", where=str(path / METADATA_FILE), why=repr(error)
            ) from error
        if not folder.resolve().is_relative_to(path.resolve()):
            raise AdapterError(
                "a part lies outside its composition",
                where=f"{path / METADATA_FILE}: {line['path']}",
            )
        if hash_adapter_folder(adapter_folder(folder)) != digest:
            why = f"its hash is not {digest[:12]}, as the composition says"
            raise AdapterError(
                "a part was changed", where=str(folder), why=why, hint="combine the adapters again"
            )
        parts.append(WeightedAdapter(folder, weight * own))
    if not parts:
        raise AdapterError(
            "no adapter here",
            where=str(path),
            hint="give a run folder, or one with adapter_config.json",
        )
    return parts


def read_config(folder: Path) -> AdapterConfig:
    """What the adapter in `folder` is, from its configuration and the names of its tensors."""
    if not (folder / WEIGHTS).is_file():
        raise AdapterError("no adapter_model.safetensors", where=str(folder))
    if not (folder / METADATA_FILE).is_file() and read_json_object(folder / CONFIG).get(
        "trainable_token_indices"
    ):
        why = "PEFT tells its tokens by number, and only the base's tokenizer knows what they are"
        raise AdapterError("this adapter owns tokens", where=str(folder), why=why)
    return read_adapter_config(
        folder, [name for name in read_header(folder / WEIGHTS)[1] if name != "__metadata__"]
    )


def hash_adapter_folder(folder: Path) -> str:
    """Hash of an adapter's content, reckoned anew: that of its tensors and its spec."""
    return hash_adapter_file(folder / WEIGHTS, read_config(folder).canonical())


def composition_hash(parts: Sequence[tuple[str, float]]) -> str:
    """Identity of a composition: sha256 (hex) over (hash, weight) of its parts, whatever their order."""
    return hashlib.sha256(json.dumps(sorted(parts)).encode()).hexdigest()


def write_composition(
    out: Path, parts: Sequence[WeightedAdapter], base: Mapping[str, Any], story: Mapping[str, Any]
) -> str:
    """Copy the parts into `out` and name them in its afina.json; returns the composition's hash."""
    hashes = [hash_adapter_folder(part.folder) for part in parts]
    digest = composition_hash([(h, part.weight) for h, part in zip(hashes, parts, strict=True)])
    with atomic_directory(out) as folder:
        lines = []
        for number, (part, content) in enumerate(zip(parts, hashes, strict=True), 1):
            place = f"{PARTS}/{number}-{display_name(part.folder)}"
            (folder / place).mkdir(parents=True)
            for name in (CONFIG, WEIGHTS, METADATA_FILE):
                if (part.folder / name).is_file():
                    shutil.copy2(part.folder / name, folder / place / name)
            lines.append({"path": place, "hash": content, "weight": part.weight})
        about = {
            "format_version": FORMAT_VERSION,
            "afina": afina.__version__,
            "hash": digest,
            "composition": lines,
        }
        write_json(folder / METADATA_FILE, about | {"base": dict(base)} | dict(story))
    return digest


def display_name(folder: Path) -> str:
    """A short name for an adapter's folder: that of its run where it lies in one."""
    resolved = folder.resolve()
    name = resolved.parent.name if resolved.name == "adapter" else resolved.name
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name).lstrip(".") or "adapter"


def recorded_base(folder: Path) -> dict[str, Any]:
    """What an adapter says about its base: name, revision, hash (None in PEFT's files), storage."""
    story = read_metadata(folder).get("base")
    if story:
        return dict(story)
    config = read_json_object(folder / CONFIG)
    return {
        "name": config.get("base_model_name_or_path"),
        "revision": config.get("revision"),
        "hash": None,
        "storage": "plain",
    }


def common_base(parts: Sequence[WeightedAdapter]) -> dict[str, Any]:
    """The base that all parts were made for, in 4 bits where all were trained so.

    Raises `AdapterError` where two of them name different ones.
    """
    known: tuple[WeightedAdapter, dict[str, Any]] | None = None
    for part in parts:
        base = recorded_base(part.folder)
        if not base.get("hash"):
            continue
        if known is None:
            known = part, base
        elif base["hash"] != known[1]["hash"]:
            why = (
                f"{known[0].folder} was made for {known[1]['name']} ({known[1]['hash'][:12]}), this one for "
                f"{base['name']} ({base['hash'][:12]})"
            )
            raise AdapterError(
                "these adapters have different bases",
                where=str(part.folder),
                why=why,
                hint="train them on the same base",
            )
    storages = {recorded_base(part.folder).get("storage", "plain") for part in parts}
    base = known[1] if known is not None else recorded_base(parts[0].folder)
    return base | {"storage": "nf4" if storages == {"nf4"} else "plain"}
