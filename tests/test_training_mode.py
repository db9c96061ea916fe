"""Models in training mode and forwards that trainers wrap: accelerated where nothing changes, else plain with the reason."""

from __future__ import annotations

import functools
import types

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny import left_padded, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from spec_compile import spec_compile
from spec_compile.errors import ConfigError

OPTIONS = {"draft": "ngram", "min_ngram": 1, "num_steps": 3, "compile": "none", "adaptive": False, "progress": False}
CALL = {"max_new_tokens": 8, "do_sample": False}


def compiled(family: str = "llama", **sizes: object) -> PreTrainedModel:
    return spec_compile(tiny_model(family, num_hidden_layers=1, **sizes), **OPTIONS)


def text(model: PreTrainedModel) -> Tensor:
    return model.generate(**left_padded(2, 11), **CALL)


def plain_text(model: PreTrainedModel) -> Tensor:
    with model.spec.disable():
        return text(model)


def assert_rounds(model: PreTrainedModel) -> None:
    ours = text(model)
    assert model.spec.stats().mode == "rounds", model.spec.stats().plain_because
    assert torch.equal(ours, plain_text(model))


def assert_plain(model: PreTrainedModel, why: str) -> None:
    with pytest.warns(UserWarning, match=f"runs as plain transformers: .*{why}"):
        text(model)
    assert model.spec.stats().mode == "plain"


# ----------------------------------------------------------------------------------------------------------------------
# Modes


def test_training_mode_that_changes_nothing_is_accelerated_and_weights_are_live():
    model = compiled()
    assert_rounds(model)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(2):
        before = text(model)
        assert_rounds(model)
        ids = left_padded(2, 11)["input_ids"]
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(text(model), before), "the step shows"
        assert_rounds(model)
    assert all(module.training for module in model.modules())


def test_dropout_of_nothing_is_accelerated():
    sizes = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = spec_compile(tiny_model("gpt2").train(), **OPTIONS)  # its config has other dropout
    assert_plain(model, r"transformer\.drop \(Dropout, p=0\.1\)")
    model = tiny_model("gpt2")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for name in sizes:
        setattr(model.config, name, 0.0)
    assert_rounds(spec_compile(model.train(), **OPTIONS))


def test_one_layer_that_drops_while_the_model_evaluates_drops_on():
    """Monte Carlo dropout, switched on before spec_compile() and behind it."""
    for behind in (False, True):
        model = tiny_model("gpt2")
        if behind:
            spec_compile(model, **OPTIONS)
        dropout = model.transformer.h[0].mlp.dropout.train()
        dropout.p = 0.7
        flags = [module.training for module in model.modules()]
        if not behind:
            spec_compile(model, **OPTIONS)
        assert_plain(model, r"transformer\.h\.0\.mlp\.dropout \(Dropout, p=0\.7\)")
        assert len({tuple(text(model).flatten().tolist()) for _ in range(4)}) > 1
        assert [module.training for module in model.modules()] == flags
        dropout.eval()
        assert_rounds(model)


@pytest.mark.parametrize(
    ("family", "sizes", "who"),
    [
        ("llama", {"attention_dropout": 0.1}, "LlamaAttention drops attention weights"),
        ("mixtral", {"router_jitter_noise": 0.1}, "MixtralSparseMoeBlock"),
    ],
)
def test_a_layer_that_computes_otherwise_in_training_is_named(family: str, sizes: dict, who: str):
    model = compiled(family, **sizes)
    model.train()
    assert_plain(model, f"computes otherwise: .*{who}")
    model.eval()
    assert_rounds(model)


def test_a_hook_that_acts_in_training_alone_is_not_left_out():
    """NEFTune's hook adds noise to embeddings (transformers/integrations/neftune.py)."""

    def noisy(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output + torch.rand_like(output) if module.training else output

    model = tiny_model("llama", num_hidden_layers=1)
    model.get_input_embeddings().register_forward_hook(noisy)
    spec_compile(model, **OPTIONS)
    assert_rounds(model)
    model.train()
    assert_plain(model, "computes otherwise")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # other names from transformers 5.24 on
def test_what_gradient_checkpointing_leaves_on_a_model_in_training_mode():
    """TRL's trainers switch it off around ``generate()`` and on again."""
    model = compiled()
    model.train()
    for _ in range(2):
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
        model.gradient_checkpointing_disable()
        assert_rounds(model)


# ----------------------------------------------------------------------------------------------------------------------
# Wrapped forwards

_FUSED_HEAD = """
def add_fused_lm_head(model, functools, types):
    original_forward = model.forward
    @functools.wraps(type(model).forward)
    def _fused_forward(self, *args, fused_lm_head=False, **kwargs):
        if not fused_lm_head:
            return original_forward(*args, **kwargs)
        raise NotImplementedError
    model.forward = types.MethodType(_fused_forward, model)
"""


def _fused_head(model: PreTrainedModel) -> None:
    """As TRL's trainers patch a model: known by the module that the code stands in."""
    scope = {"__name__": "trl.trainer.utils"}
    exec(_FUSED_HEAD, scope)
    scope["add_fused_lm_head"](model, functools, types)


def test_a_wrapper_that_changes_nothing_is_seen_through():
    for behind in (False, True):
        model = tiny_model("llama", num_hidden_layers=1)
        for step in (lambda model: spec_compile(model, **OPTIONS), _fused_head)[:: 1 if behind else -1]:
            step(model)
        assert_rounds(model)
        model.train()
        assert_rounds(model)
        _fused_head(model)
        assert_rounds(model)


def test_a_wrapper_that_nobody_knows_is_asked():
    model = compiled()
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    assert_plain(model, "")


def test_mixed_precision_stays_plain_with_its_reason():
    AcceleratorState._reset_state(reset_partial_state=True)  # a trainer may have been here
    model, accelerator = compiled(), Accelerator(mixed_precision="bf16", cpu=True)
    try:
        for wrap_before in (lambda model: None, _fused_head):
            wrap_before(model)
            assert_rounds(model)
            accelerator.prepare_model(model)
            text(model)
            assert "accelerate runs its forward in mixed precision" in model.spec.stats().plain_because
            with pytest.raises(ConfigError, match=r"^the model: accelerate runs its forward in mixed precision"):
                spec_compile(model, **OPTIONS)
            accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            del model._is_accelerate_prepared
            assert_rounds(model)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
