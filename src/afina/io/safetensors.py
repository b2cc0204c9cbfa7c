"""Safetensors files, read strictly: header and length are checked before any tensor is touched.

    8 bytes      length of the header in bytes, little endian
    header       JSON: {"name": {"dtype": "F32", "shape": [8, 64], "data_offsets": [0, 2048]}, ...}
    data         the tensors end to end

For every file: the header starts with "{", is UTF-8, has every key once; numbers are integers;
shape times element size is what the offsets span; the spans cover the data without hole or overlap.
Audited adapters have the narrower `ADAPTER_LIMITS` besides. Parsers of the format differ in all of
these, and what one skips another reads.
"""

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, BinaryIO

from afina.errors import AdapterError, AfinaError, BaseError
from afina.io.strict_json import bounded_int, unique_keys

DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}
FLOAT_WIDTHS = {"F32": 4, "F16": 2, "BF16": 2}  # bytes per element, of the dtypes of adapters
MAX_DIMENSION = 1 << 31
CHUNK_BYTES = 1 << 24
HEADER_ENTRY_BYTES = 96  # of the header per tensor, without its name: dtype, shape, offsets


@dataclass(frozen=True)
class HeaderLimits:
    """Limits of a header.

    Attributes:
        max_header_bytes: Longest header.
        max_tensors: Most tensors.
        dtypes: Accepted element types.
        min_dimensions: Fewest dimensions of a tensor.
        max_dimensions: Most dimensions of a tensor.
        max_name: Longest name, in characters.
        max_metadata: Largest `__metadata__`, in characters.
        is_narrow: Whether empty tensors and names with unusual characters are errors.
    """

    max_header_bytes: int = 100 << 20  # the format's own limit
    max_tensors: int = 1_000_000
    dtypes: frozenset[str] = frozenset(DTYPE_BITS)
    min_dimensions: int = 0
    max_dimensions: int = 64
    max_name: int = 4096
    max_metadata: int = 100 << 20
    is_narrow: bool = False


FORMAT_LIMITS = HeaderLimits()
# an adapter of a 70B model has 1,120 tensors and a header of 150 kB
ADAPTER_LIMITS = HeaderLimits(
    max_header_bytes=4 << 20,
    max_tensors=20_000,
    dtypes=frozenset(FLOAT_WIDTHS),
    min_dimensions=1,
    max_dimensions=5,
    max_name=512,
    max_metadata=64 << 10,
    is_narrow=True,
)


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: dtype, shape, and byte offsets from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return self.end - self.begin


class _HeaderError(Exception):
    """A fault in a header: subject, name of the tensor, evidence."""

    def __init__(self, what: str, name: str = "", why: str | None = None) -> None:
        self.what, self.name, self.why = what, name, why
        super().__init__(what)


def read_header(
    file: Path, limits: HeaderLimits = FORMAT_LIMITS, error: type[AfinaError] = BaseError
) -> dict[str, TensorEntry]:
    """Return the tensors of a safetensors file by name, in the order of their bytes.

    Raises:
        AfinaError: of the class `error`: the file is missing, cut short, extended or malformed.
    """
    try:
        with file.open("rb") as stream:
            return read_open_header(stream, str(file), limits, error)
    except OSError as cause:
        why = os.strerror(cause.errno) if cause.errno else str(cause)
        raise error("cannot be read", where=str(file), why=why) from cause


def read_open_header(
    stream: BinaryIO,
    where: str,
    limits: HeaderLimits = ADAPTER_LIMITS,
    error: type[AfinaError] = AdapterError,
) -> dict[str, TensorEntry]:
    """Return the tensors of an open safetensors file; raise `error` with `where` on any fault."""
    hint = "download it again" if error is BaseError else "copy the adapter again"
    size = os.fstat(stream.fileno()).st_size
    start = stream.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= size - 8:
        why = f"header of {length:,} bytes in a file of {size:,} bytes"
        raise error("not a safetensors file, or cut short", where=where, why=why, hint=hint)
    if length > limits.max_header_bytes:
        why = f"at most {limits.max_header_bytes:,} bytes are read"
        raise error(f"header of {length:,} bytes", where=where, why=why)
    return parse_header(stream.read(length), size - 8 - length, 8 + length, where, limits, error)


