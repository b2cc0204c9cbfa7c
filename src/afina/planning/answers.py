"""What a step of preferences or of rewards takes besides learning: reading without gradients, and writing answers.

    preferences    read by the policy, with gradients | by the reference, unless there is none, or its numbers are known
    rewards        written | read by the reference, and by the policy where it looks back | read by the policy, with gradients

Tokens are those that are computed: a prompt that answers share counts once, and attention takes it once for each of them.
"""

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from afina.base.model import SCORE, Base
from afina.config import TrainSettings
from afina.data.batches import IGNORED, FlatBatch, flatten, pack
from afina.data.template import Example
from afina.delta.presets import preset
from afina.engine.writing import RUNNING, EngineWriter
from afina.errors import counted
from afina.objective.choices import ChoiceTask, PreferenceTask
from afina.objective.reading import Reading
from afina.objective.reference import table_of
from afina.objective.reward import RewardTask
from afina.objective.rollout import PolicyTask
from afina.planning.cost import Step
from afina.planning.figures import Load, Rates
from afina.planning.forecast import Place, forecast
from afina.planning.shape import Shape, count
from afina.segments import Segments
from afina.training.setup import Setup

STEPS = 64  # of an epoch, that are looked at


@dataclass(frozen=True)
class Pass:
    """One batch: tokens computed with gradients, those before them that need none, labels, lengths of the sequences."""

    own: int
    before: int
    labels: int
    lengths: list[int]


