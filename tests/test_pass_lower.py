"""``lower``: provider ops in, generic ops out, same arguments, same result."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from stage_graphs import attention_inputs, find, mla_inputs, names, planning, run, stage_graph

from spec_compile.errors import BackendError
from spec_compile.hardware import Hardware
from spec_compile.ops import providers
from spec_compile.ops.providers import Availability, Lowered, as_lowered, torch_sdpa
from spec_compile.passes.graph import StageGraph
from spec_compile.passes.lower import lower
from spec_compile.passes.select_backend import select_backend
from spec_compile.passes.stage import stage

CPU = Hardware("cpu", "cpu", 4, "CPU")
H200 = Hardware("nvidia", "sm90", 132, "NVIDIA H200")


pytestmark = pytest.mark.usefixtures("fresh_seed")


def two_layers(q, k, v, k_cache, v_cache, page_table, cache_len):
    op, args = torch.ops.spec_compile.attention, (k, v, k_cache, v_cache, page_table, cache_len, None, 0.3)
    return op(op(q, *args, 3, 0.0, None) * 2, *args, 0, 2.0, None)


def latent_layer(q, kv, kv_cache, page_table, cache_len):
    return torch.ops.spec_compile.mla_attention(q, kv, kv_cache, page_table, cache_len, None, 0.3, 6)


def graph_of(latent: bool, kind: str) -> StageGraph:
    batch = 1 if kind == "prefill" else 2
    if latent:
        return stage(stage_graph(latent_layer, kind, **mla_inputs(batch=batch, num_tokens=3)))
    return stage(stage_graph(two_layers, kind, **attention_inputs(batch=batch, num_tokens=3)))


@pytest.mark.parametrize("kind", ["prefill", "verify", "draft"])
@pytest.mark.parametrize("latent", [False, True], ids=["attention", "mla"])
def test_every_generic_op_becomes_the_providers_with_the_same_arguments(latent: bool, kind: str):
    graph = graph_of(latent, kind)
    generic = ("mla_" if latent else "") + ("prefill_attention" if kind == "prefill" else "attention")
    before = [node.args for node in find(graph, generic)]
    select_backend(graph, CPU, "auto", 64)

    lower(graph)

    assert generic not in names(graph)
    nodes = find(graph, f"{generic}_torch")
    assert all(isinstance(n.target, torch._ops.OpOverload) for n in nodes)
    assert [[str(a) for a in n.args] for n in nodes] == [
        [str(a).replace(generic, f"{generic}_torch") if a in find(graph, generic) else str(a) for a in args] for args in before
    ]
    assert graph.report[-1] == "lower: every generic op is a provider's"


@pytest.mark.parametrize("latent", [False, True], ids=["attention", "mla"])
def test_the_lowered_graph_computes_what_the_generic_one_does(latent: bool):
    inputs = {
        "q": torch.randn(2, 3, 4, 8),
        "page_table": torch.tensor([[2, 4], [3, 1]], dtype=torch.int32),
        "cache_len": torch.tensor([3, 0], dtype=torch.int32),
    }
    inputs |= {"kv": torch.randn(2, 3, 8)} if latent else {n: torch.randn(2, 3, 2, 8) for n in ("k", "v")}
    shapes = {(0, "kv"): (5, 4, 8)} if latent else {(0, p): (5, 4, 2, 8) for p in ("k", "v")}
    caches = {key: torch.randn(shape) for key, shape in shapes.items()}
    lowered_caches = {key: cache.clone() for key, cache in caches.items()}
    graph = graph_of(latent, "verify")
    (expected,) = run(graph, caches, **inputs)
    select_backend(graph, CPU, "auto", 64)

    (out,) = run(lower(graph), lowered_caches, **inputs)

    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    for key, cache in caches.items():
        torch.testing.assert_close(lowered_caches[key], cache, rtol=0, atol=0)


def test_each_node_gets_its_own_provider(monkeypatch: pytest.MonkeyPatch):
    """A hybrid inside one graph: sliding layers on one provider, the others on the next."""
    ops = torch.ops.spec_compile

    def stub(op, refuse):
        return SimpleNamespace(probe=lambda: Availability("1"), supports=lambda node, hw: refuse(node), lower=lambda node: op)

    stubs = {
        "triton": stub(ops.attention_torch.default, lambda node: None if node.window else "sliding layers only"),
        "torch": stub(ops.mla_attention_torch.default, lambda node: None),  # any op will do: nothing runs
    }
    nobody = stub(None, lambda node: "not this one")
    monkeypatch.setattr(providers, "load", lambda name, *_: stubs.get(name, nobody))
    graph = graph_of(False, "verify")
    select_backend(graph, H200, "auto", 64)
    assert names(lower(graph)) == ["attention_torch", "mul", "mla_attention_torch"]


def test_lowering_before_selection_is_an_error_that_says_so():
    with pytest.raises(BackendError, match="verify graph has no provider; run select_backend"):
        lower(graph_of(False, "verify"))


def test_a_provider_that_hands_back_the_generic_op_is_an_error(monkeypatch: pytest.MonkeyPatch):
    graph = graph_of(False, "draft")
    select_backend(graph, CPU, "auto", 64)
    monkeypatch.setattr(torch_sdpa, "lower", lambda node: torch.ops.spec_compile.attention)
    with pytest.raises(BackendError, match="generic ops are left in the draft graph"):
        lower(graph)


def test_the_generic_op_is_also_recognised_as_an_overload(monkeypatch: pytest.MonkeyPatch):
    graph = graph_of(False, "draft")
    select_backend(graph, CPU, "auto", 64)
    monkeypatch.setattr(torch_sdpa, "lower", lambda node: torch.ops.spec_compile.attention.default)
    with pytest.raises(BackendError, match="generic ops are left"):
        lower(graph)


# ----------------------------------------------------------------------------------------------------------------------
# Plans


def five_layers(q, k, v, k_cache, v_cache, page_table, cache_len):
    """Windows 3, 0, 3, 0, 0."""
    out = q
    for window in (3, 0, 3, 0, 0):
        out = torch.ops.spec_compile.attention(out, k, v, k_cache, v_cache, page_table, cache_len, None, 0.3, window, 0.0, None)
    return out


def planned(graph: StageGraph, monkeypatch: pytest.MonkeyPatch) -> StageGraph:
    """``graph`` lowered to ops that need plans."""
    monkeypatch.setattr(torch_sdpa, "lower", planning)
    select_backend(graph, CPU, "auto", 64)
    return lower(graph)


def values(batch: int = 2) -> dict:
    return {
        "q": torch.randn(batch, 3, 4, 8),
        "k": torch.randn(batch, 3, 2, 8),
        "v": torch.randn(batch, 3, 2, 8),
        "page_table": torch.tensor([[2, 4], [3, 1]], dtype=torch.int32)[:batch],
        "cache_len": torch.tensor([4, random.randrange(5)], dtype=torch.int32)[:batch],
    }


def test_layers_of_equal_plans_share_one_computed_before_the_first_of_them(monkeypatch: pytest.MonkeyPatch):
    graph = planned(stage(stage_graph(five_layers, "verify", **attention_inputs(batch=2, num_tokens=3))), monkeypatch)
    unpacked = ["plan", "getitem", "getitem"]
    assert names(graph) == [*unpacked, "planned_attention", *unpacked, *["planned_attention"] * 4]
    layers, plans = find(graph, "planned_attention"), find(graph, "plan")
    assert [plan.args[-1] for plan in plans] == [3, 0]
    assert [[plans.index(output.args[0]) for output in layer.args[-2:]] for layer in layers] == [
        [0, 0], [1, 1], [0, 0], [1, 1], [1, 1],
    ]  # fmt: skip
    assert all([output.args[1] for output in layer.args[-2:]] == [0, 1] for layer in layers)
    assert all(output.meta["example_value"].shape == (2,) for output in find(graph, "getitem"))
    assert graph.report[-1] == "lower: every generic op is a provider's, 2 planned once for all layers"


def test_a_planned_graph_computes_what_its_layers_compute_alone(monkeypatch: pytest.MonkeyPatch):
    inputs, caches = values(), {(0, part): torch.randn(5, 4, 2, 8) for part in "kv"}
    graph = planned(stage(stage_graph(five_layers, "verify", **attention_inputs(batch=2, num_tokens=3))), monkeypatch)
    ops = torch.ops.spec_compile_tests
    expected, expected_caches = inputs["q"], {key: cache.clone() for key, cache in caches.items()}
    for window in (3, 0, 3, 0, 0):
        alone = Lowered(ops.planned_attention.default, ops.plan.default, (window,))
        rows = (inputs["page_table"], inputs["cache_len"], None)
        expected = alone(expected, inputs["k"], inputs["v"], *expected_caches.values(), *rows, 0.3, window, 0.0, None)

    (out,) = run(graph, caches, **inputs)

    assert torch.equal(out, expected)
    assert all(torch.equal(caches[key], expected_caches[key]) for key in caches)


def test_a_plan_reads_the_tree_mask_of_a_tree(monkeypatch: pytest.MonkeyPatch):
    graph = stage(stage_graph(two_layers, "verify", **attention_inputs(batch=2, num_tokens=3)), tree=True)
    planned(graph, monkeypatch)
    assert [[str(a) for a in plan.args[:3]] for plan in find(graph, "plan")] == [["page_table", "cache_len", "tree_mask"]] * 2


def test_a_prefill_plan_with_one_output_reads_the_prompts_boundaries(monkeypatch: pytest.MonkeyPatch):
    graph = stage(stage_graph(two_layers, "prefill", **attention_inputs(batch=1, num_tokens=3)))
    inputs = values(1) | {"cu_seqlens": torch.tensor([0, 2, 3], dtype=torch.int32)}
    inputs["page_table"] = torch.tensor([[2], [1]], dtype=torch.int32)
    del inputs["cache_len"]
    caches = {(0, part): torch.randn(5, 4, 2, 8) for part in "kv"}
    (expected,) = run(graph, {key: cache.clone() for key, cache in caches.items()}, **inputs)

    planned(graph, monkeypatch)

    (plan,) = find(graph, "count")
    assert [str(a) for a in plan.args] == ["page_table", "cu_seqlens"]
    assert all(layer.args[-1] is plan for layer in find(graph, "planned_prefill"))
    assert torch.equal(run(graph, caches, **inputs)[0], expected)


def test_constants_that_compare_equal_are_not_one_plan(monkeypatch: pytest.MonkeyPatch):
    """``True == 1``, but a plan may tell them apart."""
    graph = stage(stage_graph(two_layers, "verify", **attention_inputs(batch=2, num_tokens=3)))
    monkeypatch.setattr(torch_sdpa, "lower", lambda node: replace(planning(node), plan_args=(True if node.window else 1,)))
    select_backend(graph, CPU, "auto", 64)
    assert [plan.args[-1] for plan in find(lower(graph), "plan")] == [True, 1]


def test_a_bare_op_is_lowered_without_a_plan():
    op = torch.ops.spec_compile.attention_torch.default
    assert as_lowered(op) == Lowered(op) and as_lowered(Lowered(op)) == Lowered(op)
    inputs, caches = values(), [torch.randn(5, 4, 2, 8) for _ in range(2)]
    args = (*(inputs[n] for n in "qkv"), *caches, inputs["page_table"], inputs["cache_len"], None, 0.3, 0, 0.0, None)
    assert torch.equal(Lowered(op)(*args), op(*args))
