"""``torch.compile(model, backend="spec_compile")``: the model's own values, whatever becomes of its weights."""

from __future__ import annotations

import logging
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch
from tiny import left_padded, tiny_model
from torch import nn

from spec_compile import dynamo_backend
from spec_compile.dynamo_backend import compile_graph
from spec_compile.ops.torch_private import announce_backend
from spec_compile.passes import any_graph

FAMILIES = ("llama", "qwen3", "gpt2", "mixtral")
DEEP = {"gpt2": {"n_layer": 4}}


@pytest.fixture(autouse=True)
def _forget():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Graphs run as the passes left them, without Inductor; what was done to each call of the backend, in order."""
    done: list[str] = []
    monkeypatch.setattr(dynamo_backend, "inductor_compile", lambda gm, inputs, options: done.append("whole") or gm.forward)
    monkeypatch.setattr(dynamo_backend, "compile_segment", lambda gm, *_: done.append("segment") or gm)
    monkeypatch.setattr(any_graph, "LEAST_TOKENS", 4)
    return done


def deep(family: str):
    return tiny_model(family, **DEEP.get(family, {"num_hidden_layers": 4}))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_values_are_the_models_own_and_follow_its_weights(family: str, graphs: list[str]) -> None:
    model = deep(family)
    compiled = torch.compile(model, backend="spec_compile")
    ids = left_padded(2, 9)["input_ids"]

    def check() -> None:
        ours, own = compiled(input_ids=ids, use_cache=False).logits, model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5)

    check()
    assert graphs == ["segment"] * 3, "five segments, of which three are alike"
    next(p for n, p in model.named_parameters() if ".0." in n and p.dim() == 2).add_(0.3)  # an optimizer's step
    check()
    model.load_state_dict({name: value * 0.9 for name, value in model.state_dict().items()}, assign=True)
    check()


def test_generate_over_a_static_cache_gives_the_plain_text(graphs: list[str]) -> None:
    prompts = left_padded(2, 9)
    settings = {"max_new_tokens": 6, "do_sample": False}
    plain = deep("llama").generate(**prompts, **settings)
    model = deep("llama")
    model.forward = torch.compile(model.forward, backend="spec_compile")
    text = model.generate(**prompts, **settings, cache_implementation="static")
    assert torch.equal(text, plain) and graphs == ["segment"] * 3 + ["whole"], "prompts are cut, single tokens are not"


@torch.no_grad()
def test_lengths_make_as_many_graphs_as_inductors_own(graphs: list[str]) -> None:
    model = tiny_model("llama", num_hidden_layers=1)

    def count(backend: object) -> int:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(model, backend=backend)
        for rows, length in ((2, 9), (2, 12), (2, 31), (3, 12)):
            compiled(input_ids=torch.ones(rows, length, dtype=torch.int64), use_cache=False)
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    assert count("spec_compile") == count("eager")


@torch.no_grad()
def test_the_last_token_of_logits_is_all_that_is_computed(graphs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[list[str]] = []
    real = dynamo_backend.prepare_any
    monkeypatch.setattr(dynamo_backend, "prepare_any", lambda *a, **k: reports.append((g := real(*a, **k)).report) or g)
    model, ids = tiny_model("llama", num_hidden_layers=1), left_padded(1, 9)["input_ids"]

    def next_token(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, use_cache=False).logits[:, -1]

    ours = torch.compile(next_token, backend="spec_compile")(ids)
    torch.testing.assert_close(ours, next_token(ids), rtol=1e-5, atol=1e-5)
    assert "select_rows: 1 linears compute the rows alone that are read of them" in reports[0]


def test_training_goes_to_inductor_as_it_is_and_says_so(graphs: list[str]) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    log = logging.getLogger("spec_compile.passes")
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        layer = nn.Linear(4, 4)
        torch.compile(layer, backend="spec_compile")(torch.randn(2, 4)).sum().backward()
    finally:
        log.removeHandler(handler)
        log.setLevel(before)
    assert layer.weight.grad is not None and graphs == ["whole"]
    assert any("computes gradients: Inductor compiles it as it is" in line for line in lines)


def test_an_option_that_inductor_does_not_know_is_an_error() -> None:
    gm = torch.fx.symbolic_trace(nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="no_such_option"):
        compile_graph(gm, [torch.randn(1, 2)], options={"no_such_option": 1})


def test_the_entry_point_names_the_backend() -> None:
    project = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"]["torch_dynamo_backends"]["spec_compile"].partition(":")
    assert getattr(import_module(module), function) is compile_graph


def test_a_torch_that_has_already_looked_for_backends_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.backends import registry

    monkeypatch.setattr(registry, "_BACKENDS", {})
    monkeypatch.setattr(registry, "_COMPILER_FNS", {})
    announce_backend("spec_compile", "spec_compile.dynamo_backend:compile_graph")
    assert registry.lookup_backend("spec_compile") is compile_graph
    announce_backend("spec_compile", "spec_compile.dynamo_backend:compile_graph")  # again changes nothing


@pytest.mark.slow
def test_generate_with_inductor_gives_the_plain_text() -> None:
    prompts = left_padded(1, 70)
    settings = {"max_new_tokens": 4, "do_sample": False}
    plain = deep("llama").generate(**prompts, **settings)
    model = deep("llama")
    model.forward = torch.compile(model.forward, backend="spec_compile")
    assert torch.equal(model.generate(**prompts, **settings, cache_implementation="static"), plain)
