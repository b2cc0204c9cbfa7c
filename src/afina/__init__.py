"""afina: one frozen base, many small adapters, one engine that trains, judges, combines, audits and serves them.

    import afina
    run = afina.train("rows.jsonl", method="lora", rank=8)
    afina.generate(["Hello!"], run=run.folder)

Each function takes the settings of the verb of the same name as keyword arguments (see `afina --help`).
"""

import importlib
import os
from typing import Any

__version__ = "0.1.0"

os.environ.setdefault(
    "HF_HUB_DISABLE_TELEMETRY", "1"
)  # before huggingface_hub is imported, which reads it then
# oneDNN, and PyTorch's layer over it, keep 1,024 compiled products each, one for each shape that was met. Where each pass
# has another length, a run's memory grew from 0.75 to 1.3 GB in 29 steps (10M, 2,048 tokens); so it stays at 0.85, as fast
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "64")

_FUNCTIONS = {
    "train": "afina.planning.checkpointing_policy",
    "train_many": "afina.planning.checkpointing_policy",
    "plan": "afina.planning.plan",
    "compare": "afina.comparison.compare",
    "advise": "afina.comparison.advise",
    "evaluate": "afina.evaluation.evaluate",
    "generate": "afina.evaluation.generate",
    "merge": "afina.merging.merge_into_base",
    "combine": "afina.merging.combine",
    "extract": "afina.merging.extract",
    "show": "afina.merging.adapter_info",
    "export": "afina.merging.export",
    "load_base": "afina.models.loading",
    "load_adapter": "afina.adapters.loading",
}
__all__ = ["__version__", *_FUNCTIONS]


def __getattr__(name: str) -> Any:
    """Load a function when it is first asked for: importing afina alone stays instant."""
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    raise AttributeError(f"module 'afina' has no attribute {name!r}")
