"""Gated delta nets through ``generate()``: greedy text equals plain transformers token for token in float32, behind n-grams
and EAGLE-3 heads, as chains and as trees; and the states after many rounds are those of the text."""

from __future__ import annotations

import functools
import threading

import pytest
import torch
from heads import fit, options_of, reshape
from ngrams import looked_up
from test_windows import BATCHES, CHAIN, NEW_TOKENS, PROMPT, TREE, Compiled
from tiny import RECURRENT_FAMILIES, left_padded, tiny_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache, PreTrainedModel

from spec_compile import SpecConfig, spec_compile
from spec_compile.config import chain
from spec_compile.drafts.eagle import EagleDraft
from spec_compile.drafts.head_runner import HeadRunner
from spec_compile.drafts.ngram import NgramDraft
from spec_compile.errors import DraftError, SpecCompileError
from spec_compile.hardware import Hardware
from spec_compile.hf_integration.caches import cache_argument
from spec_compile.hf_integration.heads.eagle3 import random_eagle3_head
from spec_compile.hf_integration.recurrent_layers import recurrent_capture
from spec_compile.runtime import kv_pool, state_pool
from spec_compile.runtime.engine import Engine, Request
from spec_compile.runtime.model_runner import ModelRunner
from spec_compile.runtime.options import RuntimeOptions
from spec_compile.runtime.program import SegmentCompiler
from spec_compile.runtime.state import SamplingPlan

pytestmark = pytest.mark.usefixtures("one_bucket")


@pytest.fixture(scope="module", params=RECURRENT_FAMILIES)
def compiled(request) -> Compiled:
    reference, model = tiny_model(request.param), tiny_model(request.param)
    inputs = left_padded(5, PROMPT, seed=1)
    texts = reference.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    head = random_eagle3_head(model, draft_vocab_size=64)
    fit(head, reference, [texts[0]], first=NEW_TOKENS, steps=5, noise=0.1)
    model = spec_compile(model, draft=head, compile="none", num_steps=3, adaptive=False)
    return Compiled(model, inputs, texts, RECURRENT_FAMILIES.index(request.param))


def test_eagle3_chains(compiled: Compiled) -> None:
    reshape(compiled.model, **options_of(CHAIN))
    compiled.check(BATCHES[compiled.number % 3])


def test_eagle3_trees(compiled: Compiled) -> None:
    reshape(compiled.model, **options_of(TREE))
    compiled.check(BATCHES[(compiled.number + 1) % 3])


def test_ngram_drafts(compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NgramDraft, "extend", looked_up(compiled.texts, compiled.inputs["attention_mask"]))
    engine = compiled.model.spec._engine
    draft = NgramDraft(chain(5), min_ngram=1, max_ngram=3)
    monkeypatch.setattr(compiled.model.spec, "_engine", Engine(engine.target, draft, engine.config))
    compiled.check(*BATCHES)


@functools.cache
def hybrid() -> tuple[ModelRunner, HeadRunner]:
    """A target of two recurrent layers and one of attention, and a random head for it."""
    hardware = Hardware("cpu", "cpu", 2, "any CPU")
    compiler = SegmentCompiler("none", hardware)
    model = tiny_model("qwen3_5_text", num_hidden_layers=3, layer_types=["linear_attention"] * 2 + ["full_attention"])
    head = random_eagle3_head(model, draft_vocab_size=64)
    options = RuntimeOptions(hardware, compiler, page_size=16)
    return ModelRunner(model, "verify", options, head.taps), HeadRunner(head, options)


