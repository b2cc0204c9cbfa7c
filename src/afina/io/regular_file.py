"""Open a file only where it is a regular file, and notice when it changes while it is read."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from afina.errors import AuditError

FileFingerprint = tuple[int, ...]


def fingerprint(status: os.stat_result) -> FileFingerprint:
    """Return device, inode, size (bytes), modification and change time (ns) of a file."""
    return (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )


@contextmanager
def open_regular_file(file: Path) -> Iterator[BinaryIO]:
    """Open a regular file that has one name, without following a link.

    The checks are of the opened file, not of its name; at the end of the block the fingerprint is
    compared again.

    Raises:
        AuditError: the path is a link, a hard link, or no regular file, or the file changed.
    """
    flags = os.O_RDONLY
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):
        flags |= getattr(os, name, 0)
    try:
        if file.is_symlink():  # where the system has no O_NOFOLLOW
            raise AuditError(
                "a link, not a file", where=str(file), hint="copy the file itself (cp -L)"
            )
        descriptor = os.open(file, flags)
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise AuditError("not a readable regular file", where=str(file), why=why) from error
    with os.fdopen(descriptor, "rb") as stream:
        before = os.fstat(descriptor)
        if not stat.S_ISREG(before.st_mode):
            raise AuditError("not a regular file", where=str(file))
        if before.st_nlink > 1:
            what = "a file with several names (hard links)"
            raise AuditError(what, where=str(file), hint="copy it")
        yield stream
        if fingerprint(os.fstat(descriptor)) != fingerprint(before):
            raise AuditError("the file changed while it was read", where=str(file))
