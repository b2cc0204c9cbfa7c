"""Results as tables and plain words, a function a verb."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from afina.errors import pluralize
from afina.settings import POLICIES

console = Console()


def show(verb: str, result: dict[str, Any]) -> None:
    """Print what a verb returned, for people."""
    from afina.cli.show_audit import show_audit, show_origin, show_remedy

    if verb in ("compare", "advise"):  # they bring more than the other verbs need
        from afina.cli import show_compare

        getattr(show_compare, f"show_{verb}")(result)
        return

    {
        "plan": _plan,
        "train": _train,
        "eval": _eval,
        "generate": _generate,
        "chat": _nothing,
        "prefer": _preferred,
        "merge": _merge,
        "export": _export,
        "demo": _demo,
        "combine": _combine,
        "extract": _extract,
        "show": _about,
        "audit": show_audit,
        "sign": show_origin,
        "verify": show_origin,
        "revoke": show_origin,
        "remedy": show_remedy,
        "serve": _nothing,
        "bench-serve": _load,
    }[verb](result)


def _rows(title: str, rows: Sequence[tuple[str, str]]) -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in rows:
        table.add_row(name, escape(value))
    console.print(table)


def _number(value: Any) -> str:
    return (
        f"{value:,.4g}"
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
    )


def _setting(value: Any) -> str:
    """A setting as it may be typed; blocks in a row as the first and the last."""
    if not isinstance(value, list):
        return str(value)
    if (
        isinstance(value[0], int)
        and value == list(range(value[0], value[0] + len(value)))
        and len(value) > 1
    ):
        return f"{value[0]} to {value[-1]}"
    return ", ".join(map(str, value))


def _nothing(result: dict[str, Any]) -> None:
    pass


def _plan(result: dict[str, Any]) -> None:
    if "methods" in result:
        return _compared(result)
    data, settings = result["data"], result["settings"]
    _rows(
        "settings",
        [
            (name, _setting(value))
            for name, value in settings.items()
            if value not in (None, {}, [], "")
        ],
    )
    names = {
        "train": "to learn from",
        "held_out": "held out",
        "longest": "longest sequence",
        "labelled_percent": "% of tokens with a label",
    }
    skipped = data.get("skipped", [])
    facts = data | {"skipped": len(skipped)} if data else {}
    if facts:
        _rows(
            "data",
            [
                (
                    names.get(k, k),
                    f"{v:,.4g}"
                    if isinstance(v, float)
                    else f"{v:,}"
                    if isinstance(v, int)
                    else str(v),
                )
                for k, v in facts.items()
            ],
        )
    for line in skipped:
        console.print(f"skipped {line}", highlight=False, markup=False)
    if result["example"] is not None:
        console.print("one example, the learned tokens marked:", style="bold")
        console.print(result["example"], highlight=False, markup=False)
    trainable, total, steps = (
        result["trainable_parameters"],
        result["base"]["parameters"],
        result["steps"],
    )
    console.print(
        f"{pluralize(trainable, 'number')} to learn in {pluralize(result['layers'], 'layer')}, "
        f"{100 * trainable / total:.2f}% of the base's {total:,}"
        + (f"; {pluralize(steps, 'step')}" if steps else ""),
        highlight=False,
    )
    if result["cost"] is not None:
        _cost(result["cost"])


def _load(result: dict[str, Any]) -> None:
    """A server under load: a line for each rate."""
    title = f"{result['url']}, {pluralize(result['models'], 'model')}; seconds to the first text and to the last"
    table = Table(title=title, title_justify="left")
    for name in ("rate", "sent", "failed", "first 50%", "95%", "99%", "last 50%", "95%", "99%"):
        table.add_column(name, justify="right")
    for run in result["runs"]:
        waits = [run[f"{what}_p{share}"] for what in ("first", "whole") for share in (50, 95, 99)]
        counts = [f"{run['rate']:g}", f"{run['requests']:,}", f"{run['failed']:,}"]
        table.add_row(*counts, *("-" if wait is None else f"{wait:.3f}" for wait in waits))
    console.print(table)
    for run in result["runs"]:
        for error in run["errors"]:
            console.print(f"- at {run['rate']:g}: {error}", highlight=False, markup=False)
    console.print(result["picture"], highlight=False)


def _size(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _duration(seconds: float | None) -> str:
    """Seconds as a person says them; a GPU that is not here has not been measured."""
    if seconds is None:
        return "not known"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def _cost(cost: dict[str, Any]) -> None:
    batch, memory = cost["batch"], cost["memory"]
    rows = [
        (
            "in one pass",
            f"{pluralize(batch['tokens'], 'token')}, {pluralize(batch['labels'], 'label')}",
        ),
        (
            "peak memory",
            f"{_size(cost['peak_bytes'])}   ("
            + ", ".join(f"{k} {_size(v)}" for k, v in memory.items())
            + ")",
        ),
        ("a step", _duration(cost["step_seconds"]) + _phases(cost)),
        ("the run", _duration(cost["run_seconds"])),
        ("the adapter's file", _size(cost["file_bytes"])),
    ]
    dial = cost["checkpointing"]
    if dial["why"]:
        rows.append(("checkpointing", f"{_dial(dial['used'])}: {dial['why']}"))
    if cost["device"] == "cuda":
        rows.append(("needs a GPU of", _card(cost)))
    if cost["fits"] is not None:
        most = cost["largest_batch_tokens"]
        room = (
            f"fits in {_size(cost['machine_bytes'])}"
            if cost["fits"]
            else f"does NOT fit in {_size(cost['machine_bytes'])}"
        )
        every = cost["largest_batch_tokens_all"]
        more = f" ({every:,} with --checkpointing all)" if every and every > (most or 0) else ""
        rows.append(
            (
                "this machine",
                room + (f"; passes of up to {most:,} tokens do" if most else "") + more,
            )
        )
    _rows(f"predicted, on {cost['device']}", rows)
    for remedy in cost["remedies"]:
        flags = " ".join(
            f"--{name.replace('_', '-')} {str(value).lower()}"
            for name, value in remedy["settings"].items()
        )
        figures = f"{_size(remedy['peak_bytes'])}, {_duration(remedy['step_seconds'])} a step"
        console.print(f"- fits with {flags}: {figures}", highlight=False)
    if cost["fits"] is False and not cost["remedies"]:
        console.print(
            "- nothing that afina can change makes it fit here: a smaller base, or a larger machine",
            highlight=False,
        )
    _estimate(cost["exact"])
    for what in cost.get("not_counted", []):
        console.print(f"- not counted: {what}", highlight=False)


def _phases(cost: dict[str, Any]) -> str:
    """What a step's seconds go into, where that is more than learning."""
    phases = {name: seconds for name, seconds in (cost.get("phases") or {}).items() if seconds}
    told = ", ".join(f"{name} {_duration(seconds)}" for name, seconds in phases.items())
    return f"   ({told})" if len(phases) > 1 else ""


