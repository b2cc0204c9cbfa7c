"""Promises of an adapter method, each checked on modules of every kind.

from afina.testing import check_method

def test_vera() -> None:
    check_method(VeRA)
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from afina.adapters.attach import Adapter, detach
from afina.adapters.base import AdapterLayer
from afina.adapters.formats import format_of
from afina.adapters.loading import load_state
from afina.adapters.registry import get_method, register_method, registered_methods
from afina.adapters.saving import tensors_of
from afina.adapters.segments import NO_ADAPTERS, Segment, Segments
from afina.adapters.target_module import TargetModule, as_stored
from afina.errors import AfinaError, SettingsError
from afina.io.adapter_config import AdapterConfig
from afina.models.nf4 import NF4Linear
from afina.testing.method_case import MODULE_KINDS, NUM_TOKENS, MethodCase, raises

ON, HALF = Segments.on_all_tokens("a"), Segments.on_all_tokens("a", 0.5)


# ---- the promises of a method


def identity_at_the_start(case: MethodCase) -> None:
    """Check that a new adapter leaves the output unchanged, bit for bit."""
    case.put(noise=0.0)
    assert torch.equal(case.run(ON), case.plain)


def only_the_declared_parameters_train(case: MethodCase) -> None:
    """Check that gradients reach the named parameters, all finite, and nothing of the base."""
    adapter = case.put(noise=0.0)
    case.run(ON, grad=True).square().sum().backward()
    delta = case.delta(adapter)
    assert {name for name, _ in delta.named_parameters()} == set(delta.names_on_disk(delta.layer))
    gradients = [parameter.grad for parameter in adapter.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert any(g is not None and g.abs().max() > 0 for g in gradients)
    own = {id(parameter) for parameter in adapter.parameters()}
    assert not [
        name for name, p in case.model.named_parameters() if p.requires_grad and id(p) not in own
    ]
    assert all(parameter.grad is None for parameter in case.frozen.parameters())


def count_is_the_formula(case: MethodCase) -> None:
    """Check that `num_parameters` is the number of trainable parameters."""
    adapter = case.put()
    layer = TargetModule("layer", case.frozen)
    assert adapter.num_parameters() == get_method(case.method).num_parameters(layer, adapter.config)
    assert adapter.num_parameters() == sum(
        p.numel() for p in case.model.parameters() if p.requires_grad
    )
    assert all(p.device == layer.device for p in adapter.parameters())


def off_is_the_base(case: MethodCase) -> None:
    """Check that without active adapters the output is that of the base, bit for bit."""
    case.put()
    assert not torch.equal(case.run(ON), case.plain)
    assert torch.equal(case.run(NO_ADAPTERS), case.plain)


def merged_is_adapted(case: MethodCase) -> None:
    """Check that the merged weight gives the adapted output, float64, to 1e-9."""
    adapter = case.to_float64(case.put())
    adapted = case.run(ON)
    merged = nn.Sequential(merged_module(case, adapter), case.model.after)
    torch.testing.assert_close(merged(case.x), adapted, rtol=1e-9, atol=1e-9)


def merged_module(case: MethodCase, adapter: Adapter) -> nn.Module:
    """Return a copy of the frozen module with the adapter merged into its weight."""
    delta, frozen = case.delta(adapter), case.frozen
    if isinstance(frozen, NF4Linear):
        plain: Any = nn.Linear(
            frozen.in_features, frozen.out_features, dtype=frozen.dtype
        ).requires_grad_(False)
        plain.weight.copy_(frozen.weight)
        plain.bias.copy_(frozen.bias)
        frozen = plain
    merged = copy.deepcopy(frozen)
    if case.replaces:
        for name, parameter in delta.named_parameters():
            setattr(merged, name, nn.Parameter(parameter.detach()))
        return merged.requires_grad_(False)
    matrix = delta.merged_weight(TargetModule("layer", frozen).weight)
    merged.weight = nn.Parameter(as_stored(frozen, matrix.detach()), requires_grad=False)
    return merged


def detaching_restores_bit_for_bit(case: MethodCase) -> None:
    """Check that detaching leaves module, state and output as they were, bit for bit."""
    adapter = case.put()
    if not isinstance(case.frozen, NF4Linear):
        merged_module(case, adapter)
    case.run(ON, grad=True).sum().backward()
    detach(case.model, adapter)
    assert case.model.layer is case.frozen
    after = case.model.state_dict()
    assert list(after) == list(case.before)
    assert all(torch.equal(after[name], case.before[name]) for name in after)
    assert torch.equal(case.run(NO_ADAPTERS), case.plain)


def saved_is_loaded(case: MethodCase) -> None:
    """Check that the saved tensors give the same output in a new model, bit for bit."""
    tensors = tensors_of(case.put())
    adapted = case.run(ON)
    other = MethodCase(case.method, case.kind, case.spec, case.dtype)
    load_state(other.put(noise=0.0, seed=7), tensors, "here")
    assert torch.equal(other.run(ON), adapted)


def a_base_in_16_bits_runs(case: MethodCase) -> None:
    """Check output and gradients on a bfloat16 base against float32, to 5%."""
    low = MethodCase(case.method, case.kind, case.spec, torch.bfloat16)
    adapter = low.put()
    if not case.replaces:
        assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    y = low.run(ON, grad=True)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in adapter.parameters())
    exact = MethodCase(case.method, case.kind, case.spec)  # the same numbers in float32
    exact.model.load_state_dict(
        {name: t.to(exact.before[name].dtype) for name, t in low.before.items()}
    )
    exact.x = low.x.float() if low.x.is_floating_point() else low.x
    load_state(
        exact.put(noise=0.0), {name: t.float() for name, t in tensors_of(adapter).items()}, "here"
    )
    torch.testing.assert_close(y.float(), exact.run(ON), rtol=0.05, atol=0.05)


def two_adapters_do_not_touch_each_other(case: MethodCase) -> None:
    """Check that training one adapter leaves another unchanged."""
    first = case.put("a")
    alone = case.run(ON)
    second = case.put("b", seed=5)
    assert torch.equal(case.run(ON), alone)
    case.run(ON, grad=True).square().sum().backward()
    assert all(parameter.grad is None for parameter in second.parameters())
    kept = [parameter.detach().clone() for parameter in second.parameters()]
    torch.optim.AdamW(first.parameters(), lr=0.1).step()
    assert all(torch.equal(p, k) for p, k in zip(second.parameters(), kept, strict=True))
    detach(case.model, second)
    assert second.name not in case.model.layer.deltas
    assert not torch.equal(case.run(ON), alone)  # the first has learned


def two_adapters_add_up(case: MethodCase) -> None:
    """Check that the outputs of two active adapters are summed by their weights."""
    case.model = nn.Sequential()
    case.model.add_module("layer", case.frozen)
    case.to_float64(case.put("a"))
    case.to_float64(case.put("b", seed=5))
    both = Segments(global_adapters=(("a", 1.0), ("b", 0.5)))
    if case.replaces:
        with raises(SettingsError, match="alone"):
            case.run(both)
        return
    base, a, b = case.run(NO_ADAPTERS), case.run(ON), case.run(Segments.on_all_tokens("b"))
    torch.testing.assert_close(case.run(both), a + 0.5 * (b - base), rtol=1e-9, atol=1e-9)


def spans_equal_all_tokens_on_their_range(case: MethodCase) -> None:
    """Check that a segment has the output of its adapter on all tokens, and others the base's."""
    case.to_float64(case.put())
    rows = Segments(spans=(Segment(0, 2, "a"), Segment(4, NUM_TOKENS, "a")), unit=case.unit)
    complete, base, some = case.run(ON), case.run(NO_ADAPTERS), case.run(rows)
    torch.testing.assert_close(some[[0, 1, 4, 5]], complete[[0, 1, 4, 5]], rtol=1e-9, atol=1e-9)
    assert torch.equal(some[2:4], base[2:4])
    if case.replaces:  # it has no weight but 1
        return
    halves = Segments(
        spans=(Segment(0, 3, "a", 0.5), Segment(3, NUM_TOKENS, "a", 0.5)), unit=case.unit
    )
    torch.testing.assert_close(case.run(halves), case.run(HALF), rtol=1e-9, atol=1e-9)


