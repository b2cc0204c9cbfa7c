"""The frozen encoder: a text becomes one vector, pooled as sentence-transformers' files record it.

modules.json                  Transformer, Pooling and, for unit length, Normalize
1_Pooling/config.json         how the hidden states of the tokens become one vector
sentence_bert_config.json     longest text in tokens, lower case
config_sentence_transformers  a prompt that comes before each text
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel

from afina.errors import AdapterError, BaseError
from afina.io.atomic import write_json
from afina.io.strict_json import read_json_object
from afina.models.classifier import Classifier, TokenPair, load_frozen
from afina.models.loading import resolve_model_dir

EMBEDDING_KEY = "embedding"  # of `data` in run.json, and of afina.json
_MODE_KEY = "pooling_mode_{}"  # one boolean for each mode in 1_Pooling/config.json
_MODES_IN_FILES = {  # names in that file, where they are others
    "cls": "cls_token",
    "mean": "mean_tokens",
    "max": "max_tokens",
    "mean_sqrt_len": "mean_sqrt_len_tokens",
}


def _weighted_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)[:, None]
    return (hidden * weights).sum(1) / weights.sum(1)


def _last_token(hidden: Tensor, mask: Tensor) -> Tensor:
    last = mask[..., 0].sum(1).long() - 1
    return hidden[torch.arange(len(last), device=hidden.device), last]


# from hidden states `(rows, longest, width)` and a mask `(rows, longest, 1)` to `(rows, width)`
POOLINGS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": lambda hidden, mask: (hidden * mask).sum(1) / mask.sum(1),
    "cls": lambda hidden, mask: hidden[:, 0],
    "max": lambda hidden, mask: hidden.masked_fill(mask == 0, -torch.inf).amax(1),
    "mean_sqrt_len": lambda hidden, mask: (hidden * mask).sum(1) / mask.sum(1).sqrt(),
    "weightedmean": _weighted_mean,
    "lasttoken": _last_token,
}


@dataclass(frozen=True)
class EmbeddingConfig:
    """How a text becomes one vector.

    Attributes:
        pooling: From the hidden states of its tokens to one vector; a key of `POOLINGS`.
        normalize: Scale the vector to unit length.
        prompt: Text that comes before each text.
        lowercase: Put texts in lower case.
        max_length: Longest text in tokens; None for the base's limit.
    """

    pooling: str = "mean"
    normalize: bool = True
    prompt: str = ""
    lowercase: bool = False
    max_length: int | None = None

    @classmethod
    def of(cls, folder: Path) -> "EmbeddingConfig":
        """Return the configuration in sentence-transformers' files of a folder; else the defaults.

        Raises:
            BaseError: they have a module or a pooling that is not supported.
        """
        file = folder / "modules.json"
        if not file.is_file():
            return cls()
        modules = _modules_in(file)
        kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
        unknown = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
        if unknown or kinds[:1] != ["Transformer"] or "Pooling" not in kinds:
            why = "supported are Transformer, Pooling and Normalize, in this order"
            what = f"its modules are {', '.join(kinds) or 'none'}"
            raise BaseError(what, where=str(file), why=why)
        texts = _object(folder / "sentence_bert_config.json")
        prompts = _object(folder / "config_sentence_transformers.json")
        name = prompts.get("default_prompt_name")
        pooling = folder / str(modules[kinds.index("Pooling")]["path"]) / "config.json"
        return cls(
            pooling=_pooling_in(pooling),
            normalize="Normalize" in kinds,
            prompt=str((prompts.get("prompts") or {}).get(name, "")) if name else "",
            lowercase=bool(texts.get("do_lower_case")),
            max_length=texts.get("max_seq_length"),
        )

    @classmethod
    def from_record(cls, record: Mapping[str, Any], where: str) -> "EmbeddingConfig":
        """Return the configuration that a run or an adapter records; raises `AdapterError`."""
        try:
            found = cls(**record)
        except TypeError as error:
            what = f"{EMBEDDING_KEY} has an unknown entry"
            raise AdapterError(what, where=where, why=str(error)) from None
        if found.pooling not in POOLINGS:
            what = f"unknown pooling {found.pooling!r}"
            raise AdapterError(what, where=where, why=f"known: {', '.join(POOLINGS)}")
        return found

    def record(self) -> dict[str, Any]:
        """Return the configuration for run.json and afina.json."""
        return asdict(self)

    def prepare(self, text: str) -> str:
        """Return a text as the tokenizer gets it."""
        text = self.prompt + text
        return text.lower() if self.lowercase else text

    def pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return the vector of each text `(rows, width)`, float32.

        Args:
            hidden: `(rows, longest, width)`.
            mask: `(rows, longest)`, 1 for tokens and 0 for padding.
        """
        pooled = POOLINGS[self.pooling](hidden.float(), mask[..., None].float())
        return F.normalize(pooled, dim=-1) if self.normalize else pooled

    def save(self, folder: Path, width: int) -> None:
        """Write the files with which sentence-transformers computes the same vectors."""
        kinds = ["Transformer", "Pooling", *(["Normalize"] if self.normalize else [])]
        paths = ["", *(f"{number}_{kind}" for number, kind in enumerate(kinds) if number)]
        modules = [
            {
                "idx": number,
                "name": str(number),
                "path": path,
                "type": f"sentence_transformers.models.{kind}",
            }
            for number, (kind, path) in enumerate(zip(kinds, paths, strict=True))
        ]
        write_json(folder / "modules.json", modules)
        modes = {
            _MODE_KEY.format(_MODES_IN_FILES.get(mode, mode)): mode == self.pooling
            for mode in POOLINGS
        }
        (folder / "1_Pooling").mkdir()
        write_json(
            folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width} | modes
        )
        texts = {"max_seq_length": self.max_length, "do_lower_case": self.lowercase}
        write_json(folder / "sentence_bert_config.json", texts)
        if self.prompt:
            prompts = {"prompts": {"text": self.prompt}, "default_prompt_name": "text"}
            write_json(folder / "config_sentence_transformers.json", prompts)


