"""DFlash rounds through ``generate()``: greedy text equals plain transformers token for token in float32, drafts are those of
the head's own forward, the cache holds what the target's states make, and sampling keeps the distribution."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from dflash_heads import block_states, fit_blocks, own_vocabulary
from draft_files import VOCAB, target_for, write
from heads import target_states
from test_draft_dflash import WEIGHTS, zlab
from test_generate_sampling import SETTINGS, V, distance, distribution, noise_level, target
from tiny import ids_inside_windows, left_padded, tiny_model
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from spec_compile import spec_compile
from spec_compile.drafts.dflash import DFlashDraft
from spec_compile.errors import DraftError
from spec_compile.hardware import Hardware
from spec_compile.hf_integration.heads.dflash import DFlashHead, random_dflash_head
from spec_compile.runtime.draft import Proposal

NEW_TOKENS, PROMPT, BLOCK = 24, 11, 5
BATCHES = (1, 3, 5)
# family -> batches of its rounds
FAMILIES = {"llama": BATCHES, "qwen3": (5,), "gemma3_text": (5,), "gpt_oss": (3,), "qwen3_moe": (5,)}


@dataclasses.dataclass
class Pair:
    """A family's model as transformers makes it, and compiled with a head that was taught what it answers.

    Attributes:
        texts: plain greedy texts of five rows without padding.
        states: what transformers itself says the tapped states of these are, [1, L, n * Ht] each.
    """

    reference: PreTrainedModel
    model: PreTrainedModel
    head: DFlashHead
    inputs: dict[str, Tensor]
    texts: list[Tensor]
    states: list[Tensor]
    batches: tuple[int, ...] = BATCHES

    def check(self, batch: int, mode: str = "rounds", **settings: object) -> Tensor:
        """The first ``batch`` rows give the plain text; returns it."""
        inputs = {name: x[:batch] for name, x in self.inputs.items()}
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | settings
        plain, ours = (m.generate(**inputs, **settings) for m in (self.reference, self.model))
        assert self.model.spec.stats().mode == mode
        assert torch.equal(plain, ours), f"batch {batch}, {settings}"
        return plain

    def accept_lengths(self) -> list[list[int]]:
        return self.model.spec.stats().accept_lengths


def make_pair(family: str, *, block_size: int = BLOCK, first_slot: int = 1, **options: object) -> Pair:
    reference, model = tiny_model(family), tiny_model(family)
    ids = torch.randperm(96, generator=torch.Generator().manual_seed(0))[:80].sort().values
    head = own_vocabulary(model, block_size, ids, first_slot=first_slot)
    inputs = left_padded(5, PROMPT, seed=1)
    rows = zip(reference.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False), inputs["attention_mask"], strict=True)
    texts = [row[int((mask == 0).sum()) :] for row, mask in rows]
    states = [target_states(reference, head.taps, text) for text in texts]
    return Pair(reference, spec_compile(model, draft=head, compile="none", **options), head, inputs, texts, states)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request) -> Pair:
    made = make_pair(request.param)
    made.batches = FAMILIES[request.param]
    return made


@pytest.fixture(scope="module")
def taught() -> Pair:
    """One whose head knows the text from the beginning."""
    made = make_pair("llama")
    fit_blocks(made.head, made.states, made.texts, first=NEW_TOKENS)
    return made


def test_heads_that_know_nothing_and_heads_that_know_the_text(pair: Pair) -> None:
    for batch in pair.batches:
        pair.check(batch, max_new_tokens=10)
    fit_blocks(pair.head, pair.states, pair.texts, first=NEW_TOKENS, noise=0.1)
    seen, fired = set(), 0
    for batch in pair.batches:
        text = pair.check(batch)
        seen |= {length for row in pair.accept_lengths() for length in row}
        ends = ids_inside_windows(text, pair.accept_lengths(), PROMPT)
        if ends:
            cut = pair.check(batch, eos_token_id=ends)
            fired += int(torch.isin(cut[:, PROMPT:], torch.tensor(ends)).any(1).sum())
    assert {1, 2} <= seen and max(seen) > 3, f"blocks must be refused and accepted in part: {sorted(seen)}"
    assert fired, "end-of-sequence ids have to fire inside windows"


def test_the_cache_after_many_rounds_is_that_of_the_whole_text(taught: Pair) -> None:
    """Blocks, refused drafts and windows over the end leave nothing behind in what later blocks attend to."""
    taught.check(5)
    assert len({length for row in taught.accept_lengths() for length in row}) > 2, "rounds of several lengths"
    pool = taught.model.spec._engine.draft.programs[0].pool
    with torch.no_grad():
        for row, (text, states) in enumerate(zip(taught.texts, taught.states, strict=True)):
            known = len(text) - 1
            pairs = taught.head.context_kv(taught.head.project(states[:, :known]), torch.arange(known)[None])
            (page,) = pool.page_table[row].tolist()
            for layer, wanted in enumerate(pairs):
                for part, values in zip("kv", wanted, strict=True):
                    cached = pool.caches[layer, part][page, :known]
                    torch.testing.assert_close(cached, values[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("block_size", "first_slot", "num_steps"), [(5, 1, None), (5, 0, None), (6, 1, 2), (40, 1, 7)])
def test_drafts_are_those_of_the_heads_own_forward(
    block_size: int, first_slot: int, num_steps: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every window of every round, for blocks of one and two mask words, from either slot, whole or the first drafts."""
    made = make_pair("llama", block_size=block_size, first_slot=first_slot, num_steps=num_steps)
    fit_blocks(made.head, made.states, made.texts, first=NEW_TOKENS)
    propose, seen = DFlashDraft.propose, []

    def recorded(self: DFlashDraft, state, *args) -> Proposal:
        proposal = propose(self, state, *args)
        seen.append((state.cache_len.clone(), state.finished.clone(), proposal.window))
        return proposal

    monkeypatch.setattr(DFlashDraft, "propose", recorded)
    made.check(5)
    checked = 0
    for cache_len, finished, windows in seen:
        for row in (~finished).nonzero()[:, 0].tolist():
            length, text = int(cache_len[row]), made.texts[row]
            hidden = block_states(made.head, made.states[row][:, :length], text[length : length + 1])
            logits = made.head.logits(hidden)[0, : num_steps or made.head.num_drafts].detach()
            assert windows.shape[1] == logits.shape[0] + 1 and int(windows[row, 0]) == int(text[length])
            drafted = torch.searchsorted(made.head.draft_ids, windows[row, 1:])
            assert torch.equal(made.head.draft_ids[drafted], windows[row, 1:])
            best, chosen = logits.max(-1).values, logits.gather(1, drafted[:, None])[:, 0]
            torch.testing.assert_close(chosen, best, rtol=1e-4, atol=1e-4)
            checked += len(chosen)
    assert checked > 50


