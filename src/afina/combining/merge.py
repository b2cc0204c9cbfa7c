"""A whole merged model, with proof: the base's weights with the adapter taken in, as a plain Hugging Face folder.

Merging rounds to the base's dtype, so the merged model is compared with the adapted one on probe text: largest
difference of a logit, share of positions with the same likeliest token. Over tolerance nothing is kept.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from afina.base.classifier import IMAGE_CONFIG, Classifier, load_classifier, load_masked
from afina.base.frozen import Frozen
from afina.base.load import load_base
from afina.base.model import Base
from afina.base.nf4 import write_out
from afina.config import ExportSettings, MergeSettings, make_settings
from afina.delta.attach import Adapter, detach, frozen_module
from afina.delta.files import adapter_folder, read_json, read_story
from afina.delta.layers import Loose, as_matrix, as_stored
from afina.delta.opening import open_run
from afina.disk import new_folder, write_json
from afina.errors import MergeError, SettingsError
from afina.judge.losses import GENERAL, general_examples
from afina.route.invocation import Route
from afina.segments import BASE, Segments

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
    opened = open_run(settings.run, settings, allow_other_base=settings.allow_other_base)
    base, adapter = opened.base, opened.adapter
    assert adapter is not None
    if adapter.spec.invocation:
        why = "it acts from its invocation on, and a merged weight acts on every token"
        raise MergeError("an activated adapter cannot be merged", where=str(settings.run), why=why, hint="serve it unmerged")
    probe = _probe(base)
    adapted = _logits(base, probe, adapter.route)
    with new_folder(settings.out) as folder:
        take_in(base, adapter)
        base.model.save_pretrained(folder)
        _copy_reading(base, folder)
        merged = _reload(base, folder, settings)
        proof = compare(adapted, _logits(merged, probe, None))
        _judge(proof, base.dtype, settings.tolerance)
        about = {"base": base.name, "adapter": read_story(adapter_folder(settings.run)).get("hash")}
        write_json(folder / "merge.json", about | proof)
    return {"out": str(settings.out), **about, **proof}


def _copy_reading(base: Frozen, folder: Path) -> None:
    """What the model needs to read its input: the tokenizer, or how pictures are prepared."""
    tokenizer = getattr(base, "tokenizer", None)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if base.folder is not None and (base.folder / IMAGE_CONFIG).is_file():
        shutil.copy2(base.folder / IMAGE_CONFIG, folder / IMAGE_CONFIG)


def _reload(base: Frozen, folder: Path, settings: MergeSettings) -> Frozen:
    """The merged model as a stranger would load it."""
    how = {"trust_remote_code": settings.trust_remote_code, "dtype": str(base.dtype).removeprefix("torch."),
           "device": base.device.type}  # fmt: skip
    if not isinstance(base, Classifier):
        return load_base(str(folder), **how)  # type: ignore[arg-type]
    if base.labels:
        return load_classifier(str(folder), base.labels, base.images is not None, **how)  # type: ignore[arg-type]
    return load_masked(str(folder), **how)  # type: ignore[arg-type]


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
def take_in(base: Frozen, adapter: Adapter) -> None:
    """Merge `adapter` into the weights of `base`, in place, and detach it.

    Sums are made in float32 and rounded once to the base's dtype; layers held in 4 bits are written out in that dtype, so
    that the merged model is what the adapter was trained on. Where the output layer is tied to the embedding and only one
    of them changed, or each changed in its own way, the tie is cut and said so in the configuration.
    """
    model: Any = base.model
    deltas = adapter.deltas
    detach(model, adapter)
    write_out(model)
    changed: dict[int, Tensor] = {}
    for path, delta in deltas.items():
        if delta.replaces:
            _replace(model, path, delta, changed)
            continue
        module = model.get_submodule(path)
        _untie(model, path)
        merged = delta.merged(as_matrix(module, module.weight.detach().float()))
        module.weight = nn.Parameter(as_stored(module, merged).to(module.weight.dtype), requires_grad=False)
    head, embedding = model.get_output_embeddings(), _embedding(model)
    if head is not None and embedding is not None and getattr(model.config, "tie_word_embeddings", False):
        model.config.tie_word_embeddings = head.weight is embedding.weight


def _embedding(model: Any) -> Any:
    try:
        return model.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # image models have none
        return None


def _replace(model: nn.Module, path: str, delta: nn.Module, changed: dict[int, Tensor]) -> None:
    """Put the trained parameters in the module's place; a tied one stays tied to its twin."""
    loose = isinstance(frozen_module(model, path), Loose)
    owner = model.get_submodule(path.rpartition(".")[0] if loose else path)
    for name, parameter in delta.named_parameters():
        if id(parameter) not in changed:
            changed[id(parameter)] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        setattr(owner, path.rpartition(".")[2] if loose else name, changed[id(parameter)])


def _untie(model: Any, path: str) -> None:
    """Give the output layer at `path` a weight of its own, if it shares the embedding's."""
    head, embedding = model.get_output_embeddings(), _embedding(model)
    if head is not None and embedding is not None and head is model.get_submodule(path) and head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)


def _probe(base: Frozen) -> Any:
    """Something to compare on: general text as one flat run, as rows for encoders, or noise for image models."""
    if isinstance(base, Base):
        tokens = [token for example in general_examples(base) for token in example.tokens][: min(PROBE_TOKENS, base.context)]
        return torch.tensor(tokens, device=base.device), torch.arange(len(tokens), device=base.device), (0, len(tokens))
    assert isinstance(base, Classifier)
    if base.images is not None:
        shape = (16, len(base.images.mean), *base.images.size)
        return base.batch(list(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
    assert base.tokenizer is not None
    texts = [line for line in GENERAL.read_text(encoding="utf-8").splitlines() if len(line) > 20][:16]
    return base.batch([base.tokenizer(text)["input_ids"][: base.context] for text in texts])


@torch.no_grad()
def _logits(base: Frozen, probe: Any, route: Route | None) -> Tensor:
    """Logits (..., classes) of the probe under `route`."""
    everywhere = BASE if route is None else Segments.all(route.adapter)
    with base.board.route(everywhere):
        if isinstance(base, Base):
            return base.run_logits(*probe)
        assert isinstance(base, Classifier)
        return base.logits(probe).flatten(0, -2)


def compare(adapted: Tensor, logits: Tensor) -> dict[str, float]:
    """Merged against adapted logits (n, classes): largest difference, the same as a share of their spread, agreement."""
    difference = float((logits - adapted).abs().max())
    agree = float((logits.argmax(-1) == adapted.argmax(-1)).float().mean())
    return {
        "max_logit_difference": difference,
        "relative_difference": difference / float(adapted.std()),
        "greedy_agreement": agree,
        "probe_tokens": len(logits),
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
