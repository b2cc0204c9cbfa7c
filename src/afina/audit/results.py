"""Results of `afina audit`, `mitigate`, `sign`, `verify` and `revoke`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from afina.io.result import Content, Result, ResultTable, ResultText, optional

VERDICTS = {
    "allow": "allow: no gate found a reason against it",
    "review": "review: a manual review is needed before it is used",
    "block": "block: do not load it",
}
MAX_EVIDENCE = 5  # lines, and tokens, of the evidence of one finding


@dataclass(frozen=True, eq=False)
class AuditResult(Result):
    """Audit report: verdict, findings with their evidence, and what each gate measured."""

    format_version: int
    afina: str
    at: str
    adapter: str
    hash: str | None
    parts: Sequence[str]
    base: str | None
    strict: bool
    verdict: str
    findings: Sequence[Mapping[str, Any]]
    gates: Sequence[Mapping[str, Any]]
    remedies: Sequence[str]
    exit_status: int
    accepted: str | None = optional()
    kept: str | None = optional()

    def content(self) -> list[Content]:
        """Return the verdict, the findings that explain it, and the gates that were run."""
        gates = ", ".join(f"{gate['name']} {gate['seconds']:.2f} s" for gate in self.gates)
        rows = [
            ("adapter", self.adapter),
            ("hash", self.hash or "none: its files could not be trusted"),
            ("gates run", gates),
            ("report", self.kept or "not stored"),
        ]
        lines: list[Content] = [ResultText(VERDICTS[self.verdict], "bold")]
        for finding in self.findings:
            lines += map(ResultText, _finding(finding))
        lines += [ResultText(f"mitigation: {command}", wraps=False) for command in self.remedies]
        if self.accepted:
            lines.append(ResultText(f"accepted after manual review: {self.accepted}"))
        return [*lines, ResultTable("", rows)]


@dataclass(frozen=True, eq=False)
class MitigationResult(Result):
    """Mitigated adapter: loss and attack success before, after and by attempt; its audit."""

    out: str
    hash: str
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    cost: float
    tried: Sequence[Mapping[str, Any]]
    triggers: Sequence[str]
    payload: str
    verdict: str
    report: Mapping[str, Any]

    def content(self) -> list[Content]:
        """Return the attempts, the one that was written, and the verdict of its audit."""
        attempts = [{"how": "unchanged", "strength": 0.0, **self.before}, *self.tried]
        head = ("mitigation", "strength", "attack success", "task loss")
        triggers = ", ".join(repr(text) for text in self.triggers) or "none known"
        rows = [
            ("written (*)", self.out),
            ("hash", self.hash),
            ("cost", f"{100 * self.cost:+.1f}% task loss"),
            ("triggers", triggers),
            ("audit of the result", VERDICTS[self.verdict]),
        ]
        limit = "Mitigation weakens what the audit found; what it did not find may remain."
        table = ResultTable("", [self._attempt(one) for one in attempts], head)
        return [table, ResultTable("", rows), ResultText(limit)]

    def _attempt(self, one: Mapping[str, Any]) -> tuple[str, ...]:
        attack = "?" if one["attack"] is None else f"{100 * one['attack']:.0f}%"
        written = " *" if one is self.after else ""
        return (one["how"] + written, f"{one['strength']:g}", attack, f"{one['loss']:.4f}")


@dataclass(frozen=True, eq=False)
class SignResult(Result):
    """Manifest of a signed adapter, with the signature's file, or the key that verified it."""

    folder: str
    manifest: Mapping[str, Any]
    signature: str | None = optional()
    verified: bool | None = optional()
    key: str | None = optional()

    def __getitem__(self, name: str) -> Any:
        """Return a value of the result or of its manifest, whose keys stand at the top level."""
        return self.manifest[name] if name in self.manifest else super().__getitem__(name)

    def _names(self) -> list[str]:
        return [*(name for name in super()._names() if name != "manifest"), *self.manifest]

    def content(self) -> list[Content]:
        """Return the signing key, the files, the base and the parents."""
        manifest = self.manifest
        done = f"verified: signed by {self.key}" if self.verified else f"signed: {self.signature}"
        base = manifest["base"]
        parents = "\n".join(
            f"{one['weight']:g} x {one['name']}  ({(one['hash'] or 'no hash')[:12]})"
            for one in manifest["parents"]
        )
        rows = [
            ("adapter", str(manifest["adapter"])),
            ("files", ", ".join(manifest["files"])),
            ("base", f"{base['name']}  ({(base['hash'] or 'hash not recorded')[:12]})"),
            ("parents", parents or "none"),
        ]
        return [ResultText(done), ResultTable("", rows)]


@dataclass(frozen=True, eq=False)
class RevokeResult(Result):
    """Revoked hash, with the reason and the list that it was added to."""

    hash: str
    reason: str
    list: str

    def content(self) -> Sequence[Content]:
        """Return the hash and the reason on one line."""
        return [ResultText(f"revoked: {self.hash} ({self.reason})", wraps=False)]


def _finding(finding: Mapping[str, Any]) -> Sequence[str]:
    """Return a finding, then its evidence that can be checked by eye."""
    where = f"  [{finding['where']}]" if finding["where"] else ""
    lines = [f"- {finding['level']}, {finding['gate']}: {finding['text']}{where}"]
    evidence = finding["evidence"]
    lines += [f"    {line}" for line in evidence.get("shown", [])[:MAX_EVIDENCE]]
    tokens = [
        f"{token.get('text', token['token'])!r} (z {token['z']:g})"
        for token in evidence.get("tokens", [])[:MAX_EVIDENCE]
    ]
    return [*lines, f"    tokens: {', '.join(tokens)}"] if tokens else lines
