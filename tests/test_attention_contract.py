"""The providers' contract itself: the torch provider keeps it on a CPU, and every planted fault breaks it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from attention_contract import BOUNDS, CASES, MAY_REFUSE, Case, check, errors, lowered, make_problem
from torch import Tensor

from spec_compile.hardware import Hardware
from spec_compile.ops import providers
from spec_compile.ops.providers import AttentionNode, fa4, torch_sdpa

H200 = Hardware("nvidia", "sm90", 132, "NVIDIA H200")
FP8 = torch.float8_e4m3fn
SMALL = {
    "chain": Case((33, 0, 64), 3, (4, 2), (32, 32), padding_rows=1),
    "tree": Case((33, 17), 6, (4, 2), (32, 16), tree=True),
    "window_sinks": Case((90, 3), 4, (4, 2), (32, 32), window=20, sinks=True),
    "window_sinks_tree": Case((90, 3), 8, (4, 2), (32, 32), window=4, sinks=True, tree=True),
    "softcap": Case((40,), 4, (4, 4), (32, 32), softcap=5.0, tree=True),
    "softcap_chain": Case((40, 7), 4, (4, 2), (32, 32), softcap=5.0),
    "prefill": Case((30, 0, 17), 0, (4, 2), (32, 32), packed=True, window=9),
    "latent": Case((40, 5), 3, (4, 1), (40, 32), tree=True, latent=True),
    "latent_chain": Case((40, 5), 3, (4, 1), (40, 32), latent=True),
    "latent_prefill": Case((20, 5), 0, (4, 1), (40, 32), packed=True, latent=True),
    "outliers": Case((30, 9), 4, (4, 2), (32, 32), tree=True, outliers=True),
    # Many short rows of one page each, as a CPU's pool has them: attended to together.
    "rows": Case((33, 20, 40, 31, 17), 1, (4, 2), (32, 16), 64, padding_rows=1, spare_columns=0),
    "rows_chain": Case((33, 20, 40, 31, 17), 3, (4, 2), (32, 16), 64, window=11, spare_columns=0),
    "rows_tree": Case((33, 20, 40, 31, 17), 9, (4, 2), (32, 32), 64, tree=True, spare_columns=0),
    "rows_softcap": Case((33, 20, 40, 31, 17), 2, (4, 2), (32, 16), 64, softcap=5.0, spare_columns=0),
    "rows_sinks_tree": Case((33, 20, 40, 31, 17), 7, (4, 2), (32, 32), 64, window=5, sinks=True, tree=True, spare_columns=0),
    "rows_latent": Case((33, 20, 40, 31, 17), 5, (4, 1), (40, 32), 64, tree=True, latent=True, spare_columns=0),
    "prompts": Case((30, 0, 17, 25, 40), 0, (4, 2), (32, 16), packed=True),
    "latent_prompts": Case((30, 17, 25, 40), 0, (4, 1), (40, 32), packed=True, latent=True),
    "broken_rows": Case((33, 20, 40, 31, 17), 4, (4, 2), (32, 32), 64, spare_columns=0, broken=True),
    "broken_chain": Case((33, 0, 64), 4, (4, 2), (32, 32), padding_rows=1, broken=True),
    "broken_tree": Case((33, 17, 3), 9, (4, 2), (32, 16), tree=True, sinks=True, broken=True),
    "broken_window": Case((90, 3), 5, (4, 2), (32, 32), window=3, softcap=5.0, broken=True),
    "broken_latent": Case((40, 5, 0), 5, (4, 1), (40, 32), tree=True, latent=True, broken=True),
    "broken_prefill": Case((30, 0, 17), 0, (4, 2), (32, 32), packed=True, broken=True),
    "broken_latent_prefill": Case((20, 5), 0, (4, 1), (40, 32), packed=True, latent=True, broken=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_the_torch_provider_keeps_it(name: str, dtype: torch.dtype) -> None:
    check("torch", SMALL[name], dtype, "cpu")


@pytest.mark.parametrize("name", SMALL)
def test_the_torch_provider_keeps_it_over_a_float8_cache(name: str) -> None:
    check("torch", SMALL[name], torch.bfloat16, "cpu", FP8)


@pytest.mark.parametrize("case", [Case((), 2, (4, 2), (16, 16), 1024, spare_columns=0),
                                  Case((), 2, (4, 2), (16, 16), 1024, spare_columns=0, softcap=5.0, sinks=True),
                                  Case((), 0, (4, 2), (16, 16), 1024, spare_columns=0, packed=True)],
                         ids=["windows", "windows with sinks", "prompts"])  # fmt: skip
@pytest.mark.parametrize(("lengths", "together"), [((33, 20, 40, 31), True), ((33, 20), False), ((500, 1, 1, 1, 1, 1), False),
                                                   ((900, 901, 902, 903), False)])  # fmt: skip
def test_rows_that_are_many_short_and_alike_share_a_call(case: Case, lengths: tuple, together: bool, monkeypatch) -> None:
    """Row by row a CPU takes some 50 us each, five times what plain transformers takes for 200 short prompts."""
    problem = make_problem(replace(case, lengths=lengths), torch.float32, "cpu")
    calls = []
    for module, name in ((torch.nn.functional, "scaled_dot_product_attention"), (torch_sdpa.generic, "masked_softmax_attend")):
        product = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, product=product, **kwargs: calls.append(1) or product(*args, **kwargs))
    lowered("torch", problem.case.node(torch.float32))(*problem.args)
    assert len(calls) == (1 if together else len(lengths))


# ----------------------------------------------------------------------------------------------------------------------
# Faults


def attend(*args: object) -> Tensor:
    return torch.ops.spec_compile.attention_torch(*args)


def change(position: int, make: Callable[[object], object]) -> Callable[..., Tensor]:
    """The op with one argument falsified."""

    def faulty(*args: object) -> Tensor:
        changed = list(args)
        changed[position] = make(args[position])
        return attend(*changed)

    return faulty


def no_append(q, k, v, k_cache, v_cache, *rest):
    return attend(q, k, v, k_cache.clone(), v_cache.clone(), *rest)


def stray_write(q, k, v, k_cache, v_cache, *rest):
    out = attend(q, k, v, k_cache, v_cache, *rest)
    unused = set(range(1, len(k_cache))) - set(rest[0].flatten().tolist())
    k_cache[max(unused), 3] = 1.0
    return out


def unwritten_head(*args):
    result = attend(*args)
    out = torch.empty_like(result)
    out[:, :, 1:] = result[:, :, 1:]
    return out


def sinks_twice(*args):
    *others, sinks = args
    return attend(*others, sinks + torch.log(torch.tensor(2.0)).to(sinks.dtype))


def forgets_a_key(q, k, v, k_cache, v_cache, table, cache_len, *rest):
    """The first slot of each row counts as never seen: its key is made hopeless before, and put back after."""
    first = k_cache[table[:, 0].long(), 0].clone()
    k_cache[table[:, 0].long(), 0] = -30.0 * q[:, 0].sign()
    out = attend(q, k, v, k_cache, v_cache, table, cache_len, *rest)
    k_cache[table[:, 0].long(), 0] = first
    return out


LONG = Case((1500,), 1, (8, 8), (64, 64))
FAULTS = {
    "a chain for a tree": (SMALL["tree"], change(7, lambda tree: None)),
    "lengths one short": (SMALL["chain"], change(6, lambda lengths: (lengths - 1).clamp(min=0))),
    "lengths one long": (SMALL["chain"], change(6, lambda lengths: lengths + 1)),
    "a window one wider": (SMALL["window_sinks"], change(9, lambda window: window + 1)),
    "no window": (SMALL["window_sinks"], change(9, lambda window: 0)),
    "no softcap": (SMALL["softcap"], change(10, lambda softcap: 0.0)),
    "no sinks": (SMALL["window_sinks"], change(11, lambda sinks: None)),
    "sinks counted twice": (SMALL["window_sinks"], sinks_twice),
    "pages in order": (SMALL["chain"], change(5, lambda table: table.sort(-1).values)),
    "nothing appended": (SMALL["chain"], no_append),
    "a write to an unused page": (SMALL["chain"], stray_write),
    "a head never written": (SMALL["chain"], unwritten_head),
    "one key of 1500 forgotten": (LONG, forgets_a_key),
    "scores off by two percent": (LONG, change(0, lambda q: q * 1.02)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_breaks_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, faulty = FAULTS[name]
    monkeypatch.setattr(providers, "load", lambda *_: SimpleNamespace(lower=lambda node: attend))
    check("sound", case, torch.bfloat16, "cpu")  # what the fault is planted in keeps the contract
    monkeypatch.setattr(providers, "load", lambda *_: SimpleNamespace(lower=lambda node: faulty))
    with pytest.raises(AssertionError):
        check("faulty", case, torch.bfloat16, "cpu")


def test_an_unquantised_window_breaks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a float8 cache a row's own window must be seen as later rounds will see it."""

    def attends_to_its_input(q, k, v, k_cache, v_cache, *rest):
        attend(q, k, v, k_cache, v_cache, *rest)
        return attend(q, k, v, k_cache.to(q.dtype), v_cache.to(q.dtype), *rest)

    case = Case((3, 0), 8, (4, 2), (32, 32))
    monkeypatch.setattr(providers, "load", lambda *_: SimpleNamespace(lower=lambda node: attends_to_its_input))
    with pytest.raises(AssertionError, match="errors"):
        check("faulty", case, torch.bfloat16, "cpu", FP8)


