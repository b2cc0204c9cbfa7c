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

from afina.adapters.active import ActiveAdapters
from afina.adapters.load_run import load_run
from afina.adapters.segments import NO_ADAPTERS, Segments
from afina.data.labeled import read_picture
from afina.data.renderer import Renderer
from afina.engine.detokenizer import Detokenizer, detokenize
from afina.engine.grammar import GrammarCompiler
from afina.engine.request import SamplingParams
from afina.engine.sampler import Sampler, sample
from afina.errors import DataError, pluralize
from afina.models.causal_lm import CausalLM
from afina.models.classifier import Classifier
from afina.models.packed_attention import KeyValueCache
from afina.objectives.classification import encode_input
from afina.settings import GenerateSettings, make_settings

BATCH = 64  # sequences decoded together


@dataclass(frozen=True)
class Completion:
    """What came out for one prompt; `stopped` tells a stop token from the limit of tokens."""

    text: str
    token_ids: list[int]
    ended_by_stop: bool


def stop_token_ids(base: CausalLM) -> set[int]:
    """The tokens that end an answer: the tokenizer's and those of the model's generation settings."""
    configured = getattr(base.model.generation_config, "eos_token_id", None)
    found = configured if isinstance(configured, list) else [configured]
    return {token for token in [*found, base.tokenizer.eos_token_id] if token is not None}


