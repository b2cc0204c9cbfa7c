"""Whole models in NF4 on disk, as bitsandbytes writes them: what transformers, vLLM and we ourselves can load.

    PATH.weight                                   codes, flat: two a byte
    PATH.weight.absmax, .nested_absmax            the blocks' scales in 8 bits, and the superscales
    PATH.weight.quant_map, .nested_quant_map      the 16 and the 256 levels
    PATH.weight.quant_state.bitsandbytes__nf4     JSON as bytes: shape, block sizes, offset

The numbers are ours, one for one, where 64 divides the width of a layer (see `afina.kernels.nf4`).
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from afina.errors import BaseError, MergeError
from afina.kernels.int8_blockwise import BLOCK as NESTED_BLOCK
from afina.kernels.int8_blockwise import dynamic_levels
from afina.kernels.nf4 import BLOCK, LEVELS, NF4Weight
from afina.models.fast_llama import LINEAR_TYPES
from afina.models.nf4 import NF4Linear

STATE = "quant_state.bitsandbytes__nf4"
PARTS = ("absmax", "nested_absmax", "quant_map", "nested_quant_map", STATE)


def is_quantised(config: PretrainedConfig, name: str) -> bool:
    """Whether a model's files hold NF4 codes; raises `BaseError` where they hold some other kind of codes."""
    told = getattr(config, "quantization_config", None)
    if not told:
        return False
    kind = told if isinstance(told, dict) else told.to_dict()
    if (
        kind.get("quant_method") == "bitsandbytes"
        and kind.get("load_in_4bit")
        and kind.get("bnb_4bit_quant_type") == "nf4"
    ):
        return True
    why = f"its files are quantised as {kind.get('quant_method')!r}; afina reads 16 and 32 bits, and bitsandbytes' NF4"
    hint = "take the unquantised model, and --method qlora"
    raise BaseError("this model cannot be held frozen here", where=name, why=why, hint=hint)


def tied_names(model: PreTrainedModel) -> set[str]:
    """Names of parameters that are other parameters of the model."""
    return set(getattr(model, "all_tied_weights_keys", None) or ())


@torch.no_grad()
def write_nf4(model: PreTrainedModel, folder: Path) -> None:
    """Write a model some of whose layers are `NF4Linear`; raises `MergeError` where the format cannot hold one of them."""
    layers = {
        path: module for path, module in model.named_modules() if isinstance(module, NF4Linear)
    }
    for path, layer in layers.items():
        if layer.transposed or layer.in_features % BLOCK:
            why = (
                "it is stored transposed"
                if layer.transposed
                else f"{BLOCK} does not divide its width {layer.in_features}"
            )
            hint = "write the merged model in 16 bits: leave --quantization out"
            raise MergeError(
                "bitsandbytes' files cannot hold this layer in NF4", where=path, why=why, hint=hint
            )
    inside = tuple(f"{path}." for path in layers)
    names = model.state_dict().keys() - (
        tied_names(model) if model.config.tie_word_embeddings else set()
    )
    tensors = {
        n: model.state_dict()[n]
        for n in sorted(names)
        if not n.startswith(inside) or n.endswith(".bias")
    }
    for path, layer in layers.items():
        tensors |= _to_files(path, layer)
    plain = [path for path, module in model.named_modules() if type(module) in LINEAR_TYPES]
    config = copy.deepcopy(model.config)
    config.quantization_config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": str(next(iter(layers.values())).dtype).removeprefix("torch."),
        "llm_int8_skip_modules": plain,
    }
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    save_torch_state_dict({name: t.contiguous() for name, t in tensors.items()}, folder)


def _to_files(path: str, layer: NF4Linear) -> dict[str, Tensor]:
    told = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "nested_blocksize": NESTED_BLOCK,
        "nested_offset": float(layer.offset),
        "shape": [layer.out_features, layer.in_features],
        "nested_dtype": "float32",
        "dtype": str(layer.dtype).removeprefix("torch."),
    }
    values = (
        layer.scales.flatten(),
        layer.superscales,
        torch.tensor(LEVELS),
        dynamic_levels(True, torch.device("cpu")),
        torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8),
    )
    # clones: tensors that share memory, or are part of a longer one, would not be written
    parts = {
        f"{path}.weight.{part}": value.detach().cpu().clone()
        for part, value in zip(PARTS, values, strict=True)
    }
    return {f"{path}.weight": layer.codes.detach().cpu().view(-1, 1), **parts}


def quantised_paths(names: Any) -> list[str]:
    """Paths of the layers whose tensors, by their `names`, are NF4 codes."""
    return [name.removesuffix(f".weight.{STATE}") for name in names if name.endswith(STATE)]


def from_files(path: str, tensors: dict[str, Tensor]) -> NF4Weight:
    """The codes of the layer at `path`; raises `BaseError` where they are of a variant that afina does not compute."""
    try:
        codes, (scales, superscales, levels, nested, state) = (
            tensors[f"{path}.weight"],
            [tensors[f"{path}.weight.{part}"] for part in PARTS],
        )
        told = json.loads(bytes(state.tolist()))
        rows, width = told["shape"]
        same = torch.equal(levels, torch.tensor(LEVELS)) and torch.equal(
            nested, dynamic_levels(True, torch.device("cpu"))
        )
        blocks = (told["blocksize"], told["nested_blocksize"])
        offset = torch.tensor([told["nested_offset"]], dtype=torch.float32)
    except (KeyError, ValueError, TypeError) as error:
        why = f"{error} is missing: it was written without double quantisation, perhaps"
        raise BaseError(
            "this layer's codes cannot be read",
            where=path,
            why=why,
            hint="take the unquantised model",
        ) from error
    if not same or blocks != (BLOCK, NESTED_BLOCK) or width % BLOCK:
        why = f"blocks of {blocks}, width {width}; afina's are {(BLOCK, NESTED_BLOCK)}, and {BLOCK} must divide the width"
        raise BaseError(
            "these codes are of another kind of NF4",
            where=path,
            why=why,
            hint="take the unquantised model",
        )
    return NF4Weight(
        codes.view(rows, width // 2), scales.view(rows, width // BLOCK), superscales, offset, width
    )
