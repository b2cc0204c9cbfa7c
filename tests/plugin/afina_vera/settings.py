"""Settings of the plug-in's method; no torch here, for `afina train --help` imports it."""

from afina.settings.common import setting
from afina.settings.groups import MethodSettings


class VeRASettings(MethodSettings):
    """Settings of VeRA (arXiv 2310.11454)."""

    seed: int | None = setting("seed of the frozen random matrices", ge=0, job=True)
