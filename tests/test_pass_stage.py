"""``stage``: window graphs stay append-and-attend (as chains or trees), prompts become packed prefill ops."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from stage_graphs import attention_inputs, find, mla_inputs, names, run, runtime_inputs, stage_graph
from torch import Tensor

from spec_compile.passes.graph import StageGraph, fake
from spec_compile.passes.partition import partition
from spec_compile.passes.stage import stage

PAGE_SIZE = 4


pytestmark = pytest.mark.usefixtures("fresh_seed")


def two_layers(q, k, v, k_cache, v_cache, page_table, cache_len):
    """A second attention over the first one's output, as the layers of a model are."""
    attention = torch.ops.spec_compile.attention
    out = attention(q, k, v, k_cache, v_cache, page_table, cache_len, None, 0.3, 5, 0.0, None)
    return attention(out * 2, k, v, k_cache, v_cache, page_table, cache_len, None, 0.3, 0, 2.0, None)


def latent_layer(q, kv, kv_cache, page_table, cache_len):
    return torch.ops.spec_compile.mla_attention(q, kv, kv_cache, page_table, cache_len, None, 0.3, 6)


def graph_of(latent: bool, kind: str, **shape: int) -> StageGraph:
    if latent:
        return stage_graph(latent_layer, kind, **mla_inputs(**shape))
    return stage_graph(two_layers, kind, **attention_inputs(**shape))


def values_of(latent: bool, batch: int, num_tokens: int) -> dict[str, Tensor]:
    """Real runtime inputs: random projections over rows of one to three pages."""
    lengths = torch.tensor([random.randrange(3 * PAGE_SIZE - num_tokens) for _ in range(batch)], dtype=torch.int32)
    table = torch.randperm(batch * 3).view(batch, 3).to(torch.int32) + 1
    common = {"page_table": table, "cache_len": lengths}
    if latent:
        return {"q": torch.randn(batch, num_tokens, 4, 8), "kv": torch.randn(batch, num_tokens, 8)} | common
    heads = {"q": 4, "k": 2, "v": 2}
    return {part: torch.randn(batch, num_tokens, n, 8) for part, n in heads.items()} | common


def caches_of(latent: bool, rows: int) -> dict[tuple[int, str], Tensor]:
    """Every slot of every page holds something."""
    pages = rows * 3 + 1
    if latent:
        return {(0, "kv"): torch.randn(pages, PAGE_SIZE, 8)}
    return {(0, part): torch.randn(pages, PAGE_SIZE, 2, 8) for part in ("k", "v")}


def clone(caches: dict) -> dict:
    return {key: cache.clone() for key, cache in caches.items()}


BOTH = pytest.mark.parametrize("latent", [False, True], ids=["attention", "mla"])


@BOTH
def test_a_chain_needs_no_change(latent: bool):
    graph = graph_of(latent, "verify")
    before, inputs = graph.gm.code, runtime_inputs(graph)
    assert stage(graph).gm.code == before
    assert runtime_inputs(graph) == inputs


@BOTH
def test_a_tree_gives_every_attention_node_the_tree_mask(latent: bool):
    graph = stage(graph_of(latent, "verify"), tree=True)
    nodes = find(graph, "mla_attention" if latent else "attention")
    masks = {node.args[5 if latent else 7] for node in nodes}
    assert len(nodes) == (1 if latent else 2) and len(masks) == 1
    (mask,) = masks
    assert runtime_inputs(graph)[-1] == "tree_mask"
    assert fake(mask).dtype == torch.int32 and fake(mask).shape == (2, 3, 1)


@pytest.mark.parametrize("num_tokens,words", [(1, 1), (32, 1), (33, 2), (64, 2)])
def test_a_tree_mask_has_one_bit_for_each_window_token(num_tokens: int, words: int):
    graph = stage(graph_of(False, "verify", num_tokens=num_tokens), tree=True)
    (mask,) = {node.args[7] for node in find(graph, "attention")}
    assert fake(mask).shape == (2, num_tokens, words)


@BOTH
def test_a_tree_graph_computes_the_tree(latent: bool):
    """Siblings 1 and 2 under the root: token 2 must not see token 1, unlike in a chain."""
    graph, chain = stage(graph_of(latent, "verify"), tree=True), stage(graph_of(latent, "verify"))
    values, caches = values_of(latent, 2, 3), caches_of(latent, 2)
    siblings = torch.tensor([0b001, 0b011, 0b101], dtype=torch.int32).expand(2, 3)[:, :, None].contiguous()
    as_chain = torch.tensor([0b001, 0b011, 0b111], dtype=torch.int32).expand(2, 3)[:, :, None].contiguous()

    (expected,) = run(chain, clone(caches), **values)
    (same,) = run(graph, clone(caches), **values, tree_mask=as_chain)
    (other,) = run(graph, clone(caches), **values, tree_mask=siblings)

    torch.testing.assert_close(same, expected, rtol=0, atol=0)
    torch.testing.assert_close(other[:, :2], expected[:, :2], rtol=0, atol=0)
    assert (other[:, 2] - expected[:, 2]).abs().amax() > 1e-3


