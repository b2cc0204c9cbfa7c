"""afina.json, what PEFT's format cannot hold: the full configuration, hashes, base and lineage."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from afina.errors import AdapterError
from afina.io.adapter_config import AdapterConfig
from afina.io.peft_config import Alpha, Rank, Text, TokenId, first_problem
from afina.io.strict_json import ADAPTER_JSON, JsonLimits, read_json_object

METADATA_FILE = "afina.json"
FORMAT_VERSION = 1  # of afina.json
MAX_PARENTS = 1024

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Number = int | Annotated[float, Field(allow_inf_nan=False)]
Ratio = Annotated[int, Field(ge=0, le=1)] | Annotated[float, Field(ge=0, le=1)]
PlainValue = bool | Number | Text | None


def _unique(values: list[str]) -> list[str]:
    if len(set(values)) != len(values):
        raise ValueError("a name is repeated")
    return values


Names = Annotated[list[Text], AfterValidator(_unique)]


class _Part(BaseModel):
    """A part of afina.json; keys of later versions are kept and not read."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")


class CanonicalConfig(_Part):
    """`spec` of afina.json: the keys of `AdapterConfig.canonical()`, which the hash is of."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    method: Text
    targets: Names
    rank: Rank
    alpha: Alpha
    scaling: Literal["lora", "rslora"] = "lora"
    dropout: Ratio = 0.0
    ranks: dict[Text, Rank] = Field(default_factory=dict)
    alphas: dict[Text, Alpha] = Field(default_factory=dict)
    modules: Names = Field(default_factory=list)
    invocation: list[TokenId] = Field(default_factory=list)
    tokens: dict[Text, TokenId] = Field(default_factory=dict)
    options: dict[Text, PlainValue] = Field(default_factory=dict)


class RecordedBase(_Part):
    """The base that an adapter was trained on, as its files record it."""

    name: Text | None = None
    revision: Text | None = None
    hash: Sha256 | Literal[""] | None = None
    remote_code: bool | None = None
    storage: Text | None = None


class Parent(_Part):
    """One parent of a combined adapter."""

    name: Text
    hash: Sha256 | None = None
    weight: Number
    method: Text | None = None


class RecordedChat(_Part):
    """Chat format of an adapter; `jinja` is the text of a template that came from a file."""

    template: Annotated[str, Field(max_length=4096)] | None = None
    kwargs: dict[Text, Any] = Field(default_factory=dict)
    allow_control_tokens: bool = False
    jinja: Annotated[str, Field(max_length=1 << 18)] | None = None
    stop_tokens: Annotated[list[Text], Field(max_length=64)] = Field(default_factory=list)


class RecordedEmbedding(_Part):
    """How an encoder and an adapter turn a text into one vector."""

    pooling: Text = "mean"
    normalize: bool = True
    prompt: Annotated[str, Field(max_length=4096)] = ""
    lowercase: bool = False
    max_length: Annotated[int, Field(ge=1)] | None = None


class AdapterMetadata(_Part):
    """The content of an adapter's afina.json."""

    format_version: int = 0
    hash: Sha256 | None = None
    spec: CanonicalConfig
    base: RecordedBase = RecordedBase()
    chat: RecordedChat | None = None
    embedding: RecordedEmbedding | None = None
    parents: Annotated[list[Parent], Field(max_length=MAX_PARENTS)] = Field(default_factory=list)

    @classmethod
    def from_json(cls, values: dict[str, Any], where: str) -> "AdapterMetadata":
        """Return the metadata in `values`; raise `AdapterError` naming the field that is wrong."""
        try:
            return cls(**values)
        except ValidationError as error:
            field, why = first_problem(error)
            what = f"{field} is missing or has a wrong value"
            raise AdapterError(what, where=f"{where}: {field}", why=why) from None

    def adapter_config(self) -> AdapterConfig:
        """Return the adapter's configuration."""
        return AdapterConfig.from_canonical(self.spec.model_dump(exclude_unset=True))


def read_metadata(folder: Path, limits: JsonLimits = ADAPTER_JSON) -> dict[str, Any]:
    """Return afina.json of an adapter or a composition, or {} for an adapter of PEFT.

    Raises:
        AdapterError: the file is damaged, or its format is newer than this version reads.
    """
    file = folder / METADATA_FILE
    if not file.is_file():
        return {}
    values = read_json_object(file, limits)
    check_version(values.get("format_version", 0), FORMAT_VERSION, str(file))
    base = values.get("base", {})
    if not isinstance(base, dict):
        raise AdapterError("base is not an object", where=f"{file}: base")
    return values


def check_version(version: Any, newest: int, where: str) -> None:
    """Raise `AdapterError` where a file's format version is no integer or above `newest`."""
    if type(version) is not int:
        what = f"format_version is {version!r:.40}"
        raise AdapterError(what, where=f"{where}: format_version", why="an integer is expected")
    if version > newest:
        raise AdapterError(
            "written by a newer afina",
            where=where,
            why=f"its format is version {version}, this afina reads up to {newest}",
            hint="pip install -U afina",
        )
