"""Sharing traces among tests: the graphs of models that are alike, and only of these, bound to each one's own weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import trace_once
from tiny import left_padded, tiny_model
from transformers import PreTrainedModel

from spec_compile import spec_compile
from spec_compile.hf_integration.capture import capture_window
from spec_compile.hf_integration.heads.dflash import random_dflash_head
from spec_compile.hf_integration.heads.eagle3 import random_eagle3_head
from spec_compile.passes.graph import placeholders
from spec_compile.runtime import model_runner


def window(model: PreTrainedModel) -> object:
    return model_runner.capture_window(model, 2, 3, "verify", ())


def test_a_model_like_another_takes_over_its_graphs_with_its_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, settings = left_padded(2, 9), {"max_new_tokens": 6, "do_sample": False}
    spec_compile(tiny_model("qwen3", seed=1), num_steps=2, adaptive=False, compile="none").generate(**inputs, **settings)
    before = len(trace_once._traced)
    ours, plain = (
        spec_compile(tiny_model("qwen3", seed=2), num_steps=2, adaptive=False, compile="none"),
        tiny_model("qwen3", seed=2),
    )
    assert torch.equal(ours.generate(**inputs, **settings), plain.generate(**inputs, **settings))
    assert len(trace_once._traced) == before and ours.spec.stats().mode == "rounds"


def test_a_graph_taken_over_is_the_one_that_would_have_been_captured() -> None:
    window(tiny_model("gpt_oss", seed=1))
    model = tiny_model("gpt_oss", seed=2)
    graphs = [window(model), capture_window(model, 2, 3, "verify")]
    assert graphs[0].gm.code == graphs[1].gm.code and graphs[0].stage == graphs[1].stage
    for ours, captured in zip(*(placeholders(graph.gm) for graph in graphs), strict=True):
        ours, captured = ours.meta["binding"], captured.meta["binding"]
        assert ours is captured or ours == captured  # the model's own tensors, and equal names of inputs and slots


def _hook(model: PreTrainedModel) -> None:
    model.model.layers[0].register_forward_hook(lambda *_: None)


def _scale(model: PreTrainedModel) -> None:
    model.model.layers[1].self_attn.scaling *= 2


def _tie(model: PreTrainedModel) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def _attention(model: PreTrainedModel) -> None:
    model.set_attn_implementation("eager")


@pytest.mark.parametrize("change", [_hook, _scale, _tie, _attention])
def test_models_that_differ_share_nothing(change: Callable[[PreTrainedModel], None]) -> None:
    changed = tiny_model("llama")
    change(changed)
    assert trace_once._what_a_trace_sees(changed) != trace_once._what_a_trace_sees(tiny_model("llama"))
    assert trace_once._what_a_trace_sees(tiny_model("llama", seed=3)) == trace_once._what_a_trace_sees(tiny_model("llama"))


def test_heads_are_alike_by_their_flags() -> None:
    model, alike = tiny_model("llama"), trace_once._what_a_trace_sees
    assert alike(random_eagle3_head(model, seed=1)) == alike(random_eagle3_head(model, seed=2))
    assert alike(random_eagle3_head(model)) != alike(random_eagle3_head(model, norm_output=True))
    assert alike(random_dflash_head(model, 4)) != alike(random_dflash_head(model, 5))
