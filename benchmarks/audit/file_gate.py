"""Does the file gate stop every bad package, let every good one pass, open nothing, and how fast is it?

    python benchmarks/audit/file_gate.py [--publish]

Bad: a valid adapter with one thing wrong or wicked in it (see MALICE). Good: 100 adapters, 40 of which PEFT has made on a small
random Llama. While the bad ones are looked at, Python's own audit events are watched: pickle, marshal, code made or run,
imports, processes, sockets, libraries loaded, files opened that are no part of an adapter. Pickles in them would write a file.
"""

import argparse
import json
import os
import shutil
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import common
import numpy as np
from packages import CONFIG_FILE, METADATA_FILE, PREFIX, WEIGHTS_FILE, write_base, write_valid
from safetensors.numpy import load_file, save_file

from afina.audit.base_files import BaseFiles
from afina.audit.file_gate import ALLOWED_FILES, check_files
from afina.audit.report import Gate, run_gate

Act = Callable[[Path], Any]
Q = f"{PREFIX}model.layers.0.self_attn.q_proj"
TARGETS = {
    "bad": (">=", 60),
    "blocked": (">=", 1.0),
    "deserialised": ("<=", 0),
    "good": (">=", 100),
    "passed": (">=", 1.0),
    "ms_per_10_mb": ("<=", 50),
}
FORBIDDEN = (
    "pickle.",
    "marshal.",
    "exec",
    "compile",
    "import",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.",
    "socket.",
    "ctypes.",
)
CANARY = "canary"


def pickled(place: Path) -> bytes:
    """A pickle that would write a file."""
    return f"cos\nsystem\n(S'touch {place / CANARY}'\ntR.".encode()


def config(**values: Any) -> Act:
    """Set keys of the configuration."""
    return lambda f: (f / CONFIG_FILE).write_text(
        json.dumps(json.loads((f / CONFIG_FILE).read_text()) | values)
    )


def story(*path: str, value: Any) -> Act:
    """Set one value of afina.json."""

    def act(folder: Path) -> None:
        tree = json.loads((folder / METADATA_FILE).read_text())
        inner = tree
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        (folder / METADATA_FILE).write_text(json.dumps(tree))

    return act


def tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Act:
    """Change the tensors, as the format allows."""

    def act(folder: Path) -> None:
        content = dict(load_file(folder / WEIGHTS_FILE))
        change(content)
        save_file(content, folder / WEIGHTS_FILE)

    return act


def header(change: Callable[[dict[str, Any]], Any]) -> Act:
    """Change the header, as the format does not allow; its length is told rightly."""

    def act(folder: Path) -> None:
        raw = (folder / WEIGHTS_FILE).read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        tree = json.loads(raw[8 : 8 + length])
        text = change(tree)
        made = text if isinstance(text, bytes) else json.dumps(tree).encode()
        (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(made)) + made + raw[8 + length :])

    return act


def raw(name: str, change: Callable[[bytes], bytes]) -> Act:
    """Change the bytes of a file."""
    return lambda f: (f / name).write_bytes(change((f / name).read_bytes()))


def beside(name: str, content: bytes | None = None) -> Act:
    """Put a file there, a pickle unless it is said."""
    return lambda f: (f / name).write_bytes(pickled(f.parent) if content is None else content)


def link(name: str, hard: bool = False) -> Act:
    """Let a name point outside."""

    def act(folder: Path) -> None:
        (folder / name).rename(folder.parent / "elsewhere")
        (os.link if hard else os.symlink)(folder.parent / "elsewhere", folder / name)

    return act


def entry(**values: Any) -> Callable[[dict[str, Any]], Any]:
    """Change what the header says about one tensor."""
    return lambda tree: tree[f"{Q}.lora_A.weight"].update(values)


def special(folder: Path) -> None:
    """A pipe in the place of the weights: whoever opens it waits for ever."""
    (folder / WEIGHTS_FILE).unlink()
    os.mkfifo(folder / WEIGHTS_FILE)


def only_pickle(folder: Path) -> None:
    """What PEFT would fall back to."""
    (folder / WEIGHTS_FILE).unlink()
    (folder / "adapter_model.bin").write_bytes(pickled(folder.parent))


