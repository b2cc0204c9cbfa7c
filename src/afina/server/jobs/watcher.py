"""A watcher of a run folder: its metrics as they are written, its best adapter as it changes."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afina.errors import AfinaError
from afina.io.atomic import atomic_directory
from afina.io.strict_json import read_json_object

EVENT_STEPS = 50  # steps between two events without an evaluation


class RunWatcher:
    """Reads new events of a run folder, each once.

    Args:
        run: The run folder.
        last_step: The last step of which there is an event already.
    """

    def __init__(self, run: Path, last_step: int = 0) -> None:
        self.run, self._last_step = run, last_step
        self._inode, self._offset = 0, 0  # of the metrics file, up to which it was read
        self._evals: dict[int, dict[str, Any]] = {}

    def events(self) -> list[tuple[str, dict[str, Any]]]:
        """Return new events as (message, metrics): evaluations, and every 50th step."""
        found = []
        for line in self._new_lines():
            step, is_eval = line["step"], line.get("eval_loss") is not None
            message, metrics = _event(line)
            if is_eval:
                names = ("step", "train_loss", "valid_loss", "full_valid_loss")
                self._evals[step] = {name: metrics[name] for name in names}
            if step > self._last_step and (is_eval or step % EVENT_STEPS == 0):
                found.append((message, metrics))
                self._last_step = step
        return found

    def metrics_at(self, step: int) -> dict[str, Any]:
        """Return the metrics of the evaluation after `step`."""
        return self._evals.get(step, {"step": step})

    def best_step(self) -> int | None:
        """Return the step of the run's best adapter, once the metrics of that step are read."""
        step = self._metadata().get("step")
        return step if step in self._evals else None

    def copy(self, target: Path, step: int) -> bool:
        """Copy the best adapter to `target`; return False if the run replaced it meanwhile."""
        before = self._metadata()
        try:
            with atomic_directory(target) as new:
                shutil.copytree(self.run / "adapter", new, dirs_exist_ok=True)
                if before.get("step") != step or self._metadata() != before:
                    raise FileNotFoundError
        except (OSError, shutil.Error):
            return False
        return True

    def _metadata(self) -> dict[str, Any]:
        try:
            return read_json_object(self.run / "adapter" / "afina.json")
        except AfinaError:  # not written yet, or being replaced
            return {}

    def _new_lines(self) -> list[dict[str, Any]]:
        """Return complete lines not read yet; a run that was resumed has rewritten the file."""
        file = self.run / "metrics.jsonl"
        try:
            with file.open("rb") as stream:
                number = file.stat().st_ino
                if number != self._inode:
                    self._inode, self._offset = number, 0
                stream.seek(self._offset)
                data = stream.read()
        except OSError:
            return []
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        return [json.loads(line) for line in complete.splitlines() if line]


def _event(line: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return (message, metrics) of a line of metrics.jsonl, with the names of OpenAI's API."""
    step, loss, eval_loss = line["step"], line["loss"], line.get("eval_loss")
    reward = line.get("reward")
    metrics = {"step": step, "train_loss": loss, "learning_rate": line["learning_rate"]}
    if eval_loss is not None:
        metrics |= {"valid_loss": eval_loss, "full_valid_loss": eval_loss}
    if reward is None:
        validation = "" if eval_loss is None else f", validation loss={eval_loss:.4f}"
        return f"Step {step}: training loss={loss:.4f}{validation}", metrics
    metrics["train_mean_reward"] = reward
    validation = ""
    if eval_loss is not None:  # of policy objectives the eval loss is minus the mean reward
        metrics |= {"valid_mean_reward": -eval_loss, "full_valid_mean_reward": -eval_loss}
        validation = f", validation reward={-eval_loss:.4f}"
    return f"Step {step}: training reward={reward:.4f}{validation}", metrics
