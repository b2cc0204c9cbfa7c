"""One set of tests over every method x layer kind: what a delta promises, whoever wrote it.

The methods are those that `afina.adapters.registry` has: a new one is tested without a line here.
"""

import inspect
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from afina.adapters.attach import attach, detach, frozen_module
from afina.adapters.base import AdapterLayer
from afina.adapters.formats import FORMATS_FILE, format_of, write_formats
from afina.adapters.loading import load_adapter
from afina.adapters.registry import METHOD_MODULES, get_method, methods, registered_methods
from afina.adapters.saving import save_adapter
from afina.audit.base_files import BaseFiles
from afina.audit.file_gate import check_files
from afina.audit.report import Gate
from afina.io.adapter_config import AdapterConfig
from afina.io.adapter_formats import adapter_formats
from afina.merging.adapter_info import show
from afina.merging.combine import combine
from afina.merging.registry import MERGE_METHODS
from afina.models.causal_lm import CausalLM
from afina.models.loading import load_base
from afina.settings.groups import MethodSettings, settings_groups
from afina.testing import check_merge_method, check_method
from afina.testing.method_case import MODULE_KINDS, MethodCase
from afina.testing.methods import METHOD_PROMISES, check_promise

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
        for kind in MODULE_KINDS
    ]


@pytest.mark.parametrize("promise", METHOD_PROMISES, ids=lambda promise: promise.__name__)
@pytest.mark.parametrize(("name", "kind", "spec"), cases())
def test_promise(
    promise: Callable[[MethodCase], None], name: str, kind: str, spec: dict[str, Any]
) -> None:
    check_promise(promise, name, kind, spec)


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
    helpers = {"add_restart_delta", "merge_restart_delta", "inference_weights", "train"}
    defaults = {"as_low_rank", "names_on_disk", "tensor_shapes", "kernel_weights", "supports"}
    defaults |= {"expert_factors"}
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


@pytest.mark.slow
def test_methods_of_an_installed_package_keep_the_contract(
    plugin: tuple[str, ...], tiny: Path, tmp_path: Path
) -> None:
    for name in plugin:
        assert name in registered_methods()
        check_method(get_method(name))
        (tmp_path / name).mkdir()
        test_on_a_model_saved_is_loaded(tiny, tmp_path / name, name)


def test_formats_file_equals_the_classes() -> None:
    own = {name: method for name, method in registered_methods().items() if name in METHOD_MODULES}
    written = json.loads(FORMATS_FILE.read_text(encoding="utf-8"))
    assert written == {name: format_of(name, method).to_json() for name, method in own.items()}


@pytest.mark.parametrize("name", list(MERGE_METHODS))
def test_merge_methods_keep_their_promises(name: str) -> None:
    check_merge_method(name)


def test_a_broken_method_does_not_pass_the_check() -> None:
    class Shifted(get_method("lora")):  # type: ignore[misc]
        """LoRA whose merged weight is not what its forward adds."""

        def merged_weight(self, weight: torch.Tensor) -> torch.Tensor:
            return super().merged_weight(weight) + 1e-3

    try:
        with pytest.raises(AssertionError, match="shifted on linear-down: merged_is_adapted"):
            check_method(Shifted)
    finally:
        methods._entries.pop("shifted")


def test_each_method_declares_its_settings_group() -> None:
    for name, method in registered_methods().items():
        group = settings_groups.get(name) if name in settings_groups else MethodSettings
        assert method.settings_class is group


def check_files_of(name: str, base_folder: Path, folder: Path) -> None:
    """Save an adapter of the method, then audit its files, show it and combine it with itself."""
    base: CausalLM = load_base(str(base_folder))
    path = "model.layers.1.mlp.down_proj"
    adapter = attach(base.model, base.forward_context, "a", AdapterConfig(name, (path,), rank=2))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    digest = save_adapter(adapter, base, folder / "a")
    gate = Gate("files")
    check_files(folder / "a", BaseFiles(base_folder), gate)
    assert not gate.blocked, gate.findings
    facts = show(folder / "a")
    assert (facts["method"], facts["hash"]) == (name, digest)
    if adapter.layers[path].replaces_base:
        return  # of trained weights there is no weighted sum
    settings = {"base": str(base_folder), "output_dir": folder / "half", "merge_method": "svd"}
    combine([f"{folder / 'a'}:0.5"], rank=48, **settings)
    half = load_adapter(folder / "half", load_base(str(base_folder)))
    weight = adapter.layers[path].layer.weight.double()
    update = adapter.layers[path].double().merged_weight(weight) - weight
    factors = half.layers[path].double().as_low_rank()
    assert factors is not None
    torch.testing.assert_close(factors[0] @ factors[1], 0.5 * update, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", list(registered_methods()))
def test_files_pass_audit_show_and_combine(name: str, tiny: Path, tmp_path: Path) -> None:
    check_files_of(name, tiny, tmp_path)


@pytest.mark.slow
def test_files_of_an_installed_package_pass_audit_show_and_combine(
    plugin: tuple[str, ...], tiny: Path, tmp_path: Path
) -> None:
    for name in plugin:
        check_files_of(name, tiny, tmp_path / name)
