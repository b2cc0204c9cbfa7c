"""The file gate: a valid adapter passes, and every malformed or malicious package is refused, with words, never a crash."""

import contextlib
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from afina.adapters.saving import save_adapter
from afina.audit.base_files import BaseFiles
from afina.audit.file_gate import check_files
from afina.audit.report import Gate, run_gate
from afina.errors import AdapterError
from afina.io.adapter_folder import CONFIG_FILE as CONFIG
from afina.io.adapter_folder import WEIGHTS_FILE as WEIGHTS
from afina.io.adapter_folder import AdapterFolder
from afina.io.adapter_metadata import METADATA_FILE as STORY
from afina.io.composition import hash_adapter_folder
from afina.io.hashing import adapter_hash
from afina.io.name_patterns import (
    MAX_WILD_PATTERNS,
    PatternTable,
    are_plain_patterns,
    is_plain_pattern,
)
from afina.io.safetensors import parse_header
from afina.io.strict_json import parse_object
from afina.models.loading import load_base
from helpers import ENVIRONMENT, put


@pytest.fixture(scope="session")
def original(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lora on the tiny base, as afina writes it."""
    base = load_base(str(tiny))
    folder = tmp_path_factory.mktemp("original") / "adapter"
    save_adapter(put(base, rank=4, alpha=8.0), base, folder)
    return folder


@pytest.fixture
def adapter(tmp_path: Path, original: Path) -> Path:
    """A copy of it, to be spoiled."""
    return Path(shutil.copytree(original, tmp_path / "adapter"))


def look(folder: Path, tiny: Path | None = None) -> Gate:
    gate = Gate("files")
    return run_gate(
        gate, lambda: check_files(folder, BaseFiles(tiny) if tiny else None, gate) and None
    )


def rules(gate: Gate) -> set[str]:
    return {finding.rule for finding in gate.findings if finding.level == "block"}


def change(file: Path, **values: Any) -> None:
    """Set keys of a JSON file; "a.b" reaches into an object."""
    content = json.loads(file.read_text())
    for key, value in values.items():
        *path, last = key.split("__")
        inner = content
        for part in path:
            inner = inner[part]
        inner[last] = value
    file.write_text(json.dumps(content))


def tensors(folder: Path, act: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Change the tensors of an adapter."""
    content = dict(load_file(folder / WEIGHTS))
    act(content)
    save_file(content, folder / WEIGHTS)


# ---- what is valid passes, and has its hash


@pytest.mark.parametrize("method", ["lora", "dora", "mora", "full"])
def test_our_own_adapters_pass_and_have_their_hash(
    method: str, tmp_path: Path, tiny: Path, base: Any
) -> None:
    save_adapter(
        put(base, method=method, target_modules=["q_proj", "down_proj"]), base, tmp_path / "a"
    )
    gate = Gate("files")
    package = check_files(tmp_path / "a", BaseFiles(tiny), gate)
    assert gate.findings == []
    assert adapter_hash(
        package.tensors_hash, AdapterFolder.open(tmp_path / "a").config().canonical()
    ) == hash_adapter_folder(tmp_path / "a")


def test_adapters_of_peft_pass(tmp_path: Path, tiny: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    kinds = [
        {},
        {"use_dora": True},
        {"use_rslora": True},
        {"target_modules": ["q_proj", "down_proj"]},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 4}},
        {"alora_invocation_tokens": [5, 6]},
    ]
    for number, own in enumerate(kinds):
        model = AutoModelForCausalLM.from_pretrained(tiny)
        config = peft.LoraConfig(
            **{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **own}
        )
        peft.get_peft_model(model, config).save_pretrained(tmp_path / str(number))
        assert look(tmp_path / str(number), tiny).findings == [], own