def parse_header(
    raw: bytes,
    num_bytes: int,
    offset: int,
    where: str,
    limits: HeaderLimits = ADAPTER_LIMITS,
    error: type[AfinaError] = AdapterError,
) -> dict[str, TensorEntry]:
    """Return the tensors that the header `raw` names.

    Args:
        raw: The header's bytes.
        num_bytes: Bytes of data after the header.
        offset: Offset of the data from the start of the file.
        where: The file, for messages.
        limits: Limits of the header.
        error: Class of the error that is raised on any fault.
    """
    try:
        return _parse_header(raw, num_bytes, offset, limits)
    except _HeaderError as fault:
        location = f"{where}: {fault.name[:80]}" if fault.name else where
        hint = "download it again" if error is BaseError else "copy the adapter again"
        raise error(fault.what, where=location, why=fault.why, hint=hint) from None


def _parse_header(
    raw: bytes, num_bytes: int, offset: int, limits: HeaderLimits
) -> dict[str, TensorEntry]:
    header = _parse_json(raw, limits)
    _check_metadata(header.pop("__metadata__", {}), limits)
    if not header and limits.is_narrow:
        raise _HeaderError("the file has no tensor")
    if len(header) > limits.max_tensors:
        why = f"at most {limits.max_tensors:,} are read"
        raise _HeaderError(f"{len(header):,} tensors", why=why)
    entries = [_parse_entry(name, about, limits) for name, about in header.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    position = 0
    for entry in entries:
        if entry.begin != position:
            overlaps = entry.begin < position
            what = "overlaps the previous tensor" if overlaps else "leaves a hole before it"
            why = f"it begins at byte {entry.begin:,}, expected {position:,}"
            raise _HeaderError(what, entry.name, why)
        position = entry.end
    if position != num_bytes:
        why = f"{offset + num_bytes:,} bytes on disk, {offset + position:,} expected"
        raise _HeaderError("incomplete or extended weights", why=why)
    return {
        entry.name: replace(entry, begin=offset + entry.begin, end=offset + entry.end)
        for entry in entries
    }


def _parse_json(raw: bytes, limits: HeaderLimits) -> dict[str, Any]:
    if raw[:1] != b"{":
        raise _HeaderError("the header does not begin with '{'")
    braces, brackets = raw.count(b"{"), raw.count(b"[")
    if braces > limits.max_tensors + 2 or brackets > 2 * limits.max_tensors + 2:  # before parsing
        raise _HeaderError(f"more than {limits.max_tensors:,} tensors")
    try:
        header = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=unique_keys,
            parse_float=_reject_number,
            parse_constant=_reject_number,
            parse_int=bounded_int,
        )
    except RecursionError:
        raise _HeaderError("the header is nested too deeply") from None
    except ValueError as cause:
        raise _HeaderError("the header is not valid JSON", why=str(cause)[:200]) from None
    if not isinstance(header, dict):
        raise _HeaderError("the header is not a JSON object")
    return header


def _reject_number(text: str) -> Any:
    raise ValueError(f"{text[:20]} is not an integer")


def _check_metadata(metadata: Any, limits: HeaderLimits) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _HeaderError("a value that is not text", "__metadata__")
    if sum(len(key) + len(value) for key, value in metadata.items()) > limits.max_metadata:
        raise _HeaderError(f"larger than {limits.max_metadata:,} characters", "__metadata__")


def _parse_entry(name: str, about: Any, limits: HeaderLimits) -> TensorEntry:
    """Return one tensor of the header, its offsets counted from the start of the data."""
    is_plain = len(name) > 0 and name.isascii() and name.isprintable()
    if len(name) > limits.max_name or (limits.is_narrow and not is_plain):
        raise _HeaderError("a name that is empty, too long or has unusual characters", ascii(name))
    if not isinstance(about, dict) or set(about) != {"dtype", "shape", "data_offsets"}:
        raise _HeaderError("an entry other than dtype, shape and data_offsets", name)
    dtype, shape, offsets = about["dtype"], about["shape"], about["data_offsets"]
    if not isinstance(dtype, str) or dtype not in limits.dtypes:
        why = f"accepted are {', '.join(sorted(limits.dtypes))}"
        raise _HeaderError(f"dtype {str(dtype)[:20]!r}", name, why)
    least = 1 if limits.is_narrow else 0
    if not (
        _are_integers(shape)
        and limits.min_dimensions <= len(shape) <= limits.max_dimensions
        and all(least <= size <= MAX_DIMENSION for size in shape)
    ):
        why = f"{limits.min_dimensions} to {limits.max_dimensions} dimensions of at least {least}"
        raise _HeaderError(f"shape {str(shape)[:60]}", name, why)
    if not (_are_integers(offsets) and len(offsets) == 2 and 0 <= offsets[0] <= offsets[1]):
        raise _HeaderError(f"data_offsets {str(offsets)[:60]}", name)
    num_bits = math.prod(shape) * DTYPE_BITS[dtype]  # Python integers do not overflow
    if num_bits != 8 * (offsets[1] - offsets[0]):
        why = f"the shape needs {num_bits / 8:,.0f} bytes, the offsets span "
        why += f"{offsets[1] - offsets[0]:,}"
        raise _HeaderError("shape and data_offsets differ in size", name, why)
    return TensorEntry(name, dtype, tuple(shape), offsets[0], offsets[1])


