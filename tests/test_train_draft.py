"""The trainer of draft heads: its objective is what drafting computes, its data is what it says, its validation is exact."""

from __future__ import annotations

import argparse
import random
from collections import Counter

import draft_data
import draft_loss
import draft_prompts
import draft_sources
import pytest
import torch
import train_draft
from draft_data import Corpus
from tiny import tiny_model
from transformers import DynamicCache

from spec_compile import spec_compile
from spec_compile.hf_integration.checkpoints.detect import load_draft_head
from spec_compile.hf_integration.checkpoints.eagle3_speculators import save_speculators_eagle3
from spec_compile.hf_integration.heads.eagle3 import random_eagle3_head

STEPS = 4


def random_corpus(lengths: list[int], seed: int = 0, answer: int = 6) -> Corpus:
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randint(3, 96, (n,), generator=generator).tolist() for n in lengths]
    return Corpus.of([(row[:-answer], row[-answer:], 0.0, 0) for row in draw])


@pytest.fixture(scope="module")
def target():
    return tiny_model("llama", num_hidden_layers=8)


@pytest.fixture(params=[{}, {"norm_before_residual": True, "fc_norm": True}, {"norm_output": True, "num_hidden_layers": 2}])
def head(target, request):
    return random_eagle3_head(target, draft_vocab_size=40, seed=3, **request.param)


def stepwise(head, packed, states) -> list[torch.Tensor]:
    with torch.no_grad(), draft_loss.training_attention(head):
        return list(draft_loss.step_logits(head, packed, states, STEPS))


