"""`afina extract`: a low-rank adapter from any adapter, or from a fine-tuned model and its base.

    D = merged(W) - W        or        D = W_tuned - W_base
    D ~ B A                  by SVD; each module has the rank that is set, or the smallest that
                             retains the ratio `retained_energy` of ||D||^2

Parameters that are not matrices (norms, biases) have no low-rank form: they are left out and
listed with their relative change. The losses of base, original and extract are measured.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afina.adapters.active import BASE_ONLY, ActiveAdapters
from afina.adapters.attach import frozen_module
from afina.adapters.loading import load_adapter
from afina.adapters.target_module import TargetModule, as_matrix
from afina.data.renderer import Example, Renderer
from afina.data.schemas import SFT
from afina.data.table import read_table
from afina.errors import AdapterError, SettingsError
from afina.evaluation.retention import retention_examples
from afina.io.atomic import require_new_directory
from afina.io.chat_format import ChatFormat
from afina.io.composition import common_base
from afina.io.run_record import read_run_record
from afina.merging.combine import RetainedEnergy, best_low_rank
from afina.merging.low_rank import LowRankUpdate, truncate_dense
from afina.merging.results import ExtractResult
from afina.merging.sources import adapted_modules, attach_to_base, chat_record, open_sources
from afina.merging.stream import TensorReader
from afina.merging.write import (
    LoRATensorLayout,
    PeftContext,
    base_config,
    layout_of_module,
    parent_config,
    tensor_layout,
    write_lora,
)
from afina.models.causal_lm import CausalLM
from afina.models.loading import checked_weight_files, load_base, resolve_model_dir
from afina.objectives.language_data import infer_objective, tokenize_rows
from afina.objectives.language_modeling import mean_loss
from afina.objectives.prepared import BATCH_TOKENS, recorded_eval_rows
from afina.settings import ExtractSettings, as_settings

Layers = Iterator[tuple[str, LowRankUpdate, LoRATensorLayout]]


def extract(run: str | Path | ExtractSettings | None = None, **values: Any) -> ExtractResult:
    """Write a LoRA extracted from an adapter, or from the difference of two models.

    Args:
        run: A run, an adapter or a composition; None for `base` and `finetuned_model`.
        values: Settings of `afina extract`.

    Returns:
        Hash, ranks, retained energy, what was left out, and losses in nats per token.

    Raises:
        SettingsError: Rank and energy are missing, or not exactly one source is given.
        AdapterError: The parts are active on different tokens, or the models have other tensors.
    """
    settings = as_settings(ExtractSettings, run, "adapter", values)
    require_new_directory(settings.output_dir)
    if settings.max_rank is None and settings.retained_energy is None:
        raise SettingsError(
            "neither a rank nor an energy is set",
            where="max_rank",
            hint="--max-rank 16, or --retained-energy 0.9, or both",
        )
    if (settings.adapter is None) == (settings.finetuned_model is None):
        raise SettingsError(
            "exactly one source is needed",
            where="adapter",
            hint="a run, or --base MODEL --finetuned-model MODEL",
        )
    kept, left_out = RetainedEnergy(), dict[str, float]()
    if settings.adapter is not None:
        written, losses = _from_run(settings, settings.adapter, kept, left_out)
    else:
        written, losses = _from_models(settings, str(settings.finetuned_model), kept, left_out)
    return ExtractResult(
        out=str(settings.output_dir),
        **written,
        **kept.summary(),
        left_out=left_out,
        loss=losses,
    )


def _from_run(
    settings: ExtractSettings, run: Path, kept: RetainedEnergy, left_out: dict[str, float]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Extract from an adapter or a composition; return what was written, and the losses."""
    sources = open_sources([run])
    if len({source.config.invocation for source in sources}) > 1:
        raise AdapterError(
            "its parts have different invocations",
            where=str(run),
            hint="serve the composition as it is",
        )
    recorded = common_base([source.part for source in sources])
    base = attach_to_base(sources, settings)
    assert isinstance(base, CausalLM)

    def layers() -> Layers:
        for path, here in adapted_modules(sources):
            update = best_low_rank(path, here, settings.max_rank, settings.retained_energy)
            if update is None:
                left_out[path] = _change(base, path, sources[0].attached)
            elif float(update.low.b.abs().max()) > 0:
                kept.retained_energy[path] = update.retained_energy
                yield path, update.low, tensor_layout(path, here)

    paths = list(dict.fromkeys(path for source in sources for path in source.config.target_modules))
    parents = [source.lineage_entry() for source in sources]
    invocation = sources[0].config.invocation
    context = parent_config(sources)
    chat = chat_record(sources)
    written = _write(settings, layers(), paths, context, recorded, parents, invocation, chat)
    for source in sources:
        if source.attached is not None:
            _list_biases(source.attached, left_out)
    routes = [
        (
            source.attached or load_adapter(source.part.folder, base, f"original{number}")
        ).active.scaled(source.weight)
        for number, source in enumerate(sources)
    ]
    return written, _losses(settings, base, run, ActiveAdapters.combine(routes))


def _change(base: CausalLM, path: str, attached: Any) -> float:
    """Return ||change|| / ||base|| of a trained module that is no matrix."""
    before = dict(frozen_module(base.model, path).named_parameters())
    after = dict(attached.layers[path].named_parameters()) if attached is not None else {}
    return max(
        (_relative(after[name], before[name]) for name in after if name in before), default=0.0
    )


def _relative(after: Tensor, before: Tensor) -> float:
    norm = before.double().norm().clamp_min(1e-12)
    return float((after.detach().double() - before.double()).norm() / norm)


