"""A transformers that changes: what it adds to a call, what it renames, and a loop it no longer asks for."""

from __future__ import annotations

import re
import warnings
from inspect import signature

import pytest
import torch
import transformers
from tiny import left_padded, tiny_model
from transformers import DynamicCache, GenerationConfig, LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache

from spec_compile import spec_compile, versions
from spec_compile.errors import SpecCompileError
from spec_compile.hf_integration.caches import RESULT_CACHE, cache_argument
from spec_compile.hf_integration.generate import why_plain

SETTINGS = {"max_new_tokens": 8, "do_sample": False}
NAME = cache_argument(LlamaForCausalLM.forward)  # in the installed release


class CacheRenamed(LlamaForCausalLM):
    """As a release that calls the cache ``kv_store``: in what ``generate()`` prepares and in the forward's signature."""

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        model_kwargs["kv_store"] = model_kwargs.pop(NAME)

    def forward(self, input_ids=None, position_ids=None, kv_store: Cache | None = None, **kwargs):
        return super().forward(input_ids=input_ids, position_ids=position_ids, **{NAME: kv_store}, **kwargs)


class InputAdded(LlamaForCausalLM):
    """As a release that gives every forward something new that is no cache."""

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        model_kwargs["decode_plan"] = {"step": 1}

    def forward(self, input_ids=None, position_ids=None, decode_plan=None, **kwargs):
        return super().forward(input_ids=input_ids, position_ids=position_ids, **kwargs)


class LoopRenamed(LlamaForCausalLM):
    """As a release whose ``generate()`` has another loop."""

    def generate(self, input_ids, attention_mask=None, **kwargs):
        return LlamaForCausalLM.generate(self._twin, input_ids=input_ids, attention_mask=attention_mask, **kwargs)


def compiled(kind: type[PreTrainedModel]) -> PreTrainedModel:
    model = tiny_model("llama")
    model.__class__ = kind
    return spec_compile(model, draft="ngram", min_ngram=1, num_steps=3, compile="none", adaptive=False)


def plain_text() -> torch.Tensor:
    return tiny_model("llama").generate(**left_padded(2, 9), **SETTINGS)


def test_a_cache_of_another_name_is_known_by_its_type() -> None:
    model = compiled(CacheRenamed)
    assert cache_argument(model.forward) == "kv_store"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = model.generate(**left_padded(2, 9), **SETTINGS)
    assert torch.equal(text, plain_text()) and model.spec.stats().mode == "rounds"


def test_a_tested_release_is_never_what_to_install() -> None:
    for installed in versions.TESTED["transformers"]:
        assert "pip install" not in versions.version_remedy(installed) and "patches" in versions.version_remedy(installed)
    assert "pip install 'transformers==" in versions.version_remedy("5.99.0")


def test_a_model_whose_handle_was_deleted_is_compiled_again() -> None:
    model = compiled(LlamaForCausalLM)
    del model.spec
    model = spec_compile(model, draft="ngram", min_ngram=1, num_steps=3, compile="none", adaptive=False, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model.generate(**left_padded(2, 9), **SETTINGS), plain_text())
    assert model.spec.stats().mode == "rounds"
    model.spec.remove()
    assert type(model) is LlamaForCausalLM


def test_a_call_that_raises_before_its_loop_has_no_figures_of_the_one_before() -> None:
    model = compiled(LlamaForCausalLM)
    model.generate(**left_padded(2, 9), **SETTINGS)
    with pytest.raises(ValueError):
        model.generate(**left_padded(2, 9), do_sample=False, max_new_tokens=-1)
    assert "raised before" in model.spec.stats().plain_because and model.spec.partial_sequences() is None


@pytest.mark.parametrize(
    ("ids", "mask", "named"),
    [
        (torch.ones(1, 0, dtype=torch.int64), None, "empty prompts"),
        (torch.ones(2, 3, dtype=torch.int64), torch.tensor([[1, 1, 1], [0, 0, 0]]), "rows whose attention_mask is all zeros"),
        (torch.ones(1, 3, dtype=torch.int64), torch.ones(1, 6), r"attention masks other than \[batch, prompt length\]"),
    ],
)
def test_what_runs_plain_is_told_by_what_the_caller_gave(ids, mask, named) -> None:
    """Of a mask of another length transformers makes positions, and cuts it before the loop sees it."""
    prepared = {} if mask is None else {"attention_mask": mask[:, : ids.shape[1]], "position_ids": mask.cumsum(1) - 1}
    given = {} if mask is None else {"attention_mask": mask}
    assert re.match(named, why_plain(tiny_model("llama"), ids, GenerationConfig(max_length=20), False, prepared, given))


