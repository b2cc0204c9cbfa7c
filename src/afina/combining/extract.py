"""`afina extract`: a low-rank adapter out of any adapter (mora, dora, full, a composition), or out of a tuned model.

    D = merged(W) - W        or        D = W_tuned - W_base
    D ~ B A                  by SVD, each layer with the rank given or with the least that keeps the share of ||D||^2

What is no matrix (norms, biases) has no low-rank form: it is left out and named with the size of its change. The loss
with the extracted adapter is measured beside the original's and the base's.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afina.base.load import check_folder, find_folder, load_base
from afina.base.model import Base
from afina.combining.algebra import Kept, best
from afina.combining.lowrank import Low, cut_dense
from afina.combining.parts import all_paths, open_sources, with_base
from afina.combining.stream import Reader
from afina.combining.write import Form, base_config, form_of, form_of_layer, parent_config, write_lora
from afina.config import ExtractSettings, make_settings
from afina.data.formats import read_table
from afina.data.template import Example, Renderer
from afina.delta.attach import frozen_module
from afina.delta.composition import same_base
from afina.delta.files import load_adapter, read_run
from afina.delta.layers import Layer, as_matrix
from afina.errors import AdapterError, SettingsError
from afina.judge.evaluate import HELD_OUT
from afina.judge.losses import BATCH_TOKENS, general_examples
from afina.objective.language import choose, make_examples, mean_loss
from afina.route.invocation import Route

Layers = Iterator[tuple[str, Low, Form]]


def extract(run: str | Path | ExtractSettings | None = None, **values: Any) -> dict[str, Any]:
    """Write a lora to `out` from `run` (any adapter), or from the models `base` and `tuned`.

    Returns its hash, ranks, the energy kept, what was left out, and the losses of base, original and extract.
    """
    settings = run if isinstance(run, ExtractSettings) else make_settings(ExtractSettings, {"run": run, **values})
    if settings.out.exists() and (not settings.out.is_dir() or any(settings.out.iterdir())):
        raise SettingsError("this folder is not empty", where=str(settings.out), hint="choose another --out")
    if settings.rank is None and settings.energy is None:
        raise SettingsError("how much is to be kept?", where="rank", hint="--rank 16, or --energy 0.9, or both")
    if (settings.run is None) == (settings.tuned is None):
        raise SettingsError("one thing to extract from", where="run", hint="a run, or --base MODEL --tuned MODEL")
    kept, left_out = Kept(), dict[str, float]()
    if settings.run is not None:
        written, losses = _from_run(settings, settings.run, kept, left_out)
    else:
        written, losses = _from_models(settings, kept, left_out)
    return {"out": str(settings.out), **written, **kept.summary(), "left_out": left_out, "loss": losses}


def _from_run(
    settings: ExtractSettings, run: Path, kept: Kept, left_out: dict[str, float]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what was written, losses) from an adapter or a composition."""
    sources = open_sources([run])
    if len({source.spec.invocation for source in sources}) > 1:
        raise AdapterError("its parts begin to act at different places", where=str(run), hint="serve the composition as it is")
    told = same_base([source.part for source in sources])
    base = with_base(sources, settings)
    assert isinstance(base, Base)

    def layers() -> Layers:
        for path, here in all_paths(sources):
            made = best(path, here, settings.rank, settings.energy)
            if made is None:
                left_out[path] = _change(base, path, sources[0].attached)
            elif float(made.low.b.abs().max()) > 0:
                kept.energy[path] = made.energy
                yield path, made.low, form_of(path, here)

    paths = list(dict.fromkeys(path for source in sources for path in source.spec.targets))
    story = {"parents": [source.as_parent() for source in sources], "combination": _recipe(settings)}
    written = _write(settings, layers(), paths, parent_config(sources), told, story, sources[0].spec.invocation)
    for source in sources:
        if source.attached is not None:
            _leave_biases(source.attached, left_out)
    examples, what = _rows(settings, base, run)
    routes = [
        replace((source.attached or load_adapter(source.part.folder, base, f"whole{number}")).route, weight=source.weight)
        for number, source in enumerate(sources)
    ]
    return written, _losses(base, examples, what, Route.together(routes), settings.out)


def _change(base: Base, path: str, attached: Any) -> float:
    """||change|| / ||base|| of a trained module that is no matrix."""
    before = dict(frozen_module(base.model, path).named_parameters())
    after = dict(attached.deltas[path].named_parameters()) if attached is not None else {}
    return max((_relative(after[name], before[name]) for name in after if name in before), default=0.0)


def _relative(after: Tensor, before: Tensor) -> float:
    return float((after.detach().double() - before.double()).norm() / before.double().norm().clamp_min(1e-12))


