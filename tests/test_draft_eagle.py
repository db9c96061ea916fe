"""EAGLE-1/2 heads against SafeAILab's own module: the same weights, the same logits (tests/data/README.md)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from draft_files import HIDDEN, LAYERS, VOCAB, draft_logits, expected, largest_difference, reference, target_for, write
from torch import Tensor

from spec_compile.errors import DraftError
from spec_compile.hf_integration.checkpoints.detect import load_draft_head
from spec_compile.hf_integration.taps import NORMED

WEIGHTS = reference("draft_eagle.safetensors")
TOLERANCE = 1e-5
_LAYER = r"layers\.0\.(self_attn\.[qkvo]_proj\.weight|mlp\..*|post_attention_layernorm\.weight)"


def published(bias: bool = True, embedding: bool = True, **config: object) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Config and tensors of an official repository, whose architecture is that of a causal LM."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"rms_norm_eps": 1e-5, "max_position_embeddings": 64, "num_hidden_layers": 1, "vocab_size": VOCAB}
    pattern = _LAYER + r"|fc\.weight" + (r"|fc\.bias" if bias else "") + (r"|embed_tokens\.weight" if embedding else "")
    tensors = {name: value for name, value in WEIGHTS.items() if re.fullmatch(pattern, name)}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_theta": 500.0, **sizes, **config}, tensors


@pytest.mark.parametrize("embedding", [True, False])
@pytest.mark.parametrize(("case", "bias"), [("fc_bias", True), ("no_fc_bias", False)])
def test_logits_are_those_of_the_published_module(case: str, bias: bool, embedding: bool, tmp_path: Path):
    target = target_for(WEIGHTS)
    head = load_draft_head(write(tmp_path, *published(bias, embedding)), target)
    assert head.kind == "eagle" and head.draft_ids is None and head.owned == ()
    assert largest_difference(draft_logits(head, WEIGHTS), expected(WEIGHTS, case)) < TOLERANCE


def test_it_reads_what_the_language_model_head_reads(tmp_path: Path):
    target = target_for(WEIGHTS)
    head = load_draft_head(write(tmp_path, *published()), target)
    assert head.taps == (NORMED,)
    with torch.no_grad():
        out = target(torch.arange(3, 9)[None], output_hidden_states=True)
        torch.testing.assert_close(head.logits(out.hidden_states[LAYERS]), out.logits)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLMEagle", "Qwen2ForCausalLMEagle", "EagleLlamaForCausalLM"])
def test_architectures_of_other_engines(architecture: str, tmp_path: Path):
    head = load_draft_head(write(tmp_path, *published(architectures=[architecture])), target_for(WEIGHTS))
    assert largest_difference(draft_logits(head, WEIGHTS), expected(WEIGHTS, "fc_bias")) < TOLERANCE


def test_biases_on_queries_keys_and_values_only(tmp_path: Path):
    """Qwen2's layers: the output projection has none."""
    config, tensors = published(architectures=["Qwen2ForCausalLMEagle"])
    for name in "qkv":
        tensors[f"layers.0.self_attn.{name}_proj.bias"] = WEIGHTS[f"layers.0.self_attn.{name}_proj.bias"]
    head = load_draft_head(write(tmp_path, config, tensors), target_for(WEIGHTS))
    assert head.layers[0].self_attn.o_proj.bias is None and head.layers[0].self_attn.q_proj.bias is not None
    assert largest_difference(draft_logits(head, WEIGHTS), expected(WEIGHTS, "fc_bias")) > 50 * TOLERANCE


@pytest.mark.parametrize("name", ["norm.weight", "layers.0.input_layernorm.weight"])
def test_norms_that_eagle_does_not_have_are_not_skipped(name: str, tmp_path: Path):
    config, tensors = published(architectures=["LlamaForCausalLMEagle"])
    with pytest.raises(DraftError, match=f"unknown: {name}"):
        load_draft_head(write(tmp_path, config, tensors | {name: torch.ones(HIDDEN)}), target_for(WEIGHTS))


def test_a_head_of_another_width_is_refused(tmp_path: Path):
    with pytest.raises(DraftError, match="states of 32 features, the target's have 48"):
        load_draft_head(write(tmp_path, *published()), target_for(WEIGHTS, 48))