def test_errors_see_one_bad_vector_among_many() -> None:
    expected = torch.randn(50, 8, 4, 64, dtype=torch.float64)
    out = expected.clone()
    out[7, 3, 2] *= 1.05
    whole, worst = errors(out, expected)
    assert whole < BOUNDS[torch.bfloat16][0] and worst > BOUNDS[torch.bfloat16][1]
    out[0, 0, 0, 0] = float("nan")
    assert not all(found <= bound for found, bound in zip(errors(out, expected), (1e9, 1e9), strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# What a provider may refuse


@pytest.mark.parametrize("provider", [name for name in providers.PROVIDERS if name in MAY_REFUSE])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_only_what_is_listed_is_refused_on_an_h200(provider: str, dtype: torch.dtype) -> None:
    """So that a case that stops being run is noticed; and the list is not longer than it must be."""
    refused = {name for name, case in CASES.items() if providers.load(provider).supports(case.node(dtype), H200) is not None}
    assert refused == MAY_REFUSE[provider]


def test_every_provider_that_runs_here_has_a_list() -> None:
    node = CASES["chain8"].node(torch.bfloat16)
    able = {name for name in providers.PROVIDERS if providers.load(name).supports(node, H200) is None}
    assert able == set(MAY_REFUSE)


def test_float8_caches_are_read_where_it_is_said() -> None:
    node: AttentionNode = CASES["chain8"].node(torch.bfloat16, FP8)
    able = {name for name in providers.PROVIDERS if providers.load(name).supports(node, H200) is None}
    assert able == {"torch", "triton", "flashinfer"}, "the contract on a GPU skips what a provider refuses"


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("split_")])
def test_cases_named_so_are_split_on_an_h200(name: str) -> None:
    """Where a provider cut nothing, the case would not show that its merge is right."""
    case = CASES[name]
    heads, kv_heads = case.heads
    capacity = min(case.columns * case.page_size, case.window or 1 << 30)
    batch = len(case.lengths) + case.padding_rows
    rows = case.num_tokens * heads // kv_heads
    assert fa4.choose_splits(H200, batch, kv_heads, rows, capacity, case.page_size).folds > 1
