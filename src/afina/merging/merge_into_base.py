"""A whole merged model, with proof: the base's weights with the adapter taken in, as a plain Hugging Face folder.

Merging rounds to the base's dtype, or to 4 bits where that is asked for, so the merged model is loaded again and compared
with the adapted one on probe text: how far its probabilities are (Kullback-Leibler divergence, nats a token), the share
of positions with the same likeliest token, what it loses on the text. Over tolerance nothing is kept.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from afina.adapters.active import ActiveAdapters
from afina.adapters.attach import Adapter, detach, frozen_module
from afina.adapters.load_run import load_run
from afina.adapters.segments import NO_ADAPTERS
from afina.adapters.target_module import FreeParameter, as_matrix, as_stored
from afina.data import RETENTION_TEXT
from afina.errors import MergeError, SettingsError
from afina.evaluation.retention import retention_examples
from afina.io.adapter_folder import adapter_folder
from afina.io.adapter_metadata import read_metadata
from afina.io.atomic import atomic_directory, write_json
from afina.io.verified_copy import verified_copies
from afina.merging.results import MergeResult
from afina.models.bnb_format import write_nf4
from afina.models.causal_lm import SCORE, CausalLM
from afina.models.classifier import Classifier, load_classifier, load_masked
from afina.models.frozen import FrozenModel
from afina.models.image_preprocessor import IMAGE_CONFIG
from afina.models.loading import load_base, silence_transformers
from afina.models.nf4 import dequantize_model, print_quantization, quantize_model
from afina.settings import MergeSettings, make_settings

PROBE_TOKENS = 512
# nats a token between the answers of the adapted and the merged model. On the embedded base a skill's adapter moves them by
# 0.12; merging by 1e-9 in float32, and by 0.001 in bfloat16, where computing the adapted model in bfloat16 moves them as far
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.01}
REQUANTISED = (
    0.1  # the same where the merged weights are held in 4 bits again: 0.05 on the embedded base
)


def merge(run: str | Path | MergeSettings, **values: Any) -> MergeResult:
    """Write base + adapter as one model to `out`; returns the proof: largest logit difference, greedy agreement.

    Raises `MergeError`, leaving nothing behind, where the merged model is not the adapted one within `tolerance`.
    """
    settings = (
        run
        if isinstance(run, MergeSettings)
        else make_settings(MergeSettings, {"adapter": Path(run), **values})
    )
    check_out(settings.output_dir)
    with verified_copies(settings.require_audit, [settings.adapter]) as [copy]:
        return _merge(settings.model_copy(update={"adapter": Path(copy)}), str(settings.adapter))


def _merge(settings: MergeSettings, where: str) -> MergeResult:
    opened = load_run(settings.adapter, settings, allow_other_base=settings.allow_other_base)
    base, adapter = opened.base, opened.adapter
    assert adapter is not None
    check_mergeable(base, adapter, where)
    probe = make_probe(base)
    adapted = probe_logits(base, probe, adapter.active)
    with atomic_directory(settings.output_dir) as folder:
        merge_into_base(base, adapter)
        if settings.quantization == "nf4":
            _requantise(base, folder)
        else:
            with silence_transformers():
                base.model.save_pretrained(folder)
        _copy_reading(base, folder)
        merged = _reload(base, folder, settings)
        logits = probe_logits(merged, probe, None)
        proof = kl_and_agreement(adapted, logits) | {"quantization": settings.quantization}
        if isinstance(base, CausalLM):
            proof["loss_adapted"], proof["loss_merged"] = (
                _loss(probe, adapted),
                _loss(probe, logits),
            )
        check_tolerance(
            proof,
            settings.max_kl
            or (TOLERANCE[base.dtype] if settings.quantization == "none" else REQUANTISED),
        )
        about = {
            "base": base.name,
            "adapter": read_metadata(adapter_folder(settings.adapter)).get("hash"),
        }
        write_json(folder / "merge.json", about | proof)
    return MergeResult(out=str(settings.output_dir), **about, **proof)  # type: ignore[arg-type]


def _copy_reading(base: FrozenModel, folder: Path) -> None:
    """What the model needs to read its input: the tokenizer, or how pictures are prepared."""
    tokenizer = getattr(base, "tokenizer", None)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if base.folder is not None and (base.folder / IMAGE_CONFIG).is_file():
        shutil.copy2(base.folder / IMAGE_CONFIG, folder / IMAGE_CONFIG)


def _reload(base: FrozenModel, folder: Path, settings: MergeSettings) -> FrozenModel:
    """The merged model as a stranger would load it."""
    how = {
        "trust_remote_code": settings.trust_remote_code,
        "dtype": str(base.dtype).removeprefix("torch."),
        "device": base.device.type,
    }
    if not isinstance(base, Classifier):
        return load_base(str(folder), **how)  # type: ignore[arg-type]
    if base.labels:
        return load_classifier(str(folder), base.labels, base.images is not None, **how)  # type: ignore[arg-type]
    return load_masked(str(folder), **how)  # type: ignore[arg-type]


def check_out(out: Path) -> None:
    """Raise `SettingsError` where something lies in the folder `out`."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SettingsError("this folder is not empty", where=str(out), hint="choose another --output-dir")


