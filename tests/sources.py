"""The source files of the package, read and parsed once for every test that looks at them."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "afina"

FILES = {
    ".".join(("afina", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in sorted(SOURCE.rglob("*.py"))
}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in FILES.items()}
TREES = {name: ast.parse(text) for name, text in TEXTS.items()}


@cache
def nodes(module: str) -> tuple[ast.AST, ...]:
    """Every node of a module's syntax tree."""
    return tuple(ast.walk(TREES[module]))


def package_of(module: str) -> str:
    """The package of "afina.training.setup.prepare" is "training"; that of "afina" is "afina"."""
    return module.removeprefix("afina.").partition(".")[0]
