"""The Triton kernels: each against its reference over odd shapes, on a card or in the interpreter; and compiled for sm_90."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from afina.adapters.segments import Segment, Segments
from afina.kernels import elementwise as e
from afina.kernels import lora as low
from afina.kernels import nf4
from afina.kernels.dispatch import kernels
from afina.models.loading import load_base
from helpers import ENVIRONMENT, flat_run, logits, put
from test_serving_kernels import CASES, Pool

pytest.importorskip("triton")
CARD = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CARD else "cpu")
TYPES = (
    torch.float32,
    torch.float16,
    *([torch.bfloat16] if CARD else []),
)  # the interpreter's products in bf16 are wrong
TOLERANCE = {
    torch.float32: dict(rtol=2e-5, atol=2e-5),
    torch.float16: dict(rtol=2**-10, atol=2**-9),
    torch.bfloat16: dict(rtol=2**-7, atol=2**-6),
}


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kernels, "triton", ("cuda", "cpu"))
    with DEVICE:
        yield


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the Triton functions that have run."""
    from afina.kernels import triton as gpu

    names: list[str] = []
    for name in gpu.__all__:
        function = getattr(gpu, name)
        monkeypatch.setattr(
            gpu, name, lambda *a, _f=function, _n=name, **k: (names.append(_n), _f(*a, **k))[1]
        )
    return names


def near(made: Tensor, exact: Tensor, scale: float = 1.0) -> None:
    """Whether `made` is the float64 tensor `exact` but for rounding."""
    torch.testing.assert_close(made.double() / scale, exact / scale, **TOLERANCE[made.dtype])


def gradients(function: Any, inputs: list[Tensor], seed: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = function(*leaves)
    y.backward(seed.to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]


# ---- NF4


@pytest.mark.parametrize("width", [1, 31, 64, 65, 130, 288])
@pytest.mark.parametrize("dtype", TYPES)
def test_nf4_is_the_references_bit_for_bit(
    width: int, dtype: torch.dtype, used: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = (torch.randn(37, width) * torch.logspace(-3, 1, 37)[:, None]).to(dtype)
    weight[3] = 0
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "triton", ())
        patch.setattr(kernels, "library", None)
        codes, absmax, held = *nf4.encode(weight), nf4.quantize(weight)
        dense = {
            out: nf4.dequantize(held, out) for out in TYPES
        }  # the interpreter cuts bf16 off, and does not round it
    assert not used
    made = nf4.encode(weight)
    assert torch.equal(made[0], codes)
    assert torch.equal(made[1], absmax)
    for out, plain in dense.items():
        assert torch.equal(nf4.dequantize(held, out), plain)
    assert used == ["nf4_encode"] + ["nf4_dequantize"] * len(TYPES)


def test_nf4_half_way_takes_the_lower_level_and_finds_what_is_not_finite() -> None:
    middles = (torch.tensor(nf4.LEVELS[:-1]) + torch.tensor(nf4.LEVELS[1:])) / 2
    edge = torch.cat([middles, torch.ones(1)])[None]
    codes = nf4.encode(edge)[0]
    assert torch.stack([codes >> 4, codes & 15], -1).flatten().tolist() == [*range(15), 15]
    for bad in (float("nan"), -float("inf")):
        weight = torch.randn(3, 70)
        weight[1, 66] = bad
        with pytest.raises(ValueError, match="NaN or infinite"):
            nf4.quantize(weight)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [0, 1, 17, 32, 33])
@pytest.mark.parametrize("dtype", TYPES)
def test_few_rows_times_nf4(rows: int, dtype: torch.dtype, used: list[str]) -> None:
    for width, out in ((288, 48), (65, 19), (1, 1), (130, 33)):
        held, x, bias = (
            nf4.quantize(torch.randn(out, width)),
            torch.randn(rows, width).to(dtype),
            torch.randn(out).to(dtype),
        )
        dense = nf4.dequantize(held, dtype).double()
        near(nf4.nf4_linear(x, held), x.double() @ dense.T, width**0.5)
        seed = torch.randn(rows, out)
        y, grad_x, grad_bias = gradients(
            lambda x, b, h=held: nf4.nf4_linear(x, h, b), [x, bias], seed
        )
        near(y, x.double() @ dense.T + bias.double(), width**0.5)
        near(grad_x, seed.to(dtype).double() @ dense, out**0.5)
        near(grad_bias, seed.to(dtype).double().sum(0), max(1, rows) ** 0.5)
    assert "nf4_linear" in used
    with pytest.raises(ValueError, match="70"):
        nf4.nf4_linear(torch.randn(2, 71), nf4.quantize(torch.randn(12, 70)))


