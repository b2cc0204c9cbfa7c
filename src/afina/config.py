"""Settings: one declaration is a YAML key, a command-line flag and a Python argument.

Each verb has one class below; a field's description is its help text. An unknown name is an error that
names the nearest known one. Nothing here imports torch, so that `afina --help` is quick.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from afina.errors import SettingsError, nearest

EMBEDDED = "embedded"


def _describe(description: str, default: Any = None, **constraints: Any) -> Any:
    return Field(default=default, description=description, **constraints)


class Settings(BaseModel):
    """What every verb's settings share: frozen, and strict about names."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class BaseSettings(Settings):
    """Which frozen model, and how it is loaded."""

    base: str = _describe("the frozen model: a folder, a Hugging Face name, or 'embedded'", EMBEDDED)
    revision: str | None = _describe("branch, tag or commit of a Hugging Face name")
    trust_remote_code: bool = _describe("run Python code that comes with the model (recorded in the run)", False)
    dtype: Literal["auto", "float32", "bfloat16"] = _describe("how the base's weights are held", "auto")
    device: Literal["auto", "cpu", "cuda", "mps"] = _describe("where to compute", "auto")


class TrainSettings(BaseSettings):
    """Everything `afina train` (and `afina plan`) can be told."""

    data: Path = _describe("a file: chat, Alpaca, ShareGPT, prompt/completion, text, CSV, Parquet; or a sweep's YAML", ...)
    out: Path | None = _describe("the run folder; by default runs/DATA-METHOD")
    resume: bool = _describe("go on with the run in the folder instead of starting one", False)
    # what is learned
    method: str = _describe("lora, dora, mora, full, or freeze (the last layers only); q: on 4 bits, a: activated", "lora")
    rank: int = _describe("rank of the low-rank update", 8, ge=1)
    alpha: float | None = _describe("strength of the update; by default twice the rank")
    scaling: Literal["lora", "rslora"] = _describe("alpha/rank, or alpha/sqrt(rank) (rsLoRA)", "lora")
    dropout: float = _describe("share of inputs dropped on the adapter's path", 0.0, ge=0.0, lt=1.0)
    targets: str | list[str] | None = _describe(
        "layers to adapt: all-linear, names, or a regular expression; for full also all, norms, embeddings",
        None,
    )
    layers: str | list[int] | None = _describe("which blocks: a list, or 'last:4'")
    ranks: dict[str, int] = _describe("ranks of their own, by name or pattern of the layer", {})
    invocation: str | None = _describe("alora: text from which on the adapter acts; by default the start of an answer")
    options: dict[str, Any] = _describe("what only one method knows, e.g. {operator: sharing} for mora", {})
    # on what
    objective: Literal["auto", "sft", "pretrain", "classify", "mlm"] = _describe(
        "sft: learn the answers; pretrain: every token of a text; classify: a label; mlm: hidden tokens", "auto"
    )
    columns: dict[str, str] = _describe("names of your columns, e.g. {prompt: question, completion: answer}", {})
    template: str | None = _describe("chat template: the tokenizer's own by default, 'plain', 'chatml' or a file")
    holdout: float | Path = _describe("share of the rows kept for judging, or a file of them", 0.1)
    general: Path | None = _describe("general text on which forgetting is measured; one is built in")
    max_length: int | None = _describe("longest sequence in tokens; by default what the base can read, up to 2,048")
    skip_bad_rows: bool = _describe("leave out rows that cannot be used, and list them", False)
    # how
    epochs: float = _describe("times to go over the data", 3.0, gt=0)
    steps: int | None = _describe("optimizer steps; takes the place of epochs", ge=1)
    batch_tokens: int = _describe("tokens in one pass", 2048, ge=1)
    accumulate: int = _describe("passes added up before each optimizer step", 1, ge=1)
    learning_rate: float | None = _describe("by default 2e-4 for adapters, 2e-5 for full", gt=0)
    learning_rates: dict[str, float] = _describe("rates of their own, by name or pattern of the layer", {})
    optimizer: Literal["adamw", "adamw-8bit", "adamw-8bit-offloaded"] = _describe(
        "8bit: a quarter of the optimizer's memory; offloaded: kept in the host's memory, off the GPU", "adamw"
    )
    schedule: Literal["cosine", "linear", "constant"] = _describe("how the rate falls after the warm-up", "cosine")
    warmup: float = _describe("share of the steps in which the rate rises", 0.05, ge=0.0, le=1.0)
    weight_decay: float = _describe("AdamW's weight decay", 0.0, ge=0.0)
    clip: float = _describe("largest norm of the gradient", 1.0, gt=0.0)
    checkpointing: bool = _describe("less memory, more time: recompute activations in the backward pass", False)
    check_every: int | None = _describe("steps between checkpoints, each with a held-out loss; by default a tenth")
    patience: int | None = _describe("stop after so many checks without a better held-out loss", ge=1)
    seed: int = _describe("seed of everything random", 0)

    @field_validator("targets")
    @classmethod
    def _split_names(cls, value: str | list[str] | None) -> str | list[str] | None:
        """A list may be written with commas."""
        return [name.strip() for name in value.split(",")] if isinstance(value, str) and "," in value else value

    @field_validator("layers", mode="before")
    @classmethod
    def _one_block(cls, value: Any) -> Any:
        """One block may be written as its number."""
        if isinstance(value, str) and value.strip().removeprefix("-").isdigit():
            value = int(value)
        return [value] if isinstance(value, int) and not isinstance(value, bool) else value


