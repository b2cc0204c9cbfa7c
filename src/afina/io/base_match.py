"""Compare the bases that adapters were trained on: by hash, else by name."""

import re
from pathlib import Path

from afina.io.adapter_metadata import RecordedBase

HUB_CACHE = re.compile(r"models--([\w.\-]+?)--([\w.\-]+)")
# spellings of one model in 4 or 8 bits: unsloth/name-bnb-4bit is org/name
QUANTIZED_SPELLING = re.compile(
    r"(-(unsloth|bnb|4bit|8bit|int4|int8|nf4|gptq|awq|quantized))+$", re.IGNORECASE
)


def same_base(first: RecordedBase, second: RecordedBase) -> bool | None:
    """Return whether two records mean the same base; None where that is unknown.

    Hashes decide where both are known. Otherwise names do: equal names are the same base, hub names
    of different models are different bases. A mirror under another owner, a quantized spelling, or
    a local path and another name leave it unknown.
    """
    if first.hash and second.hash:
        return first.hash == second.hash
    if not first.name or not second.name:
        return None
    one, two = canonical_name(first.name), canonical_name(second.name)
    if one == two:
        return True
    if _is_local(one) or _is_local(two):
        return None
    return None if _model_name(one) == _model_name(two) else False


def canonical_name(name: str) -> str:
    """Return the hub name of a folder in the hub's cache, a folder's resolved path, or `name`."""
    cached = HUB_CACHE.search(name)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    path = Path(name).expanduser()
    return str(path.resolve()) if path.is_dir() else name


def _is_local(name: str) -> bool:
    return name.startswith(("/", "./", "../", "~")) or "\\" in name or Path(name).is_dir()


def _model_name(name: str) -> str:
    """Return the model's part of a hub name, lower case, without a spelling of quantization."""
    tail = name.rpartition("/")[2].lower()
    return QUANTIZED_SPELLING.sub("", tail)


def describe_base(base: RecordedBase) -> str:
    """Return name and short hash of a base, for messages."""
    name = base.name or "a base without a name"
    return f"{name} (hash {base.hash[:12]})" if base.hash else name
