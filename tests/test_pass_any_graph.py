"""``select_rows``, ``split_argmax`` and where a graph of anybody's may be cut."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from stage_graphs import Input, find, names, parameter, run, stage_graph

from spec_compile.passes import any_graph
from spec_compile.passes.any_graph import prepare_any, split_argmax, why_whole
from spec_compile.passes.graph import StageGraph, fake
from spec_compile.passes.select_rows import select_rows

ROWS, TOKENS, HIDDEN, VOCAB = 2, 5, 8, 13
X = torch.randn(ROWS, TOKENS, HIDDEN)


def graph_of(fn: Callable, x: torch.Tensor = X, **weights: torch.Tensor) -> StageGraph:
    return stage_graph(fn, "torch.compile", x=Input("x", x), **weights)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, w: F.linear(x, w)[:, -1],
        lambda x, w: F.linear(x, w)[0],
        lambda x, w: F.linear(x, w)[:, 1:3, :],
        lambda x, w: (torch.tanh(F.linear(x, w) / 3.0) * 3.0).float()[:, -1],
        lambda x, w: F.linear(x, w, None).to(torch.float64)[1, 2],
    ],
    ids=["last", "first row", "some", "soft-capped", "one"],
)
def test_rows_are_selected_before_the_linear(fn) -> None:
    weight = parameter(VOCAB, HIDDEN)
    (expected,) = run(graph_of(fn, w=weight), x=X)
    graph = select_rows(graph_of(fn, w=weight))

    (out,) = run(graph, x=X)

    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    (linear,) = find(graph, "linear")
    assert linear.args[0].target is operator.getitem, "the selection stands before the linear"
    last = graph.gm.graph.output_node().args[0][0]
    assert fake(last).shape == out.shape and fake(last).dtype == out.dtype, "fakes follow"


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, w: (F.linear(x, w)[..., :3],),
        lambda x, w: (F.linear(x, w)[:, :, -1],),
        lambda x, w: (F.linear(x, w)[:, None],),
        lambda x, w: (F.linear(x, w)[:, 0:],),
        lambda x, w: ((logits := F.linear(x, w))[:, -1], logits),
        lambda x, w: (F.linear(x, w).softmax(1)[:, -1],),
        lambda x, w: (F.linear(x, w).add_(1)[:, -1],),
        lambda x, w: ((F.linear(x, w) + x.sum())[:, -1],),
    ],
    ids=["ellipsis", "vocabulary", "new axis", "all", "read elsewhere", "mixes rows", "in place", "two tensors"],
)
def test_what_is_not_a_mere_selection_stays(fn) -> None:
    graph = graph_of(fn, w=parameter(VOCAB, HIDDEN))
    before = names(graph)
    assert names(select_rows(graph)) == before


@pytest.mark.parametrize(
    "fn",
    [lambda x: x.argmax(-1), lambda x: torch.argmax(x, dim=-1), lambda x: x.argmax(dim=2)],
    ids=["method", "call", "number"],
)
def test_a_wide_argmax_goes_over_slices(fn) -> None:
    x = torch.randn(ROWS, TOKENS, 16 * 1024).round()  # many ties
    graph = split_argmax(graph_of(fn, x))
    assert "unflatten" in names(graph)
    assert torch.equal(run(graph, x=x)[0], x.argmax(-1)), "the lowest id of equals, as argmax has it"


@pytest.mark.parametrize(
    ("fn", "width"),
    [
        (lambda x: x.argmax(-1), 96),
        (lambda x: x.argmax(1), 16384),
        (lambda x: x.argmax(-1, True), 16384),
        (lambda x: x.argmax(), 16384),
        (lambda x: x.argmax(-1), 16381),
    ],
    ids=["narrow", "another dimension", "kept", "flat", "prime"],
)
def test_other_argmaxes_stay(fn, width: int) -> None:
    graph = graph_of(fn, torch.randn(ROWS, TOKENS, width))
    before = names(graph)
    assert names(split_argmax(graph)) == before


def layers(x, w, count: int = 4):
    for _ in range(count):
        x = F.scaled_dot_product_attention(x, x, x) + F.linear(x, w)
    return x


def attention_graph(fn: Callable = layers, tokens: int = 64) -> StageGraph:
    return graph_of(fn, torch.randn(1, 2, tokens, HIDDEN), w=parameter(HIDDEN, HIDDEN))


def test_a_deep_graph_is_cut_at_attention_and_computes_the_same() -> None:
    x = torch.randn(1, 2, 64, HIDDEN)
    graph = attention_graph()
    (expected,) = run(graph, x=x)
    cut = prepare_any(graph, cut=True)
    assert "partition: 4 segments, 1 distinct" in cut.report
    assert len(find(cut, "scaled_dot_product_attention")) == 4
    torch.testing.assert_close(run(cut, x=x)[0], expected)


def test_it_stays_whole_where_that_is_asked() -> None:
    assert "call_module" not in {node.op for node in prepare_any(attention_graph(), cut=False).gm.graph.nodes}


def test_reasons_to_leave_a_graph_whole() -> None:
    assert why_whole(attention_graph()) is None
    assert "attention 3 times" in why_whole(attention_graph(lambda x, w: layers(x, w, 3)))
    assert f"fewer than {any_graph.LEAST_TOKENS} tokens" in why_whole(attention_graph(tokens=1))
    graph = attention_graph()
    first = find(graph, "scaled_dot_product_attention")[0]
    with graph.gm.graph.inserting_before(first):
        graph.gm.graph.call_function(torch.amp._enter_autocast, ("cpu", torch.bfloat16, True, None))
    assert "autocast" in why_whole(graph)
    graph = attention_graph()
    x, w = [node for node in graph.gm.graph.nodes if node.op == "placeholder"]
    w.meta["example_value"] = fake(x)[0, 0]
    assert "share memory" in why_whole(graph)
    graph = attention_graph()
    with graph.gm.graph.inserting_before(find(graph, "scaled_dot_product_attention")[0]):
        graph.gm.graph.call_method("squeeze_", (graph.gm.graph.find_nodes(op="placeholder")[0],))
    assert "squeeze_" in why_whole(graph)
