"""`afina combine`: several adapters of one base into one, defined on their updates and not on the parts of them.

    sum            D = sum over k of w_k D_k        loras: their factors stacked, one lora, exact
                                                    other methods, or different invocations: a composition, exact
    svd            the best lora of a rank for that sum
    slerp          two loras: the point t = w_2 / (w_1 + w_2) of the arc between them, layer by layer, exact
    ties, dare,    entry by entry (see dense.py), then the best lora of a rank
    magnitude, della
    search         `sum` (or `svd`, given a rank) with weights found on a few examples (see search.py)

D_k is what adapter k adds to a layer's matrix: scale B A of a lora (whatever its scaling), merged(W) - W of the others.
Scale and weight are applied once; a layer that an adapter leaves alone is a zero update. All is reckoned in float64
(entry by entry in float32) and rounded once to float32 on disk. One layer is in memory at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from afina.errors import AdapterError, SettingsError
from afina.io.composition import WeightedAdapter, common_base, write_composition
from afina.io.verified_copy import verified_copies
from afina.merging import entrywise as dense
from afina.merging.low_rank import (
    LowRankUpdate,
    TruncatedUpdate,
    concatenate,
    slerp,
    truncate,
    truncate_dense,
)
from afina.merging.sources import AdapterSource, adapted_modules, attach_to_base, open_sources
from afina.merging.write import LoRATensorLayout, parent_config, tensor_layout, write_lora
from afina.settings import CombineSettings, make_settings

LOW_ENERGY = 0.9  # below this, the result says that a higher rank is needed


@dataclass
class RetainedEnergy:
    """What a combination kept of the exact one: the share of the squared norm, by layer."""

    retained_energy: dict[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Mean and least, and by layer; empty where nothing was cut."""
        if not self.retained_energy:
            return {}
        values = list(self.retained_energy.values())
        return {
            "energy": {
                "mean": sum(values) / len(values),
                "least": min(values),
                "layers": self.retained_energy,
            }
        }


def combine(parts: Sequence[str | Path] | CombineSettings, **values: Any) -> dict[str, Any]:
    """Combine adapters named "FOLDER:weight" into one at `out`; settings as in `afina combine --help`.

    Returns what was written (an adapter or a composition), its hash, its parents and, where a rank cut something off, the
    energy kept. Raises `SettingsError` or `AdapterError` where the combination would not mean what was asked for.
    """
    settings = (
        parts
        if isinstance(parts, CombineSettings)
        else make_settings(CombineSettings, {"adapters": [str(part) for part in parts], **values})
    )
    if settings.output_dir.exists() and (
        not settings.output_dir.is_dir() or any(settings.output_dir.iterdir())
    ):
        raise SettingsError(
            "this folder is not empty", where=str(settings.output_dir), hint="choose another --out"
        )
    with verified_copies(settings.require_audit, settings.adapters) as parts:
        return _combine(settings.model_copy(update={"adapters": parts}))


def _combine(settings: CombineSettings) -> dict[str, Any]:
    sources = open_sources(settings.adapters)
    base = common_base([source.part for source in sources])
    found: dict[str, Any] = {}
    if settings.merge_method == "search":
        from afina.merging.weight_search import search

        found = search(sources, settings)
        for source, weight in zip(sources, found["weights"], strict=True):
            source.part = replace(source.part, weight=weight)
    used = [source for source in sources if source.weight != 0.0]
    if not used:
        raise SettingsError(
            "all weights are 0", where="adapters", hint="leave out the adapters that are not wanted"
        )
    how = (
        ("svd" if settings.rank else "sum")
        if settings.merge_method == "search"
        else settings.merge_method
    )
    story = {
        "parents": [source.lineage_entry() for source in sources],
        "combination": _recipe(settings) | found,
    }
    result = _write(used, how, settings, base, story)
    return {
        "out": str(settings.output_dir),
        "how": settings.merge_method,
        "parents": story["parents"],
        **result,
        **found,
    }


def _recipe(settings: CombineSettings) -> dict[str, Any]:
    """What made the combination, for its lineage."""
    told = {"how": settings.merge_method, "rank": settings.rank, "seed": settings.seed}
    return told | ({"density": settings.density} if settings.merge_method in dense.METHODS else {})


def _write(
    sources: list[AdapterSource],
    how: str,
    settings: CombineSettings,
    base: dict[str, Any],
    story: dict[str, Any],
) -> dict[str, Any]:
    invocations = {source.config.invocation for source in sources}
    if how == "sum" and (len(invocations) > 1 or not all(source.is_low_rank for source in sources)):
        return _compose(sources, settings.output_dir, base, story)
    if len(invocations) > 1:
        why = "one adapter begins to act at one place, and these begin at different ones"
        raise AdapterError(
            f"{how} cannot make one adapter of these",
            where="adapters",
            why=why,
            hint="--how sum keeps them apart",
        )
    if how == "slerp":
        _check_slerp(sources)
    if not all(source.is_low_rank for source in sources):
        base = base | {"hash": attach_to_base(sources, settings).hash or base.get("hash")}
    kept = RetainedEnergy()
    paths = dict.fromkeys(path for source in sources for path in source.config.target_modules)
    layers = _layers(sources, how, settings, kept)
    digest, spec = write_lora(
        settings.output_dir,
        layers,
        list(paths),
        parent_config(sources),
        base,
        story,
        invocation=next(iter(invocations)),
    )
    ranks = [spec.rank_of(path) for path in spec.target_modules]
    return {
        "kind": "adapter",
        "hash": digest,
        "layers": len(ranks),
        "rank": max(ranks),
        **kept.summary(),
    }


