"""Files that are there whole or not at all: written beside their place, then renamed."""

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
    """Turn a full or closed disk into an error that says which, where and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise AfinaError(
                "the disk is full",
                where=str(path),
                why="nothing that was complete before is lost",
                hint="free some space, then go on with --resume",
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
                hint="free some space, then go on with --resume",
            ) from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with translate_os_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with beside.open("w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            beside.replace(path)
        finally:
            with suppress(OSError):  # a parent that is a file: the error before this one says so
                beside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON to `path`, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A file to write; when the block ends well it takes the place of `path`, else `path` stays as it was."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    made = not path.parent.exists()
    with translate_os_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield beside
            beside.replace(path)
            made = False
        finally:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
                if made:
                    path.parent.rmdir()


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A folder to fill; when the block ends well it takes the place of `path`, else `path` stays as it was."""
    beside = path.with_name(f".{path.name}.new-{os.getpid()}")
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    with translate_os_errors(path):
        try:
            shutil.rmtree(
                beside, ignore_errors=True
            )  # of a process killed earlier that had the same number, as in containers
            beside.mkdir(parents=True)
            yield beside
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
                path.rename(old)
            beside.rename(path)
        finally:
            if old.exists() and not path.exists():
                old.rename(path)
            shutil.rmtree(beside, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def require_new_directory(path: Path) -> None:
    """Raise `SettingsError` where `path` is a file or a folder that is not empty."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        hint = "choose another --output-dir"
        raise SettingsError("this folder is not empty", where=str(path), hint=hint)


def recover_interrupted_replace(path: Path) -> None:
    """Bring back a folder whose replacement was cut off between its two renames, and sweep leftovers away."""
    for old in path.parent.glob(f".{path.name}.old-*"):
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(path)
    for new in path.parent.glob(f".{path.name}.new-*"):
        shutil.rmtree(new, ignore_errors=True)
