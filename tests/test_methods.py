"""What one method alone promises: PEFT's numbers for LoRA and DoRA, the paper's for MoRA."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from afina.adapters.attach import attach
from afina.adapters.dora import DoRA
from afina.adapters.loading import load_adapter
from afina.adapters.mora import MoRA
from afina.adapters.saving import save_adapter, tensor_name, tensors_of
from afina.adapters.segments import Segments
from afina.adapters.target_module import TargetModule
from afina.errors import SettingsError
from afina.io.adapter_config import AdapterConfig
from afina.models.frozen import FrozenModel

ON = Segments.on_all_tokens("adapter")


class Net(nn.Module):
    """Tokens to an image to numbers: every layer kind that PEFT's LoRA knows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(17, 24)
        self.conv = nn.Conv2d(2, 6, 3, stride=2, padding=1)
        self.line = nn.Conv1d(6, 5, 3, padding=1, bias=False)
        self.gpt = Conv1D(12, 30)
        self.lin = nn.Linear(12, 9)
        self.out = nn.Linear(9, 4, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N) tokens to (N, 4)."""
        image = self.conv(self.emb(tokens).view(-1, 2, 3, 4)).flatten(2).tanh()  # (N, 6, 4)
        rows = self.line(image).tanh()  # (N, 5, 4)
        return self.out(
            self.lin(self.gpt(torch.cat([rows.flatten(1), rows.flatten(1)[:, :10]], 1))).tanh()
        )


LAYERS = ("emb", "conv", "line", "gpt", "lin", "out")
TOKENS = torch.tensor([3, 0, 16, 9, 9])


def net() -> FrozenModel:
    return FrozenModel(Net().eval().requires_grad_(False), "net")  # type: ignore[arg-type]


def noise(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def compare(ours: FrozenModel, adapter: Any, theirs: nn.Module) -> None:
    """Outputs and gradients within 1e-5."""
    with ours.forward_context.use(ON):
        y = ours.model(TOKENS)
    z = theirs(TOKENS)
    torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-5)
    assert (y - ours.model(TOKENS)).abs().max() > 1e-3
    y.square().sum().backward()
    z.square().sum().backward()
    theirs_grad = {
        name.replace(".default", "").replace("vector.weight", "vector"): p.grad
        for name, p in theirs.named_parameters()
        if p.grad is not None
    }
    ours_grad = {}
    for delta in adapter.layers.values():
        shapes = delta.tensor_shapes(delta.layer, adapter.config)
        for name, p in delta.named_parameters():
            on_disk = tensor_name(delta, name)
            ours_grad[on_disk] = p.grad.view(shapes.get(name, p.shape))
    assert ours_grad.keys() == theirs_grad.keys()
    for name, grad in ours_grad.items():
        torch.testing.assert_close(
            grad, theirs_grad[name], rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("layers", [LAYERS, *((name,) for name in LAYERS)], ids="-".join)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
def test_pefts_adapter_is_ours(
    tmp_path: Path, layers: tuple[str, ...], dora: bool, rslora: bool
) -> None:
    config = LoraConfig(
        r=3, lora_alpha=7, target_modules=list(layers), use_dora=dora, use_rslora=rslora
    )
    theirs = get_peft_model(Net().eval(), config).eval()
    noise(theirs)
    theirs.save_pretrained(tmp_path)
    base = net()
    adapter = load_adapter(tmp_path, base)
    assert adapter.config.method == ("dora" if dora else "lora")
    compare(base, adapter, theirs)


@pytest.mark.filterwarnings(
    "error:.*(missing|unexpected).*keys:UserWarning", "ignore:fan_in_fan_out"
)
@pytest.mark.parametrize("layers", [LAYERS, *((name,) for name in LAYERS)], ids="-".join)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_our_adapter_is_pefts(tmp_path: Path, layers: tuple[str, ...], method: str) -> None:
    base = net()
    adapter = attach(
        base.model,
        base.forward_context,
        "adapter",
        AdapterConfig(method, layers, rank=3, alpha=7.0),
    )
    noise(base.model)
    adapter.train(False)
    save_adapter(adapter, base, tmp_path)
    theirs = PeftModel.from_pretrained(Net().eval(), tmp_path, is_trainable=True).eval()  # type: ignore[arg-type]
    compare(base, adapter, theirs)


# ---- DoRA


def dora(width: int = 20, out: int = 30, dtype: torch.dtype = torch.float32) -> DoRA:
    torch.manual_seed(0)
    layer = TargetModule("l", nn.Linear(width, out, dtype=dtype).requires_grad_(False))
    return DoRA(layer, AdapterConfig("dora", ("l",), rank=4), torch.Generator().manual_seed(0))


@torch.no_grad()
def moved(delta: nn.Module) -> None:
    for parameter in delta.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))


def test_the_norm_is_that_of_the_matrix() -> None:
    delta = dora()
    assert torch.equal(delta.norm(), delta.m)
    moved(delta)
    matrix = delta.layer.weight + delta.scale * delta.b @ delta.a
    torch.testing.assert_close(delta.norm(), matrix.norm(dim=1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        delta.merged_weight(delta.layer.weight).norm(dim=1), delta.m, rtol=1e-6, atol=1e-6
    )


def test_the_norm_in_16_bits_is_computed_in_float32() -> None:
    delta = dora(dtype=torch.bfloat16)
    moved(delta)
    matrix = delta.layer.weight.float() + delta.scale * delta.b @ delta.a
    torch.testing.assert_close(delta.norm(), matrix.norm(dim=1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("learns", [False, True])
def test_the_norm_follows_the_optimizer(fused: bool, learns: bool) -> None:
    """A fused optimizer changes parameters without counting a version: the norm must not be an old one."""
    delta = dora()
    delta.train(learns)
    optimizer = torch.optim.AdamW(delta.parameters(), lr=0.1, fused=fused)
    x, y0 = torch.randn(3, 20), torch.randn(3, 30)
    for _ in range(3):
        delta(x, y0, 1.0).sum().backward()
        optimizer.step()
        with torch.no_grad():
            matrix = delta.layer.weight + delta.scale * delta.b @ delta.a
            torch.testing.assert_close(delta.norm(), matrix.norm(dim=1), rtol=1e-6, atol=1e-6)
            assert (delta.norm() is delta.norm()) == (not learns)  # kept only where nothing learns


def test_the_norm_is_forgotten_between_modes() -> None:
    """Also where an optimizer steps after a last look without gradients."""
    delta = dora()
    optimizer = torch.optim.AdamW(delta.parameters(), lr=0.1, fused=True)
    delta(torch.randn(3, 20), torch.randn(3, 30), 1.0).sum().backward()
    delta.train(False)
    with torch.no_grad():
        before = delta.norm()
        delta.train(True)
        optimizer.step()
        delta.train(False)
        assert not torch.equal(delta.norm(), before)


def test_the_norm_follows_the_base() -> None:
    delta = dora()
    delta.train(False)
    with torch.no_grad():
        before = delta.norm()
        delta.layer.module.to(torch.bfloat16)
        rounded = delta.norm()
        assert not torch.equal(before, rounded)
        torch.testing.assert_close(rounded, delta.layer.weight.float().norm(dim=1))


def test_a_row_of_zeros_stays_finite() -> None:
    layer = TargetModule("l", nn.Linear(5, 3).requires_grad_(False))
    with torch.no_grad():
        layer.module.weight[1] = 0  # type: ignore[index,operator]
    delta = DoRA(layer, AdapterConfig("dora", ("l",), rank=2), torch.Generator())
    x = torch.randn(4, 5)
    y0 = layer.module(x)
    y = delta(x, y0, 1.0)
    assert torch.equal(y, y0)
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in delta.parameters())
    moved(delta)
    assert delta(x, y0, 1.0).isfinite().all()


def test_no_activation_is_copied_in_float32() -> None:
    delta = dora(64, 96, torch.bfloat16)
    x, y0 = torch.randn(50, 64, dtype=torch.bfloat16), torch.randn(50, 96, dtype=torch.bfloat16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        delta(x, y0, 1.0)
    assert not [t for t in kept if t.dtype == torch.float32 and 50 in t.shape]
    assert sum(t.numel() for t in kept if 50 in t.shape) <= x.numel() + y0.numel() + 50 * 4


# ---- MoRA: the formulas of the module's docstring, entry by entry, written apart


def slow_dense(m: Tensor, out: int, width: int, operator: str, grouping: str = "strided") -> Tensor:
    """(out, width) float64: what the operator makes of M, by pushing each unit vector through its steps."""
    q = m.shape[0]
    columns = []
    for i in range(width):
        x = torch.zeros(width, dtype=torch.float64)
        x[i] = 1
        columns.append(slow_forward(m, x, out, q, operator, grouping))
    return torch.stack(columns, 1)


def group(index: int, count: int, q: int, grouping: str) -> int:
    if grouping == "strided":
        return index % q
    sizes = [count // q + (1 if g < count % q else 0) for g in range(q)]
    ends = [sum(sizes[: g + 1]) for g in range(q)]
    return next(g for g in range(q) if index < ends[g])


def slow_forward(m: Tensor, x: Tensor, out: int, q: int, operator: str, grouping: str) -> Tensor:
    width = len(x)
    y = torch.zeros(out, dtype=torch.float64)
    if operator == "truncation":
        for o in range(min(out, q)):
            y[o] = sum(m[o, i] * x[i] for i in range(min(width, q)))
    elif operator == "sharing":
        u = torch.zeros(q, dtype=torch.float64)
        for i in range(width):
            u[group(i, width, q, grouping)] += x[i]
        for o in range(out):
            y[o] = (m @ u)[group(o, out, q, grouping)]
    else:
        blocks_in, blocks_out = math.ceil(width / q), math.ceil(out / q)
        results = []
        for block in range(blocks_in):
            v = torch.zeros(q, dtype=torch.float64)
            for j, value in enumerate(x[block * q : (block + 1) * q]):
                v[j] = value
            if operator == "rotation":
                turned = torch.zeros(q, dtype=torch.float64)
                for j in range(q // 2):
                    angle = block * 10000 ** (-2 * j / q)
                    a, b = v[j], v[j + q // 2]
                    turned[j] = math.cos(angle) * a - math.sin(angle) * b
                    turned[j + q // 2] = math.sin(angle) * a + math.cos(angle) * b
                v = turned
            results.append(m @ v)
        for o in range(out):
            if blocks_out >= blocks_in:
                y[o] = results[(o // q) % blocks_in][o % q]
            else:
                y[o] = sum(results[b][o % q] for b in range(blocks_in) if b % blocks_out == o // q)
    return y


SHAPES = [
    (24, 24, 2),
    (40, 10, 1),
    (10, 40, 1),
    (37, 11, 2),
    (11, 37, 3),
    (13, 13, 40),
    (9, 30, 60),
    (30, 9, 60),
    (50, 23, 3),
]


@pytest.mark.parametrize(("width", "out", "rank"), SHAPES)
@pytest.mark.parametrize(
    ("operator", "grouping"),
    [
        ("truncation", "strided"),
        ("sharing", "strided"),
        ("sharing", "adjacent"),
        ("decoupling", "strided"),
        ("rotation", "strided"),
    ],
)
def test_mora_is_its_formula(width: int, out: int, rank: int, operator: str, grouping: str) -> None:
    torch.manual_seed(0)
    layer = TargetModule("l", nn.Linear(width, out, bias=False).double().requires_grad_(False))
    spec = AdapterConfig(
        "mora", ("l",), rank=rank, method_settings={"operator": operator, "grouping": grouping}
    )
    delta = MoRA(layer, spec, torch.Generator())
    size = math.floor(math.sqrt((width + out) * rank))
    assert delta.size == (size - size % 2 if operator == "rotation" else size)
    moved(delta.double())
    expected = slow_dense(delta.m.detach(), out, width, operator, grouping)
    torch.testing.assert_close(delta.dense(), expected, rtol=0, atol=1e-6)
    y = delta(
        torch.eye(width, dtype=torch.float64), torch.zeros(width, out, dtype=torch.float64), 1.0
    )
    torch.testing.assert_close(y.T, delta.dense(), rtol=0, atol=1e-12)
    if operator != "truncation":
        assert expected.abs().amax(0).min() > 0  # every input is read
        assert expected.abs().amax(1).min() > 0  # every output is written


@pytest.mark.parametrize("operator", ["truncation", "sharing", "decoupling", "rotation"])
def test_mora_in_float32_is_its_dense_delta(operator: str) -> None:
    layer = TargetModule("l", nn.Linear(300, 170, bias=False).requires_grad_(False))
    delta = MoRA(
        layer,
        AdapterConfig("mora", ("l",), rank=4, method_settings={"operator": operator}),
        torch.Generator(),
    )
    moved(delta)
    x = torch.randn(20, 300) / 300**0.5
    y = delta(x, torch.zeros(20, 170), 1.0)
    torch.testing.assert_close(y, x @ delta.dense().T, rtol=0, atol=1e-6)


@pytest.mark.parametrize("operator", ["truncation", "sharing", "decoupling", "rotation"])
@pytest.mark.parametrize("rank", [1, 4, 90])
def test_mora_of_an_index_is_that_of_its_one_hot_vector(operator: str, rank: int) -> None:
    for grouping in ("strided", "adjacent"):
        layer = TargetModule("l", nn.Embedding(41, 12).requires_grad_(False))
        spec = AdapterConfig(
            "mora", ("l",), rank=rank, method_settings={"operator": operator, "grouping": grouping}
        )
        delta = MoRA(layer, spec, torch.Generator())
        moved(delta)
        y = delta(torch.arange(41), torch.zeros(41, 12), 1.0)
        torch.testing.assert_close(y.T, delta.dense(), rtol=0, atol=1e-6)


def test_moras_choices() -> None:
    layer = TargetModule("l", nn.Linear(4096, 4096, device="meta"))
    assert (
        MoRA.num_parameters(layer, AdapterConfig("mora", ("l",), rank=8))
        == 256**2
        == 8 * (4096 + 4096)
    )
    assert (
        MoRA.num_parameters(
            TargetModule("l", nn.Linear(11008, 4096, device="meta")),
            AdapterConfig("mora", ("l",), rank=8),
        )
        == 346**2
    )
    layer = TargetModule("l", nn.Linear(64, 64))
    small, large = (
        MoRA(layer, AdapterConfig("mora", ("l",), rank=r), torch.Generator()) for r in (8, 128)
    )
    assert (small.operator, large.operator, small.scale) == ("rotation", "sharing", 1.0)
    options: dict[str, Any] = {"use_alpha": True}
    assert (
        MoRA(
            layer,
            AdapterConfig("mora", ("l",), rank=8, alpha=24.0, method_settings=options),
            torch.Generator(),
        ).scale
        == 3.0
    )
    base = net()
    for method in ("lora", "mora"):
        with pytest.raises(SettingsError, match=r"did you mean|known"):
            attach(
                base.model,
                base.forward_context,
                "b",
                AdapterConfig(method, ("lin",), method_settings={"operater": "sharing"}),
            )
    for wrong in ({"operator": "rotate"}, {"grouping": "stride"}):
        with pytest.raises(SettingsError, match="did you mean"):
            MoRA(layer, AdapterConfig("mora", ("l",), method_settings=wrong), torch.Generator())


def test_moras_rank_is_high() -> None:
    """Of the same count of numbers: r for LoRA, q for sharing, full for decoupling and rotation."""
    layer = TargetModule("l", nn.Linear(64, 64, bias=False))
    ranks = {}
    for operator in ("truncation", "sharing", "decoupling", "rotation"):
        delta = MoRA(
            layer,
            AdapterConfig("mora", ("l",), rank=2, method_settings={"operator": operator}),
            torch.Generator(),
        )
        moved(delta)
        ranks[operator] = int(torch.linalg.matrix_rank(delta.dense().double()))
    assert ranks == {"truncation": 16, "sharing": 16, "decoupling": 64, "rotation": 64}


def test_mora_on_disk(tmp_path: Path) -> None:
    base = net()
    adapter = attach(
        base.model,
        base.forward_context,
        "adapter",
        AdapterConfig("mora", ("lin", "emb"), rank=2, method_settings={"operator": "decoupling"}),
    )
    noise(base.model)
    save_adapter(adapter, base, tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
        "base_model.model.lin.mora_M.weight",
        "base_model.model.emb.mora_M.weight",
    }
    other = net()
    loaded = load_adapter(tmp_path, other)
    assert loaded.config == adapter.config
    assert all(
        torch.equal(a, b)
        for a, b in zip(tensors_of(adapter).values(), tensors_of(loaded).values(), strict=True)
    )
