"""A capture proves itself: right graphs pass in every type, a graph with one planted fault is refused with both figures."""

from __future__ import annotations

import re

import pytest
import torch
from tiny import FAMILIES, RECURRENT_FAMILIES, left_padded, tiny_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from spec_compile import spec_compile
from spec_compile.errors import CaptureError
from spec_compile.hf_integration import self_check
from spec_compile.hf_integration.self_check import _captured_logits, _random_ids, _text, check_capture
from spec_compile.passes.graph import StageGraph, placeholders
from spec_compile.runtime import model_runner

_OPS = torch.ops.spec_compile
# Where an op has its scale, window, soft-cap and sinks.
_ARGUMENTS = {_OPS.attention: {"scale": 8, "window": 9, "softcap": 10, "sinks": 11}, _OPS.mla_attention: {"scale": 6}}
_DROPPED = {"scale": 1.0, "softcap": 0.0, "sinks": None}
_SHORT = ("bfloat16", "float16")


def captured(model: PreTrainedModel) -> StageGraph:
    return model_runner.capture_prefill(model, ())


def plant(graph: StageGraph, fault: str) -> StageGraph:
    """A copy of ``graph`` with one fault in all layers."""
    graph = graph.copy()
    for node in [n for n in graph.gm.graph.nodes if n.target in _ARGUMENTS]:
        places = _ARGUMENTS[node.target]
        if fault in _DROPPED and fault in places:
            node.update_arg(places[fault], _DROPPED[fault])
        elif fault.startswith("window") and node.args[9]:
            node.update_arg(9, node.args[9] + int(fault.removeprefix("window")))
    for node in placeholders(graph.gm):
        value = node.meta["binding"]
        frequencies = isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and value.dim() == 1 and len(value) > 2
        if fault == "rotary" and frequencies and value[0] == 1:
            node.meta = {**node.meta, "binding": value**1.4}  # from a base of 10,000 to one of 400,000
    return graph


@pytest.mark.parametrize("family", [*FAMILIES, *RECURRENT_FAMILIES])
def test_right_graphs_pass(family: str) -> None:
    model = tiny_model(family)
    check_capture(model, captured(model))


@pytest.mark.parametrize("dtype", _SHORT)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_next"])
def test_right_graphs_of_short_types_pass(family: str, dtype: str) -> None:
    model = tiny_model(family).to(getattr(torch, dtype))
    check_capture(model, captured(model))


_FAULTS = [
    ("llama", "scale"), ("llama", "rotary"), ("mistral", "window+1"), ("mistral", "window-1"), ("gemma2", "softcap"),
    ("gemma2", "window+1"), ("cohere2", "window-1"), ("gpt_oss", "sinks"), ("deepseek_v3", "scale"), ("deepseek_v3", "rotary"),
    ("qwen3_moe", "scale"), ("qwen3_next", "scale"), ("qwen3_next", "rotary"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "fault"), _FAULTS)
def test_a_planted_fault_is_refused_with_both_figures(family: str, fault: str) -> None:
    model = tiny_model(family)
    with pytest.raises(
        CaptureError, match=r"captured graph is not its forward.* differ by (\S+) of .* explains (\S+);"
    ) as said:
        check_capture(model, plant(captured(model), fault))
    figures = re.search(r"differ by (\S+) of .* explains (\S+);", str(said.value))
    assert float(figures[1]) > 2 * float(figures[2])


@pytest.mark.parametrize("dtype", _SHORT)
@pytest.mark.parametrize(("family", "fault"), [("llama", "scale"), ("mistral", "window+1"), ("gpt_oss", "sinks")])
def test_a_planted_fault_is_refused_in_short_types(family: str, fault: str, dtype: str) -> None:
    model = tiny_model(family).to(getattr(torch, dtype))
    with pytest.raises(CaptureError, match="captured graph is not its forward"):
        check_capture(model, plant(captured(model), fault))


def test_states_that_are_not_advanced_are_seen(monkeypatch) -> None:
    """The window stands behind the prompt's states."""
    model = tiny_model("qwen3_5_text")
    monkeypatch.setattr(self_check, "_commit", lambda *args: None)
    with pytest.raises(CaptureError, match="captured graph is not its forward"):
        check_capture(model, captured(model))


def test_spec_compile_checks_itself_and_leaves_the_model_as_it_was(monkeypatch) -> None:
    capture, model, inputs = model_runner.capture_prefill, tiny_model("llama"), left_padded(2, 9)
    monkeypatch.setattr(model_runner, "capture_prefill", lambda *args: plant(capture(*args), "scale"))
    expected, state = model.generate(**inputs, max_new_tokens=4, do_sample=False), torch.get_rng_state()
    with pytest.raises(CaptureError, match=r"LlamaForCausalLM .* self_check=False leaves .*plain generate\(\)"):
        spec_compile(model, compile="none", progress=False)
    assert not hasattr(model, "spec") and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), expected)
    spec_compile(model, compile="none", progress=False, self_check=False)
    assert hasattr(model, "spec")


