"""The kernels that serving calls: attention over pages, products of few rows, adapters in a decoding step."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from afina.adapters.attach import Adapter, attach, detach
from afina.adapters.segments import ForwardContext, Segment, Segments
from afina.io.adapter_config import AdapterConfig
from afina.kernels import paged_attention as paged
from afina.kernels.dispatch import kernels
from afina.kernels.lora import FusedLoRA, grouped_lora
from afina.kernels.paged_attention import MAX_FEW_QUERIES, paged_attention, paged_write
from afina.models.fast_llama import FastLinear, install_fast_modules
from afina.models.nf4 import NF4Linear
from afina.training.setup.optimizer import AdapterOptimizer

KINDS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
]  # of queries, of pages
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6}
# page_size, kv_heads, heads of queries for each, head_dim, pasts, new tokens, window, softcap
CASES = {
    "decode": (16, 3, 3, 64, [0, 40, 1000, 15, 16], [1, 1, 1, 1, 1], None, None),
    "mixed": (
        16,
        2,
        4,
        32,
        [0, 700, 1, 12],
        [MAX_FEW_QUERIES, 1, MAX_FEW_QUERIES + 1, 40],
        None,
        None,
    ),
    "odd pages and heads": (7, 1, 5, 33, [3, 100], [2, 9], None, None),
    "one head each, wide": (32, 4, 1, 80, [5, 0], [0, 3], None, None),
    "window": (5, 2, 2, 8, [0, 1, 300, 300], [1, MAX_FEW_QUERIES, 3, 30], 9, None),
    "softcap": (16, 1, 2, 48, [0, 77, 5], [30, 2, 1], None, 3.0),
    "both": (16, 1, 2, 48, [0, 77, 200], [30, 2, 1], 20, 3.0),
    "nobody": (16, 1, 2, 16, [], [], None, None),
}


@pytest.fixture(params=kernels.available_isas or ["reference"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this machine in turn."""
    before = kernels.isa
    if kernels.library:
        kernels.set_isa(request.param)
    yield request.param
    if kernels.library:
        kernels.set_isa(before)


