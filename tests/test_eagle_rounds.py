"""What EAGLE rounds leave behind: caches and first drafts as a plain forward over the final text would make them, and, behind a
head that knows the text, the fewest rounds there can be."""

from __future__ import annotations

import functools
import math
import random

import pytest
import torch
from heads import fit, options_of, target_states
from stored import check_stored
from tiny import tiny_model
from transformers import DynamicCache

from spec_compile.config import SpecConfig
from spec_compile.drafts.eagle import EagleDraft
from spec_compile.drafts.head_runner import HeadRunner
from spec_compile.hardware import Hardware
from spec_compile.hf_integration.caches import cache_argument
from spec_compile.hf_integration.heads.draft_head import DraftHead
from spec_compile.hf_integration.heads.eagle3 import random_eagle3_head
from spec_compile.hf_integration.heads.mtp import random_mtp_head
from spec_compile.runtime.draft import Verified
from spec_compile.runtime.engine import Engine, Request
from spec_compile.runtime.model_runner import ModelRunner
from spec_compile.runtime.options import RuntimeOptions
from spec_compile.runtime.program import SegmentCompiler
from spec_compile.runtime.state import DecodeState, SamplingPlan

CPU = Hardware("cpu", "cpu", 1, "CPU")
# Everything runs on the CPU; a GPU in name brings what the engine does for one: pages, buckets, padding rows.
GPU_IN_NAME = Hardware("nvidia", "sm90", 1, "a GPU in name")
GREEDY, SAMPLING = SamplingPlan(), SamplingPlan(do_sample=True)
# A sliding window behind a chain; trees with two layers of head; latent attention, and one page a row.
CASES = {
    "chain, mistral": ("mistral", "3/1/4"),
    "tree, llama": ("llama", "5/4/8"),
    "tree, deepseek": ("deepseek_v3", "4/3/12", CPU),
}
HEAD_WINDOW = 6


pytestmark = pytest.mark.usefixtures("fresh_seed")


@functools.cache
def runners_for(
    family: str, hardware: Hardware, hidden_size: int, draft_vocab_size: int, head_window: int | None, mtp: bool
) -> tuple[ModelRunner, HeadRunner]:
    """A target and a random head of two layers, or an MTP head, captured once."""
    model = tiny_model(family, hidden_size=hidden_size)
    if mtp:
        head = random_mtp_head(model, own_lm_head=True)
    else:
        head = random_eagle3_head(model, draft_vocab_size=draft_vocab_size, num_hidden_layers=2, sliding_window=head_window)
    options = RuntimeOptions(hardware, SegmentCompiler("none", hardware), backend="torch", page_size=16)
    return ModelRunner(model, "verify", options, head.taps), HeadRunner(head, options)


def engine_for(
    family: str,
    shape: str,
    hardware: Hardware = GPU_IN_NAME,
    *,
    hidden_size: int = 64,
    vocab: int = 64,
    head_window: int | None = None,
    mtp: bool = False,
    **options: object,
) -> Engine:
    """What ``spec_compile()`` builds, on any hardware's terms."""
    config = SpecConfig(compile="none", cuda_graphs=False, adaptive=False, page_size=16, **options_of(shape), **options)
    target, runner = runners_for(family, hardware, hidden_size, vocab, head_window, mtp)
    return Engine(target, EagleDraft(runner, config.round_shape(5), 96), config)


def request(lengths: list[int], new_tokens: list[int], plan: SamplingPlan = GREEDY) -> Request:
    return Request(
        prompts=[torch.tensor(random.choices(range(3, 96), k=n)) for n in lengths],
        end_len=[length + new for length, new in zip(lengths, new_tokens, strict=True)],
        min_len=[0] * len(lengths),
        eos_ids=[],
        seed=random.sample(range(1 << 40), len(lengths)),
        plan=plan,
    )


@torch.no_grad()
def rounds(engine: Engine, state: DecodeState, plan: SamplingPlan, most: int) -> list[list[int]]:
    """Rounds until every row is finished, ``most`` at most: tokens of each round by row."""
    counts = []
    while not state.finished.all() and len(counts) < most:
        engine.launch(state, plan, engine.shape)
        counts.append(state.out[:, -3].tolist())
    return counts


# ----------------------------------------------------------------------------------------------------------------------
# The caches hold what a plain forward over the final text would put there


