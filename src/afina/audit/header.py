"""The header of a safetensors file, read by rules stricter than the format's: no tensor is touched, nothing is decoded.

    8 bytes      length of the header, little endian
    header       JSON: {"name": {"dtype": "F32", "shape": [8, 64], "data_offsets": [0, 2048]}, "__metadata__": {...}}
    data         the tensors end to end

Demanded besides: the header starts with "{", is UTF-8 of at most 4 MiB and 20,000 tensors, has every key once and no
other keys; numbers are integers; shape x width is what the offsets span, the spans cover the data without hole or
overlap, and no tensor is empty. (Parsers of the format differ in all of these, and what one skips another reads.)
"""

import json
import math
import os
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

from afina.errors import AuditError

MAX_HEADER = 4 << 20  # bytes; a 70B adapter of 1,120 tensors has 150 kB
MAX_TENSORS = 20_000
MAX_NAME, MAX_DIMENSIONS, MAX_DIMENSION = 512, 5, 1 << 31
WIDTHS = {"F32": 4, "F16": 2, "BF16": 2}
MAX_METADATA = 64 << 10


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: its dtype, its shape, and where its bytes lie, counted from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def numbers(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


def read_header(stream: BinaryIO, where: str) -> dict[str, TensorEntry]:
    """The tensors of an open safetensors file, in the order of their bytes; raises `AuditError` on anything unusual."""
    size = os.fstat(stream.fileno()).st_size
    start = stream.read(8)
    if len(start) != 8:
        raise AuditError("shorter than its own length field", where=where)
    length = struct.unpack("<Q", start)[0]
    if not 2 <= length <= size - 8:
        raise AuditError(
            f"says its header has {length:,} bytes, and the file has {size:,}", where=where
        )
    if length > MAX_HEADER:
        raise AuditError(
            f"a header of {length:,} bytes", where=where, why=f"{MAX_HEADER:,} are allowed"
        )
    return parse_header(stream.read(length), size - 8 - length, 8 + length, where)


def parse_header(raw: bytes, data: int, offset: int, where: str) -> dict[str, TensorEntry]:
    """The tensors that the header `raw` names, over `data` bytes that begin at `offset` of the file."""
    if raw[:1] != b"{":
        raise AuditError("the header does not begin with '{'", where=where)
    if (
        raw.count(b"{") > MAX_TENSORS + 2 or raw.count(b"[") > 2 * MAX_TENSORS + 2
    ):  # before any of it is parsed
        raise AuditError(f"more than {MAX_TENSORS:,} tensors", where=where)
    try:
        header = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_once,
            parse_float=_no_float,
            parse_constant=_no_float,
            parse_int=_int,
        )
    except RecursionError as error:
        raise AuditError("the header is nested too deeply", where=where) from error
    except ValueError as error:
        raise AuditError(
            "the header is no strict JSON", where=where, why=str(error)[:200]
        ) from error
    if not isinstance(header, dict):
        raise AuditError("the header is no object", where=where)
    _check_metadata(header.pop("__metadata__", {}), where)
    if not header:
        raise AuditError("no tensor in it", where=where)
    if len(header) > MAX_TENSORS:
        raise AuditError(
            f"{len(header):,} tensors", where=where, why=f"{MAX_TENSORS:,} are allowed"
        )
    entries = sorted(
        (_entry(name, about, where) for name, about in header.items()),
        key=lambda entry: entry.begin,
    )
    at = 0
    for entry in entries:
        if entry.begin != at:
            what = (
                "overlaps the tensor before it" if entry.begin < at else "leaves a hole before it"
            )
            raise AuditError(
                what,
                where=f"{where}: {entry.name}",
                why=f"it begins at {entry.begin:,}, not at {at:,}",
            )
        at = entry.end
    if at != data:
        raise AuditError(f"{data:,} bytes of data, and the header tells of {at:,}", where=where)
    return {
        e.name: TensorEntry(e.name, e.dtype, e.shape, offset + e.begin, offset + e.end)
        for e in entries
    }


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key comes twice")
    return found


def _no_float(text: str) -> Any:
    raise ValueError(f"{text[:20]} is no integer")


def _int(text: str) -> int:
    if len(text) > 19:
        raise ValueError("a number of more than 19 digits")
    return int(text)


def _check_metadata(about: Any, where: str) -> None:
    if not isinstance(about, dict) or not all(isinstance(value, str) for value in about.values()):
        raise AuditError("__metadata__ holds more than texts", where=where)
    if sum(len(key) + len(value) for key, value in about.items()) > MAX_METADATA:
        raise AuditError("__metadata__ is larger than 64 KiB", where=where)


def _entry(name: str, about: Any, where: str) -> TensorEntry:
    """One line of the header, its offsets counted from the start of the data."""
    place = f"{where}: {name[:80]}"
    if not 0 < len(name) <= MAX_NAME or not name.isascii() or not name.isprintable():
        raise AuditError(
            "a name that is empty, too long, or has unusual characters",
            where=f"{where}: {name[:80]!r}",
        )
    if not isinstance(about, dict) or set(about) != {"dtype", "shape", "data_offsets"}:
        raise AuditError("not described by dtype, shape and data_offsets alone", where=place)
    dtype, shape, offsets = about["dtype"], about["shape"], about["data_offsets"]
    if not isinstance(dtype, str) or dtype not in WIDTHS:
        raise AuditError(
            f"dtype {str(dtype)[:20]!r}", where=place, why="adapters are F32, F16 or BF16"
        )
    if (
        not _integers(shape)
        or not 1 <= len(shape) <= MAX_DIMENSIONS
        or not all(1 <= n <= MAX_DIMENSION for n in shape)
    ):
        raise AuditError(
            f"shape {str(shape)[:60]}", where=place, why="1 to 5 dimensions, none of them empty"
        )
    if not _integers(offsets) or len(offsets) != 2 or not 0 <= offsets[0] < offsets[1]:
        raise AuditError(f"data_offsets {str(offsets)[:60]}", where=place)
    if (
        math.prod(shape) * WIDTHS[dtype] != offsets[1] - offsets[0]
    ):  # Python's integers do not overflow
        why = f"its shape asks for {math.prod(shape) * WIDTHS[dtype]:,} bytes, its offsets for {offsets[1] - offsets[0]:,}"
        raise AuditError("shape and offsets do not fit", where=place, why=why)
    return TensorEntry(name, dtype, tuple(shape), offsets[0], offsets[1])


def _integers(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int for number in value)