# ---- the grouped low-rank product

TABLES = {
    "one everywhere": [(0, 21, 1, 1.0)],
    "nobody": [],
    "empty rows": [(0, 0, 0, 1.0), (21, 21, 2, 1.0), (5, 6, 2, 0.5)],
    "a row each": [(i, i + 1, i % 3, 0.1 * i) for i in range(11, 21)],
    "overlapping sums": [
        (0, 20, 0, 0.5),
        (3, 21, 2, 2.0),
        (3, 9, 1, 0.25),
        (4, 6, 1, 1.0),
        (14, 19, 2, -1.0),
    ],
}
LARGE = (320, 130, (3, 70, 16))  # columns in parts, a rank of several strips
SHAPES = [
    (table, *shape) for table in TABLES for shape in ((70, 45, (1, 8, 5)), (1, 17, (1, 2, 3)))
]


@pytest.mark.parametrize(
    ("table", "width", "out", "ranks"), [*SHAPES, ("overlapping sums", *LARGE)]
)
@pytest.mark.parametrize("dtype", TYPES)
def test_grouped_lora(
    table: str, dtype: torch.dtype, width: int, out: int, ranks: tuple[int, ...], used: list[str]
) -> None:
    rows = TABLES[table]
    y, x = torch.randn(21, out).to(dtype), torch.randn(21, width).to(dtype)
    a, b = (
        [torch.randn(r, width) for r in ranks],
        [torch.randn(out, r) for r in ranks],
    )  # float32, as parameters are

    def product(y: Tensor, x: Tensor, *matrices: Tensor) -> Tensor:
        return low.grouped_lora(y, x, rows, matrices[:3], matrices[3:])

    seed = torch.randn(21, out).to(dtype)
    made = gradients(product, [y, x, *a, *b], seed)
    assert used == ["grouped_lora", "grouped_lora_backward"]
    exact = gradients(product, [t.to(dtype).double() for t in (y, x, *a, *b)], seed.double())
    assert len(used) == 2  # float64 is the reference's
    for ours, true in zip(made, exact, strict=True):
        near(ours.to(dtype), true, max(1.0, float(true.abs().max())))


