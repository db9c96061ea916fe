"""The ``fa4`` provider without a GPU: what it refuses, how it cuts the prefix, and what it asks of FlashAttention-4.

FA4's forward is stood in for by ``fa4_in_torch``; ``tests/gpu`` runs the real one.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import fa4_in_torch
import pytest
import torch
from attention_contract import Case, check, make_problem
from stage_graphs import Input, find, stage_graph
from test_triton_kernels import interpreter, run_interpreted  # noqa: F401 (a fixture)
from torch.library import opcheck

from spec_compile.hardware import Hardware
from spec_compile.ops import attention as generic
from spec_compile.ops import cascade
from spec_compile.ops.providers import AttentionNode, Availability, as_lowered, fa4
from spec_compile.ops.providers.fa4 import Splits, choose_splits, choose_tile
from spec_compile.passes.graph import CacheSlot
from spec_compile.passes.lower import lower as lower_graph

H200 = Hardware("nvidia", "sm90", 132, "NVIDIA H200")
B200 = Hardware("nvidia", "sm100", 148, "NVIDIA B200")


pytestmark = pytest.mark.usefixtures("fresh_seed")


@pytest.fixture
def fresh_probe() -> Iterator[None]:
    """What ``probe`` found is remembered; tests here change what there is to find."""
    fa4.probe.cache_clear(), fa4._interface.cache_clear()
    yield
    fa4.probe.cache_clear(), fa4._interface.cache_clear()


@pytest.fixture(params=[1, 3], ids="folds{}".format)
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """FA4 in PyTorch, and a number of folds."""
    monkeypatch.setattr(fa4, "_interface", fa4_in_torch.interface)
    monkeypatch.setattr(fa4, "choose_splits", lambda *args: Splits(request.param, 1))
    return request.param


def node(**changes: object) -> AttentionNode:
    fields = {
        "op": "attention", "stage": "verify", "batch": 2, "num_tokens": 8, "num_q_heads": 32, "num_kv_heads": 8,
        "head_dim": 128, "v_head_dim": 128, "page_size": 64, "window": 0, "softcap": 0.0, "has_sinks": False,
        "is_tree": True, "dtype": torch.bfloat16, "kv_dtype": torch.bfloat16,
    }  # fmt: skip
    return AttentionNode(**{**fields, **changes})  # type: ignore[arg-type]


PREFILL = {"op": "prefill_attention", "stage": "prefill", "batch": None, "num_tokens": None, "is_tree": False}

# ----------------------------------------------------------------------------------------------------------------------
# What it can do, and what it says when it cannot


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"is_tree": False, "num_tokens": 1, "stage": "draft"},
        {"window": 128, "has_sinks": True, "softcap": 30.0},
        {"page_size": 16, "num_tokens": 64, "head_dim": 80, "v_head_dim": 96, "num_q_heads": 40},
        {"dtype": torch.float16, "kv_dtype": torch.float16, "head_dim": 256, "v_head_dim": 256},
        PREFILL,
        PREFILL | {"window": 100, "has_sinks": True, "softcap": 30.0},
    ],
)
@pytest.mark.parametrize("hardware", [H200, B200, Hardware("nvidia", "sm110", 20, "NVIDIA Thor")])
def test_supports(changes: dict, hardware: Hardware) -> None:
    assert fa4.supports(node(**changes), hardware) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"op": "mla_attention"}, "MLA"),
        ({"op": "mla_prefill_attention"}, "MLA"),
        ({"dtype": torch.float32, "kv_dtype": torch.float32}, "torch.float32 is not float16 or bfloat16"),
        ({"kv_dtype": torch.float8_e4m3fn}, "cache's dtype torch.float8_e4m3fn differs"),
        ({"num_q_heads": 12}, "12 query heads are not a multiple of 8"),
        ({"page_size": 8}, "page size 8 is not a power of two"),
        ({"page_size": 24, "window": 100}, "page size 24"),
        ({**PREFILL, "page_size": 48}, "page size 48"),
        ({"head_dim": 72}, "head dims 72 and 128"),
        ({"v_head_dim": 272}, "head dims 128 and 272"),
    ],
)
def test_refuses_with_a_reason(changes: dict, words: str) -> None:
    assert words in fa4.supports(node(**changes), H200)


@pytest.mark.parametrize("arch", ["sm80", "sm89", "sm120", "gfx942", "cpu"])
def test_refuses_other_devices(arch: str) -> None:
    vendor = {"g": "amd", "c": "cpu"}.get(arch[0], "nvidia")
    assert f"not on {arch}" in fa4.supports(node(), Hardware(vendor, arch, 100, arch))


@pytest.mark.parametrize("dims,fits", [((192, 128), True), ((256, 256), True), ((192, 192), False), ((256, 128), False)])
def test_blackwell_takes_fewer_head_dims(dims: tuple[int, int], fits: bool) -> None:
    wide = node(head_dim=dims[0], v_head_dim=dims[1])
    assert fa4.supports(wide, H200) is None
    assert (fa4.supports(wide, B200) is None) == fits


# ----------------------------------------------------------------------------------------------------------------------
# probe()


def installed(monkeypatch: pytest.MonkeyPatch, version: str | None, forward: object = fa4_in_torch.flash_attn_fwd) -> None:
    def find_version(name: str) -> str:
        if name != "flash-attn-4" or version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", find_version)
    monkeypatch.setattr(fa4, "_interface", lambda: SimpleNamespace(_flash_attn_fwd=forward))


def test_probe_names_the_version(fresh_probe: None, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "4.0.0b36")
    assert fa4.probe() == Availability("4.0.0b36")
    fa4.probe.cache_clear()
    installed(monkeypatch, "4.1.0")
    assert fa4.probe().ok


def test_probe_of_an_absent_package_gives_the_command(fresh_probe: None, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, None)
    assert fa4.probe() == Availability(None, "flash-attn-4 is not installed: pip install 'spec-compile[fa4]'")


def test_probe_of_an_old_version(fresh_probe: None, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "4.0.0b9")
    assert "4.0.0b9 is too old, 4.0.0b36 or newer is needed: pip install" in fa4.probe().problem


def test_probe_of_a_version_with_another_interface(fresh_probe: None, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "4.2.0", lambda q, k, v, **kwargs: None)
    problem = fa4.probe().problem
    assert "4.2.0 has another interface" in problem and "cu_seqlens_q" in problem and "flash-attn-4==4.0.0b36" in problem


def test_probe_of_a_package_that_does_not_import(fresh_probe: None, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "4.0.0b36")

    def broken() -> None:
        raise OSError("libcute_dsl_runtime.so: cannot open shared object file")

    monkeypatch.setattr(fa4, "_interface", broken)
    problem = fa4.probe().problem
    assert "does not import (OSError: libcute_dsl_runtime.so" in problem and "pip install 'spec-compile[fa4]'" in problem


def test_nothing_of_fa4_is_imported_before_it_is_probed() -> None:
    code = (
        "import sys; from spec_compile.ops.providers import load; load('fa4');"
        "print([m for m in sys.modules if m.split('.')[0] in ('flash_attn', 'cutlass', 'quack', 'triton', 'tvm_ffi')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


# ----------------------------------------------------------------------------------------------------------------------
# The cut of the prefix


@pytest.mark.parametrize(
    ("batch", "kv_heads", "rows", "capacity", "folds"),
    [
        (1, 8, 32, 65536, 16),  # 8 tokens of an 8B model: 128 programs on 132 multiprocessors
        (1, 8, 4, 65536, 16),
        (1, 8, 128, 65536, 16),
        (1, 8, 256, 65536, 8),  # two tiles of queries a head
        (1, 8, 32, 200, 3),  # no fold without keys
        (1, 8, 32, 16, 1),
        (1, 1, 32, 65536, 32),
        (8, 8, 32, 65536, 2),
        (8, 8, 32, 1024, 1),  # copies of the queries would cost more
        (2, 8, 32, 4096, 4),
        (32, 8, 32, 65536, 1),
    ],
)
def test_folds_fill_the_device_and_no_more(batch, kv_heads, rows, capacity, folds) -> None:
    assert choose_splits(H200, batch, kv_heads, rows, capacity, 16) == Splits(folds, 1)


@pytest.mark.parametrize("page_size", [16, 64, 128, 512, 2048])
@pytest.mark.parametrize("batch", [1, 2])
def test_no_fold_of_the_longest_row_is_empty(batch: int, page_size: int) -> None:
    """A fold has whole pages, so that there cannot be more folds than a row has pages."""
    for columns in (1, 2, 3, 17):
        table = torch.zeros(batch, columns, dtype=torch.int32)
        capacity = columns * page_size
        folds = choose_splits(H200, batch, 1, 32, capacity, page_size).folds
        lengths = torch.full((batch,), capacity - 8, dtype=torch.int32)
        _, folded = cascade.fold_prefix(table, lengths, folds, 8, page_size, 0)
        assert (folded > 0).all(), (columns, folds, folded)


def test_the_plan_knows_the_page_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fa4, "detect_hardware", lambda device: H200)
    table = torch.zeros(1, 4, dtype=torch.int32)
    assert fa4._splits(table, 1, 32, 256, 0) == Splits(4, 1)


def test_hopper_never_asks_for_native_splits() -> None:
    """FA4 4.0.0b36 asserts against them there."""
    for batch in range(1, 70):
        for capacity in (1, 100, 5000, 100_000):
            assert choose_splits(H200, batch, 8, 32, capacity, 16).native == 1


@pytest.mark.parametrize("arch", ["sm100", "sm103", "sm110"])
def test_blackwell_splits_batches_natively_and_folds_one_row(arch: str) -> None:
    blackwell = Hardware("nvidia", arch, 148, arch)
    assert choose_splits(blackwell, 1, 8, 32, 65536, 16) == Splits(18, 1)
    assert choose_splits(blackwell, 4, 8, 32, 65536, 16) == Splits(1, 4)
    assert choose_splits(blackwell, 4, 8, 32, 256, 16) == Splits(1, 2)
    assert choose_splits(blackwell, 64, 8, 32, 65536, 16) == Splits(1, 1)
    assert choose_tile(arch, 32, 128, 128) is None


@pytest.mark.parametrize(
    ("rows", "dims", "tile"),
    [(32, (128, 128), (64, 128)), (65, (64, 64), (128, 128)), (64, (192, 128), (64, 112)), (200, (256, 256), (128, 80))],
)
def test_tiles_fit_a_multiprocessor(rows: int, dims: tuple[int, int], tile: tuple[int, int]) -> None:
    assert choose_tile("sm90", rows, *dims) == tile
    # The queries, and two stages of keys and values, in two bytes each (flash_fwd_sm90.py, shared storage).
    assert 2 * (tile[0] * dims[0] + 2 * tile[1] * sum(dims)) <= 227 * 1024


# ----------------------------------------------------------------------------------------------------------------------
# The ops

SMALL = {
    "chain": Case((37, 0, 64, 90), 3, (6, 2), (32, 16), 16, spare_columns=5, padding_rows=1),
    "tree": Case((90, 5, 48), 6, (4, 1), (16, 48), 16, tree=True),
    "n1": Case((33, 1, 0), 1, (4, 4), (16, 16), 8),
    "window": Case((90, 5, 16, 20), 5, (4, 2), (16, 16), 16, tree=True, window=20, sinks=True),
    "window_below_page": Case((90, 5, 16), 5, (4, 2), (16, 16), 64, window=7),
    "softcap": Case((50, 3), 4, (4, 2), (16, 16), 16, softcap=2.0, sinks=True, tree=True),
    "wide_tree": Case((70,), 40, (2, 1), (16, 16), 16, tree=True),
    "broken": Case((37, 0, 64), 4, (6, 2), (32, 16), 16, padding_rows=1, broken=True),
    "broken_tree": Case((90, 5, 48), 9, (4, 2), (16, 48), 16, tree=True, window=20, softcap=2.0, broken=True),
    "prefill": Case((40, 0, 1, 30), 0, (4, 2), (16, 32), 16, packed=True),
    "prefill_window": Case((40, 5), 0, (3, 1), (16, 16), 16, packed=True, window=9, sinks=True, softcap=3.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_contract(name: str, dtype: torch.dtype, stand_in: int) -> None:
    check("fa4", SMALL[name], dtype, "cpu")


@pytest.mark.parametrize("name", ["chain", "window", "softcap", "prefill_window"])
def test_opcheck(name: str, stand_in: int) -> None:
    case = SMALL[name]
    lowered = as_lowered(fa4.lower(case.node(torch.float32)))
    args = make_problem(case, torch.float32, "cpu").args
    if lowered.plan is None:
        opcheck(lowered.op, args)
        return
    plan_args = (*lowered.row_arguments(args), *lowered.plan_args)
    opcheck(lowered.plan, plan_args)
    opcheck(lowered.op, (*args, *lowered.plan(*plan_args)))


@pytest.mark.parametrize("op", ["attention", "prefill_attention"])
def test_schemas_begin_with_the_generic_ops(op: str) -> None:
    lowered = as_lowered(fa4.lower(node(op=op)))
    theirs = str(getattr(generic, op)._opoverload._schema).replace(op, f"{op}_fa4", 1)
    planned = ", Tensor folded_table, Tensor folded_len" if op == "attention" else ""
    assert str(lowered.op._schema) == theirs.replace(") ->", f"{planned}) ->")


def test_layers_of_one_window_share_a_plan() -> None:
    def layers(q, k, v, table, lens, **caches):
        for i, window in enumerate((0, 128, 0, 128)):
            args = (k, v, caches[f"k{i}"], caches[f"v{i}"], table, lens, None, 0.1, window, 0.0, None)
            q = torch.ops.spec_compile.attention(q, *args)
        return q

    graph = stage_graph(
        layers,
        "verify",
        q=Input("q", torch.zeros(2, 8, 32, 128)),
        k=Input("k", torch.zeros(2, 8, 8, 128)),
        v=Input("v", torch.zeros(2, 8, 8, 128)),
        table=Input("page_table", torch.zeros(2, 4, dtype=torch.int32)),
        lens=Input("cache_len", torch.zeros(2, dtype=torch.int32)),
        **{f"{part}{i}": CacheSlot(i, part) for i in range(4) for part in "kv"},
    )
    for call, window in zip(find(graph, "attention"), (0, 128, 0, 128), strict=True):
        call.meta |= {"provider": "fa4", "attention_node": node(window=window, is_tree=False)}
    lower_graph(graph)
    assert [plan.args[-1] for plan in find(graph, "attention_fa4_plan")] == [0, 128]
    assert len(find(graph, "attention_fa4")) == 4


def test_warm_up_folds_as_the_rows_capacity_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What FA4 compiles depends on whether there are folds, so a table as short as the example's would warm the wrong one."""
    capacities = []
    monkeypatch.setattr(fa4, "_interface", fa4_in_torch.interface)

    def splits(hardware, batch, num_kv_heads, rows, capacity, page_size):
        capacities.append(capacity)
        return Splits(2, 1)

    monkeypatch.setattr(fa4, "choose_splits", splits)
    small = {"num_q_heads": 2, "num_kv_heads": 1, "head_dim": 16, "v_head_dim": 16, "dtype": torch.float32}
    small |= {"kv_dtype": torch.float32}
    fa4.warm_up(node(max_context=1000, **small), torch.device("cpu"))
    assert set(capacities) == {1024}
    fa4.warm_up(node(**small), torch.device("cpu"))
    assert set(capacities) == {1024, 64}
    fa4.warm_up(node(max_context=1000, window=200, **small), torch.device("cpu"))
    assert set(capacities) == {1024, 64, 200}, "a sliding window's bulk is no longer than the window"
    fa4.warm_up(node(**PREFILL, **small), torch.device("cpu"))