def test_what_one_more_rounding_does_to_the_model_itself_is_allowed(monkeypatch) -> None:
    """Routers whose choices are near ties choose otherwise; here the type's allowance is next to nothing instead."""
    model = tiny_model("qwen3_moe").to(torch.bfloat16)
    monkeypatch.setattr(self_check, "_ALLOWED", {torch.bfloat16: 1e-9})
    check_capture(model, captured(model))
    with pytest.raises(CaptureError, match="captured graph is not its forward"):
        check_capture(model, plant(captured(model), "scale"))


@pytest.mark.parametrize(("fourth", "right"), [(0.125, True), (0.023, False)])
def test_several_roundings_are_tried_before_a_model_is_refused(fourth: float, right: bool, monkeypatch) -> None:
    """One of them need not meet the near tie of a router that the graph has met."""
    model, seen = tiny_model("llama").to(torch.bfloat16), []
    graph, errors = captured(model), iter([0.11, 0.022, 0.019, 0.023, fourth, 0.022])
    own = self_check._own_logits
    monkeypatch.setattr(self_check, "_own_logits", lambda *args: seen.append(own(*args)) or seen[-1])
    monkeypatch.setattr(self_check, "_error", lambda *args: next(errors))
    if right:
        check_capture(model, graph)
    else:
        with pytest.raises(CaptureError, match=r"differ by 1\.1e-01 .* explains 9\.2e-02"):
            check_capture(model, graph)
    assert len(seen) == (5 if right else 6) and not torch.equal(seen[1], seen[2]), "each is another rounding"


def test_a_mask_that_reaches_further_than_the_cache_is_the_graphs_meaning() -> None:
    settings = {"ffn_dim": 96, "sliding_window": 12, "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2}
    config = AutoConfig.for_model("moshi", num_attention_heads=4, num_key_value_heads=2, head_dim=16, **settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    check_capture(model, captured(model))
    with pytest.raises(CaptureError, match="captured graph is not its forward"):
        check_capture(model, plant(captured(model), "scale"))


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [({}, 16), ({"sliding_window": 16}, 24), ({"sliding_window": 4096, "max_position_embeddings": 8192}, 16),
     ({"sliding_window": 16, "max_position_embeddings": 24}, 13), ({"max_position_embeddings": 12}, 0)],
    ids=["no window", "past the window", "too far", "few positions", "too few"],
)  # fmt: skip
def test_the_text_is_longer_than_the_smallest_window_where_that_is_cheap(settings: dict, tokens: int) -> None:
    model = tiny_model("mistral", **{"sliding_window": None, **settings})
    prompt, regions = _text(model, captured(model))
    assert prompt == tokens and bool(regions) is bool(tokens)
    if regions:
        assert [i for region in regions for i in range(region.start, region.stop)] == list(range(prompt + 8))
        assert len(_captured_logits(captured(model), _random_ids(model, prompt + 8), prompt)) == prompt + 8


def test_outputs_that_a_configuration_asks_for_are_not_computed() -> None:
    """The loss of transformers 5.24's routers fails on a window behind a cache, where generate() never asks for it."""
    model = tiny_model("mixtral")
    model.config.output_router_logits = True
    check_capture(model, captured(model))
    assert model.config.output_router_logits is True


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.finfo(torch.float32).min])
def test_logits_that_are_no_numbers_by_the_model_itself_hide_no_fault_of_the_others(value: float) -> None:
    """They overflow, or are set so that tokens are never said (Chameleon's images, rows that pad a vocabulary)."""
    model = tiny_model("llama")
    model.lm_head = nn.Linear(64, 96)
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.12)
        model.lm_head.bias.zero_()[:3] = value
    graph = captured(model)
    check_capture(model, graph)
    with pytest.raises(CaptureError, match="captured graph is not its forward"):
        check_capture(model, plant(graph, "scale"))


def test_overflow_of_the_models_own_is_no_fault_of_the_graph() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[:3] = torch.inf
    check_capture(model, captured(model))


def test_a_forward_that_fails_by_itself_is_named(monkeypatch) -> None:
    model = tiny_model("llama")
    graph = captured(model)
    monkeypatch.setattr(type(model.lm_head), "forward", lambda *args: 1 / 0)
    with pytest.raises(CaptureError, match=r"its own forward fails on a text of 24 tokens \(ZeroDivisionError"):
        check_capture(model, graph)
