"""``tap_hidden_states``: the states a draft reads leave the graph in one tensor, and nothing else does but the logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from stage_graphs import bindings, find, names, parameter, run, stage_graph

from spec_compile.passes.narrow_logits import narrow_logits
from spec_compile.passes.tap_hidden_states import tap_hidden_states

HIDDEN, VOCAB, TOKENS = 8, 12, 5


def forward(hidden, first, second, head, other):
    """Two layers with their states tapped, and something a cache object kept."""
    low = F.linear(hidden, first)
    high = F.linear(low, second)
    return F.linear(high, head), low, high, F.linear(hidden, other)


def captured(kind: str = "verify"):
    weights = {"first": parameter(HIDDEN, HIDDEN), "second": parameter(HIDDEN, HIDDEN)}
    weights |= {"head": parameter(VOCAB, HIDDEN), "other": parameter(VOCAB, HIDDEN)}
    return stage_graph(forward, kind, hidden=torch.randn(1, TOKENS, HIDDEN), **weights), weights


@pytest.mark.parametrize("num_taps", [0, 1, 2])
def test_states_stand_side_by_side_behind_the_logits(num_taps: int):
    graph, weights = captured()
    hidden = torch.randn(1, TOKENS, HIDDEN)
    logits, low, high, _ = run(graph, hidden=hidden)
    after = run(tap_hidden_states(graph, num_taps), hidden=hidden)
    assert torch.equal(after[0], logits) and len(after) == (2 if num_taps else 1)
    if num_taps:
        assert torch.equal(after[1], torch.cat([low, high][:num_taps], -1))
    assert not any(b is weights["other"] for b in bindings(graph)), "what else was returned is dropped with its work"
    assert names(graph).count("linear") == 3


def test_states_of_every_token_survive_the_narrowed_head():
    """Prefill computes logits of each prompt's last token only, and states of all."""
    graph, _ = captured("prefill")
    hidden, rows = torch.randn(1, TOKENS, HIDDEN), torch.tensor([1, 4])
    logits, low, high, _ = run(graph, hidden=hidden)
    graph = narrow_logits(tap_hidden_states(graph, 2), argmax=True)
    ids, states = run(graph, hidden=hidden, logit_index=rows)
    assert torch.equal(ids, logits[:, rows].argmax(-1))
    assert torch.equal(states, torch.cat([low, high], -1))
    assert len(find(graph, "argmax")) == 1