def test_neither_torch_nor_the_network_is_needed(adapter: Path, tiny: Path) -> None:
    code = (
        "import sys, socket; socket.socket = None\n"
        "from pathlib import Path\nfrom afina.audit.file_gate import check_files\nfrom afina.audit.base_files import BaseFiles\n"
        "from afina.audit.report import Gate\ngate = Gate('files')\n"
        f"check_files(Path({str(adapter)!r}), BaseFiles(Path({str(tiny)!r})), gate)\n"
        "assert not gate.findings and not {'torch', 'pickle5', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


# ---- folders and names

FOREIGN = [
    "adapter_model.bin",
    "training_args.bin",
    "model.pkl",
    "weights.pt",
    "x.npy",
    "x.h5",
    "run.py",
    "lib.so",
    "hook.sh",
    "chat_template.jinja",
    "template.jinja2",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "generation_config.json",
    "config.json",
    "model.onnx",
    "notes.txt",
    ".hidden",
    "adapter_model.safetensors.index.json",
    "Adapter_Config.json",
]


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_block(name: str, adapter: Path) -> None:
    (adapter / name).write_bytes(b"x")
    assert rules(look(adapter)) == {"foreign-file"}


def test_links_folders_and_special_files_block(adapter: Path, tmp_path: Path) -> None:
    weights = adapter / WEIGHTS
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    assert rules(look(adapter)) == {"link"}
    weights.unlink()
    os.link(tmp_path / "elsewhere", weights)
    assert rules(look(adapter)) == {"link"}
    weights.unlink()
    os.mkfifo(weights)  # must not wait for somebody to write into it
    assert rules(look(adapter)) == {"special-file"}
    weights.unlink()
    weights.mkdir()
    assert rules(look(adapter)) == {"folder"}
    weights.rmdir()
    assert rules(look(adapter)) == {"missing"}


def test_a_large_readme_blocks(adapter: Path) -> None:
    (adapter / "README.md").write_bytes(b" " * ((1 << 20) + 1))
    assert rules(look(adapter)) == {"size"}


# ---- configuration

CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"auto_mapping": {"parent_library": "os", "base_model_class": "system"}}, "config-dangerous"),
    ({"megatron_config": {"a": 1}}, "config-dangerous"),
    ({"megatron_core": "os"}, "config-dangerous"),
    ({"layer_replication": [[0, 4]]}, "config-dangerous"),
    ({"custom_loader": "x"}, "config-unknown"),
    ({"peft_type": "IA3"}, "config-type"),
    ({"peft_type": ["LORA"]}, "config-type"),
    ({"bias": "all"}, "config-unread"),
    ({"lora_bias": True}, "config-unread"),
    ({"target_parameters": ["x"]}, "gate-error"),
    ({"init_lora_weights": "pissa"}, "config-start"),
    ({"init_lora_weights": {"a": 1}}, "config-start"),
    ({"r": 0}, "config-value"),
    ({"r": "4"}, "config-value"),
    ({"r": True}, "config-value"),
    ({"lora_alpha": 0}, "config-value"),
    ({"lora_alpha": 1e999}, "gate-error"),
    ({"lora_dropout": 1.5}, "config-value"),
    ({"rank_pattern": [1]}, "config-value"),
    ({"rank_pattern": {"(a+)+": 4}}, "config-pattern"),
    ({"target_modules": "(a|a)*b"}, "config-pattern"),
    ({"target_modules": [{"a": 1}]}, "config-pattern"),
    ({"alora_invocation_tokens": [10**6]}, "config-invocation"),
    ({"alora_invocation_tokens": [-1]}, "config-invocation"),
    ({"alora_invocation_tokens": list(range(40))}, "config-invocation"),
    ({"alora_invocation_tokens": "abc"}, "config-invocation"),
]


@pytest.mark.parametrize(("values", "rule"), CONFIGS, ids=lambda value: str(value)[:40])
def test_configurations_that_block(
    values: dict[str, Any], rule: str, adapter: Path, tiny: Path
) -> None:
    change(adapter / CONFIG, **values)
    assert rule in rules(look(adapter, tiny))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b'{"r": 1, "r": 2}',
        b'{"r": NaN}',
        b"\xff{}",
        b"[" * 100_000,
        b'{"a":' * 40 + b"1" + b"}" * 40,
        b'{"a": 1' + b"0" * 5000 + b"}",
        b" " * ((1 << 20) + 1),
    ],
)
@pytest.mark.parametrize("name", [CONFIG, STORY])
def test_json_that_is_none(raw: bytes, name: str, adapter: Path) -> None:
    (adapter / name).write_bytes(raw)
    assert look(adapter).blocked


STORIES: list[tuple[dict[str, Any], str]] = [
    ({"spec__method": "dora"}, "story-differs"),
    ({"spec__rank": 8}, "story-differs"),
    ({"spec__alpha": 64.0}, "story-differs"),
    ({"spec__scaling": "rslora"}, "story-differs"),
    ({"spec__invocation": [5]}, "story-differs"),
    ({"spec__targets": "all"}, "story-value"),
    ({"spec": []}, "story-value"),
    ({"format_version": "1"}, "story-value"),
    ({"spec__ranks": {"model.layers.0.self_attn.q_proj": 2}}, "story-differs"),
    ({"spec__alphas": {"model.layers.0.self_attn.q_proj": 99.0}}, "story-differs"),
    ({"spec__new": 1}, "story-value"),
    ({"spec__options": {"restarts": [1]}}, "story-value"),
    ({"spec__alpha": -1.0}, "story-value"),
    ({"spec__invocation": ["a"]}, "story-value"),
    ({"spec__modules": "head"}, "story-value"),
    ({"hash": 7}, "story-value"),
    ({"base__hash": "00"}, "story-value"),
    ({"parents": [{"name": "a"}]}, "story-value"),
    ({"parents": {}}, "story-value"),
]


