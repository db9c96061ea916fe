"""Sampling with an EAGLE head keeps the target's distribution: chains with the head's whole q, trees whose text no draft can
change."""

from __future__ import annotations

import pytest
import torch
from heads import options_of, reshape
from test_generate_sampling import PROMPT, SETTINGS, V, distance, distribution, noise_level, target
from tiny import left_padded
from torch import Tensor
from transformers import PreTrainedModel, TopKLogitsWarper

from spec_compile import spec_compile
from spec_compile.drafts.eagle import EagleDraft
from spec_compile.hf_integration.heads.eagle3 import random_eagle3_head
from spec_compile.runtime.draft import Proposal

# Six of the target's eight tokens, in another order of ids than of the head's: a q that is not scattered shows.
DRAFT_IDS = torch.tensor([0, 2, 3, 4, 6, 7])


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """The target of the other sampling tests, with a random head over a smaller vocabulary."""
    made = target()
    head = random_eagle3_head(made, draft_ids=DRAFT_IDS, seed=3)
    with torch.no_grad():
        head.lm_head.weight *= 0.5  # opinions, not certainties: drafts are accepted and refused
    return spec_compile(made, draft=head, num_steps=2, compile="none", adaptive=False)


@pytest.mark.parametrize("shape", ["2/1/3", "2/3/6"])
@pytest.mark.parametrize("name", SETTINGS)
def test_sampled_text_follows_the_models_distribution(model: PreTrainedModel, shape: str, name: str) -> None:
    """The distance is sampling noise at every size, so it shrinks as 1/sqrt(N). One setting has a top-k as large as the
    draft vocabulary."""
    settings, warpers = SETTINGS[name]
    reshape(model, **options_of(shape))
    expected = distribution(target(), warpers)
    for samples in (500, 2000):
        assert distance(model, expected, samples, settings) < 1.5 * noise_level(expected, samples), samples
    assert 1.0 < model.spec.stats().accept_length < 3.0, "drafts must be accepted and rejected for this to mean anything"


def test_block_verification_keeps_the_distribution_and_more_drafts(model: PreTrainedModel) -> None:
    """The same head judged both ways; a block keeps at least as many on average."""
    settings, warpers = SETTINGS["plain"]
    expected, kept = distribution(target(), warpers), {}
    for verification in ("token", "block"):
        reshape(model, **options_of("2/1/3"), verification=verification)
        assert distance(model, expected, 2500, settings) < 1.5 * noise_level(expected, 2500), verification
        kept[verification] = model.spec.stats().accept_length  # of the last 500 rows
    assert kept["block"] > kept["token"] - 0.1, kept


def test_top_k_beyond_the_draft_vocabulary(model: PreTrainedModel) -> None:
    """The head has six tokens; a top-k of seven keeps all of its and cuts one of the target's."""
    expected = distribution(target(), [TopKLogitsWarper(7)])
    reshape(model, **options_of("2/1/3"))
    assert distance(model, expected, 2000, {"top_k": 7}) < 1.5 * noise_level(expected, 2000)


@pytest.mark.parametrize("fault", ["favourites declared as draws", "another vocabulary's q"])
def test_a_wrong_q_is_found(model: PreTrainedModel, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts that were not drawn from the q they come with break the distribution, and the check sees it."""
    honest = EagleDraft.propose

    def wrong(self, *args) -> Proposal:
        made = honest(self, *args)
        if fault == "another vocabulary's q":  # as if the draft ids had never been scattered
            return Proposal(made.window, torch.cat([made.probs[..., DRAFT_IDS], torch.zeros_like(made.probs[..., :2])], -1))
        return Proposal(torch.cat([made.window[:, :1], made.probs.argmax(-1)], 1), made.probs)

    reshape(model, **options_of("2/1/3"))
    monkeypatch.setattr(EagleDraft, "propose", wrong)
    settings, warpers = SETTINGS["plain"]
    expected = distribution(target(), warpers)
    assert distance(model, expected, 1500, settings) > 2.5 * noise_level(expected, 1500)


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.7}, {"top_k": 3}, {"top_k": 5, "top_p": 0.8, "temperature": 1.3}, {"top_k": 0, "min_p": 0.15}],
    ids=lambda settings: ", ".join(settings),
)
def test_trees_do_not_change_a_sampled_text(model: PreTrainedModel, settings: dict[str, float]) -> None:
    """The noise belongs to row and position, and a node stands only where it is the target's own sample: the text is the one
    sampled without drafts, whatever the trees look like."""
    prompts = left_padded(3, 9, vocab_size=V)

    def text(compiled: PreTrainedModel) -> Tensor:
        torch.manual_seed(11)
        return compiled.generate(**prompts, do_sample=True, max_new_tokens=30, **settings)

    expected = text(spec_compile(target(), draft=None, compile="none"))
    for shape in ("2/3/6", "4/3/12"):
        reshape(model, **options_of(shape))
        assert torch.equal(text(model), expected)
        assert 1.0 < model.spec.stats().accept_length < 5.0


def test_seeds(model: PreTrainedModel) -> None:
    """``torch.manual_seed`` decides the text of a chain, and a row's text does not depend on the rows beside it."""
    reshape(model, **options_of("2/1/3"))

    def text(rows: int) -> Tensor:
        torch.manual_seed(7)
        return model.generate(PROMPT.expand(rows, -1), do_sample=True, max_new_tokens=12)

    assert torch.equal(text(3), text(3))
    assert torch.equal(text(3)[:1], text(1))
    assert len({tuple(row) for row in text(3).tolist()}) > 1
