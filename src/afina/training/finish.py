"""The end of a run: evaluation of its best adapter, run.json, the plot and the card."""

import platform
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from torch import Tensor

import afina
from afina.adapters.active import ActiveAdapters
from afina.adapters.attach import detach
from afina.adapters.coverage import target_coverage
from afina.adapters.loading import load_adapter
from afina.data.renderer import Renderer
from afina.engine.routing_profile import ChatFrame, PromptEmbedder, build_profile, write_profile
from afina.evaluation.loss_report import measure_losses
from afina.evaluation.retention import retention_loss
from afina.evaluation.verdict import forgetting_sentence, verdict
from afina.io.adapter_folder import WEIGHTS_FILE
from afina.io.atomic import recover_interrupted_replace, write_json, write_text
from afina.io.chat_format import CHAT_KEY, ChatFormat
from afina.io.run_record import RUN_FORMAT_VERSION
from afina.io.strict_json import read_json_object
from afina.models.causal_lm import CausalLM
from afina.models.encoder import EMBEDDING_KEY, Encoder
from afina.objectives.base import perplexity
from afina.settings import resolved
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
    evaluated = _evaluate(trainer, best.active)
    record = _facts(setup, folder) | {
        "steps": progress.step,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "tokens_per_second": progress.tokens / max(progress.seconds, 1e-9),
        "peak_memory_mb": peak_memory_mb(),
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


def _evaluate(trainer: Trainer, best: ActiveAdapters) -> dict[str, Any]:
    """Return the losses of the best adapter and those before, the objective's report, a verdict."""
    task, baseline = trainer.setup.prepared.task, trainer.setup.prepared.baseline
    before = {"loss": trainer.progress.before["eval_loss"]}
    if task.report_key and task.has_baseline:
        before = task.evaluate(baseline)
    after = task.evaluate(best)
    report = task.report(before, after)
    sentences = report.pop("verdict")
    losses = _policy_losses if task.maximizes_reward else _losses_with_intervals
    record = losses(trainer, best, before["loss"], after["loss"])
    if task.maximizes_reward:
        record["verdict"] = [*sentences, *record["verdict"]]
    else:
        record["verdict"] += sentences
    if task.report_key:
        task.plot(report, trainer.run / "confusion.png", trainer.world.is_main_process)
        record[task.report_key] = report | task.run_facts()
    return record


def _losses_with_intervals(
    trainer: Trainer, best: ActiveAdapters, before: float, after: float
) -> dict[str, Any]:
    """Return losses of eval rows, training rows and general text, with intervals, and a verdict."""
    prepared, progress = trainer.setup.prepared, trainer.progress
    now = {"eval_loss": after}
    if isinstance(base := prepared.base, CausalLM):
        now["retention_loss"] = retention_loss(base, best, trainer.setup.settings.retention_text)
    losses = replace(
        measure_losses(prepared.task, progress.before, now, prepared.baseline, best),
        best_step=progress.best_step,
        last_step=progress.step,
    )
    interval, forgetting = losses.eval_change.interval, losses.forgetting
    return {
        "losses": asdict(losses) | {"eval_interval": interval, "forgetting": forgetting},
        "perplexity": {
            "before": perplexity(losses.eval_loss_before),
            "after": perplexity(losses.eval_loss_after),
        },
        "verdict": verdict(losses, prepared.units.unit, prepared.units.choices),
    }


def _policy_losses(
    trainer: Trainer, best: ActiveAdapters, before: float, after: float
) -> dict[str, Any]:
    """Return minus the mean reward, as in metrics.jsonl, and the loss on general text."""
    progress, base = trainer.progress, trainer.setup.prepared.base
    assert isinstance(base, CausalLM)
    retention_before = progress.before["retention_loss"]
    retention_after = retention_loss(base, best, trainer.setup.settings.retention_text)
    forgetting = retention_after - retention_before
    is_earlier = progress.best_step < progress.step
    kept = [f"The best state, of step {progress.best_step}, was kept."] if is_earlier else []
    return {
        "losses": {
            "eval_loss_before": before,
            "eval_loss_after": after,
            "retention_loss_before": retention_before,
            "retention_loss_after": retention_after,
            "forgetting": forgetting,
            "best_step": progress.best_step,
            "last_step": progress.step,
        },
        "verdict": [*kept, forgetting_sentence(forgetting)],
    }


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
    frame = ChatFrame.of(_renderer(setup, base))
    embedding = PromptEmbedder(base)
    return build_profile(embedding, [frame.question(tokens) for tokens in prompts]), embedding.key


def _renderer(setup: RunSetup, base: CausalLM) -> Renderer:
    """Return the renderer of the run's prompts."""
    return Renderer(base.tokenizer, ChatFormat.from_settings(setup.settings), base.max_positions)


def chat_record(setup: RunSetup) -> dict[str, Any]:
    """Return the chat format for run.json and afina.json; nothing for classifiers and encoders."""
    base = setup.prepared.base
    if not isinstance(base, CausalLM):
        return {}
    return {CHAT_KEY: _renderer(setup, base).chat_format.record()}


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
