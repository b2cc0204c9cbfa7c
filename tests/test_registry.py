"""Names from this package and from installed ones: lazily loaded, never ambiguous, errors that help."""

import sys
from pathlib import Path

import pytest

from afina.errors import AdapterError, SettingsError
from afina.settings.registry import Registry

GROUP = "afina.tests"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that installs a package with one entry point in a temporary folder."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def put(package: str, name: str, code: str, target: str = ":Thing") -> str:
        (tmp_path / f"{package}.py").write_text(code)
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {package}{target}\n")
        monkeypatch.delitem(sys.modules, package, raising=False)
        return package

    return put


def test_registered_name_is_found_and_unknown_one_gives_the_nearest() -> None:
    registry: Registry[type] = Registry("method", GROUP, error=AdapterError)
    thing = registry.register("lora")(type("Thing", (), {}))
    assert registry.get("lora") is thing and registry.names() == ["lora"] and "lora" in registry
    with pytest.raises(AdapterError, match=r"unknown method 'lorra'[\s\S]*did you mean 'lora'"):
        registry.get("lorra")


def test_own_modules_are_imported_on_the_first_lookup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_methods.py").write_text("import sys\nsys.imported_once = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry: Registry[type] = Registry("method", GROUP, ["own_methods"])
    registry.register("lora")(int)
    assert "own_methods" not in sys.modules
    registry.names()
    assert sys.modules.pop("own_methods")


def test_entry_point_is_listed_without_its_code_and_loaded_when_used(install) -> None:
    install("plug_one", "vera", "class Thing: ...\n")
    registry: Registry[type] = Registry("method", GROUP)
    assert "vera" in registry and "plug_one" not in sys.modules
    assert registry.get("vera").__module__ == "plug_one"
    assert dict(registry.items()) == {"vera": registry.get("vera")}


def test_equal_names_are_an_error(install) -> None:
    registry: Registry[type] = Registry("method", GROUP)
    registry.register("lora")(int)
    registry.register("lora")(int)  # again, as after a reload
    with pytest.raises(SettingsError, match="registered twice"):
        registry.register("lora")(str)
    install("plug_two", "lora", "class Thing: ...\n")
    with pytest.raises(SettingsError, match=r"registered twice[\s\S]*plug_two"):
        registry.get("lora")


def test_two_packages_with_one_name_are_an_error(install) -> None:
    install("plug_a", "vera", "class Thing: ...\n")
    install("plug_b", "vera", "class Thing: ...\n")
    with pytest.raises(SettingsError, match=r"'vera' is registered twice[\s\S]*uninstall"):
        Registry("method", GROUP).names()


@pytest.mark.parametrize(
    ("code", "target", "message"),
    [
        ("1 / 0", ":Thing", r"cannot be loaded[\s\S]*ZeroDivisionError"),
        ("", "", "does not register the method 'vera'"),
    ],
)
def test_broken_package_breaks_its_own_name_alone(install, code, target, message) -> None:
    install("plug_broken", "vera", code, target)
    registry: Registry[type] = Registry("method", GROUP)
    registry.register("lora")(int)
    assert registry.get("lora") is int and registry.names() == ["lora", "vera"]
    with pytest.raises(SettingsError, match=message):
        registry.get("vera")