def _dial(used: str | int) -> str:
    """The dial of checkpointing in words."""
    return (
        f"each {used}th block".replace("2th", "2nd").replace("3th", "3rd")
        if isinstance(used, int)
        else str(used)
    )


def _card(line: dict[str, Any]) -> str:
    """The smallest GPU; a smaller one in brackets, where checkpointing makes that do."""
    least, all_blocks = line["card_gib"], line["card_gib_all"]
    if least is None:
        return (
            f"none ({all_blocks} GB with checkpointing)"
            if all_blocks
            else "more memory than any has"
        )
    return f"{least} GB" + (f" ({all_blocks} GB with checkpointing)" if all_blocks < least else "")


def _estimate(exact: bool) -> None:
    if not exact:
        console.print(
            "- this family's blocks are estimated from above, and not counted", highlight=False
        )


def _compared(result: dict[str, Any]) -> None:
    batch, base, cuda = result["batch"], result["base"], result["device"] == "cuda"
    passes = pluralize(batch["tokens"], "token")
    table = Table(
        title=f"{base['name']}, {base['parameters']:,} numbers, {passes} a pass, on {result['device']}",
        title_justify="left",
    )
    last = "GPU of" if cuda else "fits here"
    for column in (
        "method",
        "peak memory",
        "checkpointing",
        "a step",
        "the run",
        "to learn",
        "file",
        last,
    ):
        table.add_column(column)
    for line in result["methods"]:
        if "why" in line:
            table.add_row(line["method"], escape(line["why"]))
            continue
        last = _card(line) if cuda else "yes" if line["fits"] else "no"
        table.add_row(
            line["method"],
            _size(line["peak_bytes"]),
            _dial(line["checkpointing"]["used"]),
            _duration(line["step_seconds"]),
            _duration(line["run_seconds"]),
            f"{line['trainable_parameters']:,}",
            _size(line["file_bytes"]),
            last,
        )
    console.print(table)
    _estimate(result["exact"])


