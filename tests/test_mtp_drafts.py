"""What MTP heads draft is what the module drafts when it runs by itself, and sampled text keeps the target's distribution."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from heads import options_of, reshape
from mtp_files import published, write_checkpoint
from mtp_reference import Module
from test_generate_sampling import SETTINGS, V, distance, distribution, noise_level
from tiny import left_padded, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from spec_compile import spec_compile
from spec_compile.drafts.eagle import EagleDraft
from spec_compile.hf_integration.heads.mtp import random_mtp_head
from spec_compile.runtime.draft import Proposal


@torch.no_grad()
def module_drafts(module: Module, target: PreTrainedModel, text: Tensor, count: int, flip: str = "") -> list[int]:
    """Greedy drafts behind ``text`` [L] by the plain module over transformers' states.

    Args:
        flip: a convention turned round, as a control.
    """
    kept: list[Tensor] = []
    handle = target.model.norm.register_forward_hook(lambda _, args, out: kept.append(args[0] if flip == "state" else out))
    target(text[None, :-1])
    handle.remove()
    ids, drafts = text[:-1] if flip == "ids" else text[1:], []
    for _ in range(count):
        logits = module.chain(torch.cat([ids, torch.tensor(drafts, dtype=torch.int64)]), kept[0][0], len(drafts))[-1]
        drafts.append(int(logits[-1].argmax()))
    return drafts


def test_drafts_are_those_of_the_module_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``draft="mtp"`` from the checkpoint; which state is tapped and which id stands beside it shows in every window."""
    target = tiny_model("qwen2")
    target.model.norm.weight.data.uniform_(-2.0, 2.0)  # all ones would not show which side of it is read: hnorm follows
    tensors = published("qwen2", target)
    model = write_checkpoint(tmp_path, target, tensors)
    embedding, lm_head = (m.weight.detach() for m in (target.get_input_embeddings(), target.get_output_embeddings()))
    module = Module(tensors, target.config, embedding, lm_head)
    propose, seen = EagleDraft.propose, []

    def recorded(self, state, *args) -> Proposal:
        made = propose(self, state, *args)
        for row in (~state.finished).nonzero().flatten().tolist():
            seen.append((state.tokens[row, : int(state.cache_len[row]) + 1].clone(), made.window[row, 1:].tolist()))
        return made

    monkeypatch.setattr(EagleDraft, "propose", recorded)
    spec_compile(model, draft="mtp", num_steps=3, compile="none", adaptive=False)
    inputs = left_padded(3, 9)
    ours = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    assert torch.equal(ours, target.generate(**inputs, max_new_tokens=10, do_sample=False))
    assert len(seen) >= 15
    for text, drafts in seen:
        assert drafts == module_drafts(module, target, text, 3)
    for flip in ("state", "ids"):
        same = [drafts == module_drafts(module, target, text, 3, flip) for text, drafts in seen]
        assert sum(same) < len(seen) / 2, flip


def test_sampled_text_follows_the_models_distribution() -> None:
    """Chains are judged by the head's whole q, trees by the target's own sample."""

    def toy() -> PreTrainedModel:
        return tiny_model("glm4_moe", vocab_size=V, num_hidden_layers=1, pad_token_id=None)

    target = toy()
    head = random_mtp_head(target, seed=3, own_lm_head=True)
    with torch.no_grad():
        head.lm_head.weight *= 0.5  # opinions, not certainties: drafts are accepted and refused
    model = spec_compile(target, draft=head, num_steps=2, compile="none", adaptive=False)
    settings, warpers = SETTINGS["top-p"]
    expected = distribution(toy(), warpers)
    for shape, samples in (("2/1/3", 1500), ("2/2/4", 1000)):
        reshape(model, **options_of(shape))
        assert distance(model, expected, samples, settings) < 1.5 * noise_level(expected, samples), (shape, samples)
        assert 1.0 < model.spec.stats().accept_length < 3.0, "drafts must be accepted and rejected for this to mean anything"
