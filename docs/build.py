"""The site: `make docs` puts the pages together, builds them in both languages, and looks for dead links.

    python docs/build.py          into build/site; open build/site/index.html, no server is needed

The guide lies in docs/guide/LANGUAGE, everything for engineers is in English and belongs to both halves. Zensical builds it:
it is made by the authors of Material for MkDocs, which ends in May 2027, as MkDocs itself has no releases since 2024. Nothing
is fetched, neither here nor by the reader's browser.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

HERE = Path(__file__).parent
ROOT = HERE.parent
SHARED = {  # pages of both halves: where a page of the guide finds them in the project, and what they are called in the site
    "../../serving.md": "serving.md",
    "../../security.md": "security.md",
    "../../parameters.md": "parameters.md",
    "../../../recipes/README.md": "recipes.md",
}


def assemble(language: str, folder: Path) -> None:
    """The pages and pictures of one language in one folder."""
    shutil.rmtree(folder, ignore_errors=True)
    source = HERE / "guide" / language
    shutil.copytree(source, folder)
    for page in folder.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        page.write_text(
            re.sub(r"(?<=\]\()[^)]+", lambda link: SHARED.get(link[0], link[0]), text),
            encoding="utf-8",
        )
    for path, name in SHARED.items():
        shutil.copy(source / path, folder / name)


class _Page(HTMLParser):
    """What a page names and what it points at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names, self.targets = set[str](), list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Ids and names, links and sources."""
        told = dict(attrs)
        self.names |= {told[key] or "" for key in ("id", "name") if key in told}
        self.targets += [told[key] or "" for key in ("href", "src") if told.get(key)]


def dead(site: Path) -> Iterator[str]:
    """Links of a built site that lead nowhere, and whatever a browser would fetch from elsewhere."""
    files = [file.resolve() for file in site.rglob("*.html") if file.name != "404.html"]
    pages = {file: _Page(file.read_text(encoding="utf-8")) for file in files}
    for file, page in pages.items():
        for target in page.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            there = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            there = there / "index.html" if there.is_dir() else there
            if not there.exists() or (
                parts.fragment
                and there in pages
                and unquote(parts.fragment) not in pages[there].names
            ):
                yield f"{file.relative_to(site.resolve())}: {target}"
        text = file.read_text(encoding="utf-8")
        fetched = re.findall(r'<(?:script|img|iframe)[^>]*\bsrc="((?:https?:)?//[^"]+)', text)
        fetched += re.findall(
            r'<link[^>]*\brel="(?:stylesheet|preconnect|preload)"[^>]*\bhref="((?:https?:)?//[^"]+)',
            text,
        )
        yield from (
            f"{file.relative_to(site.resolve())}: from elsewhere: {target}" for target in fetched
        )


def build(folder: Path) -> Path:
    """Both halves, built in `folder`; the site is in its `site`."""
    site = folder / "site"
    shutil.rmtree(site, ignore_errors=True)
    for language in ("en", "es"):
        assemble(language, folder / "docs" / language)
        settings = shutil.copy(
            HERE / f"{language}.toml", folder
        )  # all that it reads and writes has to be beside it
        subprocess.run(
            [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", str(settings)],
            check=True,
        )
    return site


if __name__ == "__main__":
    built = build(ROOT / "build")
    found = list(dead(built))
    print("\n".join(found) if found else f"no dead links: {built / 'index.html'}")
    sys.exit(bool(found))
