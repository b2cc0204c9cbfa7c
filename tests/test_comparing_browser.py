"""The report of `afina compare` in a real browser: it opens, and the browser has nothing to complain of."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from afina.comparison.report import write_report

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
RESULTS = Path(__file__).parent.parent / "studies" / "results"


def as_made(file: Path) -> dict[str, Any]:
    """A kept result with what was too long to keep: curves, and an answer that tries to break out of its page."""
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    for own in found["methods"].values():
        own["curves"] = [[[1, 3.0, None], [4, 2.0, 2.5], [8, 1.0, 1.5]]] * found["schedule"][
            "seeds_done"
        ]
    evil = "</dd><script>console.error('out')</script><img src=x onerror=alert(1)>"
    found["examples"] = [
        {
            "prompt": evil,
            "expected": "á&b",
            "base": evil,
            "answers": dict.fromkeys(found["methods"], evil),
        }
    ]
    return found | {"folder": "runs/x"}


def opened(page: Path, width: int, picture: Path | None = None) -> tuple[str, str]:
    """(the page as the browser holds it, what it said while it opened it)."""
    assert CHROMIUM
    told = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--hide-scrollbars",
        f"--window-size={width},3000",
        f"--user-data-dir={page.parent / 'browser'}",
    ]
    told += [f"--screenshot={picture}"] if picture else ["--dump-dom"]
    done = subprocess.run([*told, page.as_uri()], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    return done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("lang", ["en", "es"])
def test_the_browser_has_no_complaint(lang: str, tmp_path: Path) -> None:
    found = as_made(RESULTS / "smoke.json")
    write_report(found, tmp_path, lang)
    held, said = opened(tmp_path / "report.html", 1200)
    assert "CONSOLE" not in said, said
    assert (
        held.count("<svg") >= 5
        and held.count("</figure>") == held.count("<figure>")
        and "<script" not in held
    )
    assert f'<html lang="{lang}"' in held
    assert set(found["methods"]) <= set(re.findall(r"<td>([^<]*)</td>", held))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_complaint_would_be_heard(tmp_path: Path) -> None:
    """The test above can fail: a page that breaks its own rules is told of."""
    page = tmp_path / "report.html"
    page.write_text("<!DOCTYPE html><script>console.error('out')</script><p>x</p>")
    assert "CONSOLE" in opened(page, 1200)[1]
