"""A whole merged model, with proof: the base's weights with the adapter taken in, as a plain Hugging Face folder.

Merging rounds to the base's dtype, so the merged model is compared with the adapted one on probe text: largest
difference of a logit, share of positions with the same likeliest token. Over tolerance nothing is kept.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from afina.base.load import load_base
from afina.base.model import Base
from afina.config import ExportSettings, MergeSettings, make_settings
from afina.delta.attach import Adapter, detach, frozen_module
from afina.delta.files import adapter_folder, load_adapter, read_json
from afina.delta.layers import as_stored
from afina.disk import new_folder, write_json
from afina.engine.generate import base_of
from afina.errors import MergeError, SettingsError
from afina.judge.losses import general_examples
from afina.segments import Segments

PROBE_TOKENS = 512
# largest difference of a logit, as a share of the spread (standard deviation) of the logits: float32 rounds in the
# order of its operations only, bfloat16 keeps 8 bits of every merged weight
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}
AGREEMENT = {torch.float32: 0.995, torch.bfloat16: 0.95}


def merge(run: str | Path | MergeSettings, **values: Any) -> dict[str, Any]:
    """Write base + adapter as one model to `out`; returns the proof: largest logit difference, greedy agreement.

    Raises `MergeError`, leaving nothing behind, where the merged model is not the adapted one within `tolerance`.
    """
    settings = run if isinstance(run, MergeSettings) else make_settings(MergeSettings, {"run": Path(run), **values})
    _check_out(settings.out)
    name, revision = base_of(settings.run, settings.base)
    base = load_base(name, settings.revision or revision, settings.trust_remote_code, settings.dtype, settings.device)
    adapter = load_adapter(settings.run, base, allow_other_base=settings.allow_other_base)
    if adapter.spec.invocation:
        why = "it acts from its invocation on, and a merged weight acts on every token"
        raise MergeError("an activated adapter cannot be merged", where=str(settings.run), why=why, hint="serve it unmerged")
    probe = _probe(base)
    with base.board.route(Segments.all(adapter.name)), torch.no_grad():
        adapted = base.run_logits(*probe)
    with new_folder(settings.out) as folder:
        take_in(base, adapter)
        base.model.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
        merged = load_base(str(folder), dtype=str(base.dtype).removeprefix("torch."), device=base.device.type,
                           trust_remote_code=settings.trust_remote_code)  # fmt: skip
        proof = compare(adapted, merged, probe)
        _judge(proof, base.dtype, settings.tolerance)
        about = {"base": name, "adapter": read_json(adapter_folder(settings.run) / "afina.json").get("hash")
                 if (adapter_folder(settings.run) / "afina.json").is_file() else None}  # fmt: skip
        write_json(folder / "merge.json", about | proof)
    return {"out": str(settings.out), **about, **proof}


def export(run: str | Path | ExportSettings, **values: Any) -> dict[str, Any]:
    """What other tools read: the merged model ("hf"), or the adapter alone in PEFT's files ("peft")."""
    settings = run if isinstance(run, ExportSettings) else make_settings(ExportSettings, {"run": Path(run), **values})
    if settings.format == "hf":
        fields = {name: getattr(settings, name) for name in MergeSettings.model_fields}
        return {"format": "hf"} | merge(MergeSettings(**fields))
    _check_out(settings.out)
    source = adapter_folder(settings.run)
    kind = read_json(source / "adapter_config.json").get("peft_type")
    if kind != "LORA":
        raise SettingsError(f"PEFT does not know adapters of type {kind}", where=str(source), hint="--format hf")
    with new_folder(settings.out) as folder:
        for file in sorted(source.iterdir()):
            if file.name in ("adapter_config.json", "adapter_model.safetensors", "afina.json", "README.md"):
                shutil.copy2(file, folder / file.name)
    return {"format": "peft", "out": str(settings.out), "adapter": str(source)}


def _check_out(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SettingsError("this folder is not empty", where=str(out), hint="choose another --out")


@torch.no_grad()
def take_in(base: Base, adapter: Adapter) -> None:
    """Merge `adapter` into the weights of `base`, in place, and detach it.

    Sums are made in float32 and rounded once to the base's dtype. Where the output layer is tied to the embedding and
    only one of them changed, or each changed in its own way, the tie is cut and said so in the configuration.
    """
    model = base.model
    detached = {path: (frozen_module(model, path), delta) for path, delta in adapter.deltas.items()}
    changed: dict[int, Tensor] = {}
    detach(model, adapter)
    for path, (module, delta) in detached.items():
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        if delta.replaces:
            _replace(module, delta, changed)
            continue
        _untie(model, path)
        matrix = as_stored(module, weight.detach().float())
        module.weight = nn.Parameter(as_stored(module, delta.merged(matrix)).to(weight.dtype), requires_grad=False)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight and model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = False


def _replace(module: nn.Module, delta: nn.Module, changed: dict[int, Tensor]) -> None:
    """Put the trained parameters in the module's place; a tied one stays tied to its twin."""
    for name, parameter in delta.named_parameters():
        if id(parameter) not in changed:
            changed[id(parameter)] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        setattr(module, name, changed[id(parameter)])


def _untie(model: nn.Module, path: str) -> None:
    """Give the output layer at `path` a weight of its own, if it shares the embedding's."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is model.get_submodule(path) and head.weight is model.get_input_embeddings().weight:  # type: ignore[operator]
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)


def _probe(base: Base) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Probe text as a flat run of one sequence: tokens, positions, bounds."""
    tokens: list[int] = []
    for example in general_examples(base, None):
        tokens += example.tokens
    tokens = tokens[: min(PROBE_TOKENS, base.context)]
    return torch.tensor(tokens, device=base.device), torch.arange(len(tokens), device=base.device), (0, len(tokens))


@torch.no_grad()
def compare(adapted: Tensor, merged: Base, probe: tuple[Tensor, Tensor, tuple[int, ...]]) -> dict[str, float]:
    """Merged against adapted logits (T, V): largest difference, the same as a share of their spread, agreement."""
    logits = merged.run_logits(*probe)
    difference = float((logits - adapted).abs().max())
    agree = float((logits.argmax(-1) == adapted.argmax(-1)).float().mean())
    return {
        "max_logit_difference": difference,
        "relative_difference": difference / float(adapted.std()),
        "greedy_agreement": agree,
        "probe_tokens": len(probe[0]),
    }


def _judge(proof: dict[str, float], dtype: torch.dtype, tolerance: float | None) -> None:
    over = (
        proof["max_logit_difference"] > tolerance
        if tolerance is not None
        else proof["relative_difference"] > TOLERANCE[dtype] or proof["greedy_agreement"] < AGREEMENT[dtype]
    )
    if over or proof["max_logit_difference"] != proof["max_logit_difference"]:
        raise MergeError(
            "the merged model would not answer as the adapted one",
            why=f"largest difference of a logit {proof['max_logit_difference']:.4g}, "
            f"same likeliest token at {100 * proof['greedy_agreement']:.1f}% of positions",
            hint="--dtype float32 keeps more; or serve the adapter unmerged; or allow more with --tolerance",
        )
