"""Sliding windows come from the masks a forward makes, not from its configuration; an attention that is somebody's own, layers
that run twice and masks no op expresses are refused by name."""

from __future__ import annotations

import pytest
import torch
from stage_graphs import find
from tiny import left_padded, tiny_model
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask, sdpa_mask

from spec_compile import spec_compile
from spec_compile.errors import CaptureError
from spec_compile.hf_integration.capture import capture_prefill, capture_window
from spec_compile.hf_integration.mask_windows import _window_of
from spec_compile.hf_integration.own_attention import own_attention

_SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_MIXED = ["sliding_attention", "full_attention"]
_MOSHI = {"ffn_dim": 96, "head_dim": 16, "sliding_window": 12}


def tiny_of(family: str, **overrides: object) -> PreTrainedModel:
    """A random float32 model of a family that ``tiny_model`` does not know."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**_SIZES, **overrides})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.13)
    model.generation_config.eos_token_id = None
    return model


def windows(model: PreTrainedModel) -> list[int]:
    graph = capture_window(model, 1, 2, "verify")
    nodes = find(graph, "attention")
    assert all(node.args[7] is None for node in nodes), "no mask stays in the graph"
    return [node.args[9] for node in nodes]


# ----------------------------------------------------------------------------------------------------------------------
# Windows


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: tiny_model("llama", sliding_window=8), [0, 0]),  # a stray key: its class knows none
        (lambda: tiny_model("mistral", sliding_window=8), [8, 8]),
        (lambda: tiny_model("mistral", sliding_window=131072), [131072, 131072]),
        (
            lambda: tiny_of("modernbert-decoder", local_attention=14, layer_types=["sliding_attention", "full_attention"]),
            [7, 0],
        ),
        (lambda: tiny_of("phimoe", num_local_experts=4, sliding_window=5), [5, 5]),  # in its mask alone
        (lambda: tiny_of("moshi", **_MOSHI), [0, 0]),  # declared, but not used
    ],
    ids=["stray", "mistral", "wide", "modernbert-decoder", "phimoe", "moshi"],
)
def test_windows_are_those_of_the_forwards_own_masks(model, expected: list[int]) -> None:
    assert windows(model()) == expected


@pytest.mark.parametrize(("family", "expected"), [("mistral", [8, 8]), ("phimoe", [0, 0])])
def test_flash_attention_has_its_window_from_the_call(family: str, expected: list[int]) -> None:
    AttentionInterface.register("as_fa2", flash_attention_forward)  # whose package need not be installed: nothing runs
    AttentionMaskInterface.register("as_fa2", flash_attention_mask)
    model = tiny_of(family, sliding_window=8, **({} if family == "mistral" else {"num_local_experts": 4}))
    model.set_attn_implementation("as_fa2")
    assert windows(model) == expected
    assert model.config._attn_implementation == "as_fa2"


@pytest.mark.parametrize(
    ("family", "settings"),
    [("modernbert-decoder", {"local_attention": 24}), ("phimoe", {"num_local_experts": 4, "sliding_window": 12})],
)
def test_text_past_a_window_that_the_configuration_hides(family: str, settings: dict) -> None:
    reference, model = tiny_of(family, **settings), tiny_of(family, **settings)
    spec_compile(model, min_ngram=1, num_steps=3, compile="none", adaptive=False, progress=False)
    inputs = left_padded(3, 21)
    expected = reference.generate(**inputs, max_new_tokens=16, do_sample=False)
    assert torch.equal(model.generate(**inputs, max_new_tokens=16, do_sample=False), expected)
    assert model.spec.stats().mode == "rounds"


def test_a_cache_that_keeps_less_than_the_mask_shows_bounds_what_is_accelerated() -> None:
    """Moshi's masks are causal, and its configuration lets transformers' cache keep 12 tokens."""
    reference = tiny_of("moshi", **_MOSHI)
    model = spec_compile(tiny_of("moshi", **_MOSHI), compile="none", progress=False)
    for prompt, new, mode in ((8, 4, "rounds"), (8, 5, "plain"), (30, 12, "plain")):
        inputs = left_padded(1, prompt)
        expected = reference.generate(**inputs, max_new_tokens=new, do_sample=False)
        assert torch.equal(model.generate(**inputs, max_new_tokens=new, do_sample=False), expected)
        assert model.spec.stats().mode == mode
    with pytest.warns(UserWarning, match="texts of more than 12 tokens are not accelerated: the cache"):
        model.spec._told.clear()
        model.generate(**left_padded(1, 20), max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 4096, 1 << 20, 0])
def test_every_window_is_found(window: int) -> None:
    def mask(query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key > query - window if window else True)

    assert _window_of(mask, torch.device("cpu")) == window


@pytest.mark.parametrize(
    "mask",
    [
        lambda q, k: k == k + 0 * q,  # both ways
        lambda q, k: (k <= q) & (k // 16 == q // 16),  # chunks
        lambda q, k: (k <= q) & ((k > q - 9) | (k == 0)),  # a window and a sink
        lambda q, k: (k < q) | ((k == q) & (q == 0)),  # not itself
        lambda q, k: ((k <= q) & (k > q - 9)).float(),
        lambda q, k: torch.ones(1, 1, 3, 3, dtype=torch.bool),
    ],
    ids=["bidirectional", "chunked", "sink", "strict", "numbers", "of a fixed size"],
)
def test_masks_that_are_no_window_are_refused(mask) -> None:
    with pytest.raises(CaptureError, match="attention mask"):
        _window_of(mask, torch.device("cpu"))


def replaced_mask(model: PreTrainedModel, change) -> PreTrainedModel:
    """``model`` whose first layer is handed a changed mask."""
    model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"attention_mask": change(args[0], kwargs["attention_mask"])}),
        with_kwargs=True,
    )
    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda hidden, mask: mask & (hidden[:, None, :2, :1] > 0),
        lambda hidden, mask: torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool).tril()[None, None],
        lambda hidden, mask: mask.float(),
    ],
    ids=["of the states", "of its own", "numbers"],
)
def test_a_mask_the_model_made_is_refused(change) -> None:
    for capture in (capture_prefill, lambda m: capture_window(m, 1, 3, "verify")):
        with pytest.raises(CaptureError, match=r"own attention mask.* plain generate\(\) still works"):
            capture(replaced_mask(tiny_model("llama"), change))


def test_a_mask_cut_to_the_keys_is_the_mask() -> None:
    model = replaced_mask(tiny_model("mistral", sliding_window=8), lambda hidden, mask: mask[:, :, :, : hidden.shape[1]])
    assert windows(model) == [8, 8]
    capture_prefill(model)


# ----------------------------------------------------------------------------------------------------------------------
# One attention a layer


def test_a_layer_that_attends_twice_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"DiffLlama.*layers \[0, 1\] reach the attention interface more than once"):
        capture_window(tiny_of("diffllama"), 1, 2, "verify")


def test_layers_in_a_loop_are_refused() -> None:
    config = pytest.importorskip("transformers.models.dory.configuration_dory").DoryConfig  # new in 5.24
    assert issubclass(config, PretrainedConfig)
    model = tiny_of("dory", num_hidden_layers=4, n_input_layers=1, n_recurrent_layers=2, n_output_layers=1, n_recurrent_loops=2)
    with pytest.raises(CaptureError, match=r"Dory.*layers \[1, 2\] reach the attention interface more than once"):
        capture_window(model, 1, 2, "verify")


# ----------------------------------------------------------------------------------------------------------------------
# Attention of the user's own


def cooler(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **kwargs):
    return sdpa_attention_forward(module, query, key, value, attention_mask, **{**kwargs, "scaling": 0.2 * module.scaling})


def near(batch_size: int, q_length: int, kv_length: int, q_offset=0, kv_offset=0, mask_function=None, **kwargs) -> Tensor:
    return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, lambda b, h, q, k: (k <= q) & (k > q - 4), **kwargs)


AttentionInterface.register("cooler", cooler)
AttentionMaskInterface.register("cooler", sdpa_mask)
AttentionInterface.register("near", sdpa_attention_forward)
AttentionMaskInterface.register("near", near)


@pytest.mark.parametrize("name", ["cooler", "near"])
def test_an_attention_of_the_users_own_is_refused_by_name(name: str) -> None:
    model = tiny_model("llama")
    model.set_attn_implementation(name)
    with pytest.raises(CaptureError, match=rf"its attention implementation '{name}' .*{name}, which somebody registered"):
        spec_compile(model, compile="none", progress=False)


@pytest.mark.parametrize(("interface", "function"), [(AttentionInterface, cooler), (AttentionMaskInterface, near)])
def test_a_function_registered_over_a_built_in_name_is_seen(interface, function, monkeypatch) -> None:
    """Both before and behind ``spec_compile()``, also where graphs were captured already."""
    model, inputs = tiny_model("llama"), left_padded(1, 9)
    spec_compile(model, compile="none", progress=False)
    model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert own_attention(model) is None and model.spec.stats().mode == "rounds"
    monkeypatch.setitem(interface._global_mapping, "sdpa", function)
    expected = tiny_model("llama").generate(**inputs, max_new_tokens=4, do_sample=False)
    with pytest.warns(UserWarning, match=r"runs as plain transformers: its attention implementation 'sdpa' .*registered"):
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), expected)
    with pytest.raises(CaptureError, match="its attention implementation 'sdpa'"):
        capture_prefill(tiny_model("llama"))


def test_another_built_in_attention_behind_spec_compile_stays_accelerated() -> None:
    model, inputs = spec_compile(tiny_model("llama"), compile="none", progress=False), left_padded(1, 9)
    model.set_attn_implementation("eager")
    model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert model.spec.stats().mode == "rounds"
