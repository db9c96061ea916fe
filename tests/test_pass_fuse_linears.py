"""``fuse_linears``: sibling linears become one GEMM, and nobody who owns their parameters notices."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from stage_graphs import Input, bindings, find, names, parameter, run, stage_graph
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from spec_compile.passes.fuse_linears import fuse_linears, fuse_parameters
from spec_compile.passes.graph import StageGraph, fake

HIDDEN = 8
DOUBLE = torch.float64
X = Input("x", torch.zeros(2, 3, HIDDEN, dtype=DOUBLE))


pytestmark = pytest.mark.usefixtures("fresh_seed")


def projections(x, q, k, v):
    return F.linear(x, q) * 2, F.linear(x, k).exp(), F.linear(x, v)


def weights(*rows: int) -> dict[str, nn.Parameter]:
    return {name: parameter(n, HIDDEN, dtype=DOUBLE) for name, n in zip("qkv", rows, strict=False)}


def storages(tensors) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors}


def check_same(before: tuple, graph: StageGraph, x: torch.Tensor) -> None:
    for expected, got in zip(before, run(graph, x=x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_siblings_become_one_linear_with_the_same_results():
    w, x = weights(12, 4, 6), torch.randn(2, 3, HIDDEN, dtype=DOUBLE)
    graph = stage_graph(projections, "verify", x=X, **w)
    before = run(graph, x=x)

    fuse_linears(graph)

    (linear,) = find(graph, "linear")
    assert fake(linear).shape == (2, 3, 22)
    assert [fake(n).shape[-1] for n in find(graph, "getitem")] == [12, 4, 6]
    assert len(bindings(graph)) == 2, "the three weights left as inputs, the fused one came"
    assert graph.report == ["fuse_linears: 1 groups"]
    check_same(before, graph, x)


def test_siblings_with_biases():
    def biased(x, q, q_bias, k, k_bias):
        return F.linear(x, q, q_bias), F.linear(x, k, k_bias)

    w, x = weights(5, 7), torch.randn(2, 3, HIDDEN, dtype=DOUBLE)
    graph = stage_graph(biased, "verify", x=X, **w, q_bias=parameter(5, dtype=DOUBLE), k_bias=parameter(7, dtype=DOUBLE))
    before = run(graph, x=x)
    fuse_linears(graph)
    assert names(graph).count("linear") == 1
    check_same(before, graph, x)


def test_the_fakes_behind_a_fused_linear_have_the_strides_that_run():
    """Segments are compiled for their inputs' fakes: a view of a part is a view of wider rows."""

    def views(x, q, k, v):
        a, b = F.linear(x, q), F.linear(x, k)
        return a.reshape(2, 3, 2, 6), b.transpose(1, 2).transpose(2, 1), F.linear(x, v) + 1

    graph, x = stage_graph(views, "verify", x=X, **weights(12, 4, 6)), torch.randn(2, 3, HIDDEN, dtype=DOUBLE)
    fuse_linears(graph)

    (output,) = graph.gm.graph.find_nodes(op="output")
    ran, faked = run(graph, x=x), [fake(node) for node in output.args[0]]
    assert [value.stride() for value in faked] == [value.stride() for value in ran]
    assert faked[0].stride() == (66, 22, 6, 1), "22 is what three linears put out together"


def test_every_group_of_a_graph_is_fused_on_its_own():
    def layer(x, q, k, gate, up):
        y = F.linear(x, q) + F.linear(x, k)
        return F.silu(F.linear(y, gate)) * F.linear(y, up)

    w, x = weights(HIDDEN, HIDDEN), torch.randn(2, 3, HIDDEN, dtype=DOUBLE)
    graph = stage_graph(
        layer, "verify", x=X, **w, gate=parameter(6, HIDDEN, dtype=DOUBLE), up=parameter(6, HIDDEN, dtype=DOUBLE)
    )
    before = run(graph, x=x)
    fuse_linears(graph)
    assert names(graph).count("linear") == 2 and graph.report == ["fuse_linears: 2 groups"]
    check_same(before, graph, x)


# ----------------------------------------------------------------------------------------------------------------------
# What must stay as it was


def one_linear(x, q):
    return F.linear(x, q)


def two_inputs(x, q, k):
    return F.linear(x, q), F.linear(x + 1, k)


def shared_weight(x, q):
    """One weight, two uses: an embedding tied to the head, for instance."""
    return F.linear(x, q), F.linear(x, q)


def bias_on_one(x, q, k, v):
    return F.linear(x, q, v), F.linear(x, k)


def two_linears(x, q, k):
    return F.linear(x, q), F.linear(x, k)


