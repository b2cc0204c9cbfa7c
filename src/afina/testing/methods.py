"""Promises of an adapter method, each checked on modules of every kind.

from afina.testing import check_method

def test_vera() -> None:
    check_method(VeRA)
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from afina.adapters.attach import Adapter, attach, detach
from afina.adapters.base import AdapterLayer
from afina.adapters.formats import format_of
from afina.adapters.loading import load_state
from afina.adapters.registry import get_method, register_method, registered_methods
from afina.adapters.saving import tensors_of
from afina.adapters.segments import NO_ADAPTERS, ForwardContext, Segment, Segments
from afina.adapters.target_module import TargetModule, as_stored
from afina.errors import AfinaError, SettingsError
from afina.io.adapter_config import AdapterConfig
from afina.models.nf4 import NF4Linear

NUM_TOKENS = 6


def tokens(width: int) -> Callable[[], Tensor]:
    """Return a maker of inputs (NUM_TOKENS, width)."""
    return lambda: torch.randn(NUM_TOKENS, width)


# module kind -> (the frozen module, an input of it): rows of a batch for convolutions, else tokens
MODULE_KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear-narrow": (lambda: nn.Linear(23, 6), tokens(23)),
    "linear-wide": (lambda: nn.Linear(7, 20, bias=False), tokens(7)),
    "linear-square": (lambda: nn.Linear(11, 11), tokens(11)),
    "conv1d-gpt2": (lambda: Conv1D(13, 9), tokens(9)),
    "conv1d": (
        lambda: nn.Conv1d(3, 8, 3, stride=2, padding=1),
        lambda: torch.randn(NUM_TOKENS, 3, 9),
    ),
    "conv2d": (
        lambda: nn.Conv2d(2, 9, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2)),
        lambda: torch.randn(NUM_TOKENS, 2, 6, 5),
    ),
    "conv2d-same": (
        lambda: nn.Conv2d(4, 3, 3, padding="same", bias=False),
        lambda: torch.randn(NUM_TOKENS, 4, 4, 3),
    ),
    "embedding": (lambda: nn.Embedding(19, 10), lambda: torch.tensor([0, 18, 7, 7, 12, 3])),
    "nf4": (lambda: NF4Linear.from_linear(nn.Linear(70, 9)), tokens(70)),
}


@dataclass
class MethodCase:
    """A method on a module of one kind, at "layer" in a model of two modules."""

    method: str
    kind: str
    spec: dict[str, Any]
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        make, inputs = MODULE_KINDS[self.kind]
        model: Any = nn.Sequential()
        model.add_module("layer", make())
        model.add_module("after", nn.Tanh())
        self.model: Any = model.to(self.dtype).eval().requires_grad_(False)
        self.frozen: Any = self.model.layer
        x = inputs()
        self.x = x.to(self.dtype) if x.is_floating_point() else x
        self.board = ForwardContext()
        self.unit: Any = "row" if isinstance(self.frozen, nn.Conv1d | nn.Conv2d) else "token"
        self.before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.plain = self.run(NO_ADAPTERS)

    @property
    def replaces(self) -> bool:
        """Whether the method's output is its own."""
        return get_method(self.method).replaces_base

    def put(self, name: str = "a", noise: float = 0.1, seed: int = 0) -> Adapter:
        """Attach an adapter in eval mode, as initialized (`noise` 0) or with random parameters."""
        spec = AdapterConfig(self.method, ("layer",), **{"rank": 2, "alpha": 4.0, **self.spec})
        adapter = attach(self.model, self.board, name, spec, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
        adapter.train(False)
        return adapter

    def run(self, segments: Segments, grad: bool = False) -> Tensor:
        """Return the model's output with the adapters of `segments`."""
        with torch.set_grad_enabled(grad), self.board.use(segments):
            return self.model(self.x)

    def delta(self, adapter: Adapter) -> AdapterLayer:
        """Return the adapter's layer."""
        return adapter.layers["layer"]

    def wide(self, adapter: Adapter) -> Adapter:
        """Convert the adapter to float64 and return it."""
        self.delta(adapter).double()
        return adapter


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
    adapter = case.wide(case.put())
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
    wide = MethodCase(case.method, case.kind, case.spec)  # the same numbers in float32
    wide.model.load_state_dict(
        {name: t.to(wide.before[name].dtype) for name, t in low.before.items()}
    )
    wide.x = low.x.float() if low.x.is_floating_point() else low.x
    load_state(
        wide.put(noise=0.0), {name: t.float() for name, t in tensors_of(adapter).items()}, "here"
    )
    torch.testing.assert_close(y.float(), wide.run(ON), rtol=0.05, atol=0.05)


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
    case.wide(case.put("a"))
    case.wide(case.put("b", seed=5))
    both = Segments(global_adapters=(("a", 1.0), ("b", 0.5)))
    if case.replaces:
        with raises(SettingsError, match="alone"):
            case.run(both)
        return
    base, a, b = case.run(NO_ADAPTERS), case.run(ON), case.run(Segments.on_all_tokens("b"))
    torch.testing.assert_close(case.run(both), a + 0.5 * (b - base), rtol=1e-9, atol=1e-9)


def rows_are_everywhere_on_their_tokens(case: MethodCase) -> None:
    """Check that a segment has the output of its adapter on all tokens, and others the base's."""
    case.wide(case.put())
    rows = Segments(spans=(Segment(0, 2, "a"), Segment(4, NUM_TOKENS, "a")), unit=case.unit)
    if case.replaces:
        with raises(SettingsError, match="everywhere"):
            case.run(rows)
        return
    whole, base, some = case.run(ON), case.run(NO_ADAPTERS), case.run(rows)
    torch.testing.assert_close(some[[0, 1, 4, 5]], whole[[0, 1, 4, 5]], rtol=1e-9, atol=1e-9)
    assert torch.equal(some[2:4], base[2:4])
    halves = Segments(
        spans=(Segment(0, 3, "a", 0.5), Segment(3, NUM_TOKENS, "a", 0.5)), unit=case.unit
    )
    torch.testing.assert_close(case.run(halves), case.run(HALF), rtol=1e-9, atol=1e-9)


def the_weight_scales_the_delta(case: MethodCase) -> None:
    """Check that the weight scales what the adapter adds."""
    case.model = nn.Sequential()
    case.model.add_module("layer", case.frozen)
    case.wide(case.put())
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
    adapter = case.wide(case.put())
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
    delta = case.delta(case.wide(case.put()))
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
    rows_are_everywhere_on_their_tokens,
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
    rows_are_everywhere_on_their_tokens,
    the_weight_scales_the_delta,
    gradients_are_finite_differences,
    shapes_on_disk_follow_the_rules,
    low_rank_factors_are_the_update,
]


@contextmanager
def raises(error: type[Exception], match: str = "") -> Iterator[None]:
    """Raise `AssertionError` unless the block raises `error` with `match` in its message."""
    message: str | None = None
    try:
        yield
    except error as caught:
        message = str(caught)
    assert message is not None, f"{error.__name__} was not raised"
    assert match in message, f"{match!r} is not in the message: {message}"


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
