"""Does any input crash, hang or mislead the file gate? Coverage-guided fuzzing (atheris), in chunks that add up.

    python benchmarks/audit/fuzz.py --folder FOLDER --cpu 180 [--publish]

FOLDER/corpus      inputs that reached something new; the next chunk goes on from them
FOLDER/found       inputs that broke a rule, one for each place in the code that broke; there should be none. `ended`: a chunk
                   whose process ended before its time, at an input that breaks nothing when it is given alone
FOLDER/chunks      a line a chunk: CPU seconds, cases

An input is one of: a header; a JSON object; a package (configuration, story, tensors) as bytes; a valid package with a few
changes. Broken is: any error but `AuditError`; more than a second of CPU; more memory than `LIMIT_MB`; and, for what is let
through, a header that safetensors' own parser reads otherwise, or a package whose hash differs from the one that is served.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
if "--child" in sys.argv:  # only what is imported under this can be followed
    import atheris

    with atheris.instrument_imports(include=["afina.audit"]):
        import afina.audit.file_gate  # noqa: F401
import common
import numpy as np
from packages import CONFIG_FILE, METADATA_FILE, WEIGHTS_FILE, write_base, write_valid

SECOND, LIMIT_MB = 1.0, 2048
TARGETS = {"cpu_s": (">=", 3600), "crashes": ("<=", 0), "hangs": ("<=", 0)}
KINDS = ("lora", "peft", "dora", "mora", "full", "alora")
ODD: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2**31,
    2**53 + 1,
    2**63,
    10**18,
    0.5,
    1e308,
    -0.0,
    "",
    "a",
    "../x",
    "(a+)+$",
    ".*" * 4,
    "é",
    "\x00",
    [],
    {},
    [[]],
    [None],
    {"a": 1},
    [0, 0],
    [1, 2**40],
    "F32",
    "F64",
    "BF16",
    "LORA",
    "AFINA_FULL",
]
KEYS = (
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "modules_to_save",
    "use_dora",
    "use_rslora",
    "peft_type",
    "bias",
    "auto_mapping",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "fan_in_fan_out",
    "spec",
    "base",
    "hash",
    "dtype",
    "shape",
    "data_offsets",
    "__metadata__",
    "format_version",
    "targets",
    "ranks",
    "options",
    "modules",
    "tokens",
)


class Slow(Exception):
    """A case took more CPU than it may."""


def parts_of(kind: str, folder: Path) -> list[bytes]:
    """Configuration, story (empty where there is none) and tensors of a valid package."""
    write_valid(folder / kind, kind)
    return [
        (folder / kind / name).read_bytes() if (folder / kind / name).exists() else b""
        for name in (CONFIG_FILE, METADATA_FILE, WEIGHTS_FILE)
    ]


def packed(parts: list[bytes]) -> bytes:
    """Three files as one input."""
    return struct.pack("<HH", len(parts[0]), len(parts[1])) + b"".join(parts)


def unpacked(raw: bytes) -> list[bytes]:
    """The three files of an input."""
    if len(raw) < 4:
        return [raw, b"", b""]
    one, two = struct.unpack("<HH", raw[:4])
    return [raw[4 : 4 + one], raw[4 + one : 4 + one + two], raw[4 + one + two :]]


def changed(chance: Any, parts: list[bytes]) -> list[bytes]:
    """A valid package with up to four changes, as the input's bytes choose."""
    parts = list(parts)
    for _ in range(chance.ConsumeIntInRange(1, 4)):
        which = chance.ConsumeIntInRange(0, 3)
        if which == 3:
            parts[2] = _bytes(chance, parts[2])
        elif which == 2:
            length = struct.unpack("<Q", parts[2][:8])[0] if len(parts[2]) >= 8 else 0
            header = _json(chance, parts[2][8 : 8 + length])
            parts[2] = struct.pack("<Q", len(header)) + header + parts[2][8 + length :]
        else:
            parts[which] = _json(chance, parts[which])
    return parts


def _json(chance: Any, raw: bytes) -> bytes:
    """A JSON text with one value, key or byte changed."""
    try:
        tree = json.loads(raw)
    except ValueError:
        return _bytes(chance, raw)
    how = chance.ConsumeIntInRange(0, 4)
    if how == 4 or not isinstance(tree, dict) or not tree:
        return _bytes(chance, raw)
    place = tree
    while True:  # walk down to some object or list
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = keys[chance.ConsumeIntInRange(0, len(keys) - 1)]
        if not isinstance(place[key], dict | list) or not place[key] or not chance.ConsumeBool():
            break
        place = place[key]
    value = ODD[chance.ConsumeIntInRange(0, len(ODD) - 1)]
    if how == 0 or not isinstance(place, dict):
        place[key] = value
    elif how == 1:
        del place[key]
    elif how == 2:
        place[KEYS[chance.ConsumeIntInRange(0, len(KEYS) - 1)]] = value
    else:
        place[chance.ConsumeUnicodeNoSurrogates(8)] = place.pop(key)
    return json.dumps(tree).encode()


