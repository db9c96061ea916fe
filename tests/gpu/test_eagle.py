"""EAGLE rounds on a GPU: one CUDA graph holds a whole round, chain or tree, and the text stays the model's."""

from __future__ import annotations

import itertools

import pytest
import torch
from heads import fit, options_of
from near_ties import assert_equal_up_to_near_ties
from test_backend import SHAPE, explained, usable
from tiny import RECURRENT_FAMILIES, left_padded, tiny_model
from transformers import PreTrainedModel

from spec_compile import spec_compile
from spec_compile.hf_integration.heads.eagle3 import Eagle3Head, random_eagle3_head
from spec_compile.runtime.state import SamplingPlan

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

PROMPT, NEW_TOKENS = 11, 24
SHAPES = ("3/1/4", "5/4/8", "6/10/32", "7/10/60")


@pytest.fixture(autouse=True)
def _full_precision() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


def on_gpu(batch: int, length: int = PROMPT, seed: int = 1) -> dict[str, torch.Tensor]:
    return {name: value.cuda() for name, value in left_padded(batch, length, seed=seed).items()}


def with_head(family: str, dtype: torch.dtype, **sizes: object) -> tuple[PreTrainedModel, PreTrainedModel, Eagle3Head]:
    """A model, the same model again, and a head for that which was taught the first model's answers to five prompts."""
    slow = tiny_model(family, **sizes)
    taught = random_eagle3_head(slow, draft_vocab_size=80)
    inputs = left_padded(5, PROMPT, seed=1)
    texts = slow.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    rows = zip(texts, inputs["attention_mask"], strict=True)
    fit(taught, slow, [row[int((mask == 0).sum()) :] for row, mask in rows], first=NEW_TOKENS)
    reference, model = (tiny_model(family, device="cuda", **sizes).to(dtype) for _ in range(2))
    head = random_eagle3_head(model, draft_vocab_size=80)
    with torch.no_grad():
        for name, value in head.own_tensors().items():
            value.copy_(taught.own_tensors()[name])
    return reference, model, head


def check_float32(reference: PreTrainedModel, model: PreTrainedModel) -> None:
    """Equal text in buckets of 1, 4 and 8 rows, with and without an end in the middle; drafts accepted; graphs replayed."""
    seen: set[int] = set()
    for batch in (1, 3, 5):
        inputs = on_gpu(batch)
        plain = reference.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert torch.equal(plain, model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)), batch
        seen |= {length for row in model.spec.stats().accept_lengths for length in row}
        end = {"eos_token_id": int(plain[0, PROMPT + 9]), "pad_token_id": 0}
        plain = reference.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **end)
        assert torch.equal(plain, model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **end)), batch
    assert 1 in seen and max(seen) > 2, f"drafts must be accepted and refused: {sorted(seen)}"
    assert model.spec.stats().mode == "rounds" and model.spec.stats().graphs, "rounds were launched kernel by kernel"


CASES = [("llama", shape) for shape in SHAPES]
CASES += itertools.product(
    ("qwen3", "gemma3_text", "gpt_oss", "qwen3_moe", "deepseek_v3", *RECURRENT_FAMILIES), ("3/1/4", "6/10/32")
)


@pytest.mark.parametrize(("family", "shape"), CASES)
def test_float32_text_equals_plain_generate(family: str, shape: str) -> None:
    reference, model, head = with_head(family, torch.float32)
    check_float32(reference, spec_compile(model, draft=head, compile="none", adaptive=False, **options_of(shape)))


@pytest.mark.parametrize("shape", ["3/1/4", "6/10/32"])
def test_float32_text_of_compiled_segments(shape: str) -> None:
    reference, model, head = with_head("llama", torch.float32)
    check_float32(reference, spec_compile(model, draft=head, adaptive=False, **options_of(shape)))


@pytest.mark.parametrize("shape", ["3/1/4", "5/4/8"])
def test_the_text_does_not_depend_on_graphs_or_on_the_choice_of_shapes(shape: str) -> None:
    reference, model, head = with_head("llama", torch.float32)
    inputs = on_gpu(5)
    plain = reference.generate(**inputs, max_new_tokens=60, do_sample=False)
    for options in ({"cuda_graphs": False, "adaptive": False}, {"adaptive": True}):
        spec_compile(model, draft=head, compile="none", **options_of(shape), **options)
        for _ in range(3):  # the policy learns
            assert torch.equal(plain, model.generate(**inputs, max_new_tokens=60, do_sample=False)), options