def test_spec_compile_within_a_call_names_itself() -> None:
    model, said = compiled(LlamaForCausalLM), []

    def again(ids, scores, **_):
        with pytest.raises(SpecCompileError) as error:
            spec_compile(model, compile="none", progress=False)
        said.append(str(error.value))
        return torch.ones(len(ids), dtype=torch.bool)

    model.generate(**left_padded(1, 9), stopping_criteria=[again], **SETTINGS)
    assert said and said[0].startswith("spec_compile() of a compiled model from within generate()")


def test_an_input_that_the_caller_did_not_give_is_said_in_every_call_with_versions_and_remedy(monkeypatch) -> None:
    model = compiled(InputAdded)
    monkeypatch.setattr(transformers, "__version__", "5.99.0")
    for _ in range(3):
        with pytest.warns(UserWarning) as told:
            text = model.generate(**left_padded(2, 9), **SETTINGS)
        (message,) = [str(w.message) for w in told if "spec_compile" in str(w.message)]
        assert "decode_plan" in message and "plain transformers" in message
        assert transformers.__version__ in message and "pip install 'transformers==" in message
        assert torch.equal(text, plain_text()) and model.spec.stats().mode == "plain"
    assert {w.filename for w in told} == {__file__}, "the line that called generate(), not one of ours or transformers'"


def test_an_input_that_the_caller_gave_is_the_callers() -> None:
    model = compiled(InputAdded)
    with pytest.warns(UserWarning) as told:
        model.generate(**left_padded(1, 9), decode_plan={"step": 2}, **SETTINGS)
    (message,) = [str(w.message) for w in told if "spec_compile" in str(w.message)]
    assert "['decode_plan'] are not accelerated" in message and "pip install" not in message


def test_a_loop_that_is_no_longer_asked_for_is_noticed() -> None:
    model = compiled(LoopRenamed)
    model._twin = tiny_model("llama")
    for _ in range(2):
        with pytest.warns(UserWarning, match="did not use the loop"):
            text = model.generate(**left_padded(2, 9), **SETTINGS)
        assert torch.equal(text, plain_text()) and model.spec.stats().mode == "plain"


def test_a_loop_of_the_callers_own_is_no_incompatibility() -> None:
    def own_loop(model, input_ids, **kwargs):
        return input_ids

    model = compiled(LlamaForCausalLM)
    with pytest.warns(UserWarning, match="custom_generate is not accelerated"):
        model.generate(**left_padded(1, 9), custom_generate=own_loop, **SETTINGS)
    assert model.spec.stats().mode == "plain"
    model.generate(**left_padded(1, 9), custom_generate=model.spec.generate_loop, **SETTINGS)
    assert model.spec.stats().mode == "rounds"


def test_an_empty_cache_of_the_callers_is_filled_for_the_caller() -> None:
    model = compiled(LlamaForCausalLM)
    cache = DynamicCache(config=model.config)
    with pytest.warns(UserWarning, match="a cache given by the caller"):
        text = model.generate(**left_padded(1, 9), **{RESULT_CACHE: cache}, **SETTINGS)
    assert torch.equal(text, tiny_model("llama").generate(**left_padded(1, 9), **SETTINGS))
    assert cache.get_seq_length() == 9 + 8 - 1


def test_generate_looks_as_it_did() -> None:
    plain, model = tiny_model("llama"), compiled(LlamaForCausalLM)
    assert signature(model.generate) == signature(plain.generate)
    assert model.generate.__doc__ == plain.generate.__doc__


@pytest.mark.parametrize(
    ("forward", "name"),
    [
        (lambda self, cache=None: None, "cache"),
        (lambda self, past_key_value=None: None, "past_key_value"),
        (lambda self, *args, **kwargs: None, NAME),
    ],
)
def test_the_name_of_a_cache_without_annotations(forward, name: str) -> None:
    assert cache_argument(forward) == name
