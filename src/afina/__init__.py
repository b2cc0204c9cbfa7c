"""Adapt frozen pretrained models with small adapters: train, evaluate, merge, audit and serve them.

Example:
    import afina
    run = afina.train("rows.jsonl", method="lora", rank=8)
    afina.generate(["Hello!"], adapter=run.folder)

Each function takes the settings of the command of the same name as keyword arguments (see
`afina --help`).
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Set before huggingface_hub is imported, which reads it at import.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# oneDNN, and PyTorch's layer over it, cache 1,024 compiled products each, one per shape. Where each
# batch has another length, memory of a run grew from 0.75 to 1.3 GB in 29 steps (10M parameters,
# 2,048 tokens); with 64 entries it stays at 0.85 GB, at the same speed.
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "64")

if TYPE_CHECKING:  # for type checkers and editors; at run time `__getattr__` imports on first use
    from afina.adapters.loading import load_adapter as load_adapter
    from afina.comparison.advise import advise as advise
    from afina.comparison.compare import compare as compare
    from afina.evaluation.evaluate import evaluate as evaluate
    from afina.evaluation.generate import generate as generate
    from afina.merging.adapter_info import show as show
    from afina.merging.combine import combine as combine
    from afina.merging.export import export as export
    from afina.merging.extract import extract as extract
    from afina.merging.merge_into_base import merge as merge
    from afina.models.loading import load_base as load_base
    from afina.planning.plan import plan as plan
    from afina.training.train import train as train
    from afina.training.train import train_many as train_many

_FUNCTIONS = {
    "train": "afina.training.train",
    "train_many": "afina.training.train",
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
    """Import a public function on first use, so that `import afina` takes milliseconds."""
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    raise AttributeError(f"module 'afina' has no attribute {name!r}")
