"""`afina bench-serve`: latency of a server at rising request rates, with a plot.

Arrivals are a Poisson process, independent of running requests, so that a slow server does not
reduce its own load. The k-th model has a share of requests proportional to 1/k^zipf_exponent. A run
ends when all of its requests have ended.
"""

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afina.errors import SettingsError, pluralize
from afina.io.atomic import translate_os_errors
from afina.io.result import Content, Result, ResultTable, ResultText
from afina.server.client import Client, ServerError
from afina.settings import BenchServeSettings

WORDS = (
    "the",
    "dog",
    "reads",
    "a",
    "book",
    "in",
    "garden",
    "while",
    "seven",
    "small",
    "birds",
    "sing",
    "near",
    "river",
)


@dataclass(frozen=True)
class RequestTiming:
    """Seconds from a request to its first and last text chunk, or its error."""

    first: float = 0.0
    last: float = 0.0
    pieces: int = 0
    error: str | None = None


@dataclass(frozen=True, eq=False)
class BenchResult(Result):
    """Latency of a server under load: figures in seconds for each request rate, and their plot."""

    url: str
    models: int
    runs: Sequence[Mapping[str, Any]]
    picture: str

    def content(self) -> list[Content]:
        """Return one table with a row per request rate, then the errors and the plot's path."""
        title = f"{self.url}, {pluralize(self.models, 'model')}; seconds to first and last token"
        head = ("rate", "sent", "failed", "first 50%", "95%", "99%", "last 50%", "95%", "99%")
        errors = [f"- at {run['rate']:g}: {error}" for run in self.runs for error in run["errors"]]
        table = ResultTable(title, [_latency_row(run) for run in self.runs], head)
        return [table, *map(ResultText, [*errors, self.picture])]


def _latency_row(run: Mapping[str, Any]) -> tuple[str, ...]:
    keys = [f"{what}_p{share}" for what in ("first", "last") for share in (50, 95, 99)]
    waits = ("-" if run[key] is None else f"{run[key]:.3f}" for key in keys)
    return (f"{run['rate']:g}", f"{run['requests']:,}", f"{run['failed']:,}", *waits)


def bench(settings: BenchServeSettings) -> BenchResult:
    """Load the server at each rate; return the latencies of each, and write the plot."""
    return asyncio.run(_bench(settings))


async def _bench(settings: BenchServeSettings) -> BenchResult:
    async with Client(settings.base_url, settings.api_key) as client:
        models = settings.models or await client.models()
        # warm-up: the first request of a server is slower
        await _time_request(client, settings, models[0], random.Random(0))
        runs = []
        for rate in settings.request_rates:
            outcomes, seconds = await _run(client, settings, models, rate)
            runs.append(summarize(rate, outcomes, seconds))
    draw(runs, settings.plot_file)
    return BenchResult(
        url=settings.base_url, models=len(models), runs=runs, picture=str(settings.plot_file)
    )


async def _run(
    client: Client, settings: BenchServeSettings, models: Sequence[str], rate: float
) -> tuple[list[RequestTiming], float]:
    """Send the requests that arrive within the duration; return their timings and the seconds."""
    chance, began, at = random.Random(f"{settings.seed} {rate}"), time.perf_counter(), 0.0
    weights = [1.0 / rank**settings.zipf_exponent for rank in range(1, len(models) + 1)]
    tasks = []
    while (at := at + chance.expovariate(rate)) < settings.duration_seconds:
        await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
        [model] = chance.choices(models, weights)
        tasks.append(
            asyncio.create_task(
                _time_request(client, settings, model, random.Random(chance.random()))
            )
        )
    if not tasks:
        hint = "increase --request-rates or --duration-seconds"
        raise SettingsError(
            f"no request arrives within {settings.duration_seconds:g} s at {rate:g} per second",
            hint=hint,
        )
    return list(await asyncio.gather(*tasks)), time.perf_counter() - began


async def _time_request(
    client: Client, settings: BenchServeSettings, model: str, chance: random.Random
) -> RequestTiming:
    """Time one request; its random prompt shares no prefix that a cache could speed up."""
    text = " ".join(chance.choices(WORDS, k=settings.prompt_words))
    body = {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "temperature": 0.0,
        "max_tokens": settings.max_new_tokens,
        "ignore_eos": True,
    }
    first, last, pieces = 0.0, 0.0, 0
    try:
        async for piece in client.chat(body):
            first, last, pieces = first or piece.seconds, piece.seconds, pieces + 1
    except ServerError as error:
        return RequestTiming(error=error.what)
    return RequestTiming(first, last, pieces)


def summarize(rate: float, outcomes: Sequence[RequestTiming], seconds: float) -> dict[str, Any]:
    """Return percentiles of the latencies, in seconds."""
    good = [one for one in outcomes if one.error is None]
    summary: dict[str, Any] = {
        "rate": rate,
        "requests": len(outcomes),
        "failed": len(outcomes) - len(good),
        "seconds": seconds,
        "served_per_second": len(good) / seconds,
    }
    for name, values in (
        ("first", sorted(one.first for one in good)),
        ("last", sorted(one.last for one in good)),
    ):
        summary |= {f"{name}_p{share}": _quantile(values, share / 100) for share in (50, 95, 99)}
    between = sorted((one.last - one.first) / (one.pieces - 1) for one in good if one.pieces > 1)
    return summary | {
        "between_p50": _quantile(between, 0.5),
        "errors": sorted({one.error for one in outcomes if one.error}),
    }


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    """Return the quantile `share` of sorted values: the nearest value above."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


def draw(runs: Sequence[dict[str, Any]], file: Path) -> None:
    """Plot latency against request rate, to the first and to the last text chunk, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, name, title in zip(
        figure.subplots(1, 2),
        ("first", "last"),
        ("first text chunk", "last text chunk"),
        strict=True,
    ):
        for share, style in ((50, "o-"), (95, "s--"), (99, "^:")):
            seen = [
                (run["rate"], run[f"{name}_p{share}"])
                for run in runs
                if run[f"{name}_p{share}"] is not None
            ]
            axes.plot([x for x, _ in seen], [y for _, y in seen], style, label=f"{share}%")
        axes.set_title(f"time to the {title}")
        axes.set_xlabel("requests per second")
        axes.set_ylabel("seconds")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, title="percentile")
    with translate_os_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=120)
