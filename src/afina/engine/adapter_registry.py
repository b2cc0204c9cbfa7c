"""Registered names, and the adapters they point at, identified by the hash of their content.

    "tone"  ──┐
    "polite" ─┴─> 3f9a...   runs/tone/adapter      two names, one adapter
    "law"  ─────> 77c0...   (before: 12b4...)      replaced: running requests finish with 12b4...

Adding one reads its files once, to check and hash them; its weights stay on disk until a request
needs them.
"""

import os
import re
import threading
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from afina.adapters.active import ActiveAdapter
from afina.adapters.attach import replaces_base_modules
from afina.adapters.loading import check_base
from afina.engine.loaded_adapter import AdapterLayout, AdapterLayoutCache
from afina.engine.request import RegisteredAdapter
from afina.errors import AdapterError, did_you_mean
from afina.io.adapter_config import AdapterConfig
from afina.io.adapter_folder import AdapterFolder
from afina.io.admission import require_report
from afina.io.regular_file import FileFingerprint, fingerprint
from afina.models.causal_lm import CausalLM
from afina.models.classifier import Classifier

ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:@-]{0,199}")


def check_adapter_name(name: str, reserved: Collection[str] = ()) -> None:
    """Raise `AdapterError` for a name that no request could use.

    A request may name several adapters, with weights: `a:0.7,b:0.3`.

    Args:
        reserved: names that mean something else, such as the base's.
    """
    if name in reserved:
        raise AdapterError(f"name {name!r} is taken: it does not mean an adapter here")
    if ADAPTER_NAME.fullmatch(name) is None:
        why = "it must be 1 to 200 letters, digits and _ . : @ -, and begin with a letter or digit"
        raise AdapterError(f"name {name[:60]!r} is not possible", why=why)


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """An adapter on disk."""

    hash: str
    file: str  # a path: thousands are kept
    fingerprint: FileFingerprint
    layout: AdapterLayout

    @property
    def layer_key(self) -> str:
        """Name in the layers."""
        return self.hash

    @property
    def config(self) -> AdapterConfig:
        """Configuration: all but its tensors."""
        return self.layout.config

    @property
    def invocation(self) -> tuple[int, ...]:
        """Token ids from whose last occurrence on it is active; empty: on all tokens."""
        return self.config.invocation

    @property
    def bytes(self) -> int:
        """Size of its tensors on disk."""
        return self.layout.numbers * self.layout.dtype.itemsize


@dataclass(frozen=True, slots=True)
class LiveAdapter:
    """An adapter that is attached to the base and may be in training: its weights are not copied.

    Attributes:
        hash: identifier of its present weights.
        layer_key: its name in the layers.
        replaces_base: whether it has layers of its own that replace the base's; then it is
            active alone, on all tokens of a step.
    """

    hash: str
    layer_key: str
    invocation: tuple[int, ...]
    replaces_base: bool


@dataclass(slots=True)
class _Label:
    """Record of a name."""

    hash: str
    owner: str | None
    hits: int = 0
    tokens: int = 0
    load_seconds: float = 0.0