@pytest.mark.parametrize(("values", "rule"), STORIES, ids=lambda value: str(value)[:40])
def test_stories_that_tell_something_else(values: dict[str, Any], rule: str, adapter: Path) -> None:
    change(adapter / STORY, **values)
    assert rule in rules(look(adapter))


# ---- tensors

Q = "base_model.model.model.layers.0.self_attn.q_proj"


def _nan(t: dict[str, np.ndarray]) -> None:
    t[f"{Q}.lora_A.weight"][0, 0] = np.nan


def _infinite(t: dict[str, np.ndarray]) -> None:
    t[f"{Q}.lora_B.weight"][-1, -1] = -np.inf


def _huge(t: dict[str, np.ndarray]) -> None:
    t[f"{Q}.lora_B.weight"][0, 0] = 1e30


def _alone(t: dict[str, np.ndarray]) -> None:
    del t[f"{Q}.lora_B.weight"]


def _extra(t: dict[str, np.ndarray]) -> None:
    t["secret"] = np.zeros(3, np.float32)


def _head(t: dict[str, np.ndarray]) -> None:
    t["base_model.model.lm_head.weight"] = np.zeros((320, 48), np.float32)


def _twice(t: dict[str, np.ndarray]) -> None:
    t[f"{Q}.lora_A.weight".removeprefix("base_model.model.")] = t[f"{Q}.lora_A.weight"]


def _nowhere(t: dict[str, np.ndarray]) -> None:
    for part in ("lora_A", "lora_B"):
        t[f"base_model.model.model.layers.99.mlp.up_proj.{part}.weight"] = t[f"{Q}.{part}.weight"]


def _wide(t: dict[str, np.ndarray]) -> None:
    t[f"{Q}.lora_A.weight"] = np.zeros((4, 49), np.float32)


def _rank(t: dict[str, np.ndarray]) -> None:
    t[f"{Q}.lora_A.weight"], t[f"{Q}.lora_B.weight"] = (
        np.zeros((5, 48), np.float32),
        np.zeros((48, 5), np.float32),
    )


def _wrong_type(t: dict[str, np.ndarray]) -> None:
    t[f"{Q}.lora_A.weight"] = t[f"{Q}.lora_A.weight"].astype(np.float64)


@pytest.mark.parametrize(
    ("act", "rule"),
    [
        (_nan, "not-finite"),
        (_infinite, "not-finite"),
        (_huge, "too-large"),
        (_alone, "tensor-pair"),
        (_extra, "tensor-name"),
        (_head, "tensor-pair"),
        (_twice, "tensor-name"),
        (_nowhere, "base-layer"),
        (_wide, "base-shape"),
        (_rank, "rank"),
        (_wrong_type, "gate-error"),
    ],
)
def test_tensors_that_block(
    act: Callable[[dict[str, np.ndarray]], None], rule: str, adapter: Path, tiny: Path
) -> None:
    tensors(adapter, act)
    assert rule in rules(look(adapter, tiny))


# ---- the header of safetensors


def header(**entries: Any) -> bytes:
    return json.dumps(entries).encode()


def entry(
    begin: int, end: int, shape: list[Any] | None = None, dtype: Any = "F32"
) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": [(end - begin) // 4] if shape is None else shape,
        "data_offsets": [begin, end],
    }


def test_a_header_as_it_should_be() -> None:
    found = parse_header(
        header(b=entry(8, 16), a=entry(0, 8), __metadata__={"format": "pt"}), 16, 100, "f"
    )
    assert [(e.name, e.begin, e.end, e.shape) for e in found.values()] == [
        ("a", 100, 108, (2,)),
        ("b", 108, 116, (2,)),
    ]


