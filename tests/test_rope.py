"""Rotary frequencies that depend on the text's length: such texts run plain, shorter ones are accelerated and equal."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny import left_padded, tiny_model
from transformers import GenerationConfig

from spec_compile import spec_compile
from spec_compile.errors import CaptureError
from spec_compile.hf_integration.generate import why_plain
from spec_compile.hf_integration.rope import fixed_rope_length

_FACTORS = {"short_factor": [1.0] * 8, "long_factor": [1.0 + 0.7 * i for i in range(8)]}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 128, **_FACTORS}


def phi3(**overrides: object):
    return tiny_model("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=128, **overrides)


@pytest.mark.parametrize(("new_tokens", "mode"), [(30, "rounds"), (124, "plain")])
def test_longrope_equals_plain_generate_on_both_sides_of_the_switch(new_tokens: int, mode: str):
    inputs = left_padded(1, 12)
    expected = phi3().generate(**inputs, do_sample=False, max_new_tokens=new_tokens)
    try:
        model = spec_compile(phi3(), draft="ngram", min_ngram=1, num_steps=3, compile="none")
    except CaptureError as error:
        pytest.skip(f"transformers {transformers.__version__} branches on the positions: {error}")
    assert torch.equal(model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens), expected)
    assert model.spec.stats().mode == mode


def test_a_switch_within_the_first_draft_window_is_said_as_it_is():
    model = phi3()
    model.config.rope_parameters = {**LONGROPE, "original_max_position_embeddings": 32}
    settings = GenerationConfig(max_length=20)
    reason = why_plain(model, torch.ones(1, 4, dtype=torch.int64), settings, False, {}, {})
    assert reason is not None and "change within the first 64 tokens" in reason


def test_frequencies_that_follow_every_token_are_refused_by_name():
    model = tiny_model("llama", num_hidden_layers=1, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(CaptureError, match=r"its rotary embedding model\.rotary_emb is of type 'dynamic'"):
        spec_compile(model, compile="none", progress=False)


def test_which_configs_have_a_fixed_length():
    assert fixed_rope_length(tiny_model("llama").config) is None
    assert fixed_rope_length(tiny_model("gemma3_text").config) is None, "one entry a layer type"
    assert fixed_rope_length(phi3().config) == 64
    scaled = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert fixed_rope_length(tiny_model("llama", rope_parameters=scaled).config) == 192, "from max_position_embeddings"
    scaled = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 128}
    assert fixed_rope_length(tiny_model("llama", rope_parameters=scaled).config) is None, "fixed once and for all"
