"""Settings of `afina train`."""

from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator

from afina.settings.common import ModelSettings, setting


class TrainSettings(ModelSettings):
    """Everything `afina train` (and `afina plan`) can be told."""

    fsdp: bool = setting("split the base over the processes that torchrun started", False)
    data: Path = setting(
        "a file: chat, Alpaca, ShareGPT, prompt/completion, text, CSV, Parquet; or a sweep's YAML",
        ...,
    )
    output_dir: Path | None = setting("the run folder; by default runs/DATA-METHOD")
    resume: bool = setting("go on with the run in the folder instead of starting one", False)
    # what is learned
    method: str = setting(
        "lora, dora, mora, full, or freeze (the last layers only); q: on 4 bits, a: activated",
        "lora",
    )
    rank: int = setting("rank of the low-rank update", 8, ge=1)
    alpha: float | None = setting("strength of the update; by default twice the rank")
    scaling: Literal["lora", "rslora"] = setting("alpha/rank, or alpha/sqrt(rank) (rsLoRA)", "lora")
    dropout: float = setting("share of inputs dropped on the adapter's path", 0.0, ge=0.0, lt=1.0)
    target_modules: str | list[str] | None = setting(
        "layers to adapt: all-linear, names, or a regular expression; for full also all, norms, embeddings; auto: layers and "
        "ranks by their gradients, for as many numbers as --options '{budget: N}' says",
        None,
    )
    layers: str | list[int] | None = setting("which blocks: a list, or 'last:4'")
    rank_pattern: dict[str, int] = setting(
        "ranks of their own, by name or pattern of the layer", {}
    )
    invocation: str | None = setting(
        "alora: text from which on the adapter acts; by default the start of an answer"
    )
    options: dict[str, Any] = setting(
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
    ] = setting(
        "sft: learn the answers; pretrain: every token of a text; classify: a label; mlm: hidden tokens; dpo, kto, orpo, "
        "simpo: prefer the better of two answers; reward: a judge of answers; grpo, rloo, ppo: answers of its own, rewarded",
        "auto",
    )
    columns: dict[str, str] = setting(
        "names of your columns, e.g. {prompt: question, completion: answer}", {}
    )
    chat_template: str | None = setting(
        "chat template: the tokenizer's own by default, 'plain', 'chatml' or a file"
    )
    eval_size: float = setting(
        "ratio of the rows held out for evaluation (eval)", 0.1, gt=0.0, lt=1.0
    )
    eval_data: Path | None = setting("file of rows for evaluation; takes the place of eval_size")
    retention_text: Path | None = setting(
        "general text on which forgetting is measured; one is built in"
    )
    max_length: int | None = setting(
        "longest sequence in tokens; by default what the base can read, up to 2,048"
    )
    skip_bad_rows: bool = setting("leave out rows that cannot be used, and list them", False)
    # how
    num_train_epochs: float = setting("times to go over the data", 3.0, gt=0)
    max_steps: int | None = setting("optimizer steps; takes the place of epochs", ge=1)
    max_tokens_per_batch: int = setting("tokens in one pass", 2048, ge=1)
    gradient_accumulation_steps: int = setting(
        "passes added up before each optimizer step", 1, ge=1
    )
    learning_rate: float | None = setting(
        "by default 2e-4 for adapters, 2e-5 for full; a tenth of it for preferences", gt=0
    )
    learning_rate_pattern: dict[str, float] = setting(
        "rates of their own, by name or pattern of the layer", {}
    )
    optimizer: Literal["adamw", "adamw_8bit", "adamw_8bit_offload"] = setting(
        "8bit: a quarter of the optimizer's memory; offloaded: kept in the host's memory, off the GPU",
        "adamw",
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = setting(
        "how the rate falls after the warm-up", "cosine"
    )
    warmup_ratio: float = setting(
        "share of the steps in which the rate rises", 0.05, ge=0.0, le=1.0
    )
    weight_decay: float = setting("AdamW's weight decay", 0.0, ge=0.0)
    max_grad_norm: float = setting("largest norm of the gradient", 1.0, gt=0.0)
    gradient_checkpointing: Literal["auto", "off", "all"] | int = setting(
        "activations made again in the backward pass (less memory, more time): off, those of all blocks, of each n-th block; "
        "auto: of as few as fit in memory",
        "auto",
    )
    eval_steps: int | None = setting(
        "steps between checkpoints, each with a held-out loss; by default a tenth"
    )
    early_stopping_patience: int | None = setting(
        "stop after so many checks without a better held-out loss", ge=1
    )
    seed: int = setting("seed of everything random", 0)

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
