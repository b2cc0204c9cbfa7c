"""Objectives that maximize a reward: the policy completes prompts, and learns from the rewards.

    prompts of a step --policy--> `group` completions each --scorers--> rewards --> advantages
                                                |                                       |
                       reference, old log-probabilities --> packed batches <------------+

The completions of a step are a pure function of the adapter, the seed and the step, so that a run
resumes. How rewards become advantages is up to the subclasses, see `policy_gradients`.
"""

import hashlib
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afina.adapters.active import ActiveAdapters
from afina.adapters.load_run import LoadedRun
from afina.data.packing import batches_by_length
from afina.data.renderer import Example, Renderer
from afina.data.schemas import PROMPT
from afina.data.several_files import mix_rows
from afina.data.table import read_table
from afina.engine.request import Completion
from afina.errors import TrainingError
from afina.io.atomic import write_json
from afina.io.chat_format import ChatFormat
from afina.models.causal_lm import SCORE, CausalLM
from afina.objectives.base import Objective, Total, Units, no_reduce, train_sample
from afina.objectives.metric_sums import MetricSums, report_metrics
from afina.objectives.policy_data import (
    TokenizedPrompt,
    check_policy_settings,
    check_temperature,
    make_queries,
    split_prompts,
)
from afina.objectives.policy_generator import PolicyGenerator
from afina.objectives.policy_losses import clipped_losses, kl_estimate
from afina.objectives.policy_report import policy_report, save_completions
from afina.objectives.prepared import (
    BATCH_TOKENS,
    Preparation,
    PreparedData,
    ShownExample,
    eval_source,
    trained_settings,
)
from afina.objectives.reference import REFERENCE_FILE
from afina.objectives.reward_functions import RewardFunctions, load_reward_functions
from afina.objectives.rollout import Rollout, RolloutBatch, completion_metrics, to_example
from afina.objectives.run_rows import read_files
from afina.objectives.shared_prefix import SharedPrefixBatch
from afina.objectives.workload import StepWorkload, policy_workload
from afina.settings import EvalSettings, PolicySettings, TrainSettings

COMPLETIONS_DIR = "completions"  # of a run


