"""Every public function is called by the typed client, and the package says that it has types."""

import ast
from pathlib import Path

import afina

HERE = Path(__file__).parent


def test_client_calls_every_public_function() -> None:
    tree = ast.parse((HERE / "typed_client.py").read_text(encoding="utf-8"))
    called = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == "afina"
    }
    assert called >= set(afina.__all__) - {"__version__", "train_many"}
    assert (Path(afina.__file__).parent / "py.typed").is_file()
