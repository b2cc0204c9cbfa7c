"""Shapes of a model and of an adapter on it, from config.json alone: no weights are read.

The model is built on PyTorch's "meta" device, where tensors have shapes and no data, by the classes
that load it. Modules are then selected, and parameters counted, by the functions of training.
"""

import copy
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from afina.adapters.attach import frozen_module, vocabulary_layers
from afina.adapters.registry import get_method
from afina.adapters.target_module import TargetModule
from afina.adapters.target_selection import layer_index
from afina.adapters.trainable_tokens import TrainableTokens
from afina.errors import BaseError
from afina.io.adapter_config import AdapterConfig
from afina.kernels.int8_blockwise import BLOCK as NESTED_BLOCK
from afina.kernels.nf4 import BLOCK
from afina.models.bnb_format import is_quantised
from afina.models.dtype import choose_dtype
from afina.models.fast_llama import ATTENTIONS, MLPS, NORMS
from afina.models.loading import load_config, resolve_model_dir
from afina.models.nf4 import quantizable_modules
from afina.settings import TrainSettings

TENSOR_HEADER = (
    150  # bytes that a tensor takes in the header of a safetensors file: name, type, shape, place
)


@dataclass(frozen=True)
class ModelShape:
    """Causal language model without weights; `dtype` is the one that they are loaded in."""

    name: str
    folder: Path
    model: PreTrainedModel
    dtype: torch.dtype
    quantised: bool  # whether its files hold NF4 codes already
    has_weights: bool

    @property
    def config(self) -> Any:
        """The configuration of the decoder of text."""
        return self.model.config.get_text_config()

    @property
    def max_positions(self) -> int:
        """Longest sequence that the model was made for, in tokens."""
        return int(getattr(self.config, "max_position_embeddings", None) or 2048)

    @property
    def parameters(self) -> int:
        """Number of parameters; tied ones count once."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def parameters_by_kind(self) -> dict[str, int]:
        """Parameters by kind: layers, embeddings, output (0 if tied), norms and biases."""
        kinds: Counter[str] = Counter(
            {"blocks": 0, "embeddings": 0, "output": 0, "norms and biases": 0}
        )
        seen: set[int] = set()
        head = self.model.get_output_embeddings()
        for path, module in self.model.named_modules():
            for parameter in module.parameters(recurse=False):
                if id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                kind = (
                    "embeddings"
                    if isinstance(module, nn.Embedding)
                    else "output"
                    if module is head
                    else "blocks"
                )
                if parameter.ndim < 2 or (kind == "blocks" and layer_index(path) is None):
                    kind = "norms and biases"
                kinds[kind] += parameter.numel()
        return dict(kinds)

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return 1 + max(
            (n for path, _ in self.model.named_modules() if (n := layer_index(path)) is not None),
            default=-1,
        )

    @property
    def is_exact(self) -> bool:
        """Whether the layers are the fast ones, whose saved tensors are counted, not bounded."""
        names = {type(module).__name__ for module in self.model.modules()}
        return bool(names & ATTENTIONS and names & MLPS and names & NORMS)

    def weight_bytes(self, quantization: str) -> int:
        """Return the bytes of the weights; with "nf4" the layers' matrices are quantized."""
        width = self.dtype.itemsize
        codes = quantizable_modules(self.model) if quantization == "nf4" else {}
        held = sum(width * p.numel() for p in self.model.parameters())
        return held + sum(
            nf4_bytes(TargetModule(p, m)) - width * m.weight.numel() for p, m in codes.items()
        )

    def largest(self, quantization: str) -> int:
        """Bytes of its largest tensor as it is held (embeddings, mostly)."""
        codes = (
            {f"{path}.weight" for path in quantizable_modules(self.model)}
            if quantization == "nf4"
            else set()
        )
        return self.dtype.itemsize * max(
            p.numel() for name, p in self.model.named_parameters() if name not in codes
        )


def nf4_bytes(layer: TargetModule) -> int:
    """Return the bytes of a matrix in NF4: codes, a byte per 64, a float32 per 256 of these."""
    out, width = layer.out_features, layer.in_features
    scales = out * math.ceil(width / BLOCK)
    return out * math.ceil(width / 2) + scales + 4 * math.ceil(scales / NESTED_BLOCK) + 4


def read_model_shape(settings: TrainSettings, device: str) -> ModelShape:
    """Return the shape of the settings' base, of which config.json is enough; raise `BaseError`."""
    folder = resolve_model_dir(settings.base, settings.revision, weights=False)
    if not (folder / "config.json").is_file():
        raise BaseError(
            "no config.json in the model's folder",
            where=str(folder),
            hint="is this a Hugging Face folder?",
        )
    config = copy.deepcopy(load_config(folder, settings.base, settings.trust_remote_code))
    quantised = is_quantised(config, settings.base)
    if quantised:
        del config.quantization_config
    try:
        with torch.device("meta"), no_init_weights():
            model = AutoModelForCausalLM.from_config(
                config, trust_remote_code=settings.trust_remote_code
            )
    except (ValueError, KeyError) as error:
        what = f"{config.model_type} is no language model that reads forwards only"
        raise BaseError(what, where=settings.base, why=str(error).splitlines()[0]) from error
    model.tie_weights()
    weight_bytes = 2 * sum(p.numel() for p in model.parameters())
    dtype = choose_dtype(settings.dtype, torch.device(device), config, weight_bytes)
    return ModelShape(
        settings.base, folder, model, dtype, quantised, bool(list(folder.glob("*.safetensors")))
    )


@dataclass(frozen=True)
class AdapterSize:
    """Trainable parameters of an adapter by module path, and in all (tied ones once)."""

    config: AdapterConfig
    layers: dict[str, int]
    trainable: int
    tensors: int
    width: int  # bytes of a trained number as it is held and saved

    @property
    def file_bytes(self) -> int:
        """Size of the adapter's file, at most."""
        return self.trainable * self.width + self.tensors * TENSOR_HEADER


def count_parameters(shape: ModelShape, spec: AdapterConfig) -> AdapterSize:
    """What an adapter of `spec` on the model would learn, by each method's own formula."""
    model, kind = shape.model, get_method(spec.method)
    layers = {
        path: TargetModule(path, frozen_module(model, path))
        for path in (*spec.target_modules, *spec.modules_to_save)
    }
    numbers = {
        path: (get_method("full") if path in spec.modules_to_save else kind).num_parameters(
            layer, spec
        )
        for path, layer in layers.items()
    }
    trainable, tensors = sum(numbers.values()), 3 * len(numbers)
    if kind.replaces_base:  # parameters that are one in the base are one in the trained copy
        own = {
            id(p): p.numel()
            for layer in layers.values()
            for p in layer.module.parameters(recurse=False)
        }
        trainable, tensors = sum(own.values()), len(own)
    if spec.trainable_tokens:
        places = {id(model.get_submodule(path).weight): path for path in vocabulary_layers(model)}
        rows = {
            path: TrainableTokens.num_parameters(
                TargetModule(path, model.get_submodule(path)), spec
            )
            for path in places.values()
        }
        trainable, tensors = trainable + sum(rows.values()), tensors + len(rows)
    return AdapterSize(
        spec, numbers, trainable, tensors, shape.dtype.itemsize if kind.replaces_base else 4
    )
