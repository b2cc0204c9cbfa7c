"""The end of a run: evaluation of its best adapter, run.json, the plot and the card."""

import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from torch import Tensor

import afina
from afina.adapters.attach import detach
from afina.adapters.coverage import target_coverage
from afina.adapters.loading import load_adapter
from afina.engine.routing_profile import ChatFrame, PromptEmbedder, build_profile, write_profile
from afina.io.adapter_folder import WEIGHTS_FILE
from afina.io.atomic import recover_interrupted_replace, write_json, write_text
from afina.io.chat_format import CHAT_KEY
from afina.io.run_record import RUN_FORMAT_VERSION
from afina.io.strict_json import read_json_object
from afina.models.causal_lm import CausalLM
from afina.models.encoder import EMBEDDING_KEY, Encoder
from afina.settings import resolved
from afina.training.outcome import evaluate_run, run_renderer
from afina.training.run_card import model_card, plot_losses, plot_rewards
from afina.training.setup.processes import world
from afina.training.setup.set_up import RunSetup
from afina.training.trainer import Trainer, peak_memory_mb, read_metrics


def finish_run(trainer: Trainer) -> dict[str, Any]:
    """Evaluate the best adapter, write run.json, the plot and the card; return run.json."""
    setup, folder, progress = trainer.setup, trainer.run, trainer.progress
    if trainer.world.is_main_process:
        recover_interrupted_replace(folder / "adapter")
    trainer.world.barrier()
    best = load_adapter(folder / "adapter", setup.prepared.base, "best")
    best.frozen_companions = setup.adapter.frozen_companions
    evaluated = evaluate_run(trainer, best.active)
    record = _facts(setup, folder) | {
        "steps": progress.step,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "tokens_per_second": progress.tokens / max(progress.seconds, 1e-9),
        "peak_memory_mb": peak_memory_mb(),
        "planned_memory_mb": setup.planned_memory_mb,
        "units": asdict(setup.prepared.units),
    }
    record |= evaluated
    detach(setup.prepared.base.model, best)
    profile, key = _profile(setup)  # on every process: the base may be sharded over them
    if trainer.world.is_main_process:
        _write(folder, record)
        if profile is not None:
            write_profile(folder / "adapter", profile, key)
    trainer.world.barrier()
    return record


def _write(folder: Path, record: dict[str, Any]) -> None:
    """Write run.json, the plot and the card."""
    write_json(folder / "run.json", record)
    plot = plot_rewards if "policy" in record else plot_losses
    plot(read_metrics(folder), record, folder / "curve.png")
    card = model_card(record)
    write_text(folder / "adapter" / "README.md", card)
    write_text(folder / "README.md", card)


def _profile(setup: RunSetup) -> tuple[Tensor | None, str]:
    """Return the profile of the adapter's prompts for routing, and the key of its embedding.

    Without prompts there is none: classifiers and encoders answer no requests.
    """
    base, prompts = setup.prepared.base, setup.prepared.task.profile_prompts()
    if not isinstance(base, CausalLM) or not prompts:
        return None, ""
    frame = ChatFrame.of(run_renderer(setup, base))
    embedding = PromptEmbedder(base)
    return build_profile(embedding, [frame.question(tokens) for tokens in prompts]), embedding.key


def chat_record(setup: RunSetup) -> dict[str, Any]:
    """Return the chat format for run.json and afina.json; nothing for classifiers and encoders."""
    base = setup.prepared.base
    if not isinstance(base, CausalLM):
        return {}
    return {CHAT_KEY: run_renderer(setup, base).chat_format.record()}


def embedding_record(setup: RunSetup) -> dict[str, Any]:
    """Return how an encoder turns texts into vectors, for afina.json; nothing for other models."""
    base = setup.prepared.base
    return {EMBEDDING_KEY: base.embedding.record()} if isinstance(base, Encoder) else {}


def _facts(setup: RunSetup, folder: Path) -> dict[str, Any]:
    """Return settings, adapter, base, data and environment of a run."""
    prepared = setup.prepared
    weights = folder / "adapter" / WEIGHTS_FILE
    return {
        "format_version": RUN_FORMAT_VERSION,
        "settings": resolved(setup.settings),
        "checkpointing": {"used": setup.settings.gradient_checkpointing, "why": setup.why},
        **chat_record(setup),
        "method": setup.adapter.config.method,
        "objective": prepared.objective,
        "init_adapter": prepared.init_adapter,
        "frozen_adapter": prepared.frozen_adapter,
        "learning_rate": setup.learning_rate,
        "trainable_parameters": setup.adapter.num_parameters(),
        "adapter": read_json_object(folder / "adapter" / "afina.json")["hash"],
        "adapter_kb": weights.stat().st_size / 1000,
        "base": {
            "name": prepared.base.name,
            "revision": prepared.base.revision,
            "hash": prepared.base.hash,
            "dtype": str(prepared.base.dtype).removeprefix("torch."),
            "licence": _license(prepared.base.folder),
            "remote_code": prepared.base.remote_code,
            **target_coverage(prepared.base.model, setup.adapter.config).to_dict(),
        },
        "data": prepared.data_info | {"skipped": prepared.skipped, "licence": None},
        "environment": {
            "afina": afina.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "processes": world().size,
        },
    }


def _license(folder: Path | None) -> str | None:
    """Return the license that a base's model card names in its header; None without one."""
    card = folder / "README.md" if folder else None
    if card is None or not card.is_file():
        return None
    parts = card.read_text(encoding="utf-8").split("---")
    try:
        header = yaml.safe_load(parts[1]) if len(parts) > 2 and not parts[0].strip() else None
    except yaml.YAMLError:  # the run is finished: another author's card must not fail it
        return None
    return header.get("license") if isinstance(header, dict) else None
