"""EAGLE rounds through ``generate()``: greedy text equals plain transformers token for token in float32, as chains and as
trees, whether the head is never right or often."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from heads import fit, options_of, reshape
from tiny import ids_inside_windows, left_padded, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from spec_compile import spec_compile
from spec_compile.hf_integration.heads.draft_head import DraftHead
from spec_compile.hf_integration.heads.eagle3 import random_eagle3_head

NEW_TOKENS, PROMPT = 24, 11  # text crosses the sliding windows of 16
SHAPES = ("3/1/4", "5/4/8", "6/10/32", "7/10/60")
BATCHES = (1, 3, 5)
# Soft-capping, latent attention and windows far behind are in test_windows.py.
FAMILIES = ("llama", "qwen3", "gemma3_text", "gpt_oss", "qwen3_moe")


@dataclasses.dataclass
class Pair:
    """A family's model as transformers makes it, and compiled with a head.

    Attributes:
        cases: (shape, batch) of the family's rounds; the batches go round, so that every shape meets every batch.
        texts: plain greedy texts of five rows, int64 [5, PROMPT + NEW_TOKENS].
    """

    reference: PreTrainedModel
    model: PreTrainedModel
    head: DraftHead
    inputs: dict[str, Tensor]
    texts: Tensor
    cases: list[tuple[str, int]]

    def check(self, shape: str, batch: int, **settings: object) -> Tensor:
        """The first ``batch`` rows give the plain text; returns it."""
        reshape(self.model, **options_of(shape))
        inputs = {name: x[:batch] for name, x in self.inputs.items()}
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | settings
        plain, ours = (m.generate(**inputs, **settings) for m in (self.reference, self.model))
        assert self.model.spec.stats().mode == "rounds"
        assert torch.equal(plain, ours), f"{shape}, batch {batch}, {settings}"
        return plain

    def accept_lengths(self) -> list[list[int]]:
        return self.model.spec.stats().accept_lengths


def make_pair(reference: PreTrainedModel, model: PreTrainedModel, head: DraftHead, cases: list[tuple[str, int]]) -> Pair:
    """Compile ``model``, the reference's twin, with ``head``."""
    inputs = left_padded(5, PROMPT, seed=1)
    texts = reference.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    model = spec_compile(model, draft=head, compile="none", num_steps=3, adaptive=False)
    return Pair(reference, model, head, inputs, texts, cases)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request) -> Pair:
    family, number = request.param, FAMILIES.index(request.param)
    reference, model = tiny_model(family), tiny_model(family)
    head = random_eagle3_head(model, draft_vocab_size=64, seed=number)
    return make_pair(reference, model, head, [(shape, BATCHES[(number + i) % 3]) for i, shape in enumerate(SHAPES)])


def later_siblings(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Filled while rounds run: for every tree node that is kept, whether a likelier sibling stood before it."""
    accept, kept = torch.ops.spec_compile.accept_tree_greedy, []

    def recorded(window_ids: Tensor, parents: Tensor, *rest: object) -> tuple[Tensor, ...]:
        result = accept(window_ids, parents, *rest)
        for hangs, path in zip(parents.tolist(), result[1].tolist(), strict=True):
            kept.extend(hangs[node] in hangs[:node] for node in path[1:] if node >= 0)
        return result

    monkeypatch.setattr(torch.ops.spec_compile, "accept_tree_greedy", recorded)
    return kept


def check_rounds(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """All cases, first with a head that knows nothing, then with one that was taught the texts."""
    for shape, batch in pair.cases:
        pair.check(shape, batch, max_new_tokens=10)

    rows = zip(pair.texts, pair.inputs["attention_mask"], strict=True)
    fit(pair.head, pair.reference, [row[int((mask == 0).sum()) :] for row, mask in rows], first=NEW_TOKENS)
    later, seen, fired = later_siblings(monkeypatch), set(), 0
    for shape, batch in pair.cases:
        text = pair.check(shape, batch)
        seen |= {length for row in pair.accept_lengths() for length in row}
        ends = ids_inside_windows(text, pair.accept_lengths(), PROMPT)
        if ends:
            cut = pair.check(shape, batch, eos_token_id=ends)
            fired += int(torch.isin(cut[:, PROMPT:], torch.tensor(ends)).any(1).sum())
    assert {1, 2} <= seen and max(seen) > 3, f"windows must be refused and accepted in part: {sorted(seen)}"
    assert any(later) and not all(later), "trees must take nodes that are not the likeliest of their siblings"
    assert fired, "end-of-sequence ids have to fire inside windows"


def test_heads_that_know_nothing_and_heads_that_know_the_text(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    check_rounds(pair, monkeypatch)
