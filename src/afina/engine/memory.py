"""Contents of the pool (keys and values, cached prefixes, adapters) and their eviction.

    disk  --prefetch, while the request waits-->  host  --load-->  pool  --activate-->  layers

On a CPU the pool is in host memory. For a pool on a GPU the latest adapters are kept in host memory
too.

Unused content stays until its blocks are needed; then the least recently used goes first, a block
of a prefix or an adapter. An adapter's prefix blocks go before it: they cannot be used without it.
"""

import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from afina.engine.adapter_registry import AdapterRecord, AdapterRegistry, LiveAdapter
from afina.engine.block_pool import BlockPool, ignore_move
from afina.engine.loaded_adapter import LoadedAdapter, read_numbers
from afina.engine.prefix_cache import PrefixCache
from afina.errors import AdapterError
from afina.io.regular_file import fingerprint
from afina.models.causal_lm import CausalLM

MAX_PREFETCHED = 8  # adapters that are read before their request runs


class MemoryManager:
    """The pool and its contents. Only the engine's thread calls; files are read by another."""

    def __init__(
        self, base: CausalLM, registry: AdapterRegistry, pool: BlockPool, host: int = 0
    ) -> None:
        """Store the pool; `host` bytes of adapters are kept in host memory in addition."""
        self.base, self.registry, self.pool, self._host_bytes = base, registry, pool, host
        self._sealed = registry.require_audit
        self.tree = PrefixCache()
        self.residents: dict[str, LoadedAdapter] = {}
        self.loads = self.evictions = 0
        self._ahead: dict[str, Future[Tensor]] = {}
        self._host: dict[str, Tensor] = {}  # the latest last
        self._reader = ThreadPoolExecutor(1, "afina-prefetch")

    def close(self) -> None:
        """Remove every adapter from the layers and stop reading files."""
        self._reader.shutdown(wait=True, cancel_futures=True)
        for name in list(self.residents):
            self._evict(self.residents[name])
        self.pool.on_block_moved = ignore_move  # ends a reference cycle: the pool is freed now

    # ---- pages

    def allocate_block(self) -> int | None:
        """Return a block for keys and values, evicting if needed; None where all are in use."""
        return self.pool.allocate() if self._evict_until(1) else None

    @property
    def num_available_blocks(self) -> int:
        """Blocks that are free or store an unread prefix."""
        return self.pool.num_free_blocks + self.tree.num_idle_blocks

    def _evict_until(self, pages: int) -> bool:
        """Free `pages` blocks, least recently used first; return False if too many are used."""
        while self.pool.num_free_blocks < pages:
            idle = [r for r in self.residents.values() if not r.ref_count]
            oldest = min(idle, key=lambda r: r.used, default=None)
            since = self.tree.oldest()
            if oldest is not None and (since is None or oldest.used < since):
                self._evict(oldest)
            elif (page := self.tree.evict()) is not None:
                self.pool.free(page)
            else:
                return False
        return True

    # ---- adapters

    def prefetch(self, content: AdapterRecord | LiveAdapter) -> None:
        """Start to read an adapter from disk, before its request runs."""
        if (
            isinstance(content, LiveAdapter)
            or self._near(content.hash)
            or content.hash in self._ahead
        ):
            return
        if len(self._ahead) >= MAX_PREFETCHED:  # drop one read for a request that was cancelled
            oldest = next((digest for digest, read in self._ahead.items() if read.done()), None)
            if oldest is None:
                return
            del self._ahead[oldest]
        self._ahead[content.hash] = self._reader.submit(read_verified, content, self._sealed)

    def is_ready(self, content: AdapterRecord | LiveAdapter) -> bool:
        """Return whether the adapter can be loaded without waiting for the disk."""
        if isinstance(content, LiveAdapter) or self._near(content.hash):
            return True
        return content.hash in self._ahead and self._ahead[content.hash].done()

    def _near(self, digest: str) -> bool:
        """Return whether it is in the pool or in host memory."""
        return digest in self.residents or digest in self._host

    def _numbers(self, content: AdapterRecord) -> Tensor:
        """Return the adapter's elements in host memory: cached, prefetched, or read now."""
        numbers = self._host.pop(content.hash, None)
        if numbers is None:
            ahead = self._ahead.pop(content.hash, None)
            numbers = ahead.result() if ahead is not None else read_verified(content, self._sealed)
            if self._host_bytes and self.pool.memory.is_cuda:
                numbers = numbers.pin_memory()
        if self._host_bytes:
            self._host[content.hash] = numbers
            self.registry.locations[content.hash] = "host"
        while sum(t.nbytes for t in self._host.values()) > self._host_bytes:
            oldest = next(iter(self._host))
            del self._host[oldest]
            if oldest not in self.residents:
                self.registry.locations.pop(oldest, None)
        return numbers

    def load(self, content: AdapterRecord | LiveAdapter) -> bool:
        """Load the adapter into pool and layers until `release`; return False if the pool is full.

        Raises:
            AdapterError: its file has changed since it was registered.
        """
        if isinstance(content, LiveAdapter):
            return True
        resident = self.residents.get(content.hash)
        if resident is None:
            begin = time.perf_counter()
            numbers = content.layout.numbers_in(self.pool.memory.dtype)
            pages = self.pool.blocks_for(numbers)
            start = self._run(pages)
            if start is None:
                return False
            resident = LoadedAdapter(
                content.hash,
                content.layout,
                start,
                pages,
                self.pool.contiguous_view(start, numbers),
            )
            try:
                resident.copy_from(self._numbers(content))
                resident.activate(self.base)
            except BaseException:
                self.pool.free_contiguous(start, pages)
                raise
            self.residents[content.hash] = resident
            self.loads += 1
            self.registry.locations[content.hash] = "device" if self.pool.memory.is_cuda else "host"
            self.registry.record_usage(content.hash, 0, load_seconds=time.perf_counter() - begin)
        resident.activate(self.base)
        resident.ref_count += 1
        resident.used = time.monotonic()
        return True

    def _run(self, pages: int) -> int | None:
        """Return the first of `pages` contiguous blocks, evicting until they can be allocated."""
        wanted = pages
        while self._evict_until(min(wanted, self.pool.count)):
            if (start := self.pool.allocate_contiguous(pages)) is not None:
                return start
            if wanted >= self.pool.count:
                return None
            wanted = self.pool.num_free_blocks + 1
        return None

    def release(self, digest: str) -> None:
        """Count the adapter as used by one sequence less; it stays until its blocks are needed."""
        resident = self.residents.get(digest)
        if resident is None:  # a live adapter
            return
        resident.ref_count -= 1
        resident.used = time.monotonic()
        if not resident.ref_count:
            resident.deactivate(self.base)

    def forget(self, digest: str) -> None:
        """Free all blocks of an adapter that no name and no request needs."""
        self._ahead.pop(digest, None)
        self._host.pop(digest, None)
        for page in self.tree.forget_adapter(digest):
            self.pool.free(page)
        resident = self.residents.get(digest)
        if resident is not None and not resident.ref_count:
            self._evict(resident)

    def _evict(self, resident: LoadedAdapter) -> None:
        for page in self.tree.forget_adapter(resident.name):
            self.pool.free(page)
        resident.deactivate(self.base, evicted=True)
        self.pool.free_contiguous(resident.start, resident.pages)
        del self.residents[resident.name]
        if resident.name in self._host:
            self.registry.locations[resident.name] = "host"
        else:
            self.registry.locations.pop(resident.name, None)
        self.evictions += 1


def read_verified(content: AdapterRecord, sealed: bool) -> Tensor:
    """Return the adapter's elements from the file that was hashed.

    Args:
        sealed: hash the elements again; without it, a file with a forged change time passes.

    Raises:
        AdapterError: the file is missing or has changed.
    """
    try:
        before = fingerprint(os.stat(content.file))
        numbers = read_numbers(Path(content.file), content.layout)
        after = fingerprint(os.stat(content.file))
    except OSError as error:
        why = error.strerror or str(error)
        raise AdapterError(
            "the adapter's file is missing", where=content.file, why=why, hint="load it again"
        ) from error
    if not before == after == content.fingerprint or (
        sealed and content.layout.hash_of(numbers) != content.hash
    ):
        why = "it was changed after it was registered, and unchecked weights are not served"
        raise AdapterError(
            "not the file that was loaded", where=content.file, why=why, hint="load it again"
        )
    return numbers
