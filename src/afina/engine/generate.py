"""Generation, in its plainest form: prompts in one flat run, then one token of every sequence at a time.

prefill   | prompt 1 | prompt 2 | prompt 3 |      one forward, keys and values into the cache
decode    | t1 | t2 | t3 |                        one token each, until each has stopped
"""

import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afina.base.classifier import Classifier
from afina.base.flat import KeyValueCache
from afina.base.model import Base
from afina.config import GenerateSettings, make_settings
from afina.data.labelled import read_picture
from afina.data.template import Renderer
from afina.delta.opening import open_run
from afina.engine.grammar import Grammars
from afina.engine.request import Sampling
from afina.engine.sampling import Chooser, choose
from afina.engine.text import Text, text_of
from afina.errors import DataError, counted
from afina.objective.classify import content_of
from afina.route.invocation import Route
from afina.segments import BASE, Segments

BATCH = 64  # sequences decoded together


@dataclass(frozen=True)
class Answer:
    """What came out for one prompt; `stopped` tells a stop token from the limit of tokens."""

    text: str
    tokens: list[int]
    stopped: bool


def stop_tokens(base: Base) -> set[int]:
    """The tokens that end an answer: the tokenizer's and those of the model's generation settings."""
    configured = getattr(base.model.generation_config, "eos_token_id", None)
    found = configured if isinstance(configured, list) else [configured]
    return {token for token in [*found, base.tokenizer.eos_token_id] if token is not None}


@torch.no_grad()
def generate_tokens(
    base: Base,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    route: Route | None = None,
    on_token: Callable[[int, int], None] | None = None,
    stops: Collection[int] = (),
) -> list[list[int]]:
    """New tokens for each prompt (at least one token each), its stop token or the end of its stop string included.

    The answers do not depend on what they are batched with, up to rounding: prompt i draws with the seed `seed` + i.
    `on_token(prompt, token)` is called as each token is chosen; `stops` end an answer besides the base's own stop
    tokens. Raises `DataError` where a prompt leaves no room in the base's context, or for a schema that cannot be
    followed, `SettingsError` for a setting out of its range.
    """
    results: list[list[int]] = [[] for _ in prompts]
    for index, prompt in enumerate(prompts):
        if not 0 < len(prompt) < base.context:
            raise DataError(
                f"prompt {index + 1} has {counted(len(prompt), 'token')}",
                why=f"the base reads from 1 to {base.context - 1} before its answer",
            )
    stops = set() if sampling.ignore_end else stop_tokens(base) | set(stops)
    grammars = Grammars(base.tokenizer) if sampling.schema is not None else None
    for start in range(0, len(prompts), BATCH):
        rows = list(range(start, min(start + BATCH, len(prompts))))
        writers = {}
        for row in rows:
            grammar = grammars.of(sampling.schema or {}, stops) if grammars else None
            chooser = Chooser(replace(sampling, seed=sampling.seed + row), prompts[row], base.vocabulary, grammar)
            writers[row] = _Writer(chooser, Text(base.tokenizer, sampling.stop), stops)
        _generate_batch(base, writers, prompts, results, sampling.max_new_tokens, route, on_token)
    return results


@dataclass(frozen=True)
class _Writer:
    """How one answer is written, and what ends it."""

    chooser: Chooser
    text: Text
    stops: set[int]

    def ends(self, token: int) -> bool:
        """Whether the answer is whole with this token, which was chosen last."""
        if self.chooser.sampling.stop:
            self.text.add(token)
        return token in self.stops or self.text.stopped or self.chooser.finished


def _generate_batch(
    base: Base, writers: dict[int, _Writer], prompts: Sequence[Sequence[int]], results: list[list[int]],
    limit: int, route: Route | None, on_token: Callable[[int, int], None] | None,
) -> None:  # fmt: skip
    """Answer the prompts of `writers`, writing into `results`; a sequence that has stopped leaves the batch."""
    rows = list(writers)
    limits = {row: min(limit, base.context - len(prompts[row])) for row in rows}
    capacity = max(len(prompts[row]) + limits[row] for row in rows)
    cache = KeyValueCache(capacity, [0] * len(rows)) if base.flat else None
    feed = [list(prompts[row]) for row in rows]
    active = {row: route.invoked(prompts[row]) if route is not None else () for row in rows}
    while rows:
        with base.board.route(_segments(route, feed, [active[row] for row in rows], cache)):
            logits = _next_logits(base, feed, cache)
        going = []
        for i, (row, chosen) in enumerate(zip(rows, choose(logits, [writers[row].chooser for row in rows]), strict=True)):
            results[row].append(chosen.token)
            if on_token:
                on_token(row, chosen.token)
            if not writers[row].ends(chosen.token) and len(results[row]) < limits[row]:
                going.append(i)
        if cache is not None and 0 < len(going) < len(rows):
            cache.keep(going)
        rows = [rows[i] for i in going]
        feed = [[results[row][-1]] if cache is not None else [*prompts[row], *results[row]] for row in rows]


