"""Contract of the Triton attention provider: fresh random inputs against the generic ops in float64.

``check_*`` run on any device, so that ``tests/test_triton_kernels.py`` can run them under Triton's interpreter.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from spec_compile.ops import attention as generic
from spec_compile.ops.providers import AttentionNode, triton

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
NAN = float("nan")


@dataclass(frozen=True)
class Case:
    """One attention problem; ``lengths`` are committed tokens (decode) or prompt lengths (prefill)."""

    lengths: tuple[int, ...]
    num_tokens: int = 1
    heads: tuple[int, int] = (8, 2)
    dims: tuple[int, int] = (64, 64)
    page_size: int = 16
    tree: bool = False
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    padding_rows: int = 0  # appended rows of length 0 whose pages are all page 0
    spare_columns: int = 1


def random_trees(batch: int, num_tokens: int, device: str) -> Tensor:
    """int32 [batch, num_tokens, words]: packed ancestors (self included) of random trees."""
    bits = torch.zeros(batch, num_tokens, -(-num_tokens // 32) * 32, dtype=torch.int64)
    for row in bits:
        for token in range(num_tokens):
            if token:
                row[token] = row[int(torch.randint(token, ()))]
            row[token, token] = 1
    words = (bits.unflatten(-1, (-1, 32)) << torch.arange(32)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(device, torch.int32)


@contextlib.contextmanager
def poisoned_empty():
    """``torch.empty`` returns NaN inside, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def relative_error(out: Tensor, expected: Tensor) -> float:
    return ((out.double() - expected).norm() / expected.norm()).item()


def same_cache(cache: Tensor, expected: Tensor) -> bool:
    """Bitwise up to NaN, page 0 aside."""
    return torch.allclose(cache[1:].double(), expected[1:], rtol=0, atol=0, equal_nan=True)


