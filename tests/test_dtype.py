"""Which dtype a base is loaded in: the machine's instructions and memory decide where the user does not."""

import pytest
import torch
from transformers import LlamaConfig

from afina.models import dtype as dtypes
from afina.models.dtype import choose_dtype

CPU, BF16 = torch.device("cpu"), torch.bfloat16


@pytest.mark.parametrize(
    ("name", "stored", "device", "fast", "weight_bytes", "expected"),
    [
        ("auto", "bfloat16", "cpu", True, 1e9, BF16),
        ("auto", "bfloat16", "cpu", False, 1e9, torch.float32),
        ("auto", "float16", "cpu", False, 1e9, torch.float32),
        ("auto", "float16", "cpu", True, 1e9, BF16),
        ("auto", "bfloat16", "cpu", False, 5e9, BF16),  # 10 of 16 GB in float32: more than half
        ("auto", "bfloat16", "cuda", False, 1e9, BF16),
        ("auto", "bfloat16", "mps", True, 1e9, torch.float32),
        ("auto", "float32", "cpu", True, 1e9, torch.float32),
        ("stored", "bfloat16", "cpu", False, 1e9, BF16),
        ("bfloat16", "float32", "cpu", False, 1e9, BF16),
        ("float32", "bfloat16", "cpu", True, 1e9, torch.float32),
    ],
)
def test_dtype_fits_the_machine(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    stored: str,
    device: str,
    fast: bool,
    weight_bytes: float,
    expected: torch.dtype,
) -> None:
    monkeypatch.setattr(dtypes, "has_bfloat16_instructions", lambda: fast)
    monkeypatch.setattr(dtypes, "machine_memory", lambda: 16e9)
    config = LlamaConfig(dtype=stored)
    assert choose_dtype(name, torch.device(device), config, int(weight_bytes)) == expected
