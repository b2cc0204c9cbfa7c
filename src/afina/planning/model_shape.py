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
from afina.models.bnb_format import is_quantized
from afina.models.dtype import choose_dtype
from afina.models.fast_llama import ATTENTIONS, MLPS, NORMS
from afina.models.loading import load_decoder_config, resolve_model_dir
from afina.models.nf4 import quantizable_experts, quantizable_modules
from afina.settings import TrainSettings

TENSOR_HEADER = 150  # bytes of a tensor in the header of safetensors: name, dtype, shape, offsets


@dataclass(frozen=True)
class ModelShape:
    """Causal language model without weights.

    Attributes:
        dtype: The dtype that the weights are loaded in.
        quantized: Whether its files contain NF4 codes.
        has_weights: Whether its folder contains weights.
    """

    name: str
    folder: Path
    model: PreTrainedModel
    dtype: torch.dtype
    quantized: bool
    has_weights: bool

    @property
    def config(self) -> Any:
        """Configuration of the text decoder."""
        return self.model.config.get_text_config()

    @property
    def max_positions(self) -> int:
        """Longest sequence that the model supports, in tokens."""
        return int(getattr(self.config, "max_position_embeddings", None) or 2048)

    @property
    def hidden_size(self) -> int:
        """Elements of a token's hidden state."""
        return int(self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """Number of tokens of the vocabulary."""
        return int(self.config.vocab_size)

    @property
    def heads(self) -> tuple[int, int]:
        """Number of attention heads, and the width of all of them."""
        number = int(self.config.num_attention_heads)
        width = getattr(self.config, "head_dim", None) or self.config.hidden_size // number
        return number, number * int(width)

    @property
    def num_kv_heads(self) -> int:
        """Number of heads of keys and values."""
        return int(getattr(self.config, "num_key_value_heads", None) or self.heads[0])

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
        for name, parameter in self.model.named_parameters():  # tied ones have one name
            path = name.rpartition(".")[0]
            module = self.model.get_submodule(path)
            if parameter.ndim < 2:
                kind = "norms and biases"
            elif isinstance(module, nn.Embedding):
                kind = "embeddings"
            elif module is self.model.get_output_embeddings():
                kind = "output"
            else:
                kind = "norms and biases" if layer_index(path) is None else "blocks"
            kinds[kind] += parameter.numel()
        return dict(kinds)

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        numbers = [layer_index(path) for path, _ in self.model.named_modules()]
        return 1 + max((number for number in numbers if number is not None), default=-1)

    @property
    def is_exact(self) -> bool:
        """Whether the layers are the fast ones, whose saved tensors are counted, not bounded."""
        names = {type(module).__name__ for module in self.model.modules()}
        return bool(names & ATTENTIONS and names & MLPS and names & NORMS)

    def weight_bytes(self, quantization: str) -> int:
        """Return the bytes of the weights; with "nf4" the layers' matrices are quantized."""
        width = self.dtype.itemsize
        plain = sum(width * p.numel() for p in self.model.parameters())
        return plain - sum(
            width * one.num_experts * one.in_features * one.out_features - nf4_bytes(one)
            for one in self.quantized_weights(quantization)
        )

    def quantized_weights(self, quantization: str) -> list[TargetModule]:
        """Return what is in 4 bits with "nf4": matrices in the layers, and fused experts."""
        if quantization != "nf4":
            return []
        paths = [*quantizable_modules(self.model), *quantizable_experts(self.model)]
        return [TargetModule(path, frozen_module(self.model, path)) for path in paths]

    def largest_bytes(self, quantization: str) -> int:
        """Return the bytes of the largest tensor that is not quantized: the embeddings, mostly."""
        codes = self.quantized_weights(quantization)
        quantized = {one.path if one.is_experts else f"{one.path}.weight" for one in codes}
        sizes = (p.numel() for n, p in self.model.named_parameters() if n not in quantized)
        return self.dtype.itemsize * max(sizes)


def nf4_bytes(layer: TargetModule) -> int:
    """Return the bytes of a matrix in NF4, or of those of all experts.

    Each has codes, a byte per 64, a float32 per 256 of these, and an offset.
    """
    out, width = layer.out_features, layer.in_features
    scales = out * math.ceil(width / BLOCK)
    one = out * math.ceil(width / 2) + scales + 4 * math.ceil(scales / NESTED_BLOCK) + 4
    return layer.num_experts * one


def read_model_shape(settings: TrainSettings, device: str) -> ModelShape:
    """Return the shape of the settings' base, of which config.json is enough.

    Raises:
        BaseError: There is no config.json, or it is not that of a causal language model.
    """
    folder = resolve_model_dir(settings.base, settings.revision, weights=False)
    if not (folder / "config.json").is_file():
        raise BaseError(
            "no config.json in the model's folder",
            where=str(folder),
            hint="is this a Hugging Face folder?",
        )
    config = copy.deepcopy(load_decoder_config(folder, settings.base, settings.trust_remote_code))
    quantized = is_quantized(config, settings.base)
    if quantized:
        del config.quantization_config
    try:
        with torch.device("meta"), no_init_weights():
            model = AutoModelForCausalLM.from_config(
                config, trust_remote_code=settings.trust_remote_code
            )
    except (ValueError, KeyError) as error:
        what = f"{config.model_type} is not a causal language model"
        raise BaseError(what, where=settings.base, why=str(error).splitlines()[0]) from error
    model.tie_weights()
    weight_bytes = 2 * sum(p.numel() for p in model.parameters())
    dtype = choose_dtype(settings.dtype, torch.device(device), config, weight_bytes)
    has_weights = any(folder.glob("*.safetensors"))
    return ModelShape(settings.base, folder, model, dtype, quantized, has_weights)


@dataclass(frozen=True)
class AdapterSize:
    """Trainable parameters of an adapter by module path, and in all (tied ones once).

    Attributes:
        tensors: Number of tensors in its file.
        width: Bytes of a trainable parameter, in memory and in the file.
    """

    config: AdapterConfig
    layers: dict[str, int]
    trainable: int
    tensors: int
    width: int

    @property
    def file_bytes(self) -> int:
        """Upper bound of the adapter file's size in bytes."""
        return self.trainable * self.width + self.tensors * TENSOR_HEADER


def count_parameters(shape: ModelShape, config: AdapterConfig) -> AdapterSize:
    """Return the trainable parameters of an adapter on the model, by its method's formula."""
    model, kind = shape.model, get_method(config.method)
    layers = {
        path: TargetModule(path, frozen_module(model, path))
        for path in (*config.target_modules, *config.modules_to_save)
    }
    full = dict.fromkeys(config.modules_to_save, get_method("full"))
    numbers = {
        path: full.get(path, kind).num_parameters(layer, config) for path, layer in layers.items()
    }
    trainable, tensors = sum(numbers.values()), 3 * len(numbers)
    if kind.replaces_base:  # tied parameters of the base are tied in the trained copy
        modules = [layer.module for layer in layers.values()]
        own = {id(p): p.numel() for m in modules for p in m.parameters(recurse=False)}
        trainable, tensors = sum(own.values()), len(own)
    if config.trainable_tokens:
        paths = {id(model.get_submodule(path).weight): path for path in vocabulary_layers(model)}
        for path in paths.values():
            module = TargetModule(path, model.get_submodule(path))
            trainable += TrainableTokens.num_parameters(module, config)
            tensors += 1
    width = shape.dtype.itemsize if kind.replaces_base else 4
    return AdapterSize(config, numbers, trainable, tensors, width)
