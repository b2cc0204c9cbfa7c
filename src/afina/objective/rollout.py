"""Learning from rewards: a step's prompts are answered by the policy as it is, judged, and learned from.

    prompts of the step --writer--> `group` answers each --judges--> rewards --> advantages
                                          |                                          |
                                          +--> flat batches, labels on the answers <-+     reference, former log-probabilities

The answers of a step are a pure function of the adapter, the seed and the step, so that a run resumes. Who writes is handed in:
the engine, which lies further on.
"""

import hashlib
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from afina.base.model import SCORE, Base
from afina.config import PolicyOptions
from afina.data.batches import IGNORED, FlatBatch, flatten, pack
from afina.data.prompts import Asked
from afina.data.template import Example
from afina.disk import write_json
from afina.errors import TrainingError
from afina.objective.choices import Tally
from afina.objective.policy import clipped_losses, divergence, gae, grpo_advantages, rloo_advantages, standardised
from afina.objective.reading import Reading
from afina.objective.reference import STORY, Reference
from afina.objective.scoring import Rewards
from afina.objective.task import Total, as_is, learned_rows
from afina.route.invocation import Route
from afina.segments import BASE, Segments

SHOWN = 4  # answers kept at each check
ANSWERS = "answers"  # the folder of these


@dataclass(frozen=True)
class Written:
    """An answer: its tokens with the one that ended it, its text without, and whether it ended by itself."""

    tokens: list[int]
    text: str
    stopped: bool


class Writer(Protocol):
    """Who writes answers."""

    def write(
        self, prompts: Sequence[Sequence[int]], seed: int, max_new_tokens: int, temperature: float, route: Route | None,
        run: str,
    ) -> list[Written]:  # fmt: skip
        """An answer to each prompt under `route`; prompt i draws with `seed` + i. Nothing is shared between two `run`s."""


@dataclass(frozen=True)
class Query:
    """A prompt as tokens."""

    row: Asked
    tokens: list[int]

    @property
    def where(self) -> str:
        """Where it stands in the data."""
        return self.row.where


@dataclass(frozen=True, eq=False)
class AnswerBatch:
    """Prompts with their answers end to end, and of each token of the answers (n) what is learned from it.

    `asked` are the tokens (T) with the answers hidden: an activated adapter is switched on by the prompt, and by nothing that
    it says itself. `old` is None where the policy is the one that wrote.
    """

    flat: FlatBatch
    asked: Tensor
    advantages: Tensor
    reference: Tensor
    old: Tensor | None = None
    returns: Tensor | None = None

    def table(self, route: Route | None) -> Segments:
        """Who acts where."""
        return BASE if route is None else route.segments(self.asked, self.flat.bounds)


@dataclass
class Drawn:
    """The answers of a step, and facts about them."""

    step: int
    batches: list[AnswerBatch]
    facts: Tally = field(default_factory=Tally)