def _segments(
    route: Route | None, feed: list[list[int]], active: list[tuple[bool, ...]], cache: KeyValueCache | None
) -> Segments:
    """Who acts on the tokens of the next forward: whole sequences, or one more token of each."""
    if route is None:
        return BASE
    if cache is not None and any(cache.lengths):
        return route.following(active)
    bounds = [0, *accumulate(len(piece) for piece in feed)]
    return route.segments(torch.tensor([token for piece in feed for token in piece]), bounds)


def _next_logits(base: Base, feed: list[list[int]], cache: KeyValueCache | None) -> Tensor:
    """Logits (n, V) of the token after each of the `feed` sequences, which follow what the cache holds."""
    past = cache.lengths if cache is not None else [0] * len(feed)
    bounds = (0, *accumulate(len(piece) for piece in feed))
    tokens = torch.tensor([token for piece in feed for token in piece], device=base.device)
    positions = torch.cat([torch.arange(n, n + len(piece)) for n, piece in zip(past, feed, strict=True)]).to(base.device)
    return base.last_logits(tokens, positions, bounds, cache)


def answer(
    base: Base, renderer: Renderer, prompts: Sequence[Sequence[int]], sampling: Sampling, route: Route | None = None
) -> list[Answer]:
    """Answers as text, without their stop tokens."""
    stops = stop_tokens(base) | renderer.stops
    answers = []
    for tokens in generate_tokens(base, prompts, sampling, route, stops=stops):
        stopped = bool(tokens) and tokens[-1] in stops
        text = text_of(base.tokenizer, tokens[:-1] if stopped else tokens, sampling.stop)
        answers.append(Answer(text.strip(), tokens, stopped))
    return answers


def generate(prompts: Sequence[str] | GenerateSettings, **values: Any) -> dict[str, Any]:
    """Answer prompts, with an adapter or without: {"answers": [{"prompt", "text", "tokens", "stopped"}]}.

    A classifier answers with a class (`text`) and its probability (`share`); of pictures, prompts are the files.
    """
    settings = (
        prompts
        if isinstance(prompts, GenerateSettings)
        else make_settings(GenerateSettings, {"prompts": list(prompts), **values})
    )
    opened = open_run(settings.run, settings, adapter=settings.adapter == "on")
    texts = [line for p in settings.prompts for line in (sys.stdin.read().splitlines() if p == "-" else [p]) if line]
    if isinstance(opened.base, Classifier) and opened.base.labels:
        return _label(opened.base, opened.route, texts, settings)
    base, route = opened.language, opened.route
    renderer = Renderer(base.tokenizer, "plain" if settings.raw else opened.template, base.context)
    sampling = Sampling(settings.max_new_tokens, settings.temperature, settings.top_p, seed=settings.seed)
    answers = answer(base, renderer, [renderer.prompt(text) for text in texts], sampling, route)
    return {
        "base": base.name,
        "adapter": str(settings.run) if route is not None else None,
        "answers": [
            {"prompt": prompt, "text": a.text, "tokens": len(a.tokens), "stopped": a.stopped}
            for prompt, a in zip(texts, answers, strict=True)
        ],
    }


@torch.no_grad()
def _label(base: Classifier, route: Route | None, prompts: Sequence[str], settings: GenerateSettings) -> dict[str, Any]:
    """The likeliest class of each text or picture, one at a time."""
    answers = []
    for prompt in prompts:
        content = prompt if base.images is None else read_picture(Path(prompt))
        with base.board.route(BASE if route is None else route.segments_of_rows()):
            scores = base.logits(base.batch([content_of(base, content, base.context, prompt)])).softmax(-1)[0]
        best = int(scores.argmax())
        answers.append({"prompt": prompt, "text": base.labels[best], "share": float(scores[best])})
    return {"base": base.name, "adapter": str(settings.run) if route is not None else None, "answers": answers}
