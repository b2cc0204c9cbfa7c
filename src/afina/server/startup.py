"""Adapters that a server registers when it starts; one that fails does not keep it from starting."""

from pathlib import Path

from afina.io.adapter_folder import CONFIG_FILE
from afina.server.logs import LOG
from afina.server.state import ServerState
from afina.server.store import AdapterRow


def register_adapters(state: ServerState) -> None:
    """Register the adapters of the store, then those of the folders in the settings."""
    for row in state.store.query(AdapterRow):
        _register(state, row.name, Path(row.folder), row.owner)
    for root in state.settings.adapters:
        folders = adapter_folders(root)
        if not folders:
            LOG.warning("no adapters in the folder", extra={"folder": str(root)})
        for folder in folders:
            if state.engine.registry.get(folder.resolve().name) is None:
                _register(state, folder.resolve().name, folder)


def adapter_folders(root: Path) -> list[Path]:
    """Return the adapter or run folders at or below `root`."""
    if _has_adapter(root):
        return [root]
    return [folder for folder in sorted(root.expanduser().glob("*")) if _has_adapter(folder)]


def _register(state: ServerState, name: str, folder: Path, owner: str | None = None) -> None:
    """Register an adapter, or log why it is not served: whatever fails is of this adapter alone."""
    try:
        state.engine.registry.add(name, folder, owner)
    except Exception as error:
        LOG.error("not served", extra={"adapter": name, "why": str(error)})


def _has_adapter(folder: Path) -> bool:
    return any((path / CONFIG_FILE).is_file() for path in (folder, folder / "adapter"))
