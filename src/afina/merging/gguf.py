"""GGUF files, which llama.cpp and what is built on it read: a merged model with its tokenizer, or a lora alone.

    model      blk.0.attn_q.weight                    (out, in), in float32, bfloat16 or float16; norms in float32
    lora       blk.0.attn_q.weight.lora_a, .lora_b    (r, in), (out, r);   y = W x + (adapter.lora.alpha / r) B A x

llama.cpp turns neighbouring numbers of a head by one angle where transformers turns number i with i + d/2. In its
"llama" family the rows of the query and key layers, and of B there, are therefore put in the order 0, d/2, 1, d/2 + 1, ...
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from afina.adapters.load_run import load_run
from afina.data.renderer import Renderer
from afina.errors import AdapterError, BaseError, MergeError, SettingsError
from afina.io.atomic import atomic_file
from afina.io.composition import (
    WeightedAdapter,
    expand_composition,
    hash_adapter_folder,
    parse_weighted_list,
    recorded_base,
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
from afina.merging.sources import AdapterSource
from afina.models.causal_lm import CausalLM
from afina.models.loading import load_config, resolve_model_dir
from afina.models.nf4 import dequantize_model
from afina.settings import ExportSettings

FAMILIES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}  # transformers' name: llama.cpp's
TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
ROTARY = (
    "default",
    "linear",
    "llama3",
)  # kinds that are a factor to each frequency, and nothing else
MERGED = "--format gguf writes base and adapter as one model"


@dataclass(frozen=True)
class GGUFArchitecture:
    """How llama.cpp holds a model: its family there, its tensors' names, and the heads of its attention."""

    family: str
    names: Any  # gguf's map from transformers' names
    heads: int
    key_heads: int
    tied: bool

    def name(self, name: str) -> str | None:
        """llama.cpp's name of the parameter `name`; None where it has none."""
        found = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        return None if found is None else str(found)

    def order(self, name: str, rows: int) -> Tensor | None:
        """Which row (rows) of the parameter stands at each place there; None where all stay."""
        layer = name.split(".")[-2]
        if self.family != "llama" or layer not in ("q_proj", "k_proj"):
            return None
        heads = self.heads if layer == "q_proj" else self.key_heads
        return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


def library() -> Any:
    """The gguf package; raises `SettingsError` where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise SettingsError(
            "the gguf package is missing", where="format", hint="pip install 'afina[gguf]'"
        ) from None
    return gguf


def gguf_architecture(config: PretrainedConfig, name: str) -> GGUFArchitecture:
    """How llama.cpp holds a model of this configuration; raises `BaseError` where it would not answer the same."""
    family = FAMILIES.get(config.model_type)
    why = None
    if family is None:
        why = f"its family is {config.model_type!r}; known are {', '.join(FAMILIES)}"
    elif config.hidden_act != "silu":
        why = f"its activation is {config.hidden_act!r}, and llama.cpp's is silu"
    elif _slides(config):
        why = f"its attention sees {config.sliding_window} tokens only, and llama.cpp's sees all"
    elif (kind := config.rope_parameters["rope_type"]) not in (
        ROTARY if family == "llama" else ROTARY[:1]
    ):
        why = f"its rotary embedding is of the kind {kind!r}"
    elif config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        why = "its rotary embedding turns a part of each head only"
    if why is not None:
        hint = "--format hf, and llama.cpp's own convert_hf_to_gguf.py on that folder"
        raise BaseError("this base cannot be written as GGUF", where=name, why=why, hint=hint)
    gguf = library()
    names = gguf.get_tensor_name_map(
        getattr(gguf.MODEL_ARCH, str(family).upper()), config.num_hidden_layers
    )
    return GGUFArchitecture(
        str(family),
        names,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.tie_word_embeddings,
    )


def _slides(config: PretrainedConfig) -> bool:
    """Whether attention sees less than the whole context."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    slides = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    return bool(slides and window and window < config.max_position_embeddings)


# ---- a whole model


