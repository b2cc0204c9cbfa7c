"""adapter_config.json, PEFT's configuration of an adapter: types, bounds, and PEFT's defaults.

The keys are those of PEFT 0.21's LoraConfig and of this package's own methods.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from afina.errors import AdapterError
from afina.io.adapter_config import AdapterConfig
from afina.io.adapter_formats import registered_types
from afina.io.name_patterns import PatternTable
from afina.io.strict_json import ADAPTER_JSON, JsonLimits, read_json_object

LORA = "LORA"
# fields of a LoraConfig that distinguish methods
PEFT_METHODS: Mapping[str, Mapping[str, Any]] = {
    "lora": {"use_dora": False},
    "dora": {"use_dora": True},
}
# keys that change the result and are not implemented, with the value that leaves it unchanged
UNSUPPORTED_PEFT_KEYS: Mapping[str, Any] = {
    "bias": "none",
    "lora_bias": False,
    "layer_replication": None,
    "use_qalora": False,
    "use_bdlora": None,
    "kasa_config": None,
    "arrow_config": None,
    "monteclora_config": None,
}
# initializations that leave the base unchanged; the others (pissa, olora, ...) subtract from it
SUPPORTED_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
# keys that do not change what is computed from a saved adapter, besides the fields of `PeftConfig`
INERT_PEFT_KEYS = frozenset(
    {
        "inference_mode",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "peft_version",
        "ensure_weight_tying",
        "qalora_group_size",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "velora_config",
        "runtime_config",
    }
)
# keys that a loader of another package may execute; the audit blocks them where they are set
DANGEROUS_PEFT_KEYS = {
    "auto_mapping": "it names Python code that a loader may import",
    "megatron_config": "a loader may import code for it",
    "layer_replication": "it rebuilds the base out of repeated layers",
}
MAX_RANK = 1 << 20
EMPTY_VALUES: tuple[Any, ...] = (None, False, "", [], {})

Rank = Annotated[int, Field(ge=1, le=MAX_RANK)]
# an integer stays an integer: the adapter's hash is of the number as it is written
Alpha = int | Annotated[float, Field(allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Text = Annotated[str, Field(max_length=4096)]


class PeftConfig(BaseModel):
    """The keys of adapter_config.json that determine the adapter, with PEFT's defaults."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    peft_type: Text
    task_type: Text | None = None
    base_model_name_or_path: Text | None = None
    revision: Text | None = None
    r: Rank = 8
    lora_alpha: Alpha = 8
    lora_dropout: Annotated[int, Field(ge=0, le=1)] | Annotated[float, Field(ge=0, le=1)] = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    target_modules: list[Text] | Text | None = None
    target_parameters: list[Text] | None = None
    modules_to_save: list[Text] | None = None
    rank_pattern: dict[Text, Rank] = Field(default_factory=dict)
    alpha_pattern: dict[Text, Alpha] = Field(default_factory=dict)
    alora_invocation_tokens: list[TokenId] | None = None
    trainable_token_indices: list[TokenId] | dict[Text, list[TokenId]] | None = None
    init_lora_weights: bool | Text | None = True

    @classmethod
    def from_file(cls, file: Path, limits: JsonLimits = ADAPTER_JSON) -> "PeftConfig":
        """Read adapter_config.json.

        Raises:
            AdapterError: a key has a wrong type or value, or one that is not supported.
        """
        return cls.from_json(read_json_object(file, limits), str(file))

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str) -> "PeftConfig":
        """Return the configuration in `values`, read from the file `where`."""
        _check_peft_type(values.get("peft_type"), where)
        _check_support(values, where)
        # PEFT writes null for what is not set
        kept = {k: v for k, v in values.items() if v is not None or k in ("r", "lora_alpha")}
        try:
            return cls(**kept)
        except ValidationError as error:
            field, why = first_problem(error)
            raise AdapterError(
                f"{field} is {_shown(values, field)}", where=f"{where}: {field}", why=why
            ) from None

    @property
    def is_lora(self) -> bool:
        """Whether PEFT itself can load the adapter."""
        return self.peft_type == LORA

    @property
    def method(self) -> str:
        """Name of the adapter method."""
        return self.method_of({"peft_type": self.peft_type, "use_dora": self.use_dora})

    @staticmethod
    def method_of(values: Mapping[str, Any]) -> str:
        """Return the adapter method of a configuration: by peft_type, and use_dora for PEFT's."""
        peft_type = str(values.get("peft_type"))
        if peft_type == LORA:
            return "dora" if values.get("use_dora") else "lora"
        return registered_types().get(peft_type) or peft_type.removeprefix("AFINA_").lower()

    @property
    def token_ids(self) -> list[int]:
        """Sorted ids of the trained embedding rows; raises `ValueError` where two lists differ."""
        indices = self.trainable_token_indices
        lists = list(indices.values()) if isinstance(indices, dict) else [indices or []]
        first = sorted(lists[0]) if lists else []
        if any(sorted(other) != first for other in lists):
            raise ValueError("different tokens in the embedding and in the output layer")
        return first

    def adapter_config(
        self,
        paths: tuple[str, ...],
        modules_to_save: tuple[str, ...],
        trainable_tokens: Mapping[str, int],
        where: str,
    ) -> AdapterConfig:
        """Return the adapter's configuration, patterns resolved to module paths.

        Args:
            paths: The adapted modules, from the names of the tensors.
            modules_to_save: The modules saved in full, from the names of the tensors.
            trainable_tokens: Token texts with trained rows, and their ids.
            where: The file, for messages.
        """
        return AdapterConfig(
            method=self.method,
            target_modules=paths,
            rank=self.r,
            alpha=self.lora_alpha,
            scaling="rslora" if self.use_rslora else "lora",
            dropout=self.lora_dropout,
            rank_pattern=_resolve(self.rank_pattern, paths, f"{where}: rank_pattern"),
            alpha_pattern=_resolve(self.alpha_pattern, paths, f"{where}: alpha_pattern"),
            modules_to_save=modules_to_save,
            invocation=tuple(self.alora_invocation_tokens or ()),
            trainable_tokens=dict(trainable_tokens),
        )