def _bytes(chance: Any, raw: bytes) -> bytes:
    """Bytes set, cut, put in or doubled."""
    made = bytearray(raw)
    at, count = chance.ConsumeIntInRange(0, max(0, len(made) - 1)), chance.ConsumeIntInRange(1, 16)
    how = chance.ConsumeIntInRange(0, 3)
    if how == 0:
        made[at : at + count] = chance.ConsumeBytes(count)
    elif how == 1:
        del made[at : at + count]
    elif how == 2:
        made[at:at] = chance.ConsumeBytes(count)
    else:
        made[at:at] = made[at : at + count]
    return bytes(made)


class Target:
    """What is called with each input."""

    def __init__(self, folder: Path, place: Path) -> None:
        from afina.audit.base_files import BaseFiles

        self.found, self.place = folder / "found", place / "package"
        self.valid = [parts_of(kind, place / "valid") for kind in KINDS]
        write_base(place / "base")
        self.base = BaseFiles(place / "base")
        self.place.mkdir()

    def one(self, raw: bytes) -> None:
        """One case; what breaks is kept, and the next one follows."""
        from afina.errors import AuditError

        start = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, 10 * SECOND)
        try:
            self._look(raw)
        except AuditError:
            pass
        except (Exception, RecursionError, MemoryError) as error:
            self._keep(raw, error)
        signal.setitimer(signal.ITIMER_PROF, 0)
        if time.process_time() - start > SECOND:
            self._keep(raw, Slow(f"{time.process_time() - start:.1f} s"))

    def _keep(self, raw: bytes, error: BaseException) -> None:
        last = traceback.extract_tb(error.__traceback__)[-1:]
        where = (
            f"{type(error).__name__} {Path(last[0].filename).name}:{last[0].lineno}"
            if last
            else type(error).__name__
        )
        name = (
            ("hang" if isinstance(error, Slow) else "crash")
            + "-"
            + hashlib.sha256(where.encode()).hexdigest()[:12]
        )
        if not (self.found / name).exists():
            (self.found / name).write_bytes(raw)
            (self.found / f"{name}.txt").write_text("".join(traceback.format_exception(error)))

    def _look(self, raw: bytes) -> None:
        from afina.io.safetensors import parse_header
        from afina.io.strict_json import parse_object

        kind, rest = raw[0] % 4 if raw else 1, raw[1:]
        if kind == 0:
            data = rest[0] if rest else 0
            check_header(rest[1:], data, parse_header(rest[1:], data, 0, "f"))
        elif kind == 1:
            assert isinstance(parse_object(rest, "f"), dict)
        elif kind == 2:
            chance = atheris.FuzzedDataProvider(rest)
            self._package(
                changed(chance, self.valid[chance.ConsumeIntInRange(0, len(self.valid) - 1)])
            )
        else:
            self._package(unpacked(rest))

    def _package(self, parts: list[bytes]) -> None:
        from afina.audit.file_gate import check_files
        from afina.audit.report import Gate
        from afina.errors import AfinaError
        from afina.io.adapter_folder import AdapterFolder
        from afina.io.composition import hash_adapter_folder
        from afina.io.hashing import adapter_hash

        for name, content in zip((CONFIG_FILE, METADATA_FILE, WEIGHTS_FILE), parts, strict=True):
            if content:
                (self.place / name).write_bytes(content)
            else:
                (self.place / name).unlink(missing_ok=True)
        gate = Gate("files")
        package = check_files(self.place, self.base if len(parts[0]) % 2 else None, gate)
        if gate.blocked:
            return
        for entry in package.entries.values():
            assert np.isfinite(package.norms[entry.name])
        with contextlib.suppress(AfinaError):  # what no loader of ours reads is no danger
            assert adapter_hash(
                package.tensors, AdapterFolder.open(self.place).config().canonical()
            ) == hash_adapter_folder(self.place)


def check_header(raw: bytes, data: int, found: dict[str, Any]) -> None:
    """A header that was let through says what json and safetensors' own parser read in it."""
    from safetensors import SafetensorError, deserialize

    spans = [(entry.begin, entry.end) for entry in found.values()]
    assert (spans[0][0], spans[-1][1]) == (0, data)
    assert all(a[1] == b[0] for a, b in pairwise(spans))
    try:
        theirs = dict(deserialize(struct.pack("<Q", len(raw)) + raw + bytes(data)))
    except SafetensorError:
        return
    assert {name: (about["dtype"], tuple(about["shape"])) for name, about in theirs.items()} == {
        name: (entry.dtype, entry.shape) for name, entry in found.items()
    }


