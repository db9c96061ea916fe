"""What callers hand to ``generate()`` in other forms than most do: plain ``generate()``'s results, in rounds if possible."""

from __future__ import annotations

import copy
import functools
import time

import numpy as np
import pytest
import torch
from tiny import left_padded, tiny_model
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    InfNanRemoveLogitsProcessor,
    LlamaForCausalLM,
    LogitNormalization,
    LogitsProcessorList,
    MaxTimeCriteria,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    TopKLogitsWarper,
)

from spec_compile import spec_compile
from spec_compile.hf_integration.caches import RESULT_CACHE
from spec_compile.hf_integration.loop_methods import LOOP_METHODS, replaced_loop_method
from spec_compile.hf_integration.processors import read_processors
from spec_compile.runtime import model_runner

PROMPT = 11
GREEDY = {"max_new_tokens": 12, "do_sample": False}


def compiled(model: PreTrainedModel) -> PreTrainedModel:
    return spec_compile(model, draft="ngram", min_ngram=1, num_steps=3, compile="none", adaptive=False)


@pytest.fixture(scope="module")
def pair() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A plain model and the same one compiled with n-gram drafts."""
    return tiny_model("llama"), compiled(tiny_model("llama"))


def assert_same(pair, inputs: dict, mode: str = "rounds", **settings) -> Tensor:
    reference, model = pair
    settings = GREEDY | settings
    plain = reference.generate(**inputs, **copy.deepcopy(settings))
    ours = model.generate(**inputs, **settings)
    assert torch.equal(ours, plain)
    assert model.spec.stats().mode == mode
    return plain


# ----------------------------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize("length", [np.int64(7), np.int32(7), 7.0, torch.tensor(7)], ids=lambda x: type(x).__name__)
def test_lengths_of_any_type_of_number(pair, length) -> None:
    assert_same(pair, left_padded(2, PROMPT), max_new_tokens=length)


def test_a_fraction_of_a_token_is_reached_with_the_next(pair) -> None:
    settings = {"max_new_tokens": None, "max_length": PROMPT * 1.5}
    assert assert_same(pair, left_padded(2, PROMPT), **settings).shape[1] == 17


def test_top_k_beyond_64_bits_keeps_every_token(pair) -> None:
    assert_same(pair, left_padded(1, PROMPT), do_sample=True, top_k=2**70, temperature=1e-5)


@pytest.mark.parametrize("extra", [{}, {"repetition_penalty": 1.2}], ids=["rounds", "lockstep"])
def test_greedy_calls_draw_nothing_from_torchs_generator(pair, extra: dict) -> None:
    before = torch.random.get_rng_state()
    pair[1].generate(**left_padded(2, PROMPT), **GREEDY, **extra)
    assert torch.equal(torch.random.get_rng_state(), before)
    pair[1].generate(**left_padded(2, PROMPT), **GREEDY | {"do_sample": True})
    assert not torch.equal(torch.random.get_rng_state(), before), "torch.manual_seed decides what a sample is"


@pytest.mark.parametrize("number", [2, 0.5, -1])
def test_masks_of_other_numbers_run_plain(pair, number: float) -> None:
    inputs = left_padded(3, PROMPT)
    pair[1].spec._told.clear()
    with pytest.warns(UserWarning, match="attention_mask has other numbers than 0 and 1"):
        assert_same(pair, {**inputs, "attention_mask": inputs["attention_mask"] * number}, "plain")


# ----------------------------------------------------------------------------------------------------------------------
# Processors that change nothing, or only what is not finite


@pytest.mark.parametrize(
    "settings",
    [
        {"renormalize_logits": True},
        {"remove_invalid_values": True},
        {"repetition_penalty": 1.0},
        {"logits_processor": [RepetitionPenaltyLogitsProcessor(1.0), LogitNormalization()]},
        {"remove_invalid_values": True, "renormalize_logits": True, "min_new_tokens": 5, "eos_token_id": [5, 40]},
    ],
    ids=lambda settings: "+".join(settings),
)
def test_processors_that_change_nothing_leave_rounds(pair, settings: dict) -> None:
    assert_same(pair, left_padded(3, PROMPT), **settings)


def test_renormalised_samples_are_the_samples(pair) -> None:
    model, inputs = pair[1], left_padded(2, PROMPT)

    def sample(**settings) -> Tensor:
        torch.manual_seed(0)
        return model.generate(**inputs, max_new_tokens=12, do_sample=True, top_k=20, **settings)

    assert torch.equal(sample(renormalize_logits=True), sample()) and model.spec.stats().mode == "rounds"


@pytest.mark.parametrize(("value", "do_sample"), [(float("nan"), False), (float("inf"), False), (float("nan"), True)])
def test_remove_invalid_values_removes_them_in_rounds(value: float, do_sample: bool) -> None:
    """One token's logit is never finite; without the processor plain generate() would say it for ever."""
    reference, model = (tiny_model("llama", num_hidden_layers=1) for _ in range(2))
    for twin in (reference, model):
        with torch.no_grad():
            twin.lm_head.weight[7] = value
    settings = {"remove_invalid_values": True, "do_sample": do_sample, **({"temperature": 1e-4} if do_sample else {})}
    plain = assert_same((reference, compiled(model)), left_padded(2, PROMPT), **settings)
    assert not bool((plain[:, PROMPT:] == 7).all()) or value == float("inf")


