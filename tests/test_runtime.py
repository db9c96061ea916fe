"""Rounds: what is in the caches after them, whom they leave alone, how many there are, and that none builds anything new."""

from __future__ import annotations

import dataclasses
import functools
import math
import random

import pytest
import torch
import trace_once
from stored import check_stored, stored
from tiny import tiny_model
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import DynamicCache

from spec_compile.config import SpecConfig, chain
from spec_compile.drafts.make import make_draft
from spec_compile.hardware import Hardware
from spec_compile.hf_integration.caches import cache_argument
from spec_compile.runtime.engine import Engine, Request
from spec_compile.runtime.model_runner import ModelRunner
from spec_compile.runtime.options import RuntimeOptions
from spec_compile.runtime.program import SegmentCompiler
from spec_compile.runtime.programs import Programs
from spec_compile.runtime.state import DecodeState, SamplingPlan

CPU = Hardware("cpu", "cpu", 1, "CPU")
# Everything runs on the CPU; a GPU in name brings what the engine does for one: pages, buckets, padding rows.
GPU_IN_NAME = Hardware("nvidia", "sm90", 1, "a GPU in name")
GREEDY, SAMPLING = SamplingPlan(), SamplingPlan(do_sample=True)


pytestmark = pytest.mark.usefixtures("fresh_seed")


@functools.cache
def engine_for(
    draft: str, hardware: Hardware = CPU, *, family: str = "llama", num_layers: int = 1, num_steps: int = 3
) -> Engine:
    """What ``spec_compile()`` builds, on any hardware's terms. ``draft`` is ``"ngram"``, ``"perfect"`` (the target once more)
    or ``"similar"`` (right some of the time). Shared between tests: admitting a request starts afresh."""
    config = SpecConfig(compile="none", cuda_graphs=False, adaptive=False, page_size=16, min_ngram=1, num_steps=num_steps)
    options = RuntimeOptions(hardware, SegmentCompiler(config.compile, hardware), backend="torch", page_size=config.page_size)
    model = tiny_model(family, num_hidden_layers=num_layers)
    source = "ngram" if draft == "ngram" else tiny_model(family, num_hidden_layers=num_layers)
    if draft == "similar":
        with torch.no_grad():
            for parameter in source.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
    return Engine(ModelRunner(model, "verify", options), make_draft(source, model, config, options), config)


def request(lengths: list[int], new_tokens: list[int], plan: SamplingPlan = GREEDY, **settings) -> Request:
    """Random prompts of the given lengths, each to be continued by its own number of tokens."""
    return Request(
        prompts=[torch.tensor(random.choices(range(3, 96), k=n)) for n in lengths],
        end_len=[length + new for length, new in zip(lengths, new_tokens, strict=True)],
        min_len=[0] * len(lengths),
        eos_ids=settings.pop("eos_ids", []),
        seed=random.sample(range(1 << 40), len(lengths)),
        plan=plan,
        **settings,
    )


def rounds(engine: Engine, state: DecodeState, plan: SamplingPlan, count: int, num_drafts: int | None = None) -> None:
    for _ in range(count):
        with torch.no_grad():
            engine.launch(state, plan, engine.shape if num_drafts is None else chain(num_drafts))


def rounds_to_the_end(engine: Engine, state: DecodeState, plan: SamplingPlan) -> int:
    """Rounds until every row is finished; how many it took."""
    count = 0
    while not state.finished.all():
        rounds(engine, state, plan, 1)
        count += 1
    return count


def text(state: DecodeState, row: int) -> list[int]:
    return state.tokens[row, : state.cache_len[row] + 1].tolist()


# ----------------------------------------------------------------------------------------------------------------------
# The caches hold what a plain forward over the final text would put there


@torch.no_grad()
def check_caches(programs: Programs, state: DecodeState, row: int, length: int) -> None:
    cache = DynamicCache()
    model = programs.model
    model(state.tokens[row, None, :length], use_cache=True, **{cache_argument(model.forward): cache})
    check_stored(programs, state.page_table[row], cache, length, 1e-5)


ONE_PAGE, PAGES_OF_16 = pytest.param(CPU, id="one page a row"), pytest.param(GPU_IN_NAME, id="pages of 16")