@dataclass(frozen=True)
class Writing:
    """Answers that are written at once: so many, of so many tokens, after prompts of so many in all and on average."""

    answers: int
    new_tokens: int
    prompts: float
    prompt: float

    def seconds(self, step: Step, rates: Rates) -> float:
        """Reading the prompts, then a pass for each token of as many answers as the engine runs at once."""
        rows = min(self.answers, RUNNING)
        load = Load.full(rows, rows)
        length = self.prompt + self.new_tokens / 2
        decode = step.forward(replace(load, mean_length=length), rates)
        prompts = replace(Load.full(max(1, round(self.prompts)), 1), mean_length=self.prompt, mean_labels=float(rows))
        return step.forward(prompts, rates) + -(-self.answers // rows) * self.new_tokens * decode


@dataclass(frozen=True)
class Answers:
    """A step's passes, and per optimizer step what is read without gradients (tokens) and written; bytes that it holds
    besides; `once` and `check`, tokens read before the first step and at each check; and what is not counted, in words."""

    load: Load
    reading: float
    besides: float
    once: float = 0.0
    check: float = 0.0
    writing: Writing | None = None
    updates: int = 1
    check_writing: Writing | None = None
    not_counted: tuple[str, ...] = ()


def step_of(shape: Shape, setup: Setup, settings: TrainSettings, device: str) -> tuple[Step, Answers]:
    """The learning step of a run that is set up, and learns from preferences or rewards, and what it does besides."""
    if SCORE in setup.adapter.spec.modules and not hasattr(shape.model, SCORE):
        shape.model.add_module(SCORE, nn.Linear(int(shape.config.hidden_size), 1, bias=False, device="meta"))
    storage = "nf4" if shape.quantised else preset(settings.method, shape.blocks).storage
    step = Step(shape, count(shape, setup.adapter.spec), settings, storage, device, settings.recomputed)
    answers = _answers_of(setup, step)
    return replace(step, besides=answers.besides), answers


def _answers_of(setup: Setup, step: Step) -> Answers:
    task, base = setup.prepared.task, setup.prepared.base
    frozen = sum(p.numel() * p.element_size() for name, p in base.model.named_parameters()
                 if ".deltas." in name and not p.requires_grad)  # fmt: skip
    if isinstance(task, PolicyTask):
        return _rewards(setup, task, step, float(frozen))
    assert isinstance(task, ChoiceTask)
    return _preferences(setup, task, step, float(frozen))


def _preferences(setup: Setup, task: ChoiceTask, step: Step, frozen: float) -> Answers:
    route, reference = setup.adapter.route, getattr(task, "reference", None)
    known = reference is not None and reference.mode == "precomputed"
    reads = 0 if reference is None or known else 1

    def one(flat: FlatBatch) -> Pass:
        tables = [table_of(flat, route), *([table_of(flat, reference.route)] if reads else [])]  # type: ignore[union-attr]
        made = _pass(task.base, flat, tables)
        return replace(made, labels=len(flat.bounds) - 1) if isinstance(task, RewardTask) else made

    number = task.steps_per_epoch
    steps = [task.step_batches(at) for at in range(0, number, -(-number // STEPS))]
    passes = [[one(batch.flat) for batch in batches] for batches in steps]
    mates = sum(len(e.tokens) for batches in steps for e in batches[0].mates.examples) / len(steps)
    load, before = _load(passes)
    reading = reads * load.mean_tokens * load.passes + before + 2 * mates
    every = [e for row in (*task.train, *task.held) for e in (row.good, row.bad, row.mate) if e is not None]
    held = sum(len(row.tokens) for row in task.held) / load.read
    said = ("the last look at how well a reward model is calibrated",) if isinstance(task, RewardTask) else ()
    if isinstance(task, PreferenceTask) and mates:
        said = ("of the answers to other prompts, what they share",)
    return Answers(
        load, reading, frozen + step.cached * max(one.before for batches in passes for one in batches),
        once=sum(len(e.tokens) for e in every) / load.read if known else 0.0, check=held * (1 + reads), not_counted=said,
    )  # fmt: skip


def _rewards(setup: Setup, task: PolicyTask, step: Step, frozen: float) -> Answers:
    options, route, new = task.options, setup.adapter.route, task.options.max_new_tokens
    assert task.reference is not None
    number = max(1, task.steps_per_epoch // options.updates)
    passes, prompts = [], []
    for at in range(0, number, -(-number // STEPS)):
        queries = task.queries(at * options.updates)
        prompts.append(sum(len(query.tokens) for query in queries))
        made = [_example(query.tokens, new) for query in queries for _ in range(task.group)]
        packed = pack([len(e.tokens) for e in made], setup.settings.batch_tokens, range(len(made)))
        passes.append([_asked(task.base, [made[i] for i in indices], route) for indices in packed])
    load, before = _load(passes)
    each = load.mean_tokens * load.passes
    answers, mean = len(queries) * task.group, sum(prompts) / len(prompts)
    held = sum(len(query.tokens) for query in task.held)
    writer = task.writer
    memory = writer.memory if isinstance(writer, EngineWriter) else 0
    looks = 1 + task.looks_back
    return Answers(
        load, (looks * each + (looks + options.updates) * before) / options.updates,
        frozen + memory + step.cached * max(one.before for batches in passes for one in batches),
        writing=Writing(answers, new, mean, mean / len(queries)), updates=options.updates,
        check_writing=Writing(len(task.held), new, held, held / len(task.held)),
        not_counted=(
            "those who judge: functions, graders, reward models",
            "what the engine does between two tokens: queues, sampling, text",
            f"that answers may end before {counted(new, 'token')}: each is taken to be as long as it may be",
        ),
    )  # fmt: skip


def _example(prompt: list[int], new: int) -> Example:
    labels = [False] * len(prompt) + [True] * new
    return Example("", [*prompt, *[0] * new], labels, len(prompt), None)


def _asked(base: Base, examples: list[Example], route: Any) -> Pass:
    """A pass over prompts with answers; an answer cannot invoke anybody."""
    flat = flatten(examples)
    hidden = [replace(e, tokens=[*e.tokens[: e.prompt_tokens], *[IGNORED] * sum(e.labels)]) for e in examples]
    return _pass(base, flat, [route.segments(flatten(hidden).tokens, flat.bounds)])


def _pass(base: Base, flat: FlatBatch, tables: list[Segments]) -> Pass:
    own, before = Reading(base, flat, *tables).sizes(tables[0])
    lengths = [end - start for start, end in zip(flat.bounds, flat.bounds[1:], strict=False)]
    return Pass(own, before, flat.label_count, lengths)


def _load(steps: list[list[Pass]]) -> tuple[Load, float]:
    """The passes as a load, and the tokens that come before, a step."""
    every = [one for passes in steps for one in passes]
    lengths = [n for one in every for n in one.lengths]
    own, number = sum(one.own for one in every), len(every)
    load = Load(
        max(one.own for one in every), max(one.labels for one in every), max(lengths), own / number,
        sum(one.labels for one in every) / number, sum(n * n for n in lengths) / sum(lengths),
        max(1, round(number / len(steps))), sum(lengths) / own,
    )  # fmt: skip
    return load, sum(one.before for one in every) / len(steps)


def forecast_answers(step: Step, answers: Answers, place: Place, steps: int) -> dict[str, Any]:
    """`forecast`, with what a step and a run take besides learning; seconds by what they go into are in `phases`."""
    load = answers.load
    made = forecast(step, load, place, None, 0) | {"not_counted": list(answers.not_counted), "phases": None}
    if place.rates is None:
        return made
    rates, learning = place.rates, made["step_seconds"]
    one = step.forward(load, rates) / load.mean_tokens  # a token
    reading = answers.reading * one
    writing = answers.writing.seconds(step, rates) / answers.updates if answers.writing else 0.0
    checks = steps // (step.settings.check_every or max(1, steps // 10)) + 3  # and before, and twice at the end
    check = answers.check * one + (answers.check_writing.seconds(step, rates) if answers.check_writing else 0.0)
    phases = {"learning": learning, "reading": reading, "writing": writing}
    each = sum(phases.values())
    return made | {"step_seconds": each, "phases": phases, "run_seconds": steps * each + checks * check + answers.once * one}