def the_weight_scales_the_delta(case: MethodCase) -> None:
    """Check that the weight scales what the adapter adds."""
    case.model = nn.Sequential()
    case.model.add_module("layer", case.frozen)
    case.to_float64(case.put())
    if case.replaces:
        with raises(SettingsError, match="weight 1"):
            case.run(HALF)
        return
    base = case.run(NO_ADAPTERS)
    torch.testing.assert_close(
        case.run(Segments.on_all_tokens("a", -1.5)) - base,
        -1.5 * (case.run(ON) - base),
        rtol=1e-9,
        atol=1e-9,
    )


def gradients_are_finite_differences(case: MethodCase) -> None:
    """Check all gradients against finite differences, float64."""
    adapter = case.to_float64(case.put())
    delta = case.delta(adapter)
    for name in delta.no_grad_terms:
        value = getattr(delta, name)()
        setattr(delta, name, lambda value=value: value)
    if case.x.is_floating_point():
        case.x.requires_grad_(True)
    inputs = [*adapter.parameters(), *([case.x] if case.x.is_floating_point() else [])]
    torch.autograd.gradcheck(lambda *_: case.run(ON, grad=True), inputs, fast_mode=True)


def shapes_on_disk_follow_the_rules(case: MethodCase) -> None:
    """Check that names and shapes on disk are those of the declared format."""
    delta = case.delta(case.put())
    if case.replaces:
        return
    layer, spec = delta.layer, AdapterConfig(case.method, ("layer",), **{"rank": 2, **case.spec})
    form = format_of(case.method, type(delta))
    names = delta.names_on_disk(layer)
    assert frozenset(names.values()) in form.tensor_sets()
    for name, shape in delta.tensor_shapes(layer, spec).items():
        assert shape in form.shapes(names[name], layer.sizes(spec.rank_of("layer")))
        assert math.prod(shape) == getattr(delta, name).numel()


