"""The map of the house: a room imports only from itself and from the rooms above it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "afina"

# from the ground up, in the order of the story; CONTRIBUTING.md has the same list with a line on each
ROOMS = [
    "errors",
    "config",
    "disk",
    "admission",
    "segments",
    "route",
    "kernels",
    "base",
    "delta",
    "data",
    "objective",
    "engine",
    "judge",
    "combining",
    "training",
    "planning",
    "audit",
    "comparing",
    "demo",
    "server",
    "cli",
]


def room_of(module: str) -> str | None:
    """The room of "afina.adapters.lora" is "delta"; the package itself has none, and everybody may import it."""
    return module.split(".")[1] if "." in module else None


def imported(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import of afina's own modules, inside functions too; `package` is that of the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = (
                package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            )
            module = ".".join([*above, *([node.module] if node.module else [])])
            names = (
                [f"{module}.{alias.name}" for alias in node.names]
                if module == "afina"
                else [module]
            )
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == "afina")


def test_every_room_has_its_place() -> None:
    there = {path.stem for path in SOURCE.glob("*.py")} - {"__init__", "__main__"}
    there |= {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert there == set(ROOMS)


@pytest.mark.parametrize(
    "path", sorted(SOURCE.rglob("*.py")), ids=lambda path: path.relative_to(SOURCE).as_posix()
)
def test_nobody_imports_from_below(path: Path) -> None:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    if parts == ("__main__",):
        return  # the door: it opens cli and nothing else
    own = ROOMS.index(parts[0]) if parts[0] in ROOMS else -1  # the package itself imports no room
    allowed = {None, "__version__", *ROOMS[: own + 1]}
    package = ".".join(("afina", *parts[:-1]))
    tree = ast.parse(path.read_text(encoding="utf-8"))
    wrong = [
        f"{path}:{line}: {module}"
        for line, module in imported(tree, package)
        if room_of(module) not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_the_map_for_people_is_the_same() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.partition("## A map of the house")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == ROOMS