BAD_HEADERS = {
    "overlap": header(a=entry(0, 8), b=entry(4, 12)),
    "hole": header(a=entry(0, 4), b=entry(8, 12)),
    "same bytes twice": header(a=entry(0, 12), b=entry(0, 12)),
    "too long": header(a=entry(0, 16)),
    "too short": header(a=entry(0, 8)),
    "negative": header(a=entry(-4, 12)),
    "backwards": header(a=entry(12, 0)),
    "shape does not fit": header(a=entry(0, 12, [4])),
    "shape overflows": header(a=entry(0, 12, [2**31, 2**31, 3])),
    "empty": header(a=entry(0, 12), b=entry(12, 12, [0])),
    "scalar": header(a=entry(0, 12, [])),
    "negative shape": header(a=entry(0, 12, [-1, -3])),
    "six dimensions": header(a=entry(0, 12, [3, 1, 1, 1, 1, 1])),
    "float": b'{"a": {"dtype": "F32", "shape": [3.0], "data_offsets": [0, 12]}}',
    "bool": header(a=entry(0, 12, [3, True])),
    "text": header(a=entry(0, 12, ["3"])),
    "exponent": b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12e0]}}',
    "unknown dtype": header(a=entry(0, 12, dtype="F8_E4M3")),
    "integers": header(a=entry(0, 12, dtype="I32")),
    "dtype is a list": header(a=entry(0, 12, dtype=["F32"])),
    "no dtype": header(a={"shape": [3], "data_offsets": [0, 12]}),
    "another key": header(a=entry(0, 12) | {"pickle": "x"}),
    "list": b"[1]",
    "not an object": header(a=[1]),
    "key twice": b'{"a": 1, "a": 2}',
    "leading blank": b" " + header(a=entry(0, 12)),
    "no UTF-8": b'{"\xff": 1}',
    "nothing": b"{}",
    "only metadata": header(__metadata__={"format": "pt"}),
    "metadata is a list": header(__metadata__=["x"], a=entry(0, 12)),
    "metadata of numbers": header(__metadata__={"x": 1}, a=entry(0, 12)),
    "large metadata": header(__metadata__={"x": "y" * 70_000}, a=entry(0, 12)),
    "empty name": header(**{"": entry(0, 12)}),
    "odd name": header(**{"a\n": entry(0, 12)}),
    "name of a path": header(**{"é": entry(0, 12)}),
    "long name": header(**{"a" * 600: entry(0, 12)}),
    "deep": b'{"a":' * 30_000,
    "many": header(**{str(i): {} for i in range(20_001)}),
    "three offsets": header(a={"dtype": "F32", "shape": [3], "data_offsets": [0, 4, 12]}),
    "large number": b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, '
    + b"9" * 30
    + b"]}}",
    "after the end": header(a=entry(0, 12)) + b"x",
}


@pytest.mark.parametrize("raw", BAD_HEADERS.values(), ids=BAD_HEADERS.keys())
def test_headers_that_are_refused(raw: bytes) -> None:
    with pytest.raises(AdapterError):
        parse_header(raw, 12, 0, "f")


@pytest.mark.parametrize(
    "act",
    [
        lambda raw: b"",
        lambda raw: raw[:7],
        lambda raw: raw[:-1],
        lambda raw: raw + b"\0",
        lambda raw: struct.pack("<Q", 2**63) + raw[8:],
        lambda raw: struct.pack("<Q", len(raw)) + raw[8:],
        lambda raw: struct.pack("<Q", 1) + raw[8:],
        lambda raw: struct.pack("<Q", 5 << 20) + b" " * (6 << 20),
        lambda raw: b"PK\x03\x04" + raw,
        lambda raw: b"\x80\x04" + raw,
    ],
)
def test_files_that_are_cut_or_lie_about_their_length(
    act: Callable[[bytes], bytes], adapter: Path
) -> None:
    (adapter / WEIGHTS).write_bytes(act((adapter / WEIGHTS).read_bytes()))
    assert look(adapter).blocked


GOOD = header(a=entry(0, 8, [1, 2]), b=entry(8, 12, [2, 1], "BF16"), __metadata__={"format": "pt"})


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(st.data())
def test_every_mutation_of_a_header_is_refused_or_means_the_same(data: st.DataObject) -> None:
    """Bytes changed, cut or doubled: an `AdapterError`, or else a header that json reads as it stands, all rules kept."""
    raw = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        how = data.draw(st.sampled_from(["set", "cut", "insert", "copy"]))
        if how == "set":
            raw[at] = data.draw(st.integers(0, 255))
        elif how == "cut":
            del raw[at : at + data.draw(st.integers(1, 9))]
        elif how == "insert":
            raw[at:at] = data.draw(st.binary(min_size=1, max_size=6))
        else:
            raw[at:at] = raw[at : at + data.draw(st.integers(1, 40))]
        if not raw:
            break
    try:
        found = parse_header(bytes(raw), 12, 0, "f")
    except AdapterError:
        return
    spans = sorted((e.begin, e.end) for e in found.values())
    assert spans[0][0] == 0 and spans[-1][1] == 12 and all(a[1] == b[0] for a, b in pairwise(spans))
    assert all(
        e.num_elements * {"F32": 4, "F16": 2, "BF16": 2}[e.dtype] == e.end - e.begin > 0
        for e in found.values()
    )
    assert {k for k in json.loads(bytes(raw)) if k != "__metadata__"} == set(found)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