@torch.no_grad()
def check_row(engine: Engine, state: DecodeState, row: int) -> None:
    """Target's cache, head's cache, and what ``extend`` kept for one row, against plain forwards over its text. Rounds
    overwrite what ``extend`` kept for a row that is done; it is not read again."""
    length = int(state.cache_len[row])
    text = state.tokens[row, : length + 1]
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    cache = DynamicCache()
    engine.target.model(text[None, :-1], use_cache=True, **{cache_argument(engine.target.model.forward): cache})
    check_stored(engine.target.programs, state.page_table[row], cache, length, 1e-4)

    head: DraftHead = engine.draft.runner.head
    states = head.project(target_states(engine.target.model, head.taps, text[:-1]))  # [1, L, H]
    cache = DynamicCache()
    hidden = head(text[None, 1:], states, torch.arange(length)[None], cache=cache)
    check_stored(engine.draft.programs[0], state.page_table[row], cache, length, 1e-4)
    if not state.finished[row]:
        close(engine.draft.level_states[row], head.feedback(hidden)[0, -1])
        close(engine.draft.level_logits[row], head.logits(hidden)[0, -1])


def taught(engine: Engine, wanted: Request, **settings: object) -> None:
    """Teach the engine's head the target's own continuations of the prompts, as far as least squares can."""
    new_tokens = [end - len(prompt) for prompt, end in zip(wanted.prompts, wanted.end_len, strict=True)]
    texts = [
        engine.target.model.generate(prompt[None], max_new_tokens=count, do_sample=False)[0]
        for prompt, count in zip(wanted.prompts, new_tokens, strict=True)
    ]
    fit(engine.draft.runner.head, engine.target.model, texts, first=max(new_tokens), **settings)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_caches_and_first_drafts_equal_plain_forwards_over_the_final_text(case: tuple) -> None:
    check_to_the_end(engine_for(*case))


@pytest.mark.parametrize("shape", ["3/1/4", "3/2/6"])
def test_caches_behind_an_mtp_head(shape: str) -> None:
    """Its own cache holds latents, in pages of one row."""
    check_to_the_end(engine_for("deepseek_v3", shape, CPU, mtp=True))


def check_to_the_end(engine: Engine) -> None:
    """From prefill to the end: ragged rows, one of a single token, that finish apart, drafts accepted in part."""
    wanted = request([5, 1, 19], [40, 25, 9])
    taught(engine, wanted)
    state, counts = engine.admit(wanted), []
    while True:
        for row in range(3):
            check_row(engine, state, row)
        if state.finished.all():
            break
        counts += rounds(engine, state, GREEDY, 4)
    assert 0 in {n for count in counts for n in count[:3]}, f"rows must finish apart: {counts}"
    # The last tokens of a row may be cut by its end.
    rows = [[n for n in row if n][:-1] for row in zip(*(count[:3] for count in counts), strict=True)]
    seen = {n for row in rows for n in row}
    assert max(seen) > 1 and min(seen) <= engine.shape.num_steps, f"drafts must be accepted in part: {counts}"


@pytest.mark.parametrize("shape", ["3/1/4", "4/3/12"])
def test_a_head_with_sliding_windows(shape: str) -> None:
    """Its second layer's entries and what it foretells show what the first one's windows let through."""
    engine = engine_for("llama", shape, head_window=HEAD_WINDOW)
    wanted = request([5, 1, 19], [40, 25, 9])
    taught(engine, wanted)
    state, counts = engine.admit(wanted), []
    for most in (5, 40):
        counts += rounds(engine, state, GREEDY, most)
        for row in range(3):
            check_row(engine, state, row)
    assert max(n for count in counts for n in count) > 1, "drafts must be accepted"


@pytest.mark.parametrize("case", ["chain, mistral", "tree, llama"])
def test_caches_of_sampled_rounds(case: str) -> None:
    engine = engine_for(*CASES[case])
    wanted = request([5, 1, 19], [40, 25, 9], SAMPLING)
    wanted.temperature = 0.1  # nearly the text that was taught
    taught(engine, wanted)
    state, counts = engine.admit(wanted), []
    while not state.finished.all():
        counts += rounds(engine, state, SAMPLING, 4)
        for row in range(3):
            check_row(engine, state, row)
    assert max(n for count in counts for n in count) > 1


