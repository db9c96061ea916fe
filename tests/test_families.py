"""Every family of the list: greedy text through ``generate()`` equals plain transformers token for token in float32."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, left_padded, tiny_model

from spec_compile import spec_compile
from spec_compile.errors import CaptureError
from spec_compile.hf_integration.capture import capture_window

NEW_TOKENS = 24  # past every sliding window of 16


def assert_same_text(reference, model, batches=(1, 3, 5)) -> None:
    for batch in batches:
        inputs = left_padded(batch, 11, seed=batch)
        plain = reference.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        ours = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert model.spec.stats().mode == "rounds"
        assert torch.equal(plain, ours), f"batch {batch}"
        # An end-of-sequence token that fires in the middle of the text, another in another row.
        middle = {int(plain[0, 11 + 9]), int(plain[-1, 11 + 14])}
        plain = reference.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=list(middle))
        ours = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=list(middle))
        assert torch.equal(plain, ours), f"batch {batch} with end-of-sequence {middle}"


@pytest.mark.parametrize("family", FAMILIES)
def test_ngram_drafts(family: str) -> None:
    reference = tiny_model(family)
    model = spec_compile(tiny_model(family), draft="ngram", min_ngram=1, compile="none", adaptive=False)
    assert_same_text(reference, model)


@pytest.mark.parametrize("family", FAMILIES)
def test_causal_lm_drafts(family: str) -> None:
    """The draft is the target with slightly moved weights, so that windows are accepted in part."""
    reference, draft = tiny_model(family), tiny_model(family)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    num_steps = 3 if family in ("llama", "gemma3_text") else 1  # each window width is a capture of one to two seconds
    model = spec_compile(tiny_model(family), draft=draft, num_steps=num_steps, compile="none")
    assert_same_text(reference, model, batches=(1, 3, 5))
    assert model.spec.stats().accept_length > 1.0


@pytest.mark.parametrize("family", FAMILIES)
def test_capture_is_one_attention_op_a_layer_without_masks(family: str) -> None:
    model = tiny_model(family)
    graph = capture_window(model, 2, 4, "verify").gm.graph
    attention = [n for n in graph.nodes if "attention" in str(n.target) and n.op == "call_function"]
    assert len(attention) == model.config.num_hidden_layers
    names = {str(getattr(n.target, "__name__", n.target)) for n in graph.nodes if n.op.startswith("call")}
    assert not names & {"tril", "triu", "scaled_dot_product_attention"}
    for node in graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, torch.Tensor) and value.dtype == torch.bool and value.dim() >= 2:
            assert value.shape[-2:] != (4, 4), f"{node} looks like a mask over the window"


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_oss", "deepseek_v3"])
def test_forward_and_weights_are_unchanged(family: str, tmp_path) -> None:
    """Plain forward is bit-identical, ``state_dict()`` the same, and the checkpoint round-trips (fused weights are views)."""
    reference, model = tiny_model(family), tiny_model(family)
    inputs = left_padded(2, 9)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bytes_before = sum(p.numel() for p in model.parameters())
    spec_compile(model, compile="none")
    model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(model(**inputs).logits, reference(**inputs).logits)
    after = model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().size() for p in model.parameters()}
    assert sum(storages.values()) == 4 * bytes_before, "fusing must not keep a second copy of any weight"
    model.save_pretrained(tmp_path)
    loaded = type(reference).from_pretrained(tmp_path)
    assert type(loaded) is type(reference)
    assert all(torch.equal(before[name], value) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("bloom", {"vocab_size": 96, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
        ("falcon", {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True}),
    ],
)
def test_what_cannot_be_captured_says_why_and_stays_usable(family: str, settings: dict) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, pad_token_id=0, **settings)).eval()
    inputs = left_padded(2, 9)
    plain = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    with pytest.raises(CaptureError, match=rf"{family}.*cannot be captured.*plain generate\(\)"):
        spec_compile(model, compile="none")
    assert not hasattr(model, "spec")
    assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), plain)
