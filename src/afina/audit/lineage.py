"""Lineage: verdicts on the parents of an adapter apply to it.

Combining does not sanitize: a trigger of one part may work in the sum. A combination is therefore
audited as what it is, and also inherits the worst verdict on its parts. An adapter that was
mitigated leads to a review.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from afina.audit.report import Gate
from afina.io import admission

REMEDY = "remedy"  # recorded method of a mitigated adapter


def parents_of(metadata: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    """Return (name, hash) of the parents in an afina.json that passed the file gate."""
    return [(str(line["name"]), line.get("hash")) for line in metadata.get("parents") or ()]


def is_remedied(metadata: Mapping[str, Any]) -> bool:
    """Return whether it records that it was mitigated."""
    recipe = metadata.get("combination")
    return isinstance(recipe, dict) and recipe.get("how") == REMEDY


def inherit_findings(parents: Sequence[tuple[str, str | None]], remedied: bool, gate: Gate) -> None:
    """Add findings on the parents; raise `AuditError` where a report on one is damaged."""
    revoked = admission.revocations()
    report_finding = gate.review if remedied else gate.block
    verdicts = []
    for name, digest in parents:
        report = admission.load_report(digest) if digest else None
        decided = "revoked" if digest in revoked else report["verdict"] if report else "no report"
        verdicts.append({"name": name, "hash": digest, "verdict": decided})
        origin = (
            f"it is a mitigation of {name!r}" if remedied else f"it is a combination of {name!r}"
        )
        if decided == "revoked":
            report_finding(
                "parent-revoked",
                f"{origin}, which is revoked: {revoked[str(digest)]}",
                parent=digest,
            )
        elif decided == "block":
            report_finding("parent-blocked", f"{origin}, whose verdict is block", parent=digest)
        elif decided == "review" and not (report or {}).get("accepted"):
            gate.review(
                "parent-review",
                f"{origin}, whose verdict is review, which was not accepted",
                parent=digest,
            )
        elif report is None:
            gate.note(
                "parent-unknown", f"{origin}, of which there is no report here", parent=digest
            )
    if verdicts:
        gate.measured["parents"] = verdicts