class PlanSettings(TrainSettings):
    """Everything `afina plan` can be told: a training run's settings, and what is asked about it."""

    data: Path | None = _describe("as for train; without it, memory and time of full batches alone")  # type: ignore[assignment]
    compare: bool = _describe("all methods in one table: memory, time, numbers to learn, size of the file", False)
    probe: bool = _describe("measure this machine anew: a few seconds, kept for later plans", False)


class EvalSettings(BaseSettings):
    """Everything `afina eval` can be told."""

    base: str | None = _describe("the frozen model; by default the one that the run was trained on")  # type: ignore[assignment]
    run: Path | None = _describe("a run or adapter folder; without it the base alone is judged")
    data: Path | None = _describe("rows to judge on; by default the run's own held-out rows")
    columns: dict[str, str] = _describe("names of your columns, e.g. {prompt: question, completion: answer}", {})
    metrics: list[str] = _describe("exact_match, accuracy, chrf, bleu, rouge", ["exact_match", "chrf"])
    limit: int = _describe("most rows for which an answer is generated", 200, ge=1)
    max_new_tokens: int = _describe("longest answer in tokens", 128, ge=1)


class GenerateSettings(BaseSettings):
    """Everything `afina generate` can be told."""

    base: str | None = _describe("the frozen model; by default the one that the run was trained on")  # type: ignore[assignment]
    prompts: list[str] = _describe("the prompts; '-' reads one a line from standard input", ...)
    run: Path | None = _describe("a run or adapter folder; without it the base answers")
    adapter: Literal["on", "off"] = _describe("answer with the adapter, or with the base below it", "on")
    raw: bool = _describe("continue the text itself instead of asking it as a chat", False)
    max_new_tokens: int = _describe("longest answer in tokens", 128, ge=1)
    temperature: float = _describe("0 takes the likeliest token each time", 0.0, ge=0.0)
    top_p: float = _describe("sample from the likeliest tokens that hold this share", 1.0, gt=0.0, le=1.0)
    seed: int = _describe("seed of the sampling", 0)


class ChatSettings(BaseSettings):
    """Everything `afina chat` can be told."""

    base: str | None = _describe("the frozen model; by default the one that the run was trained on")  # type: ignore[assignment]
    run: Path | None = _describe("a run or adapter folder; without it the base answers")
    system: str | None = _describe("a first message that sets the scene")
    max_new_tokens: int = _describe("longest answer in tokens", 256, ge=1)
    temperature: float = _describe("0 takes the likeliest token each time", 0.0, ge=0.0)
    top_p: float = _describe("sample from the likeliest tokens that hold this share", 1.0, gt=0.0, le=1.0)
    seed: int = _describe("seed of the sampling", 0)


class MergeSettings(BaseSettings):
    """Everything `afina merge` can be told."""

    base: str | None = _describe("the frozen model; by default the one that the run was trained on")  # type: ignore[assignment]
    run: Path = _describe("a run or adapter folder", ...)
    out: Path = _describe("folder of the merged Hugging Face model", ...)
    storage: Literal["plain", "nf4"] = _describe("plain: 16 or 32 bits a weight; nf4: 4 bits, in bitsandbytes' form", "plain")
    tolerance: float | None = _describe("how far its answers may be from the adapted model's, nats a token (KL)", gt=0)
    allow_other_base: bool = _describe("merge into a base that the adapter was not trained on", False)
    admit: Literal["any", "audited"] = _describe("audited: only adapters that `afina audit` has let through", "any")


class ExportSettings(MergeSettings):
    """Everything `afina export` can be told."""

    run: Path | None = _describe("a run or adapter folder; without it, for gguf, the base alone")  # type: ignore[assignment]
    out: Path = _describe("the folder to write; for gguf and gguf-lora also a file, FILE.gguf", ...)
    format: Literal["hf", "peft", "gguf", "gguf-lora"] = _describe(
        "hf, gguf: a merged model, for transformers or llama.cpp; peft, gguf-lora: the adapter alone", "hf"
    )
    weights: Literal["auto", "f32", "bf16", "f16"] = _describe("gguf: how weights are held; by default as the base's", "auto")


