"""Numbers that are not finite, through the real ``generate()``: in a draft they cost speed, in the target they are as plain."""

from __future__ import annotations

import pytest
import torch
from heads import options_of, reshape
from tiny import left_padded, tiny_model
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.stopping_criteria import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from spec_compile import spec_compile
from spec_compile.errors import SamplingError
from spec_compile.hf_integration.heads.eagle3 import random_eagle3_head

QUICK = {"compile": "none", "progress": False, "adaptive": False}

# ----------------------------------------------------------------------------------------------------------------------
# In a draft's distribution


def sample(model: PreTrainedModel) -> Tensor:
    torch.manual_seed(3)
    return model.generate(**left_padded(3, 8), do_sample=True, max_new_tokens=8)


@pytest.fixture(scope="module")
def undrafted() -> Tensor:
    """A sample without a draft. Where every draft is refused the target alone decides, with the same noise."""
    return sample(spec_compile(tiny_model("llama"), draft=None, **QUICK))


@torch.no_grad()
def test_a_draft_model_that_overflows_leaves_the_text_alone(undrafted: Tensor) -> None:
    draft = tiny_model("llama", seed=1, num_hidden_layers=1)
    draft.model.norm.weight.fill_(float("inf"))
    model = spec_compile(tiny_model("llama"), draft=draft, num_steps=2, **QUICK)
    assert sample(model).equal(undrafted) and model.spec.stats().accept_length == 1.0


@torch.no_grad()
def test_a_head_that_overflows_leaves_the_text_alone(undrafted: Tensor) -> None:
    model = tiny_model("llama")
    head = random_eagle3_head(model, draft_vocab_size=80)
    head.norm.weight.fill_(float("inf"))
    spec_compile(model, draft=head, num_steps=2, **QUICK)
    for shape in ("2/1/3", "2/2/4"):
        reshape(model, **options_of(shape))
        assert sample(model).equal(undrafted) and model.spec.stats().accept_length == 1.0, shape


# ----------------------------------------------------------------------------------------------------------------------
# In the target's own distribution

PROMPT = 8
LIKELIEST = {"do_sample": True, "top_k": 1, "pad_token_id": 0}  # sampled, and always the same text


class Shown(BaseStreamer):
    """Keeps the columns that a streamer is given."""

    def __init__(self) -> None:
        self.columns: list[list[int]] = []

    def put(self, value: Tensor) -> None:
        self.columns.append(value.flatten().tolist())

    def end(self) -> None:
        pass


class StopLength(StoppingCriteria):
    """Ends every row at a length; a criterion of the user's own."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


@torch.no_grad()
def without_a_distribution_behind(token: int) -> PreTrainedModel:
    """A model whose logits are NaN wherever ``token`` stands in the text."""
    model = tiny_model("llama")
    model.model.embed_tokens.weight[token] = float("nan")
    return model


@pytest.fixture(scope="module")
def text() -> Tensor:
    """What the model says behind two prompts, the second with fewer tokens."""
    return tiny_model("llama").generate(**left_padded(2, PROMPT), max_new_tokens=12, **LIKELIEST)


@pytest.mark.parametrize("draft", ["ngram", "eagle3"])
def test_probabilities_that_are_not_finite_raise_as_plain_does(draft: str, text: Tensor) -> None:
    """Both rows' tokens until there are kept and streamed, and a criterion that ends the call before ends it."""
    new = text[0, PROMPT:].tolist()
    at = next(i for i in range(3, 12) if new[i] not in [*text[0, : PROMPT + i].tolist(), *text[1].tolist()])
    stops = [StopLength(PROMPT + at + 1)]
    plain, model = without_a_distribution_behind(new[at]), without_a_distribution_behind(new[at])
    if draft == "eagle3":
        draft = random_eagle3_head(model, draft_vocab_size=80)
    spec_compile(model, draft=draft, num_steps=3, **QUICK)
    for shape in ("3/1/4", "2/2/4") if model.spec._engine.draft.kind == "eagle3" else ("",):
        if shape:
            reshape(model, **options_of(shape))
        shown = []
        for each in (plain, model):
            streamer = Shown()
            with pytest.raises(RuntimeError, match=r"inf|not finite"):
                each.generate(**left_padded(2, PROMPT), max_new_tokens=12, streamer=streamer, **LIKELIEST)
            shown.append(streamer.columns)
        assert shown[0] == shown[1] and len(shown[0]) == at + 2  # up to the token without a distribution behind it
        with pytest.raises(SamplingError, match=r"row 0 .* not finite.*partial_sequences"):
            model.generate(**left_padded(2, PROMPT), max_new_tokens=12, **LIKELIEST)
        kept = model.spec.partial_sequences()
        assert kept.shape[1] >= PROMPT + at + 1 and kept[:, : PROMPT + at + 1].equal(text[:, : PROMPT + at + 1])
        ended = model.generate(**left_padded(2, PROMPT), max_new_tokens=12, stopping_criteria=stops, **LIKELIEST)
        assert ended.equal(text[:, : PROMPT + at + 1])


def test_a_temperature_that_makes_infinities_raises_and_leaves_nothing_behind() -> None:
    model = spec_compile(tiny_model("llama"), draft="ngram", **QUICK)
    before = sample(model)
    with pytest.raises(SamplingError, match="temperature=1e-42"):
        model.generate(**left_padded(3, 8), do_sample=True, temperature=1e-42, max_new_tokens=4)
    assert model.spec.partial_sequences().equal(left_padded(3, 8)["input_ids"])
    assert sample(model).equal(before)


@torch.no_grad()
def test_greedy_text_over_nan_is_plain_transformers() -> None:
    """argmax takes the first NaN, there and here."""
    plain, model = tiny_model("llama"), tiny_model("llama")
    for each in (plain, model):
        each.lm_head.weight[50] = float("nan")
    spec_compile(model, draft="ngram", num_steps=3, **QUICK)
    settings = left_padded(2, PROMPT) | {"do_sample": False, "max_new_tokens": 6}
    assert plain.generate(**settings).equal(model.generate(**settings))


# ----------------------------------------------------------------------------------------------------------------------
# In a refused draft


@torch.no_grad()
@pytest.mark.parametrize("kind", ["causal_lm", "eagle3"])
def test_a_refused_token_that_is_no_number_is_not_felt(kind: str) -> None:
    """Token 0's embedding is NaN; the model never says it, and the draft says nothing else."""
    plain, model = tiny_model("llama"), tiny_model("llama")
    for each in (plain, model):
        each.model.embed_tokens.weight[0] = float("nan")
        each.lm_head.weight[0] = 0.0
    if kind == "causal_lm":
        draft = tiny_model("llama", seed=1, num_hidden_layers=1)
    else:
        draft = random_eagle3_head(model, draft_vocab_size=80)
        draft.draft_ids.copy_(torch.arange(80))
    draft.lm_head.weight.zero_()  # all tokens are alike, and the first is taken
    spec_compile(model, draft=draft, num_steps=3, **QUICK)
    inputs = {"input_ids": left_padded(1, PROMPT)["input_ids"], "do_sample": False, "max_new_tokens": 10}
    expected = plain.generate(**inputs)
    assert 0 not in expected[0].tolist() and len(set(expected[0, PROMPT:].tolist())) > 2
    for shape in ("3/1/4", "2/2/4") if kind == "eagle3" else ("",):
        if shape:
            reshape(model, **options_of(shape))
        assert model.generate(**inputs).equal(expected), shape
        assert model.spec.stats().mode == "rounds"
