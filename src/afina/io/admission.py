"""What has been audited, and whether it may be used: reports by the hash of an adapter's content.

    AUDITS/HASH.json       the last report on that content: verdict, findings, what was looked at
    AUDITS/revoked.jsonl   hashes that are refused whatever their reports say, with the reason
    AUDITS/log.jsonl       every report, acceptance and revocation; each line holds the hash of the one before

AUDITS is $AFINA_AUDITS, or ~/.cache/afina/audits. It belongs to whoever may write there: that person could write a
report by hand. It says what was seen, and is no signature; where others can write, set $AFINA_AUDITS elsewhere.
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
START = "0" * 64  # what the first line of the log follows


def audits_folder() -> Path:
    """$AFINA_AUDITS, or ~/.cache/afina/audits."""
    told = os.environ.get("AFINA_AUDITS")
    if told:
        return Path(told).expanduser()
    return (
        Path(os.environ.get("AFINA_CACHE") or Path.home() / ".cache" / "afina").expanduser()
        / "audits"
    )


def store_report(report: Mapping[str, Any]) -> Path:
    """Write a report under the hash that it is of, and a line about it to the log; returns the file."""
    file = _file(str(report["hash"]))
    _log({"did": "audited", "hash": report["hash"], "verdict": report["verdict"]})
    write_json(file, report)
    return file


def load_report(digest: str) -> dict[str, Any] | None:
    """The last report on this content, or None; raises `AuditError` where it is damaged or of another adapter."""
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
    """The report that lets the content `digest` be used; raises `AuditError` where there is none.

    It may be used when its last audit said allow, or said review and a person has accepted it since; never once revoked.
    `base`: hash of the base that it shall act on, which must be the one that the audit looked at, if it had one.
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
        review = f'look at it, then: afina audit {where} --accept "who, why"'
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
    """Refuse this content from now on; raises `AuditError` where `digest` is no hash."""
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
    """The whole log; raises `AuditError` where a line was changed, taken out or put between."""
    file = audits_folder() / "log.jsonl"
    before, lines = START, _lines(file, ("after", "did", "hash", "at"))
    for number, line in enumerate(lines, 1):
        if line["after"] != before:
            why = "its line before this one was changed or taken out"
            raise AuditError("the audit log was tampered with", where=f"{file}:{number}", why=why)
        before = hashlib.sha256(json_line(line, sort_keys=True).encode()).hexdigest()
    return lines


def _log(event: dict[str, Any]) -> None:
    lines = read_log()
    after = hashlib.sha256(json_line(lines[-1], sort_keys=True).encode()).hexdigest() if lines else START
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
            hint="64 digits; afina show --json tells an adapter's",
        )
    return audits_folder() / f"{digest}.json"
