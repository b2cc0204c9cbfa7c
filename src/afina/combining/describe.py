"""`afina show`: what an adapter is, from its files alone; the base need not be there."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afina.combining import lowrank
from afina.combining.parts import Source
from afina.combining.stream import Reader
from afina.config import ShowSettings, make_settings
from afina.delta.composition import Part, identity, is_composition, parts_of, spec_of, told_base
from afina.delta.files import STORY, WEIGHTS, adapter_folder, read_run, read_story
from afina.delta.targets import block_number


def show(run: str | Path | ShowSettings) -> dict[str, Any]:
    """What the adapter in `run` is: method, rank, where, size, base, parents, evaluation, and norms by layer.

    A composition lists its parts, each described likewise.
    """
    settings = run if isinstance(run, ShowSettings) else make_settings(ShowSettings, {"run": run})
    path = settings.run
    if is_composition(path):
        story = read_story(path)
        parts = [{"weight": part.weight, **describe(part.folder)} for part in parts_of(path)]
        return {"run": str(path), "kind": "composition", "hash": story.get("hash"), "base": story.get("base"), "parts": parts}
    return {"run": str(path), "kind": "adapter", **describe(adapter_folder(path)), "evaluation": _evaluation(read_run(path))}


def describe(folder: Path) -> dict[str, Any]:
    """The facts about one adapter folder."""
    spec, story = spec_of(folder), read_story(folder)
    reader, digest = Reader(folder / WEIGHTS), identity(folder)
    source = Source(Part(folder), spec, digest, reader)
    shapes = [entry["shape"] for entry in reader.entries.values()]
    return {
        "folder": str(folder),
        "hash": digest,
        "unchanged": story["hash"] == digest if "hash" in story else None,
        "method": spec.method,
        "rank": spec.rank,
        "ranks": sorted({spec.rank_of(path) for path in spec.targets}),
        "alpha": spec.alpha,
        "scaling": spec.scaling,
        "options": dict(spec.options),
        "invocation": list(spec.invocation),
        "layers": len(spec.targets),
        "where": _where(spec.targets),
        "modules": list(spec.modules),
        "numbers": sum(_product(shape) for shape in shapes),
        "bytes": (folder / WEIGHTS).stat().st_size,
        "base": told_base(folder),
        "parents": story.get("parents", []),
        "combination": story.get("combination"),
        "made_by": f"afina {story['afina']}" if "afina" in story else f"no {STORY}: made elsewhere",
        "norm_of": "update" if source.is_low else "numbers",
        "norms": {path: _norm(source, path) for path in spec.targets},
    }


def _norm(source: Source, path: str) -> float:
    """||D||, Frobenius, where the file tells it; else the norm of the numbers that it holds for the layer."""
    low = source.low(path) if source.is_low else None
    if low is not None:
        return lowrank.norm(low)
    return sum(float(source.reader[name].double().square().sum()) for name in source.by_path[path]) ** 0.5


def _product(shape: list[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def _where(paths: tuple[str, ...]) -> dict[str, list[int]]:
    """Names of the layers, each with the blocks that it is adapted in; [] outside blocks."""
    where: dict[str, list[int]] = {}
    for path in paths:
        leaf, block = leaf_and_block(path)
        where.setdefault(leaf, []).extend([] if block < 0 else [block])
    return where


def leaf_and_block(path: str) -> tuple[str, int]:
    """("mlp.up_proj", 3) of model.layers.3.mlp.up_proj; the whole path and -1 outside blocks."""
    block = block_number(path)
    return (path, -1) if block is None else (re.sub(r"^.*?\.\d+\.", "", path), block)


def _evaluation(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """What its run measured, in short; None where there is no run."""
    if not run:
        return None
    kept = {key: run[key] for key in ("losses", "objective", "classes", "verdict", "steps", "seconds") if key in run}
    return kept | {"data": run.get("data", {}).get("path")}
