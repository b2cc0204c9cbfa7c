"""Atomic writes: files and folders are written under a temporary name, then renamed."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from afina.errors import AfinaError, SettingsError


@contextmanager
def translate_os_errors(path: Path) -> Iterator[None]:
    """Raise `AfinaError` with a hint where the disk is full or not writable."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise AfinaError(
                "the disk is full",
                where=str(path),
                why="nothing that was complete before is lost",
                hint="free some space, then continue with --resume",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise AfinaError(
                "not allowed to write here",
                where=str(path),
                hint="choose another folder with --output-dir",
            ) from error
        if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP):
            why = os.strerror(error.errno)
            raise AfinaError(
                "cannot write here",
                where=str(path),
                why=why,
                hint="choose another folder with --output-dir",
            ) from error
        raise
    except Exception as error:  # safetensors wraps the system's error in one of its own
        if "No space left" in str(error) or "os error 28" in str(error):
            raise AfinaError(
                "the disk is full",
                where=str(path),
                why="nothing that was complete before is lost",
                hint="free some space, then continue with --resume",
            ) from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with translate_os_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        finally:
            with suppress(OSError):  # a parent that is a file has raised already
                temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON to `path` atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a file to write, which replaces `path` at the end of the block; not after an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    is_new_parent = not path.parent.exists()
    with translate_os_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            temporary.replace(path)
            is_new_parent = False
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
                if is_new_parent:
                    path.parent.rmdir()


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a folder to fill, which replaces `path` at the end of the block; not after an error."""
    temporary = path.with_name(f".{path.name}.new-{os.getpid()}")
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    with translate_os_errors(path):
        try:
            # of a killed process with the same id, as in containers
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
                path.rename(old)
            temporary.rename(path)
        finally:
            if old.exists() and not path.exists():
                old.rename(path)
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def require_new_directory(path: Path) -> None:
    """Raise `SettingsError` where `path` is a file or a folder that is not empty."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        hint = "choose another --output-dir"
        raise SettingsError("this folder is not empty", where=str(path), hint=hint)


def recover_interrupted_replace(path: Path) -> None:
    """Restore a folder whose replacement was interrupted between two renames; delete leftovers."""
    for old in path.parent.glob(f".{path.name}.old-*"):
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(path)
    for new in path.parent.glob(f".{path.name}.new-*"):
        shutil.rmtree(new, ignore_errors=True)
