"""Pass 4, ``select_backend``: one provider for each attention node, by hardware and need, with every loser's reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from stage_graphs import Input, attention_inputs, find, mla_inputs, names, stage_graph

from spec_compile.errors import BackendError
from spec_compile.hardware import Hardware
from spec_compile.ops import providers
from spec_compile.ops.providers import AttentionNode, Availability
from spec_compile.passes.graph import StageGraph
from spec_compile.passes.select_backend import candidates, select_backend
from spec_compile.passes.stage import stage

CPU = Hardware("cpu", "cpu", 4, "CPU")
H200 = Hardware("nvidia", "sm90", 132, "NVIDIA H200")
MI300X = Hardware("amd", "gfx942", 304, "AMD Instinct MI300X")


@dataclass
class StubProvider:
    """A provider whose every answer is given; nothing of a real kernel is needed to test the choice."""

    refuse: Callable[[AttentionNode], str | None] = lambda node: None
    problem: str | None = None
    asked: list[tuple[AttentionNode, Hardware]] = field(default_factory=list)

    def probe(self) -> Availability:
        return Availability("1.0" if self.problem is None else None, self.problem)

    def supports(self, node: AttentionNode, hardware: Hardware) -> str | None:
        self.asked.append((node, hardware))
        return self.refuse(node)


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> dict[str, StubProvider]:
    """All providers, replaced by stubs that take everything until a test says otherwise."""
    made = {name: StubProvider() for name in providers.PROVIDERS}
    monkeypatch.setattr(providers, "load", made.__getitem__)
    return made


def layers(q, k, v, k_cache, v_cache, page_table, cache_len, sinks):
    """Four layers: plain, sliding, plain, soft-capped with sinks."""
    op, args = torch.ops.spec_compile.attention, (k_cache, v_cache, page_table, cache_len, None, 0.5)
    q = op(q, k, v, *args, 0, 0.0, None)
    q = op(q, k, v, *args, 16, 0.0, None)
    q = op(q, k, v, *args, 0, 0.0, None)
    return op(q, k, v, *args, 0, 30.0, sinks)


def four_layers(kind: str = "verify") -> StageGraph:
    batch = 1 if kind == "prefill" else 2
    graph = stage_graph(layers, kind, **attention_inputs(batch=batch), sinks=torch.randn(4))
    return stage(graph)


def latent_layer(q, kv, kv_cache, page_table, cache_len):
    return torch.ops.spec_compile.mla_attention(q, kv, kv_cache, page_table, cache_len, None, 0.3, 6)


def mixed_widths(q, k, v, k_cache, v_cache, page_table, cache_len):
    return torch.ops.spec_compile.attention(
        q, k, v, k_cache, v_cache, page_table, cache_len, None, 0.5, 0, 0.0, None
    ).bfloat16()


# ----------------------------------------------------------------------------------------------------------------------
# Who is asked, in which order


@pytest.mark.parametrize("hardware,first", [(CPU, "torch"), (H200, "triton"), (MI300X, "triton")])
def test_auto_prefers_by_vendor_and_always_ends_with_plain_torch(hardware: Hardware, first: str):
    order = candidates(hardware, "auto", "verify")
    assert order[0] == first and order[-1] == "torch"


def test_a_name_forces_one_provider_and_a_dict_does_so_by_stage():
    hybrid = {"prefill": "torch", "verify": "triton"}
    assert candidates(H200, "torch", "draft") == ("torch",)
    assert candidates(H200, hybrid, "prefill") == ("torch",)
    assert candidates(H200, hybrid, "verify") == ("triton",)
    assert candidates(H200, hybrid, "draft") == candidates(H200, "auto", "draft"), "an unnamed stage is automatic"


@pytest.mark.parametrize("backend", ["fa99", {"verify": "fa99"}])
def test_an_unknown_provider_is_an_error_that_lists_the_known_ones(backend):
    with pytest.raises(BackendError, match="fa99") as error:
        candidates(H200, backend, "verify")
    assert all(name in str(error.value) for name in providers.PROVIDERS)


def test_an_unknown_stage_is_an_error_that_lists_the_known_ones():
    with pytest.raises(BackendError, match=r"verfy.*prefill, verify, draft"):
        candidates(H200, {"verfy": "torch"}, "draft")


# ----------------------------------------------------------------------------------------------------------------------
# The choice


def test_the_first_that_supports_the_node_wins_and_losers_keep_their_reason(stubs):
    stubs["triton"].refuse = lambda node: "no soft-capping" if node.softcap else None
    plain, sliding, capped = select_backend(four_layers(), H200, "auto", 64)
    assert (plain.provider, sliding.provider, capped.provider) == ("triton", "triton", "torch")
    assert plain.losers == {"torch": "triton comes first"}
    assert capped.losers == {"triton": "no soft-capping"}
    assert "sm90" in plain.reason


def test_a_provider_that_is_not_installed_loses_with_the_command_that_installs_it(stubs):
    stubs["triton"].problem = "Triton is not installed: pip install triton"
    choices = select_backend(four_layers(), H200, "auto", 64)
    assert {c.provider for c in choices} == {"torch"}
    assert all(c.losers == {"triton": "Triton is not installed: pip install triton"} for c in choices)
    assert stubs["triton"].asked == [], "an absent provider is not asked what it supports"


def test_layers_that_need_the_same_share_a_choice(stubs):
    choices = select_backend(four_layers(), H200, "auto", 64)
    assert [c.layers for c in choices] == [(0, 2), (1,), (3,)]
    assert [c.node.window for c in choices] == [0, 16, 0]


def test_no_provider_is_an_error_that_names_the_node_and_everyones_reason(stubs):
    stubs["triton"].refuse = lambda node: "head_dim 8 is too small"
    stubs["torch"].refuse = lambda node: "on strike"
    with pytest.raises(BackendError) as error:
        select_backend(four_layers(), H200, "auto", 64)
    text = str(error.value)
    for part in ("verify graph", "layers 0–2", "4/2 heads", "triton: head_dim 8 is too small", "torch: on strike"):
        assert part in text


def test_a_forced_provider_is_never_replaced_by_another(stubs):
    stubs["triton"].refuse = lambda node: "no soft-capping" if node.softcap else None
    with pytest.raises(BackendError, match="no soft-capping"):
        select_backend(four_layers(), H200, "triton", 64)
    assert stubs["torch"].asked == []


def test_a_dict_chooses_for_the_graphs_own_stage(stubs):
    backend = {"prefill": "torch"}
    assert {c.provider for c in select_backend(four_layers("prefill"), H200, backend, 64)} == {"torch"}
    assert {c.provider for c in select_backend(four_layers("draft"), H200, backend, 64)} == {"triton"}


# ----------------------------------------------------------------------------------------------------------------------
# What it leaves in the graph


def test_targets_are_untouched_and_every_node_carries_its_provider(stubs):
    stubs["triton"].refuse = lambda node: "no sinks" if node.has_sinks else None
    graph = four_layers()
    before = graph.gm.code
    select_backend(graph, H200, "auto", 64)
    assert graph.gm.code == before and names(graph) == ["attention"] * 4
    assert [n.meta["provider"] for n in find(graph, "attention")] == ["triton", "triton", "triton", "torch"]
    assert [n.meta["attention_node"].window for n in find(graph, "attention")] == [0, 16, 0, 0]
    assert graph.report[-1] == "select_backend: 2 layers -> triton; 1 layers -> triton; 1 layers -> torch"


# ----------------------------------------------------------------------------------------------------------------------
# What a provider is told


def test_a_window_node_is_described_by_its_shapes_and_constants(stubs):
    *_, capped = select_backend(four_layers(), H200, "auto", 64)
    assert capped.node == AttentionNode(
        op="attention", stage="verify", batch=2, num_tokens=3, num_q_heads=4, num_kv_heads=2, head_dim=8, v_head_dim=8,
        page_size=64, window=0, softcap=30.0, has_sinks=True, is_tree=False, dtype=torch.float32,
        kv_dtype=torch.float32,
    )  # fmt: skip
    assert stubs["triton"].asked[-1] == (capped.node, H200)


def test_packed_prompts_have_no_fixed_shape(stubs):
    node = select_backend(four_layers("prefill"), H200, "auto", 16)[1].node
    assert (node.op, node.batch, node.num_tokens, node.window) == ("prefill_attention", None, None, 16)
    assert (node.num_q_heads, node.num_kv_heads, node.head_dim, node.page_size) == (4, 2, 8, 16)


@pytest.mark.parametrize("kind", ["verify", "prefill"])
def test_latent_attention_is_one_key_value_head_whose_values_are_narrower(stubs, kind: str):
    graph = stage(stage_graph(latent_layer, kind, **mla_inputs(batch=1)))
    (choice,) = select_backend(graph, H200, "auto", 64)
    assert choice.node.op == ("mla_attention" if kind == "verify" else "mla_prefill_attention")
    assert (choice.node.num_q_heads, choice.node.num_kv_heads) == (4, 1)
    assert (choice.node.head_dim, choice.node.v_head_dim) == (8, 6)


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("latent", [False, True], ids=["attention", "mla"])
def test_trees_are_told_from_chains(stubs, latent: bool, tree: bool):
    if latent:
        graph = stage_graph(latent_layer, "verify", **mla_inputs())
    else:
        graph = stage_graph(mixed_widths, "verify", **attention_inputs())
    (choice,) = select_backend(stage(graph, tree=tree), H200, "auto", 64)
    assert choice.node.is_tree == tree


def test_value_heads_of_another_width_and_low_precision_are_seen(stubs):
    inputs = attention_inputs()
    half = {n: Input(n, torch.zeros(2, 3, h, d).bfloat16()) for n, h, d in [("q", 4, 8), ("k", 2, 8), ("v", 2, 5)]}
    graph = stage(stage_graph(mixed_widths, "verify", **{**inputs, **half}))
    (choice,) = select_backend(graph, H200, "auto", 64)
    assert (choice.node.head_dim, choice.node.v_head_dim) == (8, 5)
    assert choice.node.dtype == choice.node.kv_dtype == torch.bfloat16