@pytest.mark.parametrize(
    "fn,given",
    [
        (one_linear, lambda: weights(4)),
        (two_inputs, lambda: weights(4, 4)),
        (shared_weight, lambda: weights(4)),
        (bias_on_one, lambda: {**weights(4, 4), "v": parameter(4, dtype=DOUBLE)}),
        (two_linears, lambda: {"q": parameter(4, HIDDEN, dtype=DOUBLE), "k": torch.randn(4, HIDDEN, dtype=DOUBLE)}),
        (two_linears, lambda: {"q": parameter(4, HIDDEN, dtype=DOUBLE), "k": _Quantised(torch.randn(4, HIDDEN, dtype=DOUBLE))}),
    ],
    ids=["alone", "other input", "shared weight", "bias on one", "not a parameter", "parameter subclass"],
)
def test_what_is_not_alike_is_left_alone(fn, given):
    graph = stage_graph(fn, "verify", x=X, **given())
    code, pointers = graph.gm.code, [b.data_ptr() for b in bindings(graph) if isinstance(b, torch.Tensor)]
    fuse_linears(graph)
    assert graph.gm.code == code and graph.report == ["fuse_linears: 0 groups"]
    assert [b.data_ptr() for b in bindings(graph) if isinstance(b, torch.Tensor)] == pointers


class _Quantised(nn.Parameter):
    """A parameter whose memory means something else: only plain ones are known to be concatenable."""


def test_an_odd_one_out_does_not_hinder_its_siblings():
    w, x = weights(4, 6, 3), torch.randn(2, 3, HIDDEN, dtype=DOUBLE)
    w["k"] = w["k"].detach()  # not a parameter
    graph = stage_graph(projections, "verify", x=X, **w)
    before = run(graph, x=x)
    fuse_linears(graph)
    assert sorted(fake(n).shape[-1] for n in find(graph, "linear")) == [6, 7]
    check_same(before, graph, x)


# ----------------------------------------------------------------------------------------------------------------------
# Parameters become views of the fused weight


def test_parameters_keep_identity_values_and_memory():
    w = list(weights(4, 6, 3).values())
    before = copy.deepcopy(w)
    fused = fuse_parameters(w)
    assert fused.shape == (13, HIDDEN) and storages(w) == storages([fused])
    assert fused.untyped_storage().nbytes() == sum(p.nbytes for p in before), "no second copy is kept"
    for old, new in zip(before, w, strict=True):
        assert type(new) is nn.Parameter and new.requires_grad and new.is_contiguous()
        assert torch.equal(old, new)


def test_an_update_of_a_parameter_reaches_the_graph():
    w, x = weights(4, 6, 3), torch.randn(2, 3, HIDDEN, dtype=DOUBLE)
    graph = fuse_linears(stage_graph(projections, "verify", x=X, **w))
    with torch.no_grad():
        w["k"].mul_(-0.5)
        w["v"].copy_(torch.randn(3, HIDDEN, dtype=DOUBLE))
    expected = projections(x, *(p.detach() for p in w.values()))
    check_same(expected, graph, x)


def test_a_second_stage_shares_the_first_ones_fused_weight():
    """Prefill, verify and draft graphs of one model: the weights are moved once."""
    w = weights(4, 6, 3)
    first = fuse_linears(stage_graph(projections, "verify", x=X, **w))
    pointers = [p.data_ptr() for p in w.values()]
    second = fuse_linears(stage_graph(projections, "prefill", x=X, **w))
    assert [p.data_ptr() for p in w.values()] == pointers
    assert find(first, "linear")[0].args[1].meta["binding"].data_ptr() == pointers[0]
    assert find(second, "linear")[0].args[1].meta["binding"].data_ptr() == pointers[0]
    assert bindings(second)[1].shape == (13, HIDDEN)


def test_neighbours_in_the_wrong_order_are_not_taken_for_fused():
    q, k = weights(4, 4).values()
    fuse_parameters([q, k])
    expected = torch.cat([k, q])
    assert torch.equal(fuse_parameters([k, q]), expected)


def test_biases_fuse_too():
    biases = [parameter(3, dtype=DOUBLE), parameter(5, dtype=DOUBLE)]
    expected = torch.cat(biases)
    fused = fuse_parameters(biases)
    assert torch.equal(fused, expected) and storages(biases) == storages([fused])
    assert fuse_parameters(biases).data_ptr() == fused.data_ptr()


def test_a_fused_model_saves_loads_and_trains_as_before(tmp_path: Path):
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    model = LlamaForCausalLM(config)
    before = copy.deepcopy(model.state_dict())
    attention = model.model.layers[0].self_attn
    fuse_parameters([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])

    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    assert list(loaded) == list(before) == list(model.state_dict())
    assert all(torch.equal(loaded[name], before[name]) for name in before)

    ids = torch.randint(32, (1, 5))
    model(ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.equal(attention.k_proj.weight, before["model.layers.0.self_attn.k_proj.weight"])
