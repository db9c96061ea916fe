"""Draft heads through what a model meets in use: larger requests, interruptions, switches, another model beside it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from dflash_heads import own_vocabulary
from tiny import left_padded, tiny_model
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from spec_compile import spec_compile
from spec_compile.hf_integration.heads.eagle3 import random_eagle3_head

GREEDY = {"do_sample": False, "max_new_tokens": 12}
KINDS = {"tree": {"num_steps": 3, "topk": 2, "num_draft_tokens": 6}, "chain": {"num_steps": 3}, "dflash": {}}


def compiled(kind: str, seed: int = 0, **options: object) -> PreTrainedModel:
    model = tiny_model("llama", seed=seed)
    if kind == "dflash":
        head = own_vocabulary(model, 4, torch.arange(8, 72), seed=seed)
    else:
        head = random_eagle3_head(model, draft_vocab_size=48, seed=seed)
    return spec_compile(model, draft=head, compile="none", **KINDS[kind], **options)


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module", params=KINDS)
def model(request) -> PreTrainedModel:
    return compiled(request.param)


def check(model: PreTrainedModel, reference: PreTrainedModel, rows: int, prompt: int = 9, **settings: object) -> Tensor:
    inputs = left_padded(rows, prompt, seed=prompt)
    ours, plain = (m.generate(**inputs, **GREEDY | settings) for m in (model, reference))
    assert torch.equal(ours, plain) and model.spec.stats().mode == "rounds"
    return plain


def test_pools_that_grow_and_shrink_between_requests(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    """Rows, then length (past the smallest capacity), then the first request again: heads' buffers move with the pools."""
    longer = reference.config.max_position_embeddings  # of positions, not of slots
    for rows, prompt in ((1, 9), (3, 9), (2, longer - 20), (1, 9)):
        check(model, reference, rows, prompt)
    before = model.spec._engine.target.programs.pool.capacity
    model.spec._engine.reserve(1, 2 * before)
    assert model.spec._engine.target.programs.pool.capacity == model.spec._engine.draft.programs[0].pool.capacity == 2 * before
    check(model, reference, 3)


def test_an_interrupt_between_two_pools_leaves_none(
    model: PreTrainedModel, reference: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(model, reference, 2)
    engine = model.spec._engine
    capacity = 2 * engine.target.programs.pool.capacity

    def interrupted(rows: int, capacity: int) -> bool:
        engine.draft.programs[0].reserve(rows, capacity)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine.draft, "reserve", interrupted)
        engine.reserve(2, capacity)
    engine.reserve(2, capacity)
    assert engine.target.programs.pool.capacity == engine._buffers.tokens.shape[1] == capacity
    check(model, reference, 2)


class Breaks(BaseStreamer):
    """Raises when it is shown its n-th value."""

    def __init__(self, at: int) -> None:
        self.left, self.shown = at, []

    def put(self, value: Tensor) -> None:
        self.shown.append(value)
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt

    def end(self) -> None:
        raise AssertionError("the call did not end")


@pytest.mark.parametrize("at", [1, 2, 6])
def test_requests_after_one_that_was_interrupted(model: PreTrainedModel, reference: PreTrainedModel, at: int) -> None:
    plain = check(model, reference, 2)
    streamer = Breaks(at)
    with pytest.raises(KeyboardInterrupt):
        model.generate(**left_padded(2, 9, seed=9), **GREEDY, streamer=streamer)
    left = model.spec.partial_sequences()
    assert left is None or torch.equal(left, plain[:, : left.shape[1]])
    check(model, reference, 2)
    check(model, reference, 3, 14)


def test_switching_off_and_on(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    inputs = left_padded(2, 9, seed=9)
    plain = check(model, reference, 2)
    with model.spec.disable():
        assert torch.equal(model.generate(**inputs, **GREEDY), plain) and model.spec.stats().mode == "plain"
        with model.spec.enable():
            check(model, reference, 2)
        hidden = model.generate(**inputs, **GREEDY, output_hidden_states=True, return_dict_in_generate=True).hidden_states
        assert len(hidden) == 12
    check(model, reference, 2)
    check(model, reference, 4)  # captured now, past the hooks that transformers has left on the model


def test_a_criterion_ends_the_call_inside_a_window(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    text = check(model, reference, 3)
    for length in (11, 12, 13, 14):  # one of them inside, wherever windows end

        def stop(input_ids: Tensor, scores: object, length: int = length, **_: object) -> Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] == length)

        cut = check(model, reference, 3, stopping_criteria=[stop])
        assert torch.equal(cut, text[:, :length])


def test_sampled_rows_repeat_and_do_not_depend_on_their_batch(model: PreTrainedModel) -> None:
    inputs = left_padded(3, 9, seed=9)

    def text(rows: int, **settings: object) -> Tensor:
        torch.manual_seed(3)
        return model.generate(**{k: x[:rows] for k, x in inputs.items()}, do_sample=True, max_new_tokens=12, **settings)

    assert torch.equal(text(3), text(3)) and torch.equal(text(3)[:1], text(1))
    assert torch.equal(text(3, top_k=1), model.generate(**inputs, **GREEDY)), "of one choice the sample is the greedy text"


def test_two_models_with_heads_take_turns(reference: PreTrainedModel) -> None:
    """Each reads its own target's states: no other model uses the hooks and buffers of one."""
    other = tiny_model("llama", seed=5)
    pairs = [(compiled("tree"), reference), (compiled("dflash", seed=5), other), (compiled("chain", seed=5), other)]
    for rows in (1, 2, 1):
        for model, plain in pairs:
            check(model, plain, rows)


@pytest.mark.parametrize("kind", KINDS)
def test_remove_frees_the_head_and_its_pool(kind: str, reference: PreTrainedModel) -> None:
    model = compiled(kind)
    check(model, reference, 1)
    engine, draft = model.spec._engine, model.spec._engine.draft
    left = [weakref.ref(x) for x in (engine, draft, draft.programs[0], draft.programs[0].pool, draft.runner, draft.runner.head)]
    head_hooks = [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks]
    del engine, draft
    model.spec.remove()
    gc.collect()
    assert [ref() for ref in left] == [None] * len(left) and not head_hooks
    inputs = left_padded(1, 9, seed=9)
    assert torch.equal(model.generate(**inputs, **GREEDY), reference.generate(**inputs, **GREEDY))
