"""Settings of `afina advise`."""

from pathlib import Path
from typing import Literal

from afina.settings.common import ModelSettings, setting

Goal = Literal[
    "style", "behaviour", "domain", "knowledge", "facts-that-change", "customers", "switching"
]


class AdviseSettings(ModelSettings):
    """Everything `afina advise` can be told; what is missing is asked for where somebody sits at the screen."""

    goal: Goal | None = setting(
        "style (tone, format, a task), behaviour (what it should rather say), domain (much text of a field or a language), "
        "knowledge (facts to memorise), facts-that-change, customers (many adapters), switching (often, in one chat)"
    )
    num_rows: int | None = setting("how many examples there are (for domain: texts)", ge=0)
    has_pairs: bool = setting("there are pairs of a better and a worse answer", False)
    tried_prompting: bool = setting("a good prompt with a few examples in it has been tried", False)
    memory_gb: float | None = setting("GB of memory to train in; by default this machine's", gt=0)
    past_runs: Path = setting("where earlier comparisons lie", Path("runs"))
    lang: Literal["en", "es"] = setting("language of the advice", "en")
