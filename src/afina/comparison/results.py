"""Results of `afina compare` and `afina advise`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afina.io.result import Content, Result, ResultTable, ResultText, format_bytes, format_seconds
from afina.io.translation import catalogue


@dataclass(frozen=True, eq=False)
class ComparisonResult(Result):
    """Comparison of methods, the content of compare.json: figures, tests, costs and what to use."""

    kind: str
    format_version: int
    afina: str
    folder: str
    settings: Mapping[str, Any]
    objective: str
    metric: str
    score_rows: int
    data: Mapping[str, Any]
    base: Mapping[str, Any]
    environment: Mapping[str, Any]
    schedule: Mapping[str, Any]
    failed: Mapping[str, str]
    notes: Sequence[tuple[str, Mapping[str, Any]]]
    base_figures: Mapping[str, Any]
    nf4_figures: Mapping[str, Any] | None
    methods: Mapping[str, Mapping[str, Any]]
    tests: Sequence[Mapping[str, Any]]
    fronts: Mapping[str, Sequence[str]]
    recommendation: Mapping[str, Any]
    examples: Sequence[Mapping[str, Any]]

    def content(self) -> list[Content]:
        """Return the tables of quality and cost, the recommendation, its reasons and the notes."""
        from afina.comparison.report import view

        shown = view(self, self.settings["lang"])
        tables = [
            ResultTable(shown["w"][part], shown[part]["rows"], shown[part]["head"])
            for part in ("quality", "cost")
        ]
        lines = [f"- {line}" for line in (*shown["reasons"], *shown["notes"])]
        report = ResultText(f"{self.folder}/report.html", wraps=False)
        return [*tables, ResultText(shown["answer"], "bold"), *map(ResultText, lines), report]

    def to_markdown(self) -> str:
        """Return report.md, in the language of the settings."""
        from afina.comparison.report import render_report

        return render_report(self, "report.md", self.settings["lang"])

    def write_report(self) -> None:
        """Write report.md and report.html into the comparison's folder."""
        from afina.comparison.report import write_report

        write_report(self, Path(self.folder), self.settings["lang"])


WITHOUT_METHOD = ("prompt", "find", "none")  # advice that names no method


@dataclass(frozen=True, eq=False)
class AdviceResult(Result):
    """Advice without training: what to use, with which settings, and the reasons with sources."""

    use: str
    settings: Mapping[str, Any]
    plan: Mapping[str, Any] | None
    lang: str
    command: str | None
    then: str | None
    reasons: Sequence[Mapping[str, Any]]
    why: bool = False  # whether the reasons are printed

    def content(self) -> list[Content]:
        """Return the advice in two sentences, as a table, and its reasons where requested."""
        from afina.comparison.findings import messages

        words = messages(self.lang)
        parts: list[Content] = [
            ResultText(self.summary()),
            ResultTable(words["title"], self.rows()),
        ]
        if not self.why:
            return [*parts, ResultText(words["see_why"])]
        return [*parts, *(ResultText(_reason(one, words["source"])) for one in self.reasons)]

    def summary(self) -> str:
        """Return what to do, and what it costs or why, in two sentences."""
        from afina.comparison.findings import messages

        words = messages(self.lang)
        first = words[f"plain_{self.use}"].format(rank=self.settings.get("rank"))
        if not self.plan:
            return " ".join([first, *(reason["text"] for reason in self.reasons[:1])])
        memory, limit = self.plan["peak_bytes"], self.plan["machine"]["memory_bytes"]
        sizes = {"memory": format_bytes(memory), "available": format_bytes(limit) if limit else ""}
        sizes = {key: catalogue(self.lang).number(size) or size for key, size in sizes.items()}
        return f"{first} {words['plain_cost' if limit else 'plain_memory'].format(**sizes)}"

    def rows(self) -> list[tuple[str, str]]:
        """Return the lines (what, value) of the advice."""
        from afina.comparison.findings import messages

        words = messages(self.lang)
        use = words[self.use] if self.use in WITHOUT_METHOD else self.use
        lines = [(words["use"], use), *self._plan_rows(words)]
        if self.command:
            lines.append((words["command"], self.command))
        if self.then:
            lines.append((words["then"], self.then))
        return lines

    def _plan_rows(self, words: Mapping[str, str]) -> list[tuple[str, str]]:
        if not self.plan:
            return []
        machine, lines = self.plan["machine"], []
        if machine["memory_bytes"]:
            name = words["machine" if machine["detected"] else "available"]
            lines.append((name, f"{machine['device']}, {format_bytes(machine['memory_bytes'])}"))
        lines.append((words["memory"], format_bytes(self.plan["peak_bytes"])))
        if self.plan["step_seconds"]:
            lines.append((words["step"], format_seconds(self.plan["step_seconds"])))
        return lines


def _reason(reason: Mapping[str, Any], source: str) -> str:
    text = f"- {reason['text']}"
    if reason["source"]:
        text += f" ({source} {reason['source']}, {reason['link']})"
    return f"{text}\n  {reason['study']}" if reason.get("study") else text
