"""The C++ kernels: each against its reference, over odd shapes, in every instruction set of this machine; the build."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from afina.kernels import elementwise as e
from afina.kernels import lora as low
from afina.kernels import mora as square
from afina.kernels import nf4
from afina.kernels.dispatch import kernels
from afina.kernels.int8_blockwise import dynamic_levels, nearest_codes, search_tables
from afina.kernels.skinny_gemm import linear_float32, skinny_linear
from afina.training.setup.adamw_8bit import AdamW8bit
from helpers import ENVIRONMENT

ROOT = Path(__file__).parents[1]
TYPES = (torch.float32, torch.bfloat16)
# bfloat16 has 8 bits: results of the kernel, which rounds once, and of the exact product differ by half of the last
TOLERANCE = {
    torch.float32: dict(rtol=2e-5, atol=2e-5),
    torch.bfloat16: dict(rtol=2**-8, atol=2**-7),
}
WIDTHS = (1, 31, 32, 63, 64, 65, 96, 130, 288)


@pytest.fixture(params=kernels.available_isas or ["reference"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this machine in turn."""
    before = kernels.isa
    if kernels.library:
        kernels.set_isa(request.param)
    assert kernels.isa == request.param
    yield request.param
    if kernels.library:
        kernels.set_isa(before)


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call it with a function: what that gives without the kernels."""

    def call(function: Any, *arguments: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "library", None)
            return function(*arguments)

    return call


def near(made: Tensor, exact: Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
    """Whether `made` is the float64 tensor `exact` but for rounding."""
    assert made.dtype == dtype
    torch.testing.assert_close(made.double() / scale, exact / scale, **TOLERANCE[dtype])


def gradients(function: Any, inputs: list[Tensor], seed: Tensor) -> list[Tensor]:
    """The result and the gradients of all inputs, for the gradient `seed` of the result."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = function(*leaves)
    y.backward(seed.to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]


# ---- NF4


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [*TYPES, torch.float16])
def test_nf4_codes_and_numbers_are_the_references_bit_for_bit(
    isa: str, width: int, dtype: torch.dtype, reference: Any
) -> None:
    weight = (torch.randn(37, width) * torch.logspace(-3, 1, 37)[:, None]).to(dtype)
    weight[3] = 0
    assert all(
        torch.equal(*pair)
        for pair in zip(nf4.encode(weight), reference(nf4.encode, weight), strict=True)
    )
    middles = (
        torch.tensor(nf4.LEVELS[:-1]) + torch.tensor(nf4.LEVELS[1:])
    ) / 2  # half-way: the lower one
    edge = torch.cat([middles, torch.ones(1)])[None]
    assert torch.equal(nf4.encode(edge)[0], reference(nf4.encode, edge)[0])
    held = nf4.quantize(weight)
    for out in (*TYPES, torch.float16, torch.float64):
        assert torch.equal(nf4.dequantize(held, out), reference(nf4.dequantize, held, out))
    columns = weight.T.contiguous().T  # not contiguous
    assert torch.equal(nf4.encode(columns)[0], held.codes)


def test_nf4_finds_what_is_not_finite(isa: str) -> None:
    for bad in (float("nan"), -float("inf")):
        weight = torch.randn(3, 70)
        weight[1, 66] = bad
        with pytest.raises(ValueError, match="NaN or infinite"):
            nf4.quantize(weight)


@pytest.mark.parametrize("rows", [0, 1, 3, 8, 17, 32, 33])
@pytest.mark.parametrize("dtype", TYPES)
def test_few_rows_times_nf4(isa: str, rows: int, dtype: torch.dtype) -> None:
    for width, out in ((288, 48), (65, 19), (1, 1), (130, 33)):
        held, x = nf4.quantize(torch.randn(out, width)), torch.randn(rows, width).to(dtype)
        bias, dense = torch.randn(out).to(dtype), nf4.dequantize(held, dtype).double()
        near(nf4.nf4_linear(x, held), x.double() @ dense.T, dtype, width**0.5)
        y, grad_x, grad_bias = gradients(
            lambda x, b, h=held: nf4.nf4_linear(x, h, b), [x, bias], seed := torch.randn(rows, out)
        )
        near(y, x.double() @ dense.T + bias.double(), dtype, width**0.5)
        near(grad_x, seed.to(dtype).double() @ dense, dtype, out**0.5)
        near(grad_bias, seed.to(dtype).double().sum(0), dtype, max(1, rows) ** 0.5)


