"""Published findings and study results that `afina advise` cites: findings.yaml, study.json.

Figures of published findings are copied from their source. study.json, written by
studies/study.py, records whether the same claim was true in the reference study on the small
embedded base; the published findings are about large models.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent


@cache
def load_findings() -> dict[str, Any]:
    """Return findings.yaml: sources and claims by finding, messages by key and language."""
    content: dict[str, Any] = yaml.safe_load((HERE / "findings.yaml").read_text(encoding="utf-8"))
    return content


def sources() -> dict[str, dict[str, str]]:
    """Return the published findings by name: {"source": authors, title and year, "link": URL}."""
    return dict(load_findings()["sources"])


def claims() -> dict[str, str]:
    """Return the claim of the reference study that repeats a finding, by message key."""
    return dict(load_findings()["claims"])


@cache
def messages(lang: str) -> dict[str, str]:
    """Return the sentences of an advice in a language ("en", "es") by key."""
    return {key: texts[lang] for key, texts in load_findings()["messages"].items()}


@cache
def studied() -> dict[str, dict[str, str]]:
    """Return the claims that the reference study has run: {claim: {"verdict", "figures"}}."""
    found: dict[str, dict[str, str]] = json.loads((HERE / "study.json").read_text(encoding="utf-8"))
    return found


def study_note(message: str, lang: str) -> str | None:
    """Return the reference study's result on a finding; None where it has none."""
    known = studied().get(claims().get(message, ""))
    if known is None:
        return None
    key = "study_" + known["verdict"].replace(" ", "_")
    return messages(lang)[key].format(figures=known["figures"])
