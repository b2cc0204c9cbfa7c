"""Rates of this machine, measured in a subprocess within seconds and cached on disk.

    $AFINA_CACHE/probe.json, or ~/.cache/afina/probe.json      a mapping from machine to `Rates`

The machine is its processor, torch's version, the number of threads, the kernels and the device: a
change of one of them leads to a new measurement, by `afina.training.measure_machine`.
"""

import json
import os
import platform
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from afina.errors import AfinaError
from afina.io.atomic import write_json
from afina.io.subprocesses import SubprocessError, run_in_subprocess
from afina.io.translation import translate
from afina.kernels.dispatch import kernels
from afina.planning.estimates import MachineRates

CPU_INFO = Path("/proc/cpuinfo")


def cache_file() -> Path:
    """Return the file of the rates of all machines."""
    folder = os.environ.get("AFINA_CACHE") or Path.home() / ".cache" / "afina"
    return Path(folder).expanduser() / "probe.json"


def machine_key(device: str) -> str:
    """Return what the rates are valid for, as a line of text."""
    processor = platform.processor() or platform.machine()
    if found := re.search(
        r"model name\s*: (.*)", CPU_INFO.read_text() if CPU_INFO.exists() else ""
    ):
        processor = found[1]
    if device == "cuda":
        processor += f", {torch.cuda.get_device_name()}"
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} threads"
    versions = f"torch {torch.__version__}, {kernels.isa}"
    return f"{platform.node()}, {processor}, {threads}, {versions}, {device}"


def measured_rates(device: str, anew: bool = False) -> MachineRates:
    """Return the rates of this machine, measured now where they are unknown, or `anew`."""
    known, key = _read(), machine_key(device)
    if key not in known or anew:
        known[key] = _measure_in_subprocess(device)
        write_json(cache_file(), known)
    return MachineRates(**known[key])


def known_rates(device: str) -> MachineRates | None:
    """Return the rates of this machine, or None where it has not been measured."""
    found = _read().get(machine_key(device))
    return MachineRates(**found) if found else None


def _read() -> dict[str, Any]:
    """Return all that is stored; nothing where the file is damaged or of another version."""
    names = {field.name for field in fields(MachineRates)}
    try:
        stored = json.loads(cache_file().read_text()).items()
        return {key: value for key, value in stored if set(value) == names}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _measure_in_subprocess(device: str) -> dict[str, Any]:
    """Return rates measured in a subprocess, whose memory is that of a training process."""
    text = translate("measuring this machine, once, for about ten seconds")
    print(f"afina: {text}", file=sys.stderr)
    threads = str(torch.get_num_threads())
    try:
        return dict(run_in_subprocess("afina.training.measure_machine", device, threads))
    except SubprocessError as error:
        raise AfinaError(
            "this machine could not be measured",
            where=device,
            why=error.what,
            hint="try again with --remeasure",
        ) from None