def test_what_follows_a_normalisation_or_a_filter_is_asked_itself() -> None:
    for first in (LogitNormalization(), TopKLogitsWarper(5)):
        processors = LogitsProcessorList([first, InfNanRemoveLogitsProcessor()])
        assert read_processors(processors, True, set(), PROMPT) is None


# ----------------------------------------------------------------------------------------------------------------------
# Model inputs that say that there is no image


def _vision_model(family: str) -> PreTrainedModel:
    text = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "pad_token_id": 0,
    }  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4}
    if family == "qwen3_vl":
        text["rope_parameters"] = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
        vision |= {"depth": 1, "num_heads": 2, "out_hidden_size": 64, "deepstack_visual_indexes": []}
        ids = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    else:
        vision["image_size"] = 8
        ids = {"image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92, "mm_tokens_per_image": 4}
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(family, text_config=text, vision_config=vision, **ids))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.02 if family == "gemma3" else 0.12)
    model.generation_config.eos_token_id = None
    return model.eval()


@pytest.mark.parametrize(("family", "name"), [("qwen3_vl", "mm_token_type_ids"), ("gemma3", "token_type_ids")])
def test_token_types_that_say_text_are_as_good_as_absent(family: str, name: str) -> None:
    reference, model = _vision_model(family), compiled(_vision_model(family))
    inputs = left_padded(2, PROMPT)
    inputs["input_ids"] = inputs["input_ids"].clamp(max=80)
    types = torch.zeros_like(inputs["input_ids"])
    for _ in range(2):
        assert_same((reference, model), {**inputs, name: types})
    types[0, 5] = 1
    with pytest.warns(UserWarning, match=name):
        assert_same((reference, model), {**inputs, name: types}, "plain")


def test_token_types_of_a_model_that_embeds_them_run_plain() -> None:
    reference, model = tiny_model("gpt2", n_layer=1), compiled(tiny_model("gpt2", n_layer=1))
    inputs = left_padded(2, PROMPT)
    types = torch.zeros_like(inputs["input_ids"])
    with pytest.warns(UserWarning, match="token_type_ids"):
        assert_same((reference, model), {**inputs, "token_type_ids": types}, "plain")


# ----------------------------------------------------------------------------------------------------------------------
# Criteria and streamers, in the order of plain generate()


class Both(StoppingCriteria):
    """A criterion and a streamer in one: it stops, or fails, by how many tokens it was streamed."""

    def __init__(self, most: int, fails_in: str = "") -> None:
        self.most, self.fails_in, self.seen, self.log = most, fails_in, 0, []

    def _step(self, name: str) -> None:
        self.log.append((name, self.seen))
        if self.fails_in == name and self.seen >= self.most:
            raise RuntimeError(f"{name} failed")

    def put(self, value: Tensor) -> None:
        self.seen += value.numel()
        self._step("put")

    def end(self) -> None:
        self._step("end")

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        self._step("ask")
        return torch.full((len(input_ids),), not self.fails_in and self.seen >= self.most, dtype=torch.bool)


