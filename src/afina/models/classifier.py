"""The frozen classifier: BERT-like text encoders, ViT, ResNet, on padded batches.

The head over the classes is rarely in the published weights: modules that transformers initialized
are `new_modules`, which the adapter trains and saves.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from afina.errors import BaseError
from afina.io.hashing import hash_tensor_files
from afina.models.dtype import choose_dtype
from afina.models.frozen import FrozenModel
from afina.models.image_preprocessor import ImagePreprocessor
from afina.models.loading import (
    checked_weight_files,
    choose_device,
    file_bytes,
    load_config,
    load_tokenizer,
    resolve_model_dir,
    silence_transformers,
)
from afina.models.packed_encoder import PackedEncoder

TAGS_TASK = "tags"  # one output for each token
RELEVANCE_TASK = "relevance"  # one output, whose sigmoid is a probability
PROBLEM_TYPES = {  # names of the tasks in config.json
    "classes": "single_label_classification",
    "multi-label": "multi_label_classification",
    "regression": "regression",
    RELEVANCE_TASK: "multi_label_classification",
}


@dataclass(frozen=True)
class TokenPair:
    """Two texts as one sequence of tokens, and the text of each token where the model reads it."""

    token_ids: list[int]
    token_types: list[int] | None

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass
class Classifier(FrozenModel):
    """A model with one output per row, of text (`tokenizer`) or images (`images`).

    A torch module from pixels `(rows, channels, height, width)` to scores `(rows, classes)` is one
    too.

    Attributes:
        labels: Names of the classes.
        new_modules: Modules whose weights are not published; they are fully trained.
        tokenizer: For text.
        images: For images.

    Example:
        images = ImagePreprocessor((32, 32), (0.5,) * 3, (0.5,) * 3)
        Classifier(model=net, name="my-net", labels=("cat", "dog"), images=images)
    """

    labels: tuple[str, ...] = ()
    task: str = "classes"  # what the labels are; a key of PROBLEM_TYPES, or "tags"
    new_modules: tuple[str, ...] = ()
    tokenizer: PreTrainedTokenizerBase | None = None
    images: ImagePreprocessor | None = None

    def __post_init__(self) -> None:
        # always in eval mode: the running means of BatchNorm are the base's
        self.model.requires_grad_(False).eval()

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the published tensors; without files, of the module's tensors in any order."""
        if self.files:
            return hash_tensor_files(self.files)
        state = {name: t for name, t in self.model.state_dict().items() if ".deltas." not in name}
        digests = (
            hashlib.sha256(t.cpu().contiguous().flatten().view(torch.uint8).numpy())
            for t in state.values()
        )
        return hashlib.sha256("".join(sorted(d.hexdigest() for d in digests)).encode()).hexdigest()

    @property
    def max_positions(self) -> int:
        """Longest supported text, in tokens."""
        return int(
            getattr(getattr(self.model, "config", None), "max_position_embeddings", None) or 512
        )

    @cached_property
    def packed(self) -> PackedEncoder | None:
        """The model on rows without padding; None for images, and where it needs padded rows."""
        if self.tokenizer is None:
            return None
        texts = ("one two three four five six seven eight nine", "ten", "eleven twelve")
        probe = self.batch([self.encode(text) for text in texts])
        return PackedEncoder.where_equal(self.model, self.forward_context, probe)

    def logits(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the scores `(rows, classes)`, or of each position, float32."""
        if not isinstance(self.model, PreTrainedModel):  # a torch module: pixels to scores
            return self.model(inputs["pixel_values"]).float()
        if self.packed is not None:
            return self.packed.logits(inputs).float()
        return self.model(**inputs).logits.float()

    def token_logits(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the scores of each token `(num_tokens, num_outputs)`, float32, without padding."""
        if self.packed is not None:
            return self.packed.token_logits(inputs).float()
        return self.model(**inputs).logits[inputs["attention_mask"].bool()].float()

    def encode(
        self, text: str, pair: str | None = None, max_length: int | None = None
    ) -> list[int] | TokenPair:
        """Return a text, or two, as tokens with the tokenizer's special ones.

        Control tokens such as [SEP] in a text stay text. Longer ones lose their end, with two
        texts the longer one, where `max_length` is given.
        """
        assert self.tokenizer is not None
        cut = {} if max_length is None else {"truncation": True, "max_length": max_length}
        encoded = self.tokenizer(text, pair, verbose=False, split_special_tokens=True, **cut)
        if pair is None:
            return encoded["input_ids"]
        return TokenPair(encoded["input_ids"], encoded.get("token_type_ids"))

    def batch(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """Return the model's inputs of rows: token lists, padded to the longest, or images."""
        if self.images is not None:
            return {
                "pixel_values": self.images.pixels(torch.stack(list(rows)).to(self.device)).to(
                    self.dtype
                )
            }
        assert self.tokenizer is not None
        longest = max(len(row) for row in rows)
        pad = self.tokenizer.pad_token_id or 0
        ids = [row.token_ids if isinstance(row, TokenPair) else row for row in rows]
        types = [row.token_types or [] if isinstance(row, TokenPair) else [] for row in rows]
        columns = {
            "input_ids": [[*row, *[pad] * (longest - len(row))] for row in ids],
            "attention_mask": [[1] * len(row) + [0] * (longest - len(row)) for row in ids],
        }
        if any(types):
            columns["token_type_ids"] = [[*row, *[0] * (longest - len(row))] for row in types]
        return {name: torch.tensor(rows).to(self.device) for name, rows in columns.items()}


def load_classifier(
    base: str,
    labels: Sequence[str],
    pictures: bool,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    task: str = "classes",
) -> Classifier:
    """Return a frozen classifier over `labels`, of images (`pictures`) or text.

    Raises:
        BaseError: the model is missing, damaged, or cannot classify such rows.
    """
    kind: Any = AutoModelForImageClassification if pictures else AutoModelForSequenceClassification
    options = {
        "num_labels": len(labels),
        "problem_type": PROBLEM_TYPES[task],
        "id2label": dict(enumerate(labels)),
        "label2id": {n: i for i, n in enumerate(labels)},
    }
    loaded = load_frozen(
        kind, base, tuple(labels), pictures, revision, trust_remote_code, dtype, device, options
    )
    loaded.task = task
    return loaded


def load_tagger(
    base: str,
    labels: Sequence[str],
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: str = "auto",
    device: str = "auto",
) -> Classifier:
    """Return a frozen model that gives each token one of `labels`; raises `BaseError`."""
    names = dict(enumerate(labels))
    options = {"num_labels": len(labels), "id2label": names}
    options["label2id"] = {label: number for number, label in names.items()}
    kind: Any = AutoModelForTokenClassification
    shared = (revision, trust_remote_code, dtype, device, options)
    loaded = load_frozen(kind, base, tuple(labels), False, *shared)
    loaded.task = TAGS_TASK
    return loaded


def load_masked(
    base: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: str = "auto",
    device: str = "auto",
) -> Classifier:
    """Return a frozen masked language model: a classifier of each position over the vocabulary."""
    return load_frozen(
        AutoModelForMaskedLM, base, (), False, revision, trust_remote_code, dtype, device, {}
    )


def load_frozen(
    kind: Any,
    base: str,
    labels: tuple[str, ...],
    pictures: bool,
    revision: str | None,
    trust_remote_code: bool,
    dtype: str,
    device: str,
    options: dict[str, Any],
) -> Classifier:
    """Return a frozen model of the auto class `kind`; raises `BaseError`."""
    folder = resolve_model_dir(base, revision)
    files = checked_weight_files(folder)
    config = load_config(folder, base, trust_remote_code)
    target = choose_device(device)
    options = options | {
        "dtype": choose_dtype(dtype, target, config, file_bytes(files)),
        "trust_remote_code": trust_remote_code,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
    }
    try:
        with silence_transformers(), torch.random.fork_rng():
            torch.manual_seed(0)  # a new head has the same values each time
            model, info = kind.from_pretrained(folder, **options)
    except (ValueError, KeyError, OSError) as error:
        what = f"{config.model_type} cannot classify {'images' if pictures else 'text'}"
        raise BaseError(what, where=base, why=str(error).splitlines()[0]) from error
    tokenizer = None if pictures else load_tokenizer(folder, base, trust_remote_code)
    # decoders read the last token that is not padding
    if tokenizer is not None and model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id or 0
    return Classifier(
        model=model.to(target),
        name=str(folder.resolve()) if Path(base).expanduser().is_dir() else base,
        revision=revision,
        folder=folder,
        files=files,
        remote_code=trust_remote_code and bool(getattr(config, "auto_map", None)),
        labels=labels,
        new_modules=_new_modules(
            model, [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])], base
        ),
        tokenizer=tokenizer,
        images=ImagePreprocessor.of(folder, config) if pictures else None,
    )


def _new_modules(model: PreTrainedModel, missing: Sequence[str], base: str) -> tuple[str, ...]:
    """Return the modules that transformers initialized: a head, a pooler.

    Raises:
        BaseError: a tensor of a layer is missing.
    """
    body = [
        key for key in sorted(missing) if re.match(rf"{model.base_model_prefix}\..*\.\d+\.", key)
    ]
    if body:
        why = f"{len(body)} tensors are missing or of another shape, the first: {body[0]}"
        raise BaseError(
            "the weights do not fit config.json",
            where=base,
            why=why,
            hint="download the model again",
        )
    owners = {key.rpartition(".")[0] for key in missing}
    return tuple(path for path, _ in model.named_modules() if path in owners)
