"""The stateless randomness is uniform, exponential and independent; the warpers are transformers' own, row by row."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from torch.library import opcheck
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from spec_compile.ops.sampling import (
    ACCEPT_STREAM,
    DRAFT_STREAM,
    TARGET_STREAM,
    exponential,
    noise_key,
    sample_token,
    suppress_tokens,
    uniform,
    warp_logits,
)

pytestmark = pytest.mark.usefixtures("fresh_seed")


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def seeds(count):
    return torch.randint(-(1 << 62), 1 << 62, (count,))


# ----------------------------------------------------------------------------------------------------------------------
# The hashes, against Python's unbounded integers

MASK_32, MASK_64 = (1 << 32) - 1, (1 << 64) - 1


def mix_64(x):
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK_64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK_64
    return x ^ x >> 31


def key_by_hand(seed, position, stream):
    golden = 0x9E3779B97F4A7C15
    return mix_64(mix_64(seed + (stream + 1) * golden & MASK_64) + position * golden & MASK_64)


def exponential_by_hand(seed, position, stream, token):
    key = key_by_hand(seed, position, stream)
    x = token * 0x9E3779B1 + key & MASK_32
    x = (x ^ x >> 17) * 0xED5AD4BB + (key >> 32) & MASK_32
    x = (x ^ x >> 11) * 0xAC4C1B51 & MASK_32
    x = (x ^ x >> 15) * 0x31848BAB & MASK_32
    x ^= x >> 14
    return -math.log1p(-((x >> 1) + 0.5) / 2**31)


def test_numbers_are_the_specified_hash():
    """Pins the algorithm: other devices must compute the same, and a seed must mean the same text tomorrow."""
    for stream in (DRAFT_STREAM, ACCEPT_STREAM, TARGET_STREAM):
        seed, position = seeds(20), torch.randint(1 << 20, (20,), dtype=torch.int32)
        keys = [key_by_hand(s, p, stream) for s, p in zip(seed.tolist(), position.tolist(), strict=True)]
        assert [key & MASK_64 for key in noise_key(seed, position, stream).tolist()] == keys
        wanted = torch.tensor([((key >> 33) + 0.5) / 2**31 for key in keys])
        torch.testing.assert_close(uniform(seed, position, stream), wanted.float(), rtol=2.5e-7, atol=0)  # two roundings
        noise = exponential(seed, position, stream, 50)
        for row, token in itertools.product(range(20), (0, 1, 17, 49)):
            wanted = exponential_by_hand(int(seed[row]), int(position[row]), stream, token)
            # u is rounded to float32, which moves -log(1 - u) the more the closer u is to 1
            rounding = 2.0**-23 * math.exp(wanted)
            assert math.isclose(float(noise[row, token]), wanted, rel_tol=1e-5, abs_tol=rounding)


def test_uniform_is_uniform():
    count = 200_000
    u = uniform(seeds(1), torch.arange(count), ACCEPT_STREAM).double()  # consecutive positions of one row
    assert u.dtype == torch.float64 and u.min() > 0 and u.max() < 1
    distance = (u.sort().values - (torch.arange(count) + 0.5) / count).abs().max()  # Kolmogorov-Smirnov
    assert distance < 3 / count**0.5
    lagged = torch.corrcoef(torch.stack([u[:-2], u[1:-1], u[2:]]))
    assert (lagged - torch.eye(3)).abs().max() < 6 / count**0.5


@pytest.mark.parametrize("along", ["vocabulary", "positions", "seeds"])
def test_exponential_is_exponential(along):
    count = 200_000
    if along == "vocabulary":
        noise = exponential(seeds(1), int32([7]), TARGET_STREAM, count)[0]
    elif along == "positions":
        noise = exponential(seeds(1), torch.arange(count), TARGET_STREAM, 3)[:, 1]
    else:
        noise = exponential(torch.arange(count), torch.zeros(count), TARGET_STREAM, 3)[:, 1]  # seeds 0, 1, 2, ...
    assert noise.min() > 0 and noise.isfinite().all()
    u = 1 - (-noise.double()).exp()
    distance = (u.sort().values - (torch.arange(count) + 0.5) / count).abs().max()
    assert distance < 3 / count**0.5
    assert torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1].abs() < 6 / count**0.5


def test_small_exponentials_are_not_quantised():
    """The minimum over a large vocabulary decides a race, so small numbers must not pile up on a coarse grid."""
    noise = exponential(seeds(40), torch.arange(40), TARGET_STREAM, 100_000)
    smallest = noise.topk(50, largest=False).values
    assert (smallest.diff(dim=1) > 0).float().mean() > 0.999
    lowest = noise.amin(1).double() * 100_000  # exponential with mean 1 again
    assert 0.3 < lowest.mean() < 2.2


def test_streams_positions_and_seeds_are_independent():
    count, seed = 50_000, seeds(1)
    position = torch.arange(count)
    series = [
        uniform(seed, position, DRAFT_STREAM),
        uniform(seed, position, ACCEPT_STREAM),
        uniform(seed, position, TARGET_STREAM),
        uniform(seed + 1, position, ACCEPT_STREAM),
        uniform(seed ^ (1 << 40), position, ACCEPT_STREAM),
        exponential(seed, position, ACCEPT_STREAM, 2)[:, 0],
        exponential(seed, position, TARGET_STREAM, 2)[:, 1],
    ]
    correlation = torch.corrcoef(torch.stack(series).double())
    assert (correlation - torch.eye(len(series))).abs().max() < 6 / count**0.5


def test_uniform_broadcasts_over_slots():
    seed, position = seeds(5), torch.randint(90, (5, 3))
    table = uniform(seed[:, None], position, ACCEPT_STREAM)
    for row, slot in itertools.product(range(5), range(3)):
        alone = uniform(seed[row], position[row, slot], ACCEPT_STREAM)
        assert float(table[row, slot]) == float(alone)


# ----------------------------------------------------------------------------------------------------------------------
# sample_token


def test_samples_follow_the_probabilities():
    count, probs = 100_000, torch.randn(12).softmax(-1)
    for seed, position in [(seeds(count), int32([5] * count)), (seeds(1).expand(count), torch.arange(count).int())]:
        tokens = sample_token(probs.expand(count, -1), seed, position, TARGET_STREAM)
        observed = torch.bincount(tokens, minlength=12) / count
        assert (observed - probs).abs().max() < 6 * (0.25 / count) ** 0.5


def test_scale_of_the_weights_does_not_matter():
    probs, seed, position = torch.rand(64, 300), seeds(64), torch.randint(99, (64,), dtype=torch.int32)
    tokens = sample_token(probs, seed, position, DRAFT_STREAM)
    assert tokens.unique().numel() > 30
    assert tokens.equal(sample_token(probs * 0.125, seed, position, DRAFT_STREAM))


def test_impossible_tokens_never_win():
    probs = torch.zeros(20_000, 64)
    probs[:, 5], probs[:, 63] = 1e-30, 1e-30  # nothing but the zeros is far away
    tokens = sample_token(probs, seeds(20_000), torch.arange(20_000).int(), TARGET_STREAM)
    assert set(tokens.tolist()) == {5, 63}


def test_a_padding_row_gets_a_valid_token():
    token = sample_token(torch.zeros(2, 9), seeds(2), int32([0, 0]), DRAFT_STREAM)
    assert token.dtype == torch.int64 and ((token >= 0) & (token < 9)).all()


def test_a_row_depends_on_its_seed_and_position_alone():
    probs, seed = torch.randn(16, 500).softmax(-1), seeds(16)
    position = torch.randint(1000, (16,), dtype=torch.int32)
    tokens = sample_token(probs, seed, position, DRAFT_STREAM)
    order = torch.randperm(16)[:5]
    assert sample_token(probs[order], seed[order], position[order], DRAFT_STREAM).equal(tokens[order])
    assert sample_token(probs, seed, position, DRAFT_STREAM).equal(tokens)
    assert not sample_token(probs, seed, position + 1, DRAFT_STREAM).equal(tokens)
    assert not sample_token(probs, seed + 1, position, DRAFT_STREAM).equal(tokens)
    assert not sample_token(probs, seed, position, TARGET_STREAM).equal(tokens)


# ----------------------------------------------------------------------------------------------------------------------
# warp_logits against transformers

OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
CASES = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 10_000},  # more than the vocabulary
    {"top_p": 1e-6},  # only the most likely token is left
    {"top_p": 0.0},
    {"top_p": 0.4},
    {"top_p": 0.95},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.8},
    {"temperature": 0.6, "top_k": 50, "top_p": 0.95, "min_p": 0.05},
    {"top_p": 0.7, "min_p": 0.2},
]


def warped_by_transformers(row, case):
    """generate()'s processors in generate()'s order (GenerationMixin._get_logits_processor) on one row of logits."""
    case = OFF | case
    processors = LogitsProcessorList()
    if case["temperature"] != 1.0:
        processors.append(TemperatureLogitsWarper(case["temperature"]))
    if case["top_k"] != 0:
        processors.append(TopKLogitsWarper(case["top_k"]))
    if case["top_p"] < 1.0:
        processors.append(TopPLogitsWarper(case["top_p"]))
    if case["min_p"] > 0:
        processors.append(MinPLogitsWarper(case["min_p"]))
    return processors(None, row[None].float())[0].softmax(-1)


def rows_of(cases):
    columns = {name: [(OFF | case)[name] for case in cases] for name in OFF}
    arguments = [torch.tensor(columns["temperature"]), torch.tensor(columns["top_k"])]
    arguments += [torch.tensor(columns["top_p"], dtype=torch.float64), torch.tensor(columns["min_p"])]
    static = {
        "max_top_k": max(columns["top_k"]),
        "use_top_p": min(columns["top_p"]) < 1,
        "use_min_p": max(columns["min_p"]) > 0,
    }
    return arguments, static


def assert_warped(logits, cases):
    arguments, static = rows_of(cases)
    probs = warp_logits(logits, *arguments, **static)
    assert probs.dtype == torch.float32 and probs.shape == logits.shape
    torch.testing.assert_close(probs.sum(-1), torch.ones(len(cases)), rtol=1e-5, atol=0)
    for row, case in enumerate(cases):
        expected = warped_by_transformers(logits[row], case)
        assert (probs[row] > 0).equal(expected > 0), case
        torch.testing.assert_close(probs[row], expected, rtol=1e-5, atol=1e-9)


def logits_of(kind, rows, vocab=200):
    logits = torch.randn(rows, vocab) * 3
    if kind == "ties":
        logits = (logits * 2).round() / 2  # a dozen values, so that every boundary falls into a tie
    if kind == "flat":
        logits = torch.zeros(rows, vocab)
    if kind == "masked":  # suppressed tokens arrive as -inf
        logits = logits.masked_fill(torch.rand(rows, vocab) < 0.5, float("-inf"))
    return logits.to(torch.bfloat16) if kind == "bfloat16" else logits


@pytest.mark.parametrize("kind", ["random", "ties", "flat", "masked", "bfloat16"])
def test_warp_logits_rows_of_every_kind(kind):
    """All cases in one batch: what one row uses must not touch its neighbours."""
    cases = random.sample(CASES, len(CASES))
    assert_warped(logits_of(kind, len(cases)), cases)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_warp_logits_one_setting_for_all(case):
    """As generate() calls it, with only the static branches that are needed."""
    assert_warped(logits_of("random", 4), [case] * 4)


LISTED = [
    {"top_k": 20, "top_p": 0.77},
    {"top_k": 50, "top_p": 0.943, "temperature": 0.6},
    {"top_k": 7, "top_p": 0.31, "temperature": 2.0},
    {"top_k": 1, "top_p": 0.5},
    {"top_k": 300, "top_p": 0.88},
    {"top_k": 33, "top_p": 1e-6},
    {"top_k": 33, "top_p": 0.0},
    {"top_k": 12},
    {"top_k": 25, "top_p": 0.613, "min_p": 0.2},
]


@pytest.mark.parametrize("kind", ["random", "ties", "masked", "bfloat16"])
def test_warp_logits_without_a_sort(kind):
    """The short cut keeps as many tokens of every value as the sort; which ones of a split tie is the sort's chance."""
    for _ in range(20):
        shares = [{"top_p": case["top_p"] * random.uniform(0.9, 1)} if "top_p" in case else {} for case in LISTED]
        cases = [case | share for case, share in zip(LISTED, shares, strict=True)]
        arguments, static = rows_of(cases)
        logits = logits_of(kind, len(cases))
        sorted_probs = warp_logits(logits, *arguments, **static)
        probs = warp_logits(logits, *arguments, **static, every_row_top_k=True)
        for row in range(len(cases)):
            for value in logits[row][sorted_probs[row] > 0].unique():
                ties = logits[row] == value
                torch.testing.assert_close(probs[row, ties].sort()[0], sorted_probs[row, ties].sort()[0])
            assert int((probs[row] > 0).sum()) == int((sorted_probs[row] > 0).sum())
            if kind == "random":
                assert (probs[row] > 0).equal(sorted_probs[row] > 0)


