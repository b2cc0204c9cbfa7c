"""`afina extract`: a low-rank adapter out of any adapter (mora, dora, full, a composition), or out of a tuned model.

    D = merged(W) - W        or        D = W_tuned - W_base
    D ~ B A                  by SVD, each layer with the rank given or with the least that keeps the share of ||D||^2

What is no matrix (norms, biases) has no low-rank form: it is left out and named with the size of its change. The loss
with the extracted adapter is measured beside the original's and the base's.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afina.adapters.active import ActiveAdapters
from afina.adapters.attach import frozen_module
from afina.adapters.loading import load_adapter
from afina.adapters.target_module import TargetModule, as_matrix
from afina.data.renderer import Example, Renderer
from afina.data.schemas import SFT
from afina.data.table import read_table
from afina.errors import AdapterError, SettingsError
from afina.evaluation.retention import retention_examples
from afina.io.chat_format import ChatFormat
from afina.io.composition import common_base
from afina.io.run_record import read_run_record
from afina.merging.combine import RetainedEnergy, best_low_rank
from afina.merging.low_rank import LowRankUpdate, truncate_dense
from afina.merging.results import ExtractResult
from afina.merging.sources import adapted_modules, attach_to_base, open_sources
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
from afina.settings import ExtractSettings, make_settings

Layers = Iterator[tuple[str, LowRankUpdate, LoRATensorLayout]]


def extract(run: str | Path | ExtractSettings | None = None, **values: Any) -> ExtractResult:
    """Write a lora to `out` from `run` (any adapter), or from the models `base` and `tuned`.

    Returns its hash, ranks, the energy kept, what was left out, and the losses of base, original and extract.
    """
    settings = (
        run
        if isinstance(run, ExtractSettings)
        else make_settings(ExtractSettings, {"adapter": run, **values})
    )
    if settings.output_dir.exists() and (
        not settings.output_dir.is_dir() or any(settings.output_dir.iterdir())
    ):
        raise SettingsError(
            "this folder is not empty",
            where=str(settings.output_dir),
            hint="choose another --output-dir",
        )
    if settings.max_rank is None and settings.retained_energy is None:
        raise SettingsError(
            "how much is to be kept?", where="rank", hint="--rank 16, or --energy 0.9, or both"
        )
    if (settings.adapter is None) == (settings.finetuned_model is None):
        raise SettingsError(
            "one thing to extract from",
            where="adapter",
            hint="a run, or --base MODEL --finetuned-model MODEL",
        )
    kept, left_out = RetainedEnergy(), dict[str, float]()
    if settings.adapter is not None:
        written, losses = _from_run(settings, settings.adapter, kept, left_out)
    else:
        written, losses = _from_models(settings, kept, left_out)
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
    """(what was written, losses) from an adapter or a composition."""
    sources = open_sources([run])
    if len({source.config.invocation for source in sources}) > 1:
        raise AdapterError(
            "its parts begin to act at different places",
            where=str(run),
            hint="serve the composition as it is",
        )
    told = common_base([source.part for source in sources])
    base = attach_to_base(sources, settings)
    assert isinstance(base, CausalLM)

    def layers() -> Layers:
        for path, here in adapted_modules(sources):
            made = best_low_rank(path, here, settings.max_rank, settings.retained_energy)
            if made is None:
                left_out[path] = _change(base, path, sources[0].attached)
            elif float(made.low.b.abs().max()) > 0:
                kept.retained_energy[path] = made.retained_energy
                yield path, made.low, tensor_layout(path, here)

    paths = list(dict.fromkeys(path for source in sources for path in source.config.target_modules))
    story = {
        "parents": [source.lineage_entry() for source in sources],
        "combination": _recipe(settings),
    }
    written = _write(
        settings, layers(), paths, parent_config(sources), told, story, sources[0].config.invocation
    )
    for source in sources:
        if source.attached is not None:
            _leave_biases(source.attached, left_out)
    examples, what = _rows(settings, base, run)
    routes = [
        (source.attached or load_adapter(source.part.folder, base, f"whole{number}")).active.scaled(
            source.weight
        )
        for number, source in enumerate(sources)
    ]
    return written, _losses(
        base, examples, what, ActiveAdapters.combine(routes), settings.output_dir
    )


def _change(base: CausalLM, path: str, attached: Any) -> float:
    """||change|| / ||base|| of a trained module that is no matrix."""
    before = dict(frozen_module(base.model, path).named_parameters())
    after = dict(attached.layers[path].named_parameters()) if attached is not None else {}
    return max(
        (_relative(after[name], before[name]) for name in after if name in before), default=0.0
    )


def _relative(after: Tensor, before: Tensor) -> float:
    return float(
        (after.detach().double() - before.double()).norm() / before.double().norm().clamp_min(1e-12)
    )


def _leave_biases(attached: Any, left_out: dict[str, float]) -> None:
    """Note trained biases that changed."""
    for path, delta in attached.layers.items():
        bias = getattr(delta, "bias", None)
        before = getattr(delta.layer.module, "bias", None)
        if (
            isinstance(bias, Tensor)
            and isinstance(before, Tensor)
            and not torch.equal(bias, before)
        ):
            left_out[f"{path}.bias"] = _relative(bias, before)


def _from_models(
    settings: ExtractSettings, kept: RetainedEnergy, left_out: dict[str, float]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what was written, losses) from two model folders, read tensor by tensor."""
    assert settings.finetuned_model is not None
    if settings.base is None:
        raise SettingsError(
            "the model that it was tuned from",
            where="base",
            hint="--base MODEL --finetuned-model MODEL",
        )
    shared = (settings.revision, settings.trust_remote_code, settings.dtype, settings.device)
    base = load_base(settings.base, *shared)
    before, after = (
        _tensors(settings.base, settings.revision),
        _tensors(str(settings.finetuned_model), None),
    )
    if set(before) != set(after) or any(
        before[n].entries[n].shape != after[n].entries[n].shape for n in before
    ):
        raise AdapterError(
            "these two models have different tensors",
            where=f"{settings.base}, {settings.finetuned_model}",
        )
    modules = dict(base.model.named_modules())
    head = next(
        (path for path, module in modules.items() if module is base.model.get_output_embeddings()),
        None,
    )

    def layers() -> Layers:
        for name in before:
            old, new = before[name][name].double(), after[name][name].double()
            if torch.equal(old, new):
                continue
            path = name.removesuffix(".weight")
            if path not in modules or not TargetModule(path, modules[path]).is_matrix:
                left_out[name] = _relative(new, old)
                continue
            made = truncate_dense(
                as_matrix(modules[path], new - old), settings.max_rank, settings.retained_energy
            )
            kept.retained_energy[path] = made.retained_energy
            yield path, made.low, layout_of_module(TargetModule(path, modules[path]))
            if (
                head is not None and head != path and modules[head].weight is modules[path].weight
            ):  # tied: both changed
                yield (
                    head,
                    LowRankUpdate(made.low.a.T, made.low.b.T),
                    layout_of_module(TargetModule(head, modules[head])),
                )

    story = {
        "parents": [
            {"name": str(settings.finetuned_model), "hash": None, "weight": 1.0, "method": "model"}
        ],
        "combination": _recipe(settings),
    }
    told = {"name": base.name, "revision": base.revision, "hash": base.hash, "storage": "plain"}
    paths = [name.removesuffix(".weight") for name in before] + ([head] if head else [])
    written = _write(
        settings,
        layers(),
        paths,
        base_config(base, [p for p in paths if p in modules]),
        told,
        story,
        (),
    )
    examples, what = _rows(settings, base, None)
    losses = _losses(base, examples, what, None, settings.output_dir)
    losses["original"] = mean_loss(
        load_base(str(settings.finetuned_model), None, *shared[1:]), examples, BATCH_TOKENS, None
    )
    return written, losses


