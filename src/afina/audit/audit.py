"""`afina audit`: is an adapter safe to load? Gates in order, and a verdict that fails closed.

    files         the content of the folder, before any of it is loaded
    provenance    revocation, signature, manifest
    weights       statistics of the update, compared with benign adapters of its kind
    behaviour     what it generates, adapter on against off, on the same base

A gate that fails with an error leads to a review at least. After a file gate that blocks, nothing
else is opened. The report is stored under the hash of the adapter's content, where
`--require-audit` looks for it.
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import afina
from afina.audit.base_files import BaseFiles, find_base
from afina.audit.file_gate import AuditedFolder, check_files
from afina.audit.lineage import inherit_findings, is_remedied, parents_of
from afina.audit.provenance import provenance_gate
from afina.audit.report import Finding, Gate, as_dicts, run_gate, verdict
from afina.audit.results import AuditResult
from afina.audit.sarif import as_sarif
from afina.errors import AfinaError, AuditError
from afina.io import admission
from afina.io.adapter_folder import CONFIG_FILE
from afina.io.adapter_metadata import METADATA_FILE, RecordedBase
from afina.io.atomic import write_json
from afina.io.base_match import describe_base, same_base
from afina.io.composition import (
    composition_hash,
    composition_parts,
    display_name,
    parse_weighted_list,
)
from afina.io.hashing import adapter_hash
from afina.io.regular_file import fingerprint
from afina.io.strict_json import AUDIT_JSON, read_json_object
from afina.settings import EMBEDDED, AuditSettings, as_settings

REPORT_VERSION = 1
EXIT = {"allow": 0, "review": 3, "block": 4}


@dataclass
class Audit:
    """A running audit: the adapter, or the parts of a composition, and the gates so far."""

    settings: AuditSettings
    folders: list[Path]
    base: BaseFiles | None = None
    gates: list[Gate] = field(default_factory=list)
    packages: list[AuditedFolder] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    states: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def findings(self) -> list[Finding]:
        """Findings of all gates."""
        return [finding for gate in self.gates for finding in gate.findings]

    @property
    def blocked(self) -> bool:
        """Whether a gate has blocked."""
        return any(gate.blocked for gate in self.gates)


def audit(run: str | Path | AuditSettings, **values: Any) -> AuditResult:
    """Audit the adapter in `run` and store the report by its hash.

    Args:
        run: A run, an adapter, a composition, or all settings.
        values: Settings of `afina audit`.

    Raises:
        SettingsError: A setting is wrong.
        AuditError: The folder or the base does not exist. Faults of the adapter are in the report.
    """
    settings = as_settings(AuditSettings, run, "adapter", values)
    named, files = parse_weighted_list(settings.adapter), Gate("files")
    for folder_path, _ in named:
        if not folder_path.is_dir():
            hint = "afina audit FOLDER: a run, an adapter, a composition; A:0.6,B:0.4: their sum"
            raise AuditError("no such folder", where=str(folder_path), hint=hint)
    found: list[tuple[Path, float]] = []
    run_gate(
        files,
        lambda: found.extend(
            part for folder_path, weight in named for part in _active_parts(folder_path, weight)
        ),
    )
    folders = [folder for folder, _ in found]
    alone = len(named) == 1 and found == [(_adapter_folder(named[0][0]), 1.0)]
    weights = None if alone else [weight for _, weight in found]
    about = Audit(settings, folders, gates=[files])
    about.base = _base(settings, folders)
    for folder in folders:
        run_gate(files, partial(_files, about, folder, files))
    digest = None
    if not files.blocked:
        digest = (
            about.hashes[0]
            if weights is None
            else composition_hash(list(zip(about.hashes, weights, strict=True)))
        )
        _look_inside(about, digest, weights)
    _check_unchanged(about)
    report = _report(about, digest)
    if digest is not None:
        if settings.accept and report["verdict"] == "review":
            report["accepted"] = settings.accept
            admission.log_acceptance(digest, settings.accept)
        report["kept"] = str(admission.store_report(report))
    if settings.sarif_file is not None:
        write_json(settings.sarif_file, as_sarif(report))
    admits = report["verdict"] == "allow" or "accepted" in report
    return AuditResult(**report, exit_status=0 if admits else EXIT[report["verdict"]])


def _adapter_folder(run: Path) -> Path:
    """Return the adapter of a run folder, or the folder itself, which may be empty."""
    inside = run / "adapter"
    return (
        inside
        if not (run / CONFIG_FILE).exists()
        and (inside / CONFIG_FILE).exists()
        and not inside.is_symlink()
        else run
    )


def _active_parts(folder_path: Path, weight: float) -> list[tuple[Path, float]]:
    """Return the adapters in a run, an adapter or a composition, with their weights."""
    folder = _adapter_folder(folder_path)
    if (folder / CONFIG_FILE).exists() or not (folder / METADATA_FILE).is_file():
        return [(folder, weight)]
    return [(part, weight * own) for part, own in _parts(folder)]


def _base(settings: AuditSettings, folders: list[Path]) -> BaseFiles | None:
    """Return the base to compare with: as set, or the embedded one if the adapter records it.

    A path that the adapter names is never opened.
    """
    if settings.base is not None:
        folder = find_base(settings.base)
        if folder is None:
            raise AuditError(
                "no such folder",
                where=settings.base,
                hint="--base FOLDER: the audit does not ask the network",
            )
        return BaseFiles(folder)
    for folder in folders:
        try:
            if (
                read_json_object(folder / CONFIG_FILE, AUDIT_JSON).get("base_model_name_or_path")
                != EMBEDDED
            ):
                return None
        except AfinaError:  # the file gate reports it
            return None
    folder_path = find_base(EMBEDDED)
    return BaseFiles(folder_path) if folder_path is not None and folders else None


def _parts(folder: Path) -> list[tuple[Path, float]]:
    """Return a composition's parts with their weights.

    Raises:
        AfinaError: a part is not described, lies outside the folder, or is a link.
    """
    read_json_object(folder / METADATA_FILE, AUDIT_JSON)  # within the audit's limits
    found = []
    for part, _, weight in composition_parts(folder):
        if part.is_symlink():
            where = f"{METADATA_FILE}: {part.name[:80]}"
            raise AuditError("a part is a link", where=where)
        found.append((part, weight))
    return found


def _files(about: Audit, folder: Path, gate: Gate) -> None:
    """Run the file gate; return the hash of what it read."""
    before = _states(folder)
    package = check_files(folder, about.base, gate)
    if gate.blocked:
        return
    assert package.opened is not None
    digest = adapter_hash(package.tensors_hash, package.opened.config().canonical())
    recorded = package.metadata.get("hash")
    if recorded is not None and recorded != digest:
        what = f"{METADATA_FILE} records hash {str(recorded)[:12]}, computed is {digest[:12]}"
        gate.block("hash-differs", what, str(folder))
    if about.base is not None:
        _check_base(package.opened.base, about, folder, gate)
    about.packages.append(package)
    about.hashes.append(digest)
    about.states |= before


def _check_base(recorded: RecordedBase, about: Audit, folder: Path, gate: Gate) -> None:
    """Block an adapter that records another base than the one that it is audited on."""
    assert about.base is not None
    audited = RecordedBase(name=about.settings.base or EMBEDDED, hash=about.base.hash)
    if same_base(recorded, audited) is False:
        what = f"trained on {describe_base(recorded)}; this base is {describe_base(audited)}"
        gate.block("other-base", what, str(folder))


def _states(folder: Path) -> dict[str, tuple[int, ...]]:
    return {str(file): fingerprint(file.lstat()) for file in sorted(folder.iterdir())}


def _check_unchanged(about: Audit) -> None:
    """Raise an error unless the files are still those that were hashed at the start."""
    now: dict[str, tuple[int, ...]] = {}
    for package in about.packages:
        now |= _states(package.folder)
    if now != about.states:
        about.gates[0].block(
            "changed", "a file changed during the audit", str(about.settings.adapter)
        )


def _look_inside(about: Audit, digest: str, weights: list[float] | None) -> None:
    """Run the gates after the first, on each part of a composition and on their sum."""
    from afina.audit.weight_gate import read_calibrations, weight_gate

    settings = about.settings
    base = about.base.folder if about.base is not None else None
    calibrations = read_calibrations(settings.calibration)
    candidates: list[int] = []
    limits: list[float | None] = []
    for package, own in zip(about.packages, about.hashes, strict=True):
        origin, numbers = Gate("provenance"), Gate("weights")
        about.gates += [origin, numbers]
        run_gate(
            origin, partial(provenance_gate, package.folder, own, settings.public_key, base, origin)
        )
        run_gate(
            origin,
            partial(
                inherit_findings,
                parents_of(package.metadata),
                is_remedied(package.metadata),
                origin,
            ),
        )

        def look(package: AuditedFolder = package, numbers: Gate = numbers) -> None:
            measured = weight_gate(
                package, about.base, calibrations, settings.max_false_positive_rate, numbers
            )
            candidates.extend(token for tokens in measured.tokens.values() for token, _ in tokens)
            limits.extend(
                c.trigger_limit(settings.max_false_positive_rate)
                for c in calibrations
                if c.fits(measured.kind)
            )

        run_gate(numbers, look, "review")
    if weights is not None:
        adapter_gate = Gate("whole")
        about.gates.append(adapter_gate)
        run_gate(adapter_gate, partial(_check_adapter, about, digest, adapter_gate))
    behaviour = Gate("behaviour")
    about.gates.append(behaviour)
    if about.blocked:
        behaviour.note("not-run", "not run: another gate has blocked")
    elif about.base is None:
        behaviour.review("not-run", "what it does was not looked at: give --base FOLDER")
    elif settings.time_budget_seconds == 0:
        behaviour.review("not-run", "what it does was not looked at: --budget 0")
    else:
        from afina.audit.behavior_gate import behaviour_gate

        limit = (
            limits[0] if len(about.packages) == 1 and limits else None
        )  # a combination is of no kind
        run_gate(
            behaviour,
            partial(behaviour_gate, settings, list(dict.fromkeys(candidates)), behaviour, limit),
            "review",
        )


def _check_adapter(about: Audit, digest: str, gate: Gate) -> None:
    """Add findings on the combination itself: revocation, and reports on its parts."""
    reason = admission.revocations().get(digest)
    if reason is not None:
        gate.block("revoked", f"this combination is revoked: {reason}", str(about.settings.adapter))
    inherit_findings(
        [
            (display_name(folder), own)
            for folder, own in zip(about.folders, about.hashes, strict=True)
        ],
        False,
        gate,
    )


def _report(about: Audit, digest: str | None) -> dict[str, Any]:
    findings = about.findings
    decided = verdict(findings)
    return {
        "format_version": REPORT_VERSION,
        "afina": afina.__version__,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "adapter": str(about.settings.adapter),
        "hash": digest,
        "parts": about.hashes if len(about.hashes) > 1 else [],
        "base": about.base.hash if about.base is not None else None,
        "strict": about.settings.strict,
        "verdict": "block" if about.settings.strict and decided == "review" else decided,
        "findings": as_dicts(findings),
        "gates": [gate.as_dict() for gate in about.gates],
        "remedies": _remedies(about),
    }


def _remedies(about: Audit) -> list[str]:
    """Return the commands that mitigate what was found; none for a file that is not trusted."""
    run, found = about.settings.adapter, {finding.rule for finding in about.findings}
    if about.gates[0].blocked or len(about.packages) != 1 or about.packages[0].method != "lora":
        return []
    if "trigger" in found:
        return [f"afina mitigate {run} --output-dir TREATED"]
    return (
        [f"afina mitigate {run} --output-dir TREATED --mitigation truncate"]
        if "weights-unusual" in found
        else []
    )
