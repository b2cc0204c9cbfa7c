"""Is this safetensors file whole? Read its header without opening a tensor, and hash what it holds."""

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from afina.errors import BaseError

MAX_HEADER = 100 * 1024 * 1024  # bytes; the format's own limit


def read_header(file: Path) -> tuple[int, dict[str, dict]]:
    """(offset of the data, the header's entries); raises `BaseError` where the file is cut short or no safetensors."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise BaseError(
                "not a safetensors file, or cut short", where=str(file), hint="download it again"
            )
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise BaseError(
                "the header of this safetensors file is damaged", where=str(file)
            ) from error
    return 8 + length, header


def check_safetensors(file: Path) -> None:
    """Raise `BaseError` unless the file is as long as its header says (a download that stopped is not)."""
    offset, header = read_header(file)
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if offset + max(ends, default=0) != file.stat().st_size:
        why = f"{file.stat().st_size:,} bytes on disk, {offset + max(ends, default=0):,} expected"
        raise BaseError(
            "incomplete weights", where=str(file), why=why, hint="download the file again"
        )
    try:
        with safe_open(file, framework="numpy"):
            pass
    except SafetensorError as error:
        raise BaseError("damaged weights", where=str(file), why=str(error)) from error


def hash_tensor_files(files: list[Path]) -> str:
    """sha256 (hex) of the tensors in `files`, by name: independent of how they are spread over files.

    Each tensor is hashed with its dtype and shape; the digest is that of the sorted list of name and hash.
    """
    digests = {}
    for file in files:
        offset, header = read_header(file)
        with file.open("rb") as stream:
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                begin, end = entry["data_offsets"]
                digest = hashlib.sha256(json.dumps([entry["dtype"], entry["shape"]]).encode())
                stream.seek(offset + begin)
                for at in range(begin, end, 1 << 24):
                    digest.update(stream.read(min(1 << 24, end - at)))
                digests[name] = digest.hexdigest()
    return combine_tensor_hashes(digests)


def combine_tensor_hashes(digests: Mapping[str, str]) -> str:
    """The hash of several tensors, from those of each by its name."""
    lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()
