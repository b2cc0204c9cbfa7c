"""Adapters that are read are the ones that were audited: private copies, hashed and read there.

    RUN/adapter/...   --copied, links rejected-->   PRIVATE/1/RUN/adapter/...   --hashed, loaded-->

Without the copy a file could be changed after it was hashed and before it is read.
"""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from afina.io.adapter_folder import CONFIG_FILE, WEIGHTS_FILE, AdapterFolder, adapter_folder
from afina.io.adapter_metadata import METADATA_FILE
from afina.io.admission import require_report
from afina.io.atomic import translate_os_errors
from afina.io.composition import (
    composition_parts,
    display_name,
    expand_composition,
    is_composition,
    parse_weighted,
)
from afina.io.regular_file import open_regular_file
from afina.io.run_record import RUN_FILE

COPIED_FILES = (CONFIG_FILE, WEIGHTS_FILE, METADATA_FILE, "README.md")
COPY_CHUNK_BYTES = 1 << 22


@contextmanager
def verified_copies(require_audit: bool, named: Sequence[str | Path]) -> Iterator[list[str]]:
    """Yield the adapters "FOLDER:weight", as private copies with a report where one is required.

    The copies are deleted when the block ends.

    Raises:
        AuditError: a report is required and one adapter (of a composition: one part) has none that
            approves it, or a file is a link.
    """
    if not require_audit:
        yield [str(name) for name in named]
        return
    private = Path(tempfile.mkdtemp(prefix="afina-"))  # readable by this user only
    try:
        copies = []
        for number, name in enumerate(named):
            folder, weight = parse_weighted(name)
            with translate_os_errors(private):
                copy = _copy(folder, private / str(number) / display_name(folder))
            for part in expand_composition(copy):
                digest = AdapterFolder.open(part.folder).verified_hash()
                require_report(require_audit, digest, str(folder))
            copies.append(str(copy) if str(name) == str(folder) else f"{copy}:{weight!r}")
        yield copies
    finally:
        shutil.rmtree(private, ignore_errors=True)


def _copy(source: Path, target: Path) -> Path:
    """Copy the files of a run, an adapter or a composition that a loader reads; nothing else."""
    if is_composition(source):
        _copy_files(source, target, (METADATA_FILE,))
        for folder, _, _ in composition_parts(source):
            part = adapter_folder(folder)
            _copy_files(part, target / part.relative_to(source), COPIED_FILES)
        return target
    folder = adapter_folder(source)
    is_run = folder != source
    _copy_files(folder, target / "adapter" if is_run else target, COPIED_FILES)
    if is_run:
        _copy_files(source, target, (RUN_FILE,))
    return target


def _copy_files(source: Path, target: Path, names: Sequence[str]) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (source / name).exists():
            with open_regular_file(source / name) as stream, (target / name).open("wb") as copy:
                shutil.copyfileobj(stream, copy, COPY_CHUNK_BYTES)
