"""Cost of preference and policy optimization besides training: forward passes and generation.

    preferences    forward of the reference, if there is one and its log-probabilities unknown;
                   forward and backward of the policy
    rewards        generation; forward of the reference, and of the policy with several updates;
                   forward and backward of the policy

Tokens are those computed: a prompt that completions share counts once, and attention takes it once
for each completion.
"""

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from afina.adapters.presets import get_preset
from afina.adapters.segments import Segments
from afina.data.packing import IGNORE_INDEX, PackedBatch, group_by_length, pack_examples
from afina.data.renderer import Example
from afina.engine.config import MAX_NUM_SEQS
from afina.errors import pluralize
from afina.models.causal_lm import SCORE, CausalLM
from afina.objectives.policy import PolicyObjective
from afina.objectives.preference import PairwiseObjective, PreferenceObjective
from afina.objectives.reference import segments_for
from afina.objectives.reward_model import RewardModelObjective
from afina.objectives.shared_prefix import SharedPrefixBatch
from afina.planning.estimate import Machine, estimate_run
from afina.planning.estimates import MachineRates, Workload
from afina.planning.model_shape import ModelShape, count_parameters
from afina.planning.step_cost import StepCost
from afina.settings import TrainSettings
from afina.training.setup.set_up import RunSetup

STEPS = 64  # steps of an epoch whose batches are counted


@dataclass(frozen=True)
class PassSize:
    """Batch: tokens with gradients, shared prefix tokens, target tokens, sequence lengths."""

    own: int
    before: int
    labels: int
    lengths: list[int]


