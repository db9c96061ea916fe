"""Sampling through the real ``generate()`` keeps the target's distribution: Monte Carlo against the model's own
probabilities."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny import left_padded, tiny_model
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from spec_compile import spec_compile
from spec_compile.drafts.causal_lm import CausalLMDraft
from spec_compile.runtime.draft import Proposal

V = 8
# Token 5 just stood behind "3 4": the n-gram draft proposes it, and more of the prompt behind it.
PROMPT = torch.tensor([[3, 4, 5, 6, 7, 3, 4]])
SETTINGS = {
    "plain": ({"top_k": 0}, []),
    "top-k": ({"temperature": 1.5, "top_k": 4}, [TemperatureLogitsWarper(1.5), TopKLogitsWarper(4)]),
    "top-p": ({"temperature": 0.8, "top_k": 6, "top_p": 0.9},
              [TemperatureLogitsWarper(0.8), TopKLogitsWarper(6), TopPLogitsWarper(0.9)]),
    "min-p": ({"top_k": 0, "min_p": 0.2}, [MinPLogitsWarper(0.2)]),
}  # fmt: skip


def target(seed: int = 0) -> PreTrainedModel:
    return tiny_model("llama", seed=seed, vocab_size=V, num_hidden_layers=1, pad_token_id=None, bos_token_id=1, eos_token_id=2)


@torch.no_grad()
def distribution(model: PreTrainedModel, warpers: list) -> Tensor:
    """Probability of every pair of next tokens under transformers' own warpers: [V * V]."""
    processors = LogitsProcessorList(warpers)

    def following(ids: Tensor) -> Tensor:
        return processors(ids, model(ids).logits[:, -1].clone()).softmax(-1)

    first = following(PROMPT)[0]  # [V]
    second = following(torch.cat([PROMPT.expand(V, -1), torch.arange(V)[:, None]], 1))  # [V, V]
    return (first[:, None] * second).flatten()


def distance(model: PreTrainedModel, expected: Tensor, samples: int, settings: dict) -> float:
    """Total variation between ``samples`` sampled pairs and ``expected``. Three tokens are made, so that windows matter."""
    assert samples % 500 == 0, "noise_level() is of as many as are drawn"
    counts = torch.zeros(V * V)
    for _ in range(samples // 500):
        out = model.generate(PROMPT, do_sample=True, max_new_tokens=3, num_return_sequences=500, **settings)
        new = out[:, PROMPT.shape[1] :]
        counts += torch.bincount(new[:, 0] * V + new[:, 1], minlength=V * V)
    return 0.5 * float((counts / counts.sum() - expected).abs().sum())


def noise_level(expected: Tensor, samples: int) -> float:
    """Expected total variation of that many exact samples: half the sum of mean absolute binomial deviations."""
    return float((expected * (1 - expected) / samples * 2 / torch.pi).sqrt().sum() / 2)


def compiled(draft: str) -> PreTrainedModel:
    source = "ngram" if draft == "ngram" else target(seed=1)
    return spec_compile(target(), draft=source, num_steps=2, min_ngram=1, adaptive=False, compile="none")


@pytest.mark.parametrize(("draft", "name"), [*itertools.product(["ngram", "causal_lm"], ["plain", "top-p"]),
                                             ("causal_lm", "top-k"), ("ngram", "min-p")])  # fmt: skip
def test_sampled_text_follows_the_models_distribution(draft: str, name: str) -> None:
    """The distance is sampling noise at every size, so it shrinks as 1/sqrt(N)."""
    settings, warpers = SETTINGS[name]
    model = compiled(draft)
    expected = distribution(target(), warpers)
    for samples in (500, 1500, 4500):
        assert distance(model, expected, samples, settings) < 1.5 * noise_level(expected, samples), samples
    assert 1.0 < model.spec.stats().accept_length < 3.0, "drafts must be accepted and rejected for this to mean anything"


def test_blocks_of_a_causal_lm_follow_the_distribution_too() -> None:
    settings, warpers = SETTINGS["plain"]
    model = spec_compile(target(), draft=target(seed=1), num_steps=2, compile="none", verification="block")
    expected = distribution(target(), warpers)
    for samples in (500, 2000):
        assert distance(model, expected, samples, settings) < 1.5 * noise_level(expected, samples), samples
    assert 1.0 < model.spec.stats().accept_length < 3.0


def test_a_wrong_q_is_found(monkeypatch) -> None:
    """A draft that picks its favourite but declares all its probabilities as q breaks the distribution, and the check sees
    it."""
    honest = CausalLMDraft.propose

    def wrong(self, *args) -> Proposal:
        proposal = honest(self, *args)
        return Proposal(torch.cat([proposal.window[:, :1], proposal.probs.argmax(-1)], 1), proposal.probs)

    monkeypatch.setattr(CausalLMDraft, "propose", wrong)
    settings, warpers = SETTINGS["plain"]
    expected = distribution(target(), warpers)
    assert distance(compiled("causal_lm"), expected, 1500, settings) > 2.5 * noise_level(expected, 1500)


def test_seeds() -> None:
    """``torch.manual_seed`` decides the text, and a row's text does not depend on the rows beside it."""
    model = compiled("causal_lm")

    def text(rows: int) -> Tensor:
        torch.manual_seed(7)
        return model.generate(PROMPT.expand(rows, -1), do_sample=True, max_new_tokens=12)

    assert torch.equal(text(3), text(3))
    assert torch.equal(text(3)[:1], text(1))
    assert len({tuple(row) for row in text(3).tolist()}) > 1


def test_looked_up_drafts_do_not_change_a_sampled_text() -> None:
    """The noise belongs to row and position, and a looked-up draft stands only where it is the target's own sample: the text
    is the one sampled without drafts, whatever prompts stand beside it and whatever the policy decides about drafting."""
    prompts = left_padded(3, 11, vocab_size=V)
    settings = {"do_sample": True, "max_new_tokens": 40, "temperature": 0.7}

    def text(draft: str | None, rows: int, **options) -> Tensor:
        torch.manual_seed(11)
        model = spec_compile(target(), draft=draft, compile="none", **options)
        out = model.generate(**{name: x[:rows] for name, x in prompts.items()}, **settings)
        if draft:
            assert model.spec.stats().accept_length > 1.0, "drafts must be accepted for this to mean anything"
        return out

    expected = text(None, 3)
    assert torch.equal(text("ngram", 3, num_steps=4, min_ngram=1, adaptive=False), expected)
    assert torch.equal(text("ngram", 3, num_steps=2, min_ngram=1), expected)
    assert torch.equal(text("ngram", 1, num_steps=4, min_ngram=1), expected[:1])