@pytest.mark.slow
def test_grouped_lora_in_larger_tiles() -> None:
    """Tiles of 32 and 64 tokens; strips shared out among several programs."""
    for tokens, ranks in ((200, (4, 33)), (1100, (4, 6))):
        x, y = torch.randn(tokens, 40), torch.randn(tokens, 24)
        a, b = [torch.randn(r, 40) for r in ranks], [torch.randn(24, r) for r in ranks]
        rows = [(0, tokens, 0, 1.0), (tokens // 3, tokens - 1, 1, 0.5)]
        seed = torch.randn(tokens, 24)
        inputs = [y, x, *a, *b]
        made = gradients(
            lambda y, x, *m, r=rows: low.grouped_lora(y, x, r, m[:2], m[2:]), inputs, seed
        )
        doubles = [t.double() for t in inputs]
        exact = gradients(
            lambda y, x, *m, r=rows: low.grouped_lora(y, x, r, m[:2], m[2:]), doubles, seed.double()
        )
        for ours, true in zip(made, exact, strict=True):
            near(ours, true, float(true.abs().max()))


@pytest.mark.slow
def test_adapters_side_by_side_take_the_grouped_product(
    tiny: Path, used: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mixed pass through a whole model is each adapter's own pass."""
    with monkeypatch.context() as patch:  # its self-checks are the interpreter's slowest part
        patch.setattr(kernels, "triton", ())
        base = load_base(str(tiny), device=DEVICE.type)
    for seed, (name, rank) in enumerate({"a": 2, "b": 7}.items()):
        put(base, name, seed=seed, rank=rank)
    run = tuple(t.to(DEVICE) if isinstance(t, Tensor) else t for t in flat_run((4, 2)))
    mixed = logits(base, run, Segments(spans=(Segment(0, 4, "a"), Segment(4, 6, "b"))))  # type: ignore[arg-type]
    assert {"grouped_lora", "rms_norm", "rotary", "swiglu"} <= set(used)
    for start, end, name in ((0, 4, "a"), (4, 6, "b")):
        alone = logits(
            base,
            (run[0][start:end], run[1][start:end], (0, end - start)),
            Segments.on_all_tokens(name),
        )  # type: ignore[index]
        torch.testing.assert_close(mixed[start:end], alone, rtol=1e-4, atol=1e-5)


# ---- elementwise


def double_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("width", [1, 31, 64, 130])
@pytest.mark.parametrize("dtype", TYPES)
def test_rms_norm(width: int, dtype: torch.dtype, used: list[str]) -> None:
    for rows in (0, 1, 5):
        x, weight, seed = (
            torch.randn(2, rows, width).to(dtype),
            torch.randn(width).to(dtype),
            torch.randn(2, rows, width),
        )
        made = gradients(lambda x, w: e.rms_norm(x, w, 1e-5), [x, weight], seed)
        exact = gradients(
            lambda x, w: double_norm(x, w, 1e-5),
            [x.double(), weight.double()],
            seed.to(dtype).double(),
        )
        for k, (ours, true) in enumerate(zip(made, exact, strict=True)):
            scale = max(1.0, float(true.abs().max())) if true.numel() else 1.0
            near(
                ours, true, scale * (4 if k == 2 and dtype != torch.float32 else 1)
            )  # its terms are rounded
    strided = torch.randn(width, 3).to(dtype).T
    torch.testing.assert_close(
        e.rms_norm(strided, weight, 1e-5), e.rms_norm(strided.contiguous(), weight, 1e-5)
    )
    assert set(used) == {"rms_norm", "rms_norm_backward"}


@pytest.mark.parametrize("count", [0, 1, 33, 1500])
@pytest.mark.parametrize("dtype", TYPES)
def test_swiglu(count: int, dtype: torch.dtype, used: list[str]) -> None:
    gate, up, seed = (torch.randn(3, count).to(dtype) * s for s in (6, 1, 1))
    made = gradients(e.swiglu, [gate, up], seed)
    exact = gradients(lambda g, u: F.silu(g) * u, [gate.double(), up.double()], seed.double())
    for ours, true in zip(made, exact, strict=True):
        near(ours, true)
    far = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4, float("nan")], dtype=dtype)
    torch.testing.assert_close(
        e.swiglu(far, torch.ones_like(far)), F.silu(far), equal_nan=True, atol=1e-30, rtol=1e-2
    )
    assert set(used) == {"swiglu", "swiglu_backward"}


@pytest.mark.parametrize("width", [2, 6, 64, 80])
@pytest.mark.parametrize("dtype", TYPES)
def test_rotary(width: int, dtype: torch.dtype, used: list[str]) -> None:
    for tokens in (0, 1, 7):
        x, seed = torch.randn(tokens, 3, width).to(dtype), torch.randn(tokens, 3, width).to(dtype)
        cos, sin = torch.randn(tokens, width).to(dtype), torch.randn(tokens, width).to(dtype)
        made = gradients(lambda x, c=cos, s=sin: e.rotary(x, c, s), [x], seed)

        def turned(x: Tensor, cos: Tensor = cos, sin: Tensor = sin) -> Tensor:
            a, b = x.chunk(2, -1)
            return x * cos.double()[:, None] + torch.cat([-b, a], -1) * sin.double()[:, None]

        for ours, true in zip(made, gradients(turned, [x.double()], seed.double()), strict=True):
            near(ours, true, 4.0)
    assert set(used) == {"rotary"}


# ---- attention over pages


def plain_attention(
    query: Tensor,
    kv: Tensor,
    bounds: tuple[int, ...],
    pasts: list[int],
    tables: Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Query by query, in float64."""
    out, repeats = torch.zeros(query.shape, dtype=torch.float64), query.shape[1] // kv.shape[2]
    for s, past in enumerate(pasts):
        keys, values = (
            kv[tables[s].long()]
            .double()
            .permute(1, 2, 0, 3, 4)
            .flatten(2, 3)
            .repeat_interleave(repeats, 1)
        )
        for i in range(bounds[s], bounds[s + 1]):
            position = past + i - bounds[s]
            first = max(0, position + 1 - window) if window else 0
            scores = (
                torch.einsum("hd,hkd->hk", query[i].double(), keys[:, first : position + 1])
                * scaling
            )
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            out[i] = torch.einsum("hk,hkd->hd", scores.softmax(-1), values[:, first : position + 1])
    return out


@pytest.mark.parametrize(
    ("heads", "kv_heads", "page_size", "width"), [(4, 2, 16, 32), (6, 1, 4, 20), (3, 3, 5, 64)]
)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (9, None), (None, 2.0)])
@pytest.mark.parametrize("dtype", TYPES)
def test_paged_attention(
    heads: int,
    kv_heads: int,
    page_size: int,
    width: int,
    window: int | None,
    softcap: float | None,
    dtype: torch.dtype,
) -> None:
    from afina.kernels.triton import paged_attention

    pasts, bounds = [0, 37, 150, 5], (0, 1, 3, 4, 21)
    most = max(-(-(past + 20) // page_size) for past in pasts)
    pool = torch.randn(len(pasts) * most, 3, 2, kv_heads, page_size, width).to(
        dtype
    )  # three layers of a pool
    kv, query = pool[:, 1], torch.randn(21, heads, width).to(dtype)
    assert not kv.is_contiguous()
    tables = torch.randperm(len(kv)).view(len(pasts), most).int()
    tables, out = tables.to(DEVICE), torch.full_like(query, 7.0)
    paged_attention(query, kv, bounds, pasts, tables, out, 16, width**-0.5, window, softcap)
    exact = plain_attention(query, kv, bounds, pasts, tables, width**-0.5, window, softcap)
    near(out[:4], exact[:4], 2.0)
    assert (out[4:] == 7.0).all()  # a sequence with more queries is somebody else's


@pytest.mark.slow
@pytest.mark.parametrize("case", ["mixed", "odd pages and heads", "window", "softcap", "nobody"])
def test_serving_takes_it(case: str, used: list[str]) -> None:
    """As the engine calls it, few queries and many side by side, in a pool full of NaN."""
    *shape, window, softcap = CASES[case]
    with torch.device("cpu"):
        pool = Pool(*shape, (torch.float32, torch.float32))
        exact = pool.exact(window, softcap)
    pool.kv, pool.query = pool.kv.to(DEVICE), pool.query.to(DEVICE)
    torch.testing.assert_close(
        pool.attend(window=window, softcap=softcap).double().cpu(), exact, rtol=2e-5, atol=2e-5
    )
    assert used == ["paged_attention"]


def test_pages_that_are_not_there_are_refused() -> None:
    pool = Pool(16, 1, 1, 8, [20], [1], (torch.float32, torch.float32))
    for table, why in (
        ([pool.tables[0][0]], "too few"),
        ([99, 0], "not there|not in the pool"),
        ([-1, 0], "not there|not in the pool"),
    ):
        pool.tables = [table]
        with pytest.raises(ValueError, match=why):
            pool.attend()


# ---- the choice, and the compiler


def test_float64_and_missing_triton_fall_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], used: list[str]
) -> None:
    x = torch.randn(3, 8, dtype=torch.float64)
    near_exact = double_norm(x, torch.ones(8, dtype=torch.float64), 1e-5)
    torch.testing.assert_close(e.rms_norm(x, torch.ones(8, dtype=torch.float64), 1e-5), near_exact)
    assert not used
    monkeypatch.setitem(sys.modules, "afina.kernels.triton", None)
    for _ in range(2):
        torch.testing.assert_close(e.rms_norm(x.float(), torch.ones(8), 1e-5), near_exact.float())
    assert capsys.readouterr().err.count("without Triton") == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(CARD, reason="the kernels run on the card itself")
def test_every_kernel_compiles_for_an_h200(tmp_path: Path) -> None:
    """The interpreter forgives what the compiler does not; all of it is compiled for sm_90, in bf16, with no card."""
    environment = {key: value for key, value in ENVIRONMENT.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(Path(__file__).with_name("compile_kernels.py"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    made = done.stdout.split()
    assert {
        "_norm",
        "_swiglu",
        "_rotary",
        "_decode",
        "_encode",
        "_few",
        "_into",
        "_out_of",
        "_across",
        "_paged",
    } <= set(made)