def test_nf4_takes_any_leading_axes_and_refuses_other_widths(isa: str) -> None:
    held, x = nf4.quantize(torch.randn(12, 70)), torch.randn(70, 3, 2)
    torch.testing.assert_close(
        nf4.nf4_linear(x.permute(2, 1, 0), held),
        x.permute(2, 1, 0) @ nf4.dequantize(held, torch.float32).T,
    )
    assert nf4.nf4_linear(x[:, 0, 0], held).shape == (12,)
    with pytest.raises(ValueError, match="70"):
        nf4.nf4_linear(torch.randn(2, 71), held)


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 7, 8, 15, 33])
@pytest.mark.parametrize("dtype", TYPES)
def test_few_rows_times_a_matrix(isa: str, rows: int, dtype: torch.dtype) -> None:
    for width, out in ((96, 48), (70, 19), (1, 1), (33, 4)):
        x, weight, bias = (torch.randn(*s).to(dtype) for s in ((rows, width), (out, width), (out,)))
        near(skinny_linear(x, weight), x.double() @ weight.double().T, dtype, width**0.5)
        seed = torch.randn(rows, out)
        exact = gradients(F.linear, [t.double() for t in (x, weight, bias)], seed.to(dtype))
        for made, true in zip(
            gradients(skinny_linear, [x, weight, bias], seed), exact, strict=True
        ):
            near(made, true, dtype, max(width, out, rows) ** 0.5)
    near(
        skinny_linear(x.T.contiguous().T, weight.T.contiguous().T),
        x.double() @ weight.double().T,
        dtype,
        width**0.5,
    )
    with pytest.raises(ValueError, match="columns"):
        skinny_linear(torch.randn(2, 5), torch.randn(3, 4))


@pytest.mark.parametrize("rows", [0, 1, 5, 8, 9, 33])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_float32_output_of_16_bit_weights(isa: str, rows: int, dtype: torch.dtype) -> None:
    for width, out in ((96, 48), (70, 19), (1, 1)):
        x, weight, bias = (torch.randn(*s).to(dtype) for s in ((rows, width), (out, width), (out,)))
        exact = F.linear(x.double(), weight.double(), bias.double())
        found = linear_float32(x, weight, bias)
        assert found.dtype == torch.float32 and found.shape == exact.shape
        near(found, exact, torch.float32, width**0.5)
        near(linear_float32(x[None], weight)[0], exact - bias, torch.float32, width**0.5)


# ---- the grouped low-rank product

TABLES = {
    "one everywhere": [(0, 37, 1, 1.0)],
    "nobody": [],
    "empty rows": [(0, 0, 0, 1.0), (37, 37, 2, 1.0), (5, 6, 2, 0.5)],
    "a row each": [(i, i + 1, i % 3, 0.1 * i) for i in range(37)],
    "overlapping sums": [
        (0, 30, 0, 0.5),
        (3, 37, 2, 2.0),
        (3, 9, 1, 0.25),
        (4, 6, 1, 1.0),
        (20, 33, 2, -1.0),
    ],
}