def check_mergeable(base: FrozenModel, adapter: Adapter, where: str) -> None:
    """Raise `MergeError` where the adapter does not act on every token, or gives rewards and not text."""
    if SCORE in adapter.config.modules_to_save and isinstance(base, CausalLM):
        why = "the merged model would be proved on text, which is not what it was trained to give"
        raise MergeError(
            "a reward model cannot be merged so far",
            where=where,
            why=why,
            hint="use the adapter as it is",
        )
    if adapter.config.invocation:
        why = "it acts from its invocation on, and a merged weight acts on every token"
        raise MergeError(
            "an activated adapter cannot be merged", where=where, why=why, hint="serve it unmerged"
        )


@torch.no_grad()
def merge_into_base(base: FrozenModel, adapter: Adapter) -> None:
    """Merge `adapter` into the weights of `base`, in place, and detach it.

    Sums are made in float32 and rounded once to the base's dtype; layers held in 4 bits are written out in that dtype, so
    that the merged model is what the adapter was trained on. Where the output layer is tied to the embedding and only one
    of them changed, or each changed in its own way, the tie is cut and said so in the configuration.
    """
    model: Any = base.model
    deltas = adapter.layers
    detach(model, adapter)
    dequantize_model(model)
    changed: dict[int, Tensor] = {}
    for path, delta in deltas.items():
        if delta.replaces_base:
            _replace(model, path, delta, changed)
            continue
        module = model.get_submodule(path)
        _untie(model, path)
        merged = delta.merged_weight(as_matrix(module, module.weight.detach().float()))
        module.weight = nn.Parameter(
            as_stored(module, merged).to(module.weight.dtype), requires_grad=False
        )
    head, embedding = _output(model), _embedding(model)
    if (
        head is not None
        and embedding is not None
        and getattr(model.config, "tie_word_embeddings", False)
    ):
        if adapter.config.trainable_tokens and torch.equal(head.weight, embedding.weight):
            head.weight = embedding.weight
        model.config.tie_word_embeddings = head.weight is embedding.weight


def _output(model: Any) -> Any:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _embedding(model: Any) -> Any:
    try:
        return model.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # image models have none
        return None


def _replace(model: nn.Module, path: str, delta: nn.Module, changed: dict[int, Tensor]) -> None:
    """Put the trained parameters in the module's place; a tied one stays tied to its twin."""
    loose = isinstance(frozen_module(model, path), FreeParameter)
    owner = model.get_submodule(path.rpartition(".")[0] if loose else path)
    for name, parameter in delta.named_parameters():
        if id(parameter) not in changed:
            changed[id(parameter)] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        setattr(owner, path.rpartition(".")[2] if loose else name, changed[id(parameter)])