def test_warpers_do_remove_something():
    logits = logits_of("random", 1)
    for case in ({"top_k": 5}, {"top_p": 0.4}, {"min_p": 0.1}):
        arguments, static = rows_of([case])
        assert 0 < int((warp_logits(logits, *arguments, **static) > 0).sum()) < 100


# ----------------------------------------------------------------------------------------------------------------------
# suppress_tokens against transformers


def test_suppress_tokens_against_transformers():
    num_tokens, vocab, eos = 4, 12, [3, 7]
    prompt_lengths, min_new = [5, 5, 5, 2], [0, 3, 6, 4]
    cache_len = [4, 4, 6, 4]  # rows 0 and 1 have no new token yet: the root is the prompt's last
    logits = torch.randn(4, num_tokens, vocab)
    min_len = int32([p + m for p, m in zip(prompt_lengths, min_new, strict=True)])
    original = logits.clone()
    result = suppress_tokens(logits, torch.tensor([*eos, -1]), int32(cache_len), min_len)
    assert logits.equal(original)
    changed = 0
    for b, j in itertools.product(range(4), range(num_tokens)):
        processor = MinNewTokensLengthLogitsProcessor(prompt_lengths[b], min_new[b], eos)
        text = torch.zeros(1, cache_len[b] + 1 + j, dtype=torch.int64)  # what stands before slot j's prediction
        expected = processor(text, logits[b, j][None])[0]
        assert result[b, j].equal(expected), (b, j)
        changed += not expected.equal(logits[b, j])
    assert 0 < changed < 4 * num_tokens