# ----------------------------------------------------------------------------------------------------------------------
# The Triton kernels under Triton's interpreter

INTERPRETED = """
import torch
import fa4_in_torch
from attention_contract import Case, check
from spec_compile.ops import cascade
from spec_compile.ops.kernels import cascade as kernels
from spec_compile.ops.providers import fa4
cascade.fold_prefix, cascade.cascade_merge = kernels.fold_prefix, kernels.cascade_merge
fa4._interface = fa4_in_torch.interface
for folds in (1, 3):
    fa4.choose_splits = lambda *args: fa4.Splits(folds, 1)
    check("fa4", {case}, torch.float32, "cpu")
"""


@pytest.mark.parametrize("name", ["chain", "window", "window_below_page", "softcap", "wide_tree"])
def test_kernels_keep_the_contract(name: str, interpreter: None) -> None:  # noqa: F811
    result = run_interpreted(INTERPRETED.replace("{case}", repr(SMALL[name])))
    assert result.returncode == 0, result.stderr


COMPILED = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from spec_compile.ops.kernels.cascade import _cascade_merge_kernel as kernel
constants = dict(N=8, G=4, HKV=8, D=128, DV=128, FOLDS=16, BLOCK_F=16, TOKENS=4, BLOCK_R=16, BLOCK_C=16, BLOCK_W=16, BLOCK_E=64,
                 BLOCK_D=128, WORDS=1, PAGE_SIZE=64, HAS_TREE=True, HAS_WINDOW=True, HAS_SOFTCAP=True, HAS_SINKS=True)