class Pool:
    """A pool of two layers whose pages lie anywhere, what was written into the second, and queries for it."""

    def __init__(
        self,
        page_size: int,
        kv_heads: int,
        group: int,
        width: int,
        pasts: list[int],
        new: list[int],
        kind: Any,
    ) -> None:
        self.pasts, totals = pasts, [past + n for past, n in zip(pasts, new, strict=True)]
        counts = [-(-total // page_size) for total in totals]
        free = torch.randperm(sum(counts) + 2).tolist()
        self.kv = torch.full(
            (len(free), 2, 2, kv_heads, page_size, width), float("nan"), dtype=kind[1]
        )[:, 1]
        self.tables = [[free.pop() for _ in range(count)] for count in counts]
        self.keys = [torch.randn(2, total, kv_heads, width).to(kind[1]) for total in totals]
        places = [
            [pages[i // page_size] * page_size + i % page_size for i in range(total)]
            for pages, total in zip(self.tables, totals, strict=True)
        ]
        for pair, slots in zip(self.keys, places, strict=True):
            paged_write(pair[0], pair[1], self.kv, torch.tensor(slots, dtype=torch.int64))
        self.bounds = [sum(new[:i]) for i in range(len(new) + 1)]
        self.query = torch.randn(sum(new), kv_heads * group, width).to(kind[0])

    def attend(self, **options: Any) -> Tensor:
        return paged_attention(
            self.query, self.kv, self.bounds, self.pasts, self.tables, 0.3, **options
        )

    def exact(self, window: int | None, softcap: float | None) -> Tensor:
        """One query and one head at a time, in float64."""
        out = torch.empty(self.query.shape, dtype=torch.float64)
        group = self.query.shape[1] // self.kv.shape[2]
        for s, past in enumerate(self.pasts):
            keys, values = self.keys[s].double()
            for i in range(self.bounds[s], self.bounds[s + 1]):
                end = past + i - self.bounds[s] + 1
                start = max(0, end - window) if window else 0
                for head in range(out.shape[1]):
                    scores = 0.3 * keys[start:end, head // group] @ self.query[i, head].double()
                    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
                    out[i, head] = scores.softmax(0) @ values[start:end, head // group]
        return out


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("kind", KINDS, ids=["float32", "bf16", "bf16 pages"])
def test_paged_attention(
    isa: str, case: tuple[Any, ...], kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    *shape, window, softcap = case
    pool = Pool(*shape, kind)
    exact = pool.exact(window, softcap)
    near = {"rtol": TOLERANCE[kind[0]], "atol": TOLERANCE[kind[0]]}
    for threads, wide in (
        (1, kernels.available_isas),
        (2, kernels.available_isas),
        (2, ()),
    ):  # with the kernel for pieces, and without
        with monkeypatch.context() as patch:
            patch.setattr(paged, "FAST_ISAS", wide)
            patch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            made = pool.attend(window=window, softcap=softcap)
        assert made.dtype == kind[0]
        torch.testing.assert_close(made.double(), exact, **near)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "library", None)
        torch.testing.assert_close(
            pool.attend(window=window, softcap=softcap).double(), exact, **near
        )


def test_paged_attention_in_many_stretches(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(16, 2, 2, 64, [5000, 3, 1000], [1, 2, 3], KINDS[0])
    pool.query *= 4  # sharp, so that the stretches' largest scores differ
    for threads in (1, 3, 8):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        torch.testing.assert_close(
            pool.attend().double(), pool.exact(None, None), rtol=1e-5, atol=1e-5
        )


def test_paged_write_is_the_references_and_takes_views(
    isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, value = torch.randn(3, 5, 8).transpose(0, 1), torch.randn(5, 3, 8)
    made = []
    for library in (kernels.library, None):
        monkeypatch.setattr(kernels, "library", library)
        kv = torch.zeros(4, 3, 2, 3, 6, 8)[:, 2]
        paged_write(key, value, kv, torch.tensor([23, 0, 7, 8, 11]))
        made.append(kv)
        assert torch.equal(kv[3, 0, :, 5], key[0]) and torch.equal(kv[1, 1, :, 2], value[3])
        for bad in (24, -1):
            with pytest.raises(ValueError, match="not in the pool"):
                paged_write(key, value, kv, torch.tensor([0, 1, 2, 3, bad]))
    assert torch.equal(*made) and int(made[0].count_nonzero()) == 2 * 5 * 3 * 8


@pytest.mark.parametrize("library", [kernels.library, None])
def test_paged_attention_refuses_what_does_not_fit(
    library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "library", library)
    pool = Pool(16, 1, 1, 8, [20], [1], KINDS[0])
    for table, why in (
        ([pool.tables[0][0]], "too few"),
        ([99, 0], "not there|not in the pool"),
        ([-1, 0], "not there|not in the pool"),
    ):
        pool.tables = [table]
        with pytest.raises(ValueError, match=why):
            pool.attend()
    with pytest.raises(ValueError, match="do not fit"):
        paged_attention(pool.query[..., :4], pool.kv, [0, 1], [20], [[0, 1]], 1.0)
    with pytest.raises(ValueError, match="do not fit"):
        paged_attention(pool.query, pool.kv, [0, 2], [20], [[0, 1]], 1.0)


# ---- products of few rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_layers_take_the_kernel_where_nothing_is_learned(
    isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.odd = (
                nn.Linear(70, 33, dtype=dtype),
                type("Odd", (nn.Linear,), {})(3, 4),
            )
            self.again, self.plain = self.first, nn.Linear(33, 5, bias=False, dtype=dtype)

    model = Tied().requires_grad_(False)
    weight, names = model.first.weight, dict(model.named_parameters())
    install_fast_modules(model)
    assert (
        type(model.first) is FastLinear
        and model.again is model.first
        and type(model.odd).__name__ == "Odd"
    )
    assert model.first.weight is weight and dict(model.named_parameters()).keys() == names.keys()
    calls: list[int] = []
    if kernels.library:
        product = kernels.product
        monkeypatch.setattr(
            kernels, "product", lambda *a: (calls.append(1), product(*a)), raising=False
        )
    for rows, taken in (((3,), True), ((2, 4), True), ((9,), False), ((0,), True)):
        x, layer = torch.randn(*rows, 70).to(dtype), model.first
        want = x.double() @ layer.weight.double().T + layer.bias.double()  # type: ignore[union-attr]
        for learns in (True, False):
            calls.clear()
            with torch.set_grad_enabled(learns):
                torch.testing.assert_close(layer(x).double(), want, rtol=2**-6, atol=2**-6)
            assert bool(calls) == (taken and not learns and kernels.library is not None)


def test_nf4_layers_give_the_same_with_and_without_gradients(isa: str) -> None:
    layer = NF4Linear.from_linear(nn.Linear(130, 33)).requires_grad_(False)
    for rows in (1, 8, 32, 33):
        x = torch.randn(rows, 130)
        with torch.no_grad():
            lean = layer(x)
        torch.testing.assert_close(lean, layer(x))


# ---- adapters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 8, 37])
def test_prepared_product_is_the_grouped_one(isa: str, dtype: torch.dtype, tokens: int) -> None:
    if not kernels.library:
        pytest.skip("no kernels here")
    ranks, width, out = (1, 8, 5, 64), 70, 45
    rows = [(0, tokens, 1, 0.5), (0, 1, 0, 2.0), (tokens // 2, tokens, 3, -1.0), (0, 0, 2, 1.0)]
    a, b = (
        [torch.randn(r, width).to(dtype) for r in ranks],
        [torch.randn(out, r).to(dtype) for r in ranks],
    )
    product = FusedLoRA(tokens, rows, a, [t.T.contiguous() for t in b])
    for _ in range(2):
        x, y = torch.randn(tokens, width).to(dtype), torch.randn(1, tokens, out).to(dtype)
        want = grouped_lora(
            y[0].double(), x.double(), rows, [t.double() for t in a], [t.double() for t in b]
        )
        size = float(want.abs().max())
        assert product.add(y, x) is y
        torch.testing.assert_close(
            y[0].double() / size,
            want / size,
            rtol=2**-8,
            atol=2**-8 if dtype == torch.bfloat16 else 1e-6,
        )
    for wrong_x, wrong_y in ((x[:, :69], y), (x, y.double()), (x, y[..., :44])):
        with pytest.raises(ValueError, match="prepared"):
            product.add(wrong_y, wrong_x)
    with pytest.raises(ValueError, match="does not fit"):
        FusedLoRA(tokens, [(0, tokens + 1, 0, 1.0)], a, b)
    with pytest.raises(ValueError, match="do not fit"):
        FusedLoRA(tokens, rows, a, b)


SPECS = {"a": ("lora", 4), "b": ("lora", 3), "c": ("dora", 2), "d": ("mora", 2)}
TABLES = {
    "nobody": Segments(),
    "one everywhere": Segments.on_all_tokens("a", 0.5),
    "a sum everywhere": Segments(global_adapters=(("a", 0.5), ("c", 1.0), ("b", -1.0))),
    "a row each": Segments(
        spans=(Segment(0, 2, "a"), Segment(2, 3, "b", 0.5), Segment(5, 9, "a", 2.0))
    ),
    "all methods": Segments(
        spans=(Segment(0, 4, "c"), Segment(1, 4, "a"), Segment(4, 9, "d", 0.5), Segment(4, 9, "b"))
    ),
    "both": Segments(global_adapters=(("b", 1.0),), spans=(Segment(1, 7, "d"), Segment(3, 4, "a"))),
    "a stranger": Segments(spans=(Segment(0, 3, "nobody knows it"), Segment(3, 5, "b"))),
}


def adapted_layer() -> tuple[nn.ModuleDict, ForwardContext, dict[str, Adapter]]:
    """A layer with four adapters that do something."""
    model, board = (
        nn.ModuleDict({"layer": nn.Linear(12, 10)}).requires_grad_(False),
        ForwardContext(),
    )
    made = {
        name: attach(model, board, name, AdapterConfig(method, ("layer",), rank=rank))
        for name, (method, rank) in SPECS.items()
    }
    with torch.no_grad():
        for adapter in made.values():
            adapter.train(False)
            for parameter in adapter.parameters():
                parameter.add_(torch.randn(parameter.shape) / 3)
    return model, board, made


@pytest.mark.parametrize("segments", TABLES.values(), ids=TABLES)
def test_adapters_without_gradients_are_those_with_gradients(isa: str, segments: Segments) -> None:
    model, board, _ = adapted_layer()
    for x in (torch.randn(9, 12), torch.randn(1, 9, 12), torch.randn(9, 12)):
        with board.use(segments):
            want = model["layer"](x)
            for _ in range(2):
                with torch.no_grad():
                    torch.testing.assert_close(model["layer"](x), want)


def test_what_is_kept_for_inference_follows_every_change(isa: str) -> None:
    """In place, by the optimizer, by another adapter of the same name, by new rows, by a new place."""
    model, board, made = adapted_layer()
    x, table = torch.randn(9, 12), TABLES["a row each"]

    def check(segments: Segments = table) -> None:
        with board.use(segments):
            want = model["layer"](x)
            with torch.no_grad():
                torch.testing.assert_close(model["layer"](x), want)

    check()
    with torch.no_grad():
        made["a"].layers["layer"].b.add_(1.0)  # type: ignore[operator]
    check()
    optimizer = AdapterOptimizer(made["b"], 0.1, {}, 0.0)
    for parameter in made["b"].parameters():
        parameter.grad = torch.randn(parameter.shape)
    optimizer.step(1.0, 1.0)
    check()
    check(Segments(spans=(Segment(0, 2, "b"),)))
    check(Segments(spans=(*table.spans, Segment(0, 9, "nobody knows it"))))
    detach(model, made["a"])
    check()
    other = attach(model, board, "a", AdapterConfig("lora", ("layer",), rank=5))
    other.train(False)
    with torch.no_grad():
        next(p for n, p in other.named_parameters() if n.endswith("b")).add_(1.0)
    check()


# ---- training: the base's product and the adapters' parts as one operation


def base_layer(kind: str, dtype: torch.dtype) -> nn.Module:
    plain = nn.Linear(70, 45).to(dtype).requires_grad_(False)
    return (
        NF4Linear.from_linear(plain)
        if kind == "nf4"
        else FastLinear.in_place_of(plain)
        if kind == "fast"
        else plain
    )


@pytest.mark.parametrize("kind", ["plain", "fast", "nf4"])
@pytest.mark.parametrize(
    "segments", [TABLES["one everywhere"], TABLES["a row each"], TABLES["a stranger"]]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_one_operation_are_autograds(
    isa: str, kind: str, segments: Segments, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the same layer with PyTorch's own operations, in float64."""
    model, board = nn.ModuleDict({"layer": base_layer(kind, dtype)}), ForwardContext()
    made = [
        attach(model, board, name, AdapterConfig("lora", ("layer",), rank=rank))
        for name, rank in (("a", 5), ("b", 16))
    ]
    parameters = [p for adapter in made for p in adapter.parameters()]
    with torch.no_grad():
        for p in parameters:
            p.copy_(torch.randn(p.shape).to(dtype) / 4)
    weight = model["layer"].base.weight.double()
    found = []
    for exact in (False, True):
        torch.manual_seed(1)
        x, seed = torch.randn(1, 9, 70).to(dtype), torch.randn(1, 9, 45).to(dtype)
        x = (x.double() if exact else x).requires_grad_()
        with board.use(segments), monkeypatch.context() as patch:
            if exact:
                y = nn.functional.linear(
                    x, weight, None if model["layer"].bias is None else model["layer"].bias.double()
                )
                for start, end, name, w in [(0, 9, *pair) for pair in segments.global_adapters] + [
                    (row.start, row.end, row.adapter, row.weight)
                    for row in segments.spans
                    if row.adapter in ("a", "b")
                ]:
                    delta: Any = model["layer"].deltas[name]
                    part = (
                        w
                        * delta.scale
                        * (x[:, start:end] @ delta.a.double().T @ delta.b.double().T)
                    )
                    y = y + nn.functional.pad(part, (0, 0, start, 9 - end))
            else:
                if kernels.library:
                    patch.setattr(
                        type(model["layer"]), "_add_reference", None
                    )  # the one operation does it all
                y = model["layer"](x)
        y.backward(seed.to(y.dtype))
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        found.append([y.detach(), x.grad, *grads])
        for p in parameters:
            p.grad = None
    near = 1e-5 if dtype == torch.float32 else 2**-6
    for ours, true in zip(*found, strict=True):
        assert true is not None and ours is not None
        size = max(1.0, float(true.abs().max()))
        torch.testing.assert_close(ours.double() / size, true.double() / size, rtol=near, atol=near)


@pytest.mark.parametrize("kind", ["fast", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapted_layer_keeps_its_input_and_no_other_activation(
    kind: str, dtype: torch.dtype
) -> None:
    """Bytes: x, which layers that read it share; A and B once in the dtype of x, where that is not their own; the table.

    B is kept transposed, so always anew; A only where its dtype is another one.
    """
    if not kernels.library:
        pytest.skip("PyTorch's operations keep A x besides")
    model, board, rank = nn.ModuleDict({"layer": base_layer(kind, dtype)}), ForwardContext(), 4
    attach(model, board, "a", AdapterConfig("lora", ("layer",), rank=rank))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for tokens in (9, 90):
        storages: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: Tensor, kept: dict[int, torch.UntypedStorage] = storages) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        x = torch.randn(tokens, 70, requires_grad=True).to(dtype)
        with (
            board.use(Segments.on_all_tokens("a")),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        ):
            model["layer"](x)
        matrices = rank * 45 * dtype.itemsize + (
            rank * 70 * dtype.itemsize if dtype != torch.float32 else 0
        )
        counted = tokens * 70 * dtype.itemsize + matrices
        assert sum(s.nbytes() for place, s in storages.items() if place not in own) == counted


def test_layers_below_the_first_adapter_have_no_graph(base: Any) -> None:
    blocks = base.model.base_model.layers
    paths = [
        path
        for path, module in base.model.named_modules()
        if f"layers.{len(blocks) - 1}." in path and type(module) is FastLinear
    ]
    adapter = attach(
        base.model, base.forward_context, "a", AdapterConfig("lora", tuple(paths), rank=2)
    )
    graphs: dict[str, bool] = {}
    hooks = [
        module.register_forward_hook(
            lambda _m, _i, out, path=path: graphs.update(
                {path: isinstance(out, Tensor) and out.grad_fn is not None}
            )
        )
        for path, module in base.model.named_modules()
        if not list(module.children())
    ]
    tokens = torch.arange(5, 17)
    with base.forward_context.use(adapter.active.segments(tokens, [0, 12])):
        base.loss(tokens, torch.arange(12), (0, 12), tokens.roll(-1)).backward()
    for hook in hooks:
        hook.remove()
    with_graph = {path for path, graph in graphs.items() if graph}
    below = {path for path in graphs if any(f"layers.{n}." in path for n in range(len(blocks) - 1))}
    assert below and not with_graph & below and with_graph
    first = {path for path in with_graph if path.endswith(("input_layernorm", "rotary_emb"))}
    assert not first  # nor has what the first adapter reads
    assert all(p.grad is not None for p in adapter.parameters())
