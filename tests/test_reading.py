"""What sequences have in common is computed once: losses and gradients are those of each sequence alone."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from afina.adapters.active import BASE_ONLY, ActiveAdapters
from afina.adapters.segments import Segment, Segments
from afina.data.packing import PackedBatch, pack_examples
from afina.data.renderer import Example
from afina.models.causal_lm import CausalLM
from afina.objectives.preference_data import PreferenceExample
from afina.objectives.reference import ReferencePolicy, segments_for, sequence_logprobs
from afina.objectives.registry import get_objective
from afina.objectives.reward_model import score_sequences
from afina.objectives.shared_prefix import SharedPrefixBatch
from afina.settings import settings_groups
from helpers import put

INVOCATION = (7, 9)
KINDS = [
    ("lora", ()),
    ("dora", ()),
    ("mora", ()),
    ("full", ()),
    ("lora", INVOCATION),
    ("dora", INVOCATION),
    ("mora", INVOCATION),
]


def example(prompt: Sequence[int], answer: Sequence[int]) -> Example:
    return Example(
        "", [*prompt, *answer], [False] * len(prompt) + [True] * len(answer), len(prompt), None
    )


def group(seed: int = 0, answers: int = 2, invoked: bool = True) -> list[Example]:
    """Answers of different lengths to three prompts, each with the invocation in the middle; the last one has one more."""
    generator = torch.Generator().manual_seed(seed)

    def draw(size: int) -> list[int]:
        return torch.randint(20, 300, (size,), generator=generator).tolist()

    prompts = [[*draw(9 + 5 * n), *INVOCATION * invoked, *draw(4)] for n in range(3)]
    made = [
        example(prompt, draw(3 + (2 * n + k) % 5))
        for k in range(answers)
        for n, prompt in enumerate(prompts)
    ]
    return [*made, example(prompts[2], [*draw(1), *INVOCATION * invoked, *draw(3)])]


def whole(base: CausalLM, batch: PackedBatch, route: ActiveAdapters) -> Tensor:
    """Log-probabilities without anything shared: each sequence in a run of its own."""
    found = []
    for number in range(len(batch.cu_seqlens) - 1):
        one = batch.select([number])
        with base.forward_context.use(segments_for(one, route)):
            found.append(
                -base.token_losses(one.token_ids, one.positions, one.cu_seqlens, one.labels).sum()
            )
    return torch.stack(found)


def computed(base: CausalLM, run: Any) -> list[int]:
    """How many tokens each forward of `run` takes through the blocks."""
    sizes: list[int] = []
    layer = base.model.get_submodule("model.layers.0")
    handle = layer.register_forward_pre_hook(
        lambda _, given, named: sizes.append((given or [named["hidden_states"]])[0].shape[-2]),
        with_kwargs=True,
    )
    run()
    handle.remove()
    return sizes


def gradients(loss: Tensor, parameters: Any) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(parameters))])


@pytest.mark.slow
@pytest.mark.parametrize(("method", "invocation"), KINDS)
def test_shared_is_apart(method: str, invocation: tuple[int, ...], base: CausalLM) -> None:
    adapter = put(
        base, "a", method=method, invocation=invocation, **({} if method == "full" else {"rank": 4})
    )
    batch = pack_examples(group())
    for route in (adapter.active, BASE_ONLY):
        ours, theirs = sequence_logprobs(base, batch, route)[0], whole(base, batch, route)
        assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()
        if route:
            ours, theirs = (
                gradients(found.sum(), adapter.parameters()) for found in (ours, theirs)
            )
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_only_what_differs_is_computed(base: CausalLM) -> None:
    examples = group()[:-1]
    batch, tokens = pack_examples(examples), sum(len(e.token_ids) for e in examples)
    prompts = [e.prompt_length for e in examples[:3]]
    everywhere = put(base, "a", rank=4).active
    # each second answer brings the token that predicts its first one, and no more of its prompt
    assert computed(base, lambda: sequence_logprobs(base, batch, everywhere)) == [
        tokens - sum(prompts) + 3
    ]
    late = put(base, "b", rank=4, invocation=INVOCATION).active
    before = sum(n - 6 for n in prompts)
    left = tokens - sum(prompts) + 3 - before
    assert computed(base, lambda: sequence_logprobs(base, batch, late)) == [before, left]

    def both() -> None:
        reading = SharedPrefixBatch(
            base, batch, segments_for(batch, late), segments_for(batch, BASE_ONLY)
        )
        sequence_logprobs(base, batch, late, reading)
        ReferencePolicy("base", "").logps(base, batch, examples, reading)

    assert computed(base, both) == [before, left, left]


def test_nothing_alike_is_left_as_it_is(base: CausalLM) -> None:
    batch = pack_examples(group()[:3])
    lean = SharedPrefixBatch(base, batch, Segments.on_all_tokens("a")).inputs_for(
        Segments.on_all_tokens("a")
    )
    assert lean.token_ids is batch.token_ids and lean.flat == batch.cu_seqlens


def test_where_adapters_differ_nothing_is_shared(base: CausalLM) -> None:
    """Two answers to a prompt, of which one is another adapter's from the prompt's fourth token on."""
    put(base, "a", rank=4), put(base, "b", seed=2, rank=4)
    examples = [example([5, 6, 7, 8, 9, 10], [11, 12]), example([5, 6, 7, 8, 9, 10], [13, 14, 15])]
    batch = pack_examples(examples)
    table = Segments(spans=(Segment(1, 8, "a"), Segment(9, 12, "a"), Segment(12, 17, "b")))
    lean = SharedPrefixBatch(base, batch, table).inputs_for(table)
    assert (
        len(lean.token_ids) == 17 - 2
    )  # on the first token of both nobody acts; no more is surely alike
    with torch.no_grad():
        with base.forward_context.use(lean.table):
            ours = base.token_losses(lean.token_ids, lean.positions, lean.flat, lean.labels)
        with base.forward_context.use(table):
            theirs = base.token_losses(
                batch.token_ids, batch.positions, batch.cu_seqlens, batch.labels
            )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("every", [1, 2])
def test_with_activations_made_again(every: int, base: CausalLM) -> None:
    adapter = put(base, "a", rank=4, invocation=INVOCATION)
    batch = pack_examples(group())
    plain = gradients(sequence_logprobs(base, batch, adapter.active)[0].sum(), adapter.parameters())
    with base.gradient_checkpointing(every):
        again = gradients(
            sequence_logprobs(base, batch, adapter.active)[0].sum(), adapter.parameters()
        )
    assert (plain - again).norm() <= 1e-6 * plain.norm()


@pytest.mark.slow
@pytest.mark.parametrize("invocation", [(), INVOCATION])
@pytest.mark.parametrize("objective", ["dpo", "simpo", "orpo", "kto"])
def test_losses_of_pairs(objective: str, invocation: tuple[int, ...], base: CausalLM) -> None:
    adapter = put(base, "a", rank=4, invocation=invocation)
    given = group(answers=2)
    pairs = [
        PreferenceExample(str(n), given[n], given[n + 3], given[(n + 1) % 3]) for n in range(3)
    ]
    options: Any = settings_groups.get(objective)(beta=0.1)
    task: Any = get_objective(objective)
    task = task(options, base, pairs, [], 10_000, 1, 0)
    if objective in ("dpo", "kto"):
        task.reference = ReferencePolicy("base", "")
    together = task.loss(task.collate(pairs, 0), adapter.active)
    base.supports_packing = False  # sequence by sequence: nothing can be shared
    base._attend("sdpa")
    apart = task.loss(task.collate(pairs, 0), adapter.active)
    assert abs(together.item() - apart.item()) <= 1e-6 * max(1.0, abs(apart.item()))
    ours, theirs = (gradients(loss, adapter.parameters()) for loss in (together, apart))
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.slow
@pytest.mark.parametrize("invocation", [(), INVOCATION])
def test_rewards(invocation: tuple[int, ...], base: CausalLM) -> None:
    modules = (base.add_score_head(),)
    adapter = put(base, "a", rank=4, invocation=invocation, modules_to_save=modules)
    batch = pack_examples(group())
    alone = torch.cat(
        [
            score_sequences(base, batch.select([n]), adapter.active)
            for n in range(len(batch.cu_seqlens) - 1)
        ]
    )
    assert alone.abs().max() > 0.1
    torch.testing.assert_close(
        score_sequences(base, batch, adapter.active), alone, atol=1e-5, rtol=1e-5
    )