def test_text_up_to_the_last_position(taught: Pair) -> None:
    inputs = left_padded(3, 246, seed=4)
    plain, ours = (m.generate(**inputs, max_length=256, do_sample=False) for m in (taught.reference, taught.model))
    assert torch.equal(plain, ours) and ours.shape[1] == taught.reference.config.max_position_embeddings


class Every(LogitsProcessor):
    """Forbids whatever stood three tokens before: a processor that reads the whole text."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.scatter(1, input_ids[:, -3:-2], float("-inf"))


def test_lockstep(taught: Pair) -> None:
    taught.check(3, "lockstep", logits_processor=[Every()])
    taught.check(1, "lockstep", repetition_penalty=1.0 + 1e-6)
    assert max(taught.accept_lengths()[0]) > 1, "drafts must be accepted here too"
    taught.check(3)  # rounds over the same buffers afterwards


def test_weights_are_fused_once(taught: Pair) -> None:
    """The programs that write the context read the rows of the block's fused weights, whatever was built in between."""
    for batch in BATCHES:
        taught.check(batch, max_new_tokens=6)
    for layer in taught.head.layers:
        weights = [getattr(layer.self_attn, name).weight for name in ("q_proj", "k_proj", "v_proj")]
        assert len({w.untyped_storage().data_ptr() for w in weights}) == 1
    with torch.no_grad():
        before = taught.head.layers[0].self_attn.v_proj.weight.clone()
        try:
            taught.head.layers[0].self_attn.v_proj.weight.zero_()  # seen by every program
            taught.check(3)
            runner = taught.model.spec._engine.draft.programs[0]
            assert not runner.pool.caches[0, "v"][runner.pool.page_table[0, 0], :PROMPT].any()
        finally:
            taught.head.layers[0].self_attn.v_proj.weight.copy_(before)


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


