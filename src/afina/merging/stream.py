"""Safetensors as torch tensors, read and written one at a time: larger files than memory work."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afina.errors import AdapterError
from afina.io.safetensors import SafetensorsReader, SafetensorsWriter, header_size

TORCH_DTYPES = {
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


class TensorReader(SafetensorsReader):
    """The tensors of one safetensors file by name, each read on request."""

    def __getitem__(self, name: str) -> Tensor:
        """Return the tensor `name` in its own dtype."""
        entry = self.entries[name]
        if entry.dtype not in TORCH_DTYPES:
            where = f"{self.file}: {name}"
            raise AdapterError(f"dtype {entry.dtype} is not supported", where=where)
        dtype = TORCH_DTYPES[entry.dtype]
        if not entry.num_bytes:
            return torch.empty(entry.shape, dtype=dtype)
        return torch.frombuffer(self.read_bytes(name), dtype=dtype).view(entry.shape)


class TensorWriter(SafetensorsWriter):
    """A safetensors file that grows by one tensor at a time."""

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor as float32."""
        data: Any = tensor.detach().float().contiguous().numpy()
        self.add_bytes(name, "F32", data.shape, memoryview(data).cast("B"))


@contextmanager
def open_tensor_writer(file: Path, names: list[str]) -> Iterator[TensorWriter]:
    """Open a `TensorWriter` to `file` for tensors of at most these names."""
    with file.open("wb") as stream:
        writer = TensorWriter(stream, header_size(names))
        yield writer
        writer.close()