def _tensors(name: str, revision: str | None) -> dict[str, TensorReader]:
    """The file that holds each tensor of a model."""
    readers = [
        TensorReader(file) for file in checked_weight_files(resolve_model_dir(name, revision))
    ]
    return {tensor: reader for reader in readers for tensor in reader.entries}


def _write(
    settings: ExtractSettings,
    layers: Layers,
    paths: list[str],
    config: PeftContext,
    base: dict[str, Any],
    story: dict[str, Any],
    invocation: tuple[int, ...],
) -> dict[str, Any]:
    digest, spec = write_lora(settings.output_dir, layers, paths, config, base, story, invocation)
    ranks = [spec.rank_of(path) for path in spec.target_modules]
    return {"hash": digest, "layers": len(ranks), "rank": {"least": min(ranks), "most": max(ranks)}}


def _recipe(settings: ExtractSettings) -> dict[str, Any]:
    return {"how": "extract", "rank": settings.max_rank, "energy": settings.retained_energy}


def _rows(settings: ExtractSettings, base: CausalLM, run: Path | None) -> tuple[list[Example], str]:
    """(rows on which the loss is measured, what they are)."""
    kept = None if run is None else recorded_eval_rows(run)
    file = settings.data or (kept if kept is not None and kept.is_file() else None)
    if file is None:
        return retention_examples(base), "general text"
    rows = read_table(file, SFT, settings.columns).rows
    asked = ChatFormat() if run is None else ChatFormat.from_record(read_run_record(run), str(run))
    renderer = Renderer(base.tokenizer, asked, min(base.max_positions, 2048))
    return tokenize_rows(infer_objective("auto", rows), renderer, rows, None), str(file)


def _losses(
    base: CausalLM, examples: list[Example], what: str, original: ActiveAdapters | None, out: Path
) -> dict[str, Any]:
    """Nats a token on `examples` of the base, the original (where it is on the base) and the extract."""
    made = load_adapter(out, base, "extract")
    routes = {"base": None, "extract": made.active} | (
        {"original": original} if original is not None else {}
    )
    return {"rows": what} | {
        name: mean_loss(base, examples, BATCH_TOKENS, route) for name, route in routes.items()
    }