def _compose(
    sources: list[AdapterSource], out: Path, base: dict[str, Any], story: dict[str, Any]
) -> dict[str, Any]:
    for source in sources:
        if source.config.method == "full":
            why = "trained weights take the base's place, and cannot act in part or beside others"
            raise AdapterError(
                "a fully trained model is no part of a sum",
                where=str(source.part.folder),
                why=why,
                hint="afina extract makes a lora of it, or --how svd --max-rank R",
            )
    parts = [WeightedAdapter(source.part.folder, source.weight) for source in sources]
    digest = write_composition(out, parts, base, story)
    return {
        "kind": "composition",
        "hash": digest,
        "layers": len({p for s in sources for p in s.config.target_modules}),
    }


def _check_slerp(sources: list[AdapterSource]) -> None:
    if len(sources) > 2 or any(source.weight < 0 for source in sources):
        raise SettingsError(
            "slerp lies between two adapters with positive weights",
            where="adapters",
            hint="--merge-method svd",
        )
    if not all(source.is_low_rank for source in sources):
        raise SettingsError(
            "slerp takes loras",
            where="adapters",
            hint="afina extract makes a lora of any adapter first",
        )


def _layers(
    sources: list[AdapterSource], how: str, settings: CombineSettings, kept: RetainedEnergy
) -> Iterator[tuple[str, LowRankUpdate, LoRATensorLayout]]:
    """The combined update of each layer, with how it lies on disk; what was cut off is noted in `kept`."""
    for path, here in adapted_modules(sources):
        if how == "sum":
            low = _stacked(path, here, [source.weight for source in here])
        elif how == "slerp":
            low = _slerp(path, here, sources)
            if settings.rank is not None:
                low = _note(path, truncate(low, settings.rank), kept)
        else:
            made = (
                best_low_rank(path, here, settings.rank)
                if how == "svd"
                else _entrywise(path, here, how, settings)
            )
            if made is None:
                continue
            low = _note(path, made, kept)
        yield path, low, tensor_layout(path, here)


def _note(path: str, made: TruncatedUpdate, kept: RetainedEnergy) -> LowRankUpdate:
    kept.retained_energy[path] = made.retained_energy
    return made.low


def _stacked(path: str, here: list[AdapterSource], weights: list[float]) -> LowRankUpdate:
    lows = [source.low_rank_update(path) for source in here]
    return concatenate(
        [(low, weight) for low, weight in zip(lows, weights, strict=True) if low is not None]
    )


def _slerp(path: str, here: list[AdapterSource], sources: list[AdapterSource]) -> LowRankUpdate:
    total = sum(source.weight for source in sources)
    t = sources[-1].weight / total if len(sources) == 2 else 0.0
    if len(here) == 1:  # the other is zero here, and has no direction
        return _stacked(path, here, [here[0].weight / total])
    first, second = (source.low_rank_update(path) for source in here)
    assert first is not None
    assert second is not None
    return _stacked(path, here, list(slerp(first, second, t)))


def _default_rank(path: str, here: list[AdapterSource]) -> int:
    return sum(source.config.rank_of(path) for source in here)


def best_low_rank(
    path: str, here: list[AdapterSource], rank: int | None, energy: float | None = None
) -> TruncatedUpdate | None:
    """The best approximation of the exact weighted sum at `path`; None at a module that is no matrix.

    Neither rank nor energy: of the parts' ranks added up. From the factors where all updates have some.
    """
    if rank is None and energy is None:
        rank = _default_rank(path, here)
    if all(source.attached is None for source in here):
        return truncate(_stacked(path, here, [source.weight for source in here]), rank, energy)
    matrices = [(source.dense_update(path), source.weight) for source in here]
    if any(matrix is None for matrix, _ in matrices):
        return None
    total = torch.stack([weight * matrix for matrix, weight in matrices if matrix is not None]).sum(
        0
    )
    return truncate_dense(total, rank, energy)


def _entrywise(
    path: str, here: list[AdapterSource], how: str, settings: CombineSettings
) -> TruncatedUpdate | None:
    parts = []
    for source in sorted(
        here, key=lambda source: source.hash
    ):  # rounding must not depend on the order either
        matrix = source.dense_update(path)
        if matrix is None:
            return None
        parts.append(
            (matrix.float(), source.weight, dense.random_numbers(settings.seed, source.hash, path))
        )
    made = dense.METHODS[how](parts, settings.density)
    return truncate_dense(made, settings.rank or _default_rank(path, here))