@pytest.mark.parametrize("shape", ["5/1/6", "5/4/8", "6/10/32"])
@pytest.mark.parametrize("backend", ["auto", "triton", "fa4", "flashinfer"])
def test_providers(backend: str, shape: str) -> None:
    """A forced provider runs every graph of both models: prefill, verify, draft, draft_extend; text differs at near ties."""
    if backend != "auto":
        usable(backend)
    reference, model, head = with_head("llama", torch.bfloat16, **SHAPE)
    model = spec_compile(model, draft=head, backend=backend, compile="none", adaptive=False, **options_of(shape))
    lengths: list[int] = []
    for batch, length in ((5, PROMPT), (1, PROMPT), (4, 150)):  # a larger pool in the end: kernels are chosen again
        inputs = on_gpu(batch, length)
        plain = reference.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        ours = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        diverged = assert_equal_up_to_near_ties(reference, inputs, plain, ours)
        print(f"{backend} {shape}: {diverged} of {batch} rows diverged, all at near ties")
        lengths += [n for row in model.spec.stats().accept_lengths for n in row]
    assert max(lengths) > 2, "the taught answers are drafted"
    assert model.spec.stats().graphs, "rounds were launched kernel by kernel"
    found = explained(model.spec.explain())
    print(f"{backend} {shape}: {found}")
    assert set(found) == {"prefill", "verify", "draft/prefill", "draft", "draft_extend"}
    if backend != "auto":
        assert all(names == {backend} for names in found.values()), model.spec.explain()


@pytest.mark.parametrize("shape", ["3/1/4", "5/4/8", "7/10/60"])
def test_a_round_does_not_sync(shape: str) -> None:
    _, model, head = with_head("llama", torch.float32)
    model = spec_compile(model, draft=head, compile="none", adaptive=False, **options_of(shape))
    for plan, settings in (
        (SamplingPlan(), {"do_sample": False}),
        (SamplingPlan(do_sample=True), {"do_sample": True, "top_k": 0}),
    ):
        model.generate(**on_gpu(3), max_new_tokens=8, **settings)
        engine = model.spec._engine
        state = engine._buffers.rows(4)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.no_grad():
                engine.launch(state, plan, engine.shape)  # the replay
                engine._round(state, plan, engine.shape)  # and what was captured, launched kernel by kernel
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("shape", ["3/1/4", "5/4/8"])
def test_nothing_is_built_after_warm_up(shape: str) -> None:
    """Fifty rounds over changing prompts in one bucket: no capture, no program, no artifact more; then a larger bucket."""
    reference, model, head = with_head("llama", torch.float32)
    model = spec_compile(model, draft=head, adaptive=False, **options_of(shape))
    model.generate(**on_gpu(3), max_new_tokens=8, do_sample=False)
    engine = model.spec._engine

    def built() -> tuple:
        programs = engine.programs()
        return (
            set(engine.graphs.rounds),
            [set(p.built) for p in programs],
            set(engine.compiler.artifacts),
            torch._dynamo.utils.counters["stats"]["calls_captured"],
        )

    def same_text(batch: int, length: int, new: int) -> None:
        inputs = on_gpu(batch, length, seed=length)
        plain = reference.generate(**inputs, max_new_tokens=new, do_sample=False)
        assert torch.equal(plain, model.generate(**inputs, max_new_tokens=new, do_sample=False)), (batch, length)

    before, rounds = built(), 0
    for batch, length, new in ((3, 5, 30), (4, 17, 60), (3, 40, 50), (4, 80, 90)):
        same_text(batch, length, new)
        rounds += model.spec.stats().rounds
    assert rounds >= 50 and built() == before
    same_text(9, 12, 20)  # more rows than the bucket: a new pool, new graphs
    assert built() != before
    same_text(3, 12, 20)


@pytest.mark.parametrize("shape", ["3/1/4", "5/4/8"])
def test_sampling(shape: str) -> None:
    """Sampled text is decided by the seed; that of trees is the one sampled without drafts."""
    _, model, head = with_head("llama", torch.float32)
    settings = {"do_sample": True, "max_new_tokens": 30, "top_k": 20, "top_p": 0.9, "temperature": 0.5}

    def text() -> torch.Tensor:
        torch.manual_seed(3)
        return model.generate(**on_gpu(5), **settings)

    model = spec_compile(model, draft=None, compile="none")
    expected = text()
    model = spec_compile(model, draft=head, compile="none", adaptive=False, **options_of(shape))
    sampled = text()
    assert torch.equal(sampled, text()) and sampled.shape == (5, PROMPT + 30) and int(sampled.max()) < 96
    assert model.spec.stats().accept_length > 1.0 and model.spec.stats().graphs
    if model.spec._engine.shape.is_tree:
        same = (sampled == expected).all(1)
        assert int(same.sum()) >= 4, "a row may leave the text only where two probabilities round differently"


@pytest.mark.parametrize("shape", ["5/1/6", "5/4/8"])
def test_simulated_acceptance(shape: str) -> None:
    _, model, head = with_head("llama", torch.bfloat16)
    options = options_of(shape) | {"simulate_accept_length": 3.0}
    model = spec_compile(model, draft=head, compile="none", **options)
    model.generate(**on_gpu(5), max_new_tokens=200, do_sample=False)
    seen = [n for row in model.spec.stats().accept_lengths for n in row[:-1]]
    mean = sum(seen) / len(seen)
    assert model.spec.stats().simulated and "SIMULATED" in model.spec.explain()
    assert mean == pytest.approx(3.0, abs=0.05) if shape == "5/1/6" else 1.0 < mean < 3.05
