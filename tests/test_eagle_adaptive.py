"""Rounds of changing shapes with an EAGLE head: plain rounds put the target's states aside, and the head catches up."""

from __future__ import annotations

import random

import pytest
import torch
from heads import target_states
from tiny import tiny_model
from torch import Tensor

from spec_compile import spec_compile
from spec_compile.config import chain
from spec_compile.hf_integration.heads.eagle3 import random_eagle3_head
from spec_compile.runtime.draft import MOST_PENDING
from spec_compile.runtime.engine import Engine, Request
from spec_compile.runtime.state import SamplingPlan

PLAN = SamplingPlan()
ROUNDS = {"chain": {"num_steps": 3}, "tree": {"num_steps": 4, "topk": 3, "num_draft_tokens": 8}}


def engine_with_head(kind: str) -> Engine:
    model = tiny_model("llama")
    head = random_eagle3_head(model, draft_vocab_size=40)
    return spec_compile(model, draft=head, compile="none", **ROUNDS[kind]).spec._engine


def request(lengths: list[int], new_tokens: int) -> Request:
    generator = torch.Generator().manual_seed(3)
    return Request(
        prompts=[torch.randint(3, 96, (n,), generator=generator) for n in lengths],
        end_len=[n + new_tokens for n in lengths],
        min_len=[0] * len(lengths),
        eos_ids=[],
        seed=list(range(len(lengths))),
        plan=PLAN,
    )


def predicted_from_scratch(engine: Engine, tokens: Tensor, cache_len: int) -> Tensor:
    """What the head says behind ``tokens`` [cache_len + 1], by plain forwards of both models: [Vd]."""
    head, target = engine.draft.head, engine.target.model
    with torch.no_grad():
        fed = head.project(target_states(target, head.taps, tokens[:cache_len]))
        hidden = head(tokens[None, 1 : cache_len + 1], fed, torch.arange(cache_len)[None])
    return head.logits(hidden)[0, -1]


@torch.no_grad()
@pytest.mark.parametrize("kind", ROUNDS)
def test_any_order_of_plain_and_drafting_rounds_keeps_the_head_true(kind: str) -> None:
    engine = engine_with_head(kind)
    state = engine.admit(request([11, 1, 7], 400))
    shapes = [chain(0), chain(2), engine.shape]
    picks = random.Random(5)
    for shape in [chain(0)] * (2 * MOST_PENDING + 3) + [picks.choice(shapes) for _ in range(30)] + [chain(0)] * 3 + [chain(2)]:
        engine.launch(state, PLAN, shape)
    for row in range(3):
        length = int(state.cache_len[row])
        expected = predicted_from_scratch(engine, state.tokens[row, : length + 1], length)
        torch.testing.assert_close(engine.draft.level_logits[row], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_head_that_is_not_told_is_wrong() -> None:
    """The control of the test above: without catching up its prediction is another."""
    engine = engine_with_head("chain")
    engine._catch_up = lambda state: None
    state = engine.admit(request([11], 400))
    for shape in [chain(0)] * 5 + [chain(3)]:
        engine.launch(state, PLAN, shape)
    length = int(state.cache_len[0])
    expected = predicted_from_scratch(engine, state.tokens[0, : length + 1], length)
    assert (engine.draft.level_logits[0] - expected).abs().max() > 1e-2


@torch.no_grad()
def test_the_text_does_not_depend_on_the_shapes() -> None:
    engine = engine_with_head("tree")
    texts = []
    for shapes in ([chain(0)], [engine.shape], [chain(0), engine.shape, chain(2)]):
        state = engine.admit(request([9, 4], 60))
        step = 0
        while not bool(state.finished[:2].all()):
            engine.launch(state, PLAN, shapes[step % len(shapes)])
            step += 1
        texts.append(state.tokens[:2, :69].clone())
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])


def test_what_plain_rounds_put_aside_ends_with_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Already before the next request's rounds are prepared: those run over a state in which nothing was written yet."""
    engine = engine_with_head("chain")
    state = engine.admit(request([5], 60))
    found = []
    prepare = Engine.prepare

    def watched(self: Engine, *args: object) -> None:
        found.append((int(self.draft.pending.count.sum()), self._plain_rounds))
        prepare(self, *args)

    monkeypatch.setattr(Engine, "prepare", watched)
    with torch.no_grad():
        for _ in range(3):
            engine.launch(state, PLAN, chain(0))
        assert int(engine.draft.pending.count[0]) == engine._plain_rounds == 3
        engine.admit(request([5], 60))
    assert found == [(0, 0)]
    assert int(engine.draft.pending.count[0]) == engine._plain_rounds == 0
