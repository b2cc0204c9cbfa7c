"""One encoder in memory, read in two ways: with its classification head, and as vectors.

    text --> | layers |--> head     scores of classes        `classifier`, paths as bert.encoder...
             |        |--> pooling  one vector               `encoder`, paths as encoder...

Adapters of both are attached to the same modules.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from transformers import AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from afina.models.classifier import PROBLEM_TYPES, Classifier, load_frozen
from afina.models.encoder import EmbeddingConfig, Encoder
from afina.models.loading import load_config, resolve_model_dir
from afina.models.packed_encoder import PackedEncoder
from afina.settings import ModelSettings

DECODER_ARCHITECTURES = ("ForCausalLM", "LMHeadModel")  # ends of their names


@dataclass(frozen=True)
class EncoderViews:
    """An encoder with its classification head, and the same modules as an encoder of vectors.

    Attributes:
        has_head: Whether the head over the classes is in the published weights.
    """

    classifier: Classifier
    encoder: Encoder
    has_head: bool

    def of(self, paths: Iterable[str]) -> Classifier:
        """Return the view whose modules have these paths; the classifier where none has."""
        known = dict(self.classifier.model.named_modules())
        is_vector = any(
            path not in known and f"{self.classifier.model.base_model_prefix}.{path}" in known
            for path in paths
        )
        return self.encoder if is_vector else self.classifier

    def embedding_as(self, config: EmbeddingConfig) -> Encoder:
        """Return the encoder with another way from tokens to one vector."""
        view = replace(self.encoder, embedding=config)
        view.packed = self.encoder.packed  # its hooks are in the same modules
        return view


def is_encoder(settings: ModelSettings) -> bool:
    """Return whether the base of the settings reads texts and generates none, by its config.json.

    Raises:
        BaseError: the base is missing, or transformers does not support it.
    """
    folder = resolve_model_dir(settings.base, settings.revision, weights=False)
    config = load_config(folder, settings.base, settings.trust_remote_code)
    names = getattr(config, "architectures", None) or []
    is_decoder = getattr(config, "is_decoder", False) or any(
        name.endswith(DECODER_ARCHITECTURES) for name in names
    )
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not is_decoder


def load_encoder_views(settings: ModelSettings) -> EncoderViews:
    """Return the frozen encoder of the settings.

    Raises:
        BaseError: the model is missing, damaged, or its vectors are pooled in an unknown way.
    """
    shared = (settings.revision, settings.trust_remote_code, settings.dtype, settings.device)
    kind = AutoModelForSequenceClassification
    loaded = load_frozen(kind, settings.base, (), False, *shared, {})
    config: Any = loaded.model.config
    has_head = not any(_is_in_head(loaded, path) for path in loaded.new_modules)
    if has_head:
        loaded.labels = tuple(str(config.id2label[n]) for n in range(config.num_labels))
        tasks = {name: task for task, name in PROBLEM_TYPES.items()}
        loaded.task = tasks.get(config.problem_type, "classes")
    body: Any = loaded.model.base_model
    encoder = Encoder(
        model=body,
        name=loaded.name,
        revision=loaded.revision,
        folder=loaded.folder,
        files=loaded.files,
        remote_code=loaded.remote_code,
        forward_context=loaded.forward_context,
        tokenizer=loaded.tokenizer,
        embedding=EmbeddingConfig.of(resolve_model_dir(settings.base, settings.revision)),
    )
    # equal on packed rows with its head, hence without it: attention is replaced only once
    is_packed = loaded.packed is not None
    encoder.packed = PackedEncoder(encoder.model, encoder.forward_context) if is_packed else None
    return EncoderViews(loaded, encoder, has_head)


def _is_in_head(loaded: Classifier, path: str) -> bool:
    return not path.startswith(f"{loaded.model.base_model_prefix}.")
