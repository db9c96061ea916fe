"""FlashInfer's XQA beyond the common contract: every page size, odd shapes, rows that hang over their last page."""

from __future__ import annotations

import pytest
import torch
from attention_contract import Case, check, check_output, make_problem

from spec_compile.hardware import detect_hardware
from spec_compile.ops import attention as generic
from spec_compile.ops.providers import flashinfer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

HEADS, DIMS = (32, 8), (128, 128)
ODD = [(5, 96, 6), (6, 112, 6), (3, 192, 6), (12, 64, 6), (1, 32, 6), (64, 64, 2), (64, 128, 1), (32, 256, 1)]  # group, dim, N
CASES = {
    **{f"page{size}": Case((300, 0, 65, 1024), 8, HEADS, DIMS, size, tree=True) for size in flashinfer.XQA_PAGE_SIZES},
    **{f"n{n}": Case((300, 0, 65), n, HEADS, DIMS, 64, tree=True, padding_rows=1) for n in (2, 3, 16, 31, 32, 33, 64, 65)},
    **{f"group{group}_d{dim}_n{n}": Case((200, 33), n, (2 * group, 2), (dim, dim), 64, tree=n > 1) for group, dim, n in ODD},
    "long": Case((16384, 9000), 8, HEADS, DIMS, 64, tree=True, spare_columns=100),
    "n1_window_sinks": Case((333, 20, 0), 1, (16, 2), (64, 64), 64, window=128, sinks=True),
}


@pytest.fixture(autouse=True)
def _usable() -> None:
    availability = flashinfer.probe()
    if not availability.ok:
        pytest.skip(str(availability.problem))
    if flashinfer.window_kernel(detect_hardware("cuda").arch, is_tree=True) != "xqa":
        pytest.skip("XQA does not take trees on this device")


@pytest.mark.parametrize("name", CASES)
def test_contract(name: str) -> None:
    assert flashinfer.supports(CASES[name].node(torch.bfloat16), detect_hardware("cuda")) is None
    check("flashinfer", CASES[name], torch.bfloat16, "cuda")


@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
def test_a_window_over_the_last_page(tree: bool) -> None:
    """Slots that a row cannot hold belong to no row: the others count as in the generic op."""
    problem = make_problem(Case((43, 20), 8, HEADS, DIMS, 16, tree=tree, spare_columns=0), torch.bfloat16, "cuda")
    table, lengths, mask = problem.rows
    table = table[:, :3].contiguous()  # 48 slots; the first row would need 51
    caches = [torch.randn(cache.shape, device="cuda").bfloat16() for cache in problem.caches]
    new = [x.double() for x in problem.new]
    expected = generic.attention(*new, *[c.double() for c in caches], table, lengths, mask, *problem.tail)
    out = flashinfer.lower(problem.case.node(torch.bfloat16))(*problem.new, *caches, table, lengths, mask, *problem.tail)
    check_output(out, expected, problem.case, torch.bfloat16)
