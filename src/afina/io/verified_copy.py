"""What was audited is what is read: adapters copied, once, to where nobody else writes, and hashed and read there.

    RUN/adapter/...   --copied, link by link refused-->   PRIVATE/1/RUN/adapter/...   --hashed, asked for, loaded-->

Without this somebody could change a file after it was hashed and before it is read.
"""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from afina.adapters.loading import CONFIG, METADATA_FILE, WEIGHTS, adapter_folder
from afina.io.admission import require_report
from afina.io.atomic import open_regular_file, translate_os_errors
from afina.io.composition import (
    display_name,
    expand_composition,
    hash_adapter_folder,
    is_composition,
    parse_weighted,
)

READ = (CONFIG, WEIGHTS, METADATA_FILE, "README.md")


@contextmanager
def verified_copies(require_audit: bool, named: Sequence[str | Path]) -> Iterator[list[str]]:
    """The adapters "FOLDER:weight": as they are, or where an audit is required as private copies that have a report.

    The copies are gone when the block ends. Raises `AuditError` where one has no report that lets it through (of a
    composition: each part), or a file is a link.
    """
    if not require_audit:
        yield [str(name) for name in named]
        return
    place = Path(tempfile.mkdtemp(prefix="afina-"))  # for this user alone
    try:
        copies = []
        for number, name in enumerate(named):
            folder, weight = parse_weighted(name)
            with translate_os_errors(place):
                copy = _copy(folder, place / str(number) / display_name(folder))
            for part in expand_composition(copy):
                require_report(require_audit, hash_adapter_folder(part.folder), str(folder))
            copies.append(str(copy) if str(name) == str(folder) else f"{copy}:{weight!r}")
        yield copies
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _copy(source: Path, to: Path) -> Path:
    """The files of a run, an adapter or a composition that a loader reads; nothing else."""
    if is_composition(source):
        _copy_files(source, to, (METADATA_FILE,))
        for part in expand_composition(source):
            _copy_files(part.folder, to / part.folder.relative_to(source), READ)
        return to
    folder = adapter_folder(source)
    inside = folder != source
    _copy_files(folder, to / "adapter" if inside else to, READ)
    if inside:
        _copy_files(source, to, ("run.json",))
    return to


def _copy_files(source: Path, to: Path, names: Sequence[str]) -> None:
    to.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (source / name).exists():
            with open_regular_file(source / name) as stream, (to / name).open("wb") as copy:
                shutil.copyfileobj(stream, copy, 1 << 22)
