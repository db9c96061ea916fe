"""``narrow_logits``: the head computes what the stage reads, and nothing else leaves the graph."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from stage_graphs import Input, find, parameter, run, runtime_inputs, stage_graph
from torch import nn

from spec_compile.errors import CaptureError
from spec_compile.passes.graph import StageGraph, fake
from spec_compile.passes.narrow_logits import narrow_logits

HIDDEN, VOCAB, TOKENS = 8, 13, 9
HIDDEN_INPUT = Input("hidden", torch.zeros(1, TOKENS, HIDDEN))


pytestmark = pytest.mark.usefixtures("fresh_seed")


def plain_head(hidden, head):
    return F.linear(F.silu(hidden), head)


def biased_head(hidden, head, bias):
    return F.linear(F.silu(hidden), head, bias)


def softcapped_head(hidden, head):
    logits = F.linear(hidden, head) / 3.0
    return (torch.tanh(logits) * 3.0 * 0.5).float()


def graph_of(fn, kind: str, **weights: nn.Parameter) -> StageGraph:
    return stage_graph(fn, kind, hidden=HIDDEN_INPUT, **weights)


def outputs(graph: StageGraph) -> tuple:
    return next(n for n in graph.gm.graph.nodes if n.op == "output").args[0]


HEADS = pytest.mark.parametrize("head", [plain_head, softcapped_head], ids=["plain", "softcapped"])


@HEADS
def test_prefill_computes_the_last_token_of_each_prompt_only(head):
    weight = parameter(VOCAB, HIDDEN)
    hidden, rows = torch.randn(1, TOKENS, HIDDEN), torch.tensor([0, 3, 3, 8])
    (everything,) = run(graph_of(head, "prefill", head=weight), hidden=hidden)
    graph = narrow_logits(graph_of(head, "prefill", head=weight), argmax=False)

    (logits,) = run(graph, hidden=hidden, logit_index=rows)

    torch.testing.assert_close(logits, everything[:, rows], rtol=1e-5, atol=1e-5)
    (linear,) = find(graph, "linear")
    assert linear.args[0].target == "index_select", "rows are taken before the head, not behind it"
    assert runtime_inputs(graph) == ["hidden", "logit_index"]


@HEADS
@pytest.mark.parametrize("kind", ["verify", "draft"])
def test_windows_need_every_slot(head, kind: str):
    weight, hidden = parameter(VOCAB, HIDDEN), torch.randn(1, TOKENS, HIDDEN)
    before = graph_of(head, kind, head=weight)
    code = before.gm.code
    after = narrow_logits(before, argmax=False)
    assert after.gm.code == code and runtime_inputs(after) == ["hidden"]
    assert run(after, hidden=hidden)[0].shape == (1, TOKENS, VOCAB)


@HEADS
@pytest.mark.parametrize("kind", ["prefill", "verify"])
def test_argmax_returns_ids_and_keeps_logits_inside(head, kind: str):
    weight, hidden, rows = parameter(VOCAB, HIDDEN), torch.randn(1, TOKENS, HIDDEN), torch.tensor([2, 5])
    (everything,) = run(graph_of(head, "verify", head=weight), hidden=hidden)
    graph = narrow_logits(graph_of(head, kind, head=weight), argmax=True)

    result = run(graph, hidden=hidden, logit_index=rows)

    expected = everything.argmax(-1)
    assert len(result) == 1 and result[0].dtype == torch.int64
    assert torch.equal(result[0], expected[:, rows] if kind == "prefill" else expected)
    assert [n.target for n in outputs(graph)] == ["argmax"]


def test_ties_go_to_the_lowest_id_as_in_generate():
    weight = nn.Parameter(torch.zeros(VOCAB, HIDDEN))
    weight.data[[4, 7]] = 1.0
    graph = narrow_logits(graph_of(plain_head, "verify", head=weight), argmax=True)
    (ids,) = run(graph, hidden=torch.ones(1, TOKENS, HIDDEN))
    assert set(ids.flatten().tolist()) == {4}


SLICED = 64 * 35  # 7 slices of 320


@pytest.mark.parametrize(
    ("vocab_size", "rows"), [(SLICED, 8), (SLICED + 1, 8), (SLICED, 193)], ids=["sliced", "no divisor", "many rows"]
)
def test_large_vocabularies_are_searched_in_slices(vocab_size: int, rows: int):
    """Every token of the vocabulary is found; of equal logits the first, within a slice and across; NaN as argmax has it."""

    def logits_are_given(hidden):
        return hidden

    graph = narrow_logits(
        stage_graph(logits_are_given, "verify", hidden=Input("hidden", torch.zeros(1, rows, vocab_size))), argmax=True
    )
    assert len(find(graph, "unflatten")) == ((vocab_size, rows) == (SLICED, 8))
    logits = torch.randn(1, rows, vocab_size)
    logits[0, 0, 5] = logits[0, 0, 17] = logits[0, 0, 1000] = 9.0
    logits[0, 1, [319, 320, 640]] = 9.0
    logits[0, 2, [400, 300]] = float("nan")
    logits[0, 3], logits[0, 4] = float("-inf"), 0.0
    logits[0, 5, -1] = 9.0
    logits[0, 6, 2000] = float("inf")
    (ids,) = run(graph, hidden=logits)
    assert torch.equal(ids, logits.argmax(-1)) and ids[0, :6].tolist() == [5, 319, 300, 0, 0, vocab_size - 1]


def test_a_head_with_a_bias():
    weight, bias, hidden = parameter(VOCAB, HIDDEN), parameter(VOCAB), torch.randn(1, TOKENS, HIDDEN)
    (everything,) = run(graph_of(biased_head, "verify", head=weight, bias=bias), hidden=hidden)
    graph = narrow_logits(graph_of(biased_head, "prefill", head=weight, bias=bias), argmax=False)
    (logits,) = run(graph, hidden=hidden, logit_index=torch.tensor([8, 1]))
    torch.testing.assert_close(logits, everything[:, [8, 1]], rtol=1e-5, atol=1e-5)


def test_the_head_is_the_last_linear():
    """The body is full of linears; the one nearest to the logits is the head."""

    def body_and_head(hidden, body, head):
        return F.linear(F.linear(hidden, body).relu(), head) * 2

    body, head = parameter(HIDDEN, HIDDEN), parameter(VOCAB, HIDDEN)
    graph = narrow_logits(graph_of(body_and_head, "prefill", body=body, head=head), argmax=False)
    narrowed = [n for n in find(graph, "linear") if n.args[0].target == "index_select"]
    assert [n.args[1].meta["binding"] is head for n in narrowed] == [True]
    assert fake(find(graph, "linear")[0]).shape[1] == TOKENS


def test_logits_that_come_from_no_linear_are_an_error():
    def no_head(hidden):
        return torch.cos(hidden) * 2

    with pytest.raises(CaptureError, match="not the result of one linear"):
        narrow_logits(graph_of(no_head, "prefill"), argmax=False)


def test_the_report_says_what_was_narrowed():
    weight = parameter(VOCAB, HIDDEN)
    assert narrow_logits(graph_of(plain_head, "verify", head=weight), argmax=False).report == []
    report = narrow_logits(graph_of(plain_head, "prefill", head=weight), argmax=True).report
    assert [line.split(":")[0] for line in report] == ["narrow_logits"] * 2
    assert "last token of each prompt" in report[0] and "token ids" in report[1]
