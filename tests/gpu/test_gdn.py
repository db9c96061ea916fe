"""Kernels of gated delta nets against one contract (see ``gdn_contract``): Triton's, and fla's and FlashInfer's on a device.

The Triton kernels run in the interpreter too (see ``kernel_checks``).
"""

from __future__ import annotations

import dataclasses
import functools
import random

import pytest
import torch
from gdn_contract import (
    Heads,
    Implementation,
    check_prompts,
    check_unseen,
    check_window,
    close,
    pack_mask,
    random_parents,
    random_pool,
    random_window,
    same,
    split,
)
from kernel_checks import DEVICE, INTERPRETED, check_capture, check_no_host_sync, needs_device, needs_kernels, to_device
from torch.library import opcheck

from spec_compile.hardware import detect_hardware
from spec_compile.ops import linear_attention as generic
from spec_compile.ops import providers
from spec_compile.ops.kernels import gdn, gdn_prefill, gdn_unit, gdn_window
from spec_compile.ops.providers import DeltaNode
from spec_compile.ops.providers.delta_examples import example_arguments

pytestmark = [pytest.mark.gpu, needs_kernels]

SMALL = Heads()
UNEVEN = Heads(2, 6, 24, 40)  # no power of 2 anywhere
LONG = Heads(1, 3, 80, 24)  # a commit takes key dims 32 at a time
MODELS = {  # key heads, value heads, dims; published config.json files
    "qwen3-next, qwen3.5-4b": Heads(16, 32, 128, 128),
    "qwen3.5-0.8b": Heads(16, 16, 128, 128),
    "qwen3.5-27b": Heads(16, 48, 128, 128),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROUNDED = {"fp32": 0, "bf16": 2, "fp16": 1}  # in a prompt: four factors of bfloat16 stand one behind another
SHAPES = pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])


def implementation(verify: str = "gdn_verify_triton") -> Implementation:
    """The kernels as ops on a device, bare in the interpreter."""
    if INTERPRETED:
        prefill = functools.partial(gdn_prefill.gdn_prefill, chunk=64)
        return Implementation(gdn.conv_verify, gdn.gdn_verify, gdn.gdn_commit, gdn_prefill.conv_prefill, prefill)
    ops = torch.ops.spec_compile
    providers.load_for(NODE, "triton")  # registers the ops
    providers.load_for(NODE, "flashinfer")
    return Implementation(
        ops.conv_verify, getattr(ops, verify), ops.gdn_commit, ops.conv_prefill, ops.gdn_prefill_triton, DEVICE
    )


SCALE = 128**-0.5  # FlashInfer compiles it into its kernels: one for all tests
NODE = DeltaNode("gdn_verify", "verify", 2, 4, 16, 32, 128, 128, False, torch.bfloat16)


@pytest.fixture(autouse=True)
def fresh_seed():
    seed = random.SystemRandom().randrange(1 << 31)
    print("seed", seed)  # shown when a test fails
    torch.manual_seed(seed)


# ----------------------------------------------------------------------------------------------------------------------
# Triton


@SHAPES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 4, 7, 8, 9, 16, 17, 33, 60])
def test_windows(num_tokens: int, tree: bool, dtype: str) -> None:
    check_window(implementation(), rows=3, num_tokens=num_tokens, tree=tree, dtype=DTYPES[dtype])


@SHAPES
@pytest.mark.parametrize("num_tokens", [4, 9, 33])
def test_what_is_not_seen_is_not_felt(num_tokens: int, tree: bool) -> None:
    check_unseen(implementation(), num_tokens=num_tokens, tree=tree)


@SHAPES
@pytest.mark.parametrize("heads", [UNEVEN, LONG], ids=["short", "long"])
def test_windows_of_uneven_dims(heads: Heads, tree: bool) -> None:
    check_window(implementation(), rows=2, num_tokens=5, tree=tree, heads=heads, bias=True)


@needs_device
@SHAPES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 4, 16, 17, 33, 60])
@pytest.mark.parametrize("model", MODELS)
def test_windows_of_models(model: str, num_tokens: int, tree: bool, dtype: str) -> None:
    check_window(implementation(), rows=2, num_tokens=num_tokens, tree=tree, heads=MODELS[model], dtype=DTYPES[dtype])