class PolicyObjective(Objective):
    """Policy gradients on completions that are sampled from the policy; see GRPO, RLOO and PPO."""

    schema = "prompt"
    units = Units("answer", "")
    needs_reference = True
    default_learning_rate_factor = 0.1
    min_default_steps = 1  # answers are sampled in each: a step takes minutes
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
        table = read_files(settings, PROMPT)
        prep = Preparation.start(settings, base, cls.head, default_length=sys.maxsize)
        prep.renderer.max_length = min(prep.renderer.max_length, prep.base.max_positions)
        check_temperature(options, prep.base)
        rewards = load_reward_functions(options, prep.base, ChatFormat.from_settings(settings))
        skipped = list(table.skipped)
        leave_out = skipped if settings.skip_bad_rows else None
        new = options.max_new_tokens
        train, eval_rows = (
            make_queries(prep.renderer, rows, leave_out, prep.invocation, new, rewards)
            for rows in split_prompts(settings, table, skipped)
        )
        train = mix_rows(train, table.files, settings.seed)
        task = cls(options, prep.base, train, eval_rows, rewards, prep.renderer, *prep.packing[::2])
        records = [query.row.record(rewards.needs_items) for query in eval_rows]

        def show(row: TokenizedPrompt) -> ShownExample:
            text = prep.base.tokenizer.decode(row.token_ids)
            return ShownExample(row.where, len(row.token_ids), None, f"{text}«...»")

        prepared = prep.finish(task, table, skipped, show, records, longest=task.max_length)
        prepared.reward_hash = rewards.content_hash
        return prepared

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
        objective = cls(options, base, rows, rows, rewards, renderer, BATCH_TOKENS, trained.seed)
        objective.num_rows = len(rows)
        return objective

    def __init__(
        self,
        options: PolicySettings,
        base: CausalLM,
        train: Sequence[TokenizedPrompt],
        eval_rows: Sequence[TokenizedPrompt],
        rewards: RewardFunctions,
        renderer: Renderer,
        batch_tokens: int,
        seed: int,
    ) -> None:
        self.options, self.base, self.train, self.eval_rows = options, base, train, eval_rows
        self.rewards, self._batch_tokens, self._seed = rewards, batch_tokens, seed
        longest = max(len(query.token_ids) for query in (*train, *eval_rows))
        self.max_length = longest + options.max_new_tokens
        self.writer = PolicyGenerator(base, self.max_length, renderer.stop_token_ids)
        self._num_prompts = min(options.num_prompts, len(train))
        self.group = options.num_generations
        self._rollout: Rollout | None = None
        self._step, self._check = MetricSums(), MetricSums()
        self._at = 0
        self._folder: Path | None = None
        self.seconds = {"writing": 0.0, "judging": 0.0}

    # ---- for subclasses

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether the loss needs the log-probabilities with which completions were sampled."""
        return bool(self.options.num_iterations > 1)

    def assign_advantages(self, batches: list[RolloutBatch], rewards: Tensor) -> list[RolloutBatch]:
        """Return the batches of a step with the advantage of each token.

        Args:
            batches: The batches, with their reference log-probabilities.
            rewards: `(num_completions,)`, float64; a prompt's completions are consecutive.
        """
        raise NotImplementedError

    def penalty(
        self, batch: RolloutBatch, kl: Tensor, values: Tensor | None, metrics: dict[str, Tensor]
    ) -> Tensor | float:
        """Return what is added to the loss of each token; metrics of the step may be added.

        `kl` and `values` are `(num_targets,)`: the estimated KL divergence from the reference in
        nats, and the predictions of the value head, if there is one.
        """
        return 0.0

    # ---- steps

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps on the same completions."""
        return self.options.num_iterations

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the prompts."""
        return -(-len(self.train) // self._num_prompts) * self.options.num_iterations

    def prompts_for_step(self, step: int) -> list[TokenizedPrompt]:
        """Return the prompts of a step: the next ones of endless passes, each shuffled anew."""
        first = step // self.options.num_iterations * self._num_prompts
        chosen, orders = [], {}
        for index in range(first, first + self._num_prompts):
            epoch, at = divmod(index, len(self.train))
            if epoch not in orders:
                rng = random.Random(f"{self._seed}:{epoch}")
                orders[epoch] = rng.sample(range(len(self.train)), len(self.train))
            chosen.append(self.train[orders[epoch][at]])
        return chosen

    def row_locations(self, step: int) -> list[str]:
        """Return `file:line` of the rows of an optimizer step."""
        return sorted({query.where for query in self.prompts_for_step(step)})

    def step_batches(self, step: int) -> list[RolloutBatch]:
        """Return the micro-batches of an optimizer step; every `num_iterations` steps new ones.

        Raises:
            TrainingError: The completions of the step were sampled by an earlier process.
        """
        first = step - step % self.options.num_iterations
        if self._rollout is None or self._rollout.step != first:
            if step != first:
                why = f"step {step + 1} learns from completions that step {first + 1} sampled"
                hint = "start again with another --output-dir"
                raise TrainingError("these completions no longer exist", why=why, hint=hint)
            self._rollout = self._sample(self.prompts_for_step(step), first, self._batch_tokens)
        self._step, self._check = self._rollout.metrics.copy(), MetricSums()
        self._at = step + 1
        return self._rollout.batches

    def collate(self, rows: Sequence[TokenizedPrompt], seed: int) -> RolloutBatch:
        """Return some prompts with a group of completions each, in one batch."""
        return self._sample(rows, seed, 1 << 62).batches[0]

    @torch.no_grad()
    def _sample(self, prompts: Sequence[TokenizedPrompt], step: int, batch_tokens: int) -> Rollout:
        """Complete the prompts, score the completions, and pack them with their advantages."""
        each = [query for query in prompts for _ in range(self.group)]
        temperature, name = self.options.temperature, f"step {step}"
        written = self._write(each, self._seed_of(name), temperature, self.policy, name)
        examples = [to_example(query, one) for query, one in zip(each, written, strict=True)]
        scores = self._judge(each, examples)
        batches = []
        for indices, chosen in batches_by_length(examples, batch_tokens):
            batch = replace(self.pack(chosen), indices=tuple(indices))
            if self.needs_old_logprobs:
                old, values = self.read(batch, self.policy, self.head is not None)
                batch = replace(batch, old_logprobs=old, values=values)
            batches.append(batch)
        batches = self.assign_advantages(batches, scores["reward"])
        if self.options.num_iterations == 1:
            batches = [replace(batch, old_logprobs=None) for batch in batches]
        rollout = Rollout(step, batches)
        rollout.metrics.add(scores | completion_metrics(written))
        if self.group > 1:
            rollout.metrics.add({"reward_std": scores["reward"].view(-1, self.group).std(1)})
        return rollout

    def pack(self, examples: Sequence[Example]) -> RolloutBatch:
        """Return completions with their log-probabilities under the reference, no advantages."""
        assert self.reference is not None
        batch = RolloutBatch.pack(examples, self.base.device)
        with torch.no_grad():
            return replace(batch, reference=self.read(batch, self.reference.active)[0])

    def num_targets(self, batch: RolloutBatch) -> int:
        """Return the number of tokens of completions."""
        return batch.flat.num_targets

    def num_tokens(self, batch: RolloutBatch) -> int:
        """Return the number of tokens."""
        return len(batch.flat.token_ids)

    def read(
        self, batch: RolloutBatch, active: ActiveAdapters, value: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return log-probabilities (nats) at the policy's temperature and, with `value`, values.

        Both are `(num_targets,)`, one for each token of the completions.
        """
        base, flat = self.base, batch.flat
        table = batch.segments(active)
        inputs = SharedPrefixBatch(base, flat, table).inputs_for(table)
        targets = (inputs.labels >= 0).nonzero()[:, 0]
        with base.forward_context.use(inputs.table):
            if not base.has_hidden_states:
                return -base.token_losses(
                    inputs.token_ids, inputs.positions, inputs.flat, inputs.labels
                ), None
            hidden = base.hidden_states(inputs.token_ids, inputs.positions, inputs.flat)[targets]
            warm = hidden if self.options.temperature == 1.0 else hidden / self.options.temperature
            logps = -base.token_losses_from_hidden(warm, inputs.labels[targets], targets)
        if not value or not active:
            return logps, None
        # the head applies to completions, which follow any invocation
        segments = active.always_on().segments(flat.token_ids, flat.cu_seqlens)
        with base.forward_context.use(segments):
            return logps, base.model.get_submodule(SCORE)(hidden.float())[:, 0]

    def loss(self, batch: RolloutBatch, active: ActiveAdapters) -> Tensor:
        """Return the sum of the losses of the completions' tokens; in training, record metrics."""
        logps, values = self.read(batch, active, batch.returns is not None)
        old = logps.detach() if batch.old_logprobs is None else batch.old_logprobs
        losses, clipped = clipped_losses(logps, old, batch.advantages, self.options.clip_range)
        kl = kl_estimate(logps, batch.reference)
        metrics = {"kl": kl.detach(), "clip_ratio": clipped.float(), "entropy": -old}
        losses = losses + self.penalty(batch, kl, values, metrics)
        if torch.is_grad_enabled():
            self._step.add(metrics)
        return losses.sum()

    # ---- evaluation

    def eval_completions(
        self, rows: Sequence[TokenizedPrompt], active: ActiveAdapters, temperature: float = 0.0
    ) -> tuple[list[Completion], list[Example], dict[str, Tensor]]:
        """Return a completion of each prompt, the same as examples, and their rewards by part."""
        run = f"judged {self._at} {active}"
        written = self._write(rows, self._seed_of("judged"), temperature, active, run)
        examples = [to_example(query, one) for query, one in zip(rows, written, strict=True)]
        return written, examples, self._judge(rows, examples)

    @torch.no_grad()
    def sampled_metrics(self, active: ActiveAdapters) -> dict[str, float]:
        """Return metrics of sampled completions; `kl` and `entropy` are nats per token."""
        rows, temperature = self.eval_rows, self.options.temperature
        written, examples, scores = self.eval_completions(rows, active, temperature)
        sums = MetricSums()
        sums.add(scores | completion_metrics(written))
        for _, chosen in batches_by_length(examples, self._batch_tokens):
            batch = self.pack(chosen)
            logps = self.read(batch, active)[0]
            sums.add({"kl": kl_estimate(logps, batch.reference), "entropy": -logps})
        return sums.means()

    def eval_loss(self, active: ActiveAdapters) -> float:
        """Return minus the mean reward of greedy completions of the eval prompts; save some."""
        self._check = MetricSums()
        written, _, scores = self.eval_completions(self.eval_rows, active)
        self._check.add(scores | completion_metrics(written))
        if self._folder is not None and active and active == self.policy:
            prompts = [query.row.prompt for query in self.eval_rows]
            save_completions(self._folder, self._at, prompts, written, scores["reward"].tolist())
        return -float(scores["reward"].mean())

    def train_loss(self, active: ActiveAdapters) -> float:
        """Return minus the mean reward of greedy completions of `train_sample`."""
        return -float(self.eval_completions(train_sample(self), active)[2]["reward"].mean())

    def metrics(self, total: Total = no_reduce) -> dict[str, float]:
        """Return metrics of the last step and, with the prefix `eval_`, of the last check."""
        return report_metrics(self._step, self._check, total)

    def start_run(self, folder: Path) -> None:
        """Write the reference of a run, and create the folder of its completions."""
        assert self.reference is not None
        write_json(folder / REFERENCE_FILE, self.reference.to_dict())
        self._folder = folder / COMPLETIONS_DIR
        self._folder.mkdir(exist_ok=True)

    def _seed_of(self, what: str) -> int:
        return int(hashlib.sha256(f"{self._seed}: {what}".encode()).hexdigest()[:12], 16)

    def _write(
        self,
        rows: Sequence[TokenizedPrompt],
        seed: int,
        temperature: float,
        active: ActiveAdapters,
        run: str,
    ) -> list[Completion]:
        begin, prompts = time.perf_counter(), [query.token_ids for query in rows]
        new = self.options.max_new_tokens
        written = self.writer.generate(prompts, seed, new, temperature, active, run)
        self.seconds["writing"] += time.perf_counter() - begin
        return written

    def _judge(
        self, rows: Sequence[TokenizedPrompt], examples: Sequence[Example]
    ) -> dict[str, Tensor]:
        begin = time.perf_counter()
        scores = self.rewards.score([query.row for query in rows], examples, self._batch_tokens)
        self.seconds["judging"] += time.perf_counter() - begin
        return scores

    def evaluate(self, active: ActiveAdapters) -> dict[str, Any]:
        """Return metrics of greedy completions of the eval prompts, and of sampled ones.

        `kl` and `entropy` (nats per token) are those of sampled completions; `completions` are the
        greedy ones with their rewards.
        """
        written, _, scores = self.eval_completions(self.eval_rows, active)
        sampled = self.sampled_metrics(active)
        means = {k: float(v.mean()) for k, v in (scores | completion_metrics(written)).items()}
        means |= {"loss": -means["reward"], "kl": sampled["kl"], "entropy": sampled["entropy"]}
        means |= {f"sampled_{name}": sampled[name] for name in ("reward", "length")}
        pairs = zip(written, scores["reward"].tolist(), strict=True)
        return means | {"completions": [(one.text, reward) for one, reward in pairs]}

    report = policy_report

    def step_workload(self) -> StepWorkload:
        """Return the sizes of an epoch's passes and of the generation before them."""
        return policy_workload(self, self._batch_tokens)

    def run_facts(self) -> dict[str, Any]:
        """Return the seconds that generating and scoring took in this process."""
        return {"seconds_here": self.seconds}

    def profile_prompts(self) -> list[list[int]]:
        """Return the training prompts."""
        return [query.token_ids for query in self.train]
