"""Sizes of an optimizer step, counted from the batches that training would use, for the planner.

An objective returns them by `Objective.step_workload`. Tokens are those that are computed: a prompt
that completions share counts once, and attention reads it once for each completion.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from afina.adapters.active import ActiveAdapters
from afina.adapters.segments import Segments
from afina.data.packing import BatchSampler, PackedBatch, batches_by_length, pack_examples
from afina.data.renderer import Example
from afina.errors import pluralize
from afina.models.causal_lm import CausalLM
from afina.objectives.reference import segments_for
from afina.objectives.rollout import masked_tokens
from afina.objectives.shared_prefix import SharedPrefixBatch

if TYPE_CHECKING:
    from afina.objectives.policy import PolicyObjective
    from afina.objectives.preference import PairwiseObjective

MAX_STEPS = 64  # optimizer steps of an epoch whose batches are counted


@dataclass(frozen=True)
class PassSize:
    """Size of one micro-batch: tokens with gradients, shared prefix tokens, target tokens."""

    tokens: int
    prefix_tokens: int
    targets: int
    lengths: Sequence[int]  # of its sequences, prefixes included


@dataclass(frozen=True)
class GenerationSize:
    """Completions that are generated at once: number, new tokens of each, prompt tokens in all."""

    num_completions: int
    max_new_tokens: int
    prompt_tokens: float
    mean_prompt_tokens: float


@dataclass(frozen=True)
class StepWorkload:
    """What an optimizer step computes: its passes, and what comes in addition to them.

    Attributes:
        passes: The micro-batches of some optimizer steps.
        forward_ratio: Forward passes without gradients per optimizer step, over its micro-batches.
        forward_tokens: Other tokens of such passes per optimizer step.
        initial_tokens: Tokens of forward passes before the first step.
        eval_tokens: Tokens of forward passes at each evaluation.
        extra_bytes: Memory of what the objective allocates itself.
        generation: Completions generated in each rollout.
        eval_generation: Completions generated at each evaluation.
        num_iterations: Optimizer steps on the same rollout.
        not_counted: What is left out, one phrase each.
    """

    passes: Sequence[Sequence[PassSize]]
    forward_ratio: float = 0.0
    forward_tokens: float = 0.0
    initial_tokens: float = 0.0
    eval_tokens: float = 0.0
    extra_bytes: float = 0.0
    generation: GenerationSize | None = None
    eval_generation: GenerationSize | None = None
    num_iterations: int = 1
    not_counted: tuple[str, ...] = ()

    @property
    def prefix_tokens(self) -> float:
        """Shared prefix tokens per optimizer step: they are computed without gradients."""
        return sum(one.prefix_tokens for passes in self.passes for one in passes) / len(self.passes)

    @property
    def attention_ratio(self) -> float:
        """Tokens of all sequences over tokens computed: attention reads shared prefixes again."""
        sizes = [one for passes in self.passes for one in passes]
        return sum(sum(one.lengths) for one in sizes) / sum(one.tokens for one in sizes)


def packed_workload(sampler: BatchSampler, eval_rows: Sequence[Example]) -> StepWorkload:
    """Return the workload of next-token objectives, as the first epoch's batches are packed."""
    steps = [sampler.step_examples(step) for step in range(sampler.steps_per_epoch)]
    passes = [[_examples_size(examples) for examples in step] for step in steps]
    return StepWorkload(passes, eval_tokens=sum(len(e.token_ids) for e in eval_rows))


def _examples_size(examples: Sequence[Example]) -> PassSize:
    lengths = [len(example.token_ids) for example in examples]
    targets = sum(sum(example.loss_mask) for example in examples)
    return PassSize(sum(lengths), 0, targets, lengths)


