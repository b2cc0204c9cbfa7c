"""Attention of sequences end to end, and of pieces over pages: against float64, in every instruction set of this machine."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from afina.kernels import varlen_attention as attention
from afina.kernels.dispatch import kernels
from afina.kernels.varlen_attention import causal_attention, varlen_attention

TYPES = (torch.float32, torch.bfloat16)
# heads, kv_heads, head_dim, lengths, window
CASES = {
    "one block": (4, 4, 64, [64], None),
    "many": (2, 2, 32, [1, 63, 2, 65, 130, 16, 17], None),
    "grouped": (9, 3, 64, [200, 21, 22], None),
    "odd": (5, 1, 33, [3, 100, 7], None),
    "one number": (2, 1, 1, [5, 70], None),
    "wide": (2, 1, 80, [150], None),
    "wider": (3, 3, 96, [77, 90], None),
    "widest": (1, 1, 144, [129], None),
    "one key head for very many": (70, 1, 8, [40], None),
    "window": (4, 2, 16, [1, 40, 300], 9),
    "wide window": (2, 2, 16, [300], 130),
    "empty sequences": (2, 2, 16, [0, 5, 0, 0, 70, 0], None),
    "nobody": (2, 2, 16, [], None),
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


def inputs(
    heads: int,
    kv_heads: int,
    width: int,
    lengths: list[int],
    dtype: torch.dtype,
    sharp: float = 1.0,
) -> list[Tensor]:
    """Query, key, value and a gradient; the first three lie as a model has them, apart from one another."""
    tokens = sum(lengths)
    query = torch.randn(1, heads, tokens, width).mul_(sharp)[0].transpose(0, 1)
    key, value = torch.randn(tokens, kv_heads, 2, width + 3).to(dtype)[..., 1 : width + 1].unbind(2)
    return [query.to(dtype), key, value, torch.randn(tokens, heads, width).to(dtype)]


def cut(lengths: list[int]) -> list[int]:
    """Bounds of sequences of these lengths."""
    return [sum(lengths[:i]) for i in range(len(lengths) + 1)]


def results(given: list[Tensor], function: Any) -> list[Tensor]:
    """The output and the gradients of query, key and value."""
    leaves = [x.detach().requires_grad_() for x in given[:3]]
    out = function(*leaves)
    out.backward(given[3].to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]


def exact(
    given: list[Tensor], bounds: list[int], scaling: float, window: int | None
) -> list[Tensor]:
    """The same in float64, whose operation is its reference; so that one is compared with PyTorch's own below."""
    return results(
        [x.double() for x in given], lambda *qkv: varlen_attention(*qkv, bounds, scaling, window)
    )


def errors(made: list[Tensor], true: list[Tensor]) -> list[float]:
    """How far each is from the truth, as a part of its size."""
    return [
        float((m.double() - t).norm() / t.norm().clamp(min=1e-6))
        for m, t in zip(made, true, strict=True)
    ]


def test_the_reference_is_pytorchs_attention() -> None:
    given, bounds = inputs(6, 2, 16, [5, 40], torch.float64), [0, 5, 45]

    def whole(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        outs = []
        for start, end in pairwise(bounds):
            q, k, v = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
            outs.append(
                F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)[
                    0
                ].transpose(0, 1)
            )
        return torch.cat(outs)

    for made, want in zip(exact(given, bounds, 0.3, None), results(given, whole), strict=True):
        torch.testing.assert_close(made, want)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", TYPES)
def test_varlen_attention_and_its_gradients(
    isa: str, dtype: torch.dtype, case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    *shape, lengths, window = case
    given, bounds = inputs(*shape, lengths, dtype), cut(lengths)
    true = exact(given, bounds, 0.3, window)
    near = 3e-6 if dtype == torch.float32 else 1e-2
    if kernels.library:
        monkeypatch.setattr(attention, "varlen_reference", None)  # the kernels do it
    for threads in (1, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        made = results(given, lambda *qkv: varlen_attention(*qkv, bounds, 0.3, window))
        assert all(x.dtype == dtype and x.isfinite().all() for x in made)
        assert max(errors(made, true), default=0.0) < near, errors(made, true)


@pytest.mark.parametrize("sharp", [1.0, 8.0, 40.0])
@pytest.mark.parametrize("length", [40, 300])
def test_in_bf16_it_is_as_near_to_the_truth_as_pytorchs(
    isa: str, sharp: float, length: int
) -> None:
    given = inputs(4, 4, 64, [length], torch.bfloat16, sharp)

    def flash(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.125)[0].transpose(
            0, 1
        )

    true = exact(given, [0, length], 0.125, None)
    ours = errors(results(given, lambda *qkv: varlen_attention(*qkv, [0, length], 0.125)), true)
    theirs = errors(results(given, flash), true)
    assert all(a <= 1.05 * b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


def test_later_tokens_and_other_sequences_do_not_count(isa: str) -> None:
    given = inputs(2, 2, 32, [100, 90], torch.float32)
    first = varlen_attention(*given[:3], [0, 100, 190], 0.3)
    for x in given[:3]:
        x[50:120] = 30.0
    again = varlen_attention(*given[:3], [0, 100, 190], 0.3)
    assert torch.equal(first[:50], again[:50]) and not torch.equal(first[120:], again[120:])
    alone = varlen_attention(*(x[100:] for x in given[:3]), [0, 90], 0.3)
    assert torch.equal(alone, again[100:])


def test_very_large_scores_stay_finite(isa: str) -> None:
    for dtype in TYPES:
        given = inputs(2, 1, 64, [200], dtype, sharp=1e4)
        made = results(given, lambda *qkv: varlen_attention(*qkv, [0, 200], 1.0))
        assert all(x.isfinite().all() for x in made)
        assert errors(made[:1], exact(given, [0, 200], 1.0, None)[:1])[0] < 1e-2


def test_causal_attention_of_a_batch(isa: str) -> None:
    for dtype in (*TYPES, torch.float64):
        query, key = torch.randn(3, 4, 20, 8).to(dtype), torch.randn(3, 2, 20, 8).to(dtype)
        made = causal_attention(query, key, key, 0.3)
        want = F.scaled_dot_product_attention(
            query.double(), key.double(), key.double(), is_causal=True, scale=0.3, enable_gqa=True
        )
        assert made.dtype == dtype and errors([made], [want])[0] < 1e-2
    assert causal_attention(query[:, :, :0], key[:, :, :0], key[:, :, :0], 0.3).shape == (
        3,
        4,
        0,
        8,
    )


def test_it_refuses_what_does_not_fit() -> None:
    query, key = torch.randn(5, 4, 8), torch.randn(5, 2, 8)
    for bad in (key[:4], key[:, :, :4], torch.randn(5, 3, 8)):
        with pytest.raises(ValueError, match="do not fit"):
            varlen_attention(query, bad, bad, [0, 5], 1.0)
    for bounds in ([], [0, 4], [1, 5], [0, 6], [0, 3, 2, 5]):
        with pytest.raises(ValueError, match="do not divide"):
            varlen_attention(query, key, key, bounds, 1.0)


def test_torch_checks_the_operation() -> None:
    given = [x.detach().requires_grad_() for x in inputs(4, 2, 8, [3, 9], torch.float32)[:3]]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.afina.varlen_attention.default, (*given, [0, 3, 12], 0.3, 4), test_utils=checks
    )
