"""Capture: one graph with one attention op a layer, every input bound to what it is, and the model as it was before."""

from __future__ import annotations

import functools
import random
import threading
import types

import pytest
import torch
from stage_graphs import bindings, find, run, runtime_inputs
from tiny import tiny_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from spec_compile.errors import CaptureError
from spec_compile.hf_integration import attention_interface
from spec_compile.hf_integration import capture as capture_module
from spec_compile.hf_integration.attention_interface import attention_function, capture_context, check_layer_types
from spec_compile.hf_integration.capture import _reason, capture_prefill, capture_window
from spec_compile.hf_integration.private_copy import private_copy
from spec_compile.ops.providers import torch_sdpa  # noqa: F401 (registers the CPU ops)
from spec_compile.passes.graph import CacheSlot, RuntimeInput, StageGraph, fake, placeholders
from spec_compile.passes.stage import stage

PAGE_SIZE = 16


pytestmark = pytest.mark.usefixtures("fresh_seed")


def empty_caches(graph: StageGraph, model: PreTrainedModel, rows: int, pages: int) -> dict[tuple[int, str], Tensor]:
    config = model.config
    caches = {}
    for binding in bindings(graph):
        if isinstance(binding, CacheSlot) and binding.part == "kv":
            shape = (config.kv_lora_rank + config.qk_rope_head_dim,)
        elif isinstance(binding, CacheSlot):
            shape = (config.num_key_value_heads, getattr(config, "head_dim", None) or 16)
        else:
            continue
        caches[binding.layer, binding.part] = torch.zeros(rows * pages + 1, PAGE_SIZE, *shape)
    return caches


def random_ids(rows: int, length: int) -> Tensor:
    """By Python's generator: building a model seeds torch's."""
    return torch.tensor([random.choices(range(3, 96), k=length) for _ in range(rows)])


def table(rows: int, pages: int) -> Tensor:
    return torch.arange(1, rows * pages + 1, dtype=torch.int32).view(rows, pages)


# ----------------------------------------------------------------------------------------------------------------------
# The graph is the model


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "deepseek_v3"])
def test_captured_windows_compute_the_models_logits(family: str):
    """A prompt of 20 tokens through two windows, past the sliding window of 16, against one plain forward."""
    model, rows = tiny_model(family), 2
    ids = random_ids(rows, 30)
    with torch.no_grad():
        expected = model(ids).logits
    graph = capture_window(model, rows, 10, "verify")
    caches = empty_caches(graph, model, rows, 3)
    for start in (0, 10, 20):
        (logits, *_) = run(
            graph,
            caches,
            input_ids=ids[:, start : start + 10],
            position_ids=torch.arange(start, start + 10).expand(rows, -1).contiguous(),
            page_table=table(rows, 3),
            cache_len=torch.full((rows,), start, dtype=torch.int32),
        )
        torch.testing.assert_close(logits, expected[:, start : start + 10], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "deepseek_v3"])
def test_one_prefill_graph_serves_every_packed_length(family: str):
    """Prompts of any number and length, one token included, each as if it were alone."""
    model = tiny_model(family)
    graph = stage(capture_prefill(model))
    for lengths in ([24], [1], [1, 2], [5, 31, 1, 17], [40]):
        prompts = [random_ids(1, n) for n in lengths]
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        (logits, *_) = run(
            graph,
            empty_caches(graph, model, len(lengths), 3),
            input_ids=torch.cat(prompts, 1),
            position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
            page_table=table(len(lengths), 3),
            cu_seqlens=bounds.to(torch.int32),
            num_tokens=sum(lengths),
        )
        with torch.no_grad():
            expected = torch.cat([model(prompt).logits for prompt in prompts], 1)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Bindings


def test_every_placeholder_of_a_window_is_bound_to_what_it_is():
    model = tiny_model("llama")
    graph = capture_window(model, 3, 4, "verify")
    tensors = [b for b in bindings(graph) if isinstance(b, Tensor)]
    used = [*model.parameters(), model.model.rotary_emb.inv_freq]
    assert sorted(map(id, tensors)) == sorted(map(id, used)), "each weight once, the very object the model owns"
    assert sorted(runtime_inputs(graph)) == ["cache_len", "input_ids", "page_table", "position_ids"]
    assert [b for b in bindings(graph) if isinstance(b, CacheSlot)] == [
        CacheSlot(layer, part) for layer in range(2) for part in ("k", "v")
    ]
    shapes = {n.meta["binding"].name: tuple(fake(n).shape) for n in placeholders(graph.gm) if _is_runtime(n)}
    assert shapes["input_ids"] == shapes["position_ids"] == (3, 4), "static"
    assert graph.stage == "verify"