def test_a_head_that_keeps_its_own_states_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the tests above: entries that drafting made of the head's own states, for tokens that were accepted,
    look right in everything but their numbers."""
    engine = engine_for("llama", "3/1/4")
    honest = EagleDraft.extend

    def forgetful(self: EagleDraft, state: DecodeState, verified: Verified) -> None:
        caches = {key: cache.clone() for key, cache in self.programs[0].pool.caches.items()}
        honest(self, state, verified)
        for table, start, count in zip(state.page_table, verified.start.tolist(), verified.count.tolist(), strict=True):
            for slot in range(start, start + count - 1):  # drafted, and accepted
                for key, cache in self.programs[0].pool.caches.items():
                    page = table[slot // cache.shape[1]], slot % cache.shape[1]
                    cache[page] = caches[key][page]

    wanted = request([9, 4, 2], [30, 30, 30])
    taught(engine, wanted)
    state = engine.admit(wanted)
    assert any(n > 1 for counts in rounds(engine, state, GREEDY, 20) for n in counts)
    check_row(engine, state, 0)
    monkeypatch.setattr(EagleDraft, "extend", forgetful)
    state = engine.admit(wanted)
    assert any(n > 1 for counts in rounds(engine, state, GREEDY, 20) for n in counts)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        for row in range(3):
            check_row(engine, state, row)


# ----------------------------------------------------------------------------------------------------------------------
# A head that knows the text is never refused


@pytest.mark.parametrize("shape", ["3/1/4", "4/3/12"])
def test_a_head_that_knows_the_text_takes_the_fewest_rounds(shape: str) -> None:
    """With more features than there are tokens to learn, least squares gets every one right: n tokens behind prefill's take
    ceil(n / (num_steps + 1)) rounds. A slot that is wrong in either cache costs rounds, which exactness would never show."""
    engine = engine_for("llama", shape, hidden_size=256, vocab=96)
    steps = engine.shape.num_steps
    for new_tokens in (4 * (steps + 1) + 1, 4 * (steps + 1) + 2):
        wanted, fewest = request([11, 4], [new_tokens] * 2), math.ceil((new_tokens - 1) / (steps + 1))
        taught(engine, wanted, steps=steps, noise=0.0, ridge=1e-4)
        assert len(rounds(engine, engine.admit(wanted), GREEDY, 100)) == fewest
    state = engine.admit(wanted)
    for cache in engine.draft.programs[0].pool.caches.values():
        cache.zero_()  # the control: without the prompt's entries it gets lost
    assert len(rounds(engine, state, GREEDY, 100)) > fewest


# ----------------------------------------------------------------------------------------------------------------------
# Simulated acceptance goes through the same commit


@pytest.mark.parametrize(("shape", "plan"), [("3/1/4", SAMPLING), ("5/4/8", GREEDY), ("5/4/8", SAMPLING)])
def test_simulated_rounds_keep_the_caches(shape: str, plan: SamplingPlan) -> None:
    """Text that the target never wrote: the caches are those of the text that was emitted."""
    engine = engine_for("llama", shape, simulate_accept_length=2.5)
    state = engine.admit(request([9, 4, 1], [40, 25, 9], plan))
    counts = rounds(engine, state, plan, 8)
    for row in range(3):
        check_row(engine, state, row)
    assert {n for count in counts for n in count[:2]} == {2, 3}, counts  # 2.5 on average, before a row's end


@pytest.mark.parametrize("family", ["gemma3_text", "deepseek_v3"])
def test_caches_after_a_hundred_rounds_of_random_acceptance(family: str) -> None:
    """Windows of 16, twice round their ring of pages, beside layers without; and latent attention: no slot of either cache is
    lost, overwritten or left behind on the way."""
    engine = engine_for(family, "2/4/8", simulate_accept_rates=(0.7, 0.4))
    state = engine.admit(request([170, 4, 1], [400, 120, 90]))
    pool = engine.target.programs.pool
    assert (min(pool.pages.values()) < pool.page_table.shape[1]) == (family == "gemma3_text")
    counts = rounds(engine, state, GREEDY, 100)
    assert len(counts) == 100 and {n for count in counts for n in count[:3]} == {0, 1, 2, 3}
    for row in range(3):
        check_row(engine, state, row)
