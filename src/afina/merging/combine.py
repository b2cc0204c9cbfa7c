"""`afina combine`: several adapters of one base into one, defined on their updates.

    D = merge(D_1, w_1, D_2, w_2, ...)      module by module, by a registered merge method

D_k is what adapter k adds to the weight of a module: scale * B A of a lora (with any scaling),
merged(W) - W of other methods. Scale and weight are applied once; a module without adapter k has a
zero update. Low-rank methods compute in float64 and entrywise methods in float32; the result is
rounded once, to float32 on disk. One module is in memory at a time.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from afina.errors import AdapterError, SettingsError
from afina.io.atomic import require_new_directory
from afina.io.composition import WeightedAdapter, common_base, write_composition
from afina.io.verified_copy import verified_copies
from afina.merging.entrywise import WeightedMatrix, random_numbers
from afina.merging.low_rank import (
    LowRankUpdate,
    TruncatedUpdate,
    WeightedUpdate,
    svd,
    truncate,
    truncate_dense,
)
from afina.merging.registry import MergeMethod, NoSettings, get_merge_method
from afina.merging.results import CombineResult
from afina.merging.sources import (
    AdapterSource,
    adapted_modules,
    attach_to_base,
    chat_record,
    open_sources,
)
from afina.merging.write import LoRATensorLayout, parent_config, tensor_layout, write_lora
from afina.settings import CombineSettings, Settings, as_settings
from afina.settings.combine import WeightSearchSettings


@dataclass
class RetainedEnergy:
    """The ratio of the squared norm of the exact combination that is kept, by module."""

    retained_energy: dict[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Return mean, least and by module; empty where nothing was truncated."""
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


@dataclass(frozen=True)
class _Merge:
    """A merge method with its settings, applied module by module."""

    method: MergeMethod
    settings: Settings
    rank: int | None
    seed: int
    energy: RetainedEnergy = field(default_factory=RetainedEnergy)

    def update(self, path: str, sources: list[AdapterSource]) -> LowRankUpdate | None:
        """Return the combined update at `path`; None at a module whose weight is no matrix."""
        here = [source for source in sources if path in source.config.target_modules]
        is_entrywise = self.method.form == "entrywise"
        inputs = self._matrices(path, here) if is_entrywise else _weighted_updates(path, sources)
        if inputs is None:
            return None
        merged = self.method.function(inputs, self.settings)
        if self.method.truncation == "never" or (
            self.method.truncation == "if_rank_given" and self.rank is None
        ):
            return merged if isinstance(merged, LowRankUpdate) else truncate_dense(merged, None).low
        truncated = _truncate(merged, self.rank or _sum_of_ranks(path, here))
        self.energy.retained_energy[path] = truncated.retained_energy
        return truncated.low

    def _matrices(self, path: str, here: list[AdapterSource]) -> list[WeightedMatrix] | None:
        updates = []
        for source in sorted(here, key=lambda source: source.hash):  # rounding depends on the order
            matrix = source.dense_update(path)
            if matrix is None:
                return None
            generator = random_numbers(self.seed, source.hash, path)
            updates.append(WeightedMatrix(matrix.float(), source.weight, generator))
        return updates


def combine(parts: Sequence[str | Path] | CombineSettings, **values: Any) -> CombineResult:
    """Combine adapters named "FOLDER:weight" into one; settings as in `afina combine --help`.

    Returns:
        What was written (an adapter or a composition), its hash, its parents and, where a rank
        truncated something, the retained energy.

    Raises:
        SettingsError: A setting is unknown, belongs to another merge method, or does not fit.
        AdapterError: The adapters cannot be combined in this way.

    Example:
        combine(["runs/polite:0.7", "runs/short:0.3"], output_dir="runs/both")
    """
    if not isinstance(parts, CombineSettings):
        parts = [str(part) for part in parts]
    settings = as_settings(CombineSettings, parts, "adapters", values)
    require_new_directory(settings.output_dir)
    with verified_copies(settings.require_audit, settings.adapters) as copies:
        return _combine(settings.model_copy(update={"adapters": copies}))


def _combine(settings: CombineSettings) -> CombineResult:
    method = get_merge_method(settings.merge_method)
    own = method.settings(settings)
    sources = open_sources(settings.adapters)
    base = common_base([source.part for source in sources], settings.allow_other_base)
    found: dict[str, Any] = {}
    merge = _Merge(method, own, settings.rank, settings.seed)
    if method.form == "weight_search":
        result = method.function(sources, settings)
        found = {"weights": result.weights, "search": result.record}
        merge = replace(merge, method=get_merge_method(result.merge_method))
        for source, weight in zip(sources, result.weights, strict=True):
            source.part = replace(source.part, weight=weight)
    used = [source for source in sources if source.weight != 0.0]
    if not used:
        raise SettingsError(
            "all weights are 0", where="adapters", hint="give at least one adapter another weight"
        )
    lineage = {
        "parents": [source.lineage_entry() for source in sources],
        "combination": _recipe(settings, own) | found,
    } | chat_record(sources)
    return CombineResult(
        out=str(settings.output_dir),
        how=settings.merge_method,
        parents=lineage["parents"],  # type: ignore[arg-type]
        **_write(used, merge, settings, base, lineage),
        **found,
    )