@pytest.mark.parametrize("rows", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("width", "out"), [(70, 45), (64, 130), (1, 17)])
def test_grouped_lora(
    isa: str, rows: list[low.SegmentRow], dtype: torch.dtype, width: int, out: int
) -> None:
    ranks = (1, 8, 5)
    y, x = torch.randn(37, out).to(dtype), torch.randn(37, width).to(dtype)
    a, b = (
        [torch.randn(r, width) for r in ranks],
        [torch.randn(out, r) for r in ranks],
    )  # float32, as parameters are

    def product(y: Tensor, x: Tensor, *matrices: Tensor) -> Tensor:
        return low.grouped_lora(y, x, rows, matrices[:3], matrices[3:])

    seed = torch.randn(37, out).to(dtype)
    made = gradients(product, [y, x, *a, *b], seed)
    exact = gradients(product, [t.to(dtype).double() for t in (y, x, *a, *b)], seed.double())
    assert {t.dtype for t in made[3:]} == {torch.float32}
    for ours, true in zip(made, exact, strict=True):
        near(ours.to(dtype), true, dtype, max(1.0, float(true.abs().max())))


def test_grouped_lora_reference_is_the_plain_loop(isa: str) -> None:
    """Written out once more with dense weights, so that the reference itself is checked."""
    x, y = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    a, b = (
        [torch.randn(2, 6, dtype=torch.float64) for _ in range(2)],
        [torch.randn(4, 2, dtype=torch.float64) for _ in range(2)],
    )
    rows = [(1, 4, 0, 0.5), (3, 9, 1, 2.0)]
    want = y.clone()
    for start, end, k, weight in rows:
        for t in range(start, end):
            want[t] += weight * (b[k] @ a[k]) @ x[t]
    torch.testing.assert_close(low.grouped_lora(y, x, rows, a, b), want)
    inputs = [t.requires_grad_() for t in (y, x, *a, *b)]
    assert torch.autograd.gradcheck(
        lambda y, x, *m: low.grouped_lora(y, x, rows, m[:2], m[2:]), inputs
    )
    strided = x.T.contiguous().T
    torch.testing.assert_close(low.grouped_lora(y, strided, rows, a, b), want)


@pytest.mark.parametrize(
    "bad", [[(0, 10, 0, 1.0)], [(-1, 2, 0, 1.0)], [(3, 2, 0, 1.0)], [(0, 2, 1, 1.0)]]
)
def test_grouped_lora_refuses_rows_that_do_not_fit(bad: list[low.SegmentRow]) -> None:
    x, y, a, b = torch.zeros(9, 6), torch.zeros(9, 4), torch.zeros(2, 6), torch.zeros(4, 2)
    with pytest.raises(ValueError, match="does not fit"):
        low.grouped_lora(y, x, bad, [a], [b])
    with pytest.raises(ValueError, match="does not fit"):
        low.grouped_lora(y, x, [], [a], [torch.zeros(5, 2)])


# ---- the grouped square product