class CombineSettings(BaseSettings):
    """Everything `afina combine` can be told."""

    base: str | None = _describe("the frozen model; by default the one that the adapters were trained on")  # type: ignore[assignment]
    parts: list[str] = _describe("adapters or runs with their weights: A:0.6 B:0.4; a negative one takes a skill out", ...)
    out: Path = _describe("folder of the combination", ...)
    how: Literal["sum", "svd", "slerp", "ties", "dare", "magnitude", "della", "search"] = _describe(
        "sum: exact; svd: the best of a rank; slerp: on the arc between two; ties, dare, magnitude, della: entry by entry; "
        "search: find the weights on --data",
        "sum",
    )
    rank: int | None = _describe("largest rank of the result; by default the parts' ranks added up (sum: always)", ge=1)
    density: float = _describe("share of entries that ties, dare, magnitude and della keep", 0.5, gt=0.0, le=1.0)
    seed: int = _describe("seed of dare, della and search", 0)
    data: Path | None = _describe("search: a few rows with answers; half of them check what was found on the other half")
    columns: dict[str, str] = _describe("names of your columns, e.g. {prompt: question, completion: answer}", {})
    penalty: float = _describe("search: nats a token for each unit of |weights| (L1)", 0.05, ge=0.0)
    steps: int = _describe("search: most times that the loss is measured", 60, ge=5)
    admit: Literal["any", "audited"] = _describe("audited: only adapters that `afina audit` has let through", "any")


class ExtractSettings(BaseSettings):
    """Everything `afina extract` can be told."""

    base: str | None = _describe("the frozen model; by default the one that the run was trained on")  # type: ignore[assignment]
    run: Path | None = _describe("a run or adapter of any method")
    tuned: Path | None = _describe("in its place: the folder of a model that was fine-tuned from --base")
    out: Path = _describe("folder of the low-rank adapter", ...)
    rank: int | None = _describe("largest rank of a layer", ge=1)
    energy: float | None = _describe("share of each layer's squared change to keep, e.g. 0.9; ranks follow", gt=0.0, le=1.0)
    data: Path | None = _describe("rows to measure the loss on; by default the run's own held-out rows, or general text")
    columns: dict[str, str] = _describe("names of your columns, e.g. {prompt: question, completion: answer}", {})


class ShowSettings(Settings):
    """Everything `afina show` can be told."""

    run: Path = _describe("a run, an adapter or a composition", ...)


class AuditSettings(BaseSettings):
    """Everything `afina audit` can be told."""

    base: str | None = _describe("folder of the base: shapes, weights and behaviour are looked at beside it")  # type: ignore[assignment]
    run: Path = _describe("a run, an adapter or a composition", ...)
    strict: bool = _describe("what asks for a review is blocked", False)
    key: Path | None = _describe("public key (PEM) of a signer that you trust")
    calibration: Path | None = _describe("file or folder of benign adapters' statistics; by default afina's own")
    alpha: float = _describe("share of benign adapters of its kind that may be sent to review", 0.05, gt=0.0, lt=1.0)
    budget: float = _describe("seconds for looking at what it does; 0 leaves that out, and asks for a review", 30.0, ge=0.0)
    prompts: Path | None = _describe("a few prompts of its task, one a line: a trigger may work only there")
    sarif: Path | None = _describe("write the report as SARIF 2.1.0 too")
    accept: str | None = _describe("accept a verdict of review: who looked, and why it is harmless; kept in the log")


class SignSettings(Settings):
    """Everything `afina sign` can be told."""

    run: Path = _describe("a run or adapter folder", ...)
    key: Path = _describe("private key: elliptic (P-256, P-384, P-521), PEM", ...)
    base: Path | None = _describe("folder of the base, to sign for its tokenizer and chat template too")


class VerifySettings(Settings):
    """Everything `afina verify` can be told."""

    run: Path = _describe("a run or adapter folder", ...)
    key: Path = _describe("public key of the signer (PEM)", ...)
    base: Path | None = _describe("folder of the base, to check that it is the one that was signed for")


class RevokeSettings(Settings):
    """Everything `afina revoke` can be told."""

    target: str = _describe("an adapter's folder, or its hash", ...)
    reason: str = _describe("why it must not be used any more", ...)


class DemoSettings(Settings):
    """Everything `afina demo` can be told."""

    out: Path = _describe("the run folder", Path("runs/demo"))
    steps: int = _describe("optimizer steps", 400, ge=1)
    seed: int = _describe("seed of everything random", 0)


AnySettings = TypeVar("AnySettings", bound=Settings)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of settings as a mapping; raises `SettingsError` on anything else."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read the settings file: {error.strerror}", where=str(path)) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise SettingsError("not valid YAML", where=where, why=getattr(error, "problem", None)) from error
    if not isinstance(content, dict):
        raise SettingsError("expected one `name: value` a line", where=str(path))
    return content


def make_settings(kind: type[AnySettings], values: Mapping[str, Any], where: str | None = None) -> AnySettings:
    """Settings of a verb from plain values; raises `SettingsError` naming what is wrong and the nearest name."""
    for name in values:
        if name not in kind.model_fields:
            raise SettingsError(f"unknown setting {name!r}", where=where, hint=nearest(name, kind.model_fields))
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "settings"
        if first["type"] == "missing":
            raise SettingsError(f"{name} is missing", where=where, hint=kind.model_fields[name].description) from None
        raise SettingsError(
            f"{name} cannot be {first['input']!r}",
            where=where,
            why=first["msg"],
            hint=f"{name}: {kind.model_fields[name].description}" if name in kind.model_fields else None,
        ) from None


def resolved(settings: Settings) -> dict[str, Any]:
    """Settings as plain values, ready for YAML or JSON."""
    return settings.model_dump(mode="json")
