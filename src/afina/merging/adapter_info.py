"""`afina show`: what an adapter is, from its files alone; the base need not be there."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afina.adapters.target_selection import layer_index
from afina.io.adapter_folder import AdapterFolder, adapter_folder
from afina.io.adapter_metadata import METADATA_FILE, read_metadata
from afina.io.composition import (
    WeightedAdapter,
    as_plain_values,
    expand_composition,
    is_composition,
)
from afina.io.run_record import read_run_record
from afina.merging import low_rank as lowrank
from afina.merging.results import AdapterInfo, CompositionInfo, ShowResult
from afina.merging.sources import AdapterSource
from afina.merging.stream import TensorReader
from afina.settings import ShowSettings, as_settings


def show(run: str | Path | ShowSettings) -> ShowResult | CompositionInfo:
    """Return method, rank, modules, size, base, parents, evaluation and norms of an adapter.

    A composition has a list of its parts, each with the same facts.
    """
    path = as_settings(ShowSettings, run, "adapter", {}).adapter
    if is_composition(path):
        metadata = read_metadata(path)
        parts = [
            {"weight": part.weight, **adapter_info(part.folder)}
            for part in expand_composition(path)
        ]
        return CompositionInfo(
            run=str(path),
            kind="composition",
            hash=metadata.get("hash"),
            base=metadata.get("base"),
            parts=parts,
        )
    return ShowResult(
        **adapter_info(adapter_folder(path)),
        run=str(path),
        evaluation=_evaluation(read_run_record(path)),
    )


def adapter_info(folder: Path) -> AdapterInfo:
    """The facts about one adapter folder."""
    opened, metadata = AdapterFolder.open(folder), read_metadata(folder)
    spec, digest = opened.config(), opened.hash()
    reader = TensorReader(opened.weights_file, entries=opened.entries)
    source = AdapterSource(WeightedAdapter(folder), opened, spec, digest, reader)
    return AdapterInfo(
        folder=str(folder),
        hash=digest,
        unchanged=metadata["hash"] == digest if "hash" in metadata else None,
        method=spec.method,
        rank=spec.rank,
        ranks=sorted({spec.rank_of(path) for path in spec.target_modules}),
        alpha=spec.alpha,
        scaling=spec.scaling,
        options=dict(spec.method_settings),
        invocation=list(spec.invocation),
        layers=len(spec.target_modules),
        where=_where(spec.target_modules),
        modules=list(spec.modules_to_save),
        numbers=sum(entry.num_elements for entry in opened.entries.values()),
        bytes=opened.weights_file.stat().st_size,
        base=as_plain_values(opened.base),
        parents=metadata.get("parents", []),
        combination=metadata.get("combination"),
        made_by=f"afina {metadata['afina']}"
        if "afina" in metadata
        else f"no {METADATA_FILE}: written by another program",
        norm_of="update" if source.is_low_rank else "numbers",
        norms={path: _norm(source, path) for path in spec.target_modules},
    )


def _norm(source: AdapterSource, path: str) -> float:
    """Return ||D|| (Frobenius) where the file determines it, else the norm of the parameters."""
    low = source.low_rank_update(path) if source.is_low_rank else None
    if low is not None:
        return lowrank.norm(low)
    return (
        sum(
            float(source.reader[name].double().square().sum())
            for name in source.tensors_by_module[path]
        )
        ** 0.5
    )


def _where(paths: tuple[str, ...]) -> dict[str, list[int]]:
    """Names of the layers, each with the blocks that it is adapted in; [] outside blocks."""
    where: dict[str, list[int]] = {}
    for path in paths:
        leaf, block = leaf_and_block(path)
        where.setdefault(leaf, []).extend([] if block < 0 else [block])
    return where


def leaf_and_block(path: str) -> tuple[str, int]:
    """Return ("mlp.up_proj", 3) of model.layers.3.mlp.up_proj; path and -1 outside layers."""
    block = layer_index(path)
    return (path, -1) if block is None else (re.sub(r"^.*?\.\d+\.", "", path), block)


def _evaluation(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """What its run measured, in short; None where there is no run."""
    if not run:
        return None
    kept = {
        key: run[key]
        for key in ("losses", "objective", "classes", "verdict", "steps", "seconds")
        if key in run
    }
    return kept | {"data": run.get("data", {}).get("path")}
