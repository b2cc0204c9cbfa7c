"""A LoRA adapter as a GGUF file, which llama.cpp applies to the base's own GGUF.

blk.0.attn_q.weight.lora_a, .lora_b    (r, in), (out, r);   y = W x + (adapter.lora.alpha / r) B A x
"""

from pathlib import Path

from torch import Tensor

from afina.adapters.load_run import recorded_format
from afina.io.atomic import atomic_file
from afina.merging.chat_export import resolve_template
from afina.merging.exported_source import (
    AdapterTarget,
    cannot_write,
    not_low_rank,
    open_exported,
)
from afina.merging.gguf_architecture import gguf_architecture, library
from afina.merging.gguf_tokenizer import portable
from afina.merging.gguf_writing import write_gguf
from afina.merging.results import ExportResult
from afina.settings import ExportSettings

MERGED = "--format gguf writes base and adapter as one model"
TARGET = AdapterTarget("llama.cpp", "a GGUF adapter", "gguf-lora", ("lora",), MERGED)


def export_adapter(settings: ExportSettings, file: Path) -> ExportResult:
    """Write a LoRA to `file`; return its alpha and the number of its modules.

    llama.cpp scales every module by alpha / r with one alpha. It gets that of the first module
    (alpha * sqrt(r) under rsLoRA); B of the others contains what they differ by.
    """
    gguf = library()
    opened = open_exported(settings, TARGET)
    source = opened.source
    form = gguf_architecture(opened.base_config, opened.base)
    first = source.config.target_modules[0]
    alpha = source.config.scale_of(first) * source.config.rank_of(first)
    tensors: list[tuple[str, Tensor, str]] = []
    for path in source.config.target_modules:
        there, low = form.name(f"{path}.weight"), source.low_rank_update(path)
        if low is None:
            raise not_low_rank(source, TARGET)
        tied = ("output.weight",) if form.tied else ()
        if there in (None, "token_embd.weight", *tied):
            why = f"{path} is adapted, and llama.cpp supports no lora there on this base"
            raise cannot_write(source, TARGET, why)
        b = (
            low.b * (low.rank / alpha) if alpha else low.b
        )  # llama.cpp does not scale by an alpha of 0
        order = form.order(f"{path}.weight", len(b))
        tensors.append((f"{there}.lora_a", low.a, "f32"))
        tensors.append((f"{there}.lora_b", b if order is None else b[order], "f32"))
    chat, template = recorded_format(source.part.folder), None
    if chat is not None:
        _, template = resolve_template(source.part.folder, chat, settings.base)
    with atomic_file(file) as new:
        writer = gguf.GGUFWriter(new, form.family.name)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(source.name)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_string("afina.adapter", source.hash)
        if template is not None:
            writer.add_chat_template(portable(template))
        write_gguf(writer, tensors)
    return ExportResult(
        out=str(file),
        format="gguf-lora",
        adapter=source.hash,
        alpha=alpha,
        layers=len(tensors) // 2,
    )
