"""`afina merge`: base and adapter as one model, with proof, as a Hugging Face folder.

Merging rounds to the base's dtype, or to NF4 where that is set, so the merged model is loaded again
and compared with the adapted one on a probe text: KL divergence in nats per token, the ratio of
positions with the same most probable token, and loss. A chat has to render to the same tokens and
end at the same stop tokens. If the divergence exceeds the tolerance, nothing is kept.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from afina.adapters.active import BASE_ONLY, ActiveAdapters
from afina.adapters.attach import Adapter, detach, frozen_module
from afina.adapters.load_run import load_run
from afina.adapters.target_module import FreeParameter, as_matrix, as_stored
from afina.data import RETENTION_TEXT
from afina.data.renderer import Renderer
from afina.errors import MergeError
from afina.evaluation.retention import retention_examples
from afina.io.adapter_folder import adapter_folder
from afina.io.adapter_metadata import read_metadata
from afina.io.atomic import atomic_directory, require_new_directory, write_json
from afina.io.chat_format import CHAT_KEY
from afina.io.verified_copy import verified_copies
from afina.merging.chat_export import check_chat_format, install_chat_format, probe_chat
from afina.merging.results import MergeResult
from afina.models.bnb_format import write_nf4
from afina.models.causal_lm import SCORE, CausalLM
from afina.models.classifier import TAGS_TASK, Classifier, load_classifier, load_masked, load_tagger
from afina.models.encoder import Encoder, load_encoder
from afina.models.frozen import FrozenModel
from afina.models.image_preprocessor import IMAGE_CONFIG
from afina.models.loading import load_base, silence_transformers
from afina.models.nf4 import dequantize_model, print_quantization, quantize_model
from afina.settings import MergeSettings, as_settings

PROBE_TOKENS = 512
EMBEDDING_SCALE = 20.0  # of cosines, where an encoder's vectors are compared as probabilities
# nats per token between adapted and merged model. On the embedded base a skill's adapter changes
# the answers by 0.12; merging by 1e-9 in float32, and by 0.001 in bfloat16, where computing the
# adapted model in bfloat16 changes them as much
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.01}
NF4_TOLERANCE = 0.1  # where merged weights are quantized again: 0.05 on the embedded base


def merge(run: str | Path | MergeSettings, **values: Any) -> MergeResult:
    """Write base and adapter as one model to `output_dir`, with its chat template and stop tokens.

    Args:
        run: A run, an adapter, or all settings.
        values: Settings of `afina merge`.

    Returns:
        The proof: KL divergence, largest difference of logits, greedy agreement, losses.

    Raises:
        MergeError: The merged model is not the adapted one within `max_kl`; nothing is written.
    """
    settings = as_settings(MergeSettings, run, "adapter", values)
    require_new_directory(settings.output_dir)
    with verified_copies(settings.require_audit, [settings.adapter]) as [copy]:
        sealed = settings.model_copy(update={"adapter": Path(copy)})
        return write_merged(sealed, str(settings.adapter))[0]


def write_merged(
    settings: MergeSettings, where: str, check: Callable[[FrozenModel], None] | None = None
) -> tuple[MergeResult, FrozenModel]:
    """Merge as `merge` does; return the proof, and the merged model as loaded from its files.

    `check` is called with the base, and may raise an error.
    """
    opened = load_run(settings.adapter, settings, allow_other_base=settings.allow_other_base)
    base, adapter = opened.base, opened.adapter
    assert adapter is not None
    check_mergeable(base, adapter, where)
    if check is not None:
        check(base)
    probe = make_probe(base)
    adapted = probe_logits(base, probe, adapter.active)
    renderer, chat = None, None
    if isinstance(base, CausalLM):
        chat = probe_chat(Renderer(base.tokenizer, opened.chat_format, base.max_positions))
        renderer = install_chat_format(base, opened.chat_format)
    with atomic_directory(settings.output_dir) as folder:
        merge_into_base(base, adapter)
        if settings.quantization == "nf4":
            _requantize(base, folder)
        else:
            with silence_transformers():
                base.model.save_pretrained(folder)
        _save_preprocessing(base, folder)
        merged = _reload(base, folder, settings)
        logits = probe_logits(merged, probe, BASE_ONLY)
        proof = kl_and_agreement(adapted, logits) | {"quantization": settings.quantization}
        if renderer is not None and isinstance(merged, CausalLM):
            proof["loss_adapted"], proof["loss_merged"] = (
                _loss(probe, one) for one in (adapted, logits)
            )
            check_chat_format(chat, renderer, merged)
        usual = TOLERANCE[base.dtype] if settings.quantization == "none" else NF4_TOLERANCE
        check_tolerance(proof, settings.max_kl or usual)
        digest = read_metadata(adapter_folder(settings.adapter)).get("hash")
        about: dict[str, Any] = {"base": base.name, "adapter": digest}
        chat_entry = {CHAT_KEY: renderer.chat_format.record()} if renderer is not None else {}
        write_json(folder / "merge.json", about | proof | chat_entry)
    return MergeResult(out=str(settings.output_dir), **about, **proof), merged


def _save_preprocessing(base: FrozenModel, folder: Path) -> None:
    """Save what turns inputs into tensors: the tokenizer, or the configuration of images."""
    tokenizer = getattr(base, "tokenizer", None)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if isinstance(base, Encoder):
        base.embedding.save(folder, base.hidden_size or 0)
    if base.folder is not None and (base.folder / IMAGE_CONFIG).is_file():
        shutil.copy2(base.folder / IMAGE_CONFIG, folder / IMAGE_CONFIG)


def _reload(base: FrozenModel, folder: Path, settings: MergeSettings) -> FrozenModel:
    """Load the merged model from its files, as other programs would."""
    how: dict[str, Any] = {
        "trust_remote_code": settings.trust_remote_code,
        "dtype": str(base.dtype).removeprefix("torch."),
        "device": base.device.type,
    }
    if not isinstance(base, Classifier):
        return load_base(str(folder), **how)
    if isinstance(base, Encoder):
        return load_encoder(str(folder), **how)
    if base.task == TAGS_TASK:
        return load_tagger(str(folder), base.labels, **how)
    if base.labels:
        images = base.images is not None
        return load_classifier(str(folder), base.labels, images, task=base.task, **how)
    return load_masked(str(folder), **how)


def check_mergeable(base: FrozenModel, adapter: Adapter, where: str) -> None:
    """Raise `MergeError` for a reward model, or an adapter not active on all tokens."""
    if SCORE in adapter.config.modules_to_save and isinstance(base, CausalLM):
        why = "the proof compares probabilities of text, and this model was trained on rewards"
        raise MergeError(
            "a reward model cannot be merged so far",
            where=where,
            why=why,
            hint="use the adapter as it is",
        )
    if adapter.config.invocation:
        why = "it is active after its invocation only, and merged weights apply to all tokens"
        raise MergeError(
            "an activated adapter cannot be merged", where=where, why=why, hint="serve it unmerged"
        )


@torch.no_grad()
def merge_into_base(base: FrozenModel, adapter: Adapter) -> None:
    """Merge `adapter` into the weights of `base`, in place, and detach it.

    Sums are computed in float32 and rounded once to the base's dtype; NF4 layers are dequantized to
    that dtype, so that the merged model is what the adapter was trained on. Where output layer and
    embedding are tied and change differently, they are untied in weights and configuration.
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
        module: Any = frozen_module(model, path)
        _untie(model, module)
        merged = delta.merged_weight(as_matrix(module, module.weight.detach().float()))
        new = nn.Parameter(as_stored(module, merged).to(module.weight.dtype), requires_grad=False)
        if isinstance(module, FreeParameter):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, new)
        else:
            module.weight = new
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
    """Replace the parameters of a module by trained ones; tied parameters stay tied."""
    loose = isinstance(frozen_module(model, path), FreeParameter)
    owner = model.get_submodule(path.rpartition(".")[0] if loose else path)
    for name, parameter in delta.named_parameters():
        if id(parameter) not in changed:
            changed[id(parameter)] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        setattr(owner, path.rpartition(".")[2] if loose else name, changed[id(parameter)])


