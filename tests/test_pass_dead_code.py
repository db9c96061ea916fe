"""What survives ``finish``: every write somebody can read, no write that only dead tensors receive."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from stage_graphs import Input, attention_inputs, names, run, runtime_inputs, stage_graph
from torch import Tensor

from spec_compile.passes.graph import finish

ROW = Input("x", torch.zeros(2, 6))


pytestmark = pytest.mark.usefixtures("fresh_seed")


# ----------------------------------------------------------------------------------------------------------------------
# Writes that are read


def read_by_a_view(x):
    y = x.clone()
    y[:, :2].mul_(3)
    return y + 1


def read_through_another_view(x):
    y = x.clone()
    y.transpose(0, 1).add_(1)
    return y[:, 1:]


def written_through_chunks(x):
    y = x.clone()
    left, _ = y.chunk(2, -1)
    left.zero_()
    return y


def written_through_an_unlisted_view(x):
    y = x.clone()
    y.narrow(1, 0, 2).fill_(7)
    return y


def written_through_two_views(x):
    y = x.clone()
    y.view(3, 4).flatten().t().mul_(2)
    return y


def assigned(x):
    y = torch.zeros_like(x)
    y.copy_(x)
    y.masked_fill_(x > 0, -1)
    return y


def copied_then_read_by_another_write(x):
    y = x.new_empty(2, 6)
    y.copy_(x)
    z = x.new_empty(2, 6)
    z.copy_(y)
    return z


def in_place_function(x):
    y = x + 1
    torch.relu_(y)
    return y


def accumulated_into_an_alias(x):
    y = x.new_zeros(2, 6)
    z = y.add_(x)
    y.mul_(2)
    return z


def read_by_its_own_write(x):
    y = x.new_zeros(2, 6)
    y[0].copy_(x[0])
    y[1].copy_(y[0])
    return y.sum(0)


LIVE = [
    read_by_a_view,
    read_through_another_view,
    written_through_chunks,
    written_through_an_unlisted_view,
    written_through_two_views,
    assigned,
    copied_then_read_by_another_write,
    in_place_function,
    accumulated_into_an_alias,
    read_by_its_own_write,
]


@pytest.mark.parametrize("fn", LIVE, ids=lambda fn: fn.__name__)
def test_a_write_that_is_read_stays(fn: Callable[[Tensor], Tensor]):
    graph = stage_graph(fn, "verify", x=ROW)
    x = torch.randn(2, 6)
    (out,) = run(finish(graph), x=x.clone())
    torch.testing.assert_close(out, fn(x.clone()), rtol=0, atol=0)


@pytest.mark.parametrize("op,expected", [(operator.iadd, 5.0), (operator.imul, 6.0), (operator.isub, -1.0)])
def test_in_place_operators_are_writes(op: Callable, expected: float):
    """Dynamo writes ``total += x`` as ``operator.iadd(total, x)``; a proxy would make a plain addition of it."""

    def fn(x):
        total = x.new_full((2, 6), 2.0)
        total.tracer.create_proxy("call_function", op, (total, x), {})
        return total

    (out,) = run(finish(stage_graph(fn, "verify", x=ROW)), x=torch.full((2, 6), 3.0))
    assert set(out.flatten().tolist()) == {expected}


def test_a_write_to_an_input_stays():
    def fn(x, history):
        history[:, :2].copy_(x[:, :2])
        return x + 1

    graph = finish(stage_graph(fn, "verify", x=ROW, history=Input("history", torch.zeros(2, 6))))
    x, history = torch.randn(2, 6), torch.zeros(2, 6)
    run(graph, x=x, history=history)
    assert torch.equal(history[:, :2], x[:, :2])


def test_an_op_that_writes_a_cache_stays_even_if_its_result_is_not_used():
    def fn(q, k, v, k_cache, v_cache, page_table, cache_len):
        args = (k_cache, v_cache, page_table, cache_len, None, 0.5, 0, 0.0, None)
        torch.ops.spec_compile.attention(q, k, v, *args)
        return q * 2

    graph = finish(stage_graph(fn, "verify", **attention_inputs()))
    assert names(graph) == ["attention", "mul"]


# ----------------------------------------------------------------------------------------------------------------------
# Work whose result is not read


def expanded_keys(x):
    """transformers' latent attention: expanded keys and values are filled, then replaced by the latent ones."""
    keys = x.new_empty(2, 12)
    keys[:, :6].copy_(x.exp())
    keys[:, 6:].copy_(x.sin())
    return x + 1


def assigned_but_unused(x):
    keys = torch.empty(2, 12)
    keys[:, :6] = x.exp()
    keys.mul_(2)
    return x + 1


def pure_but_unused(x):
    x.exp().sum(-1)
    return x + 1


def masks_that_nobody_asks(x):
    """What a mask leaves once the attention has its window as a number; ``&`` is ``operator.and_``."""
    (x > 0) & (x < 1) | (x > 2)
    return x + 1


DEAD = [expanded_keys, assigned_but_unused, pure_but_unused, masks_that_nobody_asks]


@pytest.mark.parametrize("fn", DEAD, ids=lambda fn: fn.__name__)
def test_what_nobody_reads_goes_with_all_that_computed_it(fn: Callable[[Tensor], Tensor]):
    graph = stage_graph(fn, "verify", x=ROW)
    assert len(names(graph)) > 1
    assert names(finish(graph)) == ["add"]


def test_unused_inputs_go():
    graph = finish(stage_graph(lambda x, y, z: x + z, "verify", x=ROW, y=Input("y", ROW.example), z=ROW))
    assert runtime_inputs(graph) == ["x", "x"]