@torch.no_grad()
def states_of(model, text: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What transformers keeps behind ``text`` [L], a pair a layer: state [Hv, D, Dv], inputs of the convolution [C, K]."""
    cache = DynamicCache(config=model.config)
    model(text[None], use_cache=True, **{cache_argument(model.forward): cache})
    layers = [layer for layer in cache.layers if hasattr(layer, "recurrent_states")]
    return [(layer.recurrent_states[0][0], layer.conv_states[0][0]) for layer in layers]


@pytest.mark.parametrize("shape", ["3/1/4", "2/4/8"])
def test_states_after_a_hundred_rounds_of_random_acceptance(shape: str) -> None:
    """Chains and trees, rows that end apart, a prompt shorter than the convolution reaches."""
    target, runner = hybrid()
    rates = (0.7, 0.4, 0.5)[: int(shape[0])]
    config = SpecConfig(compile="none", adaptive=False, simulate_accept_rates=rates, **options_of(shape))
    engine = Engine(target, EagleDraft(runner, config.round_shape(5), 96), config)
    prompts = [torch.randint(3, 96, (length,)) for length in (9, 2, 40)]
    state = engine.admit(Request(prompts, [300, 120, 90], [0] * 3, [], [1, 2, 3], SamplingPlan()))
    seen: set[int] = set()
    for _ in range(100):
        engine.launch(state, SamplingPlan(), engine.shape)
        seen |= set(state.out[:3, -3].tolist())
    assert seen == set(range(int(shape[0]) + 2)), "rows must stand still and advance by every possible count"
    pool = target.programs.states
    for row in range(3):
        length = int(state.cache_len[row])
        for layer, (recurrent, inputs) in enumerate(states_of(target.model, state.tokens[row, :length])):
            torch.testing.assert_close(pool.state[layer, row + 1], recurrent.transpose(1, 2), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(pool.conv[layer, row + 1], inputs.T[-3:], rtol=1e-4, atol=1e-4)


def accepted_and_refused(model: PreTrainedModel) -> bool:
    seen = {length for row in model.spec.stats().accept_lengths for length in row}
    return 1 in seen and max(seen) > 1


def test_processors_run_in_lockstep(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, model = tiny_model("qwen3_5_text"), tiny_model("qwen3_5_text")
    inputs = left_padded(3, PROMPT, seed=1)
    settings = {"max_new_tokens": 30, "do_sample": False, "repetition_penalty": 1.3}
    plain = reference.generate(**inputs, **settings)
    monkeypatch.setattr(NgramDraft, "extend", looked_up(plain, inputs["attention_mask"]))
    spec_compile(model, draft="ngram", num_steps=3, compile="none", adaptive=False)
    assert torch.equal(model.generate(**inputs, **settings), plain)
    assert model.spec.stats().mode == "lockstep" and accepted_and_refused(model)


def test_sampled_text_does_not_depend_on_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A looked-up draft stands where it is the target's own sample: the states must not drift on the way."""
    inputs = left_padded(3, PROMPT, seed=1)

    def text(draft: str | None) -> tuple[PreTrainedModel, Tensor]:
        torch.manual_seed(3)
        model = spec_compile(tiny_model("qwen3_next"), draft=draft, num_steps=3, compile="none", adaptive=False)
        return model, model.generate(**inputs, max_new_tokens=30, do_sample=True, temperature=0.3)

    _, alone = text(None)
    monkeypatch.setattr(NgramDraft, "extend", looked_up(alone, inputs["attention_mask"]))
    model, drafted = text("ngram")
    assert torch.equal(drafted, alone) and accepted_and_refused(model)


def test_a_pool_whose_states_do_not_fit_leaves_nothing_half_made(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, model = tiny_model("qwen3_5_text"), tiny_model("qwen3_5_text")
    settings = left_padded(1, PROMPT) | {"max_new_tokens": 6, "do_sample": False}
    spec_compile(model, draft=None, compile="none")
    with monkeypatch.context() as patch:
        patch.setattr(state_pool, "allocate", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            model.generate(**settings)
    with monkeypatch.context() as patch:
        patch.setattr(kv_pool, "_available_memory", lambda: 1000)
        patch.setattr(kv_pool, "allocate", lambda *args: None)
        with pytest.raises(SpecCompileError, match="of recurrent states"):
            model.generate(**settings)
    assert torch.equal(model.generate(**settings), reference.generate(**settings))


def test_the_memory_of_states_is_told_and_small_beside_a_state_a_token() -> None:
    model = tiny_model("qwen3_5_text")
    spec_compile(model, draft="ngram", num_steps=7, compile="none", adaptive=False)
    model.generate(**left_padded(3, PROMPT), max_new_tokens=4, do_sample=False)
    assert "1 recurrent layers" in model.spec.explain() and "windows of up to 8 tokens" in model.spec.explain()
    states = model.spec._engine.target.programs.states
    assert states.nbytes <= model.spec.stats().kv_bytes
    assert states.window_bytes < 8 * states.state.nbytes / 2, "eight tokens' inputs against eight states"


def test_text_through_a_vision_language_model() -> None:
    """Qwen3.5 is published as one: without images its positions are plain, and so are the rounds."""
    text = tiny_model("qwen3_5_text").config.to_dict()
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4}
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(
        AutoConfig.for_model("qwen3_5", text_config=text, vision_config=vision | {"num_position_embeddings": 16})
    ).eval()
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.12)
    settings = left_padded(3, PROMPT, seed=1) | {"max_new_tokens": 20, "do_sample": False}
    plain = model.generate(**settings)
    spec_compile(model, draft="ngram", num_steps=3, min_ngram=1, compile="none", adaptive=False)
    assert torch.equal(model.generate(**settings), plain) and model.spec.stats().mode == "rounds"


def test_a_recurrent_model_cannot_draft_as_a_causal_lm() -> None:
    with pytest.raises(DraftError, match="recurrent layers, whose states cannot go back"):
        spec_compile(tiny_model("qwen3_5_text"), draft=tiny_model("qwen3_5_text", seed=1), compile="none")


def test_other_threads_run_the_family_while_one_captures() -> None:
    """The functions that capture replaces are the module's, which all models of the family call."""
    model, found = tiny_model("qwen3_5_text"), []
    settings = left_padded(1, PROMPT) | {"max_new_tokens": 4, "do_sample": False}
    plain = model.generate(**settings)
    with recurrent_capture(model, [0], context=None):
        other = threading.Thread(target=lambda: found.append(model.generate(**settings)))
        other.start()
        other.join()
    assert len(found) == 1 and torch.equal(found[0], plain)
