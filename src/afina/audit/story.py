"""`afina.json` of a stranger: that all of it is of the kinds that afina reads, and that it says what PEFT's file says.

An allow-list, like that of the configuration: whoever serves the adapter reads this file after the gate, and must find
nothing in it that the gate has not looked at.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from afina.audit.report import Gate
from afina.io.name_patterns import Patterns

MAX_NAME, MAX_PARENTS = 4096, 1024


def is_text(value: Any) -> bool:
    """A text of no unusual length."""
    return isinstance(value, str) and len(value) <= MAX_NAME


def is_hash(value: Any) -> bool:
    """64 hexadecimal digits."""
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def is_count(value: Any) -> bool:
    """A whole number from 1."""
    return type(value) is int and value >= 1


def is_strength(value: Any) -> bool:
    """A finite number above 0."""
    return type(value) in (int, float) and 0 < value < math.inf


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_text, value)) and len(set(value)) == len(value)


def _by_name(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, dict) and all(map(is_text, value)) and all(map(fits, value.values()))
    )


def _or_none(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


SPEC: dict[str, tuple[Callable[[Any], bool], str]] = {  # key: (what fits, what it should be)
    "method": (is_text, "a name"),
    "targets": (_texts, "a list of names, each once"),
    "rank": (is_count, "a whole number from 1"),
    "alpha": (is_strength, "a number above 0"),
    "scaling": (lambda v: v in ("lora", "rslora"), "lora or rslora"),
    "dropout": (lambda v: type(v) in (int, float) and 0 <= v < 1, "from 0 to 1"),
    "ranks": (_by_name(is_count), "whole numbers from 1, by name"),
    "alphas": (_by_name(is_strength), "numbers above 0, by name"),
    "modules": (_texts, "a list of names, each once"),
    "invocation": (
        lambda v: isinstance(v, list) and all(type(t) is int and t >= 0 for t in v),
        "a list of tokens",
    ),
    "tokens": (_by_name(lambda v: type(v) is int and v >= 0), "numbers of tokens, by name"),
    "options": (
        _by_name(lambda v: v is None or type(v) in (bool, int, float) or is_text(v)),
        "plain values, by name",
    ),
}
BASE = {
    "name": _or_none(is_text),
    "revision": _or_none(is_text),
    "hash": _or_none(is_hash),
    "storage": _or_none(is_text),
}
NEEDED = ("method", "targets", "rank", "alpha")


def check_story(
    story: Mapping[str, Any], config: Mapping[str, Any], method: str, gate: Gate, where: str
) -> None:
    """Add what is wrong with an adapter's afina.json to `gate`; `method` is what its configuration says."""
    if type(story.get("format_version")) is not int:
        gate.block("story-value", "no format version", where)
    for key in ("base", "spec"):
        if not isinstance(story.get(key), dict):
            gate.block("story-value", f"no {key}", where)
    if gate.blocked:
        return
    spec, base = story["spec"], story["base"]
    for key in NEEDED:
        if key not in spec:
            gate.block("story-value", f"it does not tell its {key}", where)
    for key, value in spec.items():
        if key not in SPEC:
            gate.block("story-value", f"unknown key {key[:60]!r} in its spec", where)
        elif not SPEC[key][0](value):
            gate.block(
                "story-value", f"{key} is {str(value)[:60]}, and should be {SPEC[key][1]}", where
            )
    for key, fits in BASE.items():
        if not fits(base.get(key)):
            gate.block("story-value", f"the {key} of its base is {str(base[key])[:60]}", where)
    if not _or_none(is_hash)(story.get("hash")):
        gate.block("story-value", f"its hash is {str(story['hash'])[:60]}", where)
    if not _are_parents(story.get("parents", [])):
        gate.block(
            "story-value", "its parents are not told by name, hash, weight and method", where
        )
    if base.get("remote_code"):
        gate.review("base-code", "its base runs Python code of its own", where)
    if not gate.blocked:
        _check_same(spec, config, method, gate, where)


def _are_parents(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= MAX_PARENTS
        and all(
            isinstance(line, dict)
            and is_text(line.get("name"))
            and _or_none(is_hash)(line.get("hash"))
            and type(line.get("weight")) in (int, float)
            and _or_none(is_text)(line.get("method"))
            for line in value
        )
    )


def _check_same(
    spec: Mapping[str, Any], config: Mapping[str, Any], method: str, gate: Gate, where: str
) -> None:
    """It must not say one thing here and another in PEFT's file: then it would be audited as one and served as the other."""

    def differs(what: str, ours: Any, theirs: Any) -> None:
        gate.block(
            "story-differs",
            f"{what} is {str(ours)[:60]} here, {str(theirs)[:60]} in PEFT's file",
            where,
        )

    if spec["method"] != method:
        differs("its method", spec["method"], method)
    if config.get("peft_type") != "LORA":
        return
    for ours, theirs in (
        ("rank", "r"),
        ("alpha", "lora_alpha"),
        ("invocation", "alora_invocation_tokens"),
    ):
        if (spec.get(ours) or None) != (config.get(theirs) or None):
            differs(ours, spec.get(ours), config.get(theirs))
    if (spec.get("scaling") == "rslora") != bool(config.get("use_rslora")):
        differs("its scaling", spec.get("scaling"), config.get("use_rslora"))
    by_layer = (
        ("ranks", "rank", "r", "rank_pattern"),
        ("alphas", "alpha", "lora_alpha", "alpha_pattern"),
    )
    for many, one, theirs, pattern in by_layer:
        patterns = Patterns(config.get(pattern) or {})
        for path in spec["targets"]:
            here = (spec.get(many) or {}).get(path, spec[one])
            if here != (there := patterns.of(path, config[theirs])):
                differs(f"{one} at {path[:80]}", here, there)
                break
