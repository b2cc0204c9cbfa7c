"""Which dtype a base is loaded in, by its files, the device and the machine."""

import os
import re
from pathlib import Path

import torch
from transformers import PretrainedConfig

MAX_MEMORY_RATIO = 0.5  # of the machine's memory, for weights that auto widens to float32


def choose_dtype(
    name: str, device: torch.device, config: PretrainedConfig, weight_bytes: int
) -> torch.dtype:
    """Return the dtype meant by `name`: a name of torch's, "stored" or "auto".

    "stored" is the dtype of the files, with bfloat16 for float16. "auto" is the same, except where
    the device computes in float32 only, or much faster: on MPS, and on a CPU without instructions
    for bfloat16 if the widened weights take at most half of the memory. (A product of
    283 x 256 x 1024 took 23.7 ms in bfloat16 and 3.0 ms in float32 on a CPU with AVX2 only.)

    Args:
        weight_bytes: bytes of the weights in 16 bits.
    """
    stored = getattr(config, "dtype", None) or torch.float32
    stored = torch.bfloat16 if stored == torch.float16 else stored
    if name == "stored":
        return stored
    if name != "auto":
        return getattr(torch, name)
    if device.type == "mps":
        return torch.float32
    slow = device.type == "cpu" and stored == torch.bfloat16 and not has_bfloat16_instructions()
    return torch.float32 if slow and _float32_fits(weight_bytes) else stored


def has_bfloat16_instructions() -> bool:
    """Return whether oneDNN multiplies bfloat16 matrices on this CPU without emulation."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _float32_fits(weight_bytes: int) -> bool:
    """Return whether weights that take `weight_bytes` in 16 bits fit in float32."""
    memory = machine_memory()
    return memory is None or 2 * weight_bytes <= MAX_MEMORY_RATIO * memory


def machine_memory() -> float | None:
    """Return the bytes of RAM available to this process: the machine's, or its container's."""
    try:
        total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, AttributeError, OSError):  # Windows
        import psutil

        return float(psutil.virtual_memory().total)
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else ""
    return min(total, float(text)) if re.fullmatch(r"\d+", text) else total
