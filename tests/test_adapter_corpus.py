"""One corpus of damaged adapters, through every entry point that reads an adapter: each is an error.

None is a traceback, none writes output, none takes long, and a good adapter still works afterwards.
"""

import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import afina
from afina.adapters.attach import detach
from afina.adapters.loading import load_adapter
from afina.adapters.saving import save_adapter
from afina.audit.audit import audit
from afina.engine.adapter_registry import AdapterRegistry
from afina.errors import AdapterError, AfinaError
from afina.io.adapter_folder import CONFIG_FILE, WEIGHTS_FILE
from afina.io.adapter_metadata import METADATA_FILE
from afina.models.causal_lm import CausalLM
from afina.models.loading import load_base
from helpers import put

SECONDS = 10.0  # of CPU per entry point; a case takes milliseconds


@pytest.fixture(scope="module")
def shared_base(tiny: Path) -> CausalLM:
    return load_base(str(tiny))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, shared_base: CausalLM) -> Path:
    """A LoRA of ours and the same one as PEFT has it, without afina.json."""
    folder = tmp_path_factory.mktemp("good")
    adapter = put(shared_base, rank=8, alpha=8.0)
    save_adapter(adapter, shared_base, folder / "afina")
    detach(shared_base.model, adapter)
    other = put(shared_base, rank=8, alpha=8.0, seed=9)
    save_adapter(other, shared_base, folder / "other")
    detach(shared_base.model, other)
    shutil.copytree(folder / "afina", folder / "peft")
    (folder / "peft" / METADATA_FILE).unlink()
    rows = [{"prompt": f"{n}+1?", "completion": str(n + 1)} for n in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def combine_it(folder: Path, good: Path, base: CausalLM, out: Path) -> None:
    afina.combine([f"{folder}:0.5", f"{good / 'other'}:0.5"], merge_method="svd", output_dir=out)


ENTRY_POINTS: dict[str, Callable[[Path, Path, CausalLM, Path], Any]] = {
    "load": lambda folder, good, base, out: load_adapter(folder, base, "damaged"),
    "serve": lambda folder, good, base, out: AdapterRegistry(base).add("damaged", folder),
    "combine": combine_it,
    "merge": lambda folder, good, base, out: afina.merge(folder, output_dir=out, dtype="float32"),
    "export peft": lambda folder, good, base, out: afina.export(folder, format="peft", output=out),
    "export gguf-lora": lambda folder, good, base, out: afina.export(
        folder, format="gguf-lora", output=out
    ),
    "show": lambda folder, good, base, out: afina.show(folder),
    "eval": lambda folder, good, base, out: afina.evaluate(
        folder, data=good / "rows.jsonl", max_new_tokens=2, limit=1
    ),
}


def change(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text())
    for key, value in values.items():
        *path, last = key.split("__")
        inner = content
        for part in path:
            inner = inner[part]
        inner[last] = value
    file.write_text(json.dumps(content))


def configure(**values: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder / CONFIG_FILE, **values)


def record(**values: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder / METADATA_FILE, **values)


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def without(key: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        content = json.loads((folder / CONFIG_FILE).read_text())
        del content[key]
        (folder / CONFIG_FILE).write_text(json.dumps(content))

    return act


def resize(num_bytes: int) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        file = folder / WEIGHTS_FILE
        os.truncate(file, file.stat().st_size + num_bytes)

    return act


def offsets(shift: int) -> Callable[[Path], None]:
    """Move the last tensor's offsets: by a negative number it overlaps, by a positive one it gapes."""

    def act(folder: Path) -> None:
        raw = (folder / WEIGHTS_FILE).read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + length])
        entries = [value for key, value in header.items() if key != "__metadata__"]
        last = max(entries, key=lambda entry: entry["data_offsets"][1])
        last["data_offsets"] = [at + shift for at in last["data_offsets"]]
        text = json.dumps(header).encode()
        data = raw[8 + length :]
        data = data[:shift] if shift < 0 else data + bytes(shift)
        (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(text)) + text + data)

    return act


def change_element(folder: Path) -> None:
    raw = bytearray((folder / WEIGHTS_FILE).read_bytes())
    raw[-2] ^= 0x10
    (folder / WEIGHTS_FILE).write_bytes(raw)


