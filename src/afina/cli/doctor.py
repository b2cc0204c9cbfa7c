"""`afina doctor`: what this machine has, what is missing, and what to type."""

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

import afina
from afina.io.extras import EXTRAS
from afina.io.result import Content, Result, ResultTable, ResultText, format_bytes
from afina.kernels.dispatch import kernels
from afina.kernels.skinny_gemm import skinny_linear
from afina.models.dtype import machine_memory
from afina.planning.machine_rates import cache_file
from afina.settings import DoctorSettings

# Names in /proc/cpuinfo of the instructions that the kernels and PyTorch use.
CPU_FLAGS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 bf16",
    "amx_bf16": "AMX bf16",
    "asimd": "NEON",
    "bf16": "bf16",
    "sve": "SVE",
}
MIN_FREE_BYTES = 2e9  # a base of a billion parameters in bfloat16
KERNEL_TOLERANCE = 1e-4  # relative difference to PyTorch, float32
OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")

Status = Literal["ok", "optional", "problem"]


@dataclass(frozen=True)
class Check:
    """One fact about the machine; `hint` is what to type where something is missing."""

    name: str
    status: Status
    value: str
    hint: str | None = None


@dataclass(frozen=True, eq=False)
class DoctorResult(Result):
    """Facts about the machine and the extras of afina; `exit_status` is 1 where there is a problem.

    Attributes:
        checks: Facts, each with name, status (ok or problem), value and hint.
        extras: The same for each extra; a missing one is optional.
    """

    checks: Sequence[dict[str, Any]]
    extras: Sequence[dict[str, Any]]
    exit_status: int

    def content(self) -> list[Content]:
        """Return the facts, the extras, and a line with what to type for each problem."""
        machine = [(one["name"], one["value"]) for one in self.checks]
        extras = [(one["name"], one["value"], one["hint"] or "installed") for one in self.extras]
        problems = [one for one in self.checks if one["status"] == "problem"]
        lines = [f"problem: {one['name']}: {one['value']}; {one['hint']}" for one in problems]
        return [
            ResultTable("this machine", machine),
            ResultTable("extras", extras, ("extra", "what it adds", "to install")),
            *map(ResultText, lines or ["no problems"]),
        ]


def doctor(settings: DoctorSettings) -> DoctorResult:
    """Return what this machine has; nothing is downloaded, and no folder is created."""
    checks = [*_versions(), *_processor(), *_devices(), _kernels(), *_folders(settings), _offline()]
    extras = [
        Check(
            name,
            "optional" if extra.missing else "ok",
            extra.adds,
            f"pip install 'afina[{name}]'" if extra.missing else None,
        )
        for name, extra in EXTRAS.items()
    ]
    status = int(any(check.status == "problem" for check in checks))
    return DoctorResult([asdict(check) for check in checks], [asdict(e) for e in extras], status)


def _versions() -> Iterator[Check]:
    python = f"{platform.python_version()} ({sys.executable})"
    yield Check("afina", "ok", f"{afina.__version__}, Python {python}")
    build = torch.version.cuda and f"CUDA {torch.version.cuda}"
    yield Check("torch", "ok", f"{torch.__version__} ({build or 'without CUDA'})")
    yield Check("transformers", "ok", transformers.__version__)


def _processor() -> Iterator[Check]:
    name, flags = _cpu()
    known = [label for flag, label in CPU_FLAGS.items() if flag in flags]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Check("CPU", "ok", f"{name}, {cores} cores, {torch.get_num_threads()} threads of torch")
    yield Check("instructions", "ok", ", ".join(known) or "none of those known")
    memory = machine_memory()
    yield Check("memory", "ok", "unknown" if memory is None else format_bytes(memory))


def _cpu() -> tuple[str, set[str]]:
    """Return name and flags of the CPU, from /proc/cpuinfo where there is one."""
    file = Path("/proc/cpuinfo")
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    pairs = (line.partition(":") for line in text.splitlines())
    facts = {name.strip().lower(): value.strip() for name, _, value in pairs}
    flags = set((facts.get("flags") or facts.get("features") or "").split())
    return facts.get("model name") or platform.processor() or platform.machine(), flags


def _devices() -> Iterator[Check]:
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(number)
            yield Check(f"GPU {number}", "ok", f"{card.name}, {format_bytes(card.total_memory)}")
    elif torch.backends.mps.is_available():
        yield Check("GPU", "ok", "Apple (mps)")
    else:
        yield Check("GPU", "ok", "none that torch can use: --device cpu")


def _kernels() -> Check:
    """Check that the C++ kernels are there, and that one of them computes what PyTorch does."""
    build = "pip install --force-reinstall --no-deps afina (needs a C++ compiler)"
    if kernels.library is None:
        return Check("kernels", "problem", f"no C++ kernels: {kernels.missing}", build)
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.rand(3, 64, generator=generator), torch.rand(32, 64, generator=generator)
    expected = torch.nn.functional.linear(x, weight)
    found = skinny_linear(x, weight)
    if not torch.allclose(found, expected, rtol=KERNEL_TOLERANCE):
        return Check("kernels", "problem", f"wrong results with {kernels.isa}", "AFINA_ISA=plain")
    others = ", ".join(kernels.available_isas)
    return Check(
        "kernels", "ok", f"C++ for {kernels.isa} (available: {others}), results as torch's"
    )


def _folders(settings: DoctorSettings) -> Iterator[Check]:
    """Check that the cache and the folder of runs can be written, and that the disk is not full."""
    cache = cache_file().expanduser().parent
    for name, folder, hint in (
        ("cache", cache, "AFINA_CACHE=FOLDER names another"),
        ("runs", settings.output_dir, "--output-dir FOLDER names another"),
    ):
        existing = _existing(folder)
        problem = _write_problem(existing)
        if problem is not None:
            yield Check(name, "problem", f"{folder} cannot be written: {problem}", hint)
            continue
        free = shutil.disk_usage(existing).free
        value = f"{folder}, {format_bytes(free)} free"
        yield Check(name, "ok" if free >= MIN_FREE_BYTES else "problem", value, hint)


def _existing(folder: Path) -> Path:
    """Return a folder or the nearest one above it that exists."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return existing


def _write_problem(existing: Path) -> str | None:
    """Return why no file can be written into a folder, or None."""
    if not existing.is_dir():
        return f"{existing} is a file"
    try:
        with tempfile.TemporaryFile(dir=existing):
            return None
    except OSError as error:
        return error.strerror or str(error)


def _offline() -> Check:
    found = [f"{name}={os.environ[name]}" for name in OFFLINE_VARIABLES if os.environ.get(name)]
    if found:
        return Check("hub", "ok", f"offline ({', '.join(found)}): bases are read from the cache")
    return Check("hub", "ok", "online: a name as --base is downloaded on first use")