@pytest.mark.parametrize("fails_in", ["", "put", "ask"])
@pytest.mark.parametrize("extra", [{}, {"repetition_penalty": 1.2}], ids=["rounds", "lockstep"])
def test_criteria_are_asked_before_the_streamer_gets_a_token(pair, extra: dict, fails_in: str) -> None:
    def run(model: PreTrainedModel) -> tuple[object, list]:
        both = Both(PROMPT + 5, fails_in)
        try:
            text = model.generate(**left_padded(1, PROMPT), **GREEDY, **extra, streamer=both, stopping_criteria=[both]).tolist()
        except RuntimeError as error:
            text = str(error)
        return text, both.log

    assert run(pair[1]) == run(pair[0])


@pytest.mark.parametrize(("given", "extra"), [("max_time", {}), ("criterion", {"repetition_penalty": 1.2})])
def test_time_that_goes_into_graphs_is_not_generating(monkeypatch, given: str, extra: dict) -> None:
    for name in ("capture_prefill", "capture_window"):
        capture = getattr(model_runner, name)
        monkeypatch.setattr(model_runner, name, lambda *args, capture=capture: (time.sleep(0.6), capture(*args))[1])
    model = compiled(tiny_model("llama", num_hidden_layers=1))
    limit = MaxTimeCriteria(0.5)
    settings = {"max_time": 0.5} if given == "max_time" else {"stopping_criteria": [limit]}
    started = limit.initial_timestamp
    assert model.generate(**left_padded(1, PROMPT), **GREEDY, **extra, **settings).shape[1] == PROMPT + 12
    assert limit.initial_timestamp == started, "the caller's own object stays as it was"
    assert model.generate(**left_padded(1, PROMPT), **GREEDY, **extra, max_time=0.0).shape[1] == PROMPT + 1


# ----------------------------------------------------------------------------------------------------------------------
# Conversations


def test_the_next_turn_takes_the_cache_that_is_not_there(pair) -> None:
    """Multi-turn code hands the result's cache on: plain generate() reads it, ours prefills the whole conversation again."""
    reference, model = pair
    inputs = left_padded(1, PROMPT)

    def conversation(model: PreTrainedModel) -> Tensor:
        text, cache = inputs["input_ids"], None
        for _ in range(3):
            given = {"attention_mask": torch.ones_like(text), RESULT_CACHE: cache}
            result = model.generate(text, **given, **GREEDY, return_dict_in_generate=True)
            text, cache = torch.cat([result.sequences, inputs["input_ids"][:, :4]], 1), getattr(result, RESULT_CACHE)
        return text

    model.spec._told.clear()
    with pytest.warns(UserWarning) as told:
        ours = conversation(model)
    (text,) = [str(w.message) for w in told if "spec_compile" in str(w.message)]
    assert f"{RESULT_CACHE} of the result is None" in text and "the whole conversation as input_ids" in text
    assert torch.equal(ours, conversation(reference)) and model.spec.stats().mode == "rounds"


# ----------------------------------------------------------------------------------------------------------------------
# A compiled model as somebody's assistant


@pytest.mark.parametrize("padded", [False, True])
def test_a_compiled_model_is_an_assistant_as_any_other(pair, padded: bool) -> None:
    inputs = left_padded(2, PROMPT) if padded else left_padded(1, PROMPT)
    inputs = {name: value[-1:] for name, value in inputs.items()}
    target, settings = tiny_model("llama", seed=1), GREEDY
    plain = target.generate(**inputs, **settings, assistant_model=pair[0])
    with pytest.warns(UserWarning, match="the assistant of another"):
        pair[1].spec._told.clear()
        assert torch.equal(target.generate(**inputs, **settings, assistant_model=pair[1]), plain)


def test_an_early_exit_of_a_compiled_model_leaves_it_as_it_was() -> None:
    reference, model = tiny_model("llama"), compiled(tiny_model("llama"))
    assert_same((reference, model), left_padded(1, PROMPT), "plain", assistant_early_exit=1)
    assert model.config.num_hidden_layers == 2
    assert_same((reference, model), left_padded(1, PROMPT))


# ----------------------------------------------------------------------------------------------------------------------
# What generate() would have called on the model


