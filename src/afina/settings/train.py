"""Settings of `afina train`."""

import re
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import field_validator

from afina.errors import did_you_mean
from afina.settings.common import allow_control_tokens_setting, setting, template_kwargs_setting
from afina.settings.data_files import DataFile, DataFiles, parse_data
from afina.settings.groups import GroupedSettings, MethodSettings, ObjectiveSettings
from afina.settings.objectives import objective_names

TRACKER_NAMES = ("tensorboard", "wandb", "mlflow", "trackio")


class TrainSettings(GroupedSettings):
    """Settings of `afina train`."""

    group_fields: ClassVar = {MethodSettings: "method", ObjectiveSettings: "objective"}

    fsdp: bool = setting("shard the base's weights over the processes of torchrun (FSDP)", False)
    data: Path | DataFiles = setting(
        "a file of rows (chat, Alpaca, ShareGPT, prompt/completion, text; JSONL, JSON, CSV, TSV, "
        "Parquet), several with their weights (a.jsonl:0.7,b.jsonl:0.3), or a sweep's YAML",
        ...,
    )
    output_dir: Path | None = setting(
        "the run folder; by default runs/DATA-METHOD, with a number where that exists"
    )
    overwrite: bool = setting("replace the run in that folder, if there is one", False)
    resume: bool | Literal["auto"] = setting(
        "resume the run in that folder instead of starting a new one; auto: if there is one", False
    )
    # the adapter
    method: str = setting(
        "lora, dora, mora, full, or freeze (the last layers only); q before it: on a base in 4 "
        "bits; a before it: active from the answer on (qlora, alora, qadora)",
        "lora",
        job=True,
        plugins="afina.methods",
    )
    rank: int = setting("rank of the low-rank update: width of the adapter", 8, ge=1, job=True)
    alpha: float | None = setting(
        "strength of the update (see scaling); by default twice the rank", job=True
    )
    scaling: Literal["lora", "rslora"] = setting(
        "factor of the update: alpha/rank (lora), or alpha/sqrt(rank) (rslora)", "lora", job=True
    )
    dropout: float = setting(
        "ratio of the adapter's inputs that are zeroed at random in training",
        0.0,
        ge=0.0,
        lt=1.0,
        job=True,
    )
    target_modules: str | list[str] | None = setting(
        "modules to adapt: all-linear, names, or a regular expression; for lora also experts, for "
        "full also all, norms, embeddings; auto: modules and ranks chosen by their gradients",
        job=True,
    )
    layers: str | list[int] | None = setting(
        "decoder layers to adapt: a list such as 0,1,5, or last:4; by default all", job=True
    )
    rank_pattern: dict[str, int] = setting(
        "other ranks by module name or pattern: {q_proj: 16}", {}, job=True
    )
    parameter_budget: int | None = setting(
        "target_modules auto: number of trainable parameters; by default as many as all-linear "
        "has at this rank",
        ge=1,
    )
    invocation: str | None = setting(
        "alora: text from which on the adapter is active; by default the start of an answer"
    )
    new_tokens: list[str] = setting(
        "words that become one token each, with rows of the embedding that are trained", []
    )
    init_adapter: Path | None = setting("a run or adapter to continue from; it stays the reference")
    frozen_adapter: Path | None = setting(
        "a run or adapter that stays active and frozen; the new adapter is trained on top of it"
    )
    # the data and the objective
    objective: str = setting(
        "what is minimized. sft: loss of the answers; pretrain: of every token; classify: of a "
        "label; embed: of vectors of texts; rerank: of the relevance of a passage; tag: of a tag "
        "per word; mlm: of masked tokens; dpo, kto, orpo, simpo: prefer the better of two answers; "
        "reward: a model that scores answers; grpo, rloo, ppo: rewards of sampled answers",
        "auto",
        job=True,
        plugins="afina.objectives",
    )
    columns: dict[str, str | list[str] | None] = setting(
        "names of the file's columns, e.g. {prompt: question, completion: answer}; several as one "
        "text: {prompt: '{context}: {question}'}; {notes: null} leaves a column out",
        {},
        job=True,
    )
    chat_template: str | None = setting(
        "chat template: the tokenizer's own by default, plain, chatml, or a file"
    )
    template_kwargs: dict[str, Any] = template_kwargs_setting()
    allow_control_tokens: bool = allow_control_tokens_setting()
    eval_size: float = setting(
        "ratio of the rows held out for evaluation (eval rows)", 0.1, gt=0.0, lt=1.0
    )
    eval_data: Path | None = setting("file of eval rows; takes precedence over eval_size")
    retention_text: Path | None = setting(
        "general text on which forgetting is measured (retention loss); one is built in"
    )
    max_length: int | None = setting(
        "longest sequence in tokens; by default the base's limit, up to 2,048", job=True
    )
    truncate: bool = setting(
        "cut rows longer than max_length, keeping their answers, instead of an error",
        False,
        job=True,
    )
    skip_bad_rows: bool = setting("skip rows that cannot be used, and list them", False, job=True)
    # training
    num_train_epochs: float | None = setting(
        "passes over the rows (epochs); by default 3, and as many more as give 100 optimizer steps",
        gt=0,
    )
    max_steps: int | None = setting(
        "optimizer steps; takes precedence over num_train_epochs", ge=1, job=True
    )
    max_tokens_per_batch: int = setting(
        "tokens of one micro-batch, over all processes", 2048, ge=1, job=True
    )
    gradient_accumulation_steps: int = setting("micro-batches per optimizer step", 1, ge=1)
    learning_rate: float | None = setting(
        "peak learning rate; by default 2e-4 for adapters and 2e-5 for full on a base of hidden "
        "size 4,096, more on narrower ones; a quarter of it for classes, a tenth for preferences "
        "and rewards",
        gt=0,
        job=True,
    )
    learning_rate_pattern: dict[str, float] = setting(
        "other learning rates by module name or pattern: {lm_head: 1e-5}", {}
    )
    optimizer: Literal["adamw", "adamw_8bit", "adamw_8bit_offload"] = setting(
        "adamw_8bit: a quarter of the optimizer's memory; adamw_8bit_offload: its state is kept in "
        "the host's memory, off the GPU",
        "adamw",
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = setting(
        "how the learning rate falls after the warmup", "cosine", job=True
    )
    warmup_ratio: float = setting(
        "ratio of the steps in which the learning rate rises", 0.05, ge=0.0, le=1.0, job=True
    )
    weight_decay: float = setting("weight decay of AdamW", 0.0, ge=0.0, job=True)
    max_grad_norm: float = setting(
        "gradients with a larger norm are scaled down to it (clipping)", 1.0, gt=0.0, job=True
    )
    gradient_checkpointing: Literal["auto", "off", "all"] | int = setting(
        "recompute activations in the backward pass to save memory: off, all layers, or every n-th "
        "layer; auto: as few as fit in memory",
        "auto",
        job=True,
    )
    eval_steps: int | None = setting(
        "steps between checkpoints, each with an eval loss; by default a tenth of the run",
        job=True,
    )
    early_stopping_patience: int | None = setting(
        "stop after this many checks without a lower eval loss", ge=1, job=True
    )
    report_to: list[str] = setting(
        "experiment trackers that receive the metrics of each step: tensorboard, wandb, mlflow, "
        "trackio",
        [],
    )
    seed: int = setting("seed of every random number", 0)

    @field_validator("report_to")
    @classmethod
    def _known_trackers(cls, value: list[str]) -> list[str]:
        for name in value:
            if name not in TRACKER_NAMES:
                raise ValueError(did_you_mean(name, TRACKER_NAMES))
        return list(dict.fromkeys(value))

    @field_validator("data", mode="before")
    @classmethod
    def _parse_data(cls, value: Any) -> Any:
        return parse_data(value)

    @property
    def data_files(self) -> DataFiles:
        """The files of rows, each with the names of its columns; none of a plan without data."""
        if self.data is None:
            return ()
        files = self.data if isinstance(self.data, tuple) else (DataFile(path=self.data),)
        return tuple(
            file.model_copy(update={"columns": self.columns}) if file.columns is None else file
            for file in files
        )

    @property
    def data_name(self) -> str:
        """A name for run folders, from those of the files."""
        names = (re.sub(r"[^\w.-]+", "-", file.path.stem).strip("-") for file in self.data_files)
        return "-".join(names)

    @field_validator("objective")
    @classmethod
    def _known_objective(cls, value: str) -> str:
        if value not in (known := objective_names()):
            raise ValueError(did_you_mean(value, known))
        return value

    @field_validator("new_tokens", mode="before")
    @classmethod
    def _list_of_words(cls, value: Any) -> Any:
        """One word may be written without a list; equal ones count once."""
        words = [value] if isinstance(value, str) else value
        if isinstance(words, list) and not all(isinstance(w, str) and w.strip() for w in words):
            raise ValueError("words, each at least one character: [<tool>]")
        return list(dict.fromkeys(words)) if isinstance(words, list) else words

    @property
    def load_device(self) -> str:
        """Device that the base is loaded to; with FSDP each layer moves when it is sharded."""
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
    def _level(cls, value: Any) -> Any:
        """YAML reads off as false; every first layer is all of them."""
        word = str(value).strip().lower()
        if word in ("auto", "off", "all", "true", "false"):
            return {"true": "all", "false": "off"}.get(word, word)
        if not word.isdigit() or int(word) < 1:
            raise ValueError("auto, off, all, or a number n from 1: every n-th layer")
        return "all" if int(word) == 1 else int(word)

    @property
    def recomputed(self) -> int:
        """n where the activations of every n-th layer are recomputed; 0 for none."""
        level = self.gradient_checkpointing
        return level if isinstance(level, int) else int(level == "all")

    @field_validator("layers", mode="before")
    @classmethod
    def _one_layer(cls, value: Any) -> Any:
        """One layer may be written as its number."""
        if isinstance(value, str) and value.strip().removeprefix("-").isdigit():
            value = int(value)
        return [value] if isinstance(value, int) and not isinstance(value, bool) else value