types = {name: "*bf16" for name in kernel.arg_names if name.endswith("_ptr")}
types |= {"page_table_ptr": "*i32", "cache_len_ptr": "*i32", "mask_ptr": "*i32", "lse_ptr": "*fp32"}
types |= {"scale": "fp32", "softcap": "fp32"} | dict.fromkeys(constants, "constexpr")
signature = {name: types.get(name, "i32") for name in kernel.arg_names}
compile(ASTSource(kernel, signature, constexprs=constants), target=GPUTarget("cuda", 90, 32))
"""


def test_the_merge_kernel_compiles_for_hopper() -> None:
    """The interpreter does not see types that change from one turn of a loop to the next; the compiler does."""
    pytest.importorskip("triton")
    result = subprocess.run([sys.executable, "-"], input=COMPILED, capture_output=True, text=True, env=os.environ)
    assert result.returncode == 0, result.stderr


# ----------------------------------------------------------------------------------------------------------------------
# FlashAttention-4 itself, where it is installed: compiled for devices that are not here

CROSS_COMPILED = """
import os, sys
arch, sms, batch, folds, native, dim, page_size, softcap = (int(x) for x in sys.argv[1:])
os.environ |= {"FLASH_ATTENTION_ARCH": f"sm_{arch}", "CUTE_DSL_ARCH": f"sm_{arch}a", "FLASH_ATTENTION_NUM_SMS": str(sms)}
os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"] = "0"
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from spec_compile.ops.providers import fa4
interface = fa4._interface()
import cutlass
make_stream = interface.cute.runtime.make_fake_stream
interface.cute.runtime.make_fake_stream = lambda *args, **kwargs: make_stream()  # no tensor is on a GPU to take one from
interface._validate_tensor = lambda *args: None  # asks even fakes for CUDA
cutlass.utils.HardwareInfo.__init__ = lambda self, *args: None  # asks the driver
cutlass.utils.HardwareInfo.get_device_multiprocessor_count = lambda self: sms
with FakeTensorMode():
    q = torch.empty(batch, 8, 48, dim, dtype=torch.bfloat16)[:, :, :32]
    q = q.expand(folds, -1, -1, -1) if batch == 1 else q
    caches = [torch.empty(100, page_size, 8, dim, dtype=torch.bfloat16) for _ in range(2)]
    table, lengths = torch.empty(batch * folds, 5, dtype=torch.int32), torch.empty(batch * folds, dtype=torch.int32)
    tile = fa4.choose_tile(f"sm{arch}", 32, dim, dim)
    fa4.bulk_attention(q, *caches, table, lengths, 0.1, float(softcap), native_splits=native, tile=tile)
assert len(interface._flash_attn_fwd.compile_cache.cache) == 1
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "problem",
    [
        "90 132 1 16 1 128 64 0",
        "90 132 4 1 1 256 64 0",
        "90 132 4 1 1 80 16 30",
        "100 148 1 18 1 128 64 0",
        "100 148 4 1 4 128 64 0",
        "110 20 4 1 2 128 128 0",
    ],
)
def test_fa4_compiles_what_the_provider_asks_for(problem: str) -> None:
    if not fa4.probe().ok:
        pytest.skip(str(fa4.probe().problem))
    command = [sys.executable, "-c", CROSS_COMPILED, *problem.split()]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert result.returncode == 0, result.stderr[-3000:]
