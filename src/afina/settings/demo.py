"""Settings of `afina demo`."""

from pathlib import Path

from afina.settings.common import Settings, setting


class DemoSettings(Settings):
    """Settings of `afina demo`."""

    output_dir: Path = setting("the run folder", Path("runs/demo"))
    max_steps: int = setting("optimizer steps", 400, ge=1)
    seed: int = setting("seed of training; the rows are always the same", 0)