def _leave_biases(attached: Any, left_out: dict[str, float]) -> None:
    """Note trained biases that changed."""
    for path, delta in attached.deltas.items():
        bias = getattr(delta, "bias", None)
        before = getattr(delta.layer.module, "bias", None)
        if isinstance(bias, Tensor) and isinstance(before, Tensor) and not torch.equal(bias, before):
            left_out[f"{path}.bias"] = _relative(bias, before)


def _from_models(settings: ExtractSettings, kept: Kept, left_out: dict[str, float]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what was written, losses) from two model folders, read tensor by tensor."""
    assert settings.tuned is not None
    if settings.base is None:
        raise SettingsError("the model that it was tuned from", where="base", hint="--base MODEL --tuned MODEL")
    shared = (settings.revision, settings.trust_remote_code, settings.dtype, settings.device)
    base = load_base(settings.base, *shared)
    before, after = _tensors(settings.base, settings.revision), _tensors(str(settings.tuned), None)
    if set(before) != set(after) or any(before[n].entries[n]["shape"] != after[n].entries[n]["shape"] for n in before):
        raise AdapterError("these two models have different tensors", where=f"{settings.base}, {settings.tuned}")
    modules = dict(base.model.named_modules())
    head = next((path for path, module in modules.items() if module is base.model.get_output_embeddings()), None)

    def layers() -> Layers:
        for name in before:
            old, new = before[name][name].double(), after[name][name].double()
            if torch.equal(old, new):
                continue
            path = name.removesuffix(".weight")
            if path not in modules or not Layer(path, modules[path]).is_matrix:
                left_out[name] = _relative(new, old)
                continue
            made = cut_dense(as_matrix(modules[path], new - old), settings.rank, settings.energy)
            kept.energy[path] = made.energy
            yield path, made.low, form_of_layer(Layer(path, modules[path]))
            if head is not None and head != path and modules[head].weight is modules[path].weight:  # tied: both changed
                yield head, Low(made.low.a.T, made.low.b.T), form_of_layer(Layer(head, modules[head]))

    story = {"parents": [{"name": str(settings.tuned), "hash": None, "weight": 1.0, "method": "model"}],
             "combination": _recipe(settings)}  # fmt: skip
    told = {"name": base.name, "revision": base.revision, "hash": base.hash, "storage": "plain"}
    paths = [name.removesuffix(".weight") for name in before] + ([head] if head else [])
    written = _write(settings, layers(), paths, base_config(base, [p for p in paths if p in modules]), told, story, ())
    examples, what = _rows(settings, base, None)
    losses = _losses(base, examples, what, None, settings.out)
    losses["original"] = mean_loss(load_base(str(settings.tuned), None, *shared[1:]), examples, BATCH_TOKENS, None)
    return written, losses


def _tensors(name: str, revision: str | None) -> dict[str, Reader]:
    """The file that holds each tensor of a model."""
    readers = [Reader(file) for file in check_folder(find_folder(name, revision))]
    return {tensor: reader for reader in readers for tensor in reader.entries}


def _write(
    settings: ExtractSettings, layers: Layers, paths: list[str], config: dict[str, Any], base: dict[str, Any],
    story: dict[str, Any], invocation: tuple[int, ...],
) -> dict[str, Any]:  # fmt: skip
    digest, spec = write_lora(settings.out, layers, paths, config, base, story, invocation)
    ranks = [spec.rank_of(path) for path in spec.targets]
    return {"hash": digest, "layers": len(ranks), "rank": {"least": min(ranks), "most": max(ranks)}}


def _recipe(settings: ExtractSettings) -> dict[str, Any]:
    return {"how": "extract", "rank": settings.rank, "energy": settings.energy}


def _rows(settings: ExtractSettings, base: Base, run: Path | None) -> tuple[list[Example], str]:
    """(rows on which the loss is measured, what they are)."""
    file = settings.data or (run / HELD_OUT if run is not None and (run / HELD_OUT).is_file() else None)
    if file is None:
        return general_examples(base), "general text"
    rows = read_table(file, settings.columns).rows
    template = read_run(run).get("settings", {}).get("template") if run is not None else None
    renderer = Renderer(base.tokenizer, template, min(base.context, 2048))
    return make_examples(choose("auto", rows), renderer, rows, None), str(file)


def _losses(base: Base, examples: list[Example], what: str, original: Route | None, out: Path) -> dict[str, Any]:
    """Nats a token on `examples` of the base, the original (where it is on the base) and the extract."""
    made = load_adapter(out, base, "extract")
    routes = {"base": None, "extract": made.route} | ({"original": original} if original is not None else {})
    return {"rows": what} | {name: mean_loss(base, examples, BATCH_TOKENS, route) for name, route in routes.items()}