def child(folder: Path, seconds: int) -> None:
    """Fuzz for so many seconds of the clock; ends the process."""
    place = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))

    def slow(*_: object) -> None:
        raise Slow("more than ten seconds")

    signal.signal(signal.SIGPROF, slow)
    target = Target(folder, place)
    for number, parts in enumerate(target.valid):
        seeds = {
            f"package{number}": b"\x03" + packed(parts),
            f"object{number}": b"\x01" + parts[0],
            f"changed{number}": bytes([2, number]) * 24,
        }
        length = struct.unpack("<Q", parts[2][:8])[0]
        seeds[f"header{number}"] = (
            bytes([0, (len(parts[2]) - 8 - length) % 256]) + parts[2][8 : 8 + length]
        )
        for name, content in seeds.items():
            (folder / "corpus" / name).write_bytes(content)
    # -timeout would be of the clock, and this process may be stopped for minutes
    options = [
        f"-max_total_time={seconds}",
        "-timeout=86400",
        f"-rss_limit_mb={LIMIT_MB}",
        "-max_len=8192",
        "-print_final_stats=1",
        f"-artifact_prefix={folder / 'found'}/crash-",
        str(folder / "corpus"),
    ]
    atheris.Setup([sys.argv[0], *options], target.one)
    (folder / "place").write_text(str(place))
    atheris.Fuzz()


def breaks(file: Path) -> bool:
    """Whether an input breaks a rule, or the process, when it is given alone."""
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "found").mkdir()
        words = [sys.executable, __file__, "--folder", place, "--one", str(file), "--child"]
        return subprocess.run(words, capture_output=True).returncode != 0 or any(
            (Path(place) / "found").iterdir()
        )


def chunk(folder: Path, seconds: int) -> dict[str, Any]:
    """One chunk in a process of its own; returns what it did."""
    for name in ("corpus", "found"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    before, start = os.times(), time.time()
    done = subprocess.run(
        [sys.executable, __file__, "--folder", str(folder), "--cpu", str(seconds), "--child"],
        capture_output=True,
        text=True,
        errors="replace",
    )
    after = os.times()
    shutil.rmtree((folder / "place").read_text(), ignore_errors=True)
    stats = {
        line.split(":")[2]: int(line.split()[-1])
        for line in done.stderr.splitlines()
        if line.startswith("stat::")
    }
    if "number_of_executed_units" not in stats or done.returncode:
        left = [
            file
            for file in (folder / "found").glob("crash-crash-*")
            if file.stat().st_mtime >= start
        ]
        name = "crash" if not left or any(map(breaks, left)) else "ended"
        (folder / "found" / f"{name}-{int(time.time())}.txt").write_text(
            f"exit {done.returncode}\n{done.stdout[-20_000:]}\n{done.stderr[-20_000:]}"
        )
    cpu = (
        after.children_user + after.children_system - before.children_user - before.children_system
    )
    return {
        "cpu_s": round(cpu, 1),
        "cases": stats.get("number_of_executed_units", 0),
        "mb": stats.get("peak_rss_mb", 0),
    }


def main() -> None:
    """Run one chunk and tell where all of them have come to."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument(
        "--cpu", type=int, default=180, help="seconds of this chunk; 0: none, only tell"
    )
    parser.add_argument("--one", type=Path, help="with --child: only this input")
    parser.add_argument("--child", action="store_true")
    parser.add_argument("--publish", action="store_true")
    told = parser.parse_args()
    if told.one:
        Target(told.folder, told.folder).one(told.one.read_bytes())
        return
    if told.child:
        child(told.folder, told.cpu)
    ledger = told.folder / "chunks"
    if told.cpu:
        line = chunk(told.folder, told.cpu)
        with ledger.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
    chunks = [json.loads(text) for text in ledger.read_text().splitlines()]
    found = sorted(file.name for file in (told.folder / "found").glob("*.txt"))
    figures = {
        "cpu_s": sum(c["cpu_s"] for c in chunks),
        "cases": sum(c["cases"] for c in chunks),
        "crashes": sum(n.startswith("crash") for n in found),
        "hangs": sum(n.startswith("hang") for n in found),
        "ended": sum(n.startswith("ended") for n in found),
        "corpus": len(list((told.folder / "corpus").iterdir())),
        "peak_mb": max(c["mb"] for c in chunks),
    }
    if told.publish:
        common.publish(
            "audit_fuzz", figures, TARGETS, {"chunks": chunks, "found": found}, common.roofline()
        )
    else:
        print(json.dumps({"name": "audit_fuzz", "figures": figures, "targets": TARGETS}))


if __name__ == "__main__":
    main()
