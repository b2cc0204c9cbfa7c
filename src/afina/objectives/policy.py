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
from typing import Any

import torch
from torch import Tensor

from afina.adapters.active import ActiveAdapters
from afina.adapters.load_run import LoadedRun
from afina.adapters.segments import NO_ADAPTERS, Segments
from afina.data.packing import IGNORE_INDEX, PackedBatch, group_by_length, pack_examples
from afina.data.renderer import Example, Renderer
from afina.data.schemas import PROMPT
from afina.data.table import read_table
from afina.engine.request import Completion
from afina.errors import TrainingError
from afina.io.atomic import write_json
from afina.io.chat_format import ChatFormat
from afina.models.causal_lm import SCORE, CausalLM
from afina.objectives.base import Objective, Total, Units, no_reduce, train_sample
from afina.objectives.policy_data import (
    TokenizedPrompt,
    check_policy_settings,
    check_temperature,
    make_queries,
    split_prompts,
)
from afina.objectives.policy_generator import PolicyGenerator
from afina.objectives.policy_losses import (
    clipped_losses,
    gae,
    grpo_advantages,
    kl_estimate,
    rloo_advantages,
    whiten,
)
from afina.objectives.policy_report import policy_report
from afina.objectives.preference import MetricSums
from afina.objectives.prepared import (
    BATCH_TOKENS,
    PreparedData,
    activation_tokens,
    describe_data,
    eval_source,
    load_language_model,
    trained_settings,
)
from afina.objectives.reference import STORY
from afina.objectives.registry import register_objective
from afina.objectives.reward_functions import RewardFunctions, load_reward_functions
from afina.objectives.shared_prefix import SharedPrefixBatch
from afina.objectives.workload import StepWorkload, policy_workload
from afina.settings import (
    EvalSettings,
    GRPOSettings,
    PolicySettings,
    PPOSettings,
    TrainSettings,
)

SHOWN = 4  # answers kept at each check
ANSWERS = "completions"  # the folder of these


@dataclass(frozen=True, eq=False)
class RolloutBatch:
    """Prompts with their answers end to end, and of each token of the answers (n) what is learned from it.

    `asked` are the tokens (T) with the answers hidden: an activated adapter is switched on by the prompt, and by nothing that
    it says itself. `old` is None where the policy is the one that wrote.
    """

    flat: PackedBatch
    masked_token_ids: Tensor
    advantages: Tensor
    reference: Tensor
    old_logprobs: Tensor | None = None
    returns: Tensor | None = None

    def table(self, route: ActiveAdapters | None) -> Segments:
        """Who acts where."""
        return (
            NO_ADAPTERS
            if route is None
            else route.segments(self.masked_token_ids, self.flat.cu_seqlens)
        )


@dataclass
class Rollout:
    """The answers of a step, and facts about them."""

    step: int
    batches: list[RolloutBatch]
    facts: MetricSums = field(default_factory=MetricSums)


