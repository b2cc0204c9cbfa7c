"""Following a run from outside: its metrics as they are written, its best adapter as it changes."""

import json
import shutil
from pathlib import Path
from typing import Any

from afina.errors import AfinaError
from afina.io.atomic import atomic_directory
from afina.io.strict_json import read_json_object

EVERY = 50  # steps between two events, apart from checks


class RunWatcher:
    """What a run folder has to tell, each thing once. Steps up to `told` were told before."""

    def __init__(self, run: Path, told: int = 0) -> None:
        self.run, self._told = run, told
        self._file, self._place = 0, 0  # the metrics' inode, and how far they are read
        self._checks: dict[int, dict[str, Any]] = {}

    def events(self) -> list[tuple[str, dict[str, Any]]]:
        """New steps that are worth telling, as (message, figures)."""
        found = []
        for line in self._new_lines():
            step, held = line["step"], line.get("held_out_loss")
            figures = {
                "step": step,
                "train_loss": line["loss"],
                "learning_rate": line["learning_rate"],
            }
            message = f"Step {step}: training loss={line['loss']:.4f}"
            if (reward := line.get("reward")) is not None:
                figures["train_mean_reward"] = reward
                message = f"Step {step}: training reward={reward:.4f}"
            if (
                held is not None and reward is not None
            ):  # what is held out is judged by its reward, of which this is minus
                figures |= {"valid_mean_reward": -held, "full_valid_mean_reward": -held}
                message += f", validation reward={-held:.4f}"
            if held is not None:
                figures |= {"valid_loss": held, "full_valid_loss": held}
                message += "" if reward is not None else f", validation loss={held:.4f}"
                self._checks[step] = {
                    name: figures[name]
                    for name in ("step", "train_loss", "valid_loss", "full_valid_loss")
                }
            if step > self._told and (held is not None or step % EVERY == 0):
                found.append((message, figures))
                self._told = step
        return found

    def metrics_at(self, step: int) -> dict[str, Any]:
        """What the check after `step` measured."""
        return self._checks.get(step, {"step": step})

    def best_step(self) -> int | None:
        """The step of the adapter that the run keeps now, once its check has been read too."""
        step = self._story().get("step")
        return step if step in self._checks else None

    def copy(self, place: Path, step: int) -> bool:
        """Copy the best adapter, if it is that of `step` before and afterwards: the run may replace it meanwhile."""
        before = self._story()
        try:
            with atomic_directory(place) as new:
                shutil.copytree(self.run / "adapter", new, dirs_exist_ok=True)
                if before.get("step") != step or self._story() != before:
                    raise FileNotFoundError
        except (OSError, shutil.Error):
            return False
        return True

    def _story(self) -> dict[str, Any]:
        try:
            return read_json_object(self.run / "adapter" / "afina.json")
        except AfinaError:  # not there yet, or being replaced at this moment
            return {}

    def _new_lines(self) -> list[dict[str, Any]]:
        """Whole lines that were not read yet; a run that went on from a checkpoint has written the file anew."""
        file = self.run / "metrics.jsonl"
        try:
            with file.open("rb") as stream:
                number = file.stat().st_ino
                if number != self._file:
                    self._file, self._place = number, 0
                stream.seek(self._place)
                data = stream.read()
        except OSError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._place += len(whole)
        return [json.loads(line) for line in whole.splitlines() if line]