def _is_runtime(node) -> bool:
    return isinstance(node.meta["binding"], RuntimeInput)


def test_attention_ops_come_in_layer_order_each_on_its_own_cache():
    graph = capture_window(tiny_model("gemma2"), 2, 3, "verify")
    nodes = find(graph, "attention")
    assert [n.args[3].meta["binding"] for n in nodes] == [CacheSlot(0, "k"), CacheSlot(1, "k")]
    assert [n.args[4].meta["binding"] for n in nodes] == [CacheSlot(0, "v"), CacheSlot(1, "v")]
    assert [n.args[9] for n in nodes] == [16, 0], "sliding, then full"
    assert [n.args[10] for n in nodes] == [2.0, 2.0], "soft-capped"


def test_sinks_are_the_layers_own_parameters():
    model = tiny_model("gpt_oss")
    graph = capture_window(model, 2, 3, "verify")
    sinks = [node.args[11].meta["binding"] for node in find(graph, "attention")]
    assert [s is layer.self_attn.sinks for s, layer in zip(sinks, model.model.layers, strict=True)] == [True, True]


def test_latent_attention_caches_latents_and_drops_the_expansion():
    model = tiny_model("deepseek_v3")
    graph = capture_window(model, 2, 3, "verify")
    nodes = find(graph, "mla_attention")
    assert [n.args[2].meta["binding"] for n in nodes] == [CacheSlot(0, "kv"), CacheSlot(1, "kv")]
    assert fake(nodes[0].args[1]).shape == (2, 3, 16 + 8)
    assert not any(n.args[1].meta.get("binding") is model.model.layers[0].self_attn.kv_b_proj.weight for n in
                   find(graph, "linear")), "keys and values are never expanded"  # fmt: skip


def test_the_prefill_length_is_symbolic():
    graph = capture_prefill(tiny_model("llama"))
    by_name = {n.meta["binding"].name: fake(n) for n in placeholders(graph.gm) if _is_runtime(n)}
    length = by_name["input_ids"].shape[1]
    assert isinstance(length, torch.SymInt) and by_name["position_ids"].shape[1] == length
    if "num_tokens" in by_name:
        assert str(by_name["num_tokens"]) == str(length)


# ----------------------------------------------------------------------------------------------------------------------
# The model is as it was