@pytest.fixture(scope="module")
def sampling() -> PreTrainedModel:
    """The target of the other sampling tests, with a head over six of its eight tokens."""
    made = target()
    head = own_vocabulary(made, 3, torch.tensor([0, 2, 3, 4, 6, 7]), seed=3)
    with torch.no_grad():
        head.lm_head.weight *= 0.5  # opinions, not certainties: drafts are accepted and refused
    return spec_compile(made, draft=head, compile="none")


@pytest.mark.parametrize("name", ["plain", "top-p"])
def test_sampled_text_follows_the_models_distribution(sampling: PreTrainedModel, name: str) -> None:
    """The distance is sampling noise at every size, so it shrinks as 1/sqrt(N)."""
    settings, warpers = SETTINGS[name]
    expected = distribution(target(), warpers)
    for samples in (500, 2000):
        assert distance(sampling, expected, samples, settings) < 1.5 * noise_level(expected, samples), samples
    assert 1.0 < sampling.spec.stats().accept_length < 3.0, "drafts must be accepted and rejected for this to mean anything"


def test_a_wrong_q_is_found(sampling: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Favourites that are declared as draws break the distribution, and the check sees it."""
    honest = DFlashDraft.propose

    def wrong(self, *args) -> Proposal:
        made = honest(self, *args)
        return Proposal(torch.cat([made.window[:, :1], made.probs.argmax(-1)], 1), made.probs)

    monkeypatch.setattr(DFlashDraft, "propose", wrong)
    settings, warpers = SETTINGS["plain"]
    expected = distribution(target(), warpers)
    assert distance(sampling, expected, 1500, settings) > 2.5 * noise_level(expected, 1500)


def test_a_rows_text_does_not_depend_on_the_rows_beside_it(sampling: PreTrainedModel) -> None:
    prompts = left_padded(3, 9, vocab_size=V)

    def text(rows: int) -> Tensor:
        torch.manual_seed(7)
        return sampling.generate(**{name: x[:rows] for name, x in prompts.items()}, do_sample=True, max_new_tokens=12)

    assert torch.equal(text(3), text(3))
    assert torch.equal(text(3)[:1], text(1))


# ----------------------------------------------------------------------------------------------------------------------
# What it is for and what not


@pytest.mark.parametrize(
    ("block_size", "options", "message"),
    [
        (5, {"topk": 4}, "topk=4: a DFlash head drafts chains only"),
        (5, {"num_steps": 5}, "num_steps=5: a block of this DFlash head drafts 4 tokens"),
        (65, {}, "blocks of 65 slots; at most 64"),
    ],
)
def test_what_a_block_cannot_do(block_size: int, options: dict[str, object], message: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(DraftError, match=message):
        spec_compile(model, draft=random_dflash_head(model, block_size), compile="none", **options)
    assert not hasattr(model, "spec")


def test_a_published_checkpoint_by_its_path(tmp_path: Path) -> None:
    path = write(tmp_path, *zlab())
    reference, model = target_for(WEIGHTS), spec_compile(target_for(WEIGHTS), draft=str(path), compile="none")
    inputs = left_padded(2, PROMPT, vocab_size=VOCAB)
    plain, ours = (m.generate(**inputs, max_new_tokens=8, do_sample=False) for m in (reference, model))
    assert torch.equal(plain, ours) and model.spec.stats().rounds > 0
    assert "draft: dflash, 3 tokens a round" in model.spec.explain()


def test_every_round_drafts(taught: Pair) -> None:
    """A head that is told of plain rounds later is an EAGLE head; this one would miss their tokens."""
    engine = taught.model.spec._engine
    before, engine.hardware = engine.hardware, Hardware("cuda", "sm90", 132, "a GPU")
    try:
        assert engine.config.adaptive and not engine.chooses and engine.round_shapes() == [engine.shape]
        assert engine.shape.num_steps == BLOCK - 1 and engine.reach >= BLOCK
    finally:
        engine.hardware = before
