"""Models in NF4 on disk, in the format of bitsandbytes: transformers, vLLM and afina load them.

    PATH.weight                                   codes, flat: two per byte
    PATH.weight.absmax, .nested_absmax            scales of the blocks in 8 bits, and superscales
    PATH.weight.quant_map, .nested_quant_map      the 16 and the 256 levels
    PATH.weight.quant_state.bitsandbytes__nf4     JSON as bytes: shape, block sizes, offset

The values are those of `afina.kernels.nf4` where 64 divides the width of a module.
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


def is_quantized(config: PretrainedConfig, name: str) -> bool:
    """Return whether a model's files have NF4 codes.

    Raises:
        BaseError: they have codes of another kind.
    """
    stored = getattr(config, "quantization_config", None)
    if not stored:
        return False
    kind = stored if isinstance(stored, dict) else stored.to_dict()
    if (
        kind.get("quant_method") == "bitsandbytes"
        and kind.get("load_in_4bit")
        and kind.get("bnb_4bit_quant_type") == "nf4"
    ):
        return True
    why = f"its files are quantized as {kind.get('quant_method')!r}"
    why += "; supported are 16 and 32 bits, and NF4 of bitsandbytes"
    hint = "--base with the unquantized model, and --method qlora"
    raise BaseError("this quantization is not supported", where=name, why=why, hint=hint)


def tied_names(model: PreTrainedModel) -> set[str]:
    """Return the names of parameters that are tied to others."""
    return set(getattr(model, "all_tied_weights_keys", None) or ())


@torch.no_grad()
def write_nf4(model: PreTrainedModel, folder: Path) -> None:
    """Write a model with `NF4Linear` modules.

    Raises:
        MergeError: the format cannot represent one of them.
    """
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
            hint = "write the merged model in 16 bits, without --quantization"
            what = "the format of bitsandbytes cannot represent this module in NF4"
            raise MergeError(what, where=path, why=why, hint=hint)
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
    description = {
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
        torch.tensor(list(json.dumps(description).encode()), dtype=torch.uint8),
    )
    # clones: tensors that share memory, or are part of a longer one, would not be written
    parts = {
        f"{path}.weight.{part}": value.detach().cpu().clone()
        for part, value in zip(PARTS, values, strict=True)
    }
    return {f"{path}.weight": layer.codes.detach().cpu().view(-1, 1), **parts}


def quantized_paths(names: Any) -> list[str]:
    """Return the paths of the modules whose tensors, by their `names`, are NF4 codes."""
    return [name.removesuffix(f".weight.{STATE}") for name in names if name.endswith(STATE)]


def from_files(path: str, tensors: dict[str, Tensor]) -> NF4Weight:
    """Return the codes of the module at `path`.

    Raises:
        BaseError: a tensor is missing, or the codes are of another variant of NF4.
    """
    try:
        codes, (scales, superscales, levels, nested, state) = (
            tensors[f"{path}.weight"],
            [tensors[f"{path}.weight.{part}"] for part in PARTS],
        )
        description = json.loads(bytes(state.tolist()))
        rows, width = description["shape"]
        same = torch.equal(levels, torch.tensor(LEVELS)) and torch.equal(
            nested, dynamic_levels(True, torch.device("cpu"))
        )
        blocks = (description["blocksize"], description["nested_blocksize"])
        offset = torch.tensor([description["nested_offset"]], dtype=torch.float32)
    except (KeyError, ValueError, TypeError) as error:
        raise BaseError(
            "the codes of this module cannot be read",
            where=path,
            why=f"{error} is missing; files without double quantization lack it",
            hint="--base with the unquantized model",
        ) from error
    if not same or blocks != (BLOCK, NESTED_BLOCK) or width % BLOCK:
        why = f"blocks of {blocks}, width {width}; supported are {(BLOCK, NESTED_BLOCK)}"
        raise BaseError(
            "this variant of NF4 is not supported",
            where=path,
            why=f"{why}, and widths that {BLOCK} divides",
            hint="--base with the unquantized model",
        )
    return NF4Weight(
        codes.view(rows, width // 2), scales.view(rows, width // BLOCK), superscales, offset, width
    )