def _are_integers(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int for number in value)


def check_safetensors(file: Path, error: type[AfinaError] = BaseError) -> None:
    """Raise `error` unless the file is complete: well formed, and as long as its header implies."""
    read_header(file, error=error)


def read_span(file: Path, begin: int, end: int, where: str) -> bytearray:
    """Return bytes `begin` to `end` of a file; raise `AdapterError` where it ends early."""
    data = bytearray(end - begin)
    with file.open("rb") as stream:
        stream.seek(begin)
        num_read = stream.readinto(data)
    if num_read != len(data):
        raise _shortened(len(data) - num_read, where)
    return data


def read_chunks(
    stream: BinaryIO, begin: int, end: int, where: str, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[bytes]:
    """Yield bytes `begin` to `end` of a file in chunks; raise `AdapterError` at an early end."""
    stream.seek(begin)
    left = end - begin
    while left:
        raw = stream.read(min(chunk_bytes, left))
        if not raw:
            raise _shortened(left, where)
        left -= len(raw)
        yield raw


def _shortened(num_bytes: int, where: str) -> AdapterError:
    return AdapterError(
        "the file became shorter while it was read",
        where=where,
        why=f"{num_bytes:,} bytes are missing",
        hint="load the adapter again",
    )


class SafetensorsReader:
    """The tensors of one safetensors file, each read on request.

    Files are read by offset, not by memory map: pages of a map count as memory in use.
    """

    def __init__(
        self,
        file: Path,
        limits: HeaderLimits = FORMAT_LIMITS,
        error: type[AfinaError] = AdapterError,
        entries: Mapping[str, TensorEntry] | None = None,
    ) -> None:
        """Read the header of `file`, unless its `entries` are given."""
        self.file = file
        self.entries = read_header(file, limits, error) if entries is None else entries

    def read_bytes(self, name: str, begin: int = 0, end: int | None = None) -> bytearray:
        """Return the bytes of the tensor `name`, or those from `begin` to `end` within it."""
        entry = self.entries[name]
        start, stop = entry.begin + begin, entry.end if end is None else entry.begin + end
        return read_span(self.file, start, stop, f"{self.file}: {name}")


class SafetensorsWriter:
    """A safetensors file that grows by one tensor at a time; space for its header is reserved."""

    def __init__(self, stream: IO[bytes], max_header_bytes: int) -> None:
        """Reserve `max_header_bytes`, rounded up to the format's alignment of 8 bytes."""
        self._stream, self._position = stream, 0
        self._header_bytes = 8 * (max_header_bytes // 8 + 8)
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        stream.write(bytes(8 + self._header_bytes))

    def add_bytes(self, name: str, dtype: str, shape: tuple[int, ...], data: memoryview) -> None:
        """Append a tensor from its bytes."""
        self._stream.write(data)
        offsets = [self._position, self._position + data.nbytes]
        self._header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        self._position += data.nbytes

    def close(self) -> None:
        """Write the header into the reserved space; blanks fill the rest, as the format allows."""
        text = json.dumps(self._header, separators=(",", ":")).encode()
        assert len(text) <= self._header_bytes, "too little space reserved for the header"
        self._stream.seek(0)
        self._stream.write(struct.pack("<Q", self._header_bytes) + text.ljust(self._header_bytes))


def header_size(names: list[str]) -> int:
    """Return an upper bound, in bytes, on the header of tensors with these names."""
    return sum(len(json.dumps(name)) + HEADER_ENTRY_BYTES for name in names) + 64
