"""``model.spec.last_tree()``: the tree of every round, seen from a streamer, tells the text and what the head thought."""

from __future__ import annotations

import math

import pytest
import torch
from heads import fit, target_states
from tiny import tiny_model
from transformers.generation.streamers import BaseStreamer

from spec_compile import spec_compile
from spec_compile.draft_tree import DraftTree
from spec_compile.hf_integration.heads.eagle3 import random_eagle3_head

PROMPT = torch.arange(5, 16)[None]
NEW_TOKENS = 20


class Watcher(BaseStreamer):
    """Keeps the tree of every round; the tokens of one round come one by one and show the same tree."""

    def __init__(self, handle) -> None:
        self.handle, self.trees = handle, []

    def put(self, value: torch.Tensor) -> None:
        tree = self.handle.last_tree()
        if tree is not None and (not self.trees or tree != self.trees[-1]):
            self.trees.append(tree)

    def end(self) -> None:
        pass


@pytest.fixture(scope="module")
def watched() -> tuple:
    """A model with a head that was taught the answer: (model, head, text [L], trees by round)."""
    model = tiny_model("llama")
    text = model.generate(PROMPT, max_new_tokens=NEW_TOKENS, do_sample=False)[0]
    head = random_eagle3_head(model, draft_vocab_size=80, draft_ids=None)
    fit(head, model, [text], first=NEW_TOKENS)
    spec_compile(model, draft=head, num_steps=4, topk=3, num_draft_tokens=9, compile="none")
    watcher = Watcher(model.spec)
    assert model.spec.last_tree() is None
    assert torch.equal(model.generate(PROMPT, max_new_tokens=NEW_TOKENS, do_sample=False, streamer=watcher)[0], text)
    return model, head, text, watcher.trees


def test_the_paths_spell_the_text(watched):
    model, _, text, trees = watched
    position = PROMPT.shape[1]  # of the first round's root, which is prefill's token
    for tree in trees:
        assert tree.tokens[0] == int(text[position])
        emitted = [tree.tokens[i] for i in tree.path[1:]] + [tree.next_token]
        assert tree.accept_length == len(emitted)
        position += len(emitted)
        within = emitted[: max(0, len(text) - (position - len(emitted)) - 1)]
        assert within == text[position - len(emitted) + 1 : position + 1].tolist()
    assert position >= len(text) - 1
    assert max(tree.accept_length for tree in trees) > 2 and len(trees) == model.spec.stats().rounds
    assert model.spec.last_tree() == trees[-1]


def test_a_tree_hangs_together(watched):
    for tree in watched[3]:
        assert len(tree.tokens) == len(tree.parents) == len(tree.depth) == len(tree.logprobs) == 9
        assert tree.parents[0] == -1 and tree.depth[0] == 0 and tree.path[0] == 0
        for index in range(1, 9):
            assert tree.depth[index] == tree.depth[tree.parents[index]] + 1 and tree.parents[index] < index
        assert all(tree.parents[child] == parent for parent, child in zip(tree.path, tree.path[1:], strict=False))
        for index in range(9):
            chances = [tree.logprobs[child] for child in tree.children(index)]
            assert chances == sorted(chances, reverse=True) and sum(map(math.exp, chances)) <= 1.0001


def test_probabilities_are_the_heads(watched):
    """Of every round's first level: from the head's own forward over transformers' states of the whole text."""
    model, head, text, trees = watched
    with torch.no_grad():
        states = target_states(model, head.taps, text[:-1])
        hidden = head(text[1:][None], head.project(states), torch.arange(len(text) - 1)[None])
        log_probs = head.logits(hidden)[0].float().log_softmax(-1)  # entry i foretells token i + 2
    absolute, position, seen = head.draft_ids.tolist(), PROMPT.shape[1], 0
    for tree in trees:
        first = [i for i, depth in enumerate(tree.depth) if depth == 1]
        wanted = [float(log_probs[position - 1, absolute.index(tree.tokens[i])]) for i in first]
        assert [tree.logprobs[i] for i in first] == pytest.approx(wanted, abs=1e-4)
        position, seen = position + tree.accept_length, seen + len(first)
    assert seen > len(trees), "trees must have several tokens on a level"


def test_a_chain_has_no_tree(watched):
    model, head, *_ = watched
    spec_compile(model, draft=head, num_steps=3, compile="none")
    model.generate(PROMPT, max_new_tokens=6, do_sample=False)
    assert model.spec.last_tree() is None


def test_children_come_in_the_drafts_order():
    tree = DraftTree([1, 2, 3, 4], [-1, 0, 0, 1], [0, 1, 1, 2], [0.0, -2.0, -1.0, -0.5], [0, 1], 9)
    assert tree.children(0) == [2, 1] and tree.children(1) == [3] and tree.children(3) == []


def test_a_call_in_lockstep_leaves_no_tree_of_the_call_before(watched) -> None:
    model, head, *_ = watched
    spec_compile(model, draft=head, num_steps=4, topk=3, num_draft_tokens=9, compile="none")
    model.generate(PROMPT, max_new_tokens=4, do_sample=False)
    assert model.spec.last_tree() is not None
    model.generate(PROMPT, max_new_tokens=4, do_sample=False, repetition_penalty=1.3)
    assert model.spec.stats().mode == "lockstep" and model.spec.last_tree() is None
