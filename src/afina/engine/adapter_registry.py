"""The shelf: names that point at adapters, and the adapters themselves, known by the hash of their content.

    "tone"  ──┐
    "polite" ─┴─> 3f9a...   runs/tone/adapter      two names, one adapter
    "law"  ─────> 77c0...   (before: 12b4...)      replaced: who asked before finishes with 12b4...

Adding one reads its files once, to check and to hash them; its numbers stay on disk until somebody asks for it.
"""

import os
import threading
from dataclasses import dataclass, replace
from pathlib import Path

from afina.adapters.active import ActiveAdapters
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


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """An adapter as it lies on disk."""

    hash: str
    file: str  # a path: thousands are kept
    fingerprint: FileFingerprint
    layout: AdapterLayout

    @property
    def layer_key(self) -> str:
        """Its name in the layers."""
        return self.hash

    @property
    def config(self) -> AdapterConfig:
        """What it is, apart from its tensors."""
        return self.layout.config

    @property
    def invocation(self) -> tuple[int, ...]:
        """Tokens from whose last occurrence on it acts; none: everywhere."""
        return self.config.invocation

    @property
    def bytes(self) -> int:
        """Its size on disk."""
        return self.layout.numbers * self.layout.dtype.itemsize


@dataclass(frozen=True, slots=True)
class LiveAdapter:
    """An adapter that somebody else has attached to the base, and may be training: its numbers are used where they are.

    `label` is its name in the layers; `hash` stands for its numbers as they are now.
    """

    hash: str
    layer_key: str
    invocation: tuple[int, ...]
    replaces_base: bool  # then it is active alone, on all tokens of a step


@dataclass(slots=True)
class _Label:
    """What is kept of a name."""

    hash: str
    owner: str | None
    hits: int = 0
    tokens: int = 0
    load_seconds: float = 0.0


class AdapterRegistry:
    """Every adapter that may be asked for. All changes are atomic; any thread may call."""

    def __init__(self, base: CausalLM, require_audit: bool = False) -> None:
        """`require_audit`: accept only adapters with an audit report that approves them."""
        self.base, self.require_audit = base, require_audit
        self._layouts = AdapterLayoutCache(base)
        self._lock = threading.RLock()
        self._labels: dict[str, _Label] = {}
        self._contents: dict[str, AdapterRecord | LiveAdapter] = {}
        self._held: dict[str, int] = {}  # running or waiting requests, by hash
        self._lendings = 0
        self.locations: dict[str, str] = {}  # hash to where its numbers are, when not on disk only
        self.unreferenced: list[
            str
        ] = []  # hashes that nothing points at any more, for the engine to clear away

    # ---- names

    def add(self, name: str, folder: Path, owner: str | None = None) -> RegisteredAdapter:
        """Put the adapter in `folder` (or in a run folder) on the shelf as `name`.

        Raises `AdapterError` where it is damaged, for another base, of a kind that cannot be served, or the name taken;
        `AuditError` where it is not admitted.
        """
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
        """Let `name` point at another adapter from now on; requests that are under way finish with theirs."""
        content = self._read(Path(folder))
        with self._lock:
            old = self._label(name)
            label = replace(old, hash=content.hash)
            entry = self._point(name, content, label)
            self._clear(old.hash)
            return entry

    def rename(self, old: str, new: str) -> RegisteredAdapter:
        """Another name for the same adapter."""
        with self._lock:
            label = self._label(old)
            if new in self._labels:
                raise AdapterError(
                    f"there is an adapter named {new!r}", where=old, hint="another name"
                )
            self._labels[new] = self._labels.pop(old)
            return self._entry(new, label)

    def remove(self, name: str) -> RegisteredAdapter:
        """Take a name off the shelf, and its adapter where no other name points at it and no request needs it."""
        with self._lock:
            entry = self._entry(name, self._label(name))
            del self._labels[name]
            self._clear(entry.hash)
            return entry

    def get(self, name: str) -> RegisteredAdapter | None:
        """What `name` points at now."""
        with self._lock:
            label = self._labels.get(name)
            return self._entry(name, label) if label else None

    def list_adapters(self) -> list[RegisteredAdapter]:
        """Everything on the shelf, in the order in which it came."""
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
        assert isinstance(content, AdapterRecord)  # what is lent has no name
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
        """Forget a content that no name and no request needs."""
        if not self._held.get(digest) and all(
            label.hash != digest for label in self._labels.values()
        ):
            self._contents.pop(digest, None)
            self.unreferenced.append(digest)

    # ---- contents

    def add_live(self, route: ActiveAdapters) -> str:
        """Let requests use an adapter that is attached to the base, as it is now; returns what stands for it in a `Part`.

        Of its route count the name in the layers and the invocation; its weight is the `Part`'s.

        Lend it again after each change: pages that its former numbers made are then never read again. Until `take_back`,
        requests that are under way follow the numbers as they change, so let them end first.
        """
        with self._lock:
            self._lendings += 1
            digest = f"{route.adapter}@{self._lendings}"
            self._contents[digest] = LiveAdapter(
                digest,
                route.adapter,
                route.invocation,
                replaces_base_modules(self.base.model, route.adapter),
            )
            return digest

    def remove_live(self, digest: str) -> None:
        """No more requests for what was lent."""
        with self._lock:
            self._clear(digest)

    def acquire(self, digests: tuple[str, ...]) -> list[AdapterRecord | LiveAdapter]:
        """The contents of these hashes, which stay until `let_go`; raises `AdapterError` where one is unknown."""
        with self._lock:
            if missing := [digest for digest in digests if digest not in self._contents]:
                raise AdapterError(
                    f"no adapter with hash {missing[0][:12]}", hint="ask for it by its name"
                )
            for digest in digests:
                self._held[digest] = self._held.get(digest, 0) + 1
            return [self._contents[digest] for digest in digests]

    def release(self, digests: tuple[str, ...]) -> None:
        """A request is done with these."""
        with self._lock:
            for digest in digests:
                self._held[digest] -= 1
                if not self._held[digest]:
                    del self._held[digest]
                    self._clear(digest)

    def record_usage(
        self, digest: str, tokens: int, hits: int = 0, load_seconds: float | None = None
    ) -> None:
        """Write down what an adapter did."""
        with self._lock:
            for label in self._labels.values():
                if label.hash == digest:
                    label.tokens, label.hits = label.tokens + tokens, label.hits + hits
                    label.load_seconds = (
                        label.load_seconds if load_seconds is None else load_seconds
                    )

    def _read(self, folder: Path) -> AdapterRecord:
        opened = AdapterFolder.open(folder)
        check_base(opened, self.base, require_known=self.require_audit)
        file, tokenizer = opened.weights_file, self.base.tokenizer
        before = fingerprint(os.stat(file))
        layout = self._layouts.of(opened, opened.config(tokenizer))
        digest = opened.verified_hash(tokenizer)
        if fingerprint(os.stat(file)) != before:
            raise AdapterError(
                "the file changed while it was read", where=str(file), hint="load it again"
            )
        # of the content that was hashed here: it is what will be served
        require_report(self.require_audit, digest, str(opened.path), self.base.hash)
        return AdapterRecord(digest, str(file), before, layout)