def page_tables(case: Case, device: str, num_tokens: int) -> tuple[Tensor, Tensor, int]:
    """(table the op gets, table the reference gets, number of pages).

    Padding rows share page 0, so the reference, which reads back what it wrote, gets private pages for them.
    """
    rows, padding = len(case.lengths), case.padding_rows
    columns = -(-(max(case.lengths) + num_tokens) // case.page_size) + case.spare_columns
    pages = (rows + padding) * columns + 4
    table = (torch.randperm(pages - 1)[: (rows + padding) * columns] + 1).view(-1, columns).to(device, torch.int32)
    given = table.clone()
    given[rows:] = 0
    return given, table, pages


def filled_cache(pages: int, table: Tensor, case: Case, shape: tuple[int, ...], dtype, device) -> Tensor:
    """[pages, page_size, *shape]: NaN everywhere but in the committed slots of the rows."""
    cache = torch.full((pages, case.page_size, *shape), NAN, dtype=dtype, device=device)
    for row, length in enumerate(case.lengths):
        slots = generic.cache_slots(table[row : row + 1], case.page_size)[0, :length]
        cache.flatten(0, 1)[slots] = torch.randn(length, *shape, device=device).to(dtype)
    return cache


def fused_qkv(lead: tuple[int, ...], case: Case, dtype, device) -> tuple[Tensor, Tensor, Tensor]:
    """Views of one fused projection, as models make them: [*lead, heads, dims]."""
    (hq, hkv), (d, dv) = case.heads, case.dims
    fused = torch.randn(*lead, (hq + hkv) * d + hkv * dv, device=device).to(dtype)
    q, k, v = fused.split([hq * d, hkv * d, hkv * dv], dim=-1)
    return q.unflatten(-1, (hq, d)), k.unflatten(-1, (hkv, d)), v.unflatten(-1, (hkv, dv))


def double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


def check_decode(case: Case, dtype: torch.dtype, device: str, latent: bool = False) -> None:
    """``attention_triton`` (``mla_attention_triton`` when ``latent``: dims are (C + R, C)) twice, against float64."""
    (hq, hkv), (d, dv) = case.heads, case.dims
    n, batch = case.num_tokens, len(case.lengths) + case.padding_rows
    given, table, pages = page_tables(case, device, n)
    lengths = torch.tensor([*case.lengths, *[0] * case.padding_rows], dtype=torch.int32, device=device)
    mask = random_trees(batch, n, device) if case.tree else None
    if latent:
        q = torch.randn(batch, n, hq, d, device=device).to(dtype)
        new = [torch.randn(batch, n, d, device=device).to(dtype)]
        caches = [filled_cache(pages, table, case, (d,), dtype, device)]
        tail: tuple = (d**-0.5, dv)
        op, reference = torch.ops.spec_compile.mla_attention_triton, torch.ops.spec_compile.mla_attention
    else:
        q, *new = fused_qkv((batch, n), case, dtype, device)
        caches = [filled_cache(pages, table, case, (hkv, x), dtype, device) for x in (d, dv)]
        sinks = torch.randn(hq, device=device).to(dtype) if case.sinks else None
        tail = (d**-0.5, case.window, case.softcap, sinks)
        op, reference = torch.ops.spec_compile.attention_triton, torch.ops.spec_compile.attention
    expected_caches = [x.double() for x in caches]
    tail64 = tuple(x.double() if isinstance(x, Tensor) else x for x in tail)
    expected = reference(
        q.double(), *[x.double() for x in new], *expected_caches, table, lengths, mask, *tail64
    )  # writes the expected caches
    outs = []
    for _ in range(2):  # the second call meets what the first left behind: counters, appended rows
        with poisoned_empty():
            outs.append(op(q, *new, *caches, given, lengths, mask, *tail))
    assert torch.equal(outs[0], outs[1])
    assert relative_error(outs[0], expected) < TOLERANCE[dtype], relative_error(outs[0], expected)
    private = table[len(case.lengths) :].flatten().long()  # padding rows' pages exist for the reference only
    for cache, want in zip(caches, expected_caches, strict=True):
        want[private] = NAN
        assert same_cache(cache, want)


def check_prefill(case: Case, dtype: torch.dtype, device: str, latent: bool = False) -> None:
    """``prefill_attention_triton`` (``mla_prefill_attention_triton`` when ``latent``), against float64."""
    (hq, hkv), (d, dv) = case.heads, case.dims
    table, _, pages = page_tables(case, device, 0)
    cu = torch.tensor([0, *case.lengths], device=device).cumsum(0).to(torch.int32)
    total = sum(case.lengths)
    shapes = ((d,),) if latent else ((hkv, d), (hkv, dv))
    caches = [torch.full((pages, case.page_size, *shape), NAN, dtype=dtype, device=device) for shape in shapes]
    if latent:
        q, new = torch.randn(total, hq, d, device=device).to(dtype), [torch.randn(total, d, device=device).to(dtype)]
        tail: tuple = (d**-0.5, dv)
        op, reference = (
            torch.ops.spec_compile.mla_prefill_attention_triton,
            torch.ops.spec_compile.mla_prefill_attention,
        )
    else:
        q, *new = fused_qkv((total,), case, dtype, device)
        sinks = torch.randn(hq, device=device).to(dtype) if case.sinks else None
        tail = (d**-0.5, case.window, case.softcap, sinks)
        op, reference = torch.ops.spec_compile.prefill_attention_triton, torch.ops.spec_compile.prefill_attention
    expected_caches = [x.double() for x in caches]
    tail64 = tuple(x.double() if isinstance(x, Tensor) else x for x in tail)
    expected = reference(q.double(), *[x.double() for x in new], *expected_caches, table, cu, *tail64)
    outs = []
    for _ in range(2):
        with poisoned_empty():
            outs.append(op(q, *new, *caches, table, cu, *tail))
    assert torch.equal(outs[0], outs[1])
    assert relative_error(outs[0], expected) < TOLERANCE[dtype], relative_error(outs[0], expected)
    for cache, want in zip(caches, expected_caches, strict=True):
        assert same_cache(cache, want)


DECODE = {
    "n1": Case((512, 0, 37, 1500), heads=(32, 8), dims=(128, 128), page_size=64),
    "batch1": Case((2047,), 8, (32, 8), (128, 128), 64, tree=True, spare_columns=40),
    "many_rows": Case(tuple(range(0, 600, 20)), heads=(32, 8), dims=(128, 128), padding_rows=2),
    "tree": Case((700, 3, 0, 15, 16, 17), 13, heads=(6, 2), tree=True, padding_rows=2),
    "tree64": Case((100, 900), 64, (8, 2), (128, 128), 32, tree=True, window=90, sinks=True, spare_columns=8),
    "tree40_group7": Case((333, 20), 40, (14, 2), (64, 64), 16, tree=True),
    "window": Case((1000, 5, 128, 129), 5, (8, 2), (64, 64), 64, window=128, sinks=True),
    "window_below_page": Case((1000, 5, 128), 5, (8, 2), (64, 64), 128, tree=True, window=9),
    "softcap": Case((300, 77), 4, (8, 8), (64, 64), softcap=30.0, tree=True, sinks=True, padding_rows=1),
    "d80": Case((200, 33), 6, (9, 3), (80, 80), tree=True),
    "d96_dv64": Case((200, 33), 3, (6, 2), (96, 64), 256),
    "d256": Case((200, 450), 9, (8, 2), (256, 256), tree=True, softcap=50.0),
    "d16": Case((200, 450), 2, (4, 4), (16, 16)),
    "chain100": Case((70, 0), 100, (4, 2), (64, 64)),
}
PREFILL = {
    "ragged": Case((300, 0, 1, 129, 64), heads=(8, 2), dims=(128, 128), page_size=64),
    "window": Case((700, 50, 300), heads=(6, 2), window=100, sinks=True),
    "window_large": Case((700, 50, 300), heads=(6, 2), dims=(128, 128), window=300),
    "softcap": Case((257, 3), heads=(3, 1), dims=(80, 80), softcap=20.0, sinks=True),
    "d96_dv64": Case((257, 130), heads=(4, 4), dims=(96, 64), page_size=128),
    "d256": Case((200, 150), heads=(4, 2), dims=(256, 256)),
    "one": Case((1000,), heads=(8, 2), dims=(64, 64), page_size=16),
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DECODE)
def test_decode(name: str, dtype: torch.dtype) -> None:
    check_decode(DECODE[name], dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PREFILL)
def test_prefill(name: str, dtype: torch.dtype) -> None:
    check_prefill(PREFILL[name], dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [5, 128])
def test_latent(heads: int, dtype: torch.dtype) -> None:
    case = Case((300, 0, 77), 6, (heads, 1), (576, 512), 64, tree=True, padding_rows=1)
    check_decode(case, dtype, "cuda", latent=True)
    check_prefill(replace(case, lengths=(100, 0, 70), heads=(5, 1), padding_rows=0), dtype, "cuda", latent=True)


@pytest.mark.parametrize("tokens", [1, 8])
def test_graph_replay_matches_eager(tokens: int) -> None:
    """Warm up, capture with one set of lengths, replay with others: the same bits as eager calls, every time."""
    node = AttentionNode(
        "attention", "verify", 2, tokens, 32, 8, 128, 128, 64, 0, 0.0, False, False, torch.bfloat16, torch.bfloat16
    )
    triton.warm_up(node, torch.device("cuda"))
    op = triton.lower(node)
    case = Case((1, 1), tokens, (32, 8), (128, 128), 64, spare_columns=32)
    q, k, v = fused_qkv((2, tokens), case, torch.bfloat16, "cuda")
    table, _, pages = page_tables(case, "cuda", tokens)
    caches = [torch.randn(pages, 64, 8, 128, device="cuda").bfloat16() for _ in range(2)]
    lengths = torch.tensor([1, 1], dtype=torch.int32, device="cuda")
    args = (q, k, v, *caches, table, lengths, None, 0.1, 0, 0.0, None)
    op(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = op(*args)
    for new_lengths in ([0, 2000], [700, 64], [5, 1], [1500, 1500]):
        q.normal_(), k.normal_(), v.normal_()
        lengths.copy_(torch.tensor(new_lengths))
        graph.replay()
        first = out.clone()
        graph.replay()
        assert torch.equal(first, out)
        assert torch.equal(out, op(*args))
