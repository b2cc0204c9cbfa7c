"""Check adapter_config.json of an untrusted adapter: which keys it may have, with which values.

An allow list of PEFT's LoraConfig (0.20, 0.21) and of this package's own keys: a loader may execute
what is not known here. PEFT imported modules named by `auto_mapping` and `megatron_core` until
2026-04 (peft #3090).
"""

import math
from collections.abc import Mapping
from typing import Any

from afina.audit.report import Gate
from afina.io.adapter_formats import registered_types
from afina.io.name_patterns import are_plain_patterns, is_plain_pattern
from afina.io.peft_config import (
    DANGEROUS_PEFT_KEYS,
    EMPTY_VALUES,
    INERT_PEFT_KEYS,
    LORA,
    SUPPORTED_INITS,
    UNSUPPORTED_PEFT_KEYS,
    PeftConfig,
)

KNOWN_KEYS = INERT_PEFT_KEYS | set(PeftConfig.model_fields)
DEFAULT_RANK, DEFAULT_ALPHA = 8, 8  # PEFT's default
MAX_AUDITED_RANK, MAX_INVOCATION = 256, 32


def check_configuration(
    config: Mapping[str, Any], gate: Gate, where: str, vocab_size: int | None = None
) -> None:
    """Add findings about an adapter's configuration to `gate`.

    Args:
        config: The content of adapter_config.json.
        gate: The gate.
        where: The file, for messages.
        vocab_size: The base's vocabulary size in tokens, where it is known.
    """
    peft_type = config.get("peft_type")
    if not isinstance(peft_type, str) or peft_type not in registered_types():
        known = ", ".join(sorted(registered_types()))
        what = f"peft_type {str(peft_type)[:40]!r} is not a registered adapter method"
        gate.block("config-type", f"{what} (registered: {known})", where)
    for key, value in config.items():
        _check_key(key, value, gate, where)
    if config.get("megatron_core", "megatron.core") not in (None, "megatron.core"):
        gate.block(
            "config-dangerous",
            "megatron_core names another module, which a loader may import",
            where,
        )
    start = config.get("init_lora_weights", True)
    if not isinstance(start, bool | str | None) or start not in SUPPORTED_INITS:
        gate.block(
            "config-start",
            f"init_lora_weights={str(start)[:40]!r} changes the base before the adapter is added",
            where,
        )
    _check_numbers(config, gate, where)
    _check_patterns(config, gate, where)
    _check_owned(config, gate, where)
    _check_invocation(config.get("alora_invocation_tokens"), gate, where, vocab_size)


def _check_key(key: str, value: Any, gate: Gate, where: str) -> None:
    """Add a finding where a key is unknown, dangerous or not supported, and set."""
    is_empty = value in EMPTY_VALUES
    if key in DANGEROUS_PEFT_KEYS:
        if not is_empty:
            what = f"{key} is set: {DANGEROUS_PEFT_KEYS[key]}"
            gate.block("config-dangerous", what, where, key=key)
    elif key in UNSUPPORTED_PEFT_KEYS:
        if not is_empty and value != UNSUPPORTED_PEFT_KEYS[key]:
            what = f"{key}={str(value)[:60]!r} changes the result and is not supported"
            gate.block("config-unread", what, where)
    elif key not in KNOWN_KEYS:
        what = f"unknown key {key[:60]!r}: a loader may execute it"
        gate.block("config-unknown", what, where, key=key[:60])


def _positive(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0


def _check_numbers(config: Mapping[str, Any], gate: Gate, where: str) -> None:
    """Check ranks, scaling and dropout."""
    if config.get("peft_type") != LORA:
        return  # afina.json has the values of the other methods
    patterns = {key: config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    if not all(isinstance(pattern, dict) for pattern in patterns.values()):
        gate.block("config-value", "rank_pattern and alpha_pattern are objects", where)
        return
    ranks = [config.get("r", DEFAULT_RANK), *patterns["rank_pattern"].values()]
    if not all(type(rank) is int and rank >= 1 for rank in ranks):
        gate.block("config-value", f"ranks are integers from 1, not {str(ranks)[:60]}", where)
        return
    if max(ranks) > MAX_AUDITED_RANK:
        gate.review(
            "config-rank",
            f"a rank of {max(ranks):,}: {MAX_AUDITED_RANK} is more than adapters need",
            where,
        )
    alphas = [config.get("lora_alpha", DEFAULT_ALPHA), *patterns["alpha_pattern"].values()]
    if not all(_positive(alpha) for alpha in alphas):
        gate.block("config-value", f"lora_alpha is a number above 0, not {str(alphas)[:60]}", where)
    elif max(alphas) > 16 * max(ranks):
        gate.review(
            "config-alpha",
            f"a strength of {max(alphas):g} at rank {max(ranks)}: more than 16 times the rank",
            where,
        )
    dropout = config.get("lora_dropout", 0.0)
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        gate.block("config-value", f"lora_dropout is from 0 to 1, not {str(dropout)[:40]}", where)


def _check_patterns(config: Mapping[str, Any], gate: Gate, where: str) -> None:
    """Check names and patterns that a loader will match against paths."""
    for key in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
        value = config.get(key) or []
        for text in value if isinstance(value, list) else [value]:
            if not is_plain_pattern(text):
                what = (
                    f"{key} holds {str(text)[:60]!r}, which is neither a name nor a plain pattern"
                )
                gate.block("config-pattern", what, where)
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        if isinstance(pattern, dict) and not are_plain_patterns(pattern):
            what = (
                f"{key} holds more than names and a few plain patterns: matching it may never end"
            )
            gate.block("config-pattern", what, where)


def _check_owned(config: Mapping[str, Any], gate: Gate, where: str) -> None:
    """Check the modules that an adapter replaces."""
    owned = config.get("modules_to_save")
    if owned and not isinstance(owned, list):
        gate.block(
            "config-value", f"modules_to_save is a list of names, not {str(owned)[:40]}", where
        )
    elif owned:
        names = ", ".join(str(name) for name in owned)[:120]
        gate.review("owns-modules", f"it replaces complete modules of the base: {names}", where)
    if config.get("trainable_token_indices"):
        gate.review("owns-tokens", "it brings rows of the vocabulary of its own", where)


def _check_invocation(tokens: Any, gate: Gate, where: str, vocab_size: int | None) -> None:
    if tokens is None:
        return
    numbers = isinstance(tokens, list) and all(type(token) is int for token in tokens)
    if not numbers or not 1 <= len(tokens) <= MAX_INVOCATION:
        gate.block(
            "config-invocation", f"its invocation is 1 to {MAX_INVOCATION} token numbers", where
        )
    elif min(tokens) < 0 or (vocab_size is not None and max(tokens) >= vocab_size):
        gate.block(
            "config-invocation",
            f"its invocation {tokens[:8]} is not in the base's vocabulary",
            where,
        )