def snapshot(model: PreTrainedModel) -> dict[str, object]:
    return {
        "class": type(model),
        "attention": model.config._attn_implementation,
        "training": [m.training for m in model.modules()],
        "modules": [type(m) for m in model.modules()],
        "attributes": [sorted(m.__dict__) for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "gradients": [p.requires_grad for p in model.parameters()],
        "pointers": [p.data_ptr() for p in model.parameters()],
        "values": [p.detach().sum().item() for p in model.parameters()],
        "random state": torch.get_rng_state().tolist(),
        "context": attention_interface._context,
        "grad mode": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("training", [False, True])
def test_a_capture_leaves_no_trace(attention: str, training: bool):
    model = tiny_model("llama", num_hidden_layers=1)
    model.set_attn_implementation(attention)
    model.train(training)
    ids = random_ids(2, 7)
    before, logits = snapshot(model), model(ids).logits
    capture_window(model, 2, 3, "verify")
    capture_prefill(model)
    assert snapshot(model) == before
    assert torch.equal(model(ids).logits, logits)


class Faulty(nn.Module):
    """Wraps an attention layer and fails like a model that cannot be captured."""

    def __init__(self, inner: nn.Module, fault) -> None:
        super().__init__()
        self.inner, self.fault = inner, fault

    def forward(self, hidden_states: Tensor, **kwargs):
        self.fault(self.inner, hidden_states)
        return self.inner(hidden_states=hidden_states, **kwargs)


def reads_the_host(layer: nn.Module, hidden: Tensor) -> None:
    if hidden.sum().item() > 0:
        layer.scaling = layer.scaling * 1


def breaks_down(layer: nn.Module, hidden: Tensor) -> None:
    raise RuntimeError("a broken model")


@pytest.mark.parametrize("fault", [reads_the_host, breaks_down], ids=lambda f: f.__name__)
@pytest.mark.parametrize("training", [False, True])
def test_a_failed_capture_leaves_no_trace_and_says_why(fault, training: bool):
    model = tiny_model("llama", num_hidden_layers=1)
    model.model.layers[0].self_attn = Faulty(model.model.layers[0].self_attn, fault)
    model.train(training)
    before = snapshot(model)
    with pytest.raises(CaptureError, match=r"LlamaForCausalLM \(model_type 'llama'\) cannot be captured: .+") as error:
        capture_window(model, 2, 3, "verify")
    culprit = "a broken model" if fault is breaks_down else "data-dependent"
    assert culprit in str(error.value) and fault.__name__ in str(error.value), "what happened, and where"
    assert "plain generate() still works" in str(error.value)
    assert snapshot(model) == before


def test_captures_do_not_add_up_in_dynamo():
    """Each is its own function: the recompile limit (8) must not be met by the ninth batch size."""
    model = tiny_model("llama", num_hidden_layers=1)
    with torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=1):
        for batch in (1, 2, 3):
            assert len(find(capture_window(model, batch, 2, "verify"), "attention")) == 1


# ----------------------------------------------------------------------------------------------------------------------
# What cannot be captured


def from_config(family: str, **settings: object) -> PreTrainedModel:
    config = AutoConfig.for_model(family, vocab_size=96, pad_token_id=0, **settings)
    return AutoModelForCausalLM.from_config(config).eval()


def test_a_model_that_is_not_causal_is_refused():
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = from_config("bert", is_decoder=False, **small)
    with pytest.raises(
        CaptureError, match=r"BertLMHeadModel.* cannot be captured: BertSelfAttention is not causal; .*"
    ) as said:
        capture_window(model, 1, 2, "verify")
    assert "Observed exception" not in str(said.value) and "File" not in str(said.value)


def test_a_model_with_an_encoder_is_refused():
    config = T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    with pytest.raises(CaptureError, match=r"T5ForConditionalGeneration.*it has an encoder beside its decoder"):
        capture_window(T5ForConditionalGeneration(config).eval(), 1, 2, "verify")


@pytest.mark.parametrize(
    "told",
    [
        """CaptureError("T5Attention passes ['position_bias']")""",
        """CaptureError((ConstantVariable(str: "T5Attention passes ['position_bias']"),))""",
    ],
    ids=["torch 2.13", "torch 2.11"],
)
def test_our_errors_are_told_without_what_dynamo_makes_of_them(told: str):
    report = f'Observed exception\n  Developer debug context: raised exception {told}\n  File "/a/b.py", line 3, in c'
    assert _reason(RuntimeError(report)) == "T5Attention passes ['position_bias']"


def test_layers_of_another_kind_are_refused_by_name():
    config = tiny_model("llama").config
    config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(CaptureError, match="chunked_attention"):
        check_layer_types(config)


def test_recurrent_layers_of_another_kind_are_refused_by_name():
    model = tiny_model("llama")
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(CaptureError, match=r"recurrent layers \[1\] of a kind .* plain generate\(\) still works"):
        capture_window(model, 1, 2, "verify")


def test_a_layer_that_bypasses_the_attention_interface_is_refused():
    class Identity(nn.Module):
        def forward(self, hidden_states: Tensor, **kwargs) -> tuple[Tensor, None]:
            return hidden_states * 2, None

    model = tiny_model("llama")
    model.model.layers[1].self_attn = Identity()
    with pytest.raises(CaptureError, match=r"2 layers but layers \[0\] reach the attention interface"):
        capture_window(model, 1, 2, "verify")


def test_a_forward_that_makes_a_constant_of_the_prompts_length_is_refused():
    class Counts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return sum(x * i for i in range(x.shape[1]))

    model = tiny_model("llama")
    model.model.layers[1].mlp = Counts()
    with pytest.raises(CaptureError, match=r"makes a constant of the prompts' length .* plain generate\(\) still works"):
        capture_prefill(model)
    capture_window(model, 1, 2, "verify")  # is made for its length


@pytest.mark.parametrize(
    "kwargs,message",
    [
        ({"head_mask": torch.zeros(1)}, "head_mask"),
    ],
)
def test_an_attention_call_that_no_op_expresses_is_refused(kwargs: dict, message: str):
    model = tiny_model("llama")
    attention = model.model.layers[0].self_attn
    q, kv = torch.zeros(1, 4, 3, 16), torch.zeros(1, 2, 3, 16)
    with capture_context(model, 1), pytest.raises(CaptureError, match=message):
        attention_function(attention, q, kv, kv, **{"attention_mask": None, **kwargs})


def test_a_module_that_is_not_causal_is_refused():
    model = tiny_model("llama")
    attention = model.model.layers[0].self_attn
    attention.is_causal = False
    q, kv = torch.zeros(1, 4, 3, 16), torch.zeros(1, 2, 3, 16)
    with capture_context(model, 1), pytest.raises(CaptureError, match="not causal"):
        attention_function(attention, q, kv, kv, None)


def test_outside_capture_our_attention_refuses_to_run():
    attention = tiny_model("llama").model.layers[0].self_attn
    with pytest.raises(CaptureError, match="outside capture"):
        attention_function(attention, torch.zeros(1, 4, 3, 16), torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), None)