def _sweep(result: dict[str, Any]) -> None:
    table = Table(title=f"runs {result['folder']}, nats a token", title_justify="left")
    for column in (
        "run",
        "method",
        "rank",
        "rate",
        "held-out before",
        "after",
        "forgetting",
        "trained numbers",
    ):
        table.add_column(column)
    for run in (run for run in result["runs"] if "failed" not in run):
        forgetting = "" if run["forgetting"] is None else f"{run['forgetting']:+.3f}"
        table.add_row(
            run["name"],
            run["method"],
            str(run["rank"]),
            f"{run['learning_rate']:.3g}",
            f"{run['held_before']:.4f}",
            f"{run['held_after']:.4f}",
            forgetting,
            f"{run['trainable_parameters']:,}",
        )
    console.print(table)
    for run in (run for run in result["runs"] if "failed" in run):
        console.print(f"{run['name']} stopped: {run['failed']}", highlight=False, markup=False)


def _train(result: dict[str, Any]) -> None:
    if "runs" in result:
        return _sweep(result)
    losses = result["losses"]
    policy, words = result.get("policy"), result["words"]
    table = Table(title=f"run {result['folder']}", title_justify="left")
    first = (
        f"nats a {words['unit']}"
        if policy is None
        else f"answers to {pluralize(policy['rows'], 'held-out prompt')}"
    )
    for column in (first, "before", "after"):
        table.add_column(column)
    for row in _losses(losses) if policy is None else _rewards(policy):
        table.add_row(*row)
    if losses["general_before"] is not None:
        table.add_row(
            "general text", f"{losses['general_before']:.4f}", f"{losses['general_after']:.4f}"
        )
    console.print(table)
    if "preferences" in result:
        _preferences(result["preferences"])
    if "classes" in result:
        _scores(result["classes"], "held-out row")
    for line in result["data"]["skipped"]:
        console.print(f"skipped {line}", highlight=False, markup=False)
    for sentence in result["verdict"]:
        console.print(f"- {sentence}", highlight=False)
    console.print(
        f"{pluralize(result['steps'], 'step')}, {pluralize(result['tokens'], words['piece'])} in {result['seconds']:.0f} s "
        f"({result['tokens_per_second']:,.0f} a second), peak {result['peak_memory_mb']:,.0f} MB, "
        f"adapter {result['adapter_kb']:,.0f} KB",
        highlight=False,
    )
    if result["objective"] in (
        "sft",
        "pretrain",
        "dpo",
        "kto",
        "orpo",
        "simpo",
        "grpo",
        "rloo",
        "ppo",
    ):
        console.print(f"talk to it: afina chat {result['folder']}", highlight=False)
    elif result["objective"] == "classify":
        what = "FILE.png" if result["data"]["format"] == "pictures" else '"some text"'
        console.print(
            f"ask it: afina generate {what} --adapter {result['folder']}", highlight=False
        )
    elif result["objective"] == "mlm":
        console.print(
            f"the encoder, whole: afina merge {result['folder']} --output-dir encoder",
            highlight=False,
        )


