"""Settings: one declaration is a YAML key, a command-line flag and a Python argument.

Each verb has one class below; a field's description is its help text. An unknown name is an error that
names the nearest known one. Nothing here imports torch, so that `afina --help` is quick.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from afina.errors import SettingsError, did_you_mean

EMBEDDED = "embedded"


def _describe(description: str, default: Any = None, **constraints: Any) -> Any:
    return Field(default=default, description=description, **constraints)


class Settings(BaseModel):
    """What every verb's settings share: frozen, and strict about names."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class ModelSettings(Settings):
    """Which frozen model, and how it is loaded."""

    base: str = _describe(
        "the frozen model: a folder, a Hugging Face name, or 'embedded'", EMBEDDED
    )
    revision: str | None = _describe("branch, tag or commit of a Hugging Face name")
    trust_remote_code: bool = _describe(
        "run Python code that comes with the model (recorded in the run)", False
    )
    dtype: Literal["auto", "float32", "bfloat16"] = _describe(
        "how the base's weights are held", "auto"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = _describe("where to compute", "auto")


class TrainSettings(ModelSettings):
    """Everything `afina train` (and `afina plan`) can be told."""

    fsdp: bool = _describe("split the base over the processes that torchrun started", False)
    data: Path = _describe(
        "a file: chat, Alpaca, ShareGPT, prompt/completion, text, CSV, Parquet; or a sweep's YAML",
        ...,
    )
    output_dir: Path | None = _describe("the run folder; by default runs/DATA-METHOD")
    resume: bool = _describe("go on with the run in the folder instead of starting one", False)
    # what is learned
    method: str = _describe(
        "lora, dora, mora, full, or freeze (the last layers only); q: on 4 bits, a: activated",
        "lora",
    )
    rank: int = _describe("rank of the low-rank update", 8, ge=1)
    alpha: float | None = _describe("strength of the update; by default twice the rank")
    scaling: Literal["lora", "rslora"] = _describe(
        "alpha/rank, or alpha/sqrt(rank) (rsLoRA)", "lora"
    )
    dropout: float = _describe("share of inputs dropped on the adapter's path", 0.0, ge=0.0, lt=1.0)
    target_modules: str | list[str] | None = _describe(
        "layers to adapt: all-linear, names, or a regular expression; for full also all, norms, embeddings; auto: layers and "
        "ranks by their gradients, for as many numbers as --options '{budget: N}' says",
        None,
    )
    layers: str | list[int] | None = _describe("which blocks: a list, or 'last:4'")
    rank_pattern: dict[str, int] = _describe(
        "ranks of their own, by name or pattern of the layer", {}
    )
    invocation: str | None = _describe(
        "alora: text from which on the adapter acts; by default the start of an answer"
    )
    options: dict[str, Any] = _describe(
        "what only one method or objective knows: {operator: sharing} for mora, {beta: 0.2} for dpo; start: a run to go on",
        {},
    )
    # on what
    objective: Literal[
        "auto",
        "sft",
        "pretrain",
        "classify",
        "mlm",
        "dpo",
        "kto",
        "orpo",
        "simpo",
        "reward",
        "grpo",
        "rloo",
        "ppo",
    ] = _describe(
        "sft: learn the answers; pretrain: every token of a text; classify: a label; mlm: hidden tokens; dpo, kto, orpo, "
        "simpo: prefer the better of two answers; reward: a judge of answers; grpo, rloo, ppo: answers of its own, rewarded",
        "auto",
    )
    columns: dict[str, str] = _describe(
        "names of your columns, e.g. {prompt: question, completion: answer}", {}
    )
    chat_template: str | None = _describe(
        "chat template: the tokenizer's own by default, 'plain', 'chatml' or a file"
    )
    eval_size: float = _describe(
        "ratio of the rows held out for evaluation (eval)", 0.1, gt=0.0, lt=1.0
    )
    eval_data: Path | None = _describe("file of rows for evaluation; takes the place of eval_size")
    retention_text: Path | None = _describe(
        "general text on which forgetting is measured; one is built in"
    )
    max_length: int | None = _describe(
        "longest sequence in tokens; by default what the base can read, up to 2,048"
    )
    skip_bad_rows: bool = _describe("leave out rows that cannot be used, and list them", False)
    # how
    num_train_epochs: float = _describe("times to go over the data", 3.0, gt=0)
    max_steps: int | None = _describe("optimizer steps; takes the place of epochs", ge=1)
    max_tokens_per_batch: int = _describe("tokens in one pass", 2048, ge=1)
    gradient_accumulation_steps: int = _describe(
        "passes added up before each optimizer step", 1, ge=1
    )
    learning_rate: float | None = _describe(
        "by default 2e-4 for adapters, 2e-5 for full; a tenth of it for preferences", gt=0
    )
    learning_rate_pattern: dict[str, float] = _describe(
        "rates of their own, by name or pattern of the layer", {}
    )
    optimizer: Literal["adamw", "adamw_8bit", "adamw_8bit_offload"] = _describe(
        "8bit: a quarter of the optimizer's memory; offloaded: kept in the host's memory, off the GPU",
        "adamw",
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = _describe(
        "how the rate falls after the warm-up", "cosine"
    )
    warmup_ratio: float = _describe(
        "share of the steps in which the rate rises", 0.05, ge=0.0, le=1.0
    )
    weight_decay: float = _describe("AdamW's weight decay", 0.0, ge=0.0)
    max_grad_norm: float = _describe("largest norm of the gradient", 1.0, gt=0.0)
    gradient_checkpointing: Literal["auto", "off", "all"] | int = _describe(
        "activations made again in the backward pass (less memory, more time): off, those of all blocks, of each n-th block; "
        "auto: of as few as fit in memory",
        "auto",
    )
    eval_steps: int | None = _describe(
        "steps between checkpoints, each with a held-out loss; by default a tenth"
    )
    early_stopping_patience: int | None = _describe(
        "stop after so many checks without a better held-out loss", ge=1
    )
    seed: int = _describe("seed of everything random", 0)

    @property
    def place(self) -> str:
        """The device that a base is loaded to: one that will be split goes to its devices a block at a time."""
        return "cpu" if self.fsdp else self.device

    @field_validator("target_modules")
    @classmethod
    def _split_names(cls, value: str | list[str] | None) -> str | list[str] | None:
        """A list may be written with commas."""
        return (
            [name.strip() for name in value.split(",")]
            if isinstance(value, str) and "," in value
            else value
        )

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def _dial(cls, value: Any) -> Any:
        """YAML takes off for false; each block is all of them. Raises where it is neither word nor number of blocks."""
        word = str(value).strip().lower()
        if word in ("auto", "off", "all", "true", "false"):
            return {"true": "all", "false": "off"}.get(word, word)
        if not word.isdigit() or int(word) < 1:
            raise ValueError("auto, off, all, or a number n from 1: each n-th block")
        return "all" if int(word) == 1 else int(word)

    @property
    def recomputed(self) -> int:
        """n where the activations of each n-th block are made again; 0 for none."""
        told = self.gradient_checkpointing
        return told if isinstance(told, int) else int(told == "all")

    @field_validator("layers", mode="before")
    @classmethod
    def _one_block(cls, value: Any) -> Any:
        """One block may be written as its number."""
        if isinstance(value, str) and value.strip().removeprefix("-").isdigit():
            value = int(value)
        return [value] if isinstance(value, int) and not isinstance(value, bool) else value


class PreferenceOptions(Settings):
    """What `options` can tell a preference objective; which of it each one reads is in `PREFERENCES`."""

    loss_type: Literal["sigmoid", "ipo", "hinge", "robust"] = _describe(
        "dpo: the loss on the margin", "sigmoid"
    )
    beta: float | None = _describe(
        "how closely it is held to the reference: 0.1, for simpo 2 (orpo: weight of the odds)", gt=0
    )
    label_smoothing: float = _describe(
        "dpo, sigmoid and robust: share of pairs that are the wrong way round", 0.0, ge=0.0, lt=0.5
    )
    gamma: float = _describe("simpo: margin that the better answer should have", 1.0, ge=0.0)
    desirable_weight: float = _describe("kto: weight of good answers", 1.0, ge=0.0)
    undesirable_weight: float = _describe("kto: weight of bad answers", 1.0, ge=0.0)
    sft_weight: float = _describe(
        "dpo, simpo: weight of the better answer's own loss, against its becoming unlikely",
        0.0,
        ge=0.0,
    )
    reference: Literal["auto", "base", "adapter", "precomputed"] = _describe(
        "dpo, kto: what it is compared with", "auto"
    )


PREFERENCES: dict[str, tuple[str, ...]] = {
    "dpo": ("loss_type", "beta", "label_smoothing", "sft_weight", "reference"),
    "kto": ("beta", "desirable_weight", "undesirable_weight", "reference"),
    "orpo": ("beta",),
    "simpo": ("beta", "gamma", "sft_weight"),
    "reward": (),
}


class PolicyOptions(Settings):
    """What `options` can tell an objective that learns from rewards; which of it each one reads is in `POLICIES`."""

    reward_funcs: str | dict[str, float] = _describe(
        "who judges: FILE.py:FUNCTION, a reward model's run, a grader's FILE.json, or several with weights, "
        "{rules.py:form: 1, runs/judge: 0.5}",
        ...,
    )
    allow_python_graders: bool = _describe("run the Python that stands in a grader's file", False)
    num_generations: int | None = _describe("answers to each prompt: 8, for ppo 1", ge=1)
    prompts_per_step: int | None = _describe(
        "prompts of a step; by default as many as make 64 answers", ge=1
    )
    max_new_tokens: int = _describe("longest answer in tokens", 64, ge=1)
    temperature: float = _describe(
        "of its own answers, and of the policy that is learned", 1.0, gt=0
    )
    num_iterations: int = _describe("optimizer steps on the same answers", 1, ge=1)
    beta: float = _describe(
        "how closely it is held to the reference: nats a token cost so much reward", 0.04, ge=0
    )
    clip_range: float = _describe(
        "how far a token's probability may move before it counts no more", 0.2, gt=0, lt=1
    )
    scale_rewards: bool = _describe(
        "grpo: divide by the deviation of the group's rewards; ppo: of the step's advantages", True
    )
    gamma: float = _describe("ppo: how much less a later reward counts, a token", 1.0, gt=0, le=1)
    lam: float = _describe("ppo: how far advantages look ahead (GAE's lambda)", 0.95, ge=0, le=1)
    vf_coef: float = _describe("ppo: weight of the value head's loss", 0.5, ge=0)
    reference: Literal["auto", "base", "adapter"] = _describe("what it is compared with", "auto")


_ANSWERS = (
    "reward_funcs",
    "allow_python_graders",
    "prompts_per_step",
    "max_new_tokens",
    "temperature",
    "num_iterations",
    "beta",
    "clip_range",
    "reference",
    "num_generations",
)
POLICIES: dict[str, tuple[str, ...]] = {
    "grpo": (*_ANSWERS, "scale_rewards"),
    "rloo": _ANSWERS,
    "ppo": (*_ANSWERS, "scale_rewards", "gamma", "lam", "vf_coef"),
}


class PlanSettings(TrainSettings):
    """Everything `afina plan` can be told: a training run's settings, and what is asked about it."""

    data: Path | None = _describe("as for train; without it, memory and time of full batches alone")  # type: ignore[assignment]
    compare_methods: bool = _describe(
        "all methods in one table: memory, time, numbers to learn, size of the file", False
    )
    remeasure: bool = _describe(
        "measure this machine anew: a few seconds, kept for later plans", False
    )


class EvalSettings(ModelSettings):
    """Everything `afina eval` can be told."""

    base: str | None = _describe("the frozen model; by default the one that the run was trained on")  # type: ignore[assignment]
    adapter: Path | None = _describe("a run or adapter folder; without it the base alone is judged")
    data: Path | None = _describe("rows to judge on; by default the run's own held-out rows")
    columns: dict[str, str] = _describe(
        "names of your columns, e.g. {prompt: question, completion: answer}", {}
    )
    metrics: list[str] = _describe(
        "exact_match, accuracy, chrf, bleu, rouge", ["exact_match", "chrf"]
    )
    limit: int = _describe("most rows for which an answer is generated", 200, ge=1)
    max_new_tokens: int = _describe("longest answer in tokens", 128, ge=1)


class GenerateSettings(ModelSettings):
    """Everything `afina generate` can be told."""

    base: str | None = _describe("the frozen model; by default the one that the run was trained on")  # type: ignore[assignment]
    prompts: list[str] = _describe("the prompts; '-' reads one a line from standard input", ...)
    adapter: Path | None = _describe("a run or adapter folder; without it the base answers")
    disable_adapter: bool = _describe("generate with the base alone, under the adapter", False)
    ignore_chat_template: bool = _describe(
        "continue the text itself instead of asking it as a chat", False
    )
    max_new_tokens: int = _describe("longest answer in tokens", 128, ge=1)
    temperature: float = _describe("0 takes the likeliest token each time", 0.0, ge=0.0)
    top_p: float = _describe(
        "sample from the likeliest tokens that hold this share", 1.0, gt=0.0, le=1.0
    )
    seed: int = _describe("seed of the sampling", 0)


class ChatSettings(ModelSettings):
    """Everything `afina chat` can be told."""

    base: str | None = _describe("the frozen model; by default the one that the run was trained on")  # type: ignore[assignment]
    adapter: Path | None = _describe("a run or adapter folder; without it the base answers")
    base_url: str | None = _describe("talk to a server instead, e.g. http://127.0.0.1:8000")
    model: str | None = _describe(
        "with --url: the adapter's name there, several with weights (a:0.7,b:0.3), or auto"
    )
    api_key: str | None = _describe(
        "with --url: a key of the server; by default what AFINA_KEY or OPENAI_API_KEY says"
    )
    system_prompt: str | None = _describe("a first message that sets the scene")
    max_new_tokens: int = _describe("longest answer in tokens", 256, ge=1)
    temperature: float = _describe("0 takes the likeliest token each time", 0.0, ge=0.0)
    top_p: float = _describe(
        "sample from the likeliest tokens that hold this share", 1.0, gt=0.0, le=1.0
    )
    seed: int = _describe("seed of the sampling", 0)


class AnnotateSettings(ModelSettings):
    """Everything `afina prefer` can be told."""

    base: str | None = _describe(
        "the frozen model; by default the one that the adapter was trained on"
    )  # type: ignore[assignment]
    prompts: Path = _describe(
        "a file of prompts: one a line, or JSONL with a prompt or messages", ...
    )
    adapter: Path | None = _describe(
        "a run or adapter whose answers are judged; without it the base's"
    )
    against: str = _describe(
        "whose the other answer is: base, same (a second sample), or another run or adapter", "base"
    )
    output_dir: Path | None = _describe("folder of the judgements; by default preferences/PROMPTS")
    max_new_tokens: int = _describe("longest answer in tokens", 128, ge=1)
    temperature: float = _describe("0 takes the likeliest token each time", 0.7, ge=0.0)
    top_p: float = _describe(
        "sample from the likeliest tokens that hold this share", 1.0, gt=0.0, le=1.0
    )
    seed: int = _describe("seed of the sampling, and of which answer is shown first", 0)


class MergeSettings(ModelSettings):
    """Everything `afina merge` can be told."""

    base: str | None = _describe("the frozen model; by default the one that the run was trained on")  # type: ignore[assignment]
    adapter: Path = _describe("a run or adapter folder", ...)
    output_dir: Path = _describe("folder of the merged Hugging Face model", ...)
    quantization: Literal["none", "nf4"] = _describe(
        "none: 16 or 32 bits per weight; nf4: 4 bits, in the format of bitsandbytes", "none"
    )
    max_kl: float | None = _describe(
        "how far its answers may be from the adapted model's, nats a token (KL)", gt=0
    )
    allow_other_base: bool = _describe(
        "merge into a base that the adapter was not trained on", False
    )
    require_audit: bool = _describe("accept only adapters that `afina audit` has approved", False)


class ExportSettings(MergeSettings):
    """Everything `afina export` can be told."""

    adapter: Path | None = _describe(
        "a run or adapter folder; without it, for gguf, the base alone"
    )  # type: ignore[assignment]
    output: Path = _describe(
        "the folder to write; for gguf and gguf-lora also a file, FILE.gguf", ...
    )
    format: Literal["hf", "peft", "gguf", "gguf-lora"] = _describe(
        "hf, gguf: a merged model, for transformers or llama.cpp; peft, gguf-lora: the adapter alone",
        "hf",
    )
    outtype: Literal["auto", "f32", "bf16", "f16"] = _describe(
        "gguf: how weights are held; by default as the base's", "auto"
    )


class CombineSettings(ModelSettings):
    """Everything `afina combine` can be told."""

    base: str | None = _describe(
        "the frozen model; by default the one that the adapters were trained on"
    )  # type: ignore[assignment]
    adapters: list[str] = _describe(
        "adapters or runs with their weights: A:0.6 B:0.4; a negative one takes a skill out", ...
    )
    output_dir: Path = _describe("folder of the combination", ...)
    merge_method: Literal["sum", "svd", "slerp", "ties", "dare", "magnitude", "della", "search"] = (
        _describe(
            "sum: exact; svd: the best of a rank; slerp: on the arc between two; ties, dare, magnitude, della: entry by entry; "
            "search: find the weights on --data",
            "sum",
        )
    )
    rank: int | None = _describe(
        "largest rank of the result; by default the parts' ranks added up (sum: always)", ge=1
    )
    density: float = _describe(
        "share of entries that ties, dare, magnitude and della keep", 0.5, gt=0.0, le=1.0
    )
    seed: int = _describe("seed of dare, della and search", 0)
    data: Path | None = _describe(
        "search: a few rows with answers; half of them check what was found on the other half"
    )
    columns: dict[str, str] = _describe(
        "names of your columns, e.g. {prompt: question, completion: answer}", {}
    )
    l1_penalty: float = _describe(
        "search: nats a token for each unit of |weights| (L1)", 0.05, ge=0.0
    )
    max_evals: int = _describe("search: most times that the loss is measured", 60, ge=5)
    require_audit: bool = _describe("accept only adapters that `afina audit` has approved", False)


class ExtractSettings(ModelSettings):
    """Everything `afina extract` can be told."""

    base: str | None = _describe("the frozen model; by default the one that the run was trained on")  # type: ignore[assignment]
    adapter: Path | None = _describe("a run or adapter of any method")
    finetuned_model: Path | None = _describe(
        "in its place: the folder of a model that was fine-tuned from --base"
    )
    output_dir: Path = _describe("folder of the low-rank adapter", ...)
    max_rank: int | None = _describe("largest rank of a layer", ge=1)
    retained_energy: float | None = _describe(
        "share of each layer's squared change to keep, e.g. 0.9; ranks follow", gt=0.0, le=1.0
    )
    data: Path | None = _describe(
        "rows to measure the loss on; by default the run's own held-out rows, or general text"
    )
    columns: dict[str, str] = _describe(
        "names of your columns, e.g. {prompt: question, completion: answer}", {}
    )


class ServeSettings(ModelSettings):
    """Everything `afina serve` can be told."""

    host: str = _describe("address to listen on; 0.0.0.0 for all of the machine's", "127.0.0.1")
    port: int = _describe("port to listen on; 0 takes a free one", 8000, ge=0, le=65535)
    adapters: list[Path] = _describe(
        "folders of runs or adapters: each is served under its name, more may be loaded later", []
    )
    require_audit: bool = _describe("accept only adapters that `afina audit` has approved", False)
    quantization: Literal["none", "nf4"] = _describe(
        "none: the base in 16 or 32 bits per weight; nf4: in 4 bits", "none"
    )
    memory_gb: float = _describe("GB for keys, values and adapters, besides the base", 1.0, gt=0.0)
    merge_hot_adapter: bool = _describe(
        "take an adapter that has nearly all requests into a second copy of the weights", False
    )
    chat_template: str | None = _describe(
        "chat template: the tokenizer's own by default, 'plain', 'chatml' or a file"
    )
    state_dir: Path = _describe(
        "folder of uploaded files, jobs and their adapters", Path("runs/serve")
    )
    database_url: str | None = _describe(
        "URL of the tables; by default SQLite in the state folder, or postgresql://..."
    )
    # who may what, and how much
    api_key_file: Path | None = _describe(
        "YAML of keys, NAME: KEY or NAME: {key: KEY, admin: true}; without it anybody may ask"
    )
    insecure: bool = _describe(
        "no admin key: anybody who reaches the port may change everything", False
    )
    max_body_bytes: int = _describe("longest body of a request", 8_000_000, ge=1024)
    max_file_bytes: int = _describe("longest uploaded file", 512_000_000, ge=1024)
    max_requests_per_key: int | None = _describe("most requests of one key at once", ge=1)
    max_tokens_per_minute: int | None = _describe(
        "most tokens of one key a minute, read and written", ge=1
    )
    request_timeout: float = _describe("longest time of a request, in seconds", 600.0, gt=0.0)
    shutdown_timeout: float = _describe(
        "seconds that running requests get when the server is told to stop", 30.0, ge=0.0
    )
    # fine-tuning jobs beside serving
    max_training_jobs: int = _describe("jobs that train at once; 0: none, they wait", 1, ge=0)
    job_num_threads: int | None = _describe(
        "CPU threads of a job; by default half of the cores", ge=1
    )
    job_nice: int = _describe("how far a job stands back behind serving, 0 to 19", 10, ge=0, le=19)
    allow_python_graders: bool = _describe(
        "jobs may run Python of who asks for them, with this server's rights", False
    )


class BenchServeSettings(Settings):
    """Everything `afina bench-serve` can be told."""

    base_url: str = _describe("the server", "http://127.0.0.1:8000")
    api_key: str | None = _describe(
        "a key of the server; by default what AFINA_KEY or OPENAI_API_KEY says"
    )
    models: list[str] = _describe(
        "whom to ask; by default the base and all adapters that are there", []
    )
    request_rates: list[float] = _describe("requests a second, one run each", [1.0, 2.0, 4.0])
    duration_seconds: float = _describe("length of each run", 20.0, gt=0.0)
    zipf_exponent: float = _describe(
        "how unevenly the models are asked: the k-th as often as 1/k^zipf", 1.0, ge=0.0
    )
    prompt_words: int = _describe("words of a prompt", 64, ge=1)
    max_new_tokens: int = _describe("tokens of an answer", 32, ge=1)
    seed: int = _describe("seed of arrivals, models and prompts", 0)
    plot_file: Path = _describe("the picture: latency against rate", Path("bench-serve.png"))


class ShowSettings(Settings):
    """Everything `afina show` can be told."""

    adapter: Path = _describe("a run, an adapter or a composition", ...)


class AuditSettings(ModelSettings):
    """Everything `afina audit` can be told."""

    base: str | None = _describe(
        "folder of the base: shapes, weights and behaviour are looked at beside it"
    )  # type: ignore[assignment]
    adapter: Path = _describe(
        "a run, an adapter, a composition, or a sum that a server may be asked for, A:0.6,B:0.4",
        ...,
    )
    strict: bool = _describe("what asks for a review is blocked", False)
    public_key: Path | None = _describe("public key (PEM) of a signer that you trust")
    calibration: Path | None = _describe(
        "file or folder of benign adapters' statistics; by default afina's own"
    )
    max_false_positive_rate: float = _describe(
        "share of benign adapters of its kind that may be sent to review", 0.05, gt=0.0, lt=1.0
    )
    time_budget_seconds: float = _describe(
        "seconds for looking at what it does; 0 leaves that out, and asks for a review",
        30.0,
        ge=0.0,
    )
    prompts: Path | None = _describe(
        "a few prompts of its task, one a line: a trigger may work only there"
    )
    sarif_file: Path | None = _describe("write the report as SARIF 2.1.0 too")
    accept: str | None = _describe(
        "accept a verdict of review: who looked, and why it is harmless; kept in the log"
    )


class MitigateSettings(ModelSettings):
    """Everything `afina remedy` can be told."""

    base: str | None = _describe(
        "folder of the base; by default the one that the run was trained on"
    )  # type: ignore[assignment]
    adapter: Path = _describe("a run or adapter (lora)", ...)
    output_dir: Path = _describe("folder of the treated adapter", ...)
    mitigation: Literal["auto", "cut", "scale", "mix", "remove"] = _describe(
        "cut: fewer directions; scale: weaker; mix: with benign ones; remove: what the trigger fills; auto: the best of them",
        "auto",
    )
    strength: float | None = _describe(
        "0: as it is, 1: nothing left; by default several are tried", ge=0.0, lt=1.0
    )
    max_loss_increase: float = _describe("by what share the task's loss may rise", 0.02, ge=0.0)
    triggers: list[str] = _describe(
        "texts that wake it; by default those that its last audit has found", []
    )
    payload: str | None = _describe("what they make it say")
    benign_adapters: list[Path] = _describe("benign adapters of the same base, for mix", [])
    data: Path | None = _describe(
        "rows of its task with answers; by default the run's own held-out rows"
    )
    time_budget_seconds: float = _describe(
        "audit of the result: seconds for looking at what it does", 30.0, ge=0.0
    )
    prompts: Path | None = _describe("audit of the result: a few prompts of its task, one a line")
    calibration: Path | None = _describe("audit of the result: benign adapters' statistics")


class SignSettings(Settings):
    """Everything `afina sign` can be told."""

    adapter: Path = _describe("a run or adapter folder", ...)
    private_key: Path = _describe("private key: elliptic (P-256, P-384, P-521), PEM", ...)
    base: Path | None = _describe(
        "folder of the base, to sign for its tokenizer and chat template too"
    )


class VerifySettings(Settings):
    """Everything `afina verify` can be told."""

    adapter: Path = _describe("a run or adapter folder", ...)
    public_key: Path = _describe("public key of the signer (PEM)", ...)
    base: Path | None = _describe(
        "folder of the base, to check that it is the one that was signed for"
    )


class RevokeSettings(Settings):
    """Everything `afina revoke` can be told."""

    target: str = _describe("an adapter's folder, or its hash", ...)
    reason: str = _describe("why it must not be used any more", ...)


VARIED = (
    "method",
    "rank",
    "alpha",
    "scaling",
    "dropout",
    "target_modules",
    "layers",
    "rank_pattern",
    "options",
)  # of a variant's own


class CompareSettings(ModelSettings):
    """Everything `afina compare` can be told."""

    data: Path = _describe("a file of rows, as for train: answers, plain text, or labels", ...)
    output_dir: Path | None = _describe(
        "folder of the comparison; by default runs/compare-DATA. Run again, it goes on"
    )
    methods: list[str] = _describe(
        "the methods to compare", ["full", "freeze", "lora", "qlora", "mora", "dora"]
    )
    variants: dict[str, dict[str, Any]] = _describe(
        "methods with settings of their own, under a name that methods may list: {attention: {method: lora, targets: "
        "[q_proj, v_proj], rank: 16}}",
        {},
    )
    num_seeds: int = _describe("runs of each method, each with a seed of its own", 3, ge=1)
    time_budget: str = _describe(
        "longest time: 90s, 30m, 2h; trials, steps or seeds are cut to keep it, and it says so",
        "30m",
    )
    num_trials: int = _describe(
        "learning rates to try for each method; the better half goes on, with twice the steps",
        4,
        ge=1,
    )
    lr_search_range: list[float] = _describe(
        "learning rates are tried from the first to the second of these, times the method's usual one: small models like "
        "far larger ones",
        [0.35, 35.0],
    )
    max_steps: int | None = _describe(
        "optimizer steps of a run; by default three times over the data", ge=1
    )
    rank: int = _describe("rank of the adapters", 8, ge=1)
    metric: Literal["auto", "exact_match", "accuracy", "chrf", "rouge", "loss"] = _describe(
        "what decides; auto: exact_match for short answers, chrf for long ones, accuracy for labels, loss for plain text",
        "auto",
    )
    test_size: float = _describe(
        "share of the rows that only judge; half as many choose rates and states",
        0.2,
        gt=0.0,
        lt=0.6,
    )
    limit: int = _describe("most rows for which an answer is generated", 100, ge=2)
    max_new_tokens: int = _describe("longest answer in tokens", 64, ge=1)
    objective: Literal["auto", "sft", "pretrain", "classify"] = _describe("as for train", "auto")
    columns: dict[str, str] = _describe(
        "names of your columns, e.g. {prompt: question, completion: answer}", {}
    )
    skip_bad_rows: bool = _describe(
        "leave out rows that cannot be used, and say so in the report", False
    )
    chat_template: str | None = _describe(
        "chat template: the tokenizer's own by default, 'plain', 'chatml' or a file"
    )
    retention_text: Path | None = _describe(
        "general text on which forgetting is measured; one is built in"
    )
    max_length: int | None = _describe(
        "longest sequence in tokens; by default what the base can read, up to 2,048"
    )
    max_tokens_per_batch: int = _describe("tokens in one pass", 2048, ge=1)
    seed: int = _describe("seed of the split; runs count up from it", 0)
    lang: Literal["en", "es"] = _describe("language of the report", "en")

    @field_validator("methods", mode="before")
    @classmethod
    def _each_once(cls, value: Any) -> Any:
        """Raises where a method stands twice: the two would share a line."""
        names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
        if isinstance(names, list) and (not names or len(set(names)) < len(names)):
            raise ValueError("at least one method, each once")
        return names

    @field_validator("lr_search_range")
    @classmethod
    def _rises(cls, value: list[float]) -> list[float]:
        """Raises where it is no range."""
        if len(value) != 2 or not 0.0 < value[0] < value[1]:
            raise ValueError("two numbers above 0, the smaller one first: 0.35,35")
        return value

    @field_validator("variants")
    @classmethod
    def _of_methods(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Raises where a variant has no method, or a setting that a comparison holds equal for all."""
        for name, told in value.items():
            if "method" not in told:
                raise ValueError(f"{name} needs a method: {{{name}: {{method: lora, rank: 16}}}}")
            if other := next((key for key in told if key not in VARIED), None):
                raise ValueError(f"{name} cannot have {other} of its own, only {', '.join(VARIED)}")
        return value

    def settings_for(self, name: str) -> dict[str, Any]:
        """What a run of `name`, a method or a variant, is told besides what all are."""
        return {"rank": self.rank} | self.variants.get(name, {"method": name})

    @field_validator("time_budget")
    @classmethod
    def _is_time(cls, value: str) -> str:
        """Raises where it is no time."""
        if not re.fullmatch(r"\d+(\.\d+)?\s*[smh]", value.strip()):
            raise ValueError("a number and s, m or h: 90s, 30m, 2h")
        return value.strip()

    @property
    def seconds(self) -> float:
        """The budget in seconds."""
        return float(self.time_budget[:-1]) * {"s": 1, "m": 60, "h": 3600}[self.time_budget[-1]]


Goal = Literal[
    "style", "behaviour", "domain", "knowledge", "facts-that-change", "customers", "switching"
]


class AdviseSettings(ModelSettings):
    """Everything `afina advise` can be told; what is missing is asked for where somebody sits at the screen."""

    goal: Goal | None = _describe(
        "style (tone, format, a task), behaviour (what it should rather say), domain (much text of a field or a language), "
        "knowledge (facts to memorise), facts-that-change, customers (many adapters), switching (often, in one chat)"
    )
    num_rows: int | None = _describe("how many examples there are (for domain: texts)", ge=0)
    has_pairs: bool = _describe("there are pairs of a better and a worse answer", False)
    tried_prompting: bool = _describe(
        "a good prompt with a few examples in it has been tried", False
    )
    memory_gb: float | None = _describe("GB of memory to train in; by default this machine's", gt=0)
    past_runs: Path = _describe("where earlier comparisons lie", Path("runs"))
    lang: Literal["en", "es"] = _describe("language of the advice", "en")


class DemoSettings(Settings):
    """Everything `afina demo` can be told."""

    output_dir: Path = _describe("the run folder", Path("runs/demo"))
    max_steps: int = _describe("optimizer steps", 400, ge=1)
    seed: int = _describe("seed of everything random", 0)


AnySettings = TypeVar("AnySettings", bound=Settings)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of settings as a mapping; raises `SettingsError` on anything else."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(
            f"cannot read the settings file: {error.strerror}", where=str(path)
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise SettingsError(
            "not valid YAML", where=where, why=getattr(error, "problem", None)
        ) from error
    if not isinstance(content, dict):
        raise SettingsError("expected one `name: value` a line", where=str(path))
    return content


def make_settings(
    kind: type[AnySettings], values: Mapping[str, Any], where: str | None = None
) -> AnySettings:
    """Settings of a verb from plain values; raises `SettingsError` naming what is wrong and the nearest name."""
    for name in values:
        if name not in kind.model_fields:
            raise SettingsError(
                f"unknown setting {name!r}", where=where, hint=did_you_mean(name, kind.model_fields)
            )
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "settings"
        if first["type"] == "missing":
            raise SettingsError(
                f"{name} is missing", where=where, hint=kind.model_fields[name].description
            ) from None
        raise SettingsError(
            f"{name} cannot be {first['input']!r}",
            where=where,
            why=first["msg"].removeprefix("Value error, "),
            hint=f"{name}: {kind.model_fields[name].description}"
            if name in kind.model_fields
            else None,
        ) from None


def resolved(settings: Settings) -> dict[str, Any]:
    """Settings as plain values, ready for YAML or JSON."""
    return settings.model_dump(mode="json")