def low_rank_factors_are_the_update(case: MethodCase) -> None:
    """Check that the factors of `as_low_rank` multiply to the update, float64, to 1e-9."""
    delta = case.delta(case.to_float64(case.put()))
    factors = delta.as_low_rank()
    if factors is None:
        assert delta.low_rank_tensors is None
        return
    b, a = factors
    weight = torch.zeros(delta.layer.out_features, delta.layer.in_features, dtype=torch.float64)
    torch.testing.assert_close(b @ a, delta.merged_weight(weight), rtol=1e-9, atol=1e-9)


FLOAT64_PROMISES = {
    low_rank_factors_are_the_update,
    merged_is_adapted,
    two_adapters_add_up,
    spans_equal_all_tokens_on_their_range,
    the_weight_scales_the_delta,
    gradients_are_finite_differences,
}
METHOD_PROMISES = [
    identity_at_the_start,
    only_the_declared_parameters_train,
    count_is_the_formula,
    off_is_the_base,
    merged_is_adapted,
    detaching_restores_bit_for_bit,
    saved_is_loaded,
    a_base_in_16_bits_runs,
    two_adapters_do_not_touch_each_other,
    two_adapters_add_up,
    spans_equal_all_tokens_on_their_range,
    the_weight_scales_the_delta,
    gradients_are_finite_differences,
    shapes_on_disk_follow_the_rules,
    low_rank_factors_are_the_update,
]


def check_promise(
    promise: Callable[[MethodCase], None], method: str, kind: str, config: dict[str, Any]
) -> None:
    """Check one promise of a registered method on a module kind.

    Args:
        promise: One of `METHOD_PROMISES`.
        method: Name of the method.
        kind: Key of `MODULE_KINDS`.
        config: Further arguments of `AdapterConfig`.

    Raises:
        AssertionError: the promise does not hold.
    """
    dtype = torch.float64 if promise in FLOAT64_PROMISES else torch.float32
    case = MethodCase(method, kind, config, dtype)
    if kind == "nf4" and case.replaces:  # quantized codes have no gradient
        with raises(AfinaError):
            case.put()
        return
    promise(case)


def check_method(method: type[AdapterLayer], **config: Any) -> None:
    """Check all promises of an adapter method on modules of every kind.

    Args:
        method: The class. If it is not registered, it is registered under its name in lower case.
        config: Arguments of `AdapterConfig` besides method and target modules, such as
            `method_settings={"operator": "sharing"}`.

    Raises:
        AssertionError: a promise does not hold; the message names promise and module kind.

    Example:
        check_method(VeRA, rank=4)
    """
    names = (name for name, known in registered_methods().items() if known is method)
    name = next(names, None)
    if name is None:
        name = method.__name__.lower()
        register_method(name)(method)
    for promise in METHOD_PROMISES:
        for kind in MODULE_KINDS:
            try:
                check_promise(promise, name, kind, dict(config))
            except AssertionError as error:
                what = f"{name} on {kind}: {promise.__name__} does not hold"
                raise AssertionError(f"{what}\n{error}") from error
