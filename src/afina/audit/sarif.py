"""Audit report as SARIF 2.1.0 (OASIS 2020), which code hosts and CI systems display."""

from collections.abc import Mapping
from typing import Any

import afina

SCHEMA = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)
LEVELS = {"block": "error", "review": "warning", "note": "note"}


def as_sarif(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the report as one SARIF run: a rule per kind of finding, a result per finding."""
    findings = report["findings"]
    rules = list(dict.fromkeys(f"{finding['gate']}/{finding['rule']}" for finding in findings))
    rule_entries = [
        {"id": rule, "shortDescription": {"text": rule.partition("/")[2].replace("-", " ")}}
        for rule in rules
    ]
    return {
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "afina audit",
                        "version": afina.__version__,
                        "rules": rule_entries,
                    }
                },
                "invocations": [
                    {"executionSuccessful": not any(f["rule"] == "gate-error" for f in findings)}
                ],
                "results": [_result(finding, rules) for finding in findings],
                "properties": {
                    "verdict": report["verdict"],
                    "hash": report["hash"],
                    "adapter": report["adapter"],
                },
            }
        ],
    }


def _result(finding: Mapping[str, Any], rules: list[str]) -> dict[str, Any]:
    rule = f"{finding['gate']}/{finding['rule']}"
    file, _, inner = (finding["where"] or "").partition(": ")
    location: dict[str, Any] = {
        "physicalLocation": {"artifactLocation": {"uri": _uri(file or "adapter_model.safetensors")}}
    }
    if inner:
        location["logicalLocations"] = [{"fullyQualifiedName": inner}]
    return {
        "ruleId": rule,
        "ruleIndex": rules.index(rule),
        "level": LEVELS[finding["level"]],
        "message": {"text": finding["text"]},
        "locations": [location],
        "properties": {"evidence": finding["evidence"]},
    }


def _uri(file: str) -> str:
    from urllib.parse import quote

    return quote(file)
