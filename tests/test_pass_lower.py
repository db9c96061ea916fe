"""Pass 5, ``lower``: provider ops in, generic ops out, same arguments, same result."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from stage_graphs import attention_inputs, find, mla_inputs, names, run, stage_graph

from spec_compile.errors import BackendError
from spec_compile.hardware import Hardware
from spec_compile.ops import providers
from spec_compile.ops.providers import Availability, torch_sdpa
from spec_compile.passes.graph import StageGraph
from spec_compile.passes.lower import lower
from spec_compile.passes.select_backend import select_backend
from spec_compile.passes.stage import stage

CPU = Hardware("cpu", "cpu", 4, "CPU")
H200 = Hardware("nvidia", "sm90", 132, "NVIDIA H200")


@pytest.fixture(autouse=True)
def fresh_seed() -> None:
    seed = random.SystemRandom().randrange(1 << 31)
    print("seed", seed)  # shown when a test fails
    torch.manual_seed(seed)
    random.seed(seed)


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
    assert graph.report[-1] == "lower: every attention node is a provider's op"


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
    monkeypatch.setattr(providers, "load", stubs.__getitem__)
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
    with pytest.raises(BackendError, match="generic attention ops are left in the draft graph"):
        lower(graph)


def test_the_generic_op_is_also_recognised_as_an_overload(monkeypatch: pytest.MonkeyPatch):
    graph = graph_of(False, "draft")
    select_backend(graph, CPU, "auto", 64)
    monkeypatch.setattr(torch_sdpa, "lower", lambda node: torch.ops.spec_compile.attention.default)
    with pytest.raises(BackendError, match="generic attention ops are left"):
        lower(graph)
