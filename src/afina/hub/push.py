"""`afina push`: publish an adapter on the Hugging Face Hub, private and after a question."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afina.errors import SettingsError
from afina.hub.card import card_metadata, card_text
from afina.hub.client import ADAPTER_FILES, check_name, hub, hub_errors
from afina.io.adapter_folder import AdapterFolder
from afina.io.result import Content, Result, ResultTable, ResultText, format_bytes, next_command
from afina.io.translation import Verbatim, translate
from afina.settings import PushSettings

CARD = "README.md"
YES = ("y", "yes", "s", "sí", "si")


@dataclass(frozen=True, eq=False)
class PushResult(Result):
    """An adapter that was published.

    Attributes:
        repo: The repository.
        url: Its address.
        revision: The commit.
        private: Whether only its owner may read it.
        files: Files by name, with their sizes in bytes.
        card: The card's metadata.
    """

    repo: str
    url: str
    revision: str
    private: bool
    files: Mapping[str, int]
    card: Mapping[str, Any]

    def content(self) -> list[Content]:
        """Return what was uploaded, and the command that downloads it."""
        rows = [(name, Verbatim(format_bytes(size))) for name, size in self.files.items()]
        return [
            ResultTable("uploaded files", rows),
            ResultText(f"published: {self.url} ({_visibility(self.private)})"),
            *next_command(f"afina pull {self.repo} --revision {self.revision}"),
        ]


def push(settings: PushSettings) -> PushResult:
    """Check an adapter with the strict reader, write its card, ask, and upload it.

    Raises:
        AdapterError: The adapter is damaged, or the Hub rejects the upload.
        SettingsError: The repository exists or is public and this was not requested, or the answer
            to the question is no.
    """
    check_name(settings.repo)
    adapter = AdapterFolder.open(settings.adapter, strict=True)
    adapter.verified_hash()
    run = settings.adapter
    card = card_metadata(adapter, run, settings.license, settings.dataset)
    text = card_text(card, adapter.path / CARD)
    files: dict[str, Path | bytes] = {
        name: adapter.path / name for name in ADAPTER_FILES if (adapter.path / name).is_file()
    }
    files[CARD] = text.encode()
    sizes = {
        name: len(file) if isinstance(file, bytes) else file.stat().st_size
        for name, file in files.items()
    }
    api = hub()
    with hub_errors(settings.repo):
        exists = api.repo_exists(settings.repo)
        private = bool(api.repo_info(settings.repo).private) if exists else not settings.public
    _check_repository(settings, exists, private)
    if not settings.yes:
        _ask(settings.repo, private, sizes, card)
    with hub_errors(settings.repo):
        if not exists:
            api.create_repo(settings.repo, private=private)
        commit = _upload(api, settings.repo, files)
    return PushResult(settings.repo, str(commit.repo_url), commit.oid, private, sizes, card)


def _check_repository(settings: PushSettings, exists: bool, private: bool) -> None:
    """Raise `SettingsError` where an upload would change or show what it should not."""
    if exists and not settings.overwrite:
        raise SettingsError(
            "the repository exists",
            where=settings.repo,
            hint="--overwrite adds a commit to it, or another name",
        )
    if exists and private == settings.public:
        now = _visibility(private)
        raise SettingsError(
            f"the repository is {now}",
            where=settings.repo,
            hint="leave --public out" if private else "--public, or another name",
        )


def _visibility(private: bool) -> str:
    return "private" if private else "public"


def _ask(repo: str, private: bool, sizes: Mapping[str, int], card: Mapping[str, Any]) -> None:
    """Show what is uploaded, and go on after a yes.

    Raises:
        SettingsError: The answer is another one, or there is no terminal.
    """
    if not sys.stdin.isatty():
        raise SettingsError("push needs an answer, and there is no terminal", hint="--yes")
    lines = [f"upload to {repo} ({_visibility(private)}): {format_bytes(sum(sizes.values()))}"]
    lines += [f"license: {card.get('license', 'not stated')}"]
    lines += [f"base: {card['base_model']}", f"files: {', '.join(sizes)}"]
    for line in lines:
        print(translate(line), file=sys.stderr)
    answer = input(f"{translate('upload?')} [y/N] ").strip().lower()
    if answer not in YES:
        raise SettingsError("nothing was uploaded", hint="--yes uploads without a question")


def _upload(api: Any, repo: str, files: Mapping[str, Path | bytes]) -> Any:
    """Upload the files in one commit."""
    from huggingface_hub import CommitOperationAdd

    operations: Sequence[Any] = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()
    ]
    return api.create_commit(repo, operations, commit_message="Upload adapter with afina")