def _list_biases(attached: Any, left_out: dict[str, float]) -> None:
    """Add trained biases that changed."""
    for path, layer in attached.layers.items():
        after, before = getattr(layer, "bias", None), getattr(layer.layer.module, "bias", None)
        if after is not None and before is not None and not torch.equal(after, before):
            left_out[f"{path}.bias"] = _relative(after, before)


def _from_models(
    settings: ExtractSettings, finetuned: str, kept: RetainedEnergy, left_out: dict[str, float]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Extract from two models, read tensor by tensor; return what was written, and the losses."""
    if settings.base is None:
        raise SettingsError(
            "the base of the fine-tuned model is missing",
            where="base",
            hint="--base MODEL --finetuned-model MODEL",
        )
    shared = (settings.revision, settings.trust_remote_code, settings.dtype, settings.device)
    base = load_base(settings.base, *shared)
    modules = dict(base.model.named_modules())
    output = base.model.get_output_embeddings()
    heads = [path for path, module in modules.items() if module is output][:1]

    def layers() -> Layers:
        for name, old, new in _changed_tensors(settings, finetuned):
            path = name.removesuffix(".weight")
            module = TargetModule(path, modules[path]) if path in modules else None
            if module is None or not module.is_matrix:
                left_out[name] = _relative(new, old)
                continue
            difference = as_matrix(modules[path], new - old)
            update = truncate_dense(difference, settings.max_rank, settings.retained_energy)
            kept.retained_energy[path] = update.retained_energy
            yield path, update.low, layout_of_module(module)
            for head in heads:
                if head != path and modules[head].weight is modules[path].weight:  # tied weights
                    tied = LowRankUpdate(update.low.a.T, update.low.b.T)
                    yield head, tied, layout_of_module(TargetModule(head, modules[head]))

    parents = [{"name": finetuned, "hash": None, "weight": 1.0, "method": "model"}]
    recorded = {"name": base.name, "revision": base.revision, "hash": base.hash, "storage": "plain"}
    paths = [path for path in modules if hasattr(modules[path], "weight")]
    context = base_config(base, paths)
    written = _write(settings, layers(), paths, context, recorded, parents, (), {})
    losses = _losses(settings, base, None, BASE_ONLY)
    tuned = load_base(finetuned, None, *shared[1:])
    examples, _ = _rows(settings, base, None)
    return written, losses | {"original": mean_loss(tuned, examples, BATCH_TOKENS, BASE_ONLY)}


def _changed_tensors(
    settings: ExtractSettings, finetuned: str
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield name, base and fine-tuned value (float64) of each tensor that differs.

    Raises:
        AdapterError: The two models have different tensors.
    """
    assert settings.base is not None
    before, after = _tensors(settings.base, settings.revision), _tensors(finetuned, None)
    shapes = [{name: one[name].entries[name].shape for name in one} for one in (before, after)]
    if shapes[0] != shapes[1]:
        raise AdapterError(
            "these two models have different tensors", where=f"{settings.base}, {finetuned}"
        )
    for name in before:
        old, new = before[name][name].double(), after[name][name].double()
        if not torch.equal(old, new):
            yield name, old, new


def _tensors(name: str, revision: str | None) -> dict[str, TensorReader]:
    """Return the reader of the file that contains each tensor of a model."""
    readers = [
        TensorReader(file) for file in checked_weight_files(resolve_model_dir(name, revision))
    ]
    return {tensor: reader for reader in readers for tensor in reader.entries}


def _write(
    settings: ExtractSettings,
    layers: Layers,
    paths: list[str],
    context: PeftContext,
    base: dict[str, Any],
    parents: list[dict[str, Any]],
    invocation: tuple[int, ...],
    chat: dict[str, Any],
) -> dict[str, Any]:
    recipe = {"how": "extract", "rank": settings.max_rank, "energy": settings.retained_energy}
    record = {"parents": parents, "combination": recipe} | chat
    digest, config = write_lora(
        settings.output_dir, layers, paths, context, base, record, invocation
    )
    ranks = [config.rank_of(path) for path in config.target_modules]
    return {"hash": digest, "layers": len(ranks), "rank": {"least": min(ranks), "most": max(ranks)}}


def _rows(
    settings: ExtractSettings, base: CausalLM, run: Path | None
) -> tuple[Sequence[Example], str]:
    """Return the rows on which losses are measured, and what they are."""
    kept = None if run is None else recorded_eval_rows(run)
    file = settings.data or (kept if kept is not None and kept.is_file() else None)
    if file is None:
        return retention_examples(base), "general text"
    rows = read_table(file, SFT, settings.columns).rows
    chat_format = (
        ChatFormat() if run is None else ChatFormat.from_record(read_run_record(run), str(run))
    )
    renderer = Renderer(base.tokenizer, chat_format, min(base.max_positions, 2048))
    return tokenize_rows(infer_objective("auto", rows), renderer, rows, None), str(file)


def _losses(
    settings: ExtractSettings, base: CausalLM, run: Path | None, original: ActiveAdapters
) -> dict[str, Any]:
    """Return the losses of base, extract and, where it is active on the base, the original.

    They are in nats per token, on the rows named in `rows`.
    """
    examples, what = _rows(settings, base, run)
    extracted = load_adapter(settings.output_dir, base, "extract").active
    sides = {"base": BASE_ONLY, "extract": extracted}
    if original:
        sides["original"] = original
    losses = {name: mean_loss(base, examples, BATCH_TOKENS, one) for name, one in sides.items()}
    return {"rows": what} | losses
