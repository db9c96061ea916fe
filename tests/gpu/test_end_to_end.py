"""On a GPU: real kernels, CUDA graphs, the same text."""

from __future__ import annotations

import pytest
import torch
from near_ties import assert_equal_up_to_near_ties
from tiny import FAMILIES, RECURRENT_FAMILIES, left_padded, tiny_model

from spec_compile import spec_compile
from spec_compile.runtime.state import SamplingPlan

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def on_gpu(inputs: dict) -> dict:
    return {name: value.cuda() for name, value in inputs.items()}


def moved(model: torch.nn.Module, amount: float) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += amount * torch.randn_like(parameter)
    return model


@pytest.fixture(autouse=True)
def _full_precision() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("family", [*FAMILIES, *RECURRENT_FAMILIES])
def test_float32_text_equals_plain_generate(family: str) -> None:
    reference = tiny_model(family, device="cuda")
    model = spec_compile(tiny_model(family, device="cuda"), min_ngram=1, num_steps=5, compile="none")
    for batch in (1, 3, 5):
        inputs = on_gpu(left_padded(batch, 11, seed=batch))
        plain = reference.generate(**inputs, max_new_tokens=24, do_sample=False)
        assert torch.equal(plain, model.generate(**inputs, max_new_tokens=24, do_sample=False)), batch
        end = int(plain[0, 20])
        plain = reference.generate(**inputs, max_new_tokens=24, do_sample=False, eos_token_id=end)
        assert torch.equal(plain, model.generate(**inputs, max_new_tokens=24, do_sample=False, eos_token_id=end)), batch
    graphs = [name for name, _ in model.spec.stats().graphs]
    assert graphs == ["8 rows × 1 tokens (0/1/1)", "8 rows × 6 tokens (5/1/6)"], "a grown pool voids older graphs"
    assert "triton" in {c.provider for choices in model.spec._engine.target.programs.choices.values() for c in choices}


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_experts_of_a_long_prompt(family: str) -> None:
    """bfloat16 experts sort their tokens, compiled for every length: more of them than a kernel of the first length holds."""
    reference = tiny_model(family, device="cuda").bfloat16()
    model = spec_compile(tiny_model(family, device="cuda").bfloat16(), min_ngram=1, num_steps=3)
    for batch, length in ((1, 11), (5, 70), (3, 200)):
        inputs = on_gpu(left_padded(batch, length, seed=batch))
        plain = reference.generate(**inputs, max_new_tokens=12, do_sample=False)
        ours = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        assert_equal_up_to_near_ties(reference, inputs, plain, ours)


@pytest.mark.parametrize("family", ["qwen3_5_text", "gemma3_text"])
def test_compiled_prompts_and_rounds_of_layers_that_are_not_alike(family: str) -> None:
    """Inductor's segments of two kinds of layers, for prompts of every length and for windows."""
    reference = tiny_model(family, device="cuda")
    model = spec_compile(tiny_model(family, device="cuda"), min_ngram=1, num_steps=3)
    for batch, length in ((1, 11), (3, 40)):
        inputs = on_gpu(left_padded(batch, length, seed=batch))
        plain = reference.generate(**inputs, max_new_tokens=24, do_sample=False)
        assert torch.equal(plain, model.generate(**inputs, max_new_tokens=24, do_sample=False)), batch


def test_compiled_with_a_draft_model() -> None:
    """Inductor's segments, a causal-LM draft, greedy and sampled; 50 rounds and changing lengths capture nothing new."""
    reference = tiny_model("llama", device="cuda")
    draft = moved(tiny_model("llama", device="cuda"), 0.01)
    model = spec_compile(tiny_model("llama", device="cuda"), draft=draft, num_steps=3)
    first = on_gpu(left_padded(3, 11))
    model.generate(**first, max_new_tokens=8, do_sample=False)
    engine = model.spec._engine
    programs = [dict(p.built) for p in engine.programs()], dict(engine.compiler.artifacts)
    graphs = set(engine.graphs.rounds)
    counted = torch._dynamo.utils.counters["stats"]["calls_captured"]
    rounds = 0
    for length, new in ((5, 30), (17, 60), (40, 50), (80, 90)):
        inputs = on_gpu(left_padded(3 if length % 2 else 4, length, seed=length))
        plain = reference.generate(**inputs, max_new_tokens=new, do_sample=False)
        assert torch.equal(plain, model.generate(**inputs, max_new_tokens=new, do_sample=False))
        rounds += model.spec.stats().rounds
        assert model.spec.stats().accept_length > 1
    assert rounds >= 50
    assert set(engine.graphs.rounds) == graphs and torch._dynamo.utils.counters["stats"]["calls_captured"] == counted
    assert programs == ([p.built for p in engine.programs()], engine.compiler.artifacts)
    sampled = model.generate(**first, max_new_tokens=20, do_sample=True, top_k=20, top_p=0.9, temperature=0.8)
    assert sampled.shape == (3, 31) and int(sampled.max()) < 96
    assert all(nbytes < 2**30 for _, nbytes in model.spec.stats().graphs)


def test_a_round_does_not_sync() -> None:
    draft = tiny_model("llama", seed=1, device="cuda")
    for source in ("ngram", draft):
        model = spec_compile(tiny_model("llama", device="cuda"), draft=source, compile="none", num_steps=3)
        inputs = on_gpu(left_padded(3, 11))
        model.generate(**inputs, max_new_tokens=8, do_sample=False)
        engine = model.spec._engine
        state = engine._buffers.rows(4)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            engine.launch(state, SamplingPlan(), engine.shape)  # the replay
            engine._round(state, SamplingPlan(), engine.shape)  # and what was captured, launched kernel by kernel
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_default_device_changes_nothing() -> None:
    """The host's own buffers stay on the host, pinned ones above all."""
    model = spec_compile(tiny_model("llama", device="cuda"), min_ngram=1, num_steps=3, compile="none")
    inputs = on_gpu(left_padded(2, 11))
    expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    with torch.device("cuda"):
        got = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert torch.equal(got, expected) and model.spec.stats().mode == "rounds"


def test_padding_rows_are_harmless() -> None:
    """Three rows in a bucket of four give what each gives alone."""
    model = spec_compile(tiny_model("llama", device="cuda"), min_ngram=1, compile="none")
    ids = torch.randint(3, 96, (3, 9), device="cuda")
    together = model.generate(ids, max_new_tokens=30, do_sample=False)
    for row in range(3):
        assert torch.equal(together[row : row + 1], model.generate(ids[row : row + 1], max_new_tokens=30, do_sample=False))


def test_bfloat16_differs_only_at_near_ties() -> None:
    """A wider GEMM may round differently; text may change only where the two best logits are closer than that."""
    reference = tiny_model("llama", device="cuda").bfloat16()
    model = spec_compile(tiny_model("llama", device="cuda").bfloat16(), min_ngram=1)
    inputs = on_gpu(left_padded(8, 11))
    plain = reference.generate(**inputs, max_new_tokens=40, do_sample=False)
    ours = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    diverged = assert_equal_up_to_near_ties(reference, inputs, plain, ours)
    print(f"{diverged} of 8 rows diverged, all at near ties")
