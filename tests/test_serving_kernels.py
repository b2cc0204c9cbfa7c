"""The kernels that serving calls: attention over pages, products of few rows, adapters in a decoding step."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from afina.kernels.native import kernels
from afina.kernels.paged import FEW, paged_attention, paged_write

KINDS = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)]  # of queries, of pages
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6}
# page_size, kv_heads, heads of queries for each, head_dim, pasts, new tokens, window, softcap
CASES = {
    "decode": (16, 3, 3, 64, [0, 40, 1000, 15, 16], [1, 1, 1, 1, 1], None, None),
    "mixed": (16, 2, 4, 32, [0, 700, 1, 12], [FEW, 1, FEW + 1, 40], None, None),
    "odd pages and heads": (7, 1, 5, 33, [3, 100], [2, 9], None, None),
    "one head each, wide": (32, 4, 1, 80, [5, 0], [0, 3], None, None),
    "window": (5, 2, 2, 8, [0, 1, 300, 300], [1, FEW, 3, 30], 9, None),
    "softcap": (16, 1, 2, 48, [0, 77, 5], [30, 2, 1], None, 3.0),
    "both": (16, 1, 2, 48, [0, 77, 200], [30, 2, 1], 20, 3.0),
    "nobody": (16, 1, 2, 16, [], [], None, None),
}


@pytest.fixture(params=kernels.isas or ["reference"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this machine in turn."""
    before = kernels.isa
    if kernels.library:
        kernels.use(request.param)
    yield request.param
    if kernels.library:
        kernels.use(before)


class Pool:
    """A pool of two layers whose pages lie anywhere, what was written into the second, and queries for it."""

    def __init__(self, page_size: int, kv_heads: int, group: int, width: int, pasts: list[int], new: list[int], kind: Any) -> None:
        self.pasts, totals = pasts, [past + n for past, n in zip(pasts, new, strict=True)]
        counts = [-(-total // page_size) for total in totals]
        free = torch.randperm(sum(counts) + 2).tolist()
        self.kv = torch.full((len(free), 2, 2, kv_heads, page_size, width), float("nan"), dtype=kind[1])[:, 1]
        self.tables = [[free.pop() for _ in range(count)] for count in counts]
        self.keys = [torch.randn(2, total, kv_heads, width).to(kind[1]) for total in totals]
        places = [[pages[i // page_size] * page_size + i % page_size for i in range(total)]
                  for pages, total in zip(self.tables, totals, strict=True)]  # fmt: skip
        for pair, slots in zip(self.keys, places, strict=True):
            paged_write(pair[0], pair[1], self.kv, torch.tensor(slots, dtype=torch.int64))
        self.bounds = [sum(new[:i]) for i in range(len(new) + 1)]
        self.query = torch.randn(sum(new), kv_heads * group, width).to(kind[0])

    def attend(self, **options: Any) -> Tensor:
        return paged_attention(self.query, self.kv, self.bounds, self.pasts, self.tables, 0.3, **options)

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
def test_paged_attention(isa: str, case: tuple[Any, ...], kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    *shape, window, softcap = case
    pool = Pool(*shape, kind)
    exact = pool.exact(window, softcap)
    near = {"rtol": TOLERANCE[kind[0]], "atol": TOLERANCE[kind[0]]}
    for threads in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            made = pool.attend(window=window, softcap=softcap)
        assert made.dtype == kind[0]
        torch.testing.assert_close(made.double(), exact, **near)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "library", None)
        torch.testing.assert_close(pool.attend(window=window, softcap=softcap).double(), exact, **near)


def test_paged_attention_in_many_stretches(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(16, 2, 2, 64, [5000, 3, 1000], [1, 2, 3], KINDS[0])
    pool.query *= 4  # sharp, so that the stretches' largest scores differ
    for threads in (1, 3, 8):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        torch.testing.assert_close(pool.attend().double(), pool.exact(None, None), rtol=1e-5, atol=1e-5)


def test_paged_write_is_the_references_and_takes_views(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_paged_attention_refuses_what_does_not_fit(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "library", library)
    pool = Pool(16, 1, 1, 8, [20], [1], KINDS[0])
    for table, why in (([pool.tables[0][0]], "too few"), ([99, 0], "not there"), ([-1, 0], "not there")):
        pool.tables = [table]
        with pytest.raises(ValueError, match=why):
            pool.attend()
    with pytest.raises(ValueError, match="do not fit"):
        paged_attention(pool.query[..., :4], pool.kv, [0, 1], [20], [[0, 1]], 1.0)
    with pytest.raises(ValueError, match="do not fit"):
        paged_attention(pool.query, pool.kv, [0, 2], [20], [[0, 1]], 1.0)