@needs_device
def test_windows_of_many_rows() -> None:
    """Tiles are wider where rows and heads fill the device."""
    check_window(implementation(), rows=33, num_tokens=4, tree=True, heads=MODELS["qwen3-next, qwen3.5-4b"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(1,), (0, 5, 2, 0, 70, 0), (63, 64, 65), (3, 64, 1, 129)], ids=str)
def test_prompts(lengths: tuple[int, ...], dtype: str) -> None:
    check_prompts(implementation(), lengths, dtype=DTYPES[dtype], rounded=ROUNDED[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_prompts_of_steep_decays(dtype: str) -> None:
    check_prompts(implementation(), (70, 40), dtype=DTYPES[dtype], rounded=ROUNDED[dtype], steep=True)


@needs_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", MODELS)
def test_prompts_of_models(model: str, dtype: str) -> None:
    """Chunks that are full, and last ones that are not."""
    check_prompts(implementation(), (70, 128, 5, 200), heads=MODELS[model], dtype=DTYPES[dtype], rounded=ROUNDED[dtype])


def test_prompts_of_uneven_dims() -> None:
    check_prompts(implementation(), (66, 3), heads=UNEVEN, bias=True)


@pytest.mark.parametrize("heads", [SMALL, UNEVEN, Heads(2, 2, 16, 16)], ids=["grouped", "uneven", "alike"])
def test_save_window(heads: Heads) -> None:
    """Keys and values bit by bit, gates within float32, weights widened; other slots and tokens as they were."""
    pool, w = random_pool(3, 7, heads, torch.bfloat16), random_window(3, 5, heads, torch.bfloat16)
    _, k, v = split(torch.randn(3, 5, heads.channels).bfloat16(), heads)
    a, b = (torch.cat([x, x], -1)[..., : heads.value] for x in (w.a, w.b))  # rows of something wider
    args = (k, v, a, b, w.A_log, w.dt_bias, pool.kv_window[0], pool.gate_window[0], pool.slots)
    there = [to_device(x) for x in args]
    weights = gdn_window.save_window(*there)
    generic._save_window(k, v, *generic.gates(a, b, w.A_log, w.dt_bias), *args[6:])
    same(there[6].cpu(), pool.kv_window[0])
    torch.testing.assert_close(there[7].cpu(), pool.gate_window[0], rtol=2e-6, atol=1e-6, equal_nan=True)
    same(weights.cpu(), torch.stack([w.A_log.float(), w.dt_bias.float()]))


@pytest.mark.parametrize("heads", [SMALL, UNEVEN, Heads(2, 2, 16, 16)], ids=["grouped", "uneven", "alike"])
def test_unit_prompts(heads: Heads) -> None:
    """Queries and keys of length 1, also of zeros; values bit by bit; out of views, for tokens that fill no block."""
    q, k, v = split(torch.randn(37, heads.channels).bfloat16(), heads)
    q[5] = 0
    found = gdn_unit.unit_prompts(*(to_device(x) for x in (q, k, v)))
    assert all(x.is_contiguous() and x.dtype == torch.bfloat16 for x in found)
    for dense, x in zip(found, (q, k), strict=False):
        torch.testing.assert_close(dense.cpu(), generic.unit_length(x.float()).bfloat16(), rtol=1e-2, atol=0)
    same(found[2].cpu(), v.contiguous())


# ----------------------------------------------------------------------------------------------------------------------
# fla


PROMPTS = DeltaNode("gdn_prefill", "prefill", None, None, 16, 32, 128, 128, False, torch.bfloat16)


def fla() -> Implementation:
    provider = providers.load_for(PROMPTS, "fla")
    problem = provider.supports(PROMPTS, detect_hardware(DEVICE)) or provider.probe().problem
    if problem is not None:
        pytest.skip(problem)
    return dataclasses.replace(implementation(), gdn_prefill=provider.lower(PROMPTS))


# Few shapes and types: fla tunes its kernels for each, 34 of them in the first run, most of a minute.
@needs_device
@pytest.mark.parametrize("lengths", [(1,), (0, 3, 64, 1, 129, 0), (300, 65)], ids=str)
def test_fla(lengths: tuple[int, ...]) -> None:
    heads = MODELS["qwen3-next, qwen3.5-4b"]
    check_prompts(fla(), lengths, heads=heads, dtype=torch.bfloat16, rounded=2)


@needs_device
def test_fla_on_another_model() -> None:
    check_prompts(fla(), (200, 65), heads=MODELS["qwen3.5-27b"], dtype=torch.bfloat16, rounded=2)


@needs_device
def test_fla_on_uneven_dims() -> None:
    check_prompts(fla(), (66, 3), heads=UNEVEN, dtype=torch.float16, bias=True, rounded=2)


@needs_device
def test_prefills_of_fla_do_not_share_their_rows() -> None:
    """It remembers lists of chunks by tensor: the same boundaries' tensor with other contents must not be taken for them."""
    prefill = fla().gdn_prefill
    q, k, v, *gates, one, _, cu_seqlens, scale = example_arguments(PROMPTS, torch.device(DEVICE), num_tokens=200, live=True)
    state, slots = one.new_zeros(3, *one.shape[1:]), torch.tensor([1, 2], dtype=torch.int32, device=DEVICE)
    cu_seqlens = torch.tensor([0, 0, 200], dtype=torch.int32, device=DEVICE)
    for middle in (3, 130):
        cu_seqlens[1] = middle
        out = prefill(q, k, v, *gates, state, slots, cu_seqlens, scale)
        expected_state, rest = torch.zeros_like(state, dtype=torch.float64), (slots, cu_seqlens, scale)
        expected = generic.prefill_reference(*(x.double() for x in (q, k, v)), *gates, expected_state, *rest)
        close(out, expected.cpu(), torch.bfloat16, 2)
        close(state[1:], expected_state[1:].cpu(), torch.bfloat16, 2)


@needs_device
def test_fla_is_registered_as_it_behaves() -> None:
    lowered = fla().gdn_prefill
    args = example_arguments(PROMPTS, torch.device(DEVICE), num_tokens=100, live=True)
    opcheck(lowered.plan, (args[9],))
    opcheck(lowered.op, (*args, lowered.plan(args[9])))


# ----------------------------------------------------------------------------------------------------------------------
# FlashInfer

# By (row, value head) pairs FlashInfer takes another kernel above 128 and keeps values in shared memory above 1024.
CHAINS = [(n, rows) for n in (1, 2, 4, 8, 16) for rows in (1, 6)] + [(4, 39)]


def needs_flashinfer(node: DeltaNode) -> None:
    provider = providers.load_for(node, "flashinfer")
    problem = provider.supports(node, detect_hardware(DEVICE)) or provider.probe().problem
    if problem is not None:
        pytest.skip(problem)


@needs_device
@pytest.mark.parametrize(("num_tokens", "rows"), CHAINS)
def test_flashinfer(num_tokens: int, rows: int) -> None:
    needs_flashinfer(NODE)
    heads = MODELS["qwen3-next, qwen3.5-4b"]
    check_window(implementation("gdn_verify_flashinfer"), rows=rows, num_tokens=num_tokens, heads=heads, dtype=torch.bfloat16)


@needs_device
@pytest.mark.parametrize("model", ["qwen3.5-0.8b", "qwen3.5-27b"])
def test_flashinfer_on_other_models(model: str) -> None:
    needs_flashinfer(NODE)
    check_window(implementation("gdn_verify_flashinfer"), rows=3, num_tokens=4, heads=MODELS[model], dtype=torch.bfloat16)


@needs_device
@pytest.mark.parametrize("num_tokens", [1, 4])
def test_one_row(num_tokens: int) -> None:
    """The contract's padding row makes two of one. FlashInfer itself fails for one row and one token."""
    heads = MODELS["qwen3-next, qwen3.5-4b"]
    needs_flashinfer(NODE)
    pool, w = random_pool(2, num_tokens + 1, heads, torch.bfloat16), random_window(1, num_tokens, heads, torch.bfloat16)
    qkv = split(torch.randn(1, num_tokens, heads.channels).bfloat16(), heads)
    gates, layer = (w.a, w.b, w.A_log, w.dt_bias), (pool.state[0], pool.kv_window[0], pool.gate_window[0], pool.slots[:1])
    expected = generic.verify_reference(
        *(x.double() for x in qkv), *gates, layer[0].double(), layer[1].double(), layer[2].clone(), layer[3], None, SCALE
    )
    for name in ("gdn_verify_triton", "gdn_verify_flashinfer"):
        there = [to_device(x) for x in (*qkv, *gates, *layer, None, SCALE)]
        out = implementation(name).gdn_verify(*there)
        assert out.is_contiguous()
        close(out, expected, torch.bfloat16)


@needs_device
def test_flashinfer_agrees_with_triton() -> None:
    """Both from the same float32 states: far closer to each other than bfloat16 is to the exact result."""
    needs_flashinfer(NODE)
    calls = lowered_calls(MODELS["qwen3-next, qwen3.5-4b"], torch.bfloat16, tree=False)
    ours, theirs = (op(*[to_device(x) for x in args]) for op, args in (calls["triton"], calls["flashinfer"]))
    close(theirs[:-1], ours[:-1].cpu().double(), torch.bfloat16)


# ----------------------------------------------------------------------------------------------------------------------
# As the runtime uses them


def lowered_calls(heads: Heads, dtype: torch.dtype, tree: bool) -> dict:
    """Every op of a verify and of a commit, with arguments on the CPU: {name: (op, arguments)}."""
    ops = torch.ops.spec_compile
    implementation()
    pool, w = random_pool(3, 6, heads, dtype), random_window(3, 4, heads, dtype)
    pool = type(pool)(**{name: value.nan_to_num() for name, value in vars(pool).items()})
    mask = pack_mask(random_parents(3, 4, tree)) if tree else None
    q, k, v = (x.contiguous() for x in split(torch.randn(3, 4, heads.channels).to(dtype), heads))
    layer = (pool.state[0], pool.kv_window[0], pool.gate_window[0], pool.slots)
    verify = (q, k, v, w.a, w.b, w.A_log, w.dt_bias, *(x.clone() for x in layer), mask, SCALE)
    x = w.x.contiguous()
    path = torch.tensor([[0, 1, -1], [0, -1, -1], [0, 2, 3]], dtype=torch.int32) if tree else None
    states = (pool.state, pool.conv_state, pool.kv_window, pool.gate_window, pool.conv_window, pool.slots)
    cu_seqlens = torch.tensor([0, 1, 4], dtype=torch.int32)
    packed = [y[0] for y in (q, k, v, w.a, w.b)]
    conv = (x, w.weight, None, pool.conv_state[1].clone(), pool.conv_window[1].clone(), pool.slots, mask)
    calls = {
        "triton": (ops.gdn_verify_triton.default, verify),
        "conv": (ops.conv_verify.default, conv),
        "commit": (ops.gdn_commit.default, (*states, path, torch.tensor([2, 0, 1], dtype=torch.int32))),
    }
    if not tree:
        calls["flashinfer"] = (ops.gdn_verify_flashinfer.default, verify)
        prompt = (*packed, w.A_log, w.dt_bias, pool.state[1].clone(), pool.slots[:2], cu_seqlens, SCALE)
        calls["prefill"] = (ops.gdn_prefill_triton.default, prompt)
        calls["conv prefill"] = (
            ops.conv_prefill.default,
            (x[0], w.weight, None, pool.conv_state[1].clone(), pool.slots[:2], cu_seqlens),
        )
    return calls


CALLS = [(name, False) for name in ("triton", "conv", "commit", "flashinfer", "prefill", "conv prefill")]
CALLS += [(name, True) for name in ("triton", "conv", "commit")]


@needs_device
@pytest.mark.parametrize(("name", "tree"), CALLS)
def test_captured_without_host_sync_and_registered(name: str, tree: bool) -> None:
    if name == "flashinfer":
        needs_flashinfer(NODE)
    heads = MODELS["qwen3-next, qwen3.5-4b"] if name == "flashinfer" else SMALL
    op, args = lowered_calls(heads, torch.bfloat16, tree)[name]
    check_no_host_sync(op, [to_device(x) for x in args])
    check_capture(op, [to_device(x) for x in args])
    opcheck(op, [to_device(x) for x in args])
