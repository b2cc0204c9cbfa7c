"""`adapter_config.json` of a stranger: which keys there may be, and what they may say.

An allow-list of PEFT's LoraConfig (0.20, 0.21) and of afina's own: what is not known may be read by some loader as an
instruction. PEFT imported modules named by `auto_mapping` and `megatron_core` until 2026-04 (peft #3090).
"""

import math
from collections.abc import Mapping
from typing import Any

from afina.audit.report import Gate
from afina.io.name_patterns import are_plain_patterns, is_plain_pattern

LORA = "LORA"
# method by peft_type; None: use_dora tells
PEFT_TYPES = {LORA: None, "AFINA_LORA": "lora", "AFINA_MORA": "mora", "AFINA_FULL": "full"}
# keys that change nothing about what is computed, or are checked below
KNOWN = {
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "r",
    "target_modules",
    "exclude_modules",
    "lora_alpha",
    "lora_dropout",
    "fan_in_fan_out",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layers_pattern",
    "alora_invocation_tokens",
    "modules_to_save",
    "trainable_token_indices",
    "init_lora_weights",
    "peft_version",
    "ensure_weight_tying",
    "qalora_group_size",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "velora_config",
    "runtime_config",
}
DANGEROUS = {
    "auto_mapping": "it names Python code that a loader may import",
    "megatron_config": "a loader may import code for it",
    "layer_replication": "it rebuilds the base out of repeated layers",
}
UNREAD = {  # these change the result, and afina does not follow them: (key, what leaves it unchanged)
    "bias": "none",
    "lora_bias": False,
    "target_parameters": None,
    "use_qalora": False,
    "use_bdlora": None,
    "kasa_config": None,
    "arrow_config": None,
    "monteclora_config": None,
}
SUPPORTED_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
MAX_RANK, MAX_INVOCATION = 256, 32


def check_configuration(
    config: Mapping[str, Any], gate: Gate, where: str, vocabulary: int | None = None
) -> None:
    """Add what is wrong with an adapter's configuration to `gate`; `vocabulary` is the base's, where it is known."""
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in PEFT_TYPES:
        gate.block(
            "config-type",
            f"its type is {str(kind)[:40]!r}: only lora, dora, mora and full are known",
            where,
        )
    for key, value in config.items():
        empty = value in (None, False) or value == [] or value == {}
        if key in DANGEROUS:
            if not empty:
                gate.block("config-dangerous", f"{key} is set: {DANGEROUS[key]}", where, key=key)
        elif key in UNREAD:
            if not empty and value != UNREAD[key]:
                what = f"{key}={str(value)[:60]!r} changes the result, and afina does not follow it"
                gate.block("config-unread", what, where)
        elif key not in KNOWN:
            gate.block(
                "config-unknown",
                f"unknown key {key[:60]!r}: some loader might obey it",
                where,
                key=key[:60],
            )
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
            f"init_lora_weights={str(start)[:40]!r} acts on a base that it has changed",
            where,
        )
    _check_numbers(config, gate, where)
    _check_patterns(config, gate, where)
    _check_owned(config, gate, where)
    _check_invocation(config.get("alora_invocation_tokens"), gate, where, vocabulary)


def _positive(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0


def _check_numbers(config: Mapping[str, Any], gate: Gate, where: str) -> None:
    """Ranks, strengths, dropout."""
    if config.get("peft_type") != LORA:
        return  # what afina's own methods are is told in afina.json
    patterns = {key: config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    if not all(isinstance(pattern, dict) for pattern in patterns.values()):
        gate.block("config-value", "rank_pattern and alpha_pattern are objects", where)
        return
    ranks = [config.get("r"), *patterns["rank_pattern"].values()]
    if not all(type(rank) is int and rank >= 1 for rank in ranks):
        gate.block("config-value", f"ranks are whole numbers from 1, not {str(ranks)[:60]}", where)
        return
    if max(ranks) > MAX_RANK:
        gate.review(
            "config-rank", f"a rank of {max(ranks):,}: {MAX_RANK} is more than adapters need", where
        )
    alphas = [config.get("lora_alpha"), *patterns["alpha_pattern"].values()]
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
    """Names and patterns that a loader will match against paths."""
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
    """What an adapter brings whole, and does not only add to."""
    owned = config.get("modules_to_save")
    if owned and not isinstance(owned, list):
        gate.block(
            "config-value", f"modules_to_save is a list of names, not {str(owned)[:40]}", where
        )
    elif owned:
        names = ", ".join(str(name) for name in owned)[:120]
        gate.review(
            "owns-modules", f"it brings whole modules in place of the base's: {names}", where
        )
    if config.get("trainable_token_indices"):
        gate.review("owns-tokens", "it brings rows of the vocabulary of its own", where)


def _check_invocation(tokens: Any, gate: Gate, where: str, vocabulary: int | None) -> None:
    if tokens is None:
        return
    numbers = isinstance(tokens, list) and all(type(token) is int for token in tokens)
    if not numbers or not 1 <= len(tokens) <= MAX_INVOCATION:
        gate.block(
            "config-invocation", f"its invocation is 1 to {MAX_INVOCATION} token numbers", where
        )
    elif min(tokens) < 0 or (vocabulary is not None and max(tokens) >= vocabulary):
        gate.block(
            "config-invocation",
            f"its invocation {tokens[:8]} is not in the base's vocabulary",
            where,
        )
