"""What a base's files tell without loading it: the shapes of its weights, and the weights themselves, a piece at a time."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

import afina
from afina.errors import AuditError
from afina.io.safetensors import hash_tensor_files, read_header
from afina.io.strict_json import parse_object
from afina.settings import EMBEDDED

CHUNK = 1 << 21  # numbers widened to float32 at a time: 8 MB
INDEX = "model.safetensors.index.json"


class BaseFiles:
    """A base's folder of safetensors; the user's own, and so trusted."""

    def __init__(self, folder: Path) -> None:
        """Raises `AuditError` where there is no model in `folder`."""
        self.folder = folder
        if not (folder / "config.json").is_file():
            raise AuditError(
                "no model here",
                where=str(folder),
                hint="--base FOLDER, with config.json and safetensors",
            )
        self.config: dict[str, Any] = parse_object(
            (folder / "config.json").read_bytes(), str(folder / "config.json")
        )
        if (folder / INDEX).is_file():
            names = sorted(
                set(
                    parse_object((folder / INDEX).read_bytes(), str(folder / INDEX))[
                        "weight_map"
                    ].values()
                )
            )
            self.files = [folder / name for name in names]
        else:
            self.files = sorted(folder.glob("model*.safetensors"))
        self._places: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        for file in self.files:
            offset, header = read_header(file)
            self._places |= {
                name: (file, offset, about)
                for name, about in header.items()
                if name != "__metadata__"
            }

    @cached_property
    def hash(self) -> str:
        """Identity of the base: that of its tensors."""
        return hash_tensor_files(self.files)

    @property
    def vocabulary(self) -> int | None:
        """Size of its vocabulary, as its configuration tells."""
        size = self.config.get("vocab_size") or self.config.get("text_config", {}).get("vocab_size")
        return int(size) if size else None

    def shape(self, path: str) -> tuple[int, ...] | None:
        """Shape of the weight of the module at `path`; None where the files have none there that is plainly stored."""
        place = self._places.get(f"{path}.weight")
        if place is None or place[2]["dtype"] not in ("F32", "F16", "BF16"):
            return (
                self.shape("model.embed_tokens")
                if path == "lm_head" and self.config.get("tie_word_embeddings")
                else None
            )
        return tuple(place[2]["shape"])

    @property
    def has_shapes(self) -> bool:
        """Whether any weight is stored as a plain matrix (none is where the whole base is in 4 bits)."""
        return any(
            about["dtype"] in ("F32", "F16", "BF16") and len(about["shape"]) > 1
            for *_, about in self._places.values()
        )

    def rows(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """The tensor `name` (out, in), some rows at a time: (number of the first, rows as float32)."""
        file, offset, about = self._places[name]
        rows, columns = about["shape"][0], int(np.prod(about["shape"][1:], dtype=np.int64))
        width = {"F32": 4, "F16": 2, "BF16": 2}[about["dtype"]]
        step = max(1, CHUNK // columns)
        with file.open("rb") as stream:
            stream.seek(offset + about["data_offsets"][0])
            for start in range(0, rows, step):
                count = min(step, rows - start)
                yield (
                    start,
                    widened(stream.read(count * columns * width), about["dtype"]).reshape(
                        count, columns
                    ),
                )

    def embedding(self) -> str | None:
        """Name of the tensor that turns tokens into vectors."""
        return next(
            (name for name in self._places if name.endswith(("embed_tokens.weight", "wte.weight"))),
            None,
        )

    def output(self) -> str | None:
        """Name of the tensor that turns vectors into logits: the embedding's where they are tied."""
        return "lm_head.weight" if "lm_head.weight" in self._places else self.embedding()


def widened(raw: bytes | bytearray | memoryview, dtype: str) -> np.ndarray:
    """Bytes of a safetensors tensor as float32."""
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, "<f4" if dtype == "F32" else "<f2").astype(np.float32, copy=False)


def find_base(name: str) -> Path | None:
    """The folder of a base by its path or "embedded"; None where it is a hub's name: the audit never asks the network."""
    if name == EMBEDDED:
        return Path(afina.__file__).parent / "base" / "embedded"
    folder = Path(name).expanduser()
    return folder if folder.is_dir() else None