class OwnInputs(LlamaForCausalLM):
    """Starts every text with another token than the prompt's first."""

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs) -> dict:
        return super().prepare_inputs_for_generation(input_ids.index_fill(1, torch.tensor([0]), 5), **kwargs)


class OwnLoop(LlamaForCausalLM):
    def _sample(self, input_ids: Tensor, **kwargs) -> Tensor:
        return super()._sample(input_ids.flip(1), **kwargs)


def _patched(model: PreTrainedModel) -> PreTrainedModel:
    """As adapters with learned prompts do it, on the instance; by ``functools.wraps`` it looks like the original."""
    before = model.prepare_inputs_for_generation

    @functools.wraps(before)
    def prepare(input_ids: Tensor, **kwargs) -> dict:
        return before(input_ids.index_fill(1, torch.tensor([0]), 5), **kwargs)

    model.prepare_inputs_for_generation = prepare
    return model


def _updated(model: PreTrainedModel) -> PreTrainedModel:
    before = model._update_model_kwargs_for_generation

    def update(outputs, model_kwargs, **kwargs) -> dict:
        kwargs = before(outputs, model_kwargs, **kwargs)
        kwargs["position_ids"] = kwargs["position_ids"] + 3
        return kwargs

    model._update_model_kwargs_for_generation = update
    return model


def _of_class(kind: type[PreTrainedModel], model: PreTrainedModel) -> PreTrainedModel:
    model.__class__ = kind
    return model


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (_patched, "prepare_inputs_for_generation"),
        (_updated, "_update_model_kwargs_for_generation"),
        (functools.partial(_of_class, OwnInputs), "prepare_inputs_for_generation"),
        (functools.partial(_of_class, OwnLoop), "_sample"),
    ],
    ids=["instance", "update", "class", "loop"],
)
def test_what_generate_would_have_called_on_the_model_is_not_passed_over(change, name: str) -> None:
    inputs = left_padded(1, PROMPT)
    reference, model = change(tiny_model("llama")), compiled(change(tiny_model("llama")))
    with pytest.warns(UserWarning, match=rf"would have called {name} \(test_generate_arguments\."):
        text = assert_same((reference, model), inputs, "plain")
    assert not torch.equal(text, tiny_model("llama").generate(**inputs, **GREEDY)), "it matters"


def test_a_patch_on_a_compiled_model_counts_until_it_is_taken_back(pair) -> None:
    """PEFT leaves the original method on the instance, bound."""
    model = pair[1]
    original = model.prepare_inputs_for_generation
    try:
        assert "prepare_inputs_for_generation" in replaced_loop_method(_patched(model))
        model.prepare_inputs_for_generation = original
        assert replaced_loop_method(model) is None
        assert_same(pair, left_padded(1, PROMPT))
    finally:
        del model.prepare_inputs_for_generation


def test_the_loops_methods_are_those_that_transformers_has() -> None:
    """A method that transformers no longer has is looked up for nothing: its successor would be passed over."""
    missing = [name for name in LOOP_METHODS if not hasattr(LlamaForCausalLM, name)]
    assert missing == ["create_masks_for_generate"], "which a few models have, of those with images"


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft reads names that transformers gives up
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_learned_prompts_of_peft_are_not_lost(kind: str) -> None:
    peft = pytest.importorskip("peft")
    config = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[kind]

    def tuned() -> PreTrainedModel:
        torch.manual_seed(1)
        model = peft.get_peft_model(tiny_model("llama"), config(task_type="CAUSAL_LM", num_virtual_tokens=3))
        with torch.no_grad():
            for parameter in model.prompt_encoder.parameters():
                parameter.normal_(0, 0.5)
        return model.eval()

    inputs = left_padded(1, PROMPT)
    plain, ours = tuned().generate(**inputs, **GREEDY), tuned()
    base = compiled(ours.get_base_model())
    with pytest.warns(UserWarning, match=r"prepare_inputs_for_generation \(peft\."):
        assert torch.equal(ours.generate(**inputs, **GREEDY), plain)
    assert torch.equal(base.generate(**inputs, **GREEDY), tiny_model("llama").generate(**inputs, **GREEDY))
    assert base.spec.stats().mode == "rounds", "the untuned model is accelerated again"
