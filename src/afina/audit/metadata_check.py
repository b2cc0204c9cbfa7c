"""Check afina.json of an untrusted adapter: types, and agreement with PEFT's configuration.

Loaders read this file after the gate; it must not contain anything that the gate did not check.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from afina.audit.configuration import DEFAULT_ALPHA, DEFAULT_RANK
from afina.audit.report import Gate
from afina.errors import AdapterError
from afina.io.adapter_metadata import AdapterMetadata
from afina.io.name_patterns import PatternTable


def check_metadata(
    metadata: Mapping[str, Any], config: Mapping[str, Any], method: str, gate: Gate, where: str
) -> None:
    """Add findings about an adapter's afina.json to `gate`.

    Args:
        metadata: The content of afina.json.
        config: The content of adapter_config.json.
        method: The adapter method that adapter_config.json has.
        gate: The gate.
        where: The file, for messages.
    """
    for key in ("format_version", "base", "spec"):
        if key not in metadata:
            gate.block("story-value", f"{key} is missing", where)
    try:
        checked = AdapterMetadata(**metadata)
    except ValidationError as error:
        for problem in error.errors(include_url=False, include_input=False)[:16]:
            field = ".".join(str(part) for part in problem["loc"][:3])[:120]
            gate.block("story-value", f"{field}: {str(problem['msg'])[:160]}", where)
        return
    if gate.blocked:
        return
    alphas = [checked.spec.alpha, *checked.spec.alphas.values()]
    if min(alphas) <= 0:
        gate.block("story-value", f"alpha {min(alphas):g} is not above 0", where)
    if checked.base.hash == "":
        gate.block("story-value", "the hash of its base is empty", where)
    if checked.base.remote_code:
        gate.review("base-code", "its base runs Python code of its own", where)
    if checked.chat is not None and checked.chat.jinja is not None:
        gate.review("chat-template", "it brings a template, code that shapes every prompt", where)
    if checked.chat is not None and checked.chat.allow_control_tokens:
        gate.review("control-tokens", "texts of users are read as control tokens", where)
    if not gate.blocked:
        _check_same(metadata["spec"], config, method, gate, where)


def _check_same(
    spec: Mapping[str, Any], config: Mapping[str, Any], method: str, gate: Gate, where: str
) -> None:
    """Add a finding where afina.json and PEFT's file differ: loaders may read either."""

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
    for ours, theirs, default in (
        ("rank", "r", DEFAULT_RANK),
        ("alpha", "lora_alpha", DEFAULT_ALPHA),
        ("invocation", "alora_invocation_tokens", None),
    ):
        if (spec.get(ours) or None) != (config.get(theirs, default) or None):
            differs(ours, spec.get(ours), config.get(theirs))
    if (spec.get("scaling") == "rslora") != bool(config.get("use_rslora")):
        differs("its scaling", spec.get("scaling"), config.get("use_rslora"))
    by_layer = (
        ("ranks", "rank", config.get("r", DEFAULT_RANK), "rank_pattern"),
        ("alphas", "alpha", config.get("lora_alpha", DEFAULT_ALPHA), "alpha_pattern"),
    )
    for many, one, default, pattern in by_layer:
        patterns = PatternTable(config.get(pattern) or {}, f"{where}: {pattern}", AdapterError)
        for path in spec["targets"]:
            here = (spec.get(many) or {}).get(path, spec[one])
            if here != (there := patterns.get(path, default)):
                differs(f"{one} at {path[:80]}", here, there)
                break
