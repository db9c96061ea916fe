"""``ring_tables``: layers with a small enough window read a table of their own, everyone else the runtime's."""

from __future__ import annotations

import pytest
import torch
from stage_graphs import attention_inputs, find, run, stage_graph

from spec_compile.ops.page_table import MOST_AHEAD, ring_page_table
from spec_compile.passes.graph import StageGraph
from spec_compile.passes.ring_tables import ring_tables
from spec_compile.passes.stage import stage

WINDOWS = (3, 0, 3, 40)


def layers(q, k, v, k_cache, v_cache, page_table, cache_len):
    for window in WINDOWS:
        args = (k, v, k_cache, v_cache, page_table, cache_len, None, 0.3, window, 0.0, None)
        q = torch.ops.spec_compile.attention(q, *args)
    return q


def graph_of(kind: str) -> StageGraph:
    return stage(stage_graph(layers, kind, **attention_inputs(batch=1 if kind == "prefill" else 2, num_tokens=3)))


@pytest.mark.parametrize("kind", ["prefill", "verify"])
def test_each_size_of_ring_is_computed_once(kind: str) -> None:
    graph = ring_tables(graph_of(kind), 16, 1000)
    nodes = find(graph, "prefill_attention" if kind == "prefill" else "attention")
    tables = [node.args[5] for node in nodes]
    sizes = [node.args[1] for node in find(graph, "ring_page_table")]
    assert sizes == [-(-(3 + MOST_AHEAD) // 16), -(-(40 + MOST_AHEAD) // 16)]
    assert tables[0] is tables[2] and len({*tables}) == 3 and tables[1].op == "placeholder"
    assert all(node.args[0] is tables[1] for node in find(graph, "ring_page_table"))
    assert "3 layers with a sliding window have 9 or 11 pages a row of 1000" in graph.report[-1]


def test_where_a_ring_saves_nothing_nothing_changes() -> None:
    graph = graph_of("verify")
    before, noted = graph.gm.code, list(graph.report)
    assert ring_tables(graph, 1024, 1).gm.code == before and graph.report == noted


def test_the_same_result_over_a_ring() -> None:
    """Whole texts and rings hold the same: 170 tokens of it, more than a ring of 9 pages."""
    torch.manual_seed(0)
    inputs = {name: torch.randn(2, 3, heads, 8) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    inputs |= {"cache_len": torch.tensor([170, 5], dtype=torch.int32)}
    inputs |= {"page_table": torch.arange(1, 41, dtype=torch.int32).view(2, 20)}

    def one_layer(q, k, v, k_cache, v_cache, page_table, cache_len):
        return torch.ops.spec_compile.attention(q, k, v, k_cache, v_cache, page_table, cache_len, None, 0.3, 3, 0.0, None)

    whole = {(0, part): torch.randn(41, 16, 2, 8) for part in "kv"}
    small = {key: torch.zeros(19, 16, 2, 8) for key in whole}
    ring = ring_page_table(inputs["page_table"], 9)
    for row, length in enumerate((170, 5)):
        for slot in range(max(0, length - 2), length):
            for key, cache in whole.items():
                small[key][ring[row, slot // 16], slot % 16] = cache[inputs["page_table"][row, slot // 16], slot % 16]
    shapes = attention_inputs(batch=2, num_tokens=3)
    expected = run(stage(stage_graph(one_layer, "verify", **shapes)), whole, **inputs)
    result = run(ring_tables(stage(stage_graph(one_layer, "verify", **shapes)), 16, 20), small, **inputs)
    assert torch.equal(result[0], expected[0])