@pytest.mark.parametrize("settings", [{}, {"max_top_k": 8}, {"use_top_p": True}, {"max_top_k": 8, "use_top_p": True},
                                      {"use_min_p": True}], ids=str)  # fmt: skip
def test_probabilities_that_are_not_finite_stay_so(settings):
    """No warper may make numbers of NaN: transformers' do not, and its sampling raises."""
    logits = torch.randn(6, 40)
    logits[1, 3], logits[2, 3], logits[3], logits[4, 5:30] = float("nan"), float("inf"), float("-inf"), float("nan")
    temperature, off = torch.ones(6), dict.fromkeys(("use_top_p", "use_min_p"), False)
    temperature[5] = 1e-42
    top_k, top_p, min_p = torch.full((6,), 5), torch.full((6,), 0.9), torch.full((6,), 0.1)
    for every_row in (False, True):
        static = {"max_top_k": 0, **off, **settings, "every_row_top_k": every_row}
        probs = warp_logits(logits, temperature, top_k, top_p, min_p, **static)
        assert probs[0].isfinite().all() and probs[1:].isnan().all()


# ----------------------------------------------------------------------------------------------------------------------
# Registration and tracing


def test_opcheck():
    opcheck(sample_token, (torch.rand(3, 11), seeds(3), int32([1, 2, 3]), TARGET_STREAM))


def test_warp_and_suppress_trace_into_one_graph():
    cases = CASES[-3:]
    arguments, static = rows_of(cases)
    logits = logits_of("random", 3)
    eos, cache_len, min_len = torch.tensor([2, -1]), int32([3, 4, 5]), int32([9, 4, 6])

    def step(logits):
        logits = suppress_tokens(logits[:, None], eos, cache_len, min_len)[:, 0]
        return warp_logits(logits, *arguments, **static)

    torch.testing.assert_close(torch.compile(step, backend="aot_eager", fullgraph=True)(logits), step(logits))