def other_shapes(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    wider = {
        name: tensor.repeat(1, 2) if "lora_A" in name else tensor
        for name, tensor in tensors.items()
    }
    save_file(wider, folder / WEIGHTS_FILE)
    change(folder / CONFIG_FILE, base_model_name_or_path=None)


def linked(folder: Path) -> None:
    (folder / WEIGHTS_FILE).rename(folder.parent / "elsewhere")
    (folder / WEIGHTS_FILE).symlink_to(folder.parent / "elsewhere")


DEEP = b'{"r": ' * 50_000 + b"1" + b"}" * 50_000
BACKTRACKING = "(([a-z_.0-9]+)+)+!"
BOTH: dict[str, Callable[[Path], None]] = {
    "cut by 1": resize(-1),
    "cut by 4,000": resize(-4_000),
    "cut by 20,000": resize(-20_000),
    "extended": resize(7),
    "empty": lambda folder: os.truncate(folder / WEIGHTS_FILE, 0),
    "overlap": offsets(-64),
    "hole": offsets(64),
    "header of 2^63 bytes": lambda folder: (
        (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", 2**63) + b"{}") and None
    ),
    "header nested deeply": lambda folder: (
        (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(DEEP)) + DEEP) and None
    ),
    "r is text": configure(r="8"),
    "r is null": configure(r=None),
    "r is 0": configure(r=0),
    "r is 1e9": configure(r=1e9),
    "r is NaN": configure(r=float("nan")),
    "r is true": configure(r=True),
    "alpha is NaN": configure(lora_alpha=float("nan")),
    "alpha is infinite": configure(lora_alpha=float("inf")),
    "alpha is 1e999": lambda folder: (
        (folder / CONFIG_FILE).write_text(
            (folder / CONFIG_FILE).read_text().replace('"lora_alpha": 8.0', '"lora_alpha": 1e999')
        )
        and None
    ),
    "dropout is a list": configure(lora_dropout=[0.1]),
    "unknown key": configure(scale_everything=2.0),
    "unknown type": configure(peft_type="IA3"),
    "deep nesting": write(CONFIG_FILE, DEEP),
    "no JSON": write(CONFIG_FILE, b'{"r": 8, '),
    "no object": write(CONFIG_FILE, b"[]"),
    "no UTF-8": write(CONFIG_FILE, b"\xff\xfe{}"),
    "token id below 0": configure(alora_invocation_tokens=[-1]),
    "token id of 2^40": configure(alora_invocation_tokens=[2**40]),
}
OURS: dict[str, Callable[[Path], None]] = {
    "an element changed": change_element,
    "wrong recorded hash": record(hash="0" * 64),
    "hash is a number": record(hash=7),
    "other base by hash": record(base__hash="0" * 64),
    "rank of 1e9": record(spec__rank=10**9),
    "rank of 2^19": record(spec__rank=2**19),
    "spec is a list": record(spec=[]),
    "alpha is text": record(spec__alpha="8"),
    "alpha is NaN in afina.json": record(spec__alpha=float("nan")),
    "newer format": record(format_version=99),
    "format is text": record(format_version="1"),
    "metadata nested deeply": write(METADATA_FILE, DEEP),
    "base is a list": record(base=[]),
}
PEFTS: dict[str, Callable[[Path], None]] = {
    "r is not that of the tensors": configure(r=4, rank_pattern={}),
    "backtracking rank pattern": configure(rank_pattern={BACKTRACKING: 4, "q_proj": 4}),
    "broken alpha pattern": configure(alpha_pattern={"(": 4}),
    "backreference": configure(alpha_pattern={r"(a)\1": 4}),
    "rank pattern is a list": configure(rank_pattern=[1]),
    "rank pattern of text": configure(rank_pattern={"q_proj": "4"}),
    "token id of 2^30": configure(trainable_token_indices=[2**30]),
    "initialization of the base": configure(init_lora_weights="pissa"),
}
CASES = {
    **{f"afina: {name}": ("afina", act) for name, act in {**BOTH, **OURS}.items()},
    **{f"peft: {name}": ("peft", act) for name, act in {**BOTH, **PEFTS}.items()},
}
# entry points that load the recorded base, or none, have no other base to compare with
NO_BASE = {
    "afina: other base by hash": {"export peft", "export gguf-lora", "show", "eval", "merge"},
    "peft: token id of 2^30": {"export peft"},
}
# `show` prints "changed" instead of an error
SHOWN = {"afina: an element changed", "afina: wrong recorded hash"}


@pytest.mark.parametrize("case", CASES)
def test_damaged_adapters_are_errors_everywhere(
    case: str, good: Path, tiny: Path, shared_base: CausalLM, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("AFINA_AUDITS", str(tmp_path / "audits"))
    writer, damage = CASES[case]
    folder = Path(shutil.copytree(good / writer, tmp_path / "damaged"))
    damage(folder)
    modules = list(shared_base.model.modules())
    for name, run in ENTRY_POINTS.items():
        if name in NO_BASE.get(case, ()) or (name == "show" and case in SHOWN):
            continue
        start = time.process_time()
        with pytest.raises(AfinaError) as caught:
            run(folder, good, shared_base, tmp_path / "out")
        assert isinstance(caught.value, AdapterError), (name, caught.value)
        assert caught.value.where, (name, caught.value)
        assert time.process_time() - start < SECONDS, name
        assert not (tmp_path / "out").exists(), name
        assert all(a is b for a, b in zip(shared_base.model.modules(), modules, strict=True)), name
    report = audit(folder, base=str(tiny), time_budget_seconds=0)
    assert report["verdict"] == "block", report["findings"]


def test_links_are_blocked_where_an_audit_is_required(
    good: Path, tiny: Path, tmp_path: Path, shared_base: CausalLM
) -> None:
    """Hub caches hold links, so they are read; the audit blocks them."""
    folder = Path(shutil.copytree(good / "peft", tmp_path / "damaged"))
    linked(folder)
    detach(shared_base.model, load_adapter(folder, shared_base, "linked"))
    assert audit(folder, base=str(tiny), time_budget_seconds=0)["verdict"] == "block"
    with pytest.raises(AfinaError):
        afina.merge(folder, output_dir=tmp_path / "out", require_audit=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("writer", ["afina", "peft"])
def test_other_shapes_are_an_error_before_any_sum(
    writer: str, good: Path, tmp_path: Path, shared_base: CausalLM
) -> None:
    folder = Path(shutil.copytree(good / "peft", tmp_path / "wider"))
    other_shapes(folder)
    for name in ("load", "serve", "combine"):
        with pytest.raises(AdapterError):
            ENTRY_POINTS[name](folder, good, shared_base, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_two_bases_by_name_are_both_named(
    good: Path, tmp_path: Path, shared_base: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder, source in zip(folders, ("afina", "other"), strict=True):
        shutil.copytree(good / source, folder)
        (folder / METADATA_FILE).unlink()
        change(folder / CONFIG_FILE, base_model_name_or_path=f"owner/base-{folder.name}")
    monkeypatch.setattr(shared_base, "name", "owner/base-one")
    detach(shared_base.model, load_adapter(folders[0], shared_base, "same"))
    for name in ("load", "serve"):
        with pytest.raises(AdapterError, match="owner/base-two.*owner/base-one"):
            ENTRY_POINTS[name](folders[1], good, shared_base, tmp_path / "out")
    with pytest.raises(AdapterError, match="different bases") as caught:
        afina.combine([f"{folder}:0.5" for folder in folders], output_dir=tmp_path / "out")
    assert "owner/base-one" in str(caught.value) and "owner/base-two" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_pefts_defaults_stand_for_missing_keys(
    good: Path, tmp_path: Path, shared_base: CausalLM
) -> None:
    folder = Path(shutil.copytree(good / "peft", tmp_path / "short"))
    for key in ("r", "lora_alpha", "lora_dropout", "rank_pattern", "bias"):
        without(key)(folder)
    adapter = load_adapter(folder, shared_base, "short")
    assert (adapter.config.rank, adapter.config.alpha) == (8, 8)
    detach(shared_base.model, adapter)


@pytest.mark.parametrize("writer", ["afina", "peft"])
def test_good_adapters_work_everywhere(
    writer: str, good: Path, shared_base: CausalLM, tmp_path: Path
) -> None:
    folder = good / writer
    detach(shared_base.model, load_adapter(folder, shared_base, "good"))
    assert AdapterRegistry(shared_base).add("good", folder).hash
    afina.export(folder, format="peft", output=tmp_path / "copy")
    afina.combine(
        [f"{folder}:0.5", f"{folder}:0.5"][:1], merge_method="svd", output_dir=tmp_path / "sum"
    )
    assert (tmp_path / "copy" / WEIGHTS_FILE).is_file()
    assert (tmp_path / "sum" / WEIGHTS_FILE).is_file()
