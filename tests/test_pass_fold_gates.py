"""``fold_gates``: delta rules take raw gates and unrepeated heads, and compute what they computed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from stage_graphs import Input, run, stage_graph

from spec_compile.errors import CaptureError
from spec_compile.ops import linear_attention as ops
from spec_compile.passes.fold_gates import fold_gates
from spec_compile.passes.graph import CacheSlot, StageGraph

B, N, HK, HV, D = 2, 3, 2, 4, 8


def rule(q, k, v, a, b, A_log, dt_bias, state, kv_window, gate_window, state_slot):
    """As transformers 5.17 writes it: gates outside, key heads repeated."""
    g = -A_log.float().exp() * F.softplus(a.float() + dt_bias)
    q, k = q.repeat_interleave(HV // HK, dim=2), k.repeat_interleave(HV // HK, dim=2)
    windows = (kv_window, gate_window, state_slot, None, 0.5)
    return torch.ops.spec_compile.gated_delta_rule(q, k, v, g, b.sigmoid(), state, *windows)


def other_decay(q, k, v, a, b, A_log, dt_bias, state, kv_window, gate_window, state_slot):
    windows = (kv_window, gate_window, state_slot, None, 0.5)
    return torch.ops.spec_compile.gated_delta_rule(q, k, v, -F.softplus(a), b.sigmoid(), state, *windows)


def graph_of(fn) -> StageGraph:
    return stage_graph(
        fn,
        "verify",
        q=Input("q", torch.zeros(B, N, HK if fn is rule else HV, D)),
        k=Input("k", torch.zeros(B, N, HK if fn is rule else HV, D)),
        v=Input("v", torch.zeros(B, N, HV, D)),
        a=Input("a", torch.zeros(B, N, HV)),
        b=Input("b", torch.zeros(B, N, HV)),
        A_log=torch.randn(HV),
        dt_bias=torch.randn(HV),
        state=CacheSlot(0, "state"),
        kv_window=CacheSlot(0, "kv_window"),
        gate_window=CacheSlot(0, "gate_window"),
        state_slot=Input("state_slot", torch.zeros(B, dtype=torch.int32)),
    )


def test_gates_and_heads_go_into_the_op() -> None:
    graph = fold_gates(graph_of(rule))
    calls = [n for n in graph.gm.graph.nodes if n.op not in ("placeholder", "output")]
    assert [n.target for n in calls] == [torch.ops.spec_compile.gdn_verify], "nothing is computed around it any more"
    assert [arg.name for arg in calls[0].args[:7]] == ["q", "k", "v", "a", "b", "a_log", "dt_bias"]
    assert calls[0].meta["example_value"].shape == (B, N, HV, D)


def test_the_result_is_the_same() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(B, N, HK, D), torch.randn(B, N, HK, D), torch.randn(B, N, HV, D)
    a, b, A_log, dt_bias = torch.randn(B, N, HV), torch.randn(B, N, HV), torch.randn(HV), torch.randn(HV)
    slots = torch.tensor([1, 2], dtype=torch.int32)
    state = torch.randn(3, HV, D, D)
    before = rule(q, k, v, a, b, A_log, dt_bias, state, torch.zeros(3, N, 2 * HV * D), torch.zeros(3, N, 2 * HV), slots)
    windows = torch.zeros(3, N, HK * D + HV * D), torch.zeros(3, N, 2 * HV)
    after = ops.gdn_verify(q, k, v, a, b, A_log, dt_bias, state, *windows, slots, None, 0.5)
    torch.testing.assert_close(after, before)


def test_gates_of_another_form_are_refused() -> None:
    with pytest.raises(CaptureError, match=r"gates of .* are not"):
        fold_gates(graph_of(other_decay))


def test_a_graph_without_delta_rules_stays_as_it_is() -> None:
    graph = stage_graph(lambda x: x + 1, "verify", x=Input("x", torch.zeros(2)))
    assert torch.equal(run(fold_gates(graph), x=torch.ones(2))[0], torch.full((2,), 2.0)) and graph.report == []
