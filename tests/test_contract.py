"""One set of tests over every method x layer kind: what a delta promises, whoever wrote it.

The methods are those that `afina.adapters.registry` has: a new one is tested without a line here.
"""

import copy
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from afina.adapters.attach import Adapter, attach, detach, frozen_module
from afina.adapters.base import AdapterConfig, AdapterLayer
from afina.adapters.formats import FORMATS_FILE, format_of, write_formats
from afina.adapters.loading import load_adapter, load_state, save_adapter, tensors_of
from afina.adapters.registry import METHOD_MODULES, get_method, methods, registered_methods
from afina.adapters.segments import NO_ADAPTERS, ForwardContext, Segment, Segments
from afina.adapters.target_module import TargetModule, as_stored
from afina.errors import AfinaError, SettingsError
from afina.io.adapter_formats import adapter_formats
from afina.models.causal_lm import CausalLM
from afina.models.loading import load_base
from afina.models.nf4 import NF4Linear

TOKENS = 6


def tokens(width: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(TOKENS, width)


# layer kind -> (the frozen layer, an input of it); inputs of convolutions are rows of a batch, the others tokens
KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear-narrow": (lambda: nn.Linear(23, 6), tokens(23)),
    "linear-wide": (lambda: nn.Linear(7, 20, bias=False), tokens(7)),
    "linear-square": (lambda: nn.Linear(11, 11), tokens(11)),
    "conv1d-gpt2": (lambda: Conv1D(13, 9), tokens(9)),
    "conv1d": (lambda: nn.Conv1d(3, 8, 3, stride=2, padding=1), lambda: torch.randn(TOKENS, 3, 9)),
    "conv2d": (
        lambda: nn.Conv2d(2, 9, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2)),
        lambda: torch.randn(TOKENS, 2, 6, 5),
    ),
    "conv2d-same": (
        lambda: nn.Conv2d(4, 3, 3, padding="same", bias=False),
        lambda: torch.randn(TOKENS, 4, 4, 3),
    ),
    "embedding": (lambda: nn.Embedding(19, 10), lambda: torch.tensor([0, 18, 7, 7, 12, 3])),
    "nf4": (lambda: NF4Linear.from_linear(nn.Linear(70, 9)), tokens(70)),
}
# choices within a method that are worth the same tests; a method without an entry is tested as it comes
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "lora": [{}, {"scaling": "rslora"}],
    "mora": [
        {"method_settings": {"operator": "truncation"}},
        {"method_settings": {"operator": "sharing", "grouping": "strided"}},
        {"method_settings": {"operator": "sharing", "grouping": "adjacent", "use_alpha": True}},
        {"method_settings": {"operator": "decoupling"}},
        {"method_settings": {"operator": "rotation"}},
        {
            "method_settings": {"operator": "rotation"},
            "rank": 40,
        },  # a single block, M larger than the layer
        {"method_settings": {"operator": "sharing", "grouping": "adjacent"}, "rank": 40},
    ],
}