def export_model(settings: ExportSettings, file: Path) -> ExportResult:
    """Write base + adapter (without a run: the base alone) to `file`; returns the proof, measured on what the file holds.

    Raises `MergeError`, leaving nothing behind, where the file's weights do not answer as the adapted model.
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
    form = gguf_architecture(
        base.model.config, base.name
    )  # again: an output layer that has changed is tied no longer
    kind = (
        settings.outtype
        if settings.outtype != "auto"
        else next(name for name in TYPES if TYPES[name] == base.dtype)
    )
    template = Renderer(base.tokenizer, opened.chat_format, base.max_positions).chat_format.exported_jinja
    about = {
        "base": base.name,
        "adapter": hash_adapter_folder(_parts(settings.adapter)[0].folder)
        if settings.adapter
        else None,
    }
    with atomic_file(file) as beside:
        writer = gguf.GGUFWriter(beside, form.family)
        _describe(writer, gguf, base, kind)
        add_tokens(writer, base.tokenizer, len(base.model.get_input_embeddings().weight), template)  # type: ignore[arg-type]
        if about["adapter"]:
            writer.add_string("afina.adapter", about["adapter"])
        _write(writer, gguf, list(_tensors(base, form, TYPES[kind])))
        read_back(base, form, beside)
        proof = kl_and_agreement(adapted, probe_logits(base, probe, None))
        rounded = TOLERANCE[torch.float32 if kind == "f32" else torch.bfloat16]
        check_tolerance(proof, settings.max_kl or max(rounded, TOLERANCE[base.dtype]))
    return ExportResult(out=str(file), format="gguf", weights=kind, **about, **proof)  # type: ignore[arg-type]


def _describe(writer: Any, gguf: Any, base: CausalLM, kind: str) -> None:
    """The model's shape, under llama.cpp's names."""
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
    """(transformers' name, llama.cpp's, tensor) of each weight of the model, a tied one once."""
    for name, tensor in base.model.state_dict().items():
        if form.tied and name == "lm_head.weight":
            continue
        there = form.name(name)
        if there is None:
            raise BaseError(
                f"llama.cpp has no place for {name}", where=base.name, hint="--format hf"
            )
        yield name, there, tensor


def _tensors(
    base: CausalLM, form: GGUFArchitecture, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor, torch.dtype]]:
    """(name, tensor, dtype in the file) of each tensor; what is no matrix is held in float32."""
    for name, there, tensor in _parameters(base, form):
        order = form.order(name, len(tensor))
        yield (
            there,
            tensor if order is None else tensor[order.to(tensor.device)],
            dtype if tensor.ndim > 1 else torch.float32,
        )
    config: Any = base.model.config
    if (
        config.rope_parameters["rope_type"] != "default"
    ):  # frequencies of their own, as what divides the plain ones
        model: Any = base.model.base_model
        turned = model.rotary_emb.inv_freq.double().cpu()
        exponents = torch.arange(len(turned), dtype=torch.float64) / len(turned)
        yield (
            "rope_freqs.weight",
            config.rope_parameters["rope_theta"] ** -exponents / turned,
            torch.float32,
        )


def _write(writer: Any, gguf: Any, tensors: list[tuple[str, Tensor, torch.dtype]]) -> None:
    """Write the file: what it says of itself, then the tensors, one in memory at a time."""
    kinds = gguf.GGMLQuantizationType
    there = {torch.float32: kinds.F32, torch.bfloat16: kinds.BF16, torch.float16: kinds.F16}
    for name, tensor, dtype in tensors:
        size = tensor.numel() * dtype.itemsize
        writer.add_tensor_info(
            name, list(tensor.shape), np.dtype(np.float32), size, raw_dtype=there[dtype]
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, tensor, dtype in tensors:
            writer.write_tensor_data(
                tensor.detach().cpu().to(dtype).contiguous().view(torch.uint8).numpy()
            )
    finally:
        writer.close()


@torch.no_grad()
def read_back(base: CausalLM, form: GGUFArchitecture, file: Path) -> None:
    """Give the base the weights that lie in `file`, each row in its place again."""
    gguf = library()
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for name, there, tensor in _parameters(base, form):
        stored = held[there]
        values = torch.from_numpy(
            np.array(gguf.quants.dequantize(stored.data, stored.tensor_type))
        ).view(tensor.shape)
        order = form.order(name, len(tensor))
        tensor.copy_(values if order is None else values[order.argsort()])


# ---- an adapter alone


def export_adapter(settings: ExportSettings, file: Path) -> ExportResult:
    """Write a lora to `file`, to be used with the base's own GGUF; returns its strength and how many layers it has.

    llama.cpp scales every layer by alpha / r with one alpha. It gets the real one of the first layer (alpha * sqrt(r)
    under rsLoRA); what other layers differ from it lies in their B.
    """
    gguf = library()
    source, config = _source(settings)
    form = gguf_architecture(
        config, recorded_base(source.part.folder).get("name") or str(settings.base)
    )
    first = source.config.target_modules[0]
    alpha = source.config.scale_of(first) * source.config.rank_of(first)
    tensors: list[tuple[str, Tensor, torch.dtype]] = []
    for path in source.config.target_modules:
        there, low = form.name(f"{path}.weight"), source.low_rank_update(path)
        if low is None:
            raise _not_low(source)
        if (
            there is None
            or there == "token_embd.weight"
            or (there == "output.weight" and form.tied)
        ):
            why = f"{path} is adapted, and llama.cpp takes no lora there on this base"
            raise AdapterError(
                "this adapter cannot be written as GGUF",
                where=str(source.part.folder),
                why=why,
                hint=MERGED,
            )
        b = (
            low.b * (low.rank / alpha) if alpha else low.b
        )  # an alpha of 0 means there that nothing is scaled
        order = form.order(f"{path}.weight", len(b))
        tensors.append((f"{there}.lora_a", low.a, torch.float32))
        tensors.append((f"{there}.lora_b", b if order is None else b[order], torch.float32))
    with atomic_file(file) as beside:
        writer = gguf.GGUFWriter(beside, form.family)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(source.name)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_string("afina.adapter", source.hash)
        _write(writer, gguf, tensors)
    return ExportResult(
        out=str(file),
        format="gguf-lora",
        adapter=source.hash,
        alpha=alpha,
        layers=len(tensors) // 2,
    )


def _source(settings: ExportSettings) -> tuple[AdapterSource, PretrainedConfig]:
    """The adapter, and its base's configuration; raises `AdapterError` where it is more than low-rank updates everywhere."""
    if settings.adapter is None:
        raise SettingsError(
            "which adapter?", where="adapter", hint="afina export RUN --format gguf-lora"
        )
    parts = _parts(settings.adapter)
    if len(parts) > 1 or parts[0].weight != 1.0:
        hint = "make one adapter of them: afina combine ... --merge-method svd"
        raise AdapterError(
            "this takes one adapter, and these are several, or weighted",
            where=str(settings.adapter),
            hint=hint,
        )
    folder = parts[0].folder
    source = AdapterSource.open(parts[0])
    spec = source.config
    if spec.modules_to_save or spec.trainable_tokens:
        owned = next(iter(spec.modules_to_save or spec.trainable_tokens))
        raise AdapterError(
            f"this adapter owns {owned!r}",
            where=str(folder),
            why="GGUF holds updates only",
            hint=MERGED,
        )
    if spec.invocation:
        why = (
            "it acts from its invocation on, and llama.cpp's library applies a lora to every token"
        )
        raise AdapterError(
            "an activated adapter cannot be written as GGUF",
            where=str(folder),
            why=why,
            hint="afina generate",
        )
    if not source.is_low_rank:
        raise _not_low(source)
    base = recorded_base(folder)
    name = settings.base or base.get("name")
    if name is None:
        raise AdapterError(
            "this adapter does not say what it was trained on",
            where=str(folder),
            hint="--base PATH",
        )
    revision = settings.revision or (None if settings.base else base.get("revision"))
    return source, load_config(resolve_model_dir(name, revision), name, settings.trust_remote_code)


def _parts(run: Path) -> list[WeightedAdapter]:
    """The adapters that `run` means, with their weights."""
    return [
        part
        for folder, weight in parse_weighted_list(run)
        for part in expand_composition(folder, weight)
    ]


def _not_low(source: AdapterSource) -> MergeError:
    why = f"{source.config.method} is more than a product of two thin matrices, and llama.cpp knows those only"
    hint = f"afina extract {source.part.folder} --max-rank 16 --output-dir LORA, then export LORA; or {MERGED}"
    return MergeError(
        "this adapter cannot be written as GGUF", where=str(source.part.folder), why=why, hint=hint
    )