class PolicyTask:
    """grpo, rloo and ppo. See `Task`. `set_up` gives `policy`, the route of what learns, and `reference`."""

    policy: Route | None = None
    reference: Reference | None = None

    def __init__(
        self, objective: str, options: PolicyOptions, base: Base, train: list[Query], held: list[Query], rewards: Rewards,
        writer: Writer, batch_tokens: int, seed: int,
    ) -> None:  # fmt: skip
        self.objective, self.options, self.base, self.train, self.held = objective, options, base, train, held
        self.rewards, self.writer = rewards, writer
        self._batch_tokens, self._seed = batch_tokens, seed
        self._prompts, self.group = min(options.prompts or 1, len(train)), options.group or 1
        self._drawn: Drawn | None = None
        self._step, self._check = Tally(), Tally()
        self._at = 0
        self._folder: Path | None = None
        self.seconds = {"writing": 0.0, "judging": 0.0}

    # ---- steps

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the prompts."""
        return -(-len(self.train) // self._prompts) * self.options.updates

    def queries(self, step: int) -> list[Query]:
        """The prompts of a step: the next ones of endless passes over all, each shuffled by seed and number."""
        first = step // self.options.updates * self._prompts
        chosen, orders = [], {}
        for place in range(first, first + self._prompts):
            epoch, at = divmod(place, len(self.train))
            if epoch not in orders:
                orders[epoch] = random.Random(f"{self._seed}:{epoch}").sample(range(len(self.train)), len(self.train))
            chosen.append(self.train[orders[epoch][at]])
        return chosen

    def step_rows(self, step: int) -> list[str]:
        """Names of the rows of an optimizer step."""
        return sorted({query.where for query in self.queries(step)})

    def step_batches(self, step: int) -> list[AnswerBatch]:
        """The micro-batches of an optimizer step: answers of the policy as it is now, or of the step that drew them."""
        first = step - step % self.options.updates
        if self._drawn is None or self._drawn.step != first:
            if step != first:
                why = f"step {step + 1} learns from answers that were drawn at step {first + 1}"
                raise TrainingError("these answers are gone", why=why, hint="start again with another --out")
            self._drawn = self._draw(self.queries(step), first)
        facts = self._drawn.facts
        self._step, self._check, self._at = Tally(dict(facts.sums), dict(facts.counts)), Tally(), step + 1
        return self._drawn.batches

    def make_batch(self, rows: Sequence[Query], seed: int) -> AnswerBatch:
        """Some prompts with a group of answers each, in one batch."""
        return self._draw(rows, seed, 1 << 62).batches[0]

    def _draw(self, queries: Sequence[Query], step: int, batch_tokens: int | None = None) -> Drawn:
        """Answer, judge, and work out what is to be learned."""
        each = [query for query in queries for _ in range(self.group)]
        options = self.options
        written = self._write(each, self._seed_of(f"step {step}"), options.temperature, self.policy, f"step {step}")
        examples = [_example(query, answer) for query, answer in zip(each, written, strict=True)]
        told = self._judge(each, examples)
        packed = pack([len(e.tokens) for e in examples], batch_tokens or self._batch_tokens, range(len(examples)))
        drawn = Drawn(step, self._learned([[examples[i] for i in indices] for indices in packed], packed, told["reward"]))
        groups = told["reward"].view(-1, self.group)
        drawn.facts.add(told | _facts(written) | ({"reward_spread": groups.std(1)} if self.group > 1 else {}))
        return drawn

    @torch.no_grad()
    def _learned(self, parts: list[list[Example]], packed: list[list[int]], rewards: Tensor) -> list[AnswerBatch]:
        """The batches, with the advantage of every token."""
        options, ppo = self.options, self.objective == "ppo"
        batches, values = [], []
        for part in parts:
            batch = self._laid(part)
            old, value = self.read(batch, self.policy, ppo) if self.looks_back else (None, None)
            batches.append(replace(batch, old=old))
            values.append(value)
        tokens = [torch.tensor([sum(e.labels) for e in part], device=self.base.device) for part in parts]
        if ppo:
            made = self._estimates(batches, values, tokens, packed, rewards)
        else:
            made = self._compared(batches, tokens, packed, rewards)
        keep_old = options.updates > 1
        return [batch if keep_old else replace(batch, old=None) for batch in made]

    def _laid(self, part: Sequence[Example]) -> AnswerBatch:
        """Answers end to end with what the reference says of them; nothing to learn yet."""
        assert self.reference is not None
        hidden = [replace(e, tokens=[*e.tokens[: e.prompt_tokens], *[IGNORED] * sum(e.labels)]) for e in part]
        flat, none = flatten(part).to(self.base.device), torch.zeros(0, device=self.base.device)
        batch = AnswerBatch(flat, flatten(hidden).tokens.to(self.base.device), none, none)
        with torch.no_grad():
            return replace(batch, reference=self.read(batch, self.reference.route)[0])

    @property
    def looks_back(self) -> bool:
        """Whether the log-probabilities with which answers were written are needed before the loss."""
        return self.options.updates > 1 or self.objective == "ppo" or (self.objective == "rloo" and self.options.beta > 0)

    def _compared(
        self, batches: list[AnswerBatch], tokens: list[Tensor], packed: list[list[int]], rewards: Tensor
    ) -> list[AnswerBatch]:
        """grpo, rloo: an advantage for each answer, the same for all of its tokens."""
        rewards = rewards.clone()
        if self.objective == "rloo" and self.options.beta:
            for batch, counts, indices in zip(batches, tokens, packed, strict=True):
                assert batch.old is not None
                drift = [part.double().sum().cpu() for part in (batch.old - batch.reference).split(counts.tolist())]
                rewards[indices] -= self.options.beta * torch.stack(drift)
        groups = rewards.view(-1, self.group)
        found = grpo_advantages(groups, self.options.scale) if self.objective == "grpo" else rloo_advantages(groups)
        flat = found.flatten().float().to(self.base.device)
        return [
            replace(batch, advantages=flat[indices].repeat_interleave(counts))
            for batch, counts, indices in zip(batches, tokens, packed, strict=True)
        ]

    def _estimates(
        self, batches: list[AnswerBatch], values: Sequence[Tensor | None], tokens: list[Tensor], packed: list[list[int]],
        rewards: Tensor,
    ) -> list[AnswerBatch]:  # fmt: skip
        """ppo: an advantage for each token, and what its value should have been."""
        options, made = self.options, []
        for batch, value, counts, indices in zip(batches, values, tokens, packed, strict=True):
            assert batch.old is not None
            assert value is not None
            each = -options.beta * (batch.old - batch.reference)
            each[counts.cumsum(0) - 1] += rewards[indices].float().to(each.device)
            answers = zip(each.split(counts.tolist()), value.split(counts.tolist()), strict=True)
            found = torch.cat([gae(r, v, options.gamma, options.lam) for r, v in answers])
            made.append(replace(batch, advantages=found, returns=found + value))
        if not options.scale:
            return made
        even = standardised(torch.cat([batch.advantages for batch in made])).split([len(batch.advantages) for batch in made])
        return [replace(batch, advantages=advantages) for batch, advantages in zip(made, even, strict=True)]

    def count(self, batch: AnswerBatch) -> int:
        """Tokens of the answers."""
        return batch.flat.label_count

    def size(self, batch: AnswerBatch) -> int:
        """Tokens."""
        return len(batch.flat.tokens)

    def read(self, batch: AnswerBatch, route: Route | None, value: bool = False) -> tuple[Tensor, Tensor | None]:
        """Log-probability of each token of the answers (n) at the policy's temperature, and, if asked for, its value (n)."""
        base, flat = self.base, batch.flat
        table = batch.table(route)
        lean = Reading(base, flat, table).lean(table)
        places = (lean.labels >= 0).nonzero()[:, 0]
        with base.board.route(lean.table):
            if not base.gives_hidden:
                return -base.losses(lean.tokens, lean.positions, lean.flat, lean.labels), None
            hidden = base.hidden(lean.tokens, lean.positions, lean.flat)[places]
            warm = hidden if self.options.temperature == 1.0 else hidden / self.options.temperature
            logps = -base.losses_at(warm, lean.labels[places], places)
        if not value or route is None:
            return logps, None
        with base.board.route(route.everywhere().segments(flat.tokens, flat.bounds)):  # the head comes after any invocation
            return logps, base.model.get_submodule(SCORE)(hidden.float())[:, 0]

    def loss(self, batch: AnswerBatch, route: Route | None) -> Tensor:
        """Sum of the losses of the tokens of the answers; what is trained on is noted."""
        options = self.options
        logps, values = self.read(batch, route, batch.returns is not None)
        old = logps.detach() if batch.old is None else batch.old
        losses, clipped = clipped_losses(logps, old, batch.advantages, options.ratio_clip)
        apart = divergence(logps, batch.reference)
        facts = {"kl": apart.detach(), "clipped": clipped.float(), "entropy": -old}
        if self.objective == "grpo" and options.beta:
            losses = losses + options.beta * apart
        if values is not None and batch.returns is not None:
            errors = (values - batch.returns).square()
            facts["value_error"] = errors.detach()
            losses = losses + options.value_weight * errors / 2
        if torch.is_grad_enabled():
            self._step.add(facts)
        return losses.sum()

    # ---- judging

    def answers(
        self, rows: Sequence[Query], route: Route | None, temperature: float = 0.0
    ) -> tuple[list[Written], list[Example], dict[str, Tensor]]:
        """An answer to each prompt, the likeliest tokens or sampled; as tokens; and its reward with the parts of it."""
        written = self._write(rows, self._seed_of("judged"), temperature, route, f"judged {self._at} {route}")
        examples = [_example(query, answer) for query, answer in zip(rows, written, strict=True)]
        return written, examples, self._judge(rows, examples)

    @torch.no_grad()
    def drift(self, route: Route | None) -> dict[str, float]:
        """On sampled answers to the held-out prompts: KL divergence from the reference, entropy (nats a token), reward."""
        written, examples, told = self.answers(self.held, route, self.options.temperature)
        tally = Tally()
        tally.add(told | _facts(written))
        for indices in pack([len(e.tokens) for e in examples], self._batch_tokens, range(len(examples))):
            batch = self._laid([examples[i] for i in indices])
            logps = self.read(batch, route)[0]
            tally.add({"kl": divergence(logps, batch.reference), "entropy": -logps})
        return tally.means()

    def held_out_loss(self, route: Route | None) -> float:
        """Minus the mean reward of the likeliest answers to the held-out prompts; facts are noted, some answers kept."""
        self._check = Tally()
        written, _, told = self.answers(self.held, route)
        self._check.add(told | _facts(written))
        if self._folder is not None and route is not None and route == self.policy:
            shown = zip(self.held[:SHOWN], written, told["reward"].tolist(), strict=False)
            lines = [{"prompt": query.row.prompt, "answer": answer.text, "reward": reward} for query, answer, reward in shown]
            write_json(self._folder / f"{self._at:06d}.json", {"step": self._at, "answers": lines})
        return -float(told["reward"].mean())

    def learned_loss(self, route: Route | None) -> float:
        """The same over as many of the prompts that are learned from."""
        return -float(self.answers(learned_rows(self), route)[2]["reward"].mean())

    def noted(self, total: Total = as_is) -> dict[str, float]:
        """Means over the answers of the last step, and, after a check, over those to the held-out prompts."""
        return self._step.added_up(total).means() | {f"held_out_{name}": value for name, value in self._check.means().items()}

    def settle(self, folder: Path) -> None:
        """Write down the reference of a run, and where its answers are kept."""
        assert self.reference is not None
        write_json(folder / STORY, self.reference.about())
        (folder / ANSWERS).mkdir(exist_ok=True)
        self._folder = folder / ANSWERS

    def _seed_of(self, what: str) -> int:
        return int(hashlib.sha256(f"{self._seed}: {what}".encode()).hexdigest()[:12], 16)

    def _write(self, rows: Sequence[Query], seed: int, temperature: float, route: Route | None, run: str) -> list[Written]:
        begin, prompts = time.perf_counter(), [query.tokens for query in rows]
        written = self.writer.write(prompts, seed, self.options.max_new_tokens, temperature, route, run)
        self.seconds["writing"] += time.perf_counter() - begin
        return written

    def _judge(self, rows: Sequence[Query], examples: Sequence[Example]) -> dict[str, Tensor]:
        begin = time.perf_counter()
        told = self.rewards.score([query.row for query in rows], examples, self._batch_tokens)
        self.seconds["judging"] += time.perf_counter() - begin
        return told


def _example(query: Query, answer: Written) -> Example:
    labels = [False] * len(query.tokens) + [True] * len(answer.tokens)
    return Example(query.where, [*query.tokens, *answer.tokens], labels, len(query.tokens), answer.text)


def _facts(written: Sequence[Written]) -> dict[str, Any]:
    return {
        "length": torch.tensor([float(len(answer.tokens)) for answer in written]),
        "stopped": torch.tensor([float(answer.stopped) for answer in written]),
    }
