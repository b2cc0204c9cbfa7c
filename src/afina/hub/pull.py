"""`afina pull`: download an adapter from the Hugging Face Hub and check it before it is kept."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from afina.audit.file_gate import MAX_OTHER_BYTES, MAX_WEIGHTS_BYTES
from afina.errors import AdapterError
from afina.hub.client import ADAPTER_FILES, check_name, hub, hub_errors
from afina.io.adapter_folder import CONFIG_FILE, WEIGHTS_FILE, AdapterFolder
from afina.io.atomic import atomic_directory, require_new_directory
from afina.io.result import Content, Result, ResultTable, ResultText, format_bytes, next_command
from afina.io.translation import Verbatim
from afina.settings import PullSettings


@dataclass(frozen=True, eq=False)
class PullResult(Result):
    """An adapter that was downloaded.

    Attributes:
        repo: The repository.
        revision: The commit.
        folder: The adapter's folder.
        method: The adapter method.
        base: Name of the base that its files record.
        hash: The adapter's identity (hex).
        files: The files.
        left_out: Files of the repository that an adapter does not need; they were not downloaded.
    """

    repo: str
    revision: str
    folder: str
    method: str
    base: str | None
    hash: str
    files: Sequence[str]
    left_out: Sequence[str]

    def content(self) -> list[Content]:
        """Return what was downloaded, and the command that audits it."""
        rows = [
            ("folder", Verbatim(self.folder)),
            ("revision", Verbatim(self.revision)),
            ("method", Verbatim(self.method)),
            ("base", Verbatim(str(self.base))),
            ("hash", Verbatim(self.hash[:16])),
            ("files", Verbatim(", ".join(self.files))),
        ]
        names = ", ".join(self.left_out)
        left = [ResultText(f"not downloaded: {names}")] if self.left_out else []
        return [
            ResultTable("downloaded adapter", rows),
            *left,
            *next_command(f"afina audit {self.folder}"),
        ]


def pull(settings: PullSettings) -> PullResult:
    """Download the files of an adapter into a new folder, and open them with the strict reader.

    No file is kept that the reader rejects, and none that an adapter does not need: no code, no
    pickle, no tokenizer.

    Raises:
        AdapterError: The repository has no adapter, or the adapter is damaged or too large.
        SettingsError: The folder is not empty.
    """
    check_name(settings.repo)
    output = settings.output_dir or Path("adapters") / settings.repo.partition("/")[2]
    require_new_directory(output)
    api = hub()
    with hub_errors(settings.repo):
        info = api.repo_info(settings.repo, revision=settings.revision, files_metadata=True)
    sizes = {one.rfilename: one.size or 0 for one in info.siblings or ()}
    names = [name for name in ADAPTER_FILES if name in sizes]
    _check_files(settings.repo, sizes, names)
    with atomic_directory(output) as folder:
        with hub_errors(settings.repo):
            api.snapshot_download(
                settings.repo, revision=info.sha, local_dir=folder, allow_patterns=names
            )
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # of the client
        adapter = AdapterFolder.open(folder, strict=True)
        digest = adapter.verified_hash()
        method, base = adapter.method, adapter.base.name
    left_out = sorted(sizes.keys() - {*names, ".gitattributes"})
    return PullResult(
        settings.repo, str(info.sha), str(output), method, base, digest, names, left_out
    )


def _check_files(repo: str, sizes: dict[str, int], names: Sequence[str]) -> None:
    """Raise `AdapterError` where a repository has no adapter, or one that is too large."""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if name not in names:
            pickled = any(one.endswith(".bin") for one in sizes)
            hint = "only safetensors are read" if pickled else None
            raise AdapterError(f"the repository has no {name}", where=repo, hint=hint)
    for name in names:
        limit = MAX_WEIGHTS_BYTES if name == WEIGHTS_FILE else MAX_OTHER_BYTES
        if sizes[name] > limit:
            what = f"{name} has {format_bytes(sizes[name])}"
            why = f"the limit is {format_bytes(limit)}"
            raise AdapterError(what, where=repo, why=why)
