"""The packages and their graph: a module imports its own node of the graph and that node's ancestors."""

import ast
import re
from collections.abc import Iterator
from functools import cache

import pytest

from sources import FILES, ROOT, SOURCE, TREES, nodes

# node -> the nodes it may import from directly; their ancestors are allowed too. CONTRIBUTING.md
# shows the same graph. A node is a package, or a part of one where a single node would be a cycle.
GRAPH: dict[str, tuple[str, ...]] = {
    "errors": (),
    "settings": ("errors",),
    "io": ("errors",),
    "importing": ("settings", "io"),
    "kernels": ("errors",),
    "adapters.segments": ("errors",),
    "data": ("io",),
    "models": ("settings", "io", "kernels", "adapters.segments"),
    "adapters": ("models",),
    "engine": ("adapters", "data"),
    "evaluation.intervals": ("errors",),
    "evaluation.metrics": ("io",),
    "evaluation.confusion": ("io",),
    "objectives": ("engine", "evaluation.intervals", "evaluation.confusion", "evaluation.metrics"),
    "evaluation": ("objectives",),
    "merging": ("evaluation",),
    "audit": ("merging",),
    "hub": ("audit",),
    "training.setup": ("objectives",),
    "planning": ("training.setup",),
    "training": ("planning", "evaluation"),
    "comparison": ("training",),
    "server": ("training", "audit"),
    "demo": ("training", "audit"),
    "testing": ("training", "audit"),
    "cli": ("comparison", "server", "demo", "testing", "importing", "hub"),
}
NO_TORCH = ("errors", "settings", "io", "importing", "cli.main", "cli.command_table")
# imports that break the graph until their unification is finished: (module, imported); only shrinks
PENDING: set[tuple[str, str]] = {
    ("data.schemas.base", "settings.registry"),
}


def node_of(module: str) -> str | None:
    """The node of "afina.training.setup.prepare" is "training.setup"; the package itself has none."""
    parts = module.split(".")[1:]
    names = [".".join(parts[:length]) for length in (2, 1) if len(parts) >= length]
    return next((name for name in names if name in GRAPH), None)


@cache
def allowed(node: str) -> frozenset[str]:
    """The node and its ancestors."""
    return frozenset({node}).union(*(allowed(parent) for parent in GRAPH[node]))


def imports(module: str) -> Iterator[str]:
    """Every module of afina that `module` imports, also inside functions and under TYPE_CHECKING."""
    is_package = FILES[module].name == "__init__.py"
    package = module if is_package else module.rpartition(".")[0]
    for node in nodes(module):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "afina")
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            above = parts[: len(parts) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            if source.split(".")[0] == "afina":
                names = (f"{source}.{alias.name}" for alias in node.names)
                yield from (name if name in FILES else source for name in names)


def test_every_module_has_a_node_and_the_graph_has_no_cycle() -> None:
    without = {name for name in FILES if node_of(name) is None}
    assert without == {"afina", "afina.__main__"}
    done: set[str] = set()
    for node, parents in GRAPH.items():  # written from the ground up
        assert set(parents) <= done, node
        done.add(node)


def test_imports_go_one_way() -> None:
    found = {
        (module.removeprefix("afina."), other.removeprefix("afina."))
        for module in FILES
        if (node := node_of(module)) is not None
        for other in imports(module)
        if (target := node_of(other)) is not None and target not in allowed(node)
    }
    assert found - PENDING == set()
    assert PENDING - found == set(), "finished: remove from PENDING"


def test_the_package_itself_imports_nothing_at_once() -> None:
    at_once = [
        node for node in TREES["afina"].body if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    names = {getattr(node, "module", None) or node.names[0].name for node in at_once}
    assert names <= {"importlib", "os", "typing"}


def test_no_torch_where_help_is_fast() -> None:
    for module in TREES:
        if not module.removeprefix("afina.").startswith(NO_TORCH):
            continue
        for node in nodes(module):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            heavy = [
                n for n in names if n.startswith(("torch", "transformers", "safetensors.torch"))
            ]
            assert not heavy, f"{module} imports {heavy}"


@pytest.fixture(scope="module")
def contributing() -> str:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return text.partition("\n## Packages\n")[2].partition("\n## ")[0]


def test_contributing_lists_every_package(contributing: str) -> None:
    there = {path.stem for path in SOURCE.glob("*.py")} - {"__init__", "__main__"}
    there |= {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert set(re.findall(r"^\| `(\w+)` \|", contributing, re.MULTILINE)) == there


def test_contributing_shows_the_graph(contributing: str) -> None:
    shown = re.findall(r"^([\w.]+) +<- ?(.*)$", contributing, re.MULTILINE)
    assert {node: tuple(parents.split()) for node, parents in shown} == GRAPH