def _untie(model: Any, path: str) -> None:
    """Give the output layer at `path` a weight of its own, if it shares the embedding's."""
    head, embedding = _output(model), _embedding(model)
    if (
        head is not None
        and embedding is not None
        and head is model.get_submodule(path)
        and head.weight is embedding.weight
    ):
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)


def make_probe(base: FrozenModel) -> Any:
    """Something to compare on: general text as one flat run, as rows for encoders, or noise for image models."""
    if isinstance(base, CausalLM):
        tokens = [token for example in retention_examples(base) for token in example.token_ids][
            : min(PROBE_TOKENS, base.max_positions)
        ]
        return (
            torch.tensor(tokens, device=base.device),
            torch.arange(len(tokens), device=base.device),
            (0, len(tokens)),
        )
    assert isinstance(base, Classifier)
    if base.images is not None:
        shape = (16, len(base.images.mean), *base.images.size)
        return base.batch(list(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
    assert base.tokenizer is not None
    texts = [
        line for line in RETENTION_TEXT.read_text(encoding="utf-8").splitlines() if len(line) > 20
    ][:16]
    return base.batch([base.tokenizer(text)["input_ids"][: base.max_positions] for text in texts])


@torch.no_grad()
def probe_logits(base: FrozenModel, probe: Any, route: ActiveAdapters | None) -> Tensor:
    """Logits (..., classes) of the probe under `route`."""
    everywhere = NO_ADAPTERS if not route else route.always_on().row_segments()
    with base.forward_context.use(everywhere):
        if isinstance(base, CausalLM):
            return base.all_logits(*probe)
        assert isinstance(base, Classifier)
        return base.logits(probe).flatten(0, -2)


def kl_and_agreement(adapted: Tensor, logits: Tensor) -> dict[str, Any]:
    """Merged against adapted logits (n, classes): KL divergence in nats a position, largest difference, agreement."""
    expected, given = adapted.log_softmax(-1), logits.log_softmax(-1)
    agree = float((logits.argmax(-1) == adapted.argmax(-1)).float().mean())
    return {
        "kl": max(
            float((expected.exp() * (expected - given)).sum(-1).mean()), 0.0
        ),  # in this order: nan stays nan
        "max_logit_difference": float((logits - adapted).abs().max()),
        "greedy_agreement": agree,
        "probe_tokens": len(logits),
    }


def _loss(probe: Any, logits: Tensor) -> float:
    """Mean loss of the probe text under its logits (n, V), nats a token."""
    return float(nn.functional.cross_entropy(logits[:-1], probe[0][1:]))


def _requantise(base: FrozenModel, folder: Path) -> None:
    """Hold the merged weights in 4 bits again, telling what that does to each layer, and write them."""
    if not isinstance(base, CausalLM):
        raise MergeError(
            "only language models are written in 4 bits",
            where=base.name,
            hint="leave --quantization out",
        )
    quantize_model(base.model, tell=print_quantization)
    write_nf4(base.model, folder)


def check_tolerance(proof: dict[str, Any], tolerance: float) -> None:
    """Raise `MergeError` where the proof's divergence is over the tolerance, nats a token."""
    if not proof["kl"] <= tolerance:  # also where it is no number
        loss = (
            "; loss {loss_adapted:.3f} adapted, {loss_merged:.3f} merged"
            if "loss_merged" in proof
            else ""
        )
        raise MergeError(
            "the merged model would not answer as the adapted one",
            why=f"KL divergence {proof['kl']:.3g} nats a token, {tolerance:.3g} are allowed; same likeliest token at "
            f"{100 * proof['greedy_agreement']:.1f}% of positions{loss.format(**proof)}",
            hint="--dtype float32 keeps more; or serve the adapter unmerged; or allow more with --tolerance",
        )
