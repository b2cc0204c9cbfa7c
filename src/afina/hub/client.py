"""The Hub's client, with its errors as those of afina."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from afina.audit.file_gate import ALLOWED_FILES
from afina.errors import AdapterError, SettingsError

REPO_NAME = re.compile(r"[\w.-]+/[\w.-]+")
ADAPTER_FILES = tuple(sorted(ALLOWED_FILES))  # what an adapter's repository may hold for afina


def check_name(repo: str) -> None:
    """Raise `SettingsError` where a repository's name is not owner/name."""
    if not REPO_NAME.fullmatch(repo):
        raise SettingsError(f"{repo!r} is no name of a repository", hint="owner/name")


def hub() -> Any:
    """Return the client; its token is that of `hf auth login` or HF_TOKEN."""
    from huggingface_hub import HfApi

    return HfApi(library_name="afina")


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Raise what the Hub answers as `AdapterError`, with what to type."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # what HfHubHTTPError is: an error of the client's HTTP library, whichever it is, and OSError
    network: tuple[type[BaseException], ...] = HfHubHTTPError.__bases__
    hint: str | None
    try:
        yield
    except OfflineModeIsEnabled:
        raise AdapterError("the Hub is offline", where=repo, hint="HF_HUB_OFFLINE=0") from None
    except LocalTokenNotFoundError:
        hint = "hf auth login, or HF_TOKEN=..."
        raise AdapterError("the Hub needs a token", where=repo, hint=hint) from None
    except RevisionNotFoundError:
        raise AdapterError(
            "there is no such revision", where=repo, hint="--revision main"
        ) from None
    except (GatedRepoError, RepositoryNotFoundError):
        hint = "check the name; of a private one: hf auth login, or HF_TOKEN=..."
        raise AdapterError("no such repository on the Hub", where=repo, hint=hint) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        hint = "hf auth login, with a token that may write" if status in (401, 403) else None
        why = (str(error).splitlines() or [""])[0]
        raise AdapterError(f"the Hub answered {status}", where=repo, why=why, hint=hint) from None
    except network as error:
        why = f"{type(error).__name__}: {error}"
        raise AdapterError("the Hub cannot be reached", where=repo, why=why) from None
