"""What an adapter was made of: the verdicts on its parents are its own too.

Combining does not clean: what a trigger wakes in one part may be awake in the sum. So a combination is audited as what it
is, and inherits the worst that is known of its parts besides. What a remedy has made out of a bad one asks for a review.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from afina.audit.report import Gate
from afina.io import admission

REMEDY = "remedy"  # how a combination was made that is to be better than its parent


def parents_of(metadata: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    """(name, hash) of what an afina.json that has passed the file gate tells as parents."""
    return [(str(line["name"]), line.get("hash")) for line in metadata.get("parents") or ()]


def is_remedied(metadata: Mapping[str, Any]) -> bool:
    """Whether it says that a remedy has made it."""
    recipe = metadata.get("combination")
    return isinstance(recipe, dict) and recipe.get("how") == REMEDY


def inherit_findings(parents: Sequence[tuple[str, str | None]], remedied: bool, gate: Gate) -> None:
    """Add to `gate` what is known of the parents; raises `AuditError` where a report on one is damaged."""
    revoked = admission.revocations()
    report_finding = gate.review if remedied else gate.block
    verdicts = []
    for name, digest in parents:
        report = admission.load_report(digest) if digest else None
        decided = "revoked" if digest in revoked else report["verdict"] if report else "no report"
        verdicts.append({"name": name, "hash": digest, "verdict": decided})
        origin = (
            f"it was made, by a remedy, of {name!r}" if remedied else f"it was made of {name!r}"
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
                f"{origin}, whose verdict is review, and nobody has accepted that",
                parent=digest,
            )
        elif report is None:
            gate.note(
                "parent-unknown", f"{origin}, of which there is no report here", parent=digest
            )
    if verdicts:
        gate.measured["parents"] = verdicts
