"""Adapters in the folders of a server: registered, or not served with a reason, and tried again.

start       every folder of the store and of --adapters; one that fails ends nothing
a request   for an adapter that is not served, whose files have changed since: tried again
--watch     new and changed folders, every `WATCH_SECONDS`
"""

import threading
from pathlib import Path

from afina.errors import AfinaError
from afina.io.adapter_folder import CONFIG_FILE
from afina.server.logs import LOG
from afina.server.state import Files, ServerState, UnservedAdapter
from afina.server.store import AdapterRow

WATCH_SECONDS = 2.0


class AdapterFolders:
    """The folders from which a server takes adapters. Thread-safe."""

    def __init__(self, state: ServerState) -> None:
        self.state, self.unserved = state, state.unserved
        state.retry_adapter = self.retry
        self._served: dict[str, Files] = {}  # of the folders of the settings, by name
        self._seen: dict[str, Files] = {}  # at the last look: files that change are still written
        self._lock = threading.Lock()

    def register_all(self) -> None:
        """Register the adapters of the store, then those of the folders in the settings."""
        with self._lock:
            for row in self.state.store.query(AdapterRow):
                self._register(row.name, Path(row.folder), row.owner)
            for root in self.state.settings.adapters:
                folders = adapter_folders(root)
                if not folders:
                    LOG.warning("no adapters in the folder", extra={"folder": str(root)})
                for folder in folders:
                    if self.state.engine.registry.get(folder.resolve().name) is None:
                        self._register(folder.resolve().name, folder)

    def watch(self) -> None:
        """Register new and changed folders in a thread, until the server stops."""
        threading.Thread(target=self._watch, name="afina-adapters", daemon=True).start()

    def retry(self, name: str) -> bool:
        """Register an adapter that is not served, if its files changed; return whether it is."""
        with self._lock:
            known = self.unserved.get(name)
            if known is None or read_files(known.folder) == known.files:
                return False
            return self._register(name, known.folder, known.owner)

    def scan(self) -> None:
        """Register the folders of the settings that are new or have changed since the last look."""
        with self._lock:
            for root in self.state.settings.adapters:
                for folder in adapter_folders(root):
                    self._look(folder.resolve().name, folder)

    def _look(self, name: str, folder: Path) -> None:
        files = read_files(folder)
        is_stable, self._seen[name] = self._seen.get(name) == files, files
        known = self.unserved.get(name)
        before = self._served.get(name) if known is None else known.files
        if not is_stable or files == before:
            return
        registry = self.state.engine.registry
        entry = registry.get(name)
        if entry is None:
            self._register(name, folder, known.owner if known else None)
        elif before is not None:  # replaced in its folder; another one of this name is left alone
            try:
                registry.replace(name, folder)
                LOG.info("an adapter was replaced", extra={"adapter": name})
            except AfinaError as error:
                LOG.error(
                    "the changed adapter is not served", extra={"adapter": name, "why": str(error)}
                )
            self._served[name] = files

    def _watch(self) -> None:
        while self.state.ready:
            try:
                self.scan()
            except Exception:  # a folder that is removed while it is read
                LOG.exception("the folders of adapters could not be read")
            threading.Event().wait(WATCH_SECONDS)

    def _register(self, name: str, folder: Path, owner: str | None = None) -> bool:
        """Register an adapter, or note why it is not served: whatever fails is of it alone."""
        files = read_files(folder)
        self.unserved.pop(name, None)
        try:
            self.state.engine.registry.add(name, folder, owner)
        except Exception as error:
            LOG.error("not served", extra={"adapter": name, "why": str(error)})
            reason = error.what if isinstance(error, AfinaError) else "its files cannot be read"
            self.unserved[name] = UnservedAdapter(folder, owner, reason, files)
            return False
        self._served[name] = files
        return True


def read_files(folder: Path) -> Files:
    """Return path, time of change and size of the files of an adapter's folder."""
    found = []
    for parent in (folder, folder / "adapter"):
        for path in sorted(parent.glob("*.*")):
            try:
                status = path.stat()
            except OSError:  # removed in between
                continue
            found.append((str(path), status.st_mtime_ns, status.st_size))
    return tuple(found)


def adapter_folders(root: Path) -> list[Path]:
    """Return the adapter or run folders at or below `root`; none where it does not exist."""
    if _has_adapter(root):
        return [root]
    return [folder for folder in sorted(root.expanduser().glob("*")) if _has_adapter(folder)]


def _has_adapter(folder: Path) -> bool:
    return any((path / CONFIG_FILE).is_file() for path in (folder, folder / "adapter"))
