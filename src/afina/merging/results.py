"""Results of `afina merge`, `export`, `combine`, `extract` and `show`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from afina.errors import pluralize
from afina.io.result import Content, Result, ResultTable, ResultText, next_command, optional
from afina.settings import POLICIES

LOW_ENERGY = 0.9  # mean retained energy below which the result may differ much from the exact sum
BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, eq=False)
class MergeResult(Result):
    """Written model or adapter file, and the proof that a merged model equals the adapted one."""

    out: str
    format: str | None = optional()
    base: str | None = optional()
    adapter: str | None = optional()
    kl: float | None = optional()
    max_logit_difference: float | None = optional()
    greedy_agreement: float | None = optional()
    probe_tokens: int | None = optional()
    quantization: str | None = optional()
    loss_adapted: float | None = optional()
    loss_merged: float | None = optional()
    weights: str | None = optional()
    alpha: float | None = optional()
    layers: int | None = optional()
    max_onnx_difference: float | None = optional()
    next_command: str | None = optional()

    def content(self) -> list[Content]:
        """Return the path of the model and, of a merged one, its difference to the adapted one."""
        if self.kl is None:
            return [ResultText(f"written: {self.out}"), *next_command(self.next_command)]
        agreement = 100 * (self.greedy_agreement or 0.0)
        positions = pluralize(self.probe_tokens or 0, "position")
        rows = [
            ("KL divergence from the adapted model", f"{self.kl:.3g} nats per token"),
            ("same greedy token", f"{agreement:.1f}% of {positions}"),
        ]
        if self.loss_merged is not None:
            losses = f"{self.loss_adapted:.4f} adapted, {self.loss_merged:.4f} merged"
            rows.append(("retention loss", losses))
        if self.max_onnx_difference is not None:
            rows.append(("largest difference of ONNX Runtime", f"{self.max_onnx_difference:.3g}"))
        return [ResultTable(f"written: {self.out}", rows), *next_command(self.next_command)]


ExportResult = MergeResult


@dataclass(frozen=True, eq=False)
class CombineResult(Result):
    """Written adapter or composition, its parents, and the energy that truncation retained."""

    out: str
    how: str
    parents: Sequence[Mapping[str, Any]]
    kind: str
    hash: str
    layers: int
    rank: int | None = optional()
    energy: Mapping[str, Any] | None = optional()
    weights: Sequence[float] | None = optional()
    search: Mapping[str, Any] | None = optional()

    def content(self) -> list[Content]:
        """Return the parents, the search's losses and the retained energy."""
        rows = [("parents", _parents(self.parents)), ("modules", str(self.layers))]
        if self.rank is not None:
            rows.append(("rank", f"up to {self.rank}"))
        notes: list[Content] = []
        if self.search is not None:
            found, losses = self.search["found"], self.search["losses"]
            choices = [*losses.items(), ("the weights found", found)]
            title = f"loss on {self.search['checked_on']} rows not searched on"
            rows.append((title, "\n".join(f"{loss:.4f}  {name}" for name, loss in choices)))
            simple = self.search["best_simple"]
            if found > losses[simple]:
                hint = f"- On these rows '{simple}' is better: use it, or search on more rows."
                notes.append(ResultText(hint))
        table = ResultTable(f"{self.kind} written: {self.out}", rows)
        return [table, *notes, *_energy(self.energy)]


@dataclass(frozen=True, eq=False)
class ExtractResult(Result):
    """Written low-rank adapter: its ranks, retained energy, left-out tensors and losses."""

    out: str
    hash: str
    layers: int
    rank: Mapping[str, int]
    left_out: Mapping[str, float]
    loss: Mapping[str, Any]
    energy: Mapping[str, Any] | None = optional()

    def content(self) -> list[Content]:
        """Return ranks, losses, the retained energy, and the tensors that were left out."""
        names = [name for name in ("base", "original", "extract") if name in self.loss]
        rows = [
            ("modules", str(self.layers)),
            ("rank", f"{self.rank['least']} to {self.rank['most']}"),
            (
                f"loss on {self.loss['rows']}",
                "\n".join(f"{self.loss[name]:.4f}  {name}" for name in names),
            ),
        ]
        parts = [ResultTable(f"adapter written: {self.out}", rows), *_energy(self.energy)]
        if self.left_out:
            largest = max(self.left_out, key=lambda name: self.left_out[name])
            parts.append(
                ResultText(
                    f"- {len(self.left_out)} tensors that are not matrices were left out; the "
                    f"largest change is in {largest} ({100 * self.left_out[largest]:.2f}%)."
                )
            )
        return parts