def peft_config_json(
    config: AdapterConfig,
    method_fields: Mapping[str, Any] | None,
    *,
    target_modules: Sequence[str],
    target_parameters: Sequence[str] = (),
    task_type: str | None,
    base: str | None,
    revision: str | None,
    is_transposed: bool,
    token_layers: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the content of adapter_config.json for an adapter.

    Args:
        config: The adapter's configuration.
        method_fields: PEFT's fields of the method (`use_dora`); None where PEFT does not know it.
        target_modules: Names or paths of the adapted modules.
        target_parameters: Names or paths of the adapted parameters of fused experts.
        task_type: PEFT's task type.
        base: Name of the base.
        revision: Revision of the base.
        is_transposed: Whether the base's weights are stored as (in, out).
        token_layers: Names of the embedding and the output layer, where tokens are trained.
    """
    is_lora = method_fields is not None
    shared = {
        "peft_type": LORA if is_lora else f"AFINA_{config.method.upper()}",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "revision": revision,
        "target_modules": list(target_modules),
        "modules_to_save": list(config.modules_to_save) or None,
        "inference_mode": True,
    }
    if method_fields is None:
        return shared
    token_ids = sorted(config.trainable_tokens.values())
    parameters = {"target_parameters": list(target_parameters)} if target_parameters else {}
    return (
        shared
        | parameters
        | {
            "r": config.rank,
            "lora_alpha": config.alpha,
            "lora_dropout": config.dropout,
            "use_rslora": config.scaling == "rslora",
            "rank_pattern": _escaped(config.rank_pattern),
            "alpha_pattern": _escaped(config.alpha_pattern),
            "bias": "none",
            "fan_in_fan_out": is_transposed,
            "alora_invocation_tokens": list(config.invocation) or None,
            "init_lora_weights": True,
            "trainable_token_indices": dict.fromkeys(token_layers, token_ids) or None,
            **method_fields,
        }
    )


def _escaped(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table by path as PEFT's table of patterns."""
    return {path.replace(".", r"\."): value for path, value in values.items()}


def _resolve(patterns: Mapping[str, Any], paths: Sequence[str], where: str) -> dict[str, Any]:
    """Return PEFT's patterns by path: the first pattern that matches a path's end wins."""
    table = PatternTable(patterns, where, AdapterError)
    found = {path: table.get(path) for path in paths}
    return {path: value for path, value in found.items() if value is not None}


def _check_peft_type(peft_type: Any, where: str) -> None:
    is_own = isinstance(peft_type, str) and peft_type.startswith("AFINA_")
    if peft_type != LORA and not is_own:
        raise AdapterError(
            f"peft_type {str(peft_type)[:40]!r} is not a supported adapter type",
            where=f"{where}: peft_type",
            why="supported are LORA and the types of registered methods",
        )


def _check_support(values: Mapping[str, Any], where: str) -> None:
    """Raise `AdapterError` where a key changes the result and is not implemented, or is unknown."""
    for key, neutral in UNSUPPORTED_PEFT_KEYS.items():
        value = values.get(key, neutral)
        if value != neutral and value not in EMPTY_VALUES:
            what = f"{key}={repr(value)[:60]} is not supported"
            raise AdapterError(what, where=f"{where}: {key}")
    start = values.get("init_lora_weights", True)
    if not isinstance(start, bool | str | None) or start not in SUPPORTED_INITS:
        raise AdapterError(
            f"init_lora_weights={str(start)[:40]!r} is not supported",
            where=f"{where}: init_lora_weights",
            why="the adapter belongs to a base that this initialization has changed",
            hint="in PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    known = {*PeftConfig.model_fields, *UNSUPPORTED_PEFT_KEYS, *DANGEROUS_PEFT_KEYS}
    for key, value in values.items():
        if key not in known and key not in INERT_PEFT_KEYS and value not in EMPTY_VALUES:
            raise AdapterError(
                f"unknown key {key[:60]!r}",
                where=f"{where}: {key[:60]}",
                why="it may change what the adapter computes",
                hint="remove the key if it has no effect",
            )


def first_problem(error: ValidationError) -> tuple[str, str]:
    """Return the field and the message of a pydantic error's first problem."""
    first = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(str(part) for part in first["loc"][:2])
    return field[:120], str(first["msg"])[:200]


def _shown(values: Mapping[str, Any], field: str) -> str:
    name = field.partition(".")[0]
    return f"{values[name]!r:.60}" if name in values else "missing"
