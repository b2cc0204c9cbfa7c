"""Settings of `afina advise`."""

from pathlib import Path
from typing import Literal

from afina.settings.common import ModelSettings, setting

Goal = Literal[
    "style", "behaviour", "domain", "knowledge", "facts-that-change", "customers", "switching"
]


class AdviseSettings(ModelSettings):
    """Settings of `afina advise`; at a terminal, missing ones are requested as questions."""

    goal: Goal | None = setting(
        "style (tone, format, a task), behaviour (preferred answers), domain (much text of a field "
        "or a language), knowledge (facts to memorize), facts-that-change, customers (many "
        "adapters), switching (often, in one chat)"
    )
    num_rows: int | None = setting("how many examples there are (for domain: texts)", ge=0)
    has_pairs: bool = setting("there are pairs of a better and a worse answer", False)
    tried_prompting: bool = setting("a good prompt with a few examples in it has been tried", False)
    memory_gb: float | None = setting("GB of memory to train in; by default this machine's", gt=0)
    past_runs: Path = setting("folder of earlier comparisons", Path("runs"))
    why: bool = setting("print the reasons, with their sources", False)
    lang: Literal["en", "es"] = setting("language of the advice", "en")