@dataclass(frozen=True, eq=False)
class AdapterInfo(Result):
    """Facts about one adapter folder, from its files alone."""

    folder: str
    hash: str
    unchanged: bool | None
    method: str
    rank: int
    ranks: Sequence[int]
    alpha: float
    scaling: str
    options: Mapping[str, Any]
    invocation: Sequence[int]
    layers: int
    where: Mapping[str, Sequence[int]]
    modules: Sequence[str]
    numbers: int
    bytes: int
    base: Mapping[str, Any]
    parents: Sequence[Mapping[str, Any]]
    combination: Mapping[str, Any] | None
    made_by: str
    norm_of: str
    norms: Mapping[str, float]

    def content(self) -> list[Content]:
        """Return method, base, size and parents, and the norms by module and layer."""
        return self.tables(self.folder)

    def tables(self, title: str) -> list[Content]:
        """Return the tables of `content` under another title."""
        ranks = f"{self.ranks[0]} to {self.ranks[-1]}" if len(self.ranks) > 1 else self.ranks[0]
        base_hash = (self.base.get("hash") or "hash not recorded")[:12]
        storage = self.base.get("storage", "plain")
        changed = "  NOT the one recorded in afina.json" if self.unchanged is False else ""
        rows = [
            ("method", self.method + (" (rsLoRA scaling)" if self.scaling == "rslora" else "")),
            ("rank, alpha", f"{ranks}, {self.alpha:g}"),
            ("base", f"{self.base.get('name')}  ({base_hash}, {storage})"),
            ("size", f"{self.numbers:,} parameters, {self.bytes / 1000:,.0f} kB"),
            ("hash", self.hash[:12] + changed),
            ("active", "from its invocation on" if self.invocation else "on all tokens"),
        ]
        if self.options:
            values = ", ".join(f"{name}: {value}" for name, value in self.options.items())
            rows.append(("method settings", values))
        if self.parents:
            how = (self.combination or {}).get("how", "?")
            rows.append((f"parents, by {how}", _parents(self.parents)))
        return [ResultTable(title, rows), self._norms()]

    def _norms(self) -> ResultTable:
        """Return a row per kind of module, with a bar per layer scaled to the largest norm."""
        from afina.merging.adapter_info import leaf_and_block

        largest = max(self.norms.values(), default=0.0) or 1.0
        by_leaf: dict[str, dict[int, float]] = {}
        for path, norm in self.norms.items():
            leaf, layer = leaf_and_block(path)
            by_leaf.setdefault(leaf, {})[layer] = norm
        layers = sorted({layer for norms in by_leaf.values() for layer in norms})
        inside = layers and layers[-1] >= 0
        head = ("module", f"layers {layers[0]} to {layers[-1]}" if inside else "")
        rows = [
            (leaf, "".join(_bar(norms.get(layer), largest) for layer in layers))
            for leaf, norms in by_leaf.items()
        ]
        title = f"norm of the {self.norm_of} by layer, largest {largest:.3g}"
        return ResultTable(title, rows, head)


@dataclass(frozen=True, eq=False)
class ShowResult(AdapterInfo):
    """Facts about the adapter of a run, with what the run measured."""

    run: str = ""
    kind: str = "adapter"
    evaluation: Mapping[str, Any] | None = None

    def content(self) -> list[Content]:
        """Return the adapter's tables, its eval loss or reward, and the run's verdict."""
        evaluation = self.evaluation or {}
        lines = [f"- {sentence}" for sentence in evaluation.get("verdict", [])]
        if "losses" in evaluation:
            rewarded = evaluation.get("objective") in POLICIES  # whose losses are minus the reward
            sign, name = (-1, "reward") if rewarded else (1, "loss")
            losses = evaluation["losses"]
            before, after = sign * losses["eval_loss_before"], sign * losses["eval_loss_after"]
            steps = pluralize(evaluation["steps"], "optimizer step")
            lines.insert(0, f"eval {name}: {before:.4f} before, {after:.4f} after {steps}")
        return [*self.tables(self.run), *map(ResultText, lines)]


@dataclass(frozen=True, eq=False)
class CompositionInfo(Result):
    """Facts about a composition: several adapters, active together, each with a weight."""

    run: str
    kind: str
    hash: str | None
    base: Mapping[str, Any] | None
    parts: Sequence[Mapping[str, Any]]

    def content(self) -> list[Content]:
        """Return the tables of each adapter below its weight."""
        lines: list[Content] = [
            ResultText(f"composition {self.run}: {len(self.parts)} adapters active together")
        ]
        for part in self.parts:
            info = AdapterInfo(**{name: part[name] for name in part if name != "weight"})
            lines += [ResultText(f"\nweight {part['weight']:g}", "bold"), *info.content()]
        return lines


def _bar(norm: float | None, largest: float) -> str:
    return " " if norm is None else BARS[min(7, int(8 * norm / largest))]


def _parents(parents: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(
        f"{one['weight']:g} x {one['name']}  ({one['method']}, {(one['hash'] or 'no hash')[:12]})"
        for one in parents
    )


def _energy(energy: Mapping[str, Any] | None) -> list[Content]:
    """Return the ratio of the exact update's squared norm that truncation retained."""
    if energy is None:
        return []
    lines = [
        f"- retained energy: {100 * energy['mean']:.1f}% of the exact update's squared norm on "
        f"average, {100 * energy['least']:.1f}% in the module that loses most"
    ]
    if energy["mean"] < LOW_ENERGY:
        lines.append(
            "- The outputs may differ much from those of the exact update: a higher --rank retains "
            "more."
        )
    return [ResultText(line) for line in lines]
