"""A model that is changed behind its graphs: plain until that is undone, told by name; what no forward reads is no change."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from tiny import left_padded, tiny_model
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.llama import modeling_llama

from spec_compile import spec_compile
from spec_compile.hf_integration import fingerprint, python_state

PROMPT = 9
GREEDY = {"max_new_tokens": 8, "do_sample": False}
PUSH = torch.randn(64, generator=torch.Generator().manual_seed(3))
STATE = {"strength": 0.0}
strength = 0.0  # read by a hook


def compiled(model: PreTrainedModel) -> PreTrainedModel:
    return spec_compile(model, draft=None, compile="none")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Compiled, with hooks whose coefficients stand in a closure, in a callable object and in a global."""
    model = tiny_model("llama")
    model.lm_head.__class__ = Scaled
    model.model.layers[0].mlp.register_forward_hook(_steered(STATE))
    model.model.layers[0].mlp.register_forward_hook(Steering())
    model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: (args[0] + strength * PUSH,))
    return compiled(model)


def _steered(state: dict[str, float]) -> Callable:
    return lambda module, args, out: out + state["strength"] * PUSH


class Steering:
    def __init__(self) -> None:
        self.coefficient = 0.0

    def __call__(self, module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        return out + self.coefficient * PUSH


class Negated(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


# Each change gives back what undoes it.


def _attribute(owner: object, name: str, value: object) -> Callable[[], None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, before)


def _rows_of_itself(model: PreTrainedModel) -> Callable[[], None]:
    return _attribute(model.lm_head.weight, "data", model.lm_head.weight.data[:60])


def _transposed(model: PreTrainedModel) -> Callable[[], None]:
    weight = model.model.layers[1].self_attn.o_proj.weight
    return _attribute(weight, "data", weight.data.t())


def _entry(table: dict, key: str, value: object) -> Callable[[], None]:
    before = table[key]
    table[key] = value
    return lambda: table.update({key: before})


def _global(model: PreTrainedModel) -> Callable[[], None]:
    return _entry(globals(), "strength", 0.9)


def _helper(model: PreTrainedModel) -> Callable[[], None]:
    """As kernel libraries patch a model's module."""
    before = modeling_llama.apply_rotary_pos_emb

    def halved(q, k, *args, **kwargs):
        q, k = before(q, k, *args, **kwargs)
        return q * 0.1, k

    return _attribute(modeling_llama, "apply_rotary_pos_emb", halved)


def _method(model: PreTrainedModel) -> Callable[[], None]:
    before = modeling_llama.LlamaMLP.forward
    return _attribute(modeling_llama.LlamaMLP, "forward", lambda self, x: -before(self, x))


def _new_method(model: PreTrainedModel) -> Callable[[], None]:
    """What the class only inherited until now."""
    modeling_llama.LlamaMLP.__call__ = lambda self, x: -nn.Module.__call__(self, x)
    return lambda: delattr(modeling_llama.LlamaMLP, "__call__")


class Scaled(nn.Linear):
    """Reads a table and a type of its class."""

    factors: ClassVar[list[float]] = [1.0]
    kind = torch.float32

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(self.kind).float() * self.factors[0]


def _class_table(model: PreTrainedModel) -> Callable[[], None]:
    Scaled.factors[0] = -1.0
    return lambda: Scaled.factors.__setitem__(0, 1.0)


def _class_type(model: PreTrainedModel) -> Callable[[], None]:
    return _attribute(Scaled, "kind", torch.int32)


def _global_hook(model: PreTrainedModel) -> Callable[[], None]:
    return nn.modules.module.register_module_forward_hook(
        lambda module, args, out: -out if isinstance(module, nn.Linear) else None
    ).remove


CHANGES: dict[str, Callable[[PreTrainedModel], Callable[[], None]]] = {
    "lm_head.weight": _rows_of_itself,
    "model.layers.1.self_attn.o_proj.weight": _transposed,
    "model.layers.0.self_attn.scaling (0.01, was 0.25)": lambda m: _attribute(m.model.layers[0].self_attn, "scaling", 0.01),
    "model.layers.0.input_layernorm.variance_epsilon": lambda m: _attribute(
        m.model.layers[0].input_layernorm, "variance_epsilon", 3.0
    ),
    "lm_head (of class Negated, was Scaled)": lambda m: _attribute(m.lm_head, "__class__", Negated),
    "model.layers.1.mlp.act_fn": lambda m: _attribute(m.model.layers[1].mlp, "act_fn", nn.Tanh()),
    "state in a forward hook of model.layers.0.mlp": lambda m: _entry(STATE, "strength", 0.9),
    "a forward hook of model.layers.0.mlp.coefficient (0.9, was 0.0)": lambda m: _attribute(
        list(m.model.layers[0].mlp._forward_hooks.values())[1], "coefficient", 0.9
    ),
    "strength in test_model_changes": _global,
    "apply_rotary_pos_emb in transformers.models.llama": _helper,
    "LlamaMLP.forward": _method,
    "LlamaMLP.__call__": _new_method,
    "Scaled.factors": _class_table,
    "Scaled.kind": _class_type,
    "forward hooks of all modules": _global_hook,
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_forward_reads_is_seen_named_and_said_after_every_change(model: PreTrainedModel, name: str) -> None:
    inputs = left_padded(1, PROMPT)
    before = model.generate(**inputs, **GREEDY)
    for _ in range(2):
        undo = CHANGES[name](model)
        try:
            with model.spec.disable():
                plain = _outcome(model, inputs)
            assert str(plain) != str(before), "it matters"
            with pytest.warns(UserWarning) as told:
                for _ in range(2):
                    assert str(_outcome(model, inputs)) == str(plain)
            (text,) = [str(w.message) for w in told if "spec_compile" in str(w.message)]
            assert name in text and "call spec_compile(model, ...) again" in text
        finally:
            undo()
        assert torch.equal(model.generate(**inputs, **GREEDY), before)
        assert model.spec.stats().mode == "rounds", "it was undone"


def _outcome(model: PreTrainedModel, inputs: dict[str, Tensor]) -> object:
    try:
        return model.generate(**inputs, **GREEDY)
    except RuntimeError as error:  # a weight that no longer fits
        return type(error)


def test_a_setting_of_the_config_is_seen() -> None:
    model = compiled(tiny_model("mistral", num_hidden_layers=1))
    model.config.sliding_window = 3
    with pytest.warns(UserWarning, match=r"config.sliding_window \(3, was 16\)"):
        model.generate(**left_padded(1, PROMPT), **GREEDY)


def test_the_first_changes_are_named(model: PreTrainedModel) -> None:
    undo = [_attribute(norm, "variance_epsilon", 1.0) for norm in model.modules() if hasattr(norm, "variance_epsilon")]
    with pytest.warns(UserWarning, match=r"layers\.0.*variance_epsilon.*, model\.layers.*, model\.layers.* and more\. Undo"):
        model.generate(**left_padded(1, PROMPT), **GREEDY)
    for step in undo:
        step()


@pytest.mark.parametrize("when", ["before", "after"])
def test_gradient_checkpointing_that_was_on_leaves_rounds(when: str) -> None:
    """Its hook on the embeddings stays, and does nothing without gradients."""
    model = tiny_model("llama", num_hidden_layers=1)

    def train_a_while() -> None:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model.enable_input_require_grads()
        getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()

    if when == "before":
        train_a_while()
    compiled(model)
    if when == "after":
        train_a_while()
    assert model.get_input_embeddings()._forward_hooks
    text = model.generate(**left_padded(1, PROMPT), **GREEDY)
    assert model.spec.stats().mode == "rounds"
    assert torch.equal(text, tiny_model("llama", num_hidden_layers=1).generate(**left_padded(1, PROMPT), **GREEDY))


def test_what_no_forward_reads_is_no_change(model: PreTrainedModel, monkeypatch) -> None:
    inputs = left_padded(2, PROMPT)
    model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_hidden_states=True)  # leaves hooks of its own
    model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_attentions=True)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    model.zero_grad()
    with model.spec.disable():
        model.generate(**inputs, **GREEDY, num_beams=2)
        model.generate(**inputs, **GREEDY, cache_implementation="static")
    model.train()
    model.eval()
    model.generation_config = GenerationConfig(pad_token_id=0, max_length=40)
    model.config.use_cache, model.config.pad_token_id = False, 3
    model.model_tags, model.is_mine = ["a"], object()
    model.add_model_tags("b")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(**inputs, **GREEDY, use_cache=True)
    assert model.spec.stats().mode == "rounds"

    def slow(*args):
        raise AssertionError("looked at attribute by attribute though nothing changed")

    monkeypatch.setattr(fingerprint, "changed_attributes", slow)
    monkeypatch.setattr(python_state, "changed_attributes", slow)
    model.generate(**inputs, **GREEDY, use_cache=True)


def test_a_dictionary_that_makes_what_it_is_asked_for_is_no_change() -> None:
    """transformers' table of activations, which the code of gated delta nets reads, makes a module for each look."""
    found = python_state.Remembered()
    python_state.remember(found, "ACT2FN", ACT2FN)
    assert found.containers and not list(python_state.differences(found, frozenset()))
    model = compiled(tiny_model("qwen3_5_text"))
    model.generate(**left_padded(1, PROMPT), **GREEDY)
    assert model.spec.stats().mode == "rounds"