class PolicyObjective(Objective):
    """Policy gradients on completions that are sampled from the policy; see GRPO, RLOO and PPO."""

    schema = "prompt"
    units = Units("answer", "")
    needs_reference = True
    default_learning_rate_factor = 0.1
    shares_base = False
    supports_processes = False
    maximizes_reward = True
    report_key = "policy"
    base: CausalLM

    @classmethod
    def prepare(cls, settings: TrainSettings, base: CausalLM | None = None) -> PreparedData:
        """Read, tokenize, check and split the prompts; load the base, unless it is given."""
        options = settings.group(cls.name)
        check_policy_settings(settings, options)
        table = read_table(settings.data, PROMPT, settings.columns, settings.skip_bad_rows)
        base, own_tokens = load_language_model(settings, base)
        check_temperature(options, base)
        modules = (base.add_score_head(),) if cls.head else ()
        asked = ChatFormat.from_settings(settings)
        rewards = load_reward_functions(options, base, asked)
        length = min(settings.max_length or base.max_positions, base.max_positions)
        renderer = Renderer(base.tokenizer, asked, length)
        invocation = activation_tokens(renderer, settings)
        skipped = list(table.skipped)
        leave_out = skipped if settings.skip_bad_rows else None
        train, held = (
            make_queries(renderer, rows, leave_out, invocation, options.max_new_tokens, rewards)
            for rows in split_prompts(settings, table.rows, skipped)
        )
        longest = max(len(query.token_ids) for query in (*train, *held)) + options.max_new_tokens
        writer = PolicyGenerator(base, longest, renderer.stop_token_ids)
        packing = (settings.max_tokens_per_batch, settings.seed)
        return PreparedData(
            base=base,
            task=cls(options, base, train, held, rewards, writer, *packing),
            data_info=describe_data(table, len(held)),
            skipped=skipped,
            example=str(base.tokenizer.decode(train[0].token_ids)) + "«...»",
            eval_records=[query.row.record(rewards.needs_items) for query in held],
            invocation=invocation,
            modules_to_save=modules,
            trainable_tokens=own_tokens,
            max_length=renderer.max_length,
            counts={
                "train": len(train),
                "held_out": len(held),
                "tokens": sum(len(query.token_ids) for query in train),
                "longest": longest,
            },
            units=cls.units,
            reward_hash=rewards.content_hash,
        )

    @classmethod
    def from_run(cls, opened: LoadedRun, settings: EvalSettings) -> "PolicyObjective":
        """Return the objective with the prompts that `afina eval` evaluates."""
        base, trained = opened.causal_lm, trained_settings(opened.run)
        options, (file, columns) = trained.group(cls.name), eval_source(settings)
        renderer = Renderer(base.tokenizer, opened.chat_format, base.max_positions)
        rows = [
            TokenizedPrompt(row, renderer.prompt(row.prompt))
            for row in read_table(file, PROMPT, columns).rows
        ]
        rewards = load_reward_functions(options, base, opened.chat_format)
        longest = max(len(query.token_ids) for query in rows) + options.max_new_tokens
        writer = PolicyGenerator(base, longest, renderer.stop_token_ids)
        objective = cls(options, base, rows, rows, rewards, writer, BATCH_TOKENS, trained.seed)
        objective.num_rows = len(rows)
        return objective

    def __init__(
        self,
        options: PolicySettings,
        base: CausalLM,
        train: list[TokenizedPrompt],
        held: list[TokenizedPrompt],
        rewards: RewardFunctions,
        writer: PolicyGenerator,
        batch_tokens: int,
        seed: int,
    ) -> None:
        self.options, self.base, self.train, self.eval_rows = options, base, train, held
        self.rewards, self.writer = rewards, writer
        self._batch_tokens, self._seed = batch_tokens, seed
        self._prompts, self.group = (
            min(options.num_prompts, len(train)),
            options.num_generations,
        )
        self._drawn: Rollout | None = None
        self._step, self._check = MetricSums(), MetricSums()
        self._at = 0
        self._folder: Path | None = None
        self.seconds = {"writing": 0.0, "judging": 0.0}

    # ---- steps

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps on the same completions."""
        return self.options.num_iterations

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the prompts."""
        return -(-len(self.train) // self._prompts) * self.options.num_iterations

    def prompts_for_step(self, step: int) -> list[TokenizedPrompt]:
        """The prompts of a step: the next ones of endless passes over all, each shuffled by seed and number."""
        first = step // self.options.num_iterations * self._prompts
        chosen, orders = [], {}
        for place in range(first, first + self._prompts):
            epoch, at = divmod(place, len(self.train))
            if epoch not in orders:
                orders[epoch] = random.Random(f"{self._seed}:{epoch}").sample(
                    range(len(self.train)), len(self.train)
                )
            chosen.append(self.train[orders[epoch][at]])
        return chosen

    def row_locations(self, step: int) -> list[str]:
        """Names of the rows of an optimizer step."""
        return sorted({query.where for query in self.prompts_for_step(step)})

    def step_batches(self, step: int) -> list[RolloutBatch]:
        """The micro-batches of an optimizer step: answers of the policy as it is now, or of the step that drew them."""
        first = step - step % self.options.num_iterations
        if self._drawn is None or self._drawn.step != first:
            if step != first:
                why = f"step {step + 1} learns from answers that were drawn at step {first + 1}"
                raise TrainingError(
                    "these answers are gone", why=why, hint="start again with another --output-dir"
                )
            self._drawn = self._draw(self.prompts_for_step(step), first)
        facts = self._drawn.facts
        self._step, self._check, self._at = (
            MetricSums(dict(facts.sums), dict(facts.counts)),
            MetricSums(),
            step + 1,
        )
        return self._drawn.batches

    def collate(self, rows: Sequence[TokenizedPrompt], seed: int) -> RolloutBatch:
        """Some prompts with a group of answers each, in one batch."""
        return self._draw(rows, seed, 1 << 62).batches[0]

    def _draw(
        self, queries: Sequence[TokenizedPrompt], step: int, batch_tokens: int | None = None
    ) -> Rollout:
        """Answer, judge, and work out what is to be learned."""
        each = [query for query in queries for _ in range(self.group)]
        options = self.options
        written = self._write(
            each, self._seed_of(f"step {step}"), options.temperature, self.policy, f"step {step}"
        )
        examples = [_example(query, answer) for query, answer in zip(each, written, strict=True)]
        told = self._judge(each, examples)
        packed = group_by_length(
            [len(e.token_ids) for e in examples],
            batch_tokens or self._batch_tokens,
            range(len(examples)),
        )
        drawn = Rollout(
            step,
            self._learned(
                [[examples[i] for i in indices] for indices in packed], packed, told["reward"]
            ),
        )
        groups = told["reward"].view(-1, self.group)
        drawn.facts.add(
            told | _facts(written) | ({"reward_spread": groups.std(1)} if self.group > 1 else {})
        )
        return drawn

    @torch.no_grad()
    def _learned(
        self, parts: list[list[Example]], packed: list[list[int]], rewards: Tensor
    ) -> list[RolloutBatch]:
        """The batches, with the advantage of every token."""
        options, ppo = self.options, self.name == "ppo"
        batches, values = [], []
        for part in parts:
            batch = self._laid(part)
            old, value = (
                self.read(batch, self.policy, ppo) if self.needs_old_logprobs else (None, None)
            )
            batches.append(replace(batch, old_logprobs=old))
            values.append(value)
        tokens = [
            torch.tensor([sum(e.loss_mask) for e in part], device=self.base.device)
            for part in parts
        ]
        if ppo:
            made = self._estimates(batches, values, tokens, packed, rewards)
        else:
            made = self._compared(batches, tokens, packed, rewards)
        keep_old = options.num_iterations > 1
        return [batch if keep_old else replace(batch, old_logprobs=None) for batch in made]

    def _laid(self, part: Sequence[Example]) -> RolloutBatch:
        """Answers end to end with what the reference says of them; nothing to learn yet."""
        assert self.reference is not None
        hidden = [
            replace(
                e, token_ids=[*e.token_ids[: e.prompt_length], *[IGNORE_INDEX] * sum(e.loss_mask)]
            )
            for e in part
        ]
        flat, none = (
            pack_examples(part).to(self.base.device),
            torch.zeros(0, device=self.base.device),
        )
        batch = RolloutBatch(flat, pack_examples(hidden).token_ids.to(self.base.device), none, none)
        with torch.no_grad():
            return replace(batch, reference=self.read(batch, self.reference.active)[0])

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether the log-probabilities with which answers were written are needed before the loss."""
        return (
            self.options.num_iterations > 1
            or self.name == "ppo"
            or (self.name == "rloo" and self.options.beta > 0)
        )

    def _compared(
        self,
        batches: list[RolloutBatch],
        tokens: list[Tensor],
        packed: list[list[int]],
        rewards: Tensor,
    ) -> list[RolloutBatch]:
        """grpo, rloo: an advantage for each answer, the same for all of its tokens."""
        rewards = rewards.clone()
        if self.name == "rloo" and self.options.beta:
            for batch, counts, indices in zip(batches, tokens, packed, strict=True):
                assert batch.old_logprobs is not None
                drift = [
                    part.double().sum().cpu()
                    for part in (batch.old_logprobs - batch.reference).split(counts.tolist())
                ]
                rewards[indices] -= self.options.beta * torch.stack(drift)
        groups = rewards.view(-1, self.group)
        found = (
            grpo_advantages(groups, self.options.scale_rewards)
            if isinstance(self.options, GRPOSettings)
            else rloo_advantages(groups)
        )
        flat = found.flatten().float().to(self.base.device)
        return [
            replace(batch, advantages=flat[indices].repeat_interleave(counts))
            for batch, counts, indices in zip(batches, tokens, packed, strict=True)
        ]

    def _estimates(
        self,
        batches: list[RolloutBatch],
        values: Sequence[Tensor | None],
        tokens: list[Tensor],
        packed: list[list[int]],
        rewards: Tensor,
    ) -> list[RolloutBatch]:
        """ppo: an advantage for each token, and what its value should have been."""
        options, made = self.options, []
        assert isinstance(options, PPOSettings)
        for batch, value, counts, indices in zip(batches, values, tokens, packed, strict=True):
            assert batch.old_logprobs is not None
            assert value is not None
            each = -options.beta * (batch.old_logprobs - batch.reference)
            each[counts.cumsum(0) - 1] += rewards[indices].float().to(each.device)
            answers = zip(each.split(counts.tolist()), value.split(counts.tolist()), strict=True)
            found = torch.cat([gae(r, v, options.gamma, options.lam) for r, v in answers])
            made.append(replace(batch, advantages=found, returns=found + value))
        if not options.whiten_advantages:
            return made
        even = whiten(torch.cat([batch.advantages for batch in made])).split(
            [len(batch.advantages) for batch in made]
        )
        return [
            replace(batch, advantages=advantages)
            for batch, advantages in zip(made, even, strict=True)
        ]

    def step_workload(self) -> StepWorkload:
        """Return the sizes of an epoch's passes and of the generation before them."""
        return policy_workload(self, self._batch_tokens)

    def num_targets(self, batch: RolloutBatch) -> int:
        """Tokens of the answers."""
        return batch.flat.num_targets

    def num_tokens(self, batch: RolloutBatch) -> int:
        """Tokens."""
        return len(batch.flat.token_ids)

    def read(
        self, batch: RolloutBatch, route: ActiveAdapters | None, value: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probability of each token of the answers (n) at the policy's temperature, and, if asked for, its value (n)."""
        base, flat = self.base, batch.flat
        table = batch.table(route)
        lean = SharedPrefixBatch(base, flat, table).inputs_for(table)
        places = (lean.labels >= 0).nonzero()[:, 0]
        with base.forward_context.use(lean.table):
            if not base.has_hidden_states:
                return -base.token_losses(
                    lean.token_ids, lean.positions, lean.flat, lean.labels
                ), None
            hidden = base.hidden_states(lean.token_ids, lean.positions, lean.flat)[places]
            warm = hidden if self.options.temperature == 1.0 else hidden / self.options.temperature
            logps = -base.token_losses_from_hidden(warm, lean.labels[places], places)
        if not value or not route:
            return logps, None
        with base.forward_context.use(
            route.always_on().segments(flat.token_ids, flat.cu_seqlens)
        ):  # the head comes after any invocation
            return logps, base.model.get_submodule(SCORE)(hidden.float())[:, 0]

    def loss(self, batch: RolloutBatch, route: ActiveAdapters | None) -> Tensor:
        """Sum of the losses of the tokens of the answers; what is trained on is noted."""
        options = self.options
        logps, values = self.read(batch, route, batch.returns is not None)
        old = logps.detach() if batch.old_logprobs is None else batch.old_logprobs
        losses, clipped = clipped_losses(logps, old, batch.advantages, options.clip_range)
        apart = kl_estimate(logps, batch.reference)
        facts = {"kl": apart.detach(), "clipped": clipped.float(), "entropy": -old}
        if self.name == "grpo" and options.beta:
            losses = losses + options.beta * apart
        if isinstance(options, PPOSettings) and values is not None and batch.returns is not None:
            errors = (values - batch.returns).square()
            facts["value_error"] = errors.detach()
            losses = losses + options.vf_coef * errors / 2
        if torch.is_grad_enabled():
            self._step.add(facts)
        return losses.sum()

    # ---- judging

    def eval_completions(
        self,
        rows: Sequence[TokenizedPrompt],
        route: ActiveAdapters | None,
        temperature: float = 0.0,
    ) -> tuple[list[Completion], list[Example], dict[str, Tensor]]:
        """An answer to each prompt, the likeliest tokens or sampled; as tokens; and its reward with the parts of it."""
        written = self._write(
            rows, self._seed_of("judged"), temperature, route, f"judged {self._at} {route}"
        )
        examples = [_example(query, answer) for query, answer in zip(rows, written, strict=True)]
        return written, examples, self._judge(rows, examples)

    @torch.no_grad()
    def sampled_metrics(self, route: ActiveAdapters | None) -> dict[str, float]:
        """On sampled answers to the held-out prompts: KL divergence from the reference, entropy (nats a token), reward."""
        written, examples, told = self.eval_completions(
            self.eval_rows, route, self.options.temperature
        )
        tally = MetricSums()
        tally.add(told | _facts(written))
        for indices in group_by_length(
            [len(e.token_ids) for e in examples], self._batch_tokens, range(len(examples))
        ):
            batch = self._laid([examples[i] for i in indices])
            logps = self.read(batch, route)[0]
            tally.add({"kl": kl_estimate(logps, batch.reference), "entropy": -logps})
        return tally.means()

    def eval_loss(self, route: ActiveAdapters | None) -> float:
        """Minus the mean reward of the likeliest answers to the held-out prompts; facts are noted, some answers kept."""
        self._check = MetricSums()
        written, _, told = self.eval_completions(self.eval_rows, route)
        self._check.add(told | _facts(written))
        if self._folder is not None and route and route == self.policy:
            shown = zip(self.eval_rows[:SHOWN], written, told["reward"].tolist(), strict=False)
            lines = [
                {"prompt": query.row.prompt, "answer": answer.text, "reward": reward}
                for query, answer, reward in shown
            ]
            write_json(self._folder / f"{self._at:06d}.json", {"step": self._at, "answers": lines})
        return -float(told["reward"].mean())

    def train_loss(self, route: ActiveAdapters | None) -> float:
        """The same over as many of the prompts that are learned from."""
        return -float(self.eval_completions(train_sample(self), route)[2]["reward"].mean())

    def metrics(self, total: Total = no_reduce) -> dict[str, float]:
        """Means over the answers of the last step, and, after a check, over those to the held-out prompts."""
        return self._step.added_up(total).means() | {
            f"eval_{name}": value for name, value in self._check.means().items()
        }

    def start_run(self, folder: Path) -> None:
        """Write down the reference of a run, and where its answers are kept."""
        assert self.reference is not None
        write_json(folder / STORY, self.reference.to_dict())
        (folder / ANSWERS).mkdir(exist_ok=True)
        self._folder = folder / ANSWERS

    def _seed_of(self, what: str) -> int:
        return int(hashlib.sha256(f"{self._seed}: {what}".encode()).hexdigest()[:12], 16)

    def _write(
        self,
        rows: Sequence[TokenizedPrompt],
        seed: int,
        temperature: float,
        route: ActiveAdapters | None,
        run: str,
    ) -> list[Completion]:
        begin, prompts = time.perf_counter(), [query.token_ids for query in rows]
        written = self.writer.generate(
            prompts, seed, self.options.max_new_tokens, temperature, route, run
        )
        self.seconds["writing"] += time.perf_counter() - begin
        return written

    def _judge(
        self, rows: Sequence[TokenizedPrompt], examples: Sequence[Example]
    ) -> dict[str, Tensor]:
        begin = time.perf_counter()
        told = self.rewards.score([query.row for query in rows], examples, self._batch_tokens)
        self.seconds["judging"] += time.perf_counter() - begin
        return told

    def evaluate(self, route: ActiveAdapters | None) -> dict[str, Any]:
        """Return metrics of greedy completions of the eval prompts, and of sampled ones.

        `kl` and `entropy` (nats per token) are those of sampled completions; `completions` are the
        greedy ones with their rewards.
        """
        written, _, scores = self.eval_completions(self.eval_rows, route)
        sampled = self.sampled_metrics(route)
        rewards = scores["reward"]
        return {name: float(values.mean()) for name, values in scores.items()} | {
            "loss": -float(rewards.mean()),
            "length": sum(len(answer.token_ids) for answer in written) / len(written),
            "stopped": sum(answer.ended_by_stop for answer in written) / len(written),
            "sampled_reward": sampled["reward"],
            "sampled_length": sampled["length"],
            "kl": sampled["kl"],
            "entropy": sampled["entropy"],
            "completions": [
                (answer.text, reward)
                for answer, reward in zip(written, rewards.tolist(), strict=True)
            ],
        }

    def report(self, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
        """Compare two results of `evaluate`: rewards, win rate, divergence, some completions."""
        return policy_report(self, before, after)

    def run_facts(self) -> dict[str, Any]:
        """Return the seconds that generating and scoring took in this process."""
        return {"seconds_here": self.seconds}

    def profile_prompts(self) -> list[list[int]]:
        """Return the training prompts."""
        return [query.token_ids for query in self.train]


@register_objective("grpo")
class GRPOObjective(PolicyObjective):
    """Group-relative policy optimization: a completion against the others of its prompt."""


@register_objective("rloo")
class RLOOObjective(PolicyObjective):
    """REINFORCE with the mean of the other completions of a prompt as the baseline."""


@register_objective("ppo")
class PPOObjective(PolicyObjective):
    """Proximal policy optimization, with a value head that is not saved."""

    head = SCORE
    saves_head = False


def _example(query: TokenizedPrompt, answer: Completion) -> Example:
    labels = [False] * len(query.token_ids) + [True] * len(answer.token_ids)
    return Example(
        query.where,
        [*query.token_ids, *answer.token_ids],
        labels,
        len(query.token_ids),
        answer.text,
    )


def _facts(written: Sequence[Completion]) -> dict[str, Any]:
    return {
        "length": torch.tensor([float(len(answer.token_ids)) for answer in written]),
        "stopped": torch.tensor([float(answer.ended_by_stop) for answer in written]),
    }
