"""Settings of `afina doctor`."""

from pathlib import Path

from afina.settings.common import Settings, setting


class DoctorSettings(Settings):
    """Settings of `afina doctor`."""

    output_dir: Path = setting("folder of runs, which must be writable", Path("runs"))
