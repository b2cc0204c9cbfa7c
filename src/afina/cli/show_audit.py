"""What an audit found, and who signed, in plain words."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

console = Console()
WORDS = {
    "allow": "allow: no gate found a reason against it",
    "review": "review: a person must look at it before it is used",
    "block": "block: do not load it",
}


def show_audit(report: dict[str, Any]) -> None:
    """The verdict first, then its reasons, then what was looked at."""
    console.print(WORDS[report["verdict"]], style="bold", highlight=False)
    for finding in report["findings"]:
        where = f"  [{finding['where']}]" if finding["where"] else ""
        console.print(
            f"- {finding['level']}, {finding['gate']}: {finding['text']}{where}",
            highlight=False,
            markup=False,
        )
        for line in _evidence(finding["evidence"]):
            console.print(f"    {line}", highlight=False, markup=False)
    for command in report.get("remedies", []):
        console.print(
            f"a remedy, with what it costs: {command}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    if report.get("accepted"):
        console.print(f"accepted by a person: {report['accepted']}", highlight=False, markup=False)
    gates = ", ".join(f"{gate['name']} {gate['seconds']:.2f} s" for gate in report["gates"])
    digest = report["hash"] or "none: its files could not be trusted"
    _rows(
        [
            ("adapter", report["adapter"]),
            ("hash", digest),
            ("looked at", gates),
            ("report", report.get("kept", "not kept")),
        ]
    )


def show_remedy(result: dict[str, Any]) -> None:
    """What was tried, what was taken, and what the audit says about it."""
    table = Table("remedy", "strength", "attack", "loss of the task")
    before, after = result["before"], result["after"]
    for one in ({"how": "as it is", "strength": 0.0} | before, *result["tried"]):
        attack = "?" if one["attack"] is None else f"{100 * one['attack']:.0f}%"
        table.add_row(
            one["how"] + (" *" if one is after else ""),
            f"{one['strength']:g}",
            attack,
            f"{one['loss']:.4f}",
        )
    console.print(table)
    known = ", ".join(repr(text) for text in result["triggers"]) or "none known"
    cost = f"{100 * result['cost']:+.1f}% of the task's loss"
    _rows(
        [
            ("written (*)", result["out"]),
            ("hash", result["hash"]),
            ("costs", cost),
            ("triggers", known),
            ("audited again", WORDS[result["verdict"]]),
        ]
    )
    console.print(
        "It weakens what was found; what was not found may still be there.", highlight=False
    )


def show_origin(result: dict[str, Any]) -> None:
    """What `sign`, `verify` and `revoke` did."""
    if "reason" in result:
        console.print(
            f"revoked: {result['hash']} ({result['reason']})",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        return
    done = (
        f"as signed by {result['key']}"
        if result.get("verified")
        else f"signed: {result['signature']}"
    )
    console.print(done, highlight=False, markup=False)
    base = result["base"]
    _rows(
        [
            ("adapter", result["adapter"]),
            ("files", ", ".join(result["files"])),
            ("base", f"{base['name']}  ({(base['hash'] or 'hash not told')[:12]})"),
            (
                "parents",
                "\n".join(
                    f"{p['weight']:g} x {p['name']}  ({(p['hash'] or 'no hash')[:12]})"
                    for p in result["parents"]
                )
                or "none",
            ),
        ]
    )


def _evidence(evidence: dict[str, Any]) -> list[str]:
    """The parts of the evidence that a person can check by eye."""
    lines = [str(line) for line in evidence.get("shown", [])[:5]]
    tokens = [
        f"{item.get('text', item['token'])!r} (z {item['z']:g})"
        for item in evidence.get("tokens", [])[:5]
    ]
    return lines + ([f"tokens: {', '.join(tokens)}"] if tokens else [])


def _rows(rows: list[tuple[str, str]]) -> None:
    table = Table(show_header=False)
    for name, value in rows:
        table.add_row(name, escape(str(value)))
    console.print(table)