def test_latent_attention_refuses_what_it_cannot_absorb():
    model = tiny_model("deepseek_v3")
    attention = model.model.layers[0].self_attn
    attention.kv_b_proj = nn.Sequential(attention.kv_b_proj)
    attention.kv_b_proj.weight = attention.kv_b_proj[0].weight
    with pytest.raises(CaptureError, match="kv_b_proj is a Sequential"):
        capture_window(model, 1, 2, "verify")


# ----------------------------------------------------------------------------------------------------------------------
# Others use the model meanwhile


@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
def test_a_model_in_the_midst_of_a_capture_is_as_ever_to_everyone(family: str, monkeypatch):
    """Another thread's forward, the flags of a model in training and the hooks; a capture takes seconds."""
    model, ids = tiny_model(family), random_ids(2, 7)
    model.model.layers[1].train()
    before = snapshot(model)
    with torch.no_grad():
        expected = model(ids).logits
    trace, got = capture_module._trace, []

    def observed(*args) -> None:
        def backend(gm, example_inputs):
            def look() -> None:
                assert {k: v for k, v in snapshot(model).items() if k != "context"} == without_context
                with torch.no_grad():
                    got.append(model(ids).logits)

            thread = threading.Thread(target=look)
            thread.start()
            thread.join()
            return args[2](gm, example_inputs)

        trace(*args[:2], backend, *args[3:])

    without_context = {k: v for k, v in before.items() if k != "context"}
    monkeypatch.setattr(capture_module, "_trace", observed)
    capture_window(model, 2, 3, "verify", taps=(1,))
    assert len(got) == 1 and torch.equal(got[0], expected)
    assert snapshot(model) == before


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions", "output_router_logits", "return_dict"])
def test_outputs_that_a_configuration_asks_for_are_left_out(name: str):
    family = "mixtral" if name == "output_router_logits" else "llama"
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    setattr(model.config, name, name != "return_dict")
    assert len(find(capture_window(model, 1, 2, "verify"), "attention")) == 2
    assert getattr(model.config, name) is (name != "return_dict")


def test_what_refers_to_the_models_modules_refers_to_the_copys():
    model = tiny_model("llama")
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[1].mlp
    attention.forward = functools.partial(type(attention).forward, attention)  # as accelerate wraps a module
    mlp.forward = types.MethodType(type(mlp).forward, mlp)
    model.listed = [mlp, {"it": mlp}]
    twin = private_copy(model)
    layers = twin.model.layers
    assert layers[0].self_attn.forward.args == (layers[0].self_attn,) and layers[1].mlp.forward.__self__ is layers[1].mlp
    assert twin.listed[0] is twin.listed[1]["it"] is layers[1].mlp
    assert not set(map(id, twin.modules())) & set(map(id, model.modules()))
    assert [id(p) for p in twin.parameters()] == [id(p) for p in model.parameters()]
    assert twin.config is twin.model.config is not model.config
    assert attention.forward.args == (attention,) and model.listed[0] is mlp
    assert len(find(capture_window(model, 1, 2, "verify"), "attention")) == 2
