"""A file of rows: looked over once for its encoding and sha256, and read in pieces after that."""

import codecs
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TextIO

from afina.errors import DataError, did_you_mean

PARQUET_MAGIC, ZIP_MAGIC = b"PAR1", b"PK\x03\x04"  # an XLSX file is a zip archive
GZIP_MAGIC = b"\x1f\x8b"
# the first bytes of a text in these encodings; UTF-32 first, whose mark begins as that of UTF-16
BYTE_ORDER_MARKS = {
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
    b"\xef\xbb\xbf": "utf-8-sig",
}
WINDOWS_1252 = "cp1252"
# ratio of letters beyond ASCII in Western European text: 2 to 5% in Spanish, French and German; in
# Cyrillic or Greek code pages nearly all letters are
MAX_ACCENTED = 0.2
HEAD_BYTES = 1 << 16  # by which JSON is recognized
PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class InputFile:
    """A file of rows.

    Attributes:
        path: The file.
        digest: Its sha256.
        encoding: Of a text; "" for a file that is none (Parquet, XLSX).
        head: Its first bytes.
    """

    path: Path
    digest: str
    encoding: str
    head: bytes

    @classmethod
    def open(cls, path: Path) -> "InputFile":
        """Return a file that has been looked over from its beginning to its end.

        A text is UTF-8, or UTF-16 or UTF-32 where it begins with their mark; otherwise
        Windows-1252, if it has no valid UTF-8 beyond ASCII and few letters beyond ASCII.

        Raises:
            DataError: there is no such file, it is a folder, cannot be read, or is empty; or it is
                compressed, binary, damaged or in another encoding; names the line.
        """
        if path.is_dir():
            hint = "name one file in it, or --objective classify for pictures in folders"
            raise DataError("this is a folder", where=str(path), hint=hint)
        try:
            about = path.stat()
            return _look_over(path, about.st_size, about.st_mtime_ns)
        except FileNotFoundError:
            siblings = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
            similar = did_you_mean(path.name, siblings) if siblings else None
            raise DataError("no such file", where=str(path), hint=similar) from None
        except OSError as error:
            raise DataError(f"cannot read the file: {error.strerror}", where=str(path)) from None

    @property
    def start(self) -> str:
        """The beginning of a text, without its byte order mark."""
        return self.head.decode(self.encoding, "ignore")

    def open_text(self) -> TextIO:
        """Return the text as a stream that keeps all line breaks as they are."""
        return self.path.open(encoding=self.encoding, newline="")

    def text(self) -> str:
        """Return all of the text."""
        with self.open_text() as stream:
            return stream.read()

    def lines(self) -> Iterator[str]:
        r"""Yield the lines of the text. They end at \n only: a JSON string may have a U+2028."""
        with self.path.open(encoding=self.encoding, newline="\n") as stream:
            for line in stream:
                yield line.removesuffix("\n")


@lru_cache(maxsize=32)
def _look_over(path: Path, size: int, changed: int) -> InputFile:
    """Return a file that has not changed since; a run opens it once for each kind of row."""
    digest, is_blank = hashlib.sha256(), True
    with path.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
        stream.seek(0)
        is_text = not head.startswith((PARQUET_MAGIC, ZIP_MAGIC, GZIP_MAGIC))
        mark = next((name for mark, name in BYTE_ORDER_MARKS.items() if head.startswith(mark)), "")
        encoding = mark or "utf-8" if is_text else ""
        decoder = codecs.getincrementaldecoder(encoding or "utf-8")()
        while piece := stream.read(PIECE_BYTES):
            digest.update(piece)
            is_blank = is_blank and not piece.strip()
            if not is_text or encoding == WINDOWS_1252:
                continue
            if not mark and b"\0" in piece:
                hint = "JSONL, CSV, text in UTF-8, Parquet, or XLSX"
                raise DataError("a binary file cannot be read", where=str(path), hint=hint)
            try:
                decoder.decode(piece, final=stream.tell() == size)
            except UnicodeDecodeError:
                encoding = _other_encoding(path, mark)
    if is_blank:
        raise DataError("the file is empty", where=str(path))
    if head.startswith(GZIP_MAGIC):
        raise DataError("the file is compressed", where=str(path), hint=f"gunzip {path}")
    return InputFile(path, digest.hexdigest(), encoding, head)


def _other_encoding(path: Path, mark: str) -> str:
    """Return Windows-1252 for a file that is not UTF-8, or that its `mark` is wrong about."""
    data = path.read_bytes()
    if not mark and b"\0" not in data and is_windows_1252(data):
        return WINDOWS_1252
    try:
        data.decode(mark or "utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        hint = f"iconv -f ENCODING -t UTF-8 {path} > utf8{path.suffix}  (iconv -l lists encodings)"
        raise DataError(
            "not UTF-8 text", where=f"{path}:{line}", why=str(error), hint=hint
        ) from None
    return mark or "utf-8"


def is_windows_1252(data: bytes) -> bool:
    """Return whether bytes that are not UTF-8 are Western European text in Windows-1252."""
    if data.isascii() or re.search(
        rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}", data
    ):
        return False  # UTF-8 with damage
    try:
        text = data.decode(WINDOWS_1252)
    except UnicodeDecodeError:
        return False
    letters = [letter for letter in text if letter.isalpha()]
    accented = sum(not letter.isascii() for letter in letters)
    control = re.search(r"[\x00-\x08\x0e-\x1f]", text)
    return control is None and 0 < accented <= MAX_ACCENTED * len(letters)