@BOTH
def test_prefill_packs_every_attention(latent: bool):
    graph = graph_of(latent, "prefill", batch=1, num_tokens=9)
    stage(graph)
    op = "mla_prefill_attention" if latent else "prefill_attention"
    generic = "mla_attention" if latent else "attention"
    assert generic not in names(graph) and names(graph).count(op) == (1 if latent else 2)
    assert "cache_len" not in runtime_inputs(graph), "packed prompts start at slot 0"
    assert runtime_inputs(graph).count("cu_seqlens") == 1
    assert all(fake(node).dim() == 3 for node in find(graph, op))
    output = next(n for n in graph.gm.graph.nodes if n.op == "output")
    assert fake(output.args[0][0]).shape[:2] == (1, 9), "the rest of the graph keeps its shapes"


@BOTH
def test_packed_prefill_computes_what_windows_at_length_zero_do(latent: bool):
    """Prompts of 1, 5 and 3 tokens in one row of 9, against the unstaged graph prompt by prompt."""
    lengths = [1, 5, 3]
    packed = values_of(latent, 1, sum(lengths))
    table = torch.randperm(9).view(3, 3).to(torch.int32) + 1
    cu_seqlens = torch.tensor([0, 1, 6, 9], dtype=torch.int32)
    caches = caches_of(latent, 3)
    graph = stage(graph_of(latent, "prefill", batch=1, num_tokens=9))
    after = clone(caches)
    inputs = {name: value for name, value in packed.items() if name not in ("page_table", "cache_len")}
    (out,) = run(graph, after, **inputs, page_table=table, cu_seqlens=cu_seqlens)

    window = graph_of(latent, "verify", batch=1)
    zero = torch.zeros(1, dtype=torch.int32)
    for row, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
        one = {name: value[:, begin:end] for name, value in inputs.items()}
        (expected,) = run(window, caches, **one, page_table=table[row : row + 1], cache_len=zero)
        torch.testing.assert_close(out[:, begin:end], expected, rtol=1e-5, atol=1e-5)
    for key, cache in caches.items():
        torch.testing.assert_close(after[key], cache, rtol=0, atol=0)


def test_the_report_says_what_was_staged():
    assert stage(graph_of(False, "prefill", batch=1)).report == ["stage: 2 attention nodes over packed prompts"]
    assert stage(graph_of(False, "verify")).report == ["stage: 2 attention nodes over a chain"]
    assert stage(graph_of(True, "draft"), tree=True).report == ["stage: 1 attention nodes over a tree"]


# ----------------------------------------------------------------------------------------------------------------------
# Bare cache writes


def a_write(k, v, k_cache, v_cache, page_table, cache_len):
    torch.ops.spec_compile.kv_write(k * 2, v, k_cache, v_cache, page_table, cache_len)
    return k


def test_packed_writes_are_those_of_windows_at_length_zero_and_stay_between_segments():
    """Prompts of 1, 5 and 3 tokens in one row of 9, staged, cut and run, against kv_write prompt by prompt."""
    given = attention_inputs(batch=1, num_tokens=9)
    del given["q"]
    graph = partition(stage(stage_graph(a_write, "prefill", **given)))
    assert [n for n in names(graph) if n.startswith("kv_write")] == ["kv_write_packed"], "in no segment, and nowhere twice"
    assert "cache_len" not in runtime_inputs(graph)

    k, v = torch.randn(1, 9, 2, 8), torch.randn(1, 9, 2, 8)
    table, cu_seqlens = torch.randperm(9).view(3, 3).to(torch.int32), torch.tensor([0, 1, 6, 9], dtype=torch.int32)
    before = {(0, part): torch.randn(9, PAGE_SIZE, 2, 8) for part in ("k", "v")}
    after, expected = clone(before), clone(before)
    run(graph, after, k=k, v=v, page_table=table, cu_seqlens=cu_seqlens)
    for row, (first, last) in enumerate(pairwise(cu_seqlens.tolist())):
        window, zero = slice(first, last), torch.zeros(1, dtype=torch.int32)
        torch.ops.spec_compile.kv_write(k[:, window] * 2, v[:, window], *expected.values(), table[row : row + 1], zero)
    for key in before:
        torch.testing.assert_close(after[key], expected[key], rtol=0, atol=0)
    assert not torch.equal(after[0, "k"], before[0, "k"])
