"""What sequences have in common is computed once: losses and gradients are those of each sequence alone."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from afina.base.model import Base
from afina.config import PreferenceOptions
from afina.data.batches import FlatBatch, flatten
from afina.data.template import Example
from afina.objective.choices import Choice, PreferenceTask
from afina.objective.reading import Reading
from afina.objective.reference import Reference, answer_logps, table_of
from afina.objective.reward import rewards
from afina.route.invocation import Route
from afina.segments import Segment, Segments
from helpers import put

INVOCATION = (7, 9)
KINDS = [("lora", ()), ("dora", ()), ("mora", ()), ("full", ()), ("lora", INVOCATION), ("dora", INVOCATION), ("mora", INVOCATION)]


def example(prompt: Sequence[int], answer: Sequence[int]) -> Example:
    return Example("", [*prompt, *answer], [False] * len(prompt) + [True] * len(answer), len(prompt), None)


def group(seed: int = 0, answers: int = 2, invoked: bool = True) -> list[Example]:
    """Answers of different lengths to three prompts, each with the invocation in the middle; the last one has one more."""
    generator = torch.Generator().manual_seed(seed)

    def draw(size: int) -> list[int]:
        return torch.randint(20, 300, (size,), generator=generator).tolist()

    prompts = [[*draw(9 + 5 * n), *INVOCATION * invoked, *draw(4)] for n in range(3)]
    made = [example(prompt, draw(3 + (2 * n + k) % 5)) for k in range(answers) for n, prompt in enumerate(prompts)]
    return [*made, example(prompts[2], [*draw(1), *INVOCATION * invoked, *draw(3)])]


def whole(base: Base, batch: FlatBatch, route: Route | None) -> Tensor:
    """Log-probabilities without anything shared: each sequence in a run of its own."""
    found = []
    for number in range(len(batch.bounds) - 1):
        one = batch.only([number])
        with base.board.route(table_of(one, route)):
            found.append(-base.losses(one.tokens, one.positions, one.bounds, one.labels).sum())
    return torch.stack(found)


def computed(base: Base, run: Any) -> list[int]:
    """How many tokens each forward of `run` takes through the blocks."""
    sizes: list[int] = []
    layer = base.model.get_submodule("model.layers.0")
    handle = layer.register_forward_pre_hook(lambda _, given, named: sizes.append((given or [named["hidden_states"]])[0].shape[-2]),
                                             with_kwargs=True)  # fmt: skip
    run()
    handle.remove()
    return sizes


def gradients(loss: Tensor, parameters: Any) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(parameters))])


@pytest.mark.parametrize(("method", "invocation"), KINDS)
def test_shared_is_apart(method: str, invocation: tuple[int, ...], base: Base) -> None:
    adapter = put(base, "a", method=method, invocation=invocation, **({} if method == "full" else {"rank": 4}))
    batch = flatten(group())
    for route in (adapter.route, None):
        ours, theirs = answer_logps(base, batch, route)[0], whole(base, batch, route)
        assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()
        if route is not None:
            ours, theirs = (gradients(found.sum(), adapter.parameters()) for found in (ours, theirs))
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_only_what_differs_is_computed(base: Base) -> None:
    examples = group()[:-1]
    batch, tokens = flatten(examples), sum(len(e.tokens) for e in examples)
    prompts = [e.prompt_tokens for e in examples[:3]]
    everywhere = put(base, "a", rank=4).route
    # each second answer brings the token that predicts its first one, and no more of its prompt
    assert computed(base, lambda: answer_logps(base, batch, everywhere)) == [tokens - sum(prompts) + 3]
    late = put(base, "b", rank=4, invocation=INVOCATION).route
    before = sum(n - 6 for n in prompts)
    left = tokens - sum(prompts) + 3 - before
    assert computed(base, lambda: answer_logps(base, batch, late)) == [before, left]

    def both() -> None:
        reading = Reading(base, batch, table_of(batch, late), table_of(batch, None))
        answer_logps(base, batch, late, reading)
        Reference("base", "").logps(base, batch, examples, reading)

    assert computed(base, both) == [before, left, left]


def test_nothing_alike_is_left_as_it_is(base: Base) -> None:
    batch = flatten(group()[:3])
    lean = Reading(base, batch, Segments.all("a")).lean(Segments.all("a"))
    assert lean.tokens is batch.tokens and lean.flat == batch.bounds


def test_where_adapters_differ_nothing_is_shared(base: Base) -> None:
    """Two answers to a prompt, of which one is another adapter's from the prompt's fourth token on."""
    put(base, "a", rank=4), put(base, "b", seed=2, rank=4)
    examples = [example([5, 6, 7, 8, 9, 10], [11, 12]), example([5, 6, 7, 8, 9, 10], [13, 14, 15])]
    batch = flatten(examples)
    table = Segments(rows=(Segment(1, 8, "a"), Segment(9, 12, "a"), Segment(12, 17, "b")))
    lean = Reading(base, batch, table).lean(table)
    assert len(lean.tokens) == 17 - 2  # on the first token of both nobody acts; no more is surely alike
    with torch.no_grad():
        with base.board.route(lean.table):
            ours = base.losses(lean.tokens, lean.positions, lean.flat, lean.labels)
        with base.board.route(table):
            theirs = base.losses(batch.tokens, batch.positions, batch.bounds, batch.labels)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("every", [1, 2])
def test_with_activations_made_again(every: int, base: Base) -> None:
    adapter = put(base, "a", rank=4, invocation=INVOCATION)
    batch = flatten(group())
    plain = gradients(answer_logps(base, batch, adapter.route)[0].sum(), adapter.parameters())
    with base.checkpointing(every):
        again = gradients(answer_logps(base, batch, adapter.route)[0].sum(), adapter.parameters())
    assert (plain - again).norm() <= 1e-6 * plain.norm()


@pytest.mark.parametrize("invocation", [(), INVOCATION])
@pytest.mark.parametrize("objective", ["dpo", "simpo", "orpo", "kto"])
def test_losses_of_pairs(objective: str, invocation: tuple[int, ...], base: Base) -> None:
    adapter = put(base, "a", rank=4, invocation=invocation)
    given = group(answers=2)
    pairs = [Choice(str(n), given[n], given[n + 3], given[(n + 1) % 3]) for n in range(3)]
    task = PreferenceTask(objective, PreferenceOptions(beta=0.1), base, pairs, [], 10_000, 1, 0)
    if objective in ("dpo", "kto"):
        task.reference = Reference("base", "")
    together = task.loss(task.make_batch(pairs, 0), adapter.route)
    base.flat = False  # sequence by sequence: nothing can be shared
    base._attend("sdpa")
    apart = task.loss(task.make_batch(pairs, 0), adapter.route)
    assert abs(together.item() - apart.item()) <= 1e-6 * max(1.0, abs(apart.item()))
    ours, theirs = (gradients(loss, adapter.parameters()) for loss in (together, apart))
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("invocation", [(), INVOCATION])
def test_rewards(invocation: tuple[int, ...], base: Base) -> None:
    modules = (base.add_score(),)
    adapter = put(base, "a", rank=4, invocation=invocation, modules=modules)
    batch = flatten(group())
    alone = torch.cat([rewards(base, batch.only([n]), adapter.route) for n in range(len(batch.bounds) - 1)])
    assert alone.abs().max() > 0.1
    torch.testing.assert_close(rewards(base, batch, adapter.route), alone, atol=1e-5, rtol=1e-5)