def _modules_in(file: Path) -> list[dict[str, Any]]:
    try:
        modules = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BaseError("broken JSON", where=str(file), why=str(error)) from None
    if not isinstance(modules, list) or not all(isinstance(one, dict) for one in modules):
        raise BaseError("not a list of modules", where=str(file))
    return modules


def _object(file: Path) -> dict[str, Any]:
    return read_json_object(file, error=BaseError) if file.is_file() else {}


def _pooling_in(file: Path) -> str:
    """Return the pooling that a configuration names; raises `BaseError`."""
    values = _object(file)
    if values.get("include_prompt") is False:
        raise BaseError("pooling without the prompt is not supported", where=str(file))
    names = {_MODE_KEY.format(_MODES_IN_FILES.get(mode, mode)): mode for mode in POOLINGS}
    chosen = [mode for key, mode in names.items() if values.get(key)]
    chosen = [values["pooling_mode"]] if isinstance(values.get("pooling_mode"), str) else chosen
    if len(chosen) != 1 or chosen[0] not in POOLINGS:
        what = f"its pooling is {' and '.join(chosen) or 'missing'}"
        why = f"supported is one of {', '.join(POOLINGS)}"
        raise BaseError(what, where=str(file), why=why)
    return chosen[0]


@dataclass
class Encoder(Classifier):
    """A model that turns each text into one vector.

    Attributes:
        embedding: How it does so.
    """

    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)

    def encode(
        self, text: str, pair: str | None = None, max_length: int | None = None
    ) -> list[int] | TokenPair:
        """Return a text as tokens with the tokenizer's special ones, at most `max_length`."""
        return super().encode(self.embedding.prepare(text), pair, max_length)

    def embed(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the vectors `(rows, width)` of a batch, float32."""
        if self.packed is None:
            hidden = self.model(**inputs).last_hidden_state
        else:
            hidden = self.packed.logits(inputs)
        return self.embedding.pool(hidden, inputs["attention_mask"])


def load_encoder(
    base: str,
    embedding: EmbeddingConfig | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: str = "auto",
    device: str = "auto",
) -> Encoder:
    """Return a frozen encoder; without `embedding`, pooled as in the files of the base.

    Raises:
        BaseError: the model is missing, damaged, or gives no hidden states of texts.
    """
    found = embedding or EmbeddingConfig.of(resolve_model_dir(base, revision))
    loaded = load_frozen(AutoModel, base, (), False, revision, trust_remote_code, dtype, device, {})
    missing = [path for path in loaded.new_modules if not path.startswith("pooler")]
    if missing or not hasattr(loaded.model, "get_input_embeddings"):
        why = f"the weights of {', '.join(missing) or 'an embedding of tokens'} are missing"
        raise BaseError("the weights do not fit config.json", where=base, why=why)
    if getattr(loaded.model, "pooler", None) is not None:
        # of next-sentence prediction; no vector passes through it
        loaded.model.pooler = None  # type: ignore[assignment]
    loaded.new_modules = ()
    return Encoder(**{f.name: getattr(loaded, f.name) for f in fields(loaded)}, embedding=found)
