"""A merged model as a GGUF file with its tokenizer and chat template, for llama.cpp.

blk.0.attn_q.weight    (out, in), in float32, bfloat16 or float16; norms in float32
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from afina.adapters.active import BASE_ONLY
from afina.adapters.load_run import load_run
from afina.errors import BaseError
from afina.io.atomic import atomic_file
from afina.io.composition import expand_composition, hash_adapter_folder, parse_weighted_list
from afina.merging.chat_export import install_chat_format
from afina.merging.gguf_architecture import (
    GGUFArchitecture,
    gguf_architecture,
    library,
    write_gguf,
)
from afina.merging.gguf_tokenizer import add_tokens
from afina.merging.merge_into_base import (
    TOLERANCE,
    check_mergeable,
    check_tolerance,
    kl_and_agreement,
    make_probe,
    merge_into_base,
    probe_logits,
)
from afina.merging.results import ExportResult
from afina.models.causal_lm import CausalLM
from afina.models.nf4 import dequantize_model
from afina.settings import ExportSettings

TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def export_model(settings: ExportSettings, file: Path) -> ExportResult:
    """Write base and adapter (without a run: the base alone) to `file`; return the proof.

    The proof is measured on the weights as the file has them.

    Raises:
        MergeError: They compute something else than the adapted model; no file is left.
    """
    gguf = library()
    opened = load_run(settings.adapter, settings, allow_other_base=settings.allow_other_base)
    base, adapter = opened.causal_lm, opened.adapter
    gguf_architecture(base.model.config, base.name)
    if adapter is not None:
        check_mergeable(base, adapter, str(settings.adapter))
    probe = make_probe(base)
    adapted = probe_logits(base, probe, opened.active)
    if adapter is None:
        dequantize_model(base.model)
    else:
        merge_into_base(base, adapter)
    # again: an output layer that has changed is no longer tied
    form = gguf_architecture(base.model.config, base.name)
    kind: str = settings.outtype
    if kind == "auto":
        kind = next(name for name in TYPES if TYPES[name] == base.dtype)
    stops = install_chat_format(base, opened.chat_format).stop_token_ids
    digest = _adapter_hash(settings.adapter)
    embedding: Any = base.model.get_input_embeddings()
    with atomic_file(file) as new:
        writer = gguf.GGUFWriter(new, form.family)
        _describe(writer, gguf, base, kind)
        add_tokens(writer, base.tokenizer, len(embedding.weight), stops)
        if digest:
            writer.add_string("afina.adapter", digest)
        write_gguf(writer, list(_tensors(base, form, TYPES[kind])))
        read_back(base, form, new)
        proof = kl_and_agreement(adapted, probe_logits(base, probe, BASE_ONLY))
        rounded = TOLERANCE[torch.float32 if kind == "f32" else torch.bfloat16]
        check_tolerance(proof, settings.max_kl or max(rounded, TOLERANCE[base.dtype]))
    found: dict[str, Any] = {"base": base.name, "adapter": digest} | proof
    return ExportResult(out=str(file), format="gguf", weights=kind, **found)


def _adapter_hash(run: Path | None) -> str | None:
    """Return the hash of the one adapter of a run; None without a run."""
    if run is None:
        return None
    [(folder, weight)] = parse_weighted_list(run)
    return hash_adapter_folder(expand_composition(folder, weight)[0].folder)


def _describe(writer: Any, gguf: Any, base: CausalLM, kind: str) -> None:
    """Write the model's configuration under llama.cpp's names."""
    config: Any = base.model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(Path(base.name).name)
    kinds = gguf.LlamaFileType
    writer.add_file_type(
        {"f32": kinds.ALL_F32, "bf16": kinds.MOSTLY_BF16, "f16": kinds.MOSTLY_F16}[kind]
    )
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)


def _parameters(base: CausalLM, form: GGUFArchitecture) -> Iterator[tuple[str, str, Tensor]]:
    """Yield transformers' name, llama.cpp's name and value of each weight, a tied one once."""
    for name, tensor in base.model.state_dict().items():
        if form.tied and name == "lm_head.weight":
            continue
        there = form.name(name)
        if there is None:
            raise BaseError(
                f"llama.cpp has no tensor for {name}", where=base.name, hint="--format hf"
            )
        yield name, there, tensor


def _tensors(
    base: CausalLM, form: GGUFArchitecture, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor, torch.dtype]]:
    """Yield name, value and dtype of each tensor in the file; vectors are float32."""
    for name, there, tensor in _parameters(base, form):
        order = form.order(name, len(tensor))
        rows = tensor if order is None else tensor[order.to(tensor.device)]
        yield there, rows, dtype if tensor.ndim > 1 else torch.float32
    config: Any = base.model.config
    if config.rope_parameters["rope_type"] != "default":  # stored as divisors of the default ones
        model: Any = base.model.base_model
        frequencies = model.rotary_emb.inv_freq.double().cpu()
        exponents = torch.arange(len(frequencies), dtype=torch.float64) / len(frequencies)
        divisors = config.rope_parameters["rope_theta"] ** -exponents / frequencies
        yield "rope_freqs.weight", divisors, torch.float32


@torch.no_grad()
def read_back(base: CausalLM, form: GGUFArchitecture, file: Path) -> None:
    """Load the weights of `file` into the base, in the order of transformers."""
    gguf = library()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for name, there, tensor in _parameters(base, form):
        stored = tensors[there]
        values = torch.from_numpy(
            np.array(gguf.quants.dequantize(stored.data, stored.tensor_type))
        ).view(tensor.shape)
        order = form.order(name, len(tensor))
        tensor.copy_(values if order is None else values[order.argsort()])
