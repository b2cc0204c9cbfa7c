"""What the audit's benches count, in small: every bad package is blocked by a rule, every tampering is found."""

import importlib
import shutil
import sys
from pathlib import Path

import pytest

from afina.audit.base_files import BaseFiles
from afina.audit.provenance import sign

BENCHES = Path(__file__).parents[1] / "benchmarks"
sys.path[:0] = [str(BENCHES), str(BENCHES / "audit")]
file_gate, packages, tamper = map(importlib.import_module, ("file_gate", "packages", "tamper"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = packages.write_base(tmp_path_factory.mktemp("base") / "base")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_there_are_enough() -> None:
    assert len(file_gate.MALICE) >= 60


@pytest.mark.parametrize("name", file_gate.MALICE)
def test_a_bad_package_is_blocked(name: str, base: Path, tmp_path: Path) -> None:
    folder = packages.write_valid(tmp_path / "adapter")
    assert not file_gate.look(folder, BaseFiles(base)).findings
    file_gate.MALICE[name](folder)
    gate = file_gate.look(folder, BaseFiles(base))
    assert gate.blocked and not [
        finding for finding in gate.findings if "the gate broke" in finding.text
    ]
    assert not (tmp_path / file_gate.CANARY).exists()


@pytest.mark.parametrize("kind", ["lora", "peft", "dora", "mora", "full", "alora"])
def test_a_good_one_passes(kind: str, base: Path, tmp_path: Path) -> None:
    assert not file_gate.look(
        packages.write_valid(tmp_path / "a", kind, rank=3), BaseFiles(base)
    ).findings


@pytest.mark.slow
def test_tampering_is_found(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("model_signing")
    (tmp_path / "mine").mkdir()
    key = tamper.keys(tmp_path / "mine")
    assert {name for name, hit in tamper.others(tmp_path, key, base).items() if not hit} == set()
    folder = tamper.signable(tmp_path / "adapter", base)
    sign(folder, private_key=key[0], base=base)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    tried, found, missed = tamper.bytes_found(folder, key[1], base, 8)
    assert (tried, missed) == (8 * len(before), []) and found == tried
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    shutil.rmtree(folder)
