"""The study in plain words, with its pictures: docs/study.md. Every figure in it comes from the results."""

from typing import Any

from claims import CLAIMS
from verdicts import OPEN, Point, Results, gap, verdicts

from afina.comparison.plots import COLOURS, MARKS, render_svg

PAIRS = (
    ("lora", "full"),
    ("mora", "lora"),
    ("freeze", "full"),
    ("dora", "lora"),
    ("qlora", "lora"),
    ("mlp", "all-linear"),
    ("attention", "all-linear"),
    ("last-half", "all-linear"),
    ("auto", "all-linear"),
)
NEAR, FAR = 0.1, 3.0  # nats: where one is farther than FAR, the scale is logarithmic beyond NEAR
SMOKE = "smoke"  # proves the frame, answers nothing
PICTURES = {
    "gaps": "How much better or worse one method was than another, in each part. Left of the line: worse. An arm that touches the "
    "line: these rows show no difference.",
    "forgetting": "What each method forgot of general text, in each part. To the right is worse.",
    "overfitting": "By how much more the loss fell on learned rows than on new ones. To the right is worse.",
}


def summary(done: Results) -> str:
    """The page."""
    told = list(verdicts(CLAIMS, done))
    ran = [name for name in done if name != SMOKE]
    count = {
        verdict: sum(v == verdict for _, v, _ in told)
        for verdict in dict.fromkeys(v for _, v, _ in told)
    }
    lines = [
        "# What our reference study found",
        "",
        "<!-- made by `python studies/study.py --page`; not written by hand -->",
        "",
        "Guides say a lot about fine-tuning. We took what they say, wrote down by which rule a figure would decide it, and then "
        "measured on the small model that comes with afina. Every method had the same rows, the same number of tries to find "
        "its learning rate, and three seeds. Brackets hold the range in which the true figure lies in 95 of 100 such "
        "studies.",
        "",
        "**What this is not:** one base of five million numbers, and runs of a few minutes. Papers measured models a thousand "
        "times larger. Where our verdict differs from theirs, both may be right.",
        "",
        f"{len(ran)} parts have run; of {len(told)} claims, "
        + ", ".join(f"{n} {verdict}" for verdict, n in count.items())
        + ".",
        "",
    ]
    for name in draw(done):
        lines += [f"![{PICTURES[name].split('.')[0]}](study/{name}.svg)", "", PICTURES[name], ""]
    lines += ["## Claim by claim", ""]
    for claim, verdict, points in told:
        who = f"[{claim.who}]({claim.link})" if claim.link else claim.who
        lines += [
            f"### {claim.says}",
            "",
            f"{who}. **{verdict.capitalize()}.** {claim.plain.get(verdict, '')}".strip(),
            "",
        ]
        lines += [*map(_line, points)] + ([""] if points else [])
        if verdict == OPEN:
            lines += [f"`python studies/study.py {claim.parts[0]}` answers it.", ""]
    lines += [
        "The rule of each verdict and all tables are in `studies/README.md`, beside the results.",
        "",
    ]
    return "\n".join(lines)


def _line(point: Point) -> str:
    meaning = {True: "for", False: "against", None: "cannot tell"}[point.holds]
    return f"- {point.part}: {point.figures} ({meaning})"


def draw(done: Results) -> dict[str, str]:
    """Pictures by name, as SVG: those for which there is something to draw."""
    ran = {name: found for name, found in done.items() if name != SMOKE}
    made = {"gaps": _gaps(ran)}
    made |= {kind: _figures(ran, kind) for kind in ("forgetting", "overfitting")}
    return {name: picture for name, picture in made.items() if picture}


def _gaps(ran: Results) -> str | None:
    """Differences of scores: those in points and those in nats side by side, since they share no scale."""
    rows: dict[str, list[tuple[str, Any]]] = {"points": [], "nats": []}
    for part, found in ran.items():
        for one, other in PAIRS:
            if {one, other} <= set(found["methods"]):
                shown = gap(found, one, other)
                rows[shown.unit].append((f"{part}: {one} − {other}", shown))
    rows = {unit: some for unit, some in rows.items() if some}
    if not rows:
        return None

    def paint(figure: Any) -> None:
        heights = [len(some) for some in rows.values()]
        for axes, (unit, some) in zip(
            figure.subplots(len(rows), 1, squeeze=False, height_ratios=heights)[:, 0],
            rows.items(),
            strict=True,
        ):
            for place, (_, shown) in enumerate(reversed(some)):
                arms = [[shown.mean - shown.low], [shown.high - shown.mean]]
                axes.errorbar(
                    shown.mean,
                    place,
                    xerr=arms,
                    capsize=3,
                    marker="o",
                    color=COLOURS[0 if shown.shown else 6],
                    markerfacecolor=COLOURS[0] if shown.shown else "white",
                )
            axes.axvline(0.0, color="0.45", linestyle="--", linewidth=1)
            axes.set_yticks(range(len(some)), [name for name, _ in reversed(some)])
            axes.set_ylim(-0.6, len(some) - 0.4)
            axes.set_xlabel(f"better by ({unit}); filled: shown")
            axes.grid(axis="x", alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)

    return render_svg("gaps", paint, 6.5, 0.9 * len(rows) + 0.26 * sum(map(len, rows.values())))


def _figures(ran: Results, kind: str) -> str | None:
    """One kind of figure of each method, with its interval, part by part."""
    rows = [
        (part, name, found["methods"][name][kind])
        for part, found in ran.items()
        for name in found["methods"]
        if kind in found["methods"][name]
    ]
    names = list(dict.fromkeys(name for _, name, _ in rows))
    if not rows:
        return None

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for place, (_, name, shown) in enumerate(reversed(rows)):
            arms = [[shown["mean"] - shown["low"]], [shown["high"] - shown["mean"]]]
            number = names.index(name)
            axes.errorbar(
                shown["mean"],
                place,
                xerr=arms,
                capsize=3,
                color=COLOURS[number % len(COLOURS)],
                marker=MARKS[number % len(MARKS)],
            )
        axes.axvline(0.0, color="0.45", linestyle="--", linewidth=1)
        axes.set_yticks(range(len(rows)), [f"{part}: {name}" for part, name, _ in reversed(rows)])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        if max(abs(shown[end]) for _, _, shown in rows for end in ("low", "high")) > FAR:
            axes.set_xscale("symlog", linthresh=NEAR)
            axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(f"{kind} (nats a token)")
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)

    return render_svg(kind, paint, 6.5, 0.8 + 0.24 * len(rows))