def _recipe(settings: CombineSettings, own: Settings) -> dict[str, Any]:
    """Return method and parameters of the combination, for its lineage."""
    recipe = {"how": settings.merge_method, "rank": settings.rank, "seed": settings.seed}
    searched = set(WeightSearchSettings.model_fields)
    return recipe | own.model_dump(mode="json", exclude=searched)


def _write(
    sources: list[AdapterSource],
    merge: _Merge,
    settings: CombineSettings,
    base: dict[str, Any],
    lineage: Mapping[str, Any],
) -> dict[str, Any]:
    method = merge.method
    invocations = {source.config.invocation for source in sources}
    is_low_rank = all(source.is_low_rank for source in sources)
    if method.composes and (len(invocations) > 1 or not is_low_rank):
        return _compose(sources, settings.output_dir, base, lineage)
    if len(invocations) > 1:
        raise AdapterError(
            f"{method.name} cannot make one adapter of these",
            where="adapters",
            why=f"an adapter has one invocation, and these have {len(invocations)} different ones",
            hint="--merge-method sum writes a composition",
        )
    if method.form == "low_rank" and not method.accepts_dense and not is_low_rank:
        other = next(source for source in sources if not source.is_low_rank)
        raise SettingsError(
            f"{method.name} combines loras only",
            where="adapters",
            why=f"{other.part.folder} is a {other.config.method} adapter",
            hint="afina extract converts any adapter to a lora",
        )
    if not is_low_rank:
        base = base | {"hash": attach_to_base(sources, settings).hash or base.get("hash")}
    paths = dict.fromkeys(path for source in sources for path in source.config.target_modules)
    digest, config = write_lora(
        settings.output_dir,
        _layers(sources, merge),
        list(paths),
        parent_config(sources),
        base,
        lineage,
        invocation=next(iter(invocations)),
    )
    ranks = [config.rank_of(path) for path in config.target_modules]
    return {
        "kind": "adapter",
        "hash": digest,
        "layers": len(ranks),
        "rank": max(ranks),
        **merge.energy.summary(),
    }


def _layers(
    sources: list[AdapterSource], merge: _Merge
) -> Iterator[tuple[str, LowRankUpdate, LoRATensorLayout]]:
    """Yield the combined update of each module with its tensor layout on disk."""
    for path, here in adapted_modules(sources):
        update = merge.update(path, sources)
        if update is not None:
            yield path, update, tensor_layout(path, here)


def _compose(
    sources: list[AdapterSource], out: Path, base: dict[str, Any], lineage: Mapping[str, Any]
) -> dict[str, Any]:
    for source in sources:
        if source.config.method == "full":
            raise AdapterError(
                "a full adapter cannot be part of a composition",
                where=str(source.part.folder),
                why="its weights replace those of the base, and cannot be weighted or added",
                hint="afina extract converts it to a lora; or --merge-method svd --rank R",
            )
    parts = [WeightedAdapter(source.part.folder, source.weight) for source in sources]
    digest = write_composition(out, parts, base, lineage)
    return {
        "kind": "composition",
        "hash": digest,
        "layers": len({p for s in sources for p in s.config.target_modules}),
    }


def _weighted_updates(path: str, sources: Sequence[AdapterSource]) -> list[WeightedUpdate] | None:
    """Return the updates at `path`: all low-rank (rank 0 where a source has none) or all dense.

    None at a module whose weight is no matrix.
    """
    here = [source for source in sources if path in source.config.target_modules]
    if any(source.attached is not None for source in here):
        matrices = [source.dense_update(path) for source in here]
        dense = [matrix for matrix in matrices if matrix is not None]
        if len(dense) < len(here):
            return None
        return [WeightedUpdate(matrix, s.weight) for matrix, s in zip(dense, here, strict=True)]
    updates = {source.hash: source.low_rank_update(path) for source in here}
    known = next(update for update in updates.values() if update is not None)
    zero = LowRankUpdate(known.b[:, :0], known.a[:0])
    return [WeightedUpdate(updates.get(source.hash) or zero, source.weight) for source in sources]


def _truncate(
    update: LowRankUpdate | Tensor, rank: int | None, energy: float | None = None
) -> TruncatedUpdate:
    if isinstance(update, LowRankUpdate):
        return truncate(update, rank, energy)
    return truncate_dense(update, rank, energy)


def _sum_of_ranks(path: str, here: Sequence[AdapterSource]) -> int:
    return sum(source.config.rank_of(path) for source in here)


def best_low_rank(
    path: str, here: list[AdapterSource], rank: int | None, energy: float | None = None
) -> TruncatedUpdate | None:
    """Return the best approximation of the weighted sum at `path`; None where it is no matrix.

    Its rank is `rank` at most, and the smallest that keeps `energy`; where neither is given, the
    sum of the adapters' ranks. Computed from the factors where all updates have some.
    """
    if rank is None and energy is None:
        rank = _sum_of_ranks(path, here)
    updates = _weighted_updates(path, here)
    return None if updates is None else _truncate(svd(updates, NoSettings()), rank, energy)
