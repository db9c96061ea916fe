"""Every attention provider against one contract (see ``attention_contract``), on the device."""

from __future__ import annotations

import pytest
import torch
from attention_contract import (
    BOUNDS,
    CASES,
    FEELS_MASKED_PROMPTS,
    NAN,
    Case,
    check,
    errors,
    lowered,
    make_problem,
    random_trees,
)

from spec_compile.hardware import Hardware, detect_hardware
from spec_compile.ops import providers
from spec_compile.ops.attention import cache_slots
from spec_compile.ops.cascade import attend_with_lse
from spec_compile.ops.providers import PROVIDERS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

FP8 = torch.float8_e4m3fn
DTYPES = {  # of the model, of the cache
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "fp32": (torch.float32, None),
    "bf16_kv_fp8": (torch.bfloat16, FP8),
}


def refusal(provider: str, case: Case, dtypes: str, hardware: Hardware) -> str | None:
    if case.broken and case.packed and provider in FEELS_MASKED_PROMPTS:
        return "what is masked in a prompt is felt by its kernel (see attention_contract.py)"
    return providers.load(provider).supports(case.node(*DTYPES[dtypes]), hardware)


def usable(provider: str) -> None:
    availability = providers.load(provider).probe()
    if not availability.ok:
        pytest.skip(str(availability.problem))


@pytest.fixture(autouse=True)
def _full_precision() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_contract(provider: str, name: str, dtypes: str, record_property: pytest.RecordProperty) -> None:
    usable(provider)
    reason = refusal(provider, CASES[name], dtypes, detect_hardware("cuda"))
    if reason is not None:
        pytest.skip(f"{provider} refuses: {reason}")
    whole, worst = check(provider, CASES[name], DTYPES[dtypes][0], "cuda", DTYPES[dtypes][1])
    record_property("errors", (whole, worst))


GRAPH_CASES = {
    "draft": Case((1, 1), 1, (32, 8), (128, 128), 64, spare_columns=32, stage="draft"),
    "chain": Case((1, 1), 8, (32, 8), (128, 128), 64, spare_columns=32),
    "tree": Case((1, 1), 8, (32, 8), (128, 128), 64, spare_columns=32, tree=True),
}


@pytest.mark.parametrize("name", GRAPH_CASES)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_graph_replay_follows_the_lengths(provider: str, name: str) -> None:
    """Warm up, capture with one set of lengths, replay with others: the same bits as eager calls, every time."""
    usable(provider)
    case = GRAPH_CASES[name]
    reason = refusal(provider, case, "bf16", detect_hardware("cuda"))
    if reason is not None:
        pytest.skip(f"{provider} refuses: {reason}")
    node = case.node(torch.bfloat16)
    providers.load(provider).warm_up(node, torch.device("cuda"))
    op, problem = lowered(provider, node), make_problem(case, torch.bfloat16, "cuda")
    for cache in problem.caches:
        cache.normal_()  # lengths will shrink again, and what lies behind them was committed once
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        op(*problem.args)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = op(*problem.args)
    lengths, tree = problem.rows[1], problem.rows[2]
    for new_lengths in ([0, 2000], [700, 64], [5, 1], [1500, 1500]):
        for tensor in problem.new:
            tensor.normal_()
        lengths.copy_(torch.tensor(new_lengths))
        if tree is not None:
            tree.copy_(random_trees(2, case.num_tokens, "cuda"))
        graph.replay()
        first = out.clone()
        graph.replay()
        assert torch.equal(first, out)
        assert torch.equal(out, op(*problem.args))


# ----------------------------------------------------------------------------------------------------------------------
# Partial results: what a provider hands to a merge


@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256)])
@pytest.mark.parametrize("tokens", [1, 8, 40])
def test_fa4_partials_carry_the_natural_lse(tokens: int, dims: tuple[int, int], softcap: float) -> None:
    """Each fold's output is normalised over its own keys; its log-sum-exp is natural, and -inf where the fold is empty."""
    usable("fa4")
    from spec_compile.ops.providers import fa4

    lengths, page_size, heads = [0, 1, 63, 64, 65, 700, 1300, 2], 64, (16, 4)
    columns = -(-max(lengths) // page_size)
    tile = fa4.choose_tile(detect_hardware("cuda").arch, tokens * heads[0] // heads[1], *dims)
    table = (torch.randperm(len(lengths) * columns, device="cuda") + 1).view(-1, columns).to(torch.int32)
    slots = cache_slots(table, page_size)  # [B, S]
    live = torch.arange(slots.shape[1], device="cuda") < torch.tensor(lengths, device="cuda")[:, None]
    caches = []
    for dim in dims:
        cache = torch.full((len(lengths) * columns + 1, page_size, heads[1], dim), NAN, device="cuda")
        cache.flatten(0, 1)[slots[live]] = torch.randn(int(live.sum()), heads[1], dim, device="cuda")
        caches.append(cache.bfloat16())
    q = torch.randn(len(lengths), tokens, heads[0], dims[0], device="cuda").bfloat16()
    used = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    out, lse = fa4.bulk_attention(q, *caches, table, used, dims[0] ** -0.5, softcap, native_splits=1, tile=tile)

    keys, values = (cache.double().flatten(0, 1)[slots] for cache in caches)
    visible = live[:, None].expand(-1, tokens, -1)
    want, want_lse = attend_with_lse(q.double(), keys, values, visible, dims[0] ** -0.5, softcap)
    held = used > 0
    assert lse.dtype == torch.float32 and torch.isneginf(lse[~held]).all()
    # Scores are sums in float32 of exact products, up to 10 in size; a base-2 logarithm would be off by 44 %.
    torch.testing.assert_close(lse[held].transpose(1, 2).double(), want_lse[held], rtol=1e-3, atol=1e-3)
    found = errors(out[held], want[held])
    assert found[0] <= BOUNDS[torch.bfloat16][0] and found[1] <= BOUNDS[torch.bfloat16][1], found