@dataclass(frozen=True)
class GenerationCost:
    """Completions generated at once: number, new tokens, prompt tokens in all and on average."""

    answers: int
    new_tokens: int
    prompts: float
    prompt: float

    def seconds(self, step: StepCost, rates: MachineRates) -> float:
        """Return the seconds of the prefill and of the decode steps of the engine's batches."""
        rows = min(self.answers, MAX_NUM_SEQS)
        load = Workload.full(rows, rows)
        length = self.prompt + self.new_tokens / 2
        decode = step.forward(replace(load, mean_length=length), rates)
        prompts = replace(
            Workload.full(max(1, round(self.prompts)), 1),
            mean_length=self.prompt,
            mean_labels=float(rows),
        )
        return step.forward(prompts, rates) + -(-self.answers // rows) * self.new_tokens * decode


@dataclass(frozen=True)
class StepExtras:
    """Passes and generation of an optimizer step besides training.

    `reading` are tokens of forward passes per step, `besides` bytes, `once` and `check` tokens read
    before the first step and at each evaluation; `not_counted` describes what is left out.
    """

    load: Workload
    reading: float
    besides: float
    once: float = 0.0
    check: float = 0.0
    writing: GenerationCost | None = None
    updates: int = 1
    check_writing: GenerationCost | None = None
    not_counted: tuple[str, ...] = ()


def step_with_generation(
    shape: ModelShape, setup: RunSetup, settings: TrainSettings, device: str
) -> tuple[StepCost, StepExtras]:
    """Return the training step of a preference or policy run, and its other costs."""
    if SCORE in setup.adapter.config.modules_to_save and not hasattr(shape.model, SCORE):
        shape.model.add_module(
            SCORE, nn.Linear(int(shape.config.hidden_size), 1, bias=False, device="meta")
        )
    quantization = (
        "nf4" if shape.quantised else get_preset(settings.method, shape.num_layers).quantization
    )
    step = StepCost(
        shape,
        count_parameters(shape, setup.adapter.config),
        settings,
        quantization,
        device,
        settings.recomputed,
    )
    answers = _answers_of(setup, step)
    return replace(step, besides=answers.besides), answers


def _answers_of(setup: RunSetup, step: StepCost) -> StepExtras:
    task, base = setup.prepared.task, setup.prepared.base
    frozen = sum(
        p.numel() * p.element_size()
        for name, p in base.model.named_parameters()
        if ".deltas." in name and not p.requires_grad
    )
    if isinstance(task, PolicyObjective):
        return _rewards(setup, task, step, float(frozen))
    assert isinstance(task, PairwiseObjective)
    return _preferences(setup, task, step, float(frozen))


def _preferences(
    setup: RunSetup, task: PairwiseObjective, step: StepCost, frozen: float
) -> StepExtras:
    route, reference = setup.adapter.active, getattr(task, "reference", None)
    known = reference is not None and reference.mode == "precomputed"
    reads = 0 if reference is None or known else 1

    def one(flat: PackedBatch) -> PassSize:
        tables = [
            segments_for(flat, route),
            *([segments_for(flat, reference.active)] if reference is not None and reads else []),
        ]
        made = _pass(task.base, flat, tables)
        return (
            replace(made, labels=len(flat.cu_seqlens) - 1)
            if isinstance(task, RewardModelObjective)
            else made
        )

    number = task.steps_per_epoch
    steps = [task.step_batches(at) for at in range(0, number, -(-number // STEPS))]
    passes = [[one(batch.flat) for batch in batches] for batches in steps]
    mates = sum(len(e.token_ids) for batches in steps for e in batches[0].mates.examples) / len(
        steps
    )
    load, before = _load(passes)
    reading = reads * load.mean_tokens * load.num_micro_batches + before + 2 * mates
    every = [
        e
        for row in (*task.train, *task.eval_rows)
        for e in (row.chosen, row.rejected, row.mismatched)
        if e is not None
    ]
    held = sum(len(row.token_ids) for row in task.eval_rows) / load.attention_ratio
    said = (
        ("the last look at how well a reward model is calibrated",)
        if isinstance(task, RewardModelObjective)
        else ()
    )
    if isinstance(task, PreferenceObjective) and mates:
        said = ("of the answers to other prompts, what they share",)
    return StepExtras(
        load,
        reading,
        frozen + step.cached * max(one.before for batches in passes for one in batches),
        once=sum(len(e.token_ids) for e in every) / load.attention_ratio if known else 0.0,
        check=held * (1 + reads),
        not_counted=said,
    )


def _rewards(setup: RunSetup, task: PolicyObjective, step: StepCost, frozen: float) -> StepExtras:
    options, route, new = task.options, setup.adapter.active, task.options.max_new_tokens
    assert task.reference is not None
    number = max(1, task.steps_per_epoch // options.num_iterations)
    passes, prompts = [], []
    for at in range(0, number, -(-number // STEPS)):
        queries = task.prompts_for_step(at * options.num_iterations)
        prompts.append(sum(len(query.token_ids) for query in queries))
        made = [_example(query.token_ids, new) for query in queries for _ in range(task.group)]
        packed = group_by_length(
            [len(e.token_ids) for e in made], setup.settings.max_tokens_per_batch, range(len(made))
        )
        passes.append([_asked(task.base, [made[i] for i in indices], route) for indices in packed])
    load, before = _load(passes)
    each = load.mean_tokens * load.num_micro_batches
    answers, mean = len(queries) * task.group, sum(prompts) / len(prompts)
    held = sum(len(query.token_ids) for query in task.eval_rows)
    memory = task.writer.memory
    looks = 1 + task.needs_old_logprobs
    return StepExtras(
        load,
        (looks * each + (looks + options.num_iterations) * before) / options.num_iterations,
        frozen + memory + step.cached * max(one.before for batches in passes for one in batches),
        writing=GenerationCost(answers, new, mean, mean / len(queries)),
        updates=options.num_iterations,
        check_writing=GenerationCost(len(task.eval_rows), new, held, held / len(task.eval_rows)),
        not_counted=(
            "scoring: reward functions, graders, reward models",
            "what the engine does between two tokens: queues, sampling, text",
            f"completions that end before {pluralize(new, 'token')}: each counts with the most",
        ),
    )


def _example(prompt: list[int], new: int) -> Example:
    labels = [False] * len(prompt) + [True] * new
    return Example("", [*prompt, *[0] * new], labels, len(prompt), None)


def _asked(base: CausalLM, examples: list[Example], route: Any) -> PassSize:
    """A pass over prompts with answers; an answer cannot invoke anybody."""
    flat = pack_examples(examples)
    hidden = [
        replace(e, token_ids=[*e.token_ids[: e.prompt_length], *[IGNORE_INDEX] * sum(e.loss_mask)])
        for e in examples
    ]
    return _pass(base, flat, [route.segments(pack_examples(hidden).token_ids, flat.cu_seqlens)])


def _pass(base: CausalLM, flat: PackedBatch, tables: list[Segments]) -> PassSize:
    own, before = SharedPrefixBatch(base, flat, *tables).num_computed_tokens(tables[0])
    lengths = [
        end - start for start, end in zip(flat.cu_seqlens, flat.cu_seqlens[1:], strict=False)
    ]
    return PassSize(own, before, flat.num_targets, lengths)


def _load(steps: list[list[PassSize]]) -> tuple[Workload, float]:
    """The passes as a load, and the tokens that come before, a step."""
    every = [one for passes in steps for one in passes]
    lengths = [n for one in every for n in one.lengths]
    own, number = sum(one.own for one in every), len(every)
    load = Workload(
        max(one.own for one in every),
        max(one.labels for one in every),
        max(lengths),
        own / number,
        sum(one.labels for one in every) / number,
        sum(n * n for n in lengths) / sum(lengths),
        max(1, round(number / len(steps))),
        sum(lengths) / own,
    )
    return load, sum(one.before for one in every) / len(steps)


def forecast_answers(
    step: StepCost, answers: StepExtras, place: Machine, steps: int
) -> dict[str, Any]:
    """Return the estimate of a run with these extra costs; `phases` has the seconds by phase."""
    load = answers.load
    made = estimate_run(step, load, place, None, 0) | {
        "not_counted": list(answers.not_counted),
        "phases": None,
    }
    if place.rates is None:
        return made
    rates, learning = place.rates, made["step_seconds"]
    one = step.forward(load, rates) / load.mean_tokens  # a token
    reading = answers.reading * one
    writing = answers.writing.seconds(step, rates) / answers.updates if answers.writing else 0.0
    checks = (
        steps // (step.settings.eval_steps or max(1, steps // 10)) + 3
    )  # and before, and twice at the end
    check = answers.check * one + (
        answers.check_writing.seconds(step, rates) if answers.check_writing else 0.0
    )
    phases = {"learning": learning, "reading": reading, "writing": writing}
    each = sum(phases.values())
    return made | {
        "step_seconds": each,
        "phases": phases,
        "run_seconds": steps * each + checks * check + answers.once * one,
    }