class AdapterRegistry:
    """Adapters that requests may name. All changes are atomic; any thread may call."""

    def __init__(
        self,
        base: CausalLM | Classifier,
        require_audit: bool = False,
        reserved_names: Collection[str] = (),
    ) -> None:
        """Store the rules of all adapters.

        Args:
            require_audit: accept only adapters with an audit report that approves them.
            reserved_names: names that no adapter may have.
        """
        self.base, self.require_audit = base, require_audit
        self.reserved_names = frozenset(reserved_names)
        self._layouts = AdapterLayoutCache(base)
        self._lock = threading.RLock()
        self._labels: dict[str, _Label] = {}
        self._contents: dict[str, AdapterRecord | LiveAdapter] = {}
        self._ref_counts: dict[str, int] = {}  # running or waiting requests, by hash
        self._num_live = 0
        self.locations: dict[str, str] = {}  # hash to where its weights are, besides the disk
        self.unreferenced: list[str] = []  # hashes without a name or request, for the engine

    # ---- names

    def add(self, name: str, folder: Path, owner: str | None = None) -> RegisteredAdapter:
        """Register the adapter in `folder` (an adapter or run folder) as `name`.

        Raises:
            AdapterError: it is damaged, trained on another base, of a method that cannot be served,
                or the name is taken.
            AuditError: no audit report admits it.
        """
        check_adapter_name(name, self.reserved_names)
        content = self._read(Path(folder))
        with self._lock:
            if name in self._labels:
                raise AdapterError(
                    f"there is an adapter named {name!r}",
                    where=str(folder),
                    hint="replace it, or another name",
                )
            return self._point(name, content, _Label(content.hash, owner))

    def replace(self, name: str, folder: Path) -> RegisteredAdapter:
        """Point `name` at another adapter; running requests finish with the former one."""
        content = self._read(Path(folder))
        with self._lock:
            old = self._label(name)
            label = replace(old, hash=content.hash)
            entry = self._point(name, content, label)
            self._clear(old.hash)
            return entry

    def rename(self, old: str, new: str) -> RegisteredAdapter:
        """Give an adapter another name; raise `AdapterError` where it is taken or not possible."""
        check_adapter_name(new, self.reserved_names)
        with self._lock:
            label = self._label(old)
            if new in self._labels:
                raise AdapterError(
                    f"there is an adapter named {new!r}", where=old, hint="another name"
                )
            self._labels[new] = self._labels.pop(old)
            return self._entry(new, label)

    def remove(self, name: str) -> RegisteredAdapter:
        """Remove a name, and its adapter where no other name or request needs it."""
        with self._lock:
            entry = self._entry(name, self._label(name))
            del self._labels[name]
            self._clear(entry.hash)
            return entry

    def get(self, name: str) -> RegisteredAdapter | None:
        """Return what `name` points at; None for an unknown name."""
        with self._lock:
            label = self._labels.get(name)
            return self._entry(name, label) if label else None

    def list_adapters(self) -> list[RegisteredAdapter]:
        """Return all registered adapters in the order of registration."""
        with self._lock:
            return [self._entry(name, label) for name, label in self._labels.items()]

    def _label(self, name: str) -> _Label:
        if name not in self._labels:
            raise AdapterError(
                f"no adapter named {name!r}",
                hint=did_you_mean(name, self._labels) if self._labels else None,
            )
        return self._labels[name]

    def _point(self, name: str, content: AdapterRecord, label: _Label) -> RegisteredAdapter:
        self._contents.setdefault(content.hash, content)
        self._labels[name] = label
        return self._entry(name, label)

    def _entry(self, name: str, label: _Label) -> RegisteredAdapter:
        content = self._contents[label.hash]
        assert isinstance(content, AdapterRecord)  # a live adapter has no name
        spec = content.config
        return RegisteredAdapter(
            name,
            content.hash,
            os.path.dirname(content.file),
            spec.method,
            spec.rank,
            content.bytes,
            self.locations.get(content.hash, "disk"),
            label.owner,
            spec.invocation,
            label.hits,
            label.tokens,
            label.load_seconds,
        )

    def _clear(self, digest: str) -> None:
        """Drop an adapter that no name and no request needs."""
        if not self._ref_counts.get(digest) and all(
            label.hash != digest for label in self._labels.values()
        ):
            self._contents.pop(digest, None)
            self.unreferenced.append(digest)

    # ---- contents

    def add_live(self, active: ActiveAdapter) -> str:
        """Register an adapter that is attached to the base; return its hash for `AdapterWeight`.

        Its present weights are used; its factor is the request's. Register it again after each
        change of the weights: cached blocks of the former ones are then never read. Requests that
        run while the weights change follow them, so let them finish first.
        """
        with self._lock:
            self._num_live += 1
            digest = f"{active.adapter}@{self._num_live}"
            replaces = replaces_base_modules(self.base.model, active.adapter)
            self._contents[digest] = LiveAdapter(
                digest, active.adapter, active.invocation, replaces
            )
            return digest

    def remove_live(self, digest: str) -> None:
        """Remove a live adapter; no further request may name it."""
        with self._lock:
            self._clear(digest)

    def acquire(self, digests: tuple[str, ...]) -> list[AdapterRecord | LiveAdapter]:
        """Return the adapters of these hashes, kept until `release`.

        Raises:
            AdapterError: a hash is unknown.
        """
        with self._lock:
            if missing := [digest for digest in digests if digest not in self._contents]:
                raise AdapterError(
                    f"no adapter with hash {missing[0][:12]}", hint="use the name of the adapter"
                )
            for digest in digests:
                self._ref_counts[digest] = self._ref_counts.get(digest, 0) + 1
            return [self._contents[digest] for digest in digests]

    def release(self, digests: tuple[str, ...]) -> None:
        """Count these as used by one request less."""
        with self._lock:
            for digest in digests:
                self._ref_counts[digest] -= 1
                if not self._ref_counts[digest]:
                    del self._ref_counts[digest]
                    self._clear(digest)

    def record_usage(
        self, digest: str, tokens: int, hits: int = 0, load_seconds: float | None = None
    ) -> None:
        """Add tokens, requests and load time (seconds) to the statistics of an adapter."""
        with self._lock:
            for label in self._labels.values():
                if label.hash == digest:
                    label.tokens, label.hits = label.tokens + tokens, label.hits + hits
                    label.load_seconds = (
                        label.load_seconds if load_seconds is None else load_seconds
                    )

    def _layouts_for(self, opened: AdapterFolder) -> AdapterLayoutCache:
        return self._layouts

    def _read(self, folder: Path) -> AdapterRecord:
        opened = AdapterFolder.open(folder)
        check_base(opened, self.base, require_known=self.require_audit)
        file, tokenizer = opened.weights_file, self.base.tokenizer
        before = fingerprint(os.stat(file))
        layout = self._layouts_for(opened).of(opened, opened.config(tokenizer))
        digest = opened.verified_hash(tokenizer)
        if fingerprint(os.stat(file)) != before:
            raise AdapterError(
                "the file changed while it was read", where=str(file), hint="load it again"
            )
        # of the content that was hashed here: it is what will be served
        require_report(self.require_audit, digest, str(opened.path), self.base.hash)
        return AdapterRecord(digest, str(file), before, layout)