FORMS = {  # an operator of each kind at a layer of `width` and `out`; q of the last one is odd and below a vector
    "truncation": lambda width, out: square.MoRALayout(18, 1, min(18, width), min(18, out)),
    "sharing": lambda width, out: square.MoRALayout(31, 1, width, out),
    "runs": lambda width, out: square.MoRALayout(21, 1, width, out, is_sharing=True),
    "decoupling": lambda width, out: square.MoRALayout(
        17, min(-(-width // 17), -(-out // 17)), width, out
    ),
    "rotation": lambda width, out: square.MoRALayout(
        34, min(-(-width // 34), -(-out // 34)), width, out, is_rotated=True
    ),
    "small": lambda width, out: square.MoRALayout(
        6, min(-(-width // 6), -(-out // 6)), width, out, is_rotated=True
    ),
    "odd": lambda width, out: square.MoRALayout(7, min(-(-width // 7), -(-out // 7)), width, out),
}
MIXED = [
    (0, 9, 1, 1.0),
    (4, 37, 0, -0.5),
    (9, 12, 4, 2.0),
    (12, 37, 4, 1.0),
    (20, 21, 3, 1.0),
    (5, 5, 2, 1.0),
    (0, 37, 6, 1.0),
]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("width", "out"), [(64, 64), (130, 45), (45, 130), (5, 9), (288, 70)])
@pytest.mark.parametrize("kind", [*FORMS, "all"])
def test_grouped_mora(isa: str, kind: str, dtype: torch.dtype, width: int, out: int) -> None:
    forms = [make(width, out) for name, make in FORMS.items() if kind in (name, "all")]
    rows = MIXED if kind == "all" else [(0, 9, 0, 1.0), (9, 10, 0, -0.5), (4, 37, 0, 2.0)]
    y, x = torch.randn(37, out).to(dtype), torch.randn(37, width).to(dtype)
    m = [torch.randn(form.size, form.size) for form in forms]  # float32, as parameters are

    def product(y: Tensor, x: Tensor, *matrices: Tensor) -> Tensor:
        return square.grouped_mora(y, x, rows, forms, matrices)

    seed = torch.randn(37, out).to(dtype)
    made = gradients(product, [y, x, *m], seed)
    exact = gradients(product, [t.to(dtype).double() for t in (y, x, *m)], seed.double())
    assert {t.dtype for t in made[3:]} == {torch.float32}
    for ours, true in zip(made, exact, strict=True):
        near(ours.to(dtype), true, dtype, max(1.0, float(true.abs().max())))


def test_grouped_mora_reference_is_the_plain_loop(isa: str) -> None:
    """Rotation written out once more, number by number, so that the reference itself is checked."""
    x, y, m = (torch.randn(*shape, dtype=torch.float64) for shape in ((5, 11), (5, 7), (4, 4)))
    rows, form = (
        [(1, 4, 0, 0.5), (3, 5, 0, 2.0)],
        square.MoRALayout(4, 2, 11, 7, is_rotated=True),
    )  # 3 blocks in, 2 out
    want = y.clone()
    for start, end, _, weight in rows:
        for t in range(start, end):
            for block in range(3):
                part = F.pad(x[t], (0, 1))[4 * block : 4 * block + 4]
                angle = torch.tensor(
                    [block * 10000**-0.0, block * 10000**-0.5], dtype=torch.float64
                )
                turned = torch.cat(
                    [
                        part[:2] * angle.cos() - part[2:] * angle.sin(),
                        part[:2] * angle.sin() + part[2:] * angle.cos(),
                    ]
                )
                for j, value in enumerate(m @ turned):
                    if 4 * (block % 2) + j < 7:
                        want[t, 4 * (block % 2) + j] += weight * value
    torch.testing.assert_close(
        square.grouped_mora(y, x, rows, [form], [m]), want, rtol=0, atol=1e-6
    )
    inputs = [t.requires_grad_() for t in (y, x, m)]
    assert torch.autograd.gradcheck(
        lambda y, x, m: square.grouped_mora(y, x, rows, [form], [m]), inputs
    )


def test_grouped_mora_refuses_what_does_not_fit(isa: str) -> None:
    x, y, form, m = (
        torch.zeros(9, 6),
        torch.zeros(9, 4),
        square.MoRALayout(3, 2, 6, 4),
        torch.zeros(3, 3),
    )
    for bad in ([(0, 10, 0, 1.0)], [(0, 2, 1, 1.0)]):
        with pytest.raises(ValueError, match="does not fit"):
            square.grouped_mora(y, x, bad, [form], [m])
    for wrong in (
        square.MoRALayout(3, 2, 7, 4),
        square.MoRALayout(3, 2, 6, 5),
        square.MoRALayout(3, 3, 6, 4),
        square.MoRALayout(3, 1, 6, 4, is_rotated=True),
    ):
        with pytest.raises(ValueError, match="does not fit"):
            square.grouped_mora(y, x, [], [wrong], [m])
    with pytest.raises(ValueError, match="does not fit"):
        square.grouped_mora(y, x, [], [form], [torch.zeros(3, 4)])


# ---- elementwise


def double_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", TYPES)
def test_rms_norm(isa: str, width: int, dtype: torch.dtype) -> None:
    for rows in (0, 1, 5):
        x, weight, seed = (
            torch.randn(2, rows, width).to(dtype),
            torch.randn(width).to(dtype),
            torch.randn(2, rows, width).to(dtype),
        )
        made = gradients(lambda x, w: e.rms_norm(x, w, 1e-5), [x, weight], seed)
        exact = gradients(
            lambda x, w: double_norm(x, w, 1e-5), [x.double(), weight.double()], seed.double()
        )
        for k, (ours, true) in enumerate(zip(made, exact, strict=True)):
            scale = max(1.0, float(true.abs().max())) if true.numel() else 1.0
            near(
                ours, true, dtype, scale * (4 if k == 2 and dtype == torch.bfloat16 else 1)
            )  # its terms are rounded
    strided = torch.randn(width, 3).to(dtype).T
    torch.testing.assert_close(
        e.rms_norm(strided, weight, 1e-5), e.rms_norm(strided.contiguous(), weight, 1e-5)
    )


@pytest.mark.parametrize("count", [0, 1, 15, 16, 33, 5000])
@pytest.mark.parametrize("dtype", TYPES)
def test_swiglu(isa: str, count: int, dtype: torch.dtype) -> None:
    gate, up, seed = (torch.randn(3, count).to(dtype) * s for s in (6, 1, 1))
    made = gradients(e.swiglu, [gate, up], seed)
    exact = gradients(lambda g, u: F.silu(g) * u, [gate.double(), up.double()], seed.double())
    for ours, true in zip(made, exact, strict=True):
        near(ours, true, dtype)
    far = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4, float("nan")], dtype=dtype)
    torch.testing.assert_close(
        e.swiglu(far, torch.ones_like(far)), F.silu(far), equal_nan=True, atol=1e-30, rtol=1e-2
    )
    with pytest.raises(ValueError, match="one shape"):
        e.swiglu(torch.zeros(2, 3), torch.zeros(3))


@pytest.mark.parametrize("width", [2, 6, 32, 64, 80, 128])
@pytest.mark.parametrize("dtype", TYPES)
def test_rotary(isa: str, width: int, dtype: torch.dtype) -> None:
    for tokens in (0, 1, 7):
        x, seed = torch.randn(tokens, 3, width).to(dtype), torch.randn(tokens, 3, width).to(dtype)
        cos, sin = torch.randn(tokens, width).to(dtype), torch.randn(tokens, width).to(dtype)
        made = gradients(lambda x, c=cos, s=sin: e.rotary(x, c, s), [x], seed)

        def turned(x: Tensor, cos: Tensor = cos, sin: Tensor = sin) -> Tensor:
            a, b = x.chunk(2, -1)
            return x * cos.double()[:, None] + torch.cat([-b, a], -1) * sin.double()[:, None]

        for ours, true in zip(made, gradients(turned, [x.double()], seed.double()), strict=True):
            near(ours, true, dtype, 4.0)
    with pytest.raises(ValueError, match="does not fit cos"):
        e.rotary(torch.zeros(2, 1, 4), torch.zeros(2, 2), torch.zeros(2, 2))


# ---- the references themselves, and torch.library


def test_references_by_finite_differences() -> None:
    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    angles = torch.randn(2, 3, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: e.rms_norm(x, w, 1e-3), (made(3, 7), made(7)))
    assert torch.autograd.gradcheck(e.swiglu, (made(3, 7), made(3, 7)))
    assert torch.autograd.gradcheck(lambda x: e.rotary(x, *angles), (made(3, 2, 6),))
    assert torch.autograd.gradcheck(skinny_linear, (made(3, 7), made(5, 7), made(5)))


@pytest.mark.parametrize("dtype", TYPES)
def test_operations_keep_torchs_promises(dtype: torch.dtype) -> None:
    """Schema, shapes without data, autograd: torch.library's own check of each operation."""
    held = nf4.quantize(torch.randn(12, 70))
    stored = (held.codes, held.scales, held.superscales, held.offset, 70)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype).requires_grad_()

    table, weights = torch.tensor([[0, 3, 0], [2, 5, 1]]), torch.tensor([1.0, 0.5])
    samples: dict[str, tuple[Any, ...]] = {
        "nf4_linear": (made(3, 70), *stored, made(12)),
        "nf4_dequantize": (*stored, dtype),
        "linear": (made(3, 70), made(12, 70), made(12)),
        "rms_norm": (made(3, 70), made(70), 1e-5),
        "swiglu": (made(3, 70), made(3, 70)),
        "rotary": (made(3, 2, 6), made(3, 6).detach(), made(3, 6).detach(), False),
        "grouped_lora": (
            made(5, 9),
            made(5, 6),
            table,
            weights,
            [made(2, 6), made(3, 6)],
            [made(2, 9), made(3, 9)],
        ),
        "grouped_mora": (
            made(5, 9),
            made(5, 6),
            table,
            weights,
            [3, 2, 6, 9, 0, 0, 4, 2, 6, 9, 0, 1],
            [made(3, 3), made(4, 4)],
        ),
    }
    for name, inputs in samples.items():
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(getattr(torch.ops.afina, name).default, inputs, test_utils=checks)


@pytest.mark.parametrize("signed", [True, False])
def test_a_search_of_one_comparison_finds_the_level(signed: bool) -> None:
    between, starts = search_tables(signed)
    high = torch.arange(1 << 16, dtype=torch.int32) << 16
    for rest in (
        0,
        1,
        0x7FFF,
        0x8000,
        0xFFFF,
    ):  # all 65,536 starts, from the ends of what each stands for
        x = (high | rest).view(torch.float32)
        x = x[x.abs() <= 1]
        start = starts[(x.view(torch.int32) >> 16).long() & 0xFFFF].long()
        found = start + (between[start] < x)
        assert torch.equal(found, nearest_codes(x, dynamic_levels(signed)).long())


@pytest.mark.parametrize("gradients", TYPES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("count", [4096, 10_001])
def test_a_step_with_8bit_moments(
    isa: str, dtype: torch.dtype, gradients: torch.dtype, count: int, reference: Any
) -> None:
    torch.manual_seed(count)
    start, pushes = torch.randn(count), torch.randn(10, count) * torch.randn(10, count).exp()

    def learn() -> tuple[Tensor, dict[str, Tensor]]:
        parameter = nn.Parameter(start.to(dtype))
        parameter.grad_dtype = gradients
        optimizer = AdamW8bit([parameter], lr=1e-2, weight_decay=0.1)
        for push in pushes:
            parameter.grad = push.to(gradients)
            optimizer.step()
        return parameter.detach().float(), optimizer.state[parameter]

    (made, state), (exact, held) = learn(), reference(learn)
    assert (made == exact).float().mean() > (0.999 if dtype == torch.bfloat16 else 0.5)
    # a sum that is rounded otherwise may end as the neighbouring code, and that moves one number by a part of a step
    assert ((made - exact).abs() > 1e-5 * (1 + exact.abs())).float().mean() < 1e-3
    for name in ("first", "second"):
        assert (state[name] != held[name]).float().mean() < 1e-3
        torch.testing.assert_close(
            state[f"{name}_scales"], held[f"{name}_scales"], rtol=1e-4, atol=0.0
        )


@pytest.mark.slow
def test_compile_sees_the_operations() -> None:
    def block(x: Tensor, weight: Tensor) -> Tensor:
        return e.swiglu(e.rms_norm(x, weight, 1e-5), x)

    x, weight = torch.randn(4, 70, requires_grad=True), torch.randn(70)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for made, plain in zip(
        *(
            gradients(lambda t, f=f: f(t, weight), [x], torch.ones(4, 70))
            for f in (compiled, block)
        ),
        strict=True,
    ):
        torch.testing.assert_close(made, plain)


@pytest.mark.skipif(not kernels.available_isas, reason="the C++ kernels are not built here")
def test_two_threads_give_what_one_gives(isa: str) -> None:
    held, x = nf4.quantize(torch.randn(300, 300)), torch.randn(200, 300).bfloat16()
    rows = [(0, 150, 0, 1.0), (100, 200, 1, 0.5)]
    a, b = [torch.randn(r, 300) for r in (3, 9)], [torch.randn(300, r) for r in (3, 9)]
    forms, m = (
        [FORMS[name](300, 300) for name in ("rotation", "runs")],
        [torch.randn(q, q) for q in (34, 21)],
    )

    def everything() -> list[Tensor]:
        return [
            nf4.dequantize(held, torch.bfloat16),
            nf4.nf4_linear(x[:20], held),
            e.swiglu(x, x),
            e.rms_norm(x, x[0], 1e-5),
            *gradients(lambda x: low.grouped_lora(x, x, rows, a, b), [x], torch.ones_like(x)),
            *gradients(
                lambda x: square.grouped_mora(x, x, rows, forms, m), [x], torch.ones_like(x)
            ),
        ]

    one = everything()
    torch.set_num_threads(2)
    try:
        two = everything()
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(*pair) for pair in zip(one, two, strict=True))


# ---- the choice, and the build


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=250, env={**ENVIRONMENT, **environment}
    )


USE = "import torch; from afina.kernels.elementwise import swiglu; x = torch.ones(9); y = swiglu(x, x); swiglu(x, x); "


@pytest.mark.slow
def test_the_environment_chooses() -> None:
    show = "from afina.kernels.dispatch import kernels; print(kernels.isa, y.sum().item())"
    results = {
        isa: python(USE + show, AFINA_ISA=isa)
        for isa in [*kernels.available_isas[-1:], "reference"]
    }
    for isa, done in results.items():
        assert done.stdout.split()[0] == isa
        assert float(done.stdout.split()[1]) == pytest.approx(9 * 0.7310586)
        assert not done.stderr
    wrong = python(USE, AFINA_ISA="referense")
    assert wrong.returncode
    assert "AFINA_ISA" in wrong.stderr
    assert "reference" in wrong.stderr


@pytest.mark.slow
def test_without_the_library_one_line_says_so() -> None:
    """Once, where a kernel is used; an import says nothing."""
    imports = "import sys; sys.modules['afina.kernels._native'] = None; import afina.kernels.elementwise; "
    mark = "print('imported', file=sys.stderr); "
    done = python(imports + mark + USE + "print(y.sum().item())")
    assert float(done.stdout) == pytest.approx(9 * 0.7310586)
    quiet, _, used = done.stderr.partition("imported\n")
    assert not quiet
    assert used.count("without C++ kernels") == used.count("\n") == 1


@pytest.mark.slow
@pytest.mark.timeout(900)  # the compiler may share its cores
@pytest.mark.parametrize("compiler", ["", "/bin/false"], ids=["compiler", "no compiler"])
def test_pip_builds_a_wheel_with_and_without_a_compiler(compiler: str, tmp_path: Path) -> None:
    """The real build; its requirements must be there already, as nothing is downloaded."""
    for module in ("scikit_build_core", "nanobind"):
        pytest.importorskip(module)
    if not compiler and not shutil.which("c++"):
        pytest.skip("there is no C++ compiler")
    environment = {
        **os.environ,
        "SKBUILD_BUILD_DIR": str(tmp_path / "build"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        **({"CXX": compiler} if compiler else {}),
    }
    environment.pop("PYTHONPATH", None)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, env=environment)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    assert "afina/kernels/nf4.py" in names
    assert not [name for name in names if "/cpp/" in name]
    assert bool([name for name in names if "_native" in name]) == (not compiler)
    alone = "import sys; sys.meta_path = [f for f in sys.meta_path if '_editable' not in type(f).__module__]; "
    show = "import json, afina; from afina.kernels.dispatch import kernels; print(json.dumps([afina.__file__, kernels.isa]))"
    run = python(alone + USE + show, PYTHONPATH=str(tmp_path / "installed"))
    file, isa = json.loads(run.stdout)
    assert Path(file).is_relative_to(tmp_path)
    assert (isa == "reference") == bool(compiler)
    assert ("without C++ kernels" in run.stderr) == bool(compiler)
