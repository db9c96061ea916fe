"""MTP rounds on a GPU: experts and latents in the head, whole rounds in CUDA graphs, and the text stays the model's."""

from __future__ import annotations

import itertools

import pytest
import torch
from heads import fit, fit_in_turn, options_of
from mtp_files import MTP_FAMILIES
from test_eagle import NEW_TOKENS, PROMPT, check_float32, on_gpu
from tiny import left_padded, tiny_model
from transformers import PreTrainedModel

from spec_compile import spec_compile
from spec_compile.config import chain
from spec_compile.hf_integration.heads.mtp import MtpHead, MtpLayers, random_mtp_head, random_mtp_layers
from spec_compile.runtime.engine import Request
from spec_compile.runtime.state import SamplingPlan

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def _full_precision() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


def with_head(family: str) -> tuple[PreTrainedModel, PreTrainedModel, MtpHead]:
    """A model, the same model again, and a head for that which was taught the first model's answers to five prompts."""
    slow = tiny_model(family)
    options = {"hidden_first": family == "qwen2", "own_lm_head": True}
    taught = random_mtp_head(slow, **options)
    inputs = left_padded(5, PROMPT, seed=1)
    texts = slow.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    rows = zip(texts, inputs["attention_mask"], strict=True)
    fit(taught, slow, [row[int((mask == 0).sum()) :] for row, mask in rows], first=NEW_TOKENS)
    reference, model = (tiny_model(family, device="cuda") for _ in range(2))
    head = random_mtp_head(model, **options)
    with torch.no_grad():
        for name, value in head.own_tensors().items():
            value.copy_(taught.own_tensors()[name])
    return reference, model, head


@pytest.mark.parametrize(("family", "shape"), itertools.product(MTP_FAMILIES, ("3/1/4", "3/2/6")))
def test_float32_text_equals_plain_generate(family: str, shape: str) -> None:
    reference, model, head = with_head(family)
    check_float32(reference, spec_compile(model, draft=head, compile="none", adaptive=False, **options_of(shape)))


@pytest.mark.parametrize(
    ("family", "compile"), [("deepseek_v3", "none"), ("glm4_moe", "inductor"), ("qwen3_5_moe_text", "none")]
)
def test_simulated_rounds_in_bfloat16(family: str, compile: str) -> None:
    """Grouped GEMMs over the experts of both models. In this precision a router may choose differently in a wider window, so
    texts are not compared."""
    model = tiny_model(family, device="cuda").to(torch.bfloat16)
    head = random_mtp_head(model)
    model = spec_compile(model, draft=head, compile=compile, simulate_accept_length=3.0, num_steps=5)
    text = model.generate(**on_gpu(5), max_new_tokens=200, do_sample=False)
    seen = [n for row in model.spec.stats().accept_lengths for n in row[:-1]]
    assert model.spec.stats().mode == "rounds" and model.spec.stats().graphs, "rounds were launched kernel by kernel"
    assert sum(seen) / len(seen) == pytest.approx(3.0, abs=0.05)
    assert text.shape == (5, PROMPT + 200) and int(text.min()) >= 0 and int(text.max()) < 96


def with_layers(family: str) -> tuple[PreTrainedModel, PreTrainedModel, MtpLayers]:
    """As ``with_head``, with three heads that draft in turn."""
    slow = tiny_model(family)
    taught = random_mtp_layers(slow, 3, own_lm_head=True)
    inputs = left_padded(5, PROMPT, seed=1)
    texts = slow.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    rows = zip(texts, inputs["attention_mask"], strict=True)
    fit_in_turn(taught, slow, [row[int((mask == 0).sum()) :] for row, mask in rows], first=NEW_TOKENS)
    reference, model = (tiny_model(family, device="cuda") for _ in range(2))
    layers = random_mtp_layers(model, 3, own_lm_head=True)
    with torch.no_grad():
        for head, other in zip(layers.heads, taught.heads, strict=True):
            for name, value in head.own_tensors().items():
                value.copy_(other.own_tensors()[name])
    return reference, model, layers


@pytest.mark.parametrize(
    ("family", "compile"), [("deepseek_v3", "none"), ("glm4_moe", "none"), ("qwen2", "inductor"), ("qwen3_5_text", "none")]
)
def test_float32_text_of_layers_in_turn(family: str, compile: str) -> None:
    reference, model, layers = with_layers(family)
    check_float32(reference, spec_compile(model, draft=layers, compile=compile, adaptive=False))


@torch.no_grad()
def test_layers_in_turn_catch_up_with_plain_rounds() -> None:
    """Graphs of every shape, replayed by turns: one text, and behind plain rounds drafts are as good as without them."""
    _, model, layers = with_layers("qwen2")
    engine = spec_compile(model, draft=layers, compile="none").spec._engine
    inputs, plan = left_padded(5, PROMPT, seed=1), SamplingPlan()
    masks = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    prompts = [ids[mask == 1] for ids, mask in masks]
    request = Request(prompts, [len(p) + NEW_TOKENS for p in prompts], [0] * 5, [], list(range(5)), plan)
    texts, accepted = [], []
    for shapes in ([chain(0)], [chain(3)], [chain(0), chain(0), chain(3)], [chain(2), chain(0), chain(3)]):
        with engine.on_device():
            state, step, counts = engine.admit(request), 0, []
            while not bool(state.finished[:5].all()):
                shape = shapes[step % len(shapes)]
                engine.launch(state, plan, shape)
                counts += state.out[:5, -3].tolist() if shape == chain(3) else []
                step += 1
        texts.append([state.tokens[row, :end].tolist() for row, end in enumerate(request.end_len)])
        accepted.append(sum(counts) / max(1, sum(n > 0 for n in counts)))
    assert texts[0] == texts[1] == texts[2] == texts[3]
    assert accepted[1] > 1.5 and min(accepted[2:]) > 0.7 * accepted[1], accepted
