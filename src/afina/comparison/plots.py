"""Plots of a comparison as inline SVG: text stays text, without external resources."""

import io
from collections.abc import Callable, Mapping
from typing import Any

from afina.comparison.messages import Words

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)  # distinguishable with any color vision (Okabe and Ito)
MARKS = "osD^vPX*<>"
WIDTH, HEIGHT = 5.0, 3.3  # inches; small, so that text stays readable on a phone


def render_svg(salt: str, paint: Callable[[Any], None], width: float, height: float) -> str:
    """Return what `paint` draws as deterministic SVG; `salt` seeds its ids."""
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.family": "sans-serif",
        "font.size": 10,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure)
        stream = io.StringIO()
        figure.savefig(
            stream,
            format="svg",
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    svg = stream.getvalue()
    return svg[svg.index("<svg") :].replace("<svg ", '<svg role="img" ', 1)


def _draw(salt: str, paint: Callable[[Any], None], height: float = HEIGHT) -> str:
    """One chart of a report."""

    def bare(figure: Any) -> None:
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        paint(axes)

    return render_svg(salt, bare, WIDTH, height)


def _style(names: list[str], name: str) -> dict[str, Any]:
    number = names.index(name)
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKS[number % len(MARKS)]}


def _ends(figure: Mapping[str, float | None]) -> list[list[float]]:
    """The arms of an interval, as matplotlib wants them."""
    mean, low, high = figure["mean"], figure["low"], figure["high"]
    return (
        [[0.0], [0.0]]
        if low is None or high is None or mean is None
        else [[max(0.0, mean - low)], [max(0.0, high - mean)]]
    )


def quality(result: Mapping[str, Any], words: Words) -> str:
    """Every method's score with its interval, the base's as a line to get past."""
    methods = result["methods"]
    names = list(methods)

    def paint(axes: Any) -> None:
        base = result["base_figures"]["score"]["mean"]
        axes.axvline(base, color="0.45", linestyle="--", linewidth=1, label=words("base"))
        for row_index, name in enumerate(reversed(names)):
            score = methods[name]["score"]
            axes.errorbar(
                score["mean"],
                row_index,
                xerr=_ends(score),
                capsize=4,
                linestyle="none",
                **_style(names, name),
            )
        axes.set_yticks(range(len(names)), list(reversed(names)))
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.set_xlabel(words("axis_" + result["metric"]))
        axes.legend(
            frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0.0, 1.0)
        )  # above: no arm lies there

    return _draw("quality", paint, 1.4 + 0.34 * len(names))


def trade(result: Mapping[str, Any], cost: str, words: Words) -> str:
    """Quality against one cost; the methods that no other beats in both are joined by a line."""
    methods, metric = result["methods"], result["metric"]
    names = list(methods)

    def value(name: str) -> float:
        found = methods[name][cost]
        return float(found["mean"] if isinstance(found, Mapping) else found)

    def paint(axes: Any) -> None:
        front = sorted(result["fronts"][cost], key=value)
        axes.plot(
            [value(n) for n in front],
            [methods[n]["score"]["mean"] for n in front],
            color="0.6",
            linewidth=1,
            zorder=0,
        )
        for name in names:
            across = (
                _ends(methods[name][cost]) if isinstance(methods[name][cost], Mapping) else None
            )
            axes.errorbar(
                value(name),
                methods[name]["score"]["mean"],
                yerr=_ends(methods[name]["score"]),
                xerr=across,
                capsize=3,
                linestyle="none",
                label=name,
                **_style(names, name),
            )
        axes.set_xlabel(words("axis_" + cost))
        axes.set_ylabel(words("axis_" + metric))
        if cost != "forgetting":
            axes.set_xlim(0, 1.1 * max(map(value, names)))
        axes.locator_params(axis="x", nbins=5)
        axes.legend(frameon=False, fontsize=8, ncols=2)

    return _draw(cost, paint)


def curves(result: Mapping[str, Any], words: Words) -> str:
    """Return the plot of the validation loss against steps, one line per seed."""
    names = list(result["methods"])

    def paint(axes: Any) -> None:
        for name, found in result["methods"].items():
            for number, curve in enumerate(found["curves"]):
                points = [
                    (step, eval_loss) for step, _, eval_loss in curve if eval_loss is not None
                ]
                axes.plot(
                    *zip(*points, strict=True),
                    linewidth=1.2,
                    markersize=3.5,
                    label=name if not number else None,
                    **_style(names, name),
                )
        axes.set_xlabel(words("axis_step"))
        axes.set_ylabel(words("axis_loss"))
        axes.legend(frameon=False, fontsize=8, ncols=2)

    return _draw("curves", paint)


def rates(result: Mapping[str, Any], words: Words) -> str:
    """Loss on the rows that choose, against the learning rate: the first round of the search."""
    names = list(result["methods"])

    def paint(axes: Any) -> None:
        for name, found in result["methods"].items():
            least = min(steps for _, steps, _ in found["tried"])
            points = sorted(
                (rate, loss)
                for rate, steps, loss in found["tried"]
                if steps == least and loss is not None
            )
            axes.plot(
                *zip(*points, strict=True),
                linewidth=1.2,
                markersize=4,
                label=name,
                **_style(names, name),
            )
        axes.set_xscale("log")
        axes.set_xlabel(words("axis_rate"))
        axes.set_ylabel(words("axis_loss"))
        axes.legend(frameon=False, fontsize=8, ncols=2)

    return _draw("rates", paint)


def pictures(result: Mapping[str, Any], words: Words) -> list[tuple[str, str]]:
    """(caption, SVG) of all that there is something to draw for."""
    figures = [(words("caption_quality"), quality(result, words))]
    figures += [(words("caption_" + cost), trade(result, cost, words)) for cost in result["fronts"]]
    figures.append((words("caption_curves"), curves(result, words)))
    if any(found["tried"] for found in result["methods"].values()):
        figures.append((words("caption_rates"), rates(result, words)))
    return figures
