"""Gated delta nets on the CPU: the references against a token-by-token recurrence in float64, and the ops' registration."""

from __future__ import annotations

import pytest
import torch
from gdn_contract import (
    Heads,
    Implementation,
    check_prompts,
    check_unseen,
    check_window,
    pack_mask,
    random_parents,
    random_pool,
    random_window,
    split,
)
from torch.library import opcheck

from spec_compile.ops import linear_attention as ops

REFERENCE = Implementation(ops.conv_verify, ops.gdn_verify, ops.gdn_commit, ops.conv_prefill, ops.gdn_prefill)


pytestmark = pytest.mark.usefixtures("fresh_seed")


@pytest.mark.parametrize("num_tokens", [1, 2, 4, 8, 33])
@pytest.mark.parametrize("tree", [False, True])
def test_windows(num_tokens, tree):
    check_window(REFERENCE, rows=3, num_tokens=num_tokens, tree=tree)


def test_windows_of_other_kinds():
    check_window(REFERENCE, rows=2, num_tokens=5, tree=True, dtype=torch.bfloat16, bias=True)
    check_window(REFERENCE, rows=2, num_tokens=5, heads=Heads(3, 3, 8, 8))
    check_window(REFERENCE, rows=1, num_tokens=60, tree=True, heads=Heads(1, 4, 8, 12))


@pytest.mark.parametrize("lengths", [(1,), (5, 2, 0, 70), (3, 64, 1, 129)])
def test_prompts(lengths):
    check_prompts(REFERENCE, lengths)
    check_prompts(REFERENCE, lengths, dtype=torch.bfloat16, bias=True, heads=Heads(1, 2, 8, 8))


@pytest.mark.parametrize("tree", [False, True])
def test_what_is_not_seen_is_not_felt(tree):
    for num_tokens in (4, 9, 33):
        check_unseen(REFERENCE, num_tokens=num_tokens, tree=tree)


def test_a_wrong_ancestor_is_seen():
    """The contract tells a chain from a tree: an implementation that drops the mask fails it."""

    def no_mask(*args):
        return ops.gdn_verify(*args[:-2], None, args[-1])

    wrong = Implementation(ops.conv_verify, no_mask, ops.gdn_commit, ops.conv_prefill, ops.gdn_prefill)
    with pytest.raises(AssertionError, match="error"):
        check_window(wrong, rows=4, num_tokens=9, tree=True)


def test_a_state_that_moves_too_far_is_seen():
    def one_more(*args):
        ops.gdn_commit(*args[:-1], (args[-1] + (args[-1] > 0)).to(torch.int32))

    wrong = Implementation(ops.conv_verify, ops.gdn_verify, one_more, ops.conv_prefill, ops.gdn_prefill)
    with pytest.raises(AssertionError):
        check_window(wrong, rows=4, num_tokens=4)


@pytest.mark.parametrize("tree", [False, True])
def test_opcheck(tree):
    heads = Heads()
    pool = random_pool(3, 6, heads, torch.float32)
    for tensor in (pool.state, pool.conv_state, pool.kv_window, pool.gate_window, pool.conv_window):
        tensor.nan_to_num_()
    w = random_window(3, 4, heads, torch.float32)
    mask = pack_mask(random_parents(3, 4, tree=True)) if tree else None
    slots = torch.tensor([2, 1, 3], dtype=torch.int32)  # distinct: which row writes the null slot last is open
    y = ops.conv_verify(w.x, w.weight, None, pool.conv_state[1], pool.conv_window[1].clone(), slots, mask)
    qkv = [x.contiguous() for x in split(y, heads)]
    windows = (pool.state[1].clone(), pool.kv_window[1].clone(), pool.gate_window[1].clone(), slots, mask, 0.3)
    opcheck(ops.conv_verify, (w.x, w.weight, None, pool.conv_state[1].clone(), pool.conv_window[1].clone(), slots, mask))
    opcheck(ops.gdn_verify, (*qkv, w.a, w.b, w.A_log, w.dt_bias, *windows))
    opcheck(ops.gated_delta_rule, (*qkv, *ops.gates(w.a, w.b, w.A_log, w.dt_bias), *windows))
    path = torch.tensor([[0, 1, -1], [0, -1, -1], [0, 2, 3]], dtype=torch.int32) if tree else None
    states = (pool.state, pool.conv_state, pool.kv_window, pool.gate_window, pool.conv_window)
    opcheck(ops.gdn_commit, (*states, slots, path, torch.tensor([2, 0, 1], dtype=torch.int32)))
    cu_seqlens = torch.tensor([0, 1, 4], dtype=torch.int32)
    packed = [x[0] for x in (*qkv, w.a, w.b)]
    opcheck(ops.gdn_prefill, (*packed, w.A_log, w.dt_bias, pool.state[0].clone(), slots[:2], cu_seqlens, 0.3))
    opcheck(ops.conv_prefill, (w.x[0], w.weight, None, pool.conv_state[0].clone(), slots[:2], cu_seqlens))


def test_precomputed_gates_give_the_same():
    """What capture emits and what ``fold_gates`` makes of it."""
    heads = Heads()
    pool, w = random_pool(2, 4, heads, torch.float32), random_window(2, 4, heads, torch.float32)
    q, k, v = split(torch.randn(2, 4, heads.channels), heads)
    kv, gate = pool.kv_window[0].clone(), pool.gate_window[0].clone()
    g, beta = ops.gates(w.a, w.b, w.A_log, w.dt_bias)
    out = ops.gated_delta_rule(q, k, v, g, beta, pool.state[0], kv, gate, pool.slots, None, 0.5)
    args = (pool.state[0], pool.kv_window[0], pool.gate_window[0], pool.slots, None, 0.5)
    assert torch.equal(out, ops.gdn_verify(q, k, v, w.a, w.b, w.A_log, w.dt_bias, *args))
    assert torch.equal(kv.nan_to_num(), pool.kv_window[0].nan_to_num())
    assert torch.equal(gate.nan_to_num(), pool.gate_window[0].nan_to_num())
