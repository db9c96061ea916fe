"""A graph that cannot be captured costs speed, never the call: graphs are played by the calls they would record."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from tiny import left_padded, tiny_model
from torch import Tensor

from spec_compile import spec_compile
from spec_compile.errors import CaptureError
from spec_compile.hf_integration.capture import capture_prefill
from spec_compile.hf_integration.heads.eagle3 import random_eagle3_head
from spec_compile.runtime import engine as engine_module
from spec_compile.runtime.engine import Engine, Request
from spec_compile.runtime.state import SamplingPlan

PLAN = SamplingPlan()


class PlayedGraphs:
    """``GraphCache`` on a CPU; the capture of keys that end in ``broken`` runs out of memory."""

    def __init__(self, broken: object) -> None:
        self.broken, self.rounds = broken, {}

    def capture(self, key: tuple, name: str, step: Callable[[], object]) -> None:
        if self.broken in key:
            raise torch.OutOfMemoryError("no room for a graph")
        step()
        self.rounds[key] = step

    def replay(self, key: tuple) -> object:
        return self.rounds[key]()

    def clear(self) -> None:
        self.rounds.clear()


def text_of(broken: object, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Engine]:
    """Twenty rounds of all shapes in turn, over a fresh engine that believes in graphs."""
    monkeypatch.setattr(Engine, "chooses", True)
    monkeypatch.setattr(engine_module, "eager_milliseconds", lambda step: (step(), 1.0)[1])
    model = tiny_model("llama")
    engine = spec_compile(model, draft=random_eagle3_head(model, draft_vocab_size=40), num_steps=3, compile="none").spec._engine
    engine.graphs = PlayedGraphs(broken)
    prompts = [torch.arange(3, 12), torch.arange(20, 24)]
    request = Request(prompts, [40, 35], [0, 0], [], [0, 1], PLAN)
    with torch.no_grad():
        state = engine.admit(request)
        for number in range(40):
            engine.launch(state, PLAN, engine.round_shapes()[number % 3])
    assert bool(state.finished.all())
    return state.tokens[:, :40].clone(), engine


@pytest.mark.parametrize("broken", ["catch up", PLAN], ids=["catch up", "rounds"])
def test_a_capture_that_fails_leaves_rounds_without_graphs(broken: object, monkeypatch: pytest.MonkeyPatch):
    warnings = []
    monkeypatch.setattr(engine_module.log, "warning", lambda *args: warnings.append(args))
    wanted, engine = text_of(None, monkeypatch)
    assert len(engine.graphs.rounds) == 4 and not warnings, "three shapes and catching up"
    text, engine = text_of(broken, monkeypatch)
    assert torch.equal(text, wanted) and engine.graphs is None
    assert len(warnings) == 1 and warnings[0][-1] == "no room for a graph"


@pytest.mark.parametrize("switch", ["stance", "config", "environment"])
def test_a_switch_that_keeps_dynamo_from_tracing_is_named(switch: str, monkeypatch: pytest.MonkeyPatch):
    model, inputs = tiny_model("llama"), left_padded(1, 9)
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    spec_compile(model, draft=None, compile="none", progress=False)
    name, off = {
        "stance": (r"torch\.compiler\.set_stance\('force_eager'\)", lambda: torch.compiler.set_stance("force_eager")),
        "config": (r"torch\._dynamo\.config\.disable", lambda: torch._dynamo.config.patch(disable=True)),
        "environment": ("TORCHDYNAMO_DISABLE=1", contextlib.nullcontext),
    }[switch]
    with off():
        if switch == "environment":
            monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
        with pytest.warns(UserWarning, match=rf"runs as plain transformers: .*{name}.* is on"):
            assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), expected)
        with pytest.raises(CaptureError, match=f"tracing is switched off by .*{name}"):
            capture_prefill(tiny_model("llama"))
    monkeypatch.undo()
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), expected)
    assert model.spec.stats().mode == "rounds"


def test_weights_of_inference_mode_are_named():
    with torch.inference_mode():
        model = tiny_model("llama")
    with pytest.raises(CaptureError, match=r"its weights were made within torch\.inference_mode\(\)"):
        capture_prefill(model)
