"""Every family of the list: greedy text through ``generate()`` equals plain transformers token for token in float32."""

from __future__ import annotations

import re

import pytest
import torch
from ngrams import looked_up
from tiny import FAMILIES, ids_inside_windows, left_padded, tiny_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from spec_compile import spec_compile
from spec_compile.drafts.ngram import NgramDraft
from spec_compile.errors import CaptureError
from spec_compile.family_matrix import FAMILIES as FAMILY_TABLE

NEW_TOKENS = 24
# Sliding windows are 16 tokens: a short prompt crosses them while text is written, a long one in prefill already.
PROMPTS = {1: 11, 3: 21, 5: 11}  # batch -> prompt tokens of its longest row
_SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def reference(family: str) -> PreTrainedModel:
    """The family's model as transformers makes it."""
    return tiny_model(family)


@pytest.fixture(scope="module")
def model(family: str) -> PreTrainedModel:
    """The same model compiled, with n-gram drafts."""
    return spec_compile(tiny_model(family), draft="ngram", min_ngram=1, num_steps=3, compile="none", adaptive=False)


def assert_same_text(reference: PreTrainedModel, model: PreTrainedModel, batch: int, **settings) -> Tensor:
    """Left-padded ragged prompts give the same ids on both sides; returns them, prompts included."""
    inputs = left_padded(batch, PROMPTS[batch], seed=batch)
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | settings
    plain, ours = (m.generate(**inputs, **settings) for m in (reference, model))
    assert model.spec.stats().mode == "rounds"
    assert torch.equal(plain, ours), f"batch {batch}, {settings}"
    return plain


def test_ngram_drafts(reference: PreTrainedModel, model: PreTrainedModel, monkeypatch) -> None:
    seen: set[int] = set()
    for batch, prompt in PROMPTS.items():
        text = assert_same_text(reference, model, batch)
        seen |= {length for row in model.spec.stats().accept_lengths for length in row}
        mask = left_padded(batch, prompt, seed=batch)["attention_mask"]
        with monkeypatch.context() as patch:
            patch.setattr(NgramDraft, "extend", looked_up(text, mask))
            assert_same_text(reference, model, batch)
            ends = ids_inside_windows(text, model.spec.stats().accept_lengths, prompt)
            assert ends, "an end-of-sequence id has to fire inside a window"
            cut = assert_same_text(reference, model, batch, eos_token_id=ends)
            assert bool(torch.isin(cut[:, prompt:], torch.tensor(ends)).any())
    assert 1 in seen and max(seen) > 1, "drafts must be rejected and accepted for this to mean anything"


@pytest.mark.usefixtures("one_bucket")
def test_causal_lm_drafts(family: str, reference: PreTrainedModel) -> None:
    """The draft is the target with slightly moved weights, so that windows are accepted in part."""
    draft = tiny_model(family)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter *= 1 + 0.08 * torch.randn_like(parameter)
    model = spec_compile(tiny_model(family), draft=draft, num_steps=3, compile="none")
    fired = 0
    for batch, prompt in PROMPTS.items():
        text = assert_same_text(reference, model, batch)
        assert 1.0 < model.spec.stats().accept_length < 4.0
        ends = ids_inside_windows(text, model.spec.stats().accept_lengths, prompt)
        if ends:  # of a few short rows there may be none
            cut = assert_same_text(reference, model, batch, eos_token_id=ends)
            fired += int(torch.isin(cut[:, prompt:], torch.tensor(ends)).any(1).sum())
    assert fired > 1, "end-of-sequence ids have to fire inside windows"


def test_capture_is_one_attention_op_a_layer_without_masks(reference: PreTrainedModel, model: PreTrainedModel) -> None:
    assert_same_text(reference, model, 3)
    captured = model.spec._engine.target.programs.captured
    window, prefill = (graph.gm.graph for graph in (captured["verify", 3, 4], captured["prefill",]))
    for graph in (window, prefill):
        called = [n for n in graph.nodes if n.op == "call_function"]
        attention = [n for n in called if re.search(r"spec_compile\W+\w*attention", repr(n.target))]
        assert len(attention) == model.config.num_hidden_layers
        for node in graph.nodes:
            assert not re.search(r"tril|triu|scaled_dot_product|create_\w*mask", str(node.target)), node
    for node in window.nodes:
        value = node.meta.get("example_value")
        masking = re.search(r"masked_fill|where", str(node.target)) or getattr(value, "dtype", None) == torch.bool
        if masking and isinstance(value, Tensor):  # DeepSeek's router masks groups of experts
            assert value.shape[-2:] != (4, 4), f"{node} looks like a mask over the window"


def test_the_support_matrix_knows_what_the_family_asks_of_kernels(family: str, model: PreTrainedModel) -> None:
    nodes = [choice.node for choice in model.spec._engine.target.programs.choices["prefill"]]
    asked = {(bool(node.window), node.softcap > 0, node.has_sinks, node.op.startswith("mla")) for node in nodes}
    listed = {(bool(node.window), node.softcap > 0, node.has_sinks, node.op.startswith("mla"))
              for node in FAMILY_TABLE[family].nodes("chain", torch.float32)}  # fmt: skip
    assert asked == listed


def test_forward_and_weights_are_unchanged(reference: PreTrainedModel, model: PreTrainedModel, tmp_path) -> None:
    """Plain forward is bit-identical, ``state_dict()`` the same, and the checkpoint round-trips (fused weights are views)."""
    inputs = left_padded(2, 9)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, reference(**inputs).logits)
    before, after = reference.state_dict(), model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().size() for p in model.parameters()}
    assert sum(storages.values()) == 4 * sum(p.numel() for p in model.parameters()), "no weight is kept twice"
    model.save_pretrained(tmp_path)
    loaded = type(reference).from_pretrained(tmp_path)
    assert type(loaded) is type(reference)
    assert all(torch.equal(before[name], value) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("architecture", "settings", "reason"),
    [
        ("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4}, r"layers \[\] reach the attention interface"),
        ("mpt", {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}, r"layers \[\] reach the attention interface"),
        ("falcon", {**_SMALL, "alibi": True}, r"layers \[\] reach the attention interface"),
        ("bart", {"d_model": 64, "decoder_layers": 1, "encoder_layers": 1}, "its forward takes no position_ids"),
        (
            "whisper",
            {"d_model": 64, "decoder_layers": 1, "decoder_attention_heads": 4, "encoder_layers": 1},
            "its forward takes no position_ids",
        ),
        ("bert", {**_SMALL, "is_decoder": False}, "BertSelfAttention is not causal"),
        (
            "mamba",
            {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
            r"recurrent layers \[0, 1\] of a kind that no op expresses",
        ),
    ],
)
def test_what_cannot_be_captured_says_why_and_stays_usable(architecture: str, settings: dict, reason: str) -> None:
    config = AutoConfig.for_model(architecture, vocab_size=96, pad_token_id=0, **settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    cls, inputs = type(model), left_padded(1, 9)
    plain = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    with pytest.raises(CaptureError, match=rf"{cls.__name__}.*cannot be captured: .*{reason}.*plain generate\(\) still works"):
        spec_compile(model, compile="none")
    assert type(model) is cls and not hasattr(model, "spec")
    assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), plain)
