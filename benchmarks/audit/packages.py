"""Small adapters for the file gate, made with numpy alone: valid ones of every kind, and a base whose shapes they fit."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from afina.io.adapter_config import AdapterConfig
from afina.io.adapter_folder import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from afina.io.adapter_metadata import METADATA_FILE
from afina.io.hashing import adapter_hash, hash_tensor_files

WIDTH, INNER, BLOCKS, VOCABULARY = 8, 12, 2, 40
SHAPES = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.v_proj": (WIDTH // 2, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}


def layers(blocks: int = BLOCKS) -> Iterator[tuple[str, int, int]]:
    """(path, out, in) of the layers that are adapted."""
    for block in range(blocks):
        for name, (out, inner) in SHAPES.items():
            yield f"model.layers.{block}.{name}", out, inner


def write_base(folder: Path) -> Path:
    """A base's files: its configuration and its weights, random."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    weights = {
        f"{path}.weight": rng.standard_normal((out, inner)).astype(np.float32)
        for path, out, inner in layers()
    }
    weights["model.embed_tokens.weight"] = rng.standard_normal((VOCABULARY, WIDTH)).astype(
        np.float32
    )
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"vocab_size": VOCABULARY}))
    return folder


def write_valid(
    folder: Path, kind: str = "lora", rank: int = 2, seed: int = 0, dtype: Any = np.float32
) -> Path:
    """A valid adapter: "peft" as PEFT writes a lora; lora, alora, dora, mora, full as afina does."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    method = {"peft": "lora", "alora": "lora"}.get(kind, kind)
    tensors: dict[str, np.ndarray] = {}
    for path, out, inner in layers():
        size = int(((out + inner) * rank) ** 0.5) // 2 * 2
        shapes: dict[str, tuple[int, ...]] = {
            "mora": {"mora_M.weight": (size, size)},
            "full": {"weight": (out, inner)},
        }.get(method, {"lora_A.weight": (rank, inner), "lora_B.weight": (out, rank)})
        if method == "dora":
            shapes["lora_magnitude_vector"] = (out,)
        tensors |= {
            f"{PREFIX}{path}.{part}": (0.1 * rng.standard_normal(shape)).astype(dtype)
            for part, shape in shapes.items()
        }
    save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})
    config: dict[str, Any] = {
        "peft_type": "LORA" if method in ("lora", "dora") else f"AFINA_{method.upper()}",
        "base_model_name_or_path": "base",
        "target_modules": [name.partition(".")[2] for name in SHAPES],
    }
    if method in ("lora", "dora"):
        config |= {
            "r": rank,
            "lora_alpha": 2 * rank,
            "lora_dropout": 0.0,
            "use_dora": method == "dora",
            "bias": "none",
            "use_rslora": False,
            "alora_invocation_tokens": [5, 6] if kind == "alora" else None,
            "rank_pattern": {},
            "alpha_pattern": {},
        }
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    if kind != "peft":
        invocation = (5, 6) if kind == "alora" else ()
        spec = AdapterConfig(
            method,
            tuple(path for path, *_ in layers()),
            rank,
            float(2 * rank),
            invocation=invocation,
        ).canonical()
        metadata = {
            "format_version": 1,
            "afina": "0",
            "hash": adapter_hash(hash_tensor_files([folder / WEIGHTS_FILE]), spec),
            "spec": spec,
            "base": {"name": "base", "hash": None},
            "parents": [],
        }
        (folder / METADATA_FILE).write_text(json.dumps(metadata))
    return folder