@dataclass
class Case:
    """A method on a layer of one kind, at "layer" in a model of a few modules."""

    method: str
    kind: str
    spec: dict[str, Any]
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        make, inputs = KINDS[self.kind]
        model = nn.Sequential()
        model.add_module("layer", make())
        model.add_module("after", nn.Tanh())
        self.model = model.to(self.dtype).eval().requires_grad_(False)
        self.frozen = self.model.layer
        x = inputs()
        self.x = x.to(self.dtype) if x.is_floating_point() else x
        self.board = ForwardContext()
        self.unit: Any = "row" if isinstance(self.frozen, nn.Conv1d | nn.Conv2d) else "token"
        self.before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.plain = self.run(NO_ADAPTERS)

    @property
    def replaces(self) -> bool:
        return get_method(self.method).replaces_base

    def put(self, name: str = "a", noise: float = 0.1, seed: int = 0) -> Adapter:
        """An adapter in eval mode, as it starts (`noise` 0) or somewhere else."""
        spec = AdapterConfig(self.method, ("layer",), **{"rank": 2, "alpha": 4.0, **self.spec})
        adapter = attach(self.model, self.board, name, spec, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
        adapter.train(False)
        return adapter

    def run(self, segments: Segments, grad: bool = False) -> Tensor:
        with torch.set_grad_enabled(grad), self.board.use(segments):
            return self.model(self.x)

    def delta(self, adapter: Adapter) -> AdapterLayer:
        return adapter.layers["layer"]

    def wide(self, adapter: Adapter) -> Adapter:
        """The adapter in float64."""
        self.delta(adapter).double()
        return adapter


ON, HALF = Segments.on_all_tokens("a"), Segments.on_all_tokens("a", 0.5)


# ---- what a delta promises


def identity_at_the_start(case: Case) -> None:
    case.put(noise=0.0)
    assert torch.equal(case.run(ON), case.plain)


def only_the_declared_parameters_train(case: Case) -> None:
    adapter = case.put(noise=0.0)
    case.run(ON, grad=True).square().sum().backward()
    delta = case.delta(adapter)
    assert {name for name, _ in delta.named_parameters()} == set(delta.names_on_disk(delta.layer))
    gradients = [parameter.grad for parameter in adapter.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.abs().max() > 0 for gradient in gradients)
    own = {id(parameter) for parameter in adapter.parameters()}
    assert not [
        name for name, p in case.model.named_parameters() if p.requires_grad and id(p) not in own
    ]
    assert all(parameter.grad is None for parameter in case.frozen.parameters())


def count_is_the_formula(case: Case) -> None:
    adapter = case.put()
    layer = TargetModule("layer", case.frozen)
    assert adapter.num_parameters() == get_method(case.method).num_parameters(layer, adapter.config)
    assert adapter.num_parameters() == sum(
        p.numel() for p in case.model.parameters() if p.requires_grad
    )
    assert all(p.device == layer.device for p in adapter.parameters())


def off_is_the_base(case: Case) -> None:
    case.put()
    assert not torch.equal(case.run(ON), case.plain)
    assert torch.equal(case.run(NO_ADAPTERS), case.plain)


def merged_is_adapted(case: Case) -> None:
    adapter = case.wide(case.put())
    adapted = case.run(ON)
    merged = nn.Sequential(taken_in(case, adapter), case.model.after)
    torch.testing.assert_close(merged(case.x), adapted, rtol=1e-9, atol=1e-9)


def taken_in(case: Case, adapter: Adapter) -> nn.Module:
    """A copy of the frozen layer with the adapter in its weight."""
    delta, frozen = case.delta(adapter), case.frozen
    if isinstance(frozen, NF4Linear):
        plain = nn.Linear(
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


def detaching_restores_bit_for_bit(case: Case) -> None:
    adapter = case.put()
    if not isinstance(case.frozen, NF4Linear):
        taken_in(case, adapter)
    case.run(ON, grad=True).sum().backward()
    detach(case.model, adapter)
    assert case.model.layer is case.frozen
    after = case.model.state_dict()
    assert list(after) == list(case.before)
    assert all(torch.equal(after[name], case.before[name]) for name in after)
    assert torch.equal(case.run(NO_ADAPTERS), case.plain)


def saved_is_loaded(case: Case) -> None:
    tensors = tensors_of(case.put())
    adapted = case.run(ON)
    other = Case(case.method, case.kind, case.spec, case.dtype)
    load_state(other.put(noise=0.0, seed=7), tensors, "here")
    assert torch.equal(other.run(ON), adapted)


def a_base_in_16_bits_runs(case: Case) -> None:
    low = Case(case.method, case.kind, case.spec, torch.bfloat16)
    adapter = low.put()
    if not case.replaces:
        assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    y = low.run(ON, grad=True)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in adapter.parameters())
    wide = Case(case.method, case.kind, case.spec)  # the same numbers in float32
    wide.model.load_state_dict(
        {name: t.to(wide.before[name].dtype) for name, t in low.before.items()}
    )
    wide.x = low.x.float() if low.x.is_floating_point() else low.x
    load_state(
        wide.put(noise=0.0), {name: t.float() for name, t in tensors_of(adapter).items()}, "here"
    )
    torch.testing.assert_close(y.float(), wide.run(ON), rtol=0.05, atol=0.05)


def two_adapters_do_not_touch_each_other(case: Case) -> None:
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


def two_adapters_add_up(case: Case) -> None:
    case.model = nn.Sequential()
    case.model.add_module("layer", case.frozen)
    case.wide(case.put("a"))
    case.wide(case.put("b", seed=5))
    both = Segments(global_adapters=(("a", 1.0), ("b", 0.5)))
    if case.replaces:
        with pytest.raises(SettingsError, match="alone"):
            case.run(both)
        return
    base, a, b = case.run(NO_ADAPTERS), case.run(ON), case.run(Segments.on_all_tokens("b"))
    torch.testing.assert_close(case.run(both), a + 0.5 * (b - base), rtol=1e-9, atol=1e-9)


def rows_are_everywhere_on_their_tokens(case: Case) -> None:
    case.wide(case.put())
    rows = Segments(spans=(Segment(0, 2, "a"), Segment(4, TOKENS, "a")), unit=case.unit)
    if case.replaces:
        with pytest.raises(SettingsError, match="everywhere"):
            case.run(rows)
        return
    whole, base, some = case.run(ON), case.run(NO_ADAPTERS), case.run(rows)
    torch.testing.assert_close(some[[0, 1, 4, 5]], whole[[0, 1, 4, 5]], rtol=1e-9, atol=1e-9)
    assert torch.equal(some[2:4], base[2:4])
    halves = Segments(spans=(Segment(0, 3, "a", 0.5), Segment(3, TOKENS, "a", 0.5)), unit=case.unit)
    torch.testing.assert_close(case.run(halves), case.run(HALF), rtol=1e-9, atol=1e-9)


def the_weight_scales_the_delta(case: Case) -> None:
    case.model = nn.Sequential()
    case.model.add_module("layer", case.frozen)
    case.wide(case.put())
    if case.replaces:
        with pytest.raises(SettingsError, match="weight 1"):
            case.run(HALF)
        return
    base = case.run(NO_ADAPTERS)
    torch.testing.assert_close(
        case.run(Segments.on_all_tokens("a", -1.5)) - base,
        -1.5 * (case.run(ON) - base),
        rtol=1e-9,
        atol=1e-9,
    )


def gradients_are_finite_differences(case: Case) -> None:
    adapter = case.wide(case.put())
    delta = case.delta(adapter)
    for name in delta.no_grad_terms:
        value = getattr(delta, name)()
        setattr(delta, name, lambda value=value: value)
    if case.x.is_floating_point():
        case.x.requires_grad_(True)
    inputs = [*adapter.parameters(), *([case.x] if case.x.is_floating_point() else [])]
    torch.autograd.gradcheck(lambda *_: case.run(ON, grad=True), inputs, fast_mode=True)


def shapes_on_disk_follow_the_rules(case: Case) -> None:
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


def low_rank_factors_are_the_update(case: Case) -> None:
    delta = case.delta(case.wide(case.put()))
    factors = delta.as_low_rank()
    if factors is None:
        assert delta.low_rank_tensors is None
        return
    b, a = factors
    weight = torch.zeros(delta.layer.out_features, delta.layer.in_features, dtype=torch.float64)
    torch.testing.assert_close(b @ a, delta.merged_weight(weight), rtol=1e-9, atol=1e-9)


IN_FLOAT64 = {
    low_rank_factors_are_the_update,
    merged_is_adapted,
    two_adapters_add_up,
    rows_are_everywhere_on_their_tokens,
    the_weight_scales_the_delta,
    gradients_are_finite_differences,
}
PROMISES = [
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


def keep_all(promise: Callable[[Case], None], name: str, kind: str, spec: dict[str, Any]) -> None:
    """Test one promise, unless the method refuses the layer kind, and says why."""
    case = Case(name, kind, spec, torch.float64 if promise in IN_FLOAT64 else torch.float32)
    if kind == "nf4" and case.replaces:
        with pytest.raises(AfinaError):
            case.put()
        return
    promise(case)


def cases() -> list[Any]:
    return [
        pytest.param(
            name,
            kind,
            spec,
            id="-".join([name, *map(str, spec.get("method_settings", spec).values()), kind]),
        )
        for name in registered_methods()
        for spec in VARIANTS.get(name, [{}])
        for kind in KINDS
    ]


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
@pytest.mark.parametrize(("name", "kind", "spec"), cases())
def test_promise(
    promise: Callable[[Case], None], name: str, kind: str, spec: dict[str, Any]
) -> None:
    keep_all(promise, name, kind, spec)


@pytest.mark.parametrize("name", list(registered_methods()))
def test_on_a_model_saved_is_loaded(tiny: Path, tmp_path: Path, name: str) -> None:
    base: CausalLM = load_base(str(tiny))
    path = "model.layers.1.mlp.down_proj"
    adapter = attach(base.model, base.forward_context, "a", AdapterConfig(name, (path,), rank=2))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    digest = save_adapter(adapter, base, tmp_path / "a")
    other = load_base(str(tiny))
    loaded = load_adapter(tmp_path / "a", other)
    assert loaded.config == adapter.config
    assert save_adapter(loaded, other, tmp_path / "b") == digest
    assert all(
        torch.equal(p, q) for p, q in zip(adapter.parameters(), loaded.parameters(), strict=True)
    )
    detach(other.model, loaded)
    assert frozen_module(other.model, path) is other.model.get_submodule(path)


@pytest.mark.parametrize("name", list(registered_methods()))
def test_a_method_is_one_short_file(name: str) -> None:
    file = Path(sys.modules[get_method(name).__module__].__file__ or "")
    assert len(file.read_text().splitlines()) <= 250
    written = {
        key
        for key, value in vars(AdapterLayer).items()
        if inspect.isroutine(value) or isinstance(value, classmethod)
    }
    # helpers that no method replaces, and defaults that follow from the class attributes
    helpers = {"add_restart_delta", "merge_restart_delta"}
    defaults = {"as_low_rank", "names_on_disk", "tensor_shapes"}
    assert len(written - helpers - defaults) <= 6


PLUGIN = '''"""Two methods of another package: one that scales outputs, one with computed factors."""

import torch
from torch import nn

from afina.adapters.base import AdapterLayer
from afina.adapters.registry import register_method


@register_method("scaled")
class Scaled(AdapterLayer):
    """D(x, y0) = factor * (y0 - bias)."""

    tensor_names = {"factor": "factor"}
    shape_rules = {"factor": "(outputs,)"}

    def __init__(self, layer, spec, generator):
        super().__init__(layer, spec, generator)
        self.factor = nn.Parameter(torch.zeros(layer.out_features, device=layer.device))

    def forward(self, x, y0, weight):
        bias = getattr(self.layer.module, "bias", None)
        return y0 + weight * self.factor.to(y0.dtype) * (y0 if bias is None else y0 - bias)

    def merged_weight(self, weight):
        return (1 + self.factor.to(weight))[:, None] * weight

    @classmethod
    def num_parameters(cls, layer, spec):
        return layer.out_features


@register_method("vera")
class VeRA(AdapterLayer):
    """D(x) = s * diag(b) B diag(d) A x, A and B random and fixed (arXiv 2310.11454)."""

    tensor_names = {"d": "vera_lambda_d", "b": "vera_lambda_b"}
    shape_rules = {"d": "(rank,)", "b": "(outputs,)"}

    def __init__(self, layer, spec, generator):
        super().__init__(layer, spec, generator)
        rank, fixed = spec.rank_of(layer.path), torch.Generator().manual_seed(0)
        self.scale = spec.scale_of(layer.path)
        for name, shape in (("down", (rank, layer.in_features)), ("up", (layer.out_features, rank))):
            random = torch.randn(shape, generator=fixed).to(layer.device)
            self.register_buffer(name, random, persistent=False)
        self.d = nn.Parameter(torch.full((rank,), 0.1, device=layer.device))
        self.b = nn.Parameter(torch.zeros(layer.out_features, device=layer.device))

    def as_low_rank(self):
        return self.scale * self.b[:, None] * self.up, self.d[:, None] * self.down

    def forward(self, x, y0, weight):
        b, a = (t.to(y0.dtype) for t in self.as_low_rank())
        return y0 + weight * (self.layer.project(x, a) @ b.T)

    def merged_weight(self, weight):
        b, a = self.as_low_rank()
        return weight + b.to(weight) @ a.to(weight)

    @classmethod
    def num_parameters(cls, layer, spec):
        return spec.rank_of(layer.path) + layer.out_features
'''
ENTRY_POINTS = """[afina.methods]
scaled = afina_plugin.methods:Scaled
vera = afina_plugin.methods:VeRA

[afina.formats]
plugin = afina_plugin:formats.json
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ...]]:
    """Two methods of an installed package, with the formats of their files; returns their names."""
    package, names = tmp_path / "site" / "afina_plugin", ("scaled", "vera")
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "methods.py").write_text(PLUGIN)
    about = package.with_name("afina_plugin-0.1.dist-info")
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: afina-plugin\nVersion: 0.1\n")
    (about / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setattr(methods, "_plugins", None)
    write_formats(list(names), package / "formats.json")
    adapter_formats.cache_clear()
    yield names
    adapter_formats.cache_clear()
    for name in names:
        methods._entries.pop(name, None)
    for module in ("afina_plugin.methods", "afina_plugin"):
        sys.modules.pop(module, None)


def test_methods_of_an_installed_package_keep_the_contract(
    plugin: tuple[str, ...], tiny: Path, tmp_path: Path
) -> None:
    for name in plugin:
        assert name in registered_methods()
        for promise in PROMISES:
            for kind in KINDS:
                keep_all(promise, name, kind, {})
        (tmp_path / name).mkdir()
        test_on_a_model_saved_is_loaded(tiny, tmp_path / name, name)


def test_formats_file_equals_the_classes() -> None:
    own = {name: method for name, method in registered_methods().items() if name in METHOD_MODULES}
    written = json.loads(FORMATS_FILE.read_text(encoding="utf-8"))
    assert written == {name: format_of(name, method).to_json() for name, method in own.items()}
