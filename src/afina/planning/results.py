"""Results of `afina plan`: one run in full, or all methods in one table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from afina.data.several_files import summarize_file
from afina.data.unread import list_unused
from afina.errors import pluralize
from afina.io.result import (
    Content,
    Result,
    ResultTable,
    ResultText,
    format_bytes,
    format_seconds,
    format_value,
)
from afina.io.translation import Verbatim

DATA_LABELS = {
    "train": "train rows",
    "held_out": "eval rows",
    "pairs_per_batch": "pairs of a micro-batch",
    "longest": "longest sequence (tokens)",
    "labelled_percent": "target tokens (%)",
    "unused_columns": "columns not used",
    "rule": "read as",
    "unused_message_keys": "keys of messages that the template does not read",
    "control_tokens_as_text": "rows with control tokens in their texts, read as text",
    "control_tokens_as_tokens": "rows with control tokens in their texts, read as tokens",
    "stop_tokens_in_answers": "answers that ended with a stop token already",
    "split_chats": "chats with an example for each answer",
    "truncated_rows": "rows cut to max_length",
    "truncated_answers": "of these, answers without their end",
    "not_evaluated": "classes not evaluated",
    "rare_classes": "classes left out",
    "unread_folders": "folders not read",
}
ORDINALS = {2: "nd", 3: "rd"}
UPPER_BOUND = "- this family's layers are estimated from above (an upper bound), not counted"


@dataclass(frozen=True, eq=False)
class PlanResult(Result):
    """Plan of one run: settings, data, one example, trainable parameters, memory and time."""

    settings: Mapping[str, Any]
    base: Mapping[str, Any]
    data: Mapping[str, Any]
    steps: int | None
    trainable_parameters: int
    layers: int
    example: str | None
    cost: Mapping[str, Any] | None
    examples: Sequence[Mapping[str, Any]] = ()

    def content(self) -> list[Content]:
        """Return the tables of settings, data and costs, and the example with its target tokens."""
        return [
            *self._settings_and_data(),
            *self._example(),
            ResultText(self._trainable()),
            *(ResultText(self.base[k]) for k in ("coverage", "unquantized") if k in self.base),
            *([] if self.cost is None else _cost(self.cost)),
        ]

    def _settings_and_data(self) -> list[Content]:
        used = [
            (Verbatim(name), Verbatim(_setting(value)))
            for name, value in self.settings.items()
            if value not in (None, {}, [], "")
        ]
        parts: list[Content] = [ResultTable("settings", used)]
        skipped = self.data.get("skipped", [])
        if self.data:
            unused = list_unused(self.data.get("unused_columns", {}))
            columns = {"unused_columns": unused} if unused else {}
            kept = {k: v for k, v in self.data.items() if k not in ("unused_columns", "files")}
            facts = kept | columns | {"skipped": len(skipped)}
            rows = [
                (DATA_LABELS.get(name, name), format_value(value)) for name, value in facts.items()
            ]
            parts.append(ResultTable("data", rows))
        parts += [ResultText(summarize_file(file)) for file in self.data.get("files", ())]
        return parts + [ResultText(f"skipped {line}") for line in skipped]

    def _example(self) -> list[Content]:
        if self.example is None:
            return []
        if not self.examples:
            head = ResultText("one example, target tokens marked:", "bold")
            return [head, ResultText(Verbatim(self.example))]
        lines: list[Content] = []
        for example in self.examples:
            tokens, targets = (
                "" if example[name] is None else f", {pluralize(example[name], what)}"
                for name, what in (("tokens", "token"), ("targets", "target token"))
            )
            kind = "longest example" if example.get("is_longest") else "example"
            title = f"{kind} of {example['where']}{tokens}{targets}:"
            lines += [ResultText(title, "bold"), ResultText(Verbatim(example["text"]))]
        return lines

    def _trainable(self) -> str:
        trainable, total = self.trainable_parameters, self.base["parameters"]
        steps = f"; {pluralize(self.steps, 'optimizer step')}" if self.steps else ""
        return (
            f"trainable parameters: {trainable:,} of {total:,} ({100 * trainable / total:.2f}%), "
            f"in {pluralize(self.layers, 'module')}{steps}"
        )


@dataclass(frozen=True, eq=False)
class MethodsPlanResult(Result):
    """Plan of every method on one base and the same batches."""

    base: Mapping[str, Any]
    steps: int | None
    data: Mapping[str, Any]
    device: str
    machine_bytes: float | None
    methods: Sequence[Mapping[str, Any]]
    batch: Mapping[str, Any]
    exact: bool

    def content(self) -> list[Content]:
        """Return one table with a row per method; a method that cannot be used has the reason."""
        title = (
            f"{self.base['name']}, {self.base['parameters']:,} parameters, "
            f"{pluralize(self.batch['tokens'], 'token')} per micro-batch, on {self.device}"
        )
        head = (
            "method",
            "peak memory",
            "gradient checkpointing",
            "per optimizer step",
            "full run",
            "trainable parameters",
            "adapter file",
            "smallest GPU" if self.device == "cuda" else "fits here",
        )
        rows = [self._row(line) for line in self.methods]
        note = [] if self.exact else [ResultText(UPPER_BOUND)]
        return [ResultTable(title, rows, head), *note]

    def _row(self, line: Mapping[str, Any]) -> tuple[str, ...]:
        if "why" in line:
            return (line["method"], line["why"])
        fits = "yes" if line["fits"] else "no"
        return (
            line["method"],
            format_bytes(line["peak_bytes"]),
            _level(line["checkpointing"]["used"]),
            format_seconds(line["step_seconds"]),
            format_seconds(line["run_seconds"]),
            f"{line['trainable_parameters']:,}",
            format_bytes(line["file_bytes"]),
            _smallest_gpu(line) if self.device == "cuda" else fits,
        )


def _setting(value: Any) -> str:
    """Return a setting as it may be typed; consecutive layers as the first and the last."""
    if not isinstance(value, list):
        return str(value)
    consecutive = isinstance(value[0], int) and value == [*range(value[0], value[0] + len(value))]
    if consecutive and len(value) > 1:
        return f"{value[0]} to {value[-1]}"
    return ", ".join(map(str, value))


def _cost(cost: Mapping[str, Any]) -> list[Content]:
    batch, level = cost["batch"], cost["checkpointing"]
    memory = ", ".join(f"{name} {format_bytes(value)}" for name, value in cost["memory"].items())
    rows = [
        (
            "per micro-batch",
            f"{pluralize(batch['tokens'], 'token')}, "
            f"{pluralize(batch['labels'], cost.get('target_unit', 'target token'))}",
        ),
        ("peak memory", f"{format_bytes(cost['peak_bytes'])}   ({memory})"),
        ("per optimizer step", format_seconds(cost["step_seconds"]) + _phases(cost)),
        ("full run", format_seconds(cost["run_seconds"])),
        ("adapter file", format_bytes(cost["file_bytes"])),
    ]
    if level["why"]:
        rows.append(("gradient checkpointing", f"{_level(level['used'])}: {level['why']}"))
    if cost["device"] == "cuda":
        rows.append(("smallest GPU", _smallest_gpu(cost)))
    if cost["fits"] is not None:
        rows.append(("this machine", _fit(cost)))
    lines = [_remedy(change) for change in cost["remedies"]]
    if cost["fits"] is False and not cost["remedies"]:
        lines.append("- no setting makes it fit here: use a smaller base, or a larger machine")
    if not cost["exact"]:
        lines.append(UPPER_BOUND)
    lines += [f"- not counted: {what}" for what in cost.get("not_counted", [])]
    table = ResultTable(f"predicted, on {cost['device']}", rows)
    return [table, *map(ResultText, lines)]


def _fit(cost: Mapping[str, Any]) -> str:
    machine = format_bytes(cost["machine_bytes"])
    fits = f"fits in {machine}" if cost["fits"] else f"does NOT fit in {machine}"
    largest, largest_all = cost["largest_batch_tokens"], cost["largest_batch_tokens_all"]
    if largest:
        fits += f"; micro-batches of up to {largest:,} tokens fit"
    if largest_all and largest_all > (largest or 0):
        fits += f" ({largest_all:,} with --gradient-checkpointing all)"
    return fits


def _remedy(change: Mapping[str, Any]) -> str:
    """Return a change of settings that makes the run fit, as flags with its memory and time."""
    flags = " ".join(
        f"--{name.replace('_', '-')} {str(value).lower()}"
        for name, value in change["settings"].items()
    )
    peak, step = format_bytes(change["peak_bytes"]), format_seconds(change["step_seconds"])
    return f"- fits with {flags}: {peak}, {step} per optimizer step"


def _phases(cost: Mapping[str, Any]) -> str:
    """Return the phases of an optimizer step in seconds, where there is more than the update."""
    phases = {name: seconds for name, seconds in (cost.get("phases") or {}).items() if seconds}
    shown = ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in phases.items())
    return f"   ({shown})" if len(phases) > 1 else ""


def _level(used: str | int) -> str:
    """Return the level of gradient checkpointing in words: "off", "every 2nd layer", "all"."""
    if not isinstance(used, int):
        return str(used)
    return f"every {used}{ORDINALS.get(used, 'th')} layer"


def _smallest_gpu(line: Mapping[str, Any]) -> str:
    """Return the smallest GPU; in brackets a smaller one that suffices with checkpointing."""
    least, least_all = line["card_gib"], line["card_gib_all"]
    if least is None and least_all is None:
        return "none: more memory than any GPU has"
    if least is None:
        return f"none ({least_all} GB with checkpointing)"
    return f"{least} GB" + (f" ({least_all} GB with checkpointing)" if least_all < least else "")
