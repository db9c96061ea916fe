"""Toy languages whose distribution is known: what a sampler's text is compared with."""

from __future__ import annotations

import itertools

import torch

from spec_compile.ops.sampling import DRAFT_STREAM, sample_token

VOCAB, DRAFTS = 4, 3


def conditional_distribution(temperature=1.0, dtype=torch.float64):
    """A language: for every prefix of up to DRAFTS tokens a distribution over the next. dict prefix -> [V]."""
    prefixes = [p for n in range(DRAFTS + 1) for p in itertools.product(range(VOCAB), repeat=n)]
    return {p: (torch.randn(VOCAB, dtype=dtype) * temperature).softmax(0) for p in prefixes}


def joint_distribution(distribution):
    """The distribution of DRAFTS + 1 tokens: [V] * (DRAFTS + 1)."""
    return continued(distribution, ())


def continued(distribution, text):
    """The distribution of DRAFTS + 1 tokens that begin with ``text`` and go on by ``distribution``: [V] * (DRAFTS + 1)."""
    joint = torch.zeros([VOCAB] * (DRAFTS + 1), dtype=torch.float64)
    for rest in itertools.product(range(VOCAB), repeat=DRAFTS + 1 - len(text)):
        full = (*text, *rest)
        steps = [distribution[full[:i]][full[i]] for i in range(len(text), DRAFTS + 1)]
        joint[full] = torch.stack(steps).prod() if steps else 1.0
    return joint


def total_variation(a, b):
    return float((a - b).abs().sum() / 2)


def one_hot(token):
    return torch.nn.functional.one_hot(torch.tensor(token), VOCAB).double()


def restricted(distribution):
    """A draft over part of the vocabulary: nothing outside tokens 0 and 1, as with a reduced lm_head."""
    out = {}
    for prefix, probs in distribution.items():
        kept = probs.clone()
        kept[2:] = 0
        out[prefix] = kept / kept.sum()
    return out


def overflowing(distribution):
    """(what the drafts are drawn from, what the draft hands over) by a draft whose states overflow behind some texts: from
    weights that are all NaN ``sample_token`` takes token 0."""
    lost = {prefix for prefix in distribution if prefix and prefix[-1] < VOCAB // 2}
    nan = torch.full((VOCAB,), float("nan"), dtype=torch.float64)
    proposal = {p: one_hot(0) if p in lost else q for p, q in distribution.items()}
    return proposal, {p: nan if p in lost else q for p, q in distribution.items()}


def argmax_of(distribution):
    return {prefix: one_hot(int(probs.argmax())) for prefix, probs in distribution.items()}


def draft_tokens(proposal, seed, position):
    """Drafts drawn as a round draws them, token i at position + 1 + i: int64 [len(seed), DRAFTS]."""
    drafts = torch.zeros(seed.shape[0], 0, dtype=torch.int64)
    for i in range(DRAFTS):
        probs = torch.stack([proposal[tuple(row)] for row in drafts.tolist()]).float()
        token = sample_token(probs, seed, position + 1 + i, DRAFT_STREAM)
        drafts = torch.cat([drafts, token[:, None]], 1)
    return drafts


def tables(distribution, drafts, count):
    """``distribution`` at the first ``count`` slots of every row of drafts: float32 [rows, count, V]."""
    rows = [tuple(row) for row in drafts.tolist()]
    stack = {p: torch.stack([distribution[p[:i]] for i in range(count)]).float() for p in set(rows)}
    return torch.stack([stack[p] for p in rows])