def _untie(model: Any, module: nn.Module) -> None:
    """Copy the weight of `module` if it is the output layer, and tied to the embedding."""
    head, embedding = _output(model), _embedding(model)
    if (
        head is not None
        and embedding is not None
        and head is module
        and head.weight is embedding.weight
    ):
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)


def make_probe(base: FrozenModel) -> Any:
    """Return inputs to compare on: packed general text, rows of text, or noise as images."""
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
def probe_logits(base: FrozenModel, probe: Any, active: ActiveAdapters) -> Tensor:
    """Return the logits `(num_positions, num_classes)` of the probe, adapters on all tokens."""
    with base.forward_context.use(active.always_on().row_segments()):
        if isinstance(base, CausalLM):
            return base.all_logits(*probe)
        assert isinstance(base, Classifier)
        if isinstance(base, Encoder):  # the cosines of each text of the probe with the others
            units = nn.functional.normalize(base.embed(probe), dim=-1)
            cosines = EMBEDDING_SCALE * (units @ units.T)
            return cosines[~torch.eye(len(units), dtype=torch.bool)].view(len(units), -1)
        return base.logits(probe).flatten(0, -2)


def kl_and_agreement(adapted: Tensor, logits: Tensor) -> dict[str, Any]:
    """Compare merged with adapted logits `(n, num_classes)`: KL divergence (nats), agreement."""
    expected, given = adapted.log_softmax(-1), logits.log_softmax(-1)
    agree = float((logits.argmax(-1) == adapted.argmax(-1)).float().mean())
    return {
        # in this order: nan stays nan
        "kl": max(float((expected.exp() * (expected - given)).sum(-1).mean()), 0.0),
        "max_logit_difference": float((logits - adapted).abs().max()),
        "greedy_agreement": agree,
        "probe_tokens": len(logits),
    }


def _loss(probe: Any, logits: Tensor) -> float:
    """Return the mean loss of the probe text under its logits `(n, vocab_size)`, nats per token."""
    return float(nn.functional.cross_entropy(logits[:-1], probe[0][1:]))


def _requantize(base: FrozenModel, folder: Path) -> None:
    """Quantize the merged weights to NF4, print the error of each layer, and write them."""
    if not isinstance(base, CausalLM):
        raise MergeError(
            "only causal language models can be written in NF4",
            where=base.name,
            hint="leave --quantization out",
        )
    # bitsandbytes' format has no 4-bit tensors of three axes: fused experts are written as they are
    quantize_model(base.model, report_module=print_quantization, experts=False)
    write_nf4(base.model, folder)


def check_tolerance(proof: dict[str, Any], tolerance: float) -> None:
    """Raise `MergeError` where the divergence exceeds the tolerance, in nats per token."""
    if not proof["kl"] <= tolerance:  # also for nan
        why = (
            f"KL divergence {proof['kl']:.3g} nats per token, {tolerance:.3g} are allowed; "
            f"greedy agreement at {100 * proof['greedy_agreement']:.1f}% of positions"
        )
        if "loss_merged" in proof:
            why += "; loss {loss_adapted:.3f} adapted, {loss_merged:.3f} merged".format(**proof)
        hint = (
            "--dtype float32 is more exact; or serve the adapter unmerged; or --max-kl allows more"
        )
        raise MergeError("the merged model differs from the adapted one", why=why, hint=hint)
