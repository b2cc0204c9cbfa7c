"""What a gate says, and what all of them together say.

finding    one observation: its rule, its level, a sentence, and the evidence (a file, a layer, tokens)
level      "block": it must not be loaded; "review": a person must look; "note": worth knowing
verdict    block if any finding blocks, review if any asks for one or a gate could not say, else allow
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from afina.errors import AfinaError

Level = Literal["block", "review", "note"]
Verdict = Literal["allow", "review", "block"]


@dataclass(frozen=True)
class Finding:
    """One observation of a gate. `rule` is its short constant name; `evidence` holds plain values."""

    gate: str
    rule: str
    level: Level
    text: str
    where: str = ""
    evidence: dict[str, Any] = field(default_factory=dict)


@dataclass
class Gate:
    """What one gate found and measured; `seconds` is what it took."""

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
        """Add a finding that a person must look at."""
        self.add_finding(rule, "review", text, where, **evidence)

    def note(self, rule: str, text: str, where: str = "", **evidence: Any) -> None:
        """Add a finding worth knowing."""
        self.add_finding(rule, "note", text, where, **evidence)

    @property
    def blocked(self) -> bool:
        """Whether a finding blocks."""
        return any(finding.level == "block" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, without the findings."""
        return {
            "name": self.name,
            "verdict": verdict(self.findings),
            "seconds": round(self.seconds, 3),
            **self.measured,
        }


def verdict(findings: Iterable[Finding]) -> Verdict:
    """The worst of the findings."""
    levels = {finding.level for finding in findings}
    return "block" if "block" in levels else "review" if "review" in levels else "allow"


def run_gate(gate: Gate, run: Callable[[], object], level: Level = "block") -> Gate:
    """Run a gate; any error inside becomes a finding of `level`: what could not be looked at is not allowed."""
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
        gate.add_finding("gate-error", level, "it asks for more memory than there is")
    except Exception as error:
        gate.add_finding(
            "gate-error", level, f"the gate broke on it: {type(error).__name__}: {str(error)[:200]}"
        )
    gate.seconds = time.perf_counter() - start
    return gate


def as_dicts(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    """Findings as plain values, the worst first."""
    order = {"block": 0, "review": 1, "note": 2}
    return [
        asdict(finding) for finding in sorted(findings, key=lambda finding: order[finding.level])
    ]
