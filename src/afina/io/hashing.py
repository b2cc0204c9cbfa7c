"""Identities: the hash of a base's tensors, of an adapter's tensors, and of an adapter."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from afina.errors import AfinaError, BaseError
from afina.io.safetensors import TensorEntry, read_chunks, read_header


def start_tensor_hash(entry: TensorEntry) -> "hashlib._Hash":
    """Return the SHA-256 object of a tensor, already fed its dtype and shape."""
    return hashlib.sha256(json.dumps([entry.dtype, list(entry.shape)]).encode())


def hash_entries(stream: BinaryIO, entries: Iterable[TensorEntry], where: str) -> dict[str, str]:
    """Return the hash (hex) of each tensor of an open file, by name."""
    digests = {}
    for entry in entries:
        digest = start_tensor_hash(entry)
        for raw in read_chunks(stream, entry.begin, entry.end, f"{where}: {entry.name}"):
            digest.update(raw)
        digests[entry.name] = digest.hexdigest()
    return digests


def hash_tensor_files(files: list[Path], error: type[AfinaError] = BaseError) -> str:
    """Return the SHA-256 (hex) of the tensors in `files`, however they are spread over files.

    Each tensor is hashed with its dtype and shape; the digest is that of the list of name and hash,
    sorted by name.
    """
    digests: dict[str, str] = {}
    for file in files:
        entries = read_header(file, error=error)
        with file.open("rb") as stream:
            digests |= hash_entries(stream, entries.values(), str(file))
    return combine_tensor_hashes(digests)


def combine_tensor_hashes(digests: Mapping[str, str]) -> str:
    """Return the hash (hex) of several tensors, from the hash of each by its name."""
    lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()


def adapter_hash(tensors: str, config: Mapping[str, Any]) -> str:
    """Return an adapter's identity (hex): the SHA-256 of its tensors' hash and its configuration.

    Args:
        tensors: Hash of the tensors, as `hash_tensor_files` returns it.
        config: `AdapterConfig.canonical()`.
    """
    return hashlib.sha256((tensors + json.dumps(config, sort_keys=True)).encode()).hexdigest()


def hash_adapter_file(weights: Path, config: Mapping[str, Any]) -> str:
    """Return an adapter's identity (hex) from its safetensors file and `canonical()`."""
    return adapter_hash(hash_tensor_files([weights]), config)
