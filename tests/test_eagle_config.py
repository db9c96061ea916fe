"""Options of EAGLE rounds: combinations that cannot be, heads of another target, and acceptance by decree."""

from __future__ import annotations

import pytest
import torch
from heads import options_of, reshape
from tiny import left_padded, tiny_model
from transformers import PreTrainedModel

from spec_compile import SpecConfig, spec_compile
from spec_compile.errors import ConfigError, DraftError
from spec_compile.hf_integration.heads.eagle3 import Eagle3Head, random_eagle3_head


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ({}, "5/1/6"),
        ({"num_steps": 3, "topk": 1, "num_draft_tokens": 4}, "3/1/4"),
        ({"num_steps": 5, "topk": 4}, "5/4/32"),
        ({"num_steps": 2, "topk": 3}, "2/3/13"),
        ({"num_steps": 5, "topk": 8, "num_draft_tokens": 64}, "5/8/64"),
        ({"num_steps": 7, "topk": 10, "num_draft_tokens": 60}, "7/10/60"),
        ({"num_steps": 1, "topk": 4, "num_draft_tokens": 5}, "1/4/5"),
    ],
)
def test_what_the_three_numbers_mean(shape: dict[str, int], expected: str) -> None:
    assert str(SpecConfig(**shape).round_shape(5)) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topk": 0}, "topk=0: 1 drafts a chain"),
        ({"topk": 17}, "topk=17: 1 drafts a chain, 2 to 16 a tree"),
        ({"num_draft_tokens": 1}, "num_draft_tokens=1: verify 2 to 64 tokens"),
        ({"num_draft_tokens": 65}, "num_draft_tokens=65: verify 2 to 64 tokens"),
        ({"num_steps": 64}, "num_steps=64: draft 1 to 63"),
        ({"num_steps": 3, "num_draft_tokens": 8}, "num_draft_tokens=8 with topk=1: a chain of num_steps=3 verifies 4 tokens"),
        (
            {"num_steps": 2, "topk": 2, "num_draft_tokens": 8},
            "num_draft_tokens=8: with num_steps=2 and topk=2 .* 3 to 7 tokens",
        ),
        (
            {"num_steps": 5, "topk": 4, "num_draft_tokens": 5},
            "num_draft_tokens=5: with num_steps=5 and topk=4 .* 6 to 69 tokens",
        ),
        ({"num_steps": 14, "topk": 10}, "num_steps=14, topk=10: a draft tree holds at most 128 nodes"),
        ({"num_steps": 3, "simulate_accept_length": 4.5}, "simulate_accept_length=4.5: a round of num_steps=3 emits at most 4"),
        ({"simulate_accept_length": 0.5}, "simulate_accept_length=0.5: at least 1"),
        ({"simulate_accept_rates": (0.5, 1.2)}, "simulate_accept_rates=.*: probabilities from 0 to 1"),
        ({"simulate_accept_rates": (0.5,), "simulate_accept_length": 2}, "give one of them"),
        ({"simulate_accept_rates": ()}, r"simulate_accept_rates=\(\): give a rate for each draft position"),
        ({"num_steps": 2, "simulate_accept_rates": (0.9, 0.5, 0.5)}, "num_steps=2 has 2 draft positions; give at most 2 rates"),
        ({"simulate_accept_rates": (0.5,) * 6}, "num_steps=5 has 5 draft positions"),
        ({"simulate_accept_length": float("nan")}, "simulate_accept_length=nan: at least 1"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_compiled(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SpecConfig(**options).round_shape(5)


@pytest.mark.parametrize("option", [{"simulate_accept_length": 2.0}, {"simulate_accept_rates": (0.5,)}])
def test_acceptance_without_drafts_cannot_be_simulated(option: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="need drafts to accept, and draft=None drafts nothing"):
        spec_compile(tiny_model("llama"), draft=None, compile="none", **option)


@pytest.mark.parametrize("draft", ["ngram", "causal LM"])
def test_trees_need_a_head(draft: str) -> None:
    source = tiny_model("llama", seed=1) if draft == "causal LM" else draft
    with pytest.raises(DraftError, match=rf"topk=4: .*{draft} drafts chains only; leave topk out"):
        spec_compile(tiny_model("llama"), draft=source, topk=4, compile="none")


def head_for(**overrides: object) -> Eagle3Head:
    return random_eagle3_head(tiny_model("llama", **overrides), draft_vocab_size=12)


def test_a_tree_wider_than_the_draft_vocabulary() -> None:
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="topk=16: the draft head has a vocabulary of 12"):
        spec_compile(model, draft=random_eagle3_head(model, draft_vocab_size=12), topk=16, num_steps=2, compile="none")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: head_for(num_hidden_layers=8), r"reads the target's hidden states \[2, 4, 5\], but the target has 2 layers"),
        (lambda: head_for(hidden_size=128), "is 128 wide .*the target's are 64 wide"),
        (lambda: head_for(vocab_size=4096), "maps to target ids .* the target's vocabulary has 96"),
        (lambda: random_eagle3_head(tiny_model("llama", vocab_size=128)), "vocabulary has 128 tokens, the target's 96"),
        (lambda: random_eagle3_head(tiny_model("llama").bfloat16()), "192 features in torch.bfloat16.* in torch.float32"),
        (lambda: random_eagle3_head(tiny_model("llama", device="meta"), own_embedding=True), "the draft is on meta"),
    ],
    ids=["layers", "width", "draft vocabulary", "vocabulary", "dtype", "device"],
)
def test_a_head_of_another_target(make, message: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(DraftError, match=message):
        spec_compile(model, draft=make(), compile="none")
    assert not hasattr(model, "spec")


# ----------------------------------------------------------------------------------------------------------------------
# Acceptance by decree


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    made = tiny_model("llama")
    return spec_compile(made, draft=random_eagle3_head(made, draft_vocab_size=40), num_steps=3, compile="none")


def lengths(model: PreTrainedModel, shape: str, **options: object) -> list[int]:
    """Accept lengths of some hundred rounds; a row's last one may be cut."""
    reshape(model, **options_of(shape), adaptive=False, **{"simulate_accept_length": None, **options})
    model.generate(**left_padded(5, 11), max_new_tokens=200, do_sample=False)
    stats = model.spec.stats()
    assert stats.simulated and "SIMULATED acceptance" in model.spec.explain()
    return [length for row in stats.accept_lengths for length in row[:-1]]


@pytest.mark.parametrize("mean", [1.0, 2.4, 4.0])
def test_chains_have_the_mean_that_was_asked_for(model: PreTrainedModel, mean: float) -> None:
    seen = lengths(model, "3/1/4", simulate_accept_length=mean)
    assert sum(seen) / len(seen) == pytest.approx(mean, abs=0.1)
    assert max(seen) - min(seen) <= 1, "the mean with the least variance"


def test_trees_have_at_most_the_mean_that_was_asked_for(model: PreTrainedModel) -> None:
    """Paths end where the tree does."""
    seen = lengths(model, "5/4/8", simulate_accept_length=3.4)
    assert 1.5 < sum(seen) / len(seen) < 3.5 and max(seen) <= 4


def test_rates_by_position(model: PreTrainedModel) -> None:
    """Each rate is that of a draft before which all stood."""
    seen = torch.tensor(lengths(model, "3/1/4", simulate_accept_rates=(0.8, 0.5, 0.25)))
    for position, rate in enumerate((0.8, 0.5, 0.25)):
        reached = seen[seen > position]
        assert float((reached > position + 1).float().mean()) == pytest.approx(rate, abs=4 * 0.5 / len(reached) ** 0.5)


def test_rates_end_where_they_are_not_given(model: PreTrainedModel) -> None:
    assert max(lengths(model, "3/1/4", simulate_accept_rates=(1.0,))) == 2


def test_lockstep_accepts_for_real_and_says_so(model: PreTrainedModel) -> None:
    """Its text is the model's own although rounds would simulate."""
    reshape(model, **options_of("3/1/4"), adaptive=False, simulate_accept_length=4.0, simulate_accept_rates=None)
    inputs, settings = left_padded(2, 11), {"max_new_tokens": 10, "do_sample": False, "repetition_penalty": 1.2}
    with pytest.warns(UserWarning, match="accepts drafts for real: nothing is SIMULATED"):
        ours = model.generate(**inputs, **settings)
    stats = model.spec.stats()
    assert stats.mode == "lockstep" and not stats.simulated and "SIMULATED" not in str(stats)
    assert torch.equal(ours, tiny_model("llama").generate(**inputs, **settings))
