"""Settings of `afina push` and `afina pull`."""

from pathlib import Path

from afina.settings.common import Settings, setting


class PushSettings(Settings):
    """Settings of `afina push`."""

    adapter: Path = setting("the run or adapter folder to publish", ...)
    repo: str = setting("name of the repository: owner/name", ...)
    public: bool = setting("everybody may read it; by default only the owner", False)
    license: str | None = setting(
        "license of the adapter, such as apache-2.0; by default that of the base, where its card "
        "states one"
    )
    dataset: list[str] = setting("names of the training data on the Hub, for the card", [])
    overwrite: bool = setting(
        "add a commit to a repository that exists; earlier commits are kept", False
    )
    yes: bool = setting("upload without a question", False)


class PullSettings(Settings):
    """Settings of `afina pull`."""

    repo: str = setting("name of the repository: owner/name", ...)
    revision: str | None = setting("branch, tag or commit; by default main")
    output_dir: Path | None = setting("a new folder; by default adapters/NAME")