def pairwise_workload(
    task: "PairwiseObjective",
    num_targets: Callable[[PackedBatch], int] = lambda batch: batch.num_targets,
    not_counted: tuple[str, ...] = (),
) -> StepWorkload:
    """Return the workload of a preference objective: its passes, and those of its reference."""
    reference = task.reference
    is_stored = reference is not None and reference.mode == "precomputed"
    has_forward = reference is not None and not is_stored
    others = [reference.active] if reference is not None and has_forward else []

    def size(flat: PackedBatch) -> PassSize:
        segments = [segments_for(flat, active) for active in (task.policy, *others)]
        return replace(_pass_size(task.base, flat, segments), targets=num_targets(flat))

    steps = [task.step_batches(step) for step in counted_steps(task.steps_per_epoch)]
    workload = StepWorkload([[size(batch.flat) for batch in batches] for batches in steps])
    tokens = [len(row.mismatched.token_ids) for row in task.train if row.mismatched]
    mismatched = sum(tokens) / task.steps_per_epoch
    rows = (*task.train, *task.eval_rows)
    answers = [e for row in rows for e in (row.chosen, row.rejected, row.mismatched) if e]
    stored = sum(len(e.token_ids) for e in answers) if is_stored else 0
    eval_tokens = sum(len(row.token_ids) for row in task.eval_rows) * (1 + has_forward)
    shared = ("what mismatched completions share with their prompts",) if mismatched else ()
    return replace(
        workload,
        forward_ratio=float(has_forward),
        forward_tokens=workload.prefix_tokens + 2 * mismatched,
        initial_tokens=stored / workload.attention_ratio,
        eval_tokens=eval_tokens / workload.attention_ratio,
        not_counted=not_counted + shared,
    )


def policy_workload(task: "PolicyObjective", batch_tokens: int) -> StepWorkload:
    """Return the workload of a policy objective: generation, and passes over the completions."""
    assert task.policy
    options, num_iterations = task.options, task.options.num_iterations
    new_tokens = options.max_new_tokens
    passes, prompt_tokens = [], []
    for rollout in counted_steps(max(1, task.steps_per_epoch // num_iterations)):
        prompts = task.prompts_for_step(rollout * num_iterations)
        prompt_tokens.append(sum(len(prompt.token_ids) for prompt in prompts))
        longest = [_completed(p.token_ids, new_tokens) for p in prompts for _ in range(task.group)]
        passes.append(_rollout_sizes(task.base, longest, batch_tokens, task.policy))
    workload, mean = StepWorkload(passes), sum(prompt_tokens) / len(prompt_tokens)
    eval_tokens = sum(len(prompt.token_ids) for prompt in task.eval_rows)
    num_eval = len(task.eval_rows)
    forwards = 1 + task.needs_old_logprobs  # of the reference, and of the policy before the loss
    prefixes = workload.prefix_tokens * (forwards + num_iterations) / num_iterations
    return replace(
        workload,
        forward_ratio=forwards / num_iterations,
        forward_tokens=prefixes,
        extra_bytes=float(task.writer.memory),
        generation=GenerationSize(len(prompts) * task.group, new_tokens, mean, mean / len(prompts)),
        eval_generation=GenerationSize(num_eval, new_tokens, eval_tokens, eval_tokens / num_eval),
        num_iterations=num_iterations,
        not_counted=(
            "scoring: reward functions, graders, reward models",
            "scheduling, sampling and detokenization between two decode steps",
            f"completions that end before {pluralize(new_tokens, 'token')}: "
            "each counts with the most",
        ),
    )


def counted_steps(num_steps: int) -> range:
    """Return at most `MAX_STEPS` of an epoch's steps, evenly spread."""
    return range(0, num_steps, -(-num_steps // MAX_STEPS))


def _completed(prompt: Sequence[int], num_new: int) -> Example:
    """Return a prompt with `num_new` target tokens."""
    mask = [False] * len(prompt) + [True] * num_new
    return Example("", [*prompt, *[0] * num_new], mask, len(prompt), None)


def _rollout_sizes(
    base: CausalLM, examples: Sequence[Example], batch_tokens: int, policy: ActiveAdapters
) -> list[PassSize]:
    """Return the sizes of passes over completions, which cannot invoke an activated adapter."""
    sizes = []
    for _, batch in batches_by_length(examples, batch_tokens):
        flat = pack_examples(batch)
        segments = policy.segments(masked_tokens(batch), flat.cu_seqlens)
        sizes.append(_pass_size(base, flat, [segments]))
    return sizes


def _pass_size(base: CausalLM, flat: PackedBatch, segments: list[Segments]) -> PassSize:
    own, prefix = SharedPrefixBatch(base, flat, *segments).num_computed_tokens(segments[0])
    lengths = [end - start for start, end in pairwise(flat.cu_seqlens)]
    return PassSize(own, prefix, flat.num_targets, lengths)