def _losses(losses: dict[str, Any]) -> list[tuple[str, str, str]]:
    rows = (("held-out rows", "held"), ("rows it learned", "train"))
    return [
        (label, f"{losses[f'{name}_before']:.4f}", f"{losses[f'{name}_after']:.4f}")
        for label, name in rows
    ]


def _rewards(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    from afina.training.run_card import reward_rows

    return reward_rows(found)


def _preferences(found: dict[str, Any]) -> None:
    from afina.training.run_card import preference_rows

    table = Table(title=pluralize(found["rows"], "held-out row"), title_justify="left")
    for column in ("", "before", "after"):
        table.add_column(column)
    for row in preference_rows(found):
        table.add_row(*row)
    console.print(table)
    if found.get("reference"):
        console.print(
            f"compared with {found['reference']['of']}: {found['reference']['why']}",
            highlight=False,
        )


def _scores(classes: dict[str, Any], thing: str) -> None:
    scores = f"accuracy {classes['accuracy']:.1f}%, F1 {classes['f1']:.1f}%"
    taken = f"who was taken for whom: {classes['picture']}"
    console.print(f"{scores} on {pluralize(classes['rows'], thing)}; {taken}", highlight=False)


UNITS = {
    "loss": "loss, nats a token",
    "perplexity": "perplexity",
    "general_loss": "loss on general text, nats a token",
}


def _eval(result: dict[str, Any]) -> None:
    if "classes" in result:
        _scores(result["classes"], "row")
        return
    if "judges" in result:
        table = Table(
            title=f"answers to {pluralize(result['rows'], 'prompt')}", title_justify="left"
        )
        for column in ("", "before", "after"):
            table.add_column(column)
        for row in _rewards(result):
            table.add_row(*row)
        console.print(table)
    elif "verdict" in result:
        _preferences(result)
    if "verdict" in result:
        for sentence in result["verdict"]:
            console.print(f"- {sentence}", highlight=False)
        return
    sides = [side for side in ("before", "after") if side in result]
    table = Table(title=pluralize(result["rows"], "row"), title_justify="left")
    table.add_column("")
    for side in sides:
        table.add_column({"before": "base", "after": "with the adapter"}[side])
    for name in result["before"]:
        table.add_row(
            UNITS.get(name, f"{name}, %"), *(f"{result[side][name]:.3f}" for side in sides)
        )
    console.print(table)
    _examples(result.get("examples", [])[:3], sides)


def _examples(examples: list[dict[str, Any]], sides: Sequence[str]) -> None:
    for example in examples:
        rows = [("prompt", example["prompt"]), ("expected", example["expected"])]
        rows += [
            ({"before": "base", "after": "adapter"}[side], example[side])
            for side in sides
            if side in example
        ]
        _rows("", rows)


def _generate(result: dict[str, Any]) -> None:
    for answer in result["answers"]:
        sure = f"  ({100 * answer['share']:.1f}%)" if "share" in answer else ""
        console.print(answer["text"] + sure, highlight=False, markup=False, soft_wrap=True)


def _preferred(result: dict[str, Any]) -> None:
    rows = [("pairs, for afina train", f"{result['pairs']:,} in {result['folder']}/pairs.jsonl")]
    rows += [
        (name, f"{result[key]:,}")
        for name, key in (("ties", "ties"), ("skipped", "skipped"), ("not judged yet", "left"))
    ]
    rows += [(f"won by {name}", f"{count:,}") for name, count in result["wins"].items()]
    if result["win_rate"] is not None:
        low, high = (100 * bound for bound in result["interval"])
        rows.append(
            (
                f"{next(iter(result['wins']))} wins",
                f"{100 * result['win_rate']:.1f}%  (95%: {low:.1f} to {high:.1f})",
            )
        )
    _rows("preferences", rows)


def _merge(result: dict[str, Any]) -> None:
    rows = [
        ("against the adapted model", f"{result['kl']:.3g} nats a token (KL divergence)"),
        (
            "same likeliest token",
            f"{100 * result['greedy_agreement']:.1f}% of {pluralize(result['probe_tokens'], 'position')}",
        ),
    ]
    if "loss_merged" in result:
        rows.append(
            (
                "loss on general text",
                f"{result['loss_adapted']:.4f} adapted, {result['loss_merged']:.4f} merged",
            )
        )
    _rows(f"written: {result['out']}", rows)


def _export(result: dict[str, Any]) -> None:
    if "kl" in result:
        _merge(result)
    else:
        console.print(f"written: {result['out']}", highlight=False)


def _demo(result: dict[str, Any]) -> None:
    _rows(
        "what a LoRA taught the embedded base: correcting sentences in English and Spanish",
        [
            (
                "corrected without a fault, before",
                f"{result['metric_before']:.1f}% of {result['held_out']} new sentences",
            ),
            ("corrected without a fault, after", f"{result['metric_after']:.1f}%"),
            ("words of these that were not in the training rows", f"{result['unseen_words']:.1f}%"),
            ("forgetting: loss on general text", f"{result['forgetting']:+.3f} nats a token"),
            ("time", f"{result['seconds']:.0f} s ({result['train_seconds']:.0f} s of training)"),
            ("peak memory", f"{result['peak_memory_mb']:,.0f} MB"),
            ("size of the adapter", f"{result['adapter_kb']:,.0f} KB"),
        ],
    )
    _examples(result["examples"], ["before", "after"])
    for sentence in result["verdict"]:
        console.print(f"- {sentence}", highlight=False)
    console.print(f"the curve: {result['curve']}", highlight=False)
    console.print(
        f"talk to it: afina chat {result['run']}      (try: Correct: the dogs runs in the park)",
        highlight=False,
        markup=False,
    )


def _parents(parents: Sequence[dict[str, Any]]) -> str:
    return "\n".join(
        f"{p['weight']:g} x {p['name']}  ({p['method']}, {(p['hash'] or 'no hash')[:12]})"
        for p in parents
    )


def _combine(result: dict[str, Any]) -> None:
    rows = [("parts", _parents(result["parents"])), ("layers", str(result["layers"]))]
    if "rank" in result:
        rows.append(("rank", f"up to {result['rank']}"))
    if "search" in result:
        found = result["search"]
        choices = [*found["losses"].items(), ("the weights found", found["found"])]
        rows.append(
            (
                f"loss on {found['checked_on']} rows not searched on",
                "\n".join(f"{v:.4f}  {k}" for k, v in choices),
            )
        )
    _rows(f"{result['kind']} written: {result['out']}", rows)
    if (
        "search" in result
        and result["search"]["found"] > result["search"]["losses"][result["search"]["best_simple"]]
    ):
        simple = result["search"]["best_simple"]
        console.print(
            f"- On the rows kept for checking, '{simple}' is better: use that, or more rows.",
            markup=False,
        )
    _energy(result)


def _energy(result: dict[str, Any]) -> None:
    if "energy" not in result:
        return
    energy = result["energy"]
    console.print(
        f"- It keeps {100 * energy['mean']:.1f}% of the exact update's squared norm on average, "
        f"{100 * energy['least']:.1f}% in the layer that loses most.",
        highlight=False,
    )
    if energy["mean"] < 0.9:
        console.print(
            "- That is little: what it does may differ much from what was asked for. A higher --rank keeps more."
        )


def _extract(result: dict[str, Any]) -> None:
    loss, rank = result["loss"], result["rank"]
    _rows(
        f"adapter written: {result['out']}",
        [
            ("layers", str(result["layers"])),
            ("rank", f"{rank['least']} to {rank['most']}"),
            (
                f"loss on {loss['rows']}",
                "\n".join(
                    f"{loss[k]:.4f}  {k}" for k in ("base", "original", "extract") if k in loss
                ),
            ),
        ],
    )
    _energy(result)
    if result["left_out"]:
        largest = max(result["left_out"], key=lambda name: result["left_out"][name])
        console.print(
            f"- {len(result['left_out'])} tensors that are no matrices were left out; the one that changed most is {largest} "
            f"({100 * result['left_out'][largest]:.2f}%).",
            highlight=False,
        )


def _about(result: dict[str, Any]) -> None:
    if result["kind"] == "composition":
        console.print(
            f"composition {result['run']}: {len(result['parts'])} adapters act together",
            highlight=False,
        )
        for part in result["parts"]:
            console.print(f"\nweight {part['weight']:g}", style="bold", highlight=False)
            _adapter(part, part["folder"])
        return
    _adapter(result, result["run"])
    evaluation = result["evaluation"] or {}
    if "losses" in evaluation:
        losses = evaluation["losses"]
        rewarded = evaluation.get("objective") in POLICIES  # their losses are minus the reward
        before, after = (
            losses[name] * (-1 if rewarded else 1) for name in ("held_before", "held_after")
        )
        told = f"{before:.4f} before, {after:.4f} after {evaluation['steps']:,} steps"
        console.print(f"held-out {'reward' if rewarded else 'loss'} {told}", highlight=False)
    for sentence in evaluation.get("verdict", []):
        console.print(f"- {sentence}", highlight=False)


def _adapter(about: dict[str, Any], title: str) -> None:
    base, ranks = about["base"], about["ranks"]
    rows = [
        ("method", about["method"] + (" (rsLoRA scaling)" if about["scaling"] == "rslora" else "")),
        (
            "rank, alpha",
            f"{ranks[0]}{f' to {ranks[-1]}' if len(ranks) > 1 else ''}, {about['alpha']:g}",
        ),
        (
            "base",
            f"{base.get('name')}  ({(base.get('hash') or 'hash not told')[:12]}, {base.get('storage', 'plain')})",
        ),
        ("size", f"{about['numbers']:,} numbers, {about['bytes'] / 1000:,.0f} KB"),
        (
            "hash",
            about["hash"][:12]
            + ("" if about["unchanged"] is not False else "  NOT the one that afina.json tells"),
        ),
        ("acts", "from its invocation on" if about["invocation"] else "everywhere"),
    ]
    if about["options"]:
        rows.append(("options", ", ".join(f"{k}: {v}" for k, v in about["options"].items())))
    if about["parents"]:
        rows.append(
            (
                f"parents, by {(about['combination'] or {}).get('how', '?')}",
                _parents(about["parents"]),
            )
        )
    _rows(title, rows)
    _picture(about)


BARS = " ▁▂▃▄▅▆▇█"


def _picture(about: dict[str, Any]) -> None:
    """A line a kind of layer, a bar a block: the norm there, the tallest bar being the largest."""
    from afina.merging.adapter_info import leaf_and_block

    largest = max(about["norms"].values(), default=0.0) or 1.0
    table = Table(
        title=f"norm of the {about['norm_of']} by layer, largest {largest:.3g}",
        title_justify="left",
        box=None,
    )
    lines: dict[str, dict[int, float]] = {}
    for path, norm in about["norms"].items():
        leaf, block = leaf_and_block(path)
        lines.setdefault(leaf, {})[block] = norm
    blocks = sorted({block for line in lines.values() for block in line})
    table.add_column("layer", header_style="dim")
    table.add_column(
        f"blocks {blocks[0]} to {blocks[-1]}" if blocks and blocks[-1] >= 0 else "",
        header_style="dim",
    )
    for leaf, line in lines.items():
        bars = (
            BARS[min(8, 1 + int(8 * line[b] / largest))] if b in line else BARS[0] for b in blocks
        )
        table.add_row(escape(leaf), "".join(bars))
    console.print(table)
