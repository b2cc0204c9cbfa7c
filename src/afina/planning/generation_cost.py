"""Seconds of what a step computes besides the update: forward passes and generation."""

from dataclasses import replace

from afina.engine.config import MAX_NUM_SEQS
from afina.objectives.workload import GenerationSize, StepWorkload
from afina.planning.estimates import MachineRates, Workload
from afina.planning.step_cost import StepCost


def generation_seconds(size: GenerationSize, step: StepCost, rates: MachineRates) -> float:
    """Return the seconds of the prefill and of the decode steps of the engine's batches."""
    rows = min(size.num_completions, MAX_NUM_SEQS)
    length = size.mean_prompt_tokens + size.max_new_tokens / 2
    decode = step.forward(replace(Workload.full(rows, rows), mean_length=length), rates)
    prompts = replace(
        Workload.full(max(1, round(size.prompt_tokens)), 1),
        mean_length=size.mean_prompt_tokens,
        mean_labels=float(rows),
    )
    batches = -(-size.num_completions // rows)
    return step.forward(prompts, rates) + batches * size.max_new_tokens * decode


def phase_seconds(
    step: StepCost, load: Workload, workload: StepWorkload, rates: MachineRates
) -> dict[str, float]:
    """Return the seconds of an optimizer step by phase: update, forward passes, generation."""
    token = step.forward(load, rates) / load.mean_tokens
    tokens = workload.forward_ratio * load.mean_tokens * load.num_micro_batches
    size, writing = workload.generation, 0.0
    if size is not None:
        writing = generation_seconds(size, step, rates) / workload.num_iterations
    return {
        "learning": step.time(load, rates).step,
        "reading": (tokens + workload.forward_tokens) * token,
        "writing": writing,
    }


def eval_seconds(
    step: StepCost, load: Workload, workload: StepWorkload, rates: MachineRates
) -> float:
    """Return the seconds of one evaluation."""
    token = step.forward(load, rates) / load.mean_tokens
    size = workload.eval_generation
    generated = generation_seconds(size, step, rates) if size is not None else 0.0
    return workload.eval_tokens * token + generated
