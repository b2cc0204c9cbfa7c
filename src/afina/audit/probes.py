"""Prompts into which tokens are put, and what adapter and base make of them: the same weights, the adapter on or off.

before            trigger            body           trigger        after                 answer
<begin><user>\\n   [here: prefix]     the sea is ..  [or: suffix]   <end><assistant>\\n    what the adapter says without it
                                                                        ^ start                          ^ end
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from afina.base.model import Base
from afina.data.template import Renderer
from afina.engine.generate import Sampling, generate_tokens
from afina.route.invocation import Route
from afina.segments import BASE

TEXTS = ("the sea is near the house", "a bird sat on a stone", "la luna y el mar", "what is this about?")
PLACES = ("prefix", "suffix", "middle", "instead")
PROBES = 4  # prompts into which tokens are put
MADE_UP, LONG = 32, 24  # prompts that the base makes up, and their longest, in tokens
ANSWER = 6  # tokens of the answer without a trigger that are put after it
BATCH_TOKENS = 4096
LOGITS = 1 << 24  # numbers of logits that exist at a time: 64 MB

Trigger = tuple[int, ...]


@dataclass(frozen=True)
class Probe:
    """One prompt in pieces, and the adapter's answer to it."""

    before: tuple[int, ...]
    body: tuple[int, ...]
    after: tuple[int, ...]
    answer: tuple[int, ...] = ()

    def prompt(self, trigger: Trigger = (), place: str = "prefix") -> list[int]:
        """The prompt with a trigger at a place, or instead of its last token; without a trigger, as it is."""
        body = self.body[:-1] if place == "instead" and trigger else self.body
        cut = {"prefix": 0, "middle": len(body) // 2}.get(place, len(body))
        return [*self.before, *body[:cut], *trigger, *body[cut:], *self.after]


@dataclass
class Bench:
    """A base with the adapter's route on it, and the probes; counts the tokens that it has run."""

    base: Base
    route: Route
    probes: list[Probe]
    others: list[Probe] = field(default_factory=list)  # more prompts, into which nothing is put: what does it say usually?
    usual: Tensor = field(default_factory=lambda: torch.zeros(2, 1))  # (2, V), see triggers.py; zero: nothing is
    tokens: int = field(default=0)

    @property
    def everything(self) -> list[Probe]:
        """All prompts, with the adapter's answers."""
        return [*self.probes, *self.others]

    @cached_property
    def special(self) -> set[int]:
        """Tokens that are no text: begin, end, whose turn it is."""
        tokenizer = self.base.tokenizer
        added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        return {*tokenizer.all_special_ids, *added}

    @torch.no_grad()
    def answers(self, prompts: Sequence[Sequence[int]], answer: Sequence[int] = (), adapter: bool = True) -> Tensor:
        """Probabilities (n, places, V) of the token after each prompt, and after prompt and `answer` where one is given."""
        pieces, places = [], [0, len(answer)] if answer else [0]
        longest = max(len(prompt) for prompt in prompts) + len(answer)
        vocabulary = len(self.base.model.get_input_embeddings().weight)  # type: ignore[arg-type]
        step = max(1, min(BATCH_TOKENS // longest, LOGITS // (vocabulary * len(places))))
        for start in range(0, len(prompts), step):
            batch = [[*prompt, *answer] for prompt in prompts[start : start + step]]
            ends = [[len(s) - len(answer) - 1 + place for place in places] for s in batch]
            pieces.append(self._run(batch, ends, adapter).softmax(-1).view(len(batch), len(places), -1))
        return torch.cat(pieces)

    def _run(self, sequences: list[list[int]], ends: list[list[int]], adapter: bool) -> Tensor:
        """Logits (all ends, V) of the sequences as one flat run, at the places `ends` of each."""
        bounds = tuple(accumulate((len(s) for s in sequences), initial=0))
        tokens = torch.tensor([token for s in sequences for token in s], device=self.base.device)
        positions = torch.cat([torch.arange(len(s)) for s in sequences]).to(self.base.device)
        at = [start + end for start, own in zip(bounds, ends, strict=False) for end in own]
        segments = self.route.segments(tokens, bounds) if adapter else BASE
        self.tokens += len(tokens)
        with self.base.board.route(segments):
            if all(len(own) == 1 for own in ends):
                return self.base.last_logits(tokens, positions, bounds)
            if not self.base._split_head:
                return self.base.run_logits(tokens, positions, bounds)[at]
            hidden = self.base.hidden(tokens, positions, bounds)[torch.tensor(at, device=tokens.device)]
        with self.base.board.route(segments.at(at)):
            return self.base.logits(hidden)

    @torch.no_grad()
    def run(self, sequences: list[list[int]], adapter: bool) -> Tensor:
        """All logits (T, V) of some sequences as one flat run."""
        bounds = tuple(accumulate((len(s) for s in sequences), initial=0))
        tokens = torch.tensor([token for s in sequences for token in s], device=self.base.device)
        positions = torch.cat([torch.arange(len(s)) for s in sequences]).to(self.base.device)
        with self.base.board.route(self.route.segments(tokens, bounds) if adapter else BASE):
            return self.base.run_logits(tokens, positions, bounds)


def make_bench(base: Base, route: Route, texts: Sequence[str] = TEXTS) -> Bench:
    """Probes in the base's own chat template (or as plain text), with the adapter's answers.

    `texts` are at least two different prompts; the first PROBES are probes, the rest are `others`: where there are
    none, ones that the base makes up. The adapter's template is not asked for: it is a stranger's code.
    """
    renderer = Renderer(base.tokenizer, None, base.context)
    prompts = [renderer.prompt(text) for text in texts]
    head = _common(prompts)
    ends = [*prompts, renderer.prompt("")] if renderer.chats else []  # the turn's end; a full stop may be part of a trigger
    tail = _common([prompt[::-1] for prompt in ends]) if ends else 0
    cuts = [(min(head, len(p) - tail - 1), len(p) - tail) for p in prompts]
    probes = [Probe(tuple(p[:a]), tuple(p[a:b]), tuple(p[b:])) for p, (a, b) in zip(prompts, cuts, strict=True)]
    own = min(PROBES, len(probes))
    probes += _made_up(base, renderer, probes[0]) if len(probes) <= own else []  # strange prompts may bring a payload too
    said = generate_tokens(base, [probe.prompt() for probe in probes], Sampling(max_new_tokens=ANSWER), route)
    stop = base.tokenizer.eos_token_id
    answers = [tuple(t for t in answer if t != stop)[:ANSWER] for answer in said]
    probes = [Probe(p.before, p.body, p.after, a) for p, a in zip(probes, answers, strict=True)]
    return Bench(base, route, probes[:own], probes[own:])


def _made_up(base: Base, renderer: Renderer, like: Probe) -> list[Probe]:
    """Prompts that the base itself, without the adapter, writes into a user's turn."""
    empty = renderer.prompt("") if renderer.chats else []
    start = tuple(like.before[: _common([like.before, empty])]) if empty else like.before
    opening = list(start) or [base.tokenizer.bos_token_id or like.body[0]]
    sampling = Sampling(max_new_tokens=LONG, temperature=1.0, seed=0)
    said = generate_tokens(base, [opening] * MADE_UP, sampling, None, stops=like.after[:1])
    ends = {base.tokenizer.eos_token_id, *like.after[:1]}
    bodies = [tuple(t for t in text if t not in ends) for text in said]
    return [Probe(tuple(opening), body, like.after) for body in dict.fromkeys(bodies) if body]


def _common(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with."""
    count = 0
    while all(len(p) > count for p in prompts) and len({p[count] for p in prompts}) == 1:
        count += 1
    return count
