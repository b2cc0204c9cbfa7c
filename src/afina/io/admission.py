"""Admission of adapters: audit reports and revocations by the hash of an adapter's content.

    AUDITS/HASH.json       the last report on that content: verdict, findings, gates run
    AUDITS/revoked.jsonl   hashes that are rejected in spite of any report, with the reason
    AUDITS/log.jsonl       every report, acceptance and revocation; each line has the previous hash

AUDITS is $AFINA_AUDITS, or ~/.cache/afina/audits. A report is a record and no signature: every user
with write permission there could write one by hand. Set $AFINA_AUDITS to a folder of your own where
others can write.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from afina.errors import AuditError
from afina.io.atomic import write_json
from afina.io.jsonl import append_jsonl, json_line

HASH = re.compile(r"[0-9a-f]{64}")
START = "0" * 64  # previous hash of the log's first line


def audits_folder() -> Path:
    """Return $AFINA_AUDITS, or ~/.cache/afina/audits."""
    if given := os.environ.get("AFINA_AUDITS"):
        return Path(given).expanduser()
    cache = os.environ.get("AFINA_CACHE") or Path.home() / ".cache" / "afina"
    return Path(cache).expanduser() / "audits"


def store_report(report: Mapping[str, Any]) -> Path:
    """Store a report under its adapter's hash, and log it; return the file."""
    file = _file(str(report["hash"]))
    _log({"did": "audited", "hash": report["hash"], "verdict": report["verdict"]})
    write_json(file, report)
    return file


def load_report(digest: str) -> dict[str, Any] | None:
    """Return the last report on this content, or None.

    Raises:
        AuditError: The report is damaged, or of another adapter.
    """
    file = _file(digest)
    if not file.is_file():
        return None
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AuditError(
            "this report cannot be read", where=str(file), hint="audit the adapter again"
        ) from error
    known = ("allow", "review", "block")
    if (
        not isinstance(report, dict)
        or report.get("hash") != digest
        or report.get("verdict") not in known
    ):
        raise AuditError(
            "this is no report on that adapter", where=str(file), hint="audit the adapter again"
        )
    return report


def approved_report(digest: str, where: str = "", base: str | None = None) -> dict[str, Any]:
    """Return the report that approves the content `digest`.

    Approved is a verdict of allow, and one of review that a person has accepted since; never
    after a revocation.

    Args:
        digest: Hash of the adapter's content.
        where: Name of the adapter in messages.
        base: Hash of the base that it is used on: that of the audit, where the audit had one.

    Raises:
        AuditError: No report approves it.
    """
    where = where or digest[:12]
    reason = revocations().get(digest)
    if reason is not None:
        raise AuditError("this adapter is revoked", where=where, why=reason, hint="do not use it")
    report = load_report(digest)
    if report is None:
        raise AuditError(
            "this adapter has not been audited",
            where=where,
            why=f"no report on {digest[:12]}",
            hint=f"afina audit {where}",
        )
    if report["verdict"] == "block" or (
        report["verdict"] == "review" and not report.get("accepted")
    ):
        reasons = [
            finding["text"] for finding in report.get("findings", ()) if finding["level"] != "note"
        ]
        review = f'inspect it, then: afina audit {where} --accept "reviewer, reason"'
        hint = "do not use it" if report["verdict"] == "block" else review
        why = "; ".join(reasons[:3]) or None
        raise AuditError(
            f"the audit's verdict is {report['verdict']}", where=where, why=why, hint=hint
        )
    if base and report.get("base") not in (None, base):
        why = f"hash {str(report['base'])[:12]} then, {base[:12]} now"
        raise AuditError(
            "audited on another base",
            where=where,
            why=why,
            hint=f"afina audit {where} --base FOLDER",
        )
    return report


def require_report(require_audit: bool, digest: str, where: str, base: str | None = None) -> None:
    """Raise `AuditError` where an audit is required and no report approves the adapter."""
    if require_audit:
        approved_report(digest, where, base)


def revoke(digest: str, reason: str) -> None:
    """Reject this content from now on; raise `AuditError` where `digest` is no hash."""
    _file(digest)
    _log({"did": "revoked", "hash": digest, "reason": reason})
    append_jsonl(
        audits_folder() / "revoked.jsonl", {"hash": digest, "reason": reason}, sort_keys=True
    )


def revocations() -> dict[str, str]:
    """Revoked hashes with their reasons; raises `AuditError` where the list is damaged."""
    return {
        str(line["hash"]): str(line["reason"])
        for line in _lines(audits_folder() / "revoked.jsonl", ("hash", "reason"))
    }


def read_log() -> list[dict[str, Any]]:
    """Return the log; raise `AuditError` where a line was changed, removed or inserted."""
    file = audits_folder() / "log.jsonl"
    before, lines = START, _lines(file, ("after", "did", "hash", "at"))
    for number, line in enumerate(lines, 1):
        if line["after"] != before:
            why = "the previous line was changed or removed"
            raise AuditError("the audit log was tampered with", where=f"{file}:{number}", why=why)
        before = _line_hash(line)
    return lines


def _line_hash(line: Mapping[str, Any]) -> str:
    return hashlib.sha256(json_line(line, sort_keys=True).encode()).hexdigest()


def _log(event: dict[str, Any]) -> None:
    lines = read_log()
    after = _line_hash(lines[-1]) if lines else START
    now = datetime.now(UTC).isoformat(timespec="seconds")
    record = {"after": after, "at": now, **event}
    append_jsonl(audits_folder() / "log.jsonl", record, sort_keys=True)


def log_acceptance(digest: str, reason: str) -> None:
    """Note in the log that a person has accepted a verdict of review, and why."""
    _log({"did": "accepted", "hash": digest, "reason": reason})


def _lines(file: Path, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    content = file.read_text(encoding="utf-8") if file.is_file() else ""
    lines = []
    for number, text in enumerate(content.removesuffix("\n").split("\n") if content else [], 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict) or not set(fields) <= set(line):
            raise AuditError(
                "this line cannot be read",
                where=f"{file}:{number}",
                why="it was damaged, or changed by hand",
            )
        lines.append(line)
    return lines


def _file(digest: str) -> Path:
    """The report's file; a hash is checked first, since it becomes a name."""
    if not HASH.fullmatch(digest):
        raise AuditError(
            f"{digest[:80]!r} is no hash of an adapter",
            hint="64 digits; afina show --json prints that of an adapter",
        )
    return audits_folder() / f"{digest}.json"
