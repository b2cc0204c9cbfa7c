"""A base's files without loading the model: shapes of its weights, and the weights in pieces."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

import afina
from afina.errors import AuditError
from afina.io.hashing import hash_tensor_files
from afina.io.safetensors import FLOAT_WIDTHS, SafetensorsReader
from afina.io.strict_json import RUN_JSON, read_json_object
from afina.settings import EMBEDDED

CHUNK_ELEMENTS = 1 << 21  # widened to float32 at a time: 8 MB
INDEX = "model.safetensors.index.json"


class BaseFiles:
    """A base's folder of safetensors; it is the user's own, and so trusted."""

    def __init__(self, folder: Path) -> None:
        """Read configuration and headers; raise `AuditError` where `folder` has no model."""
        self.folder = folder
        if not (folder / "config.json").is_file():
            raise AuditError(
                "no model here",
                where=str(folder),
                hint="--base FOLDER, with config.json and safetensors",
            )
        self.config = _read_json(folder / "config.json")
        if (folder / INDEX).is_file():
            names = sorted(set(_read_json(folder / INDEX)["weight_map"].values()))
            self.files = [folder / name for name in names]
        else:
            self.files = sorted(folder.glob("model*.safetensors"))
        self._readers: dict[str, SafetensorsReader] = {}
        for file in self.files:
            reader = SafetensorsReader(file, error=AuditError)
            self._readers |= dict.fromkeys(reader.entries, reader)

    @cached_property
    def hash(self) -> str:
        """Identity of the base: the hash of its tensors."""
        return hash_tensor_files(self.files)

    @property
    def vocab_size(self) -> int | None:
        """Size of its vocabulary in tokens, from its configuration."""
        size = self.config.get("vocab_size") or self.config.get("text_config", {}).get("vocab_size")
        return int(size) if size else None

    def shape(self, path: str) -> tuple[int, ...] | None:
        """Return the shape of a module's weight; None where no float weight is stored."""
        name = f"{path}.weight"
        reader = self._readers.get(name)
        if reader is None or reader.entries[name].dtype not in FLOAT_WIDTHS:
            is_tied = path == "lm_head" and self.config.get("tie_word_embeddings")
            return self.shape("model.embed_tokens") if is_tied else None
        return reader.entries[name].shape

    @property
    def has_shapes(self) -> bool:
        """Whether any weight is stored as a float matrix (none is where the base is in 4 bits)."""
        entries = (reader.entries[name] for name, reader in self._readers.items())
        return any(entry.dtype in FLOAT_WIDTHS and len(entry.shape) > 1 for entry in entries)

    def rows(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the tensor `name` (out, in) in pieces: index of the first row, rows as float32."""
        reader = self._readers[name]
        entry = reader.entries[name]
        num_rows = entry.shape[0]
        num_columns = entry.num_elements // num_rows
        row_bytes = num_columns * FLOAT_WIDTHS[entry.dtype]
        step = max(1, CHUNK_ELEMENTS // num_columns)
        for start in range(0, num_rows, step):
            count = min(step, num_rows - start)
            raw = reader.read_bytes(name, start * row_bytes, (start + count) * row_bytes)
            yield start, widened(raw, entry.dtype).reshape(count, num_columns)

    def embedding(self) -> str | None:
        """Return the name of the token embedding's weight."""
        ends = ("embed_tokens.weight", "wte.weight")
        return next((name for name in self._readers if name.endswith(ends)), None)

    def output(self) -> str | None:
        """Return the name of the output layer's weight: the embedding's where they are tied."""
        return "lm_head.weight" if "lm_head.weight" in self._readers else self.embedding()


def _read_json(file: Path) -> dict[str, Any]:
    return read_json_object(file, RUN_JSON, AuditError)


def widened(raw: bytes | bytearray | memoryview, dtype: str) -> np.ndarray:
    """Return the bytes of a safetensors tensor as float32."""
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, "<f4" if dtype == "F32" else "<f2").astype(np.float32, copy=False)


def find_base(name: str) -> Path | None:
    """Return the folder of a base by its path or "embedded"; None for a hub name: no network."""
    if name == EMBEDDED:
        return Path(afina.__file__).parent / "models" / "embedded"
    folder = Path(name).expanduser()
    return folder if folder.is_dir() else None
