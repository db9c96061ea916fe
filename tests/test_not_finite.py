"""Numbers that are not finite, through the real ``generate()``: in a draft they cost speed, never the text."""

from __future__ import annotations

import pytest
import torch
from heads import options_of, reshape
from tiny import left_padded, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from spec_compile import spec_compile
from spec_compile.hf_integration.eagle3 import random_eagle3_head

QUICK = {"compile": "none", "progress": False, "adaptive": False}

# ----------------------------------------------------------------------------------------------------------------------
# In a draft's law


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