@torch.no_grad()
def test_each_step_is_what_drafting_computes(target, head):
    """Step j at anchor i against a cache of the true entries 0 … i that is then drafted from, with the text's own tokens."""
    packed = draft_data.pack(random_corpus([17]), 17)
    states, _ = draft_loss.target_states(target, head.taps, packed)
    logits = stepwise(head, packed, states)
    ids = packed.ids[0]
    for anchor in range(17 - STEPS - 1):
        cache = DynamicCache(config=head.config)
        known = anchor + 1
        hidden = head(ids[None, 1 : known + 1], head.project(states[:, :known]), torch.arange(known)[None], cache)[:, -1:]
        torch.testing.assert_close(logits[0][:, anchor], head.logits(hidden)[:, 0], rtol=1e-4, atol=1e-4)
        for step in range(1, STEPS):
            position = torch.tensor([[anchor + step]])
            hidden = head(ids[None, anchor + 1 + step, None], head.feedback(hidden), position, cache)
            torch.testing.assert_close(logits[step][:, anchor], head.logits(hidden)[:, 0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_packed_text_is_as_if_it_were_alone(target, head):
    corpus = random_corpus([19, 12, 9])
    packed = draft_data.pack(corpus, 24)
    assert packed.ids.shape[0] == 2  # the two short ones share a row
    together = stepwise(head, packed, draft_loss.target_states(target, head.taps, packed)[0])
    starts = (corpus.lengths.cumsum(0) - corpus.lengths).tolist()
    for text, length in enumerate(corpus.lengths.tolist()):
        mine = corpus.tokens[starts[text] : starts[text] + length]
        alone = draft_data.pack(Corpus(mine, *(t[text : text + 1] for t in (corpus.lengths, corpus.prompt_lens,
                                corpus.temperatures, corpus.group))), length)  # fmt: skip
        expected = stepwise(head, alone, draft_loss.target_states(target, head.taps, alone)[0])
        row, where = (packed.document == text + 1).nonzero(as_tuple=True)
        for step in range(STEPS):
            inside = length - 1 - step  # further anchors read tokens behind the text
            got = together[step][row[:inside], where[:inside]]
            torch.testing.assert_close(got, expected[step][0, :inside], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_teacher_is_the_targets_distribution(target, head):
    packed = draft_data.pack(random_corpus([15, 11]), 16)
    _, last = draft_loss.target_states(target, head.taps, packed)
    rows = target.lm_head.weight[head.draft_ids]
    probs = draft_loss.teacher_probs(rows, last, draft_loss.log_normaliser(target, last))
    alone = target(packed.ids[:1, :15]).logits.softmax(-1)[..., head.draft_ids]
    torch.testing.assert_close(probs[:1, :15], alone, rtol=1e-4, atol=1e-6)


def test_the_loss_counts_answers_only(target, head):
    """Against a loop over anchors; what lies outside answers has no part in it."""
    packed = draft_data.pack(random_corpus([15, 11], answer=5), 16)
    states, last = draft_loss.target_states(target, head.taps, packed)
    probs = draft_loss.teacher_probs(target.lm_head.weight[head.draft_ids], last, draft_loss.log_normaliser(target, last))
    with torch.no_grad(), draft_loss.training_attention(head):
        losses = draft_loss.step_losses(head, packed, states, probs, STEPS)
    logits = stepwise(head, packed, states)
    for step in range(STEPS):
        found = []
        for row, length in enumerate((15, 11)):
            for anchor in range(length):
                foreseen = anchor + 2 + step
                if length - 5 <= foreseen < length:
                    log_q = logits[step][row, anchor].log_softmax(-1)
                    found.append(-(probs[row, foreseen - 1] * log_q).sum())
        torch.testing.assert_close(losses[step], torch.stack(found).mean(), rtol=1e-4, atol=1e-5)


def test_training_makes_a_head_that_the_library_accepts_as_validation_says(target, tmp_path):
    """Learn a few greedy texts by heart; the validation's accept length is that of spec_compile() on the saved head."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, 96, (4, 8), generator=generator)
    out = target.generate(prompts, max_new_tokens=24, do_sample=False)
    corpus = Corpus.of([(row[:8].tolist(), row[8:].tolist(), 0.0, 0) for row in out])
    recipe = train_draft.Recipe(
        draft_vocab_size=64,
        intermediate_size=96,
        steps=5,
        row_length=32,
        rows=4,
        learning_rate=1e-2,
        seconds=600.0,
        warm_up=1e-5,
    )
    options = argparse.Namespace(keep_gb=1.0, compile=False, max_steps=40, log_every=10)
    head, log = train_draft.train(target, corpus, corpus, recipe, options)
    first, final = log["validation"][0]["T=0"], log["validation"][-1]["T=0"]
    assert final > max(2.0, first), "nothing was learnt"
    assert log["curve"][-1]["losses"] < log["curve"][0]["losses"]

    save_speculators_eagle3(head, tmp_path)
    loaded = load_draft_head(str(tmp_path), target)
    torch.testing.assert_close(loaded.fc.weight, head.fc.weight)
    model = tiny_model("llama", num_hidden_layers=8)
    spec_compile(model, draft=str(tmp_path), num_steps=5, compile="none", adaptive=False, progress=False)
    again = model.generate(prompts, max_new_tokens=24, do_sample=False)
    assert torch.equal(again, out)
    rounds = [length for row in model.spec.stats().accept_lengths for length in row]
    assert sum(rounds) / len(rounds) == pytest.approx(final, rel=1e-6)


def test_chain_rounds_walks_a_text():
    hits = [[False] * 3] * 2 + [[True, True, False], [False] * 3, [True, False, True], [True, True, True], [True, True, True]]
    # Root 3 accepts two (tokens 4 and 5) and emits 6; its anchor is 2. Root 6 has one token left.
    assert draft_loss.chain_rounds(hits, 3, 8) == [3, 1]
    assert draft_loss.chain_rounds(hits, 3, 7) == [3]
    assert draft_loss.chain_rounds(hits, 4, 8) == [1, 2]


def test_repeats_are_cut_where_a_run_begins_for_the_fourth_time():
    rng = random.Random(0)
    rows = [[rng.randrange(2) for _ in range(60)] for _ in range(20)]
    rows += [[rng.randrange(50) for _ in range(60)], (list(range(9)) * 7)[:60]]
    counts = [rng.randrange(40, 61) for _ in rows]
    expected = []
    for row, count in zip(rows, counts, strict=True):
        seen, cut = Counter(), count
        for at in range(count - 7):
            seen[tuple(row[at : at + 8])] += 1
            if seen[tuple(row[at : at + 8])] == 4:
                cut = at
                break
        expected.append(cut)
    assert draft_data.unrepeated(torch.tensor(rows), torch.tensor(counts)).tolist() == expected
    assert expected[-1] == 27 and expected[-2] == counts[-2]


def test_packing_keeps_every_token_once():
    corpus = random_corpus([random.Random(i).randrange(8, 30) for i in range(25)] + [40])
    packed = draft_data.pack(corpus, 32)
    lengths = corpus.lengths.clamp(max=32)
    assert int((packed.document > 0).sum()) == int(lengths.sum())
    starts = (corpus.lengths.cumsum(0) - corpus.lengths).tolist()
    for text, length in enumerate(lengths.tolist()):
        inside = packed.document == text + 1
        assert packed.ids[inside].tolist() == corpus.tokens[starts[text] : starts[text] + length].tolist()
        assert packed.position[inside].tolist() == list(range(length))
        assert packed.answer[inside].tolist() == [i >= corpus.prompt_lens[text] for i in range(length)]


def test_draft_vocabulary_is_the_most_frequent_of_answers():
    corpus = Corpus.of([([9, 9, 9, 9], [5, 5, 7, 7, 7, 3], 0.0, 0), ([9], [4, 7], 1.0, 0)])
    ids, coverage = draft_data.draft_vocabulary(corpus, 2, 12)
    assert ids.tolist() == [5, 7] and coverage == pytest.approx(6 / 8)


def test_held_out_prompts_are_never_made():
    for prompts in draft_prompts.HELD_OUT.values():
        assert len(prompts) == 8
        for prompt in prompts:
            assert draft_prompts.is_held_out(prompt) and draft_prompts.is_held_out(f"Please: {prompt.upper()}!")
    rng = random.Random(0)
    functions, paragraphs = draft_sources.python_sources(rng, files=5)
    letter = draft_prompts.HELD_OUT["edit"][0].split("\n\n")[1]
    made = draft_sources.first(draft_sources.template_prompts(rng), 200)
    made += draft_sources.first(draft_sources.text_prompts([*paragraphs[:3], letter], rng), 20)
    made += draft_sources.first(draft_sources.code_prompts(functions, rng), 20)
    assert len(set(made)) == len(made) > 200
    assert not any(draft_prompts.is_held_out(prompt) for prompt in made)
