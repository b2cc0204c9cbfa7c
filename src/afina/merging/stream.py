"""Safetensors read and written one tensor at a time: what does not fit in memory whole still passes through.

Reading goes by offset and not by memory map, so that the pages of a large file do not count as memory in use.
"""

import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from afina.errors import AdapterError
from afina.io.safetensors import read_header

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
ENTRY = 96  # bytes of the header beside a tensor's name, at most: dtype, shape, offsets


class SafetensorsReader:
    """The tensors of one safetensors file by name, each read when asked for."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._offset, header = read_header(file)
        self.entries: Mapping[str, dict[str, Any]] = {
            k: v for k, v in header.items() if k != "__metadata__"
        }

    def __getitem__(self, name: str) -> Tensor:
        """The tensor `name`, in its own dtype."""
        entry = self.entries[name]
        begin, end = entry["data_offsets"]
        if entry["dtype"] not in DTYPES:
            raise AdapterError(
                f"tensors of type {entry['dtype']} are not read", where=f"{self.file}: {name}"
            )
        data = bytearray(end - begin)
        with self.file.open("rb") as stream:
            stream.seek(self._offset + begin)
            stream.readinto(data)
        dtype = DTYPES[entry["dtype"]]
        return (
            torch.frombuffer(data, dtype=dtype).view(entry["shape"])
            if data
            else torch.empty(entry["shape"], dtype=dtype)
        )


class SafetensorsWriter:
    """A safetensors file that grows tensor by tensor; its header is filled in at the end, in the room kept for it."""

    def __init__(self, stream: IO[bytes], names: int) -> None:
        """`names`: upper bound on the characters of all names and, ENTRY each, of what is said about them."""
        self._stream, self._room, self._at = stream, 8 * (names // 8 + 8), 0
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        stream.write(bytes(8 + self._room))

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a float32 tensor."""
        data: Any = tensor.detach().float().contiguous().numpy()
        self._stream.write(memoryview(data).cast("B"))
        self._header[name] = {
            "dtype": "F32",
            "shape": list(data.shape),
            "data_offsets": [self._at, self._at + data.nbytes],
        }
        self._at += data.nbytes

    def close(self) -> None:
        """Write the header over the room kept for it; blanks fill what is left, as the format allows."""
        text = json.dumps(self._header, separators=(",", ":")).encode()
        assert len(text) <= self._room, "the room kept for the header was counted wrong"
        self._stream.seek(0)
        self._stream.write(struct.pack("<Q", self._room) + text.ljust(self._room))


@contextmanager
def writing(file: Path, names: list[str]) -> Iterator[SafetensorsWriter]:
    """A `Writer` to `file` for tensors of at most these names."""
    with file.open("wb") as stream:
        writer = SafetensorsWriter(
            stream, sum(len(json.dumps(name)) + ENTRY for name in names) + 64
        )
        yield writer
        writer.close()