@pytest.mark.slow
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    key=st.sampled_from(
        [
            "r",
            "lora_alpha",
            "rank_pattern",
            "alpha_pattern",
            "target_modules",
            "modules_to_save",
            "bias",
            "alora_invocation_tokens",
            "peft_type",
            "init_lora_weights",
            "trainable_token_indices",
            "new",
        ]
    ),
    value=JSON,
)
def test_no_configuration_breaks_the_gate(key: str, value: Any, adapter: Path) -> None:
    """Any value anywhere is let through or named; nothing is caught as a crash of the gate."""
    before = (adapter / CONFIG).read_text()
    change(adapter / CONFIG, **{key: value})
    gate = look(adapter)
    (adapter / CONFIG).write_text(before)
    assert not [f for f in gate.findings if "the gate broke" in f.text], (gate.findings, key, value)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_an_object_or_refused(raw: bytes) -> None:
    with contextlib.suppress(AdapterError):
        assert isinstance(parse_object(raw, "f"), dict)


@pytest.mark.parametrize(
    "text",
    [
        "q_proj",
        "model.layers.0.self_attn.q_proj",
        r"model\.layers\.0\.mlp",
        ".*_proj",
        r"^h\.\d+\.attn$",
        "all-linear",
    ],
)
def test_plain_patterns(text: str) -> None:
    assert is_plain_pattern(text)


def test_patterns_fit_as_peft_fits_them() -> None:
    import re

    told = {
        "q_proj": 1,
        r"layers\.1\.mlp\.up_proj": 2,
        r"layers\.\d+\.mlp\.up_proj": 3,
        "mlp.down_proj": 4,
        r"^model\.k_proj": 5,
        "up_proj": 6,
    }
    assert are_plain_patterns(told)
    patterns = PatternTable(told, "f", AdapterError)
    paths = [
        "q_proj",
        "a.q_proj",
        "a.xq_proj",
        "m.layers.1.mlp.up_proj",
        "m.layers.12.mlp.up_proj",
        "m.layers.x.mlp.up_proj",
        "mlpxdown_proj",
        "m.mlp.down_proj",
        "mlp.down_proj",
        "xmlp.down_proj",
        "m.mlp_down_proj",
        "model.k_proj",
        "a.model.k_proj",
        "up_proj.q_proj",
        "q_proj.b",
        "",
    ]
    for path in paths:
        theirs = next(
            (value for pattern, value in told.items() if re.match(rf"(.*\.)?({pattern})$", path)), 0
        )
        assert patterns.get(path, 0) == theirs, path


def test_patterns_that_would_take_for_ever_block(adapter: Path) -> None:
    endless = (r"\d+" * 20 + "b", ".*" * 3 + "b", r"\d+.*b")
    for text in endless:
        assert not are_plain_patterns({text: 4})
        change(adapter / CONFIG, rank_pattern={text: 4})
        assert "config-pattern" in rules(look(adapter))
    assert not is_plain_pattern(endless[0]) and not is_plain_pattern(endless[1])
    assert not are_plain_patterns({f".*{number}": 4 for number in range(MAX_WILD_PATTERNS + 1)})
    many = {rf"model\.layers\.{number}\.q_proj": 4 for number in range(5000)}
    assert (
        PatternTable(many, "f", AdapterError).get("model.layers.4999.q_proj", 8) == 4
    )  # looked up, not tried one by one


def test_a_profile_may_lie_beside_it_and_nothing_else_under_its_name(adapter: Path) -> None:
    save_file({"points": np.zeros((2, 2, 8), np.float32)}, adapter / "profile.safetensors")
    assert not look(adapter).blocked
    save_file({"points": np.zeros((2, 8), np.float32)}, adapter / "profile.safetensors")
    assert rules(look(adapter)) == {"profile"}
    (adapter / "profile.safetensors").write_bytes(b"pickle me")
    assert look(adapter).blocked