@torch.no_grad()
def generate_tokens(
    base: CausalLM,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    route: ActiveAdapters | None = None,
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
        if not 0 < len(prompt) < base.max_positions:
            raise DataError(
                f"prompt {index + 1} has {pluralize(len(prompt), 'token')}",
                why=f"the base reads from 1 to {base.max_positions - 1} before its answer",
            )
    stops = set() if sampling.ignore_eos else stop_token_ids(base) | set(stops)
    grammars = GrammarCompiler(base.tokenizer) if sampling.json_schema is not None else None
    for start in range(0, len(prompts), BATCH):
        rows = list(range(start, min(start + BATCH, len(prompts))))
        writers = {}
        for row in rows:
            grammar = grammars.of(sampling.json_schema or {}, stops) if grammars else None
            chooser = Sampler(
                replace(sampling, seed=sampling.seed + row), prompts[row], base.vocab_size, grammar
            )
            writers[row] = _Writer(chooser, Detokenizer(base.tokenizer, sampling.stop), stops)
        _generate_batch(base, writers, prompts, results, sampling.max_new_tokens, route, on_token)
    return results


@dataclass(frozen=True)
class _Writer:
    """How one answer is written, and what ends it."""

    chooser: Sampler
    text: Detokenizer
    stops: set[int]

    def ends(self, token: int) -> bool:
        """Whether the answer is whole with this token, which was chosen last."""
        if self.chooser.sampling.stop:
            self.text.add(token)
        return token in self.stops or self.text.stopped or self.chooser.is_finished


def _generate_batch(
    base: CausalLM,
    writers: dict[int, _Writer],
    prompts: Sequence[Sequence[int]],
    results: list[list[int]],
    limit: int,
    route: ActiveAdapters | None,
    on_token: Callable[[int, int], None] | None,
) -> None:
    """Answer the prompts of `writers`, writing into `results`; a sequence that has stopped leaves the batch."""
    rows = list(writers)
    limits = {row: min(limit, base.max_positions - len(prompts[row])) for row in rows}
    capacity = max(len(prompts[row]) + limits[row] for row in rows)
    cache = KeyValueCache(capacity, [0] * len(rows)) if base.supports_packing else None
    feed = [list(prompts[row]) for row in rows]
    active = {row: route.is_invoked(prompts[row]) if route is not None else () for row in rows}
    while rows:
        with base.forward_context.use(_segments(route, feed, [active[row] for row in rows], cache)):
            logits = _next_logits(base, feed, cache)
        going = []
        for i, (row, chosen) in enumerate(
            zip(rows, sample(logits, [writers[row].chooser for row in rows]), strict=True)
        ):
            results[row].append(chosen.token)
            if on_token:
                on_token(row, chosen.token)
            if not writers[row].ends(chosen.token) and len(results[row]) < limits[row]:
                going.append(i)
        if cache is not None and 0 < len(going) < len(rows):
            cache.keep(going)
        rows = [rows[i] for i in going]
        feed = [
            [results[row][-1]] if cache is not None else [*prompts[row], *results[row]]
            for row in rows
        ]


def _segments(
    route: ActiveAdapters | None,
    feed: list[list[int]],
    active: list[tuple[bool, ...]],
    cache: KeyValueCache | None,
) -> Segments:
    """Who acts on the tokens of the next forward: whole sequences, or one more token of each."""
    if route is None:
        return NO_ADAPTERS
    if cache is not None and any(cache.lengths):
        return route.decode_segments(active)
    bounds = [0, *accumulate(len(piece) for piece in feed)]
    return route.segments(torch.tensor([token for piece in feed for token in piece]), bounds)


def _next_logits(base: CausalLM, feed: list[list[int]], cache: KeyValueCache | None) -> Tensor:
    """Logits (n, V) of the token after each of the `feed` sequences, which follow what the cache holds."""
    past = cache.lengths if cache is not None else [0] * len(feed)
    bounds = (0, *accumulate(len(piece) for piece in feed))
    tokens = torch.tensor([token for piece in feed for token in piece], device=base.device)
    positions = torch.cat(
        [torch.arange(n, n + len(piece)) for n, piece in zip(past, feed, strict=True)]
    ).to(base.device)
    return base.next_token_logits(tokens, positions, bounds, cache)


def answer(
    base: CausalLM,
    renderer: Renderer,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    route: ActiveAdapters | None = None,
) -> list[Completion]:
    """Answers as text, without their stop tokens."""
    stops = stop_token_ids(base) | renderer.stop_token_ids
    answers = []
    for tokens in generate_tokens(base, prompts, sampling, route, stops=stops):
        stopped = bool(tokens) and tokens[-1] in stops
        text = detokenize(base.tokenizer, tokens[:-1] if stopped else tokens, sampling.stop)
        answers.append(Completion(text.strip(), tokens, stopped))
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
    opened = load_run(settings.adapter, settings, adapter=not settings.disable_adapter)
    texts = [
        line
        for p in settings.prompts
        for line in (sys.stdin.read().splitlines() if p == "-" else [p])
        if line
    ]
    if isinstance(opened.base, Classifier) and opened.base.labels:
        return _label(opened.base, opened.active, texts, settings)
    base, route = opened.causal_lm, opened.active
    renderer = Renderer(
        base.tokenizer,
        "plain" if settings.ignore_chat_template else opened.template,
        base.max_positions,
    )
    sampling = SamplingParams(
        settings.max_new_tokens, settings.temperature, settings.top_p, seed=settings.seed
    )
    answers = answer(base, renderer, [renderer.prompt(text) for text in texts], sampling, route)
    return {
        "base": base.name,
        "adapter": str(settings.adapter) if route is not None else None,
        "answers": [
            {
                "prompt": prompt,
                "text": a.text,
                "tokens": len(a.token_ids),
                "stopped": a.ended_by_stop,
            }
            for prompt, a in zip(texts, answers, strict=True)
        ],
    }


@torch.no_grad()
def _label(
    base: Classifier,
    route: ActiveAdapters | None,
    prompts: Sequence[str],
    settings: GenerateSettings,
) -> dict[str, Any]:
    """The likeliest class of each text or picture, one at a time."""
    answers = []
    for prompt in prompts:
        content = prompt if base.images is None else read_picture(Path(prompt))
        with base.forward_context.use(NO_ADAPTERS if route is None else route.row_segments()):
            scores = base.logits(
                base.batch([encode_input(base, content, base.max_positions, prompt)])
            ).softmax(-1)[0]
        best = int(scores.argmax())
        answers.append({"prompt": prompt, "text": base.labels[best], "share": float(scores[best])})
    return {
        "base": base.name,
        "adapter": str(settings.adapter) if route is not None else None,
        "answers": answers,
    }
