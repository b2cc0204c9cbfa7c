"""Findings of a gate, and the verdict on all of them.

finding    one observation: its rule, its level, a sentence, and evidence (a file, a module, tokens)
level      "block": it must not be loaded; "review": a person must decide; "note": information
verdict    block if any finding blocks, review if any needs one or a gate failed, else allow
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from afina.errors import AfinaError

Level = Literal["block", "review", "note"]
Verdict = Literal["allow", "review", "block"]


@dataclass(frozen=True)
class Finding:
    """One observation of a gate: `rule` is its short constant name, `evidence` has plain values."""

    gate: str
    rule: str
    level: Level
    text: str
    where: str = ""
    evidence: dict[str, Any] = field(default_factory=dict)


@dataclass
class Gate:
    """Findings and measures of a gate; `seconds` is its duration."""

    name: str
    findings: list[Finding] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def add_finding(
        self, rule: str, level: Level, text: str, where: str = "", **evidence: Any
    ) -> None:
        """Add a finding."""
        self.findings.append(Finding(self.name, rule, level, text, where, evidence))

    def block(self, rule: str, text: str, where: str = "", **evidence: Any) -> None:
        """Add a finding that blocks."""
        self.add_finding(rule, "block", text, where, **evidence)

    def review(self, rule: str, text: str, where: str = "", **evidence: Any) -> None:
        """Add a finding on which a person must decide."""
        self.add_finding(rule, "review", text, where, **evidence)

    def note(self, rule: str, text: str, where: str = "", **evidence: Any) -> None:
        """Add a finding for information."""
        self.add_finding(rule, "note", text, where, **evidence)

    @property
    def blocked(self) -> bool:
        """Whether a finding blocks."""
        return any(finding.level == "block" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, without the findings."""
        return {
            "name": self.name,
            "verdict": verdict(self.findings),
            "seconds": round(self.seconds, 3),
            **self.measured,
        }


def verdict(findings: Iterable[Finding]) -> Verdict:
    """Return the worst level among findings as a verdict."""
    levels = {finding.level for finding in findings}
    return "block" if "block" in levels else "review" if "review" in levels else "allow"


def run_gate(gate: Gate, run: Callable[[], object], level: Level = "block") -> Gate:
    """Run a gate; an error becomes a finding of `level`, as what was not checked is not allowed."""
    import time

    start = time.perf_counter()
    try:
        run()
    except AfinaError as error:
        gate.add_finding(
            "gate-error",
            level,
            f"{error.what}" + (f" ({error.why})" if error.why else ""),
            error.where or "",
        )
    except MemoryError:
        gate.add_finding("gate-error", level, "it needs more memory than there is")
    except Exception as error:
        gate.add_finding(
            "gate-error", level, f"the gate broke on it: {type(error).__name__}: {str(error)[:200]}"
        )
    gate.seconds = time.perf_counter() - start
    return gate


def as_dicts(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    """Return findings as plain values, the worst first."""
    order = {"block": 0, "review": 1, "note": 2}
    return [
        asdict(finding) for finding in sorted(findings, key=lambda finding: order[finding.level])
    ]