MALICE: dict[str, Act] = {
    # files that run code, or take the place of the base's
    **{
        f"file {name}": beside(name)
        for name in (
            "adapter_model.bin",
            "training_args.bin",
            "optimizer.pt",
            "model.pkl",
            "x.joblib",
            "x.npy",
            "x.npz",
            "x.h5",
            "x.onnx",
            "x.dill",
            "modeling.py",
            "setup.py",
            "lib.so",
            "hook.sh",
            "__init__.pyc",
            "chat_template.jinja",
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "generation_config.json",
            "config.json",
            "preprocessor_config.json",
            "vocab.json",
            ".hidden",
            "adapter_model.safetensors.index.json",
            "Adapter_Config.json",
        )
    },
    "only a pickle": only_pickle,
    "pickle named safetensors": beside(WEIGHTS_FILE),
    "zip named safetensors": raw(WEIGHTS_FILE, lambda b: b"PK\x03\x04" + b),
    "pickle before it": raw(WEIGHTS_FILE, lambda b: b"\x80\x04" + b),
    "pickle behind it": raw(WEIGHTS_FILE, lambda b: b + b"cos\nsystem\n."),
    "link to the weights": link(WEIGHTS_FILE),
    "link to the story": link(METADATA_FILE),
    "hard link": link(WEIGHTS_FILE, True),
    "pipe": special,
    "folder in it": lambda f: (f / "sub").mkdir(),
    "large readme": beside("README.md", b" " * ((1 << 20) + 1)),
    # configuration
    "auto_mapping": config(auto_mapping={"parent_library": "os", "base_model_class": "system"}),
    "megatron_core": config(megatron_core="os"),
    "megatron_config": config(megatron_config={"a": 1}),
    "layer_replication": config(layer_replication=[[0, 9]]),
    "unknown key": config(custom_loader="evil.py"),
    "type": config(peft_type="IA3"),
    "type is a list": config(peft_type=["LORA"]),
    "trained biases": config(bias="all"),
    "target_parameters": config(target_parameters=["x"]),
    "start that changes the base": config(init_lora_weights="pissa"),
    "rank 0": config(r=0),
    "rank as text": config(r="2"),
    "rank too large for its tensors": config(r=3),
    "alpha below 0": config(lora_alpha=-4),
    "alpha of 1e999": raw(
        CONFIG_FILE, lambda b: b.replace(b'"lora_alpha": 4', b'"lora_alpha": 1e999')
    ),
    "exploding pattern": config(target_modules="(a|a)*b"),
    "exploding rank pattern": config(rank_pattern={"(a+)+": 2}),
    "twenty repetitions": config(rank_pattern={r"\d+" * 20 + "b": 2}),
    "invocation beyond the vocabulary": config(alora_invocation_tokens=[10**6]),
    "endless invocation": config(alora_invocation_tokens=[1] * 99),
    "no JSON": raw(CONFIG_FILE, lambda b: b[:-1]),
    "key twice": raw(CONFIG_FILE, lambda b: b.replace(b"{", b'{"r": 2, "r": 3, ', 1)),
    "NaN": raw(CONFIG_FILE, lambda b: b.replace(b"0.0", b"NaN")),
    "deep": raw(CONFIG_FILE, lambda b: b'{"a":' * 500 + b"1" + b"}" * 500),
    "100,000 brackets": raw(CONFIG_FILE, lambda b: b"[" * 100_000),
    "long number": raw(CONFIG_FILE, lambda b: b'{"r": ' + b"9" * 5000 + b"}"),
    "config of 2 MB": raw(CONFIG_FILE, lambda b: b + b" " * (2 << 20)),
    "no config": lambda f: (f / CONFIG_FILE).unlink(),
    # afina.json that says something else
    "another method": story("spec", "method", value="dora"),
    "another rank": story("spec", "rank", value=1),
    "another strength": story("spec", "alpha", value=400.0),
    "another strength in one layer": story(
        "spec", "alphas", value={"model.layers.0.self_attn.q_proj": 99.0}
    ),
    "another scaling": story("spec", "scaling", value="rslora"),
    "another invocation": story("spec", "invocation", value=[5]),
    "unknown key in the spec": story("spec", "loader", value="x"),
    "option that is a list": story("spec", "options", value={"restarts": [1]}),
    "hash that is no text": story("hash", value=1),
    "parents that are none": story("parents", value="a"),
    "version as text": story("format_version", value="1"),
    # the header
    "overlap": header(entry(data_offsets=[0, 64])),
    "offsets backwards": header(entry(data_offsets=[64, 0])),
    "negative offset": header(entry(data_offsets=[-64, 0])),
    "offset of 2^63": header(entry(data_offsets=[2**63, 2**63 + 64])),
    "shape of 2^62": header(entry(shape=[2**31, 2**31])),
    "empty tensor": header(entry(shape=[0, 8])),
    "shape with a fraction": header(entry(shape=[2.0, 8])),
    "shape as text": header(entry(shape=["2", 8])),
    "unknown dtype": header(entry(dtype="F8_E4M3")),
    "dtype is a list": header(entry(dtype=["F32"])),
    "another key in it": header(entry(pickle="x")),
    "same bytes twice": header(lambda t: t.update(x=t[f"{Q}.lora_A.weight"])),
    "metadata of lists": header(lambda t: t.update(__metadata__={"a": [1]})),
    "metadata of 1 MB": header(lambda t: t.update(__metadata__={"a": "b" * (1 << 20)})),
    "20,001 tensors": header(
        lambda t: t.update(
            {str(i): {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for i in range(20_001)}
        )
    ),
    "header is a list": header(lambda t: b"[1]"),
    "header is empty": header(lambda t: b"{}"),
    "header in UTF-16": header(lambda t: json.dumps(t).encode("utf-16")),
    "header with a key twice": header(
        lambda t: json.dumps(t).encode().replace(b"{", b'{"a": 1, "a": 2, ', 1)
    ),
    "blank before it": header(lambda t: b" " + json.dumps(t).encode()),
    "length of 2^63": raw(WEIGHTS_FILE, lambda b: struct.pack("<Q", 2**63) + b[8:]),
    "length of 1": raw(WEIGHTS_FILE, lambda b: struct.pack("<Q", 1) + b[8:]),
    "header of 5 MB": raw(WEIGHTS_FILE, lambda b: struct.pack("<Q", 5 << 20) + b" " * (6 << 20)),
    "cut short": raw(WEIGHTS_FILE, lambda b: b[:-1]),
    "empty file": raw(WEIGHTS_FILE, lambda b: b""),
    # tensors
    "NaN in a tensor": tensors(lambda t: t[f"{Q}.lora_A.weight"].__setitem__((0, 0), np.nan)),
    "infinity": tensors(lambda t: t[f"{Q}.lora_B.weight"].__setitem__((-1, -1), -np.inf)),
    "a number of 1e30": tensors(lambda t: t[f"{Q}.lora_B.weight"].__setitem__((0, 0), 1e30)),
    "half a pair": tensors(lambda t: t.pop(f"{Q}.lora_B.weight")),
    "a tensor besides": tensors(lambda t: t.update(secret=np.zeros(3, np.float32))),
    "an output layer": tensors(
        lambda t: t.update({f"{PREFIX}lm_head.weight": np.zeros((40, 8), np.float32)})
    ),
    "a layer that the base has not": tensors(
        lambda t: t.update(
            {f"{Q.replace('.0.', '.9.')}.lora_{s}.weight": t[f"{Q}.lora_{s}.weight"] for s in "AB"}
        )
    ),
    "a shape of another base": tensors(
        lambda t: t.update({f"{Q}.lora_A.weight": np.zeros((2, 9), np.float32)})
    ),
    "the same tensor by two names": tensors(
        lambda t: t.update({f"{Q}.lora_A.weight".removeprefix(PREFIX): t[f"{Q}.lora_A.weight"]})
    ),
    "a name that is a path": tensors(
        lambda t: t.update({"../../etc/passwd": np.zeros(3, np.float32)})
    ),
    "numbers of 64 bits": tensors(
        lambda t: t.update({k: v.astype(np.float64) for k, v in t.items()})
    ),
    "whole numbers": tensors(lambda t: t.update({k: v.astype(np.int32) for k, v in t.items()})),
}


def look(folder: Path, base: BaseFiles | None) -> Gate:
    """The gate, as the audit runs it."""
    gate = Gate("files")
    return run_gate(gate, lambda: check_files(folder, base, gate) and None)


def bad(place: Path, base: BaseFiles) -> tuple[list[str], list[str], float]:
    """(what was let through, what was opened or run that must not be, the slowest seconds)."""
    seen: list[str] = []
    watching, slowest = False, 0.0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event.startswith(FORBIDDEN):
            seen.append(f"{event} {str(arguments)[:80]}")
        elif (
            watching
            and event == "open"
            and not isinstance(arguments[0], int)
            and Path(os.fsdecode(arguments[0])).name not in (*ALLOWED_FILES, "model.safetensors")
        ):
            seen.append(f"open {arguments[0]}")

    look(write_valid(place / "first"), base)  # all imports are done
    sys.addaudithook(hook)
    passed = []
    for number, (name, act) in enumerate(MALICE.items()):
        folder = write_valid(place / str(number) / "adapter")
        assert not look(folder, base).findings, name
        act(folder)
        watching = True
        gate = look(folder, base)
        watching = False
        slowest = max(slowest, gate.seconds)
        broke = [finding.text for finding in gate.findings if "the gate broke" in finding.text]
        if not gate.blocked or broke:
            passed.append(f"{name} {broke}")
        if (folder.parent / CANARY).exists():
            seen.append(f"{name}: its payload ran")
    return passed, seen, slowest


def good(place: Path, base: BaseFiles) -> tuple[int, int, list[str]]:
    """(adapters, those that PEFT made, what was not let through)."""
    refused = []
    kinds = ("lora", "peft", "dora", "mora", "full", "alora")
    for number in range(60):
        kind, rank = kinds[number % len(kinds)], 1 + number % 4
        folder = write_valid(
            place / f"ours-{number}",
            kind,
            rank,
            number,
            np.float16 if number % 7 == 3 else np.float32,
        )
        refused += [
            f"{kind} of rank {rank}: {f.text}"
            for f in look(folder, base).findings
            if f.level == "block"
        ]
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    LlamaForCausalLM(shape).save_pretrained(place / "llama")
    llama = BaseFiles(place / "llama")
    own: list[dict[str, Any]] = [
        {},
        {"use_dora": True},
        {"use_rslora": True},
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": r".*self_attn\.q_proj"},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 4}},
        {"alora_invocation_tokens": [5, 6]},
        {"init_lora_weights": "gaussian"},
        {"layers_to_transform": [1], "target_modules": ["q_proj"]},
        {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
    ]
    for number in range(40):
        told = {
            "r": (2, 4, 8, 16)[number % 4],
            "target_modules": "all-linear",
            "task_type": "CAUSAL_LM",
            **own[number % len(own)],
        }
        model = peft.get_peft_model(LlamaForCausalLM(shape), peft.LoraConfig(**told))
        model.save_pretrained(str(place / f"peft-{number}"))
        found = look(place / f"peft-{number}", llama).findings
        refused += [
            f"PEFT's {told}: {finding.text}" for finding in found if finding.level == "block"
        ]
    return 100, 40, refused


def speed(place: Path) -> dict[str, float]:
    """Milliseconds for each 10 MB of a 7B model's lora in float32 and in bfloat16, median of 7; and for a small one."""
    times = {}
    for name, kind in (("float32", "F32"), ("bfloat16", "BF16")):
        folder = write_large(place / name, kind)
        size = (folder / WEIGHTS_FILE).stat().st_size / 1e7
        taken = []
        for _ in range(7):
            start = time.perf_counter()
            assert not look(folder, None).findings
            taken.append(1e3 * (time.perf_counter() - start) / size)
        times[name] = statistics.median(taken)
    small = [look(place / "first", None).seconds for _ in range(20)]
    return {
        "ms_per_10_mb": max(times.values()),
        "ms_per_10_mb_float32": times["float32"],
        "ms_small": 1e3 * statistics.median(small),
    }


def write_large(
    folder: Path, dtype: str, rank: int = 32, blocks: int = 32, width: int = 4096
) -> Path:
    """A lora on q and v of a 7B model, of random numbers: 67 MB in float32."""
    folder.mkdir(parents=True)
    numbers = (0.01 * np.random.default_rng(0).standard_normal(rank * width)).astype(np.float32)
    data = (
        numbers.tobytes()
        if dtype == "F32"
        else (numbers.view(np.uint32) >> 16).astype("<u2").tobytes()
    )
    told, at = {}, 0
    for block in range(blocks):
        for layer in ("q_proj", "v_proj"):
            for side, shape in (("A", [rank, width]), ("B", [width, rank])):
                name = f"{PREFIX}model.layers.{block}.self_attn.{layer}.lora_{side}.weight"
                told[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
                at += len(data)
    text = json.dumps(told).encode()
    with (folder / WEIGHTS_FILE).open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for _ in told:
            stream.write(data)
    values = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": ["q_proj", "v_proj"],
    }
    (folder / CONFIG_FILE).write_text(json.dumps(values))
    return folder


def main() -> None:
    """Look at all of them, print what was missed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--publish", action="store_true")
    told = parser.parse_args()
    place = Path(tempfile.mkdtemp())
    try:
        base = BaseFiles(write_base(place / "base"))
        passed, opened, slowest = bad(place / "bad", base)
        count, by_peft, refused = good(place / "good", base)
        times = speed(place / "bad")
    finally:
        shutil.rmtree(place)
    print("let through:", passed, "\nopened or run:", opened, "\nrefused:", refused)
    figures = {
        "bad": len(MALICE),
        "blocked": 1 - len(passed) / len(MALICE),
        "deserialised": len(opened),
        "slowest_ms": 1e3 * slowest,
        "good": count,
        "by_peft": by_peft,
        "passed": 1 - len(refused) / count,
        **times,
    }
    if told.publish:
        common.publish(
            "audit_file_gate",
            figures,
            TARGETS,
            {"let_through": passed, "opened": opened, "refused": refused},
            common.roofline(),
        )
    else:
        print(json.dumps({"name": "audit_file_gate", "figures": figures, "targets": TARGETS}))


if __name__ == "__main__":
    main()