@pytest.mark.parametrize("family", ["mistral", "deepseek_v3"])
@pytest.mark.parametrize("hardware", [ONE_PAGE, PAGES_OF_16])
def test_caches_equal_a_plain_forward_over_the_final_text(family: str, hardware: Hardware):
    """In mid-text and at the end, of target and draft: ragged rows that finish at different times, drafts accepted in part, a
    sliding window of 16 (mistral), latent attention (deepseek). The second layer's keys show what the first one's attention
    read."""
    engine = engine_for("similar", hardware, family=family, num_layers=2)
    state = engine.admit(request([5, 1, 19], [40, 25, 9], eos_ids=[random.randrange(3, 96)]))
    rounds(engine, state, GREEDY, 3)
    check_both_caches(engine, state)
    rounds_to_the_end(engine, state, GREEDY)
    check_both_caches(engine, state)


def check_both_caches(engine: Engine, state: DecodeState) -> None:
    for row in range(3):
        length = int(state.cache_len[row])
        check_caches(engine.target.programs, state, row, length)
        if length > 1:  # a draft's last slot is written by the next round
            check_caches(engine.draft.programs[0], state, row, length - 1)


@pytest.mark.parametrize("plan", [GREEDY, SAMPLING], ids=["greedy", "sampling"])
def test_plain_rounds_between_drafted_ones_leave_no_gap(plan: SamplingPlan):
    """The policy leaves n-gram drafts out of some rounds."""
    engine = engine_for("ngram")
    state = engine.admit(request([7, 2], [60, 60], plan))
    for _ in range(12):
        rounds(engine, state, plan, 1, num_drafts=random.choice([0, 3]))
    for row in range(2):
        check_caches(engine.target.programs, state, row, int(state.cache_len[row]))


# ----------------------------------------------------------------------------------------------------------------------
# Rows that are done, and padding rows


def values(state: DecodeState) -> dict[str, Tensor]:
    tensors = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    return {name: t.clone() for name, t in tensors.items() if isinstance(t, Tensor) and name != "out"}


def pools(engine: Engine) -> dict[tuple, Tensor]:
    """Every cache's pages but the null page."""
    caches = {(number, *key): c for number, r in enumerate(engine.programs()) for key, c in r.pool.caches.items()}
    return {key: cache[1:].clone() for key, cache in caches.items()}


def same(before: dict, after: dict) -> bool:
    return all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("plan", [GREEDY, SAMPLING], ids=["greedy", "sampling"])
@pytest.mark.parametrize("kind", ["ngram", "similar"])
def test_rounds_over_padding_rows_change_nothing_but_the_null_page(kind: str, plan: SamplingPlan):
    engine = engine_for(kind, GPU_IN_NAME)
    engine.admit(request([9, 3], [10, 10], plan))  # pools that hold something
    engine._buffers.clear()
    state = engine._buffers.rows(2)
    before, caches = values(state), pools(engine)
    rounds(engine, state, plan, 3)
    assert same(before, values(state)) and same(caches, pools(engine))
    assert state.out[:, -3].tolist() == [0, 0] and state.out[:, -2].tolist() == [1, 1]


@pytest.mark.parametrize("kind", ["ngram", "similar"])
def test_rounds_over_finished_rows_change_nothing_that_counts(kind: str):
    engine = engine_for(kind, GPU_IN_NAME)
    state = engine.admit(request([9, 3, 6], [4, 12, 8]))
    rounds_to_the_end(engine, state, GREEDY)
    before = values(state)
    committed = [stored(engine.target.programs, 0, state.page_table[r], int(state.cache_len[r]))[1] for r in range(3)]
    rounds(engine, state, GREEDY, 3)
    after = values(state)
    after["next_draft"] = before["next_draft"]  # scratch: what a draft would look up
    assert same(before, after) and state.out[:, -3].tolist() == [0] * 4
    for row, old in enumerate(committed):
        assert torch.equal(stored(engine.target.programs, 0, state.page_table[row], len(old))[1], old)


@pytest.mark.parametrize("plan", [GREEDY, SAMPLING], ids=["greedy", "sampling"])
def test_a_rows_text_does_not_depend_on_who_else_is_there(plan: SamplingPlan):
    """Alone, among others, and beside padding rows and rows that finish early."""
    engine = engine_for("similar", GPU_IN_NAME)
    wanted = request([9, 4, 13], [20, 2, 20], plan)
    together = engine.admit(wanted)
    rounds_to_the_end(engine, together, plan)
    texts = [text(together, row) for row in range(3)]
    assert together.tokens.shape[0] == 4, "one padding row"
    for row in range(3):
        fields = ("prompts", "end_len", "min_len", "seed")
        one = dataclasses.replace(wanted, **{name: getattr(wanted, name)[row : row + 1] for name in fields})
        alone = engine.admit(one)
        rounds_to_the_end(engine, alone, plan)
        assert text(alone, 0) == texts[row]


