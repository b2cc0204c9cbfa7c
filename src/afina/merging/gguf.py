"""A merged model as a GGUF file with its tokenizer and chat template, for llama.cpp.

blk.0.attn_q.weight    (out, in), float32, bfloat16, float16 or blocks of 4 to 8 bits; norms float32
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from afina.adapters.active import BASE_ONLY
from afina.adapters.load_run import load_run
from afina.data.renderer import Renderer
from afina.errors import BaseError
from afina.io.atomic import atomic_file
from afina.io.composition import expand_composition, hash_adapter_folder, parse_weighted_list
from afina.merging.chat_export import install_chat_format
from afina.merging.gguf_architecture import (
    GGUFArchitecture,
    add_architecture,
    gguf_architecture,
    library,
    rotary_tensors,
)
from afina.merging.gguf_tokenizer import add_tokens, model_name
from afina.merging.gguf_writing import BLOCK, DTYPES, file_type, stored_kind, write_gguf
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

PRECISE = ("token_embd.weight", "output.weight")  # 8 bits where the others have fewer
# nats per token that blocks of 8, 5 and 4 bits may change the answers by
BLOCK_TOLERANCE = {"q8_0": 0.05, "q5_1": 0.25, "q5_0": 0.25, "q4_1": 0.5, "q4_0": 0.5}


def export_model(
    settings: ExportSettings, file: Path, on_renderer: Callable[[Renderer], None] | None = None
) -> ExportResult:
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
        kind = stored_kind(base.dtype)
    renderer = install_chat_format(base, opened.chat_format)
    if on_renderer is not None:
        on_renderer(renderer)
    digest = _adapter_hash(settings.adapter)
    embedding: Any = base.model.get_input_embeddings()
    with atomic_file(file) as new:
        writer = gguf.GGUFWriter(new, form.family.name)
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(model_name(Path(base.name).name, base.tokenizer))
        writer.add_file_type(file_type(kind))
        add_architecture(writer, base.model.base_model, form)
        add_tokens(writer, base.tokenizer, len(embedding.weight), renderer.stop_token_ids)
        if digest:
            writer.add_string("afina.adapter", digest)
        write_gguf(writer, list(_tensors(base, form, kind)))
        read_back(base, form, new)
        proof = kl_and_agreement(adapted, probe_logits(base, probe, BASE_ONLY))
        rounded = TOLERANCE[torch.float32 if kind == "f32" else torch.bfloat16]
        usual = max(BLOCK_TOLERANCE.get(kind, rounded), TOLERANCE[base.dtype])
        check_tolerance(proof, settings.max_kl or usual)
    found: dict[str, Any] = {"base": base.name, "adapter": digest} | proof
    return ExportResult(out=str(file), format="gguf", weights=kind, **found)


def _adapter_hash(run: Path | None) -> str | None:
    """Return the hash of the one adapter of a run; None without a run."""
    if run is None:
        return None
    [(folder, weight)] = parse_weighted_list(run)
    return hash_adapter_folder(expand_composition(folder, weight)[0].folder)


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
    base: CausalLM, form: GGUFArchitecture, kind: str
) -> Iterator[tuple[str, Tensor, str]]:
    """Yield name, value and kind of each tensor in the file; vectors are float32."""
    for name, there, tensor in _parameters(base, form):
        yield there, form.stored(name, tensor), _kind_of(there, tensor, kind, base.dtype)
    for there, divisors in rotary_tensors(base.model.base_model, form).items():
        yield there, divisors, "f32"


def _kind_of(there: str, tensor: Tensor, kind: str, dtype: torch.dtype) -> str:
    """Return how a tensor is stored; one without entire blocks keeps the base's dtype."""
    if tensor.ndim < 2:
        return "f32"
    if kind in DTYPES:
        return kind
    if tensor.shape[-1] % BLOCK:
        return stored_kind(dtype)
    return "q8_0" if there in PRECISE else kind


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
        tensor.copy_(form.restored(name, values))