def test_a_row_ends_at_its_length_and_at_an_end_of_sequence():
    engine = engine_for("perfect")
    wanted = request([6, 6], [17, 5])
    state = engine.admit(wanted)
    rounds_to_the_end(engine, state, GREEDY)
    full = text(state, 0)
    assert [len(text(state, row)) for row in range(2)] == wanted.end_len

    stop = full[6 + 9]  # in the middle of an accepted window
    state = engine.admit(dataclasses.replace(wanted, eos_ids=[1000, stop]))
    rounds_to_the_end(engine, state, GREEDY)
    assert text(state, 0) == full[: full.index(stop, 6) + 1]


# ----------------------------------------------------------------------------------------------------------------------
# A perfect draft is never rejected


@pytest.mark.parametrize("plan", [GREEDY, SAMPLING], ids=["greedy", "sampling"])
@pytest.mark.parametrize("num_steps,new_tokens", [(1, 8), (3, 27), (3, 28), (3, 29)])
def test_a_perfect_draft_takes_the_fewest_rounds(num_steps: int, new_tokens: int, plan: SamplingPlan):
    """The target drafts for itself: after prefill's token, n more take ceil(n / (k + 1)) rounds, ragged rows or not. One
    wrong slot in the draft's cache would cost a round; exactness would never show it."""
    engine = engine_for("perfect", num_steps=num_steps)
    state = engine.admit(request([11, 4], [1 + new_tokens] * 2, plan))
    assert rounds_to_the_end(engine, state, plan) == math.ceil(new_tokens / (num_steps + 1))


def test_a_broken_draft_cache_costs_rounds_and_nothing_else():
    """The control of the test above."""
    engine = engine_for("perfect")
    wanted = request([20, 20], [41, 41])
    texts, counts = [], []
    for broken in (False, True):
        state = engine.admit(wanted)
        if broken:
            for cache in engine.draft.programs[0].pool.caches.values():
                cache[:, :15] = 0
        counts.append(rounds_to_the_end(engine, state, GREEDY))
        texts.append(text(state, 0))
    assert texts[0] == texts[1] and counts[0] == 10 < counts[1]


# ----------------------------------------------------------------------------------------------------------------------
# Nothing is built after warm-up


def built(engine: Engine) -> dict[str, object]:
    runners = engine.programs()
    return {
        "traced calls": counters["stats"]["calls_captured"],
        "programs": [len(r.built) for r in runners],
        "captures": [len(r.captured) for r in runners],
        "pools": [(r.pool.rows, r.pool.capacity) for r in runners],
        "rounds": set(engine._warmed),
        "artifacts": len(engine.compiler.artifacts),
    }


@pytest.mark.parametrize("plan", [GREEDY, SAMPLING], ids=["greedy", "sampling"])
@pytest.mark.parametrize("kind", ["ngram", "similar"])
def test_fifty_rounds_over_changing_requests_build_nothing(kind: str, plan: SamplingPlan, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trace_once, "sharing", False)
    engine = engine_for(kind, GPU_IN_NAME)
    engine.admit(request([2, 2, 2], [8] * 3, plan))
    rounds(engine, engine._buffers.rows(4), plan, 1)
    before, done = built(engine), 0
    while done < 50:
        batch = random.choice([3, 4])  # a bucket of 4 rows
        lengths = [random.randrange(1, 60) for _ in range(batch)]
        state = engine.admit(request(lengths, [random.randrange(2, 40) for _ in range(batch)], plan, temperature=0.7))
        rounds(engine, state, plan, 10)
        done += 10
    assert built(engine) == before


def test_what_is_counted_as_built_is_counted(monkeypatch: pytest.MonkeyPatch):
    """The control of the test above: another bucket is something new."""
    monkeypatch.setattr(trace_once, "sharing", False)
    engine = engine_for("similar", GPU_IN_NAME)
    engine.admit(request([2, 2, 2], [8] * 3))
    before = built(engine)
    engine.admit(request([3] * 5, [8] * 5))  # nobody else admits 5 rows
    after = built(engine)
    assert after["traced calls"] > before["traced calls"]
    assert all(after[name] != before[name] for name in ("programs", "captures", "pools", "rounds"))
