"""The ``flashinfer`` provider without a GPU: what it refuses, what it plans, and what it asks of FlashInfer.

FlashInfer's functions are stood in for by ``flashinfer_in_torch``; ``tests/gpu`` runs the real ones.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attention_contract import CASES, Case, check, make_problem, random_trees
from stage_graphs import Input, find, stage_graph
from torch import Tensor
from torch.library import opcheck

from spec_compile.errors import BackendError
from spec_compile.hardware import Hardware
from spec_compile.ops import attention as generic
from spec_compile.ops.providers import AttentionNode, flashinfer, load
from spec_compile.passes.lower import lower as lower_graph

pytest.importorskip("triton", reason="the append kernels need it")

from flashinfer_in_torch import H200, install

from spec_compile.ops.kernels.xqa import BUILD_TOKENS, XqaGrid, xqa_grid

B200, L40 = Hardware("nvidia", "sm100", 148, "NVIDIA B200"), Hardware("nvidia", "sm89", 142, "NVIDIA L40S")
TRITON_INTERPRETER = Path(__file__).parent / "test_triton_kernels.py"


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
        {"is_tree": False, "window": 128, "has_sinks": True},
        {"has_sinks": True, "page_size": 16, "num_tokens": 64, "head_dim": 80, "v_head_dim": 80},
        {"dtype": torch.float16, "kv_dtype": torch.float8_e4m3fn},
        PREFILL,
        {**PREFILL, "window": 128, "softcap": 30.0, "has_sinks": True, "page_size": 24},
    ],
)
def test_supports(changes: dict) -> None:
    assert flashinfer.supports(node(**changes), H200) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"softcap": 30.0}, "no softcap"),
        ({"window": 128}, "depth"),
        ({"page_size": 256}, "page size 256"),
        ({"page_size": 8}, "page size 8"),
        ({"head_dim": 272, "v_head_dim": 272}, "head dim 272"),
        ({"head_dim": 72, "v_head_dim": 72}, "head dim 72"),
        ({"head_dim": 160, "v_head_dim": 160}, "head dim 160"),
        ({"num_q_heads": 1024}, "128 query heads"),
        ({"num_q_heads": 384, "head_dim": 256, "v_head_dim": 256, "num_tokens": 1}, "48 query heads"),
        ({"v_head_dim": 64}, "differ"),
        ({"dtype": torch.float32, "kv_dtype": torch.float32}, "float16 or bfloat16"),
        ({"kv_dtype": torch.float16}, "neither"),
        ({"num_q_heads": 30}, "multiple"),
        ({"op": "mla_attention", "head_dim": 576, "v_head_dim": 512, "num_kv_heads": 1}, "host"),
        ({**PREFILL, "head_dim": 96, "v_head_dim": 96}, "head dim 96"),
    ],
)
def test_refuses_with_a_reason(changes: dict, words: str) -> None:
    assert words in flashinfer.supports(node(**changes), H200)


def test_devices() -> None:
    assert "XQA runs on sm90" in flashinfer.supports(node(), L40)
    assert flashinfer.supports(node(**PREFILL), L40) is None
    assert "8.0" in flashinfer.supports(node(**PREFILL), Hardware("nvidia", "sm75", 40, "T4"))
    for hardware in (Hardware("cpu", "cpu", 2, "CPU"), Hardware("amd", "gfx942", 304, "MI300X")):
        assert "NVIDIA" in flashinfer.supports(node(), hardware)


def test_trees_do_not_go_to_trtllm_gen() -> None:
    """trtllm-gen takes a mask and ignores it."""
    table = {(arch, tree): flashinfer.window_kernel(arch, tree) for arch in ("sm90", "sm100") for tree in (False, True)}
    assert table == {
        ("sm90", False): "xqa",
        ("sm90", True): "xqa",
        ("sm100", False): "trtllm-gen",
        ("sm100", True): None,
    }
    assert "ignores a tree mask" in flashinfer.supports(node(), B200)


@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_chains_that_trtllm_gen_takes(page_size: int, dim: int) -> None:
    assert flashinfer.supports(node(is_tree=False, page_size=page_size, head_dim=dim, v_head_dim=dim), B200) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"page_size": 128}, "page size 128"),
        ({"head_dim": 96, "v_head_dim": 96}, "head dim 96"),
        ({"kv_dtype": torch.float8_e4m3fn}, "caches of torch.bfloat16 only"),
        ({"softcap": 30.0}, "no softcap"),
    ],
)
def test_trtllm_gen_is_refused_what_it_is_not_known_to_take(changes: dict, words: str) -> None:
    assert words in flashinfer.supports(node(is_tree=False, **changes), B200)
    assert "softcap" in changes or flashinfer.supports(node(is_tree=False, **changes), H200) is None


# ----------------------------------------------------------------------------------------------------------------------
# Probing


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As if FlashInfer, nvcc and ninja were there and nothing else of its family."""
    present = {"flashinfer"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in present else None)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"flashinfer-python": "0.7.2.post1"}[name])
    monkeypatch.setattr(flashinfer.shutil, "which", lambda name, path=None: f"/bin/{name}")
    return monkeypatch


def test_probe_finds_it_without_importing_it(installed: pytest.MonkeyPatch) -> None:
    availability = flashinfer.probe()
    assert availability.ok and availability.version == "0.7.2.post1"
    flashinfer.supports(node(), H200), flashinfer.lower(node())
    assert "flashinfer" not in sys.modules


def test_pip_installs_what_the_probe_takes() -> None:
    pyproject = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert '"flashinfer-python>=0.7.2,<0.7.3"' in pyproject


def test_probe_names_the_pip_command_when_absent(installed: pytest.MonkeyPatch) -> None:
    installed.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'spec-compile[flashinfer]'" in flashinfer.probe().problem


def test_probe_is_not_taken_in_by_a_folder_of_that_name(installed: pytest.MonkeyPatch) -> None:
    """``find_spec`` finds any folder called flashinfer on the path, as a namespace package."""

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    installed.setattr(importlib.metadata, "version", absent)
    availability = flashinfer.probe()
    assert availability.version is None and "pip install 'spec-compile[flashinfer]'" in availability.problem


@pytest.mark.parametrize(
    ("version", "ok"),
    [("0.7.1", False), ("0.7.2", True), ("0.7.2.post1", True), ("0.7.3", False), ("0.7.10rc1", False), ("0.8.0", False)],
)
def test_probe_checks_the_version(installed: pytest.MonkeyPatch, version: str, ok: bool) -> None:
    installed.setattr(importlib.metadata, "version", lambda name: version)
    assert flashinfer.probe().ok == ok
    assert ok or version in flashinfer.probe().problem


@pytest.mark.parametrize(("tool", "remedy"), [("nvcc", "CUDA_HOME"), ("ninja", "pip install ninja"), ("c++", "g++")])
def test_probe_names_a_missing_build_tool(installed: pytest.MonkeyPatch, tool: str, remedy: str) -> None:
    installed.delenv("CXX", raising=False)
    installed.setattr(flashinfer.shutil, "which", lambda name, path=None: None if name == tool else f"/bin/{name}")
    assert remedy in flashinfer.probe().problem
    installed.setattr(importlib.util, "find_spec", lambda name: object())  # flashinfer-jit-cache holds what they would build
    assert flashinfer.probe().ok


# ----------------------------------------------------------------------------------------------------------------------
# The plan


def unpack(mask: Tensor, num_tokens: int) -> list:
    """Nested lists of booleans [B][N][N], read as XQA reads them: 16 bits at a time, least significant first."""
    halves = mask.view(torch.uint16).tolist()
    return [[[bool(row[j // 16] >> (j % 16) & 1) for j in range(num_tokens)] for row in rows] for rows in halves]


@pytest.mark.parametrize("num_tokens", [1, 2, 8, 31, 32, 33, 64, 65])
@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
def test_plan_against_brute_force(num_tokens: int, tree: bool) -> None:
    """The last row hangs over its last page: a third of its window has no slot, so XQA's window starts that much earlier."""
    page_size, columns = 16, 12
    capacity = page_size * columns
    over = num_tokens // 3
    lengths = [0, 5, random.randrange(capacity - num_tokens), capacity - num_tokens + over]
    mask = random_trees(4, num_tokens, "cpu") if tree else None
    table = torch.zeros(4, columns, dtype=torch.int32)
    seq_lens, planned = torch.ops.spec_compile.attention_plan_flashinfer(
        table, torch.tensor(lengths, dtype=torch.int32), mask, num_tokens, page_size
    )
    assert seq_lens.tolist() == [[min(length + num_tokens, capacity)] for length in lengths]
    assert seq_lens.dtype == planned.dtype == torch.int32
    ancestors = unpack(mask, num_tokens) if tree else [[[j <= i for j in range(num_tokens)] for i in range(num_tokens)]] * 4
    expected = [[list(row) for row in rows] for rows in ancestors]
    for i in range(num_tokens):
        expected[3][i] = [True] * over + ancestors[3][i][: num_tokens - over]
    assert unpack(planned, num_tokens) == expected


def test_a_tree_mask_needs_no_repacking() -> None:
    """Where nothing hangs over, the plan's mask is the tree mask, bit by bit."""
    mask = random_trees(3, 40, "cpu")
    table, lengths = torch.zeros(3, 8, dtype=torch.int32), torch.tensor([0, 3, 60], dtype=torch.int32)
    _, planned = torch.ops.spec_compile.attention_plan_flashinfer(table, lengths, mask, 40, 16)
    assert torch.equal(planned, mask)


def test_the_triton_plan_equals_the_reference() -> None:
    """Under Triton's interpreter, in a process of its own."""
    code = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from attention_contract import random_trees
from spec_compile.ops.kernels.xqa import xqa_plan
import spec_compile.ops.providers.flashinfer
for n in (1, 7, 33):
    for mask in (None, random_trees(3, n, "cpu")):
        lengths = torch.tensor([0, 11, 96 - n + n // 2], dtype=torch.int32)
        want = torch.ops.spec_compile.attention_plan_flashinfer(torch.zeros(3, 6, dtype=torch.int32), lengths, mask, n, 16)
        got = xqa_plan(lengths, mask, n, 96)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), (n, mask is None)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(Path(__file__).parent / "support")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if "numpy" in result.stderr.lower() and result.returncode:
        pytest.skip("Triton's interpreter does not run here")
    assert result.returncode == 0, result.stderr


# ----------------------------------------------------------------------------------------------------------------------
# What is asked of FlashInfer

WINDOWS = {
    "n1": Case((70, 0, 37), heads=(4, 2), dims=(16, 16), stage="draft"),
    "n1_window_sinks": Case((70, 0, 37), heads=(4, 2), dims=(16, 16), window=9, sinks=True, stage="draft"),
    "chain": Case((70, 0, 16), 5, (4, 2), (16, 16), padding_rows=1),
    "chain_window_sinks": Case((70, 0, 16), 5, (6, 2), (16, 16), window=9, sinks=True),
    "tree_sinks": Case((70, 0, 16), 6, (3, 1), (32, 32), 32, tree=True, sinks=True, padding_rows=2),
    "tree33": Case((3, 40), 33, (2, 1), (16, 16), tree=True, spare_columns=4),
    "broken": Case((70, 0, 16), 5, (4, 2), (16, 16), padding_rows=1, broken=True),
    "broken_tree": Case((70, 0, 16), 9, (3, 1), (32, 32), 32, tree=True, sinks=True, broken=True),
}
PROMPTS = {
    "ragged": Case((30, 0, 1, 17), 0, (4, 2), (64, 64), 16, packed=True),
    "window": Case((30, 9), 0, (4, 2), (64, 64), 16, packed=True, window=8),
    "softcap_sinks": Case((30, 9), 0, (6, 2), (64, 64), 16, packed=True, softcap=5.0, sinks=True),
}


@pytest.mark.parametrize("name", [*WINDOWS, *PROMPTS])
def test_contract(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's contract, kept with FlashInfer's promises alone. In float32, where every mistake shows."""
    install(monkeypatch)
    check("flashinfer", {**WINDOWS, **PROMPTS}[name], torch.float32, "cpu")


@pytest.mark.parametrize("name", ["tree_sinks", "ragged"])
def test_contract_with_a_float8_cache(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    case = replace({**WINDOWS, **PROMPTS}[name], outliers=True)
    check("flashinfer", case, torch.float32, "cpu", torch.float8_e4m3fn)


@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
def test_a_window_over_the_last_page(tree: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots that a row cannot hold belong to no row: the others count as in the generic op."""
    install(monkeypatch)
    problem = make_problem(Case((43, 20), 8, (4, 2), (16, 16), tree=tree, spare_columns=0), torch.float32, "cpu")
    table, lengths, mask = problem.rows
    table = table[:, :3]  # 48 slots; the first row would need 51
    caches = [torch.randn_like(cache) for cache in problem.caches]
    expected = generic.attention(*problem.new, *[c.double() for c in caches], table, lengths, mask, *problem.tail)
    op = flashinfer.lower(problem.case.node(torch.float32))
    out = op(*problem.new, *caches, table, lengths, mask, *problem.tail)
    torch.testing.assert_close(out, expected.float(), rtol=1e-4, atol=1e-5)


def test_builds_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the window, one build with a mask and one without."""
    calls = install(monkeypatch)
    for num_tokens in (1, 2, 3, 8, 33):
        case = Case((20,), num_tokens, (4, 2), (16, 16), spare_columns=3)
        flashinfer.lower(case.node(torch.float32))(*make_problem(case, torch.float32, "cpu").args)
    assert {build[-1] for build in calls.builds} == {1, BUILD_TOKENS}
    assert [launch["q_seq_len"] for launch in calls.launches] == [1, 2, 3, 8, 33]
    assert not any(launch["run_sm90_fp8_mha"] for launch in calls.launches)


def test_grid() -> None:
    """By hand, from the kernel's layout: parts of 32 rows x 128 dims x 2 bytes, and 128 bytes of maxima and of sums each."""
    # Batch 1: 132 // 8 = 16 splits of each of 8 heads' one tile of 8 x 4 rows.
    assert xqa_grid(1, 8, 8, 4, 128, 65536, 132) == XqaGrid(8, 16, 132, 2 * 128 * 128 + 129 * 8192)
    # 16 tokens are two tiles of rows a head: half the splits. 512 slots are two tiles of keys: no more splits than that.
    assert xqa_grid(1, 16, 8, 4, 128, 65536, 132) == XqaGrid(16, 8, 66, 2 * 128 * 128 + 129 * 8192)
    assert xqa_grid(1, 16, 8, 4, 128, 512, 132) == XqaGrid(16, 2, 66, 2 * 32 * 128 + 33 * 8192)
    # One token: no more rows than query heads of a key/value head.
    assert xqa_grid(1, 1, 8, 4, 64, 512, 132) == XqaGrid(8, 2, 132, 2 * 16 * 128 + 17 * 4 * 64 * 2)
    # More rows than multiprocessors: no splits, and never fewer multiprocessors than one.
    assert xqa_grid(32, 8, 8, 4, 128, 65536, 132) == XqaGrid(256, 1, 132, 0)
    assert xqa_grid(1, 256, 8, 64, 128, 65536, 132).sm_count == 1


def test_xqa_makes_the_splits_that_the_scratch_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its formula, from launchMHAFlashInfer, over what it is told."""
    calls = install(monkeypatch)
    for num_tokens, rows in ((1, 1), (8, 1), (40, 3)):
        case = Case((300,) * rows, num_tokens, (4, 2), (16, 16), spare_columns=80)
        flashinfer.lower(case.node(torch.float32))(*make_problem(case, torch.float32, "cpu").args)
        launch = calls.launches[-1]
        splits = min(max(1, launch["sm_count"] // (rows * 2)), -(-launch["max_seq_len"] // 256))
        grid = xqa_grid(rows, num_tokens, 2, 2, 16, launch["max_seq_len"], 132)
        assert splits == grid.splits and launch["semaphores"].numel() == grid.tiles
        assert launch["workspace_buffer"].numel() == max(grid.scratch_bytes, 16)


def test_sm100_chains_go_to_trtllm_gen(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install(monkeypatch, B200)
    case = Case((20, 3), 4, (4, 2), (16, 16), window=9, sinks=True)
    problem = make_problem(case, torch.float32, "cpu")
    flashinfer.lower(case.node(torch.float32))(*problem.args)
    (launch,) = calls.launches
    assert launch["backend"] == "trtllm-gen" and launch["kv_layout"] == "NHD" and launch["q_len_per_req"] == 4
    assert launch["query"].shape == (8, 4, 16) and launch["seq_lens"].tolist() == [24, 7]
    assert launch["window_left"] == 8 and launch["bmm1_scale"] == pytest.approx(16**-0.5)


def test_refused_calls_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    refused = {
        r"softcap=5\.0: XQA and trtllm-gen do not cap logits; use the triton or fa4 provider": Case((20,), 4, softcap=5.0),
        r"window=9 with a tree_mask: .* by depth; use the triton or fa4 provider": Case((20,), 4, tree=True, window=9),
    }
    for message, case in refused.items():
        with pytest.raises(BackendError, match=message):
            flashinfer.lower(case.node(torch.float32))(*make_problem(case, torch.float32, "cpu").args)


# ----------------------------------------------------------------------------------------------------------------------
# The ops as PyTorch sees them


def test_registered_under_its_name() -> None:
    assert load("flashinfer") is flashinfer


def arguments(op: torch._ops.OpOverload) -> str:
    """``"Tensor q, …, Tensor(a3!) k_cache, …"``."""
    return str(op._schema).split("(", 1)[1].rsplit(") -> ", 1)[0]


@pytest.mark.parametrize(("changes", "planned"), [({}, ", Tensor seq_lens, Tensor mask"), (PREFILL, ", Tensor lengths")])
def test_schemas_extend_the_generic_ops(changes: dict, planned: str) -> None:
    lowered = flashinfer.lower(node(**changes))
    assert arguments(lowered.op) == arguments(getattr(generic, node(**changes).op)._opoverload) + planned
    assert "!" not in str(lowered.plan._schema)


@pytest.mark.parametrize("name", ["n1_window_sinks", "tree_sinks", "softcap_sinks"])
def test_opcheck(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    problem = make_problem({**WINDOWS, **PROMPTS}[name], torch.float32, "cpu")
    lowered = flashinfer.lower(problem.case.node(torch.float32))
    plan_args = (*lowered.row_arguments(problem.args), *lowered.plan_args)
    opcheck(lowered.plan, plan_args)
    planned = lowered.plan(*plan_args)
    opcheck(lowered.op, (*problem.args, *((planned,) if isinstance(planned, Tensor) else planned)))


def test_layers_share_one_plan() -> None:
    """Two layers of a captured window graph, of different windows: one plan node, its outputs behind each layer's arguments."""
    problem = make_problem(Case((20, 3), 4, (4, 2), (16, 16)), torch.float32, "cpu")
    q, k, v = problem.new

    def forward(q, k, v, k_cache, v_cache, page_table, cache_len):
        op = torch.ops.spec_compile.attention.default
        first = op(q, k, v, k_cache, v_cache, page_table, cache_len, None, 0.25, 0, 0.0, None)
        return op(first, k, v, k_cache, v_cache, page_table, cache_len, None, 0.25, 7, 0.0, None)

    rows = {"page_table": Input("page_table", problem.rows[0]), "cache_len": Input("cache_len", problem.rows[1])}
    graph = stage_graph(forward, "verify", q=q, k=k, v=v, k_cache=problem.caches[0], v_cache=problem.caches[1], **rows)
    for call in find(graph, "attention"):
        call.meta |= {"provider": "flashinfer", "attention_node": node(num_tokens=4, page_size=16, is_tree=False)}
    graph = lower_graph(graph)
    (plan,) = find(graph, "attention_plan_flashinfer")
    layers = find(graph, "attention_flashinfer")
    assert len(layers) == 2 and layers[0].args[-2:] == layers[1].args[-2:]
    assert [x.meta["example_value"].shape for x in layers[0].args[-2:]] == [(2, 1), (2, 4, 1)]
    assert plan.args[2:] == (None, 4, 16)


def test_contract_cases_it_takes() -> None:
    """The GPU contract skips what ``supports`` refuses: these must not be among it."""
    taken = {name for name, case in CASES.items() if flashinfer.supports(case.node(torch.bfloat16), H200) is None}
    assert taken >= {
        "n1", "n2_draft", "chain8", "chain8_batch1", "tree8_batch1", "many_rows", "tree", "tree_group8", "tree_group1",
        "tree64", "tree40_group7", "tree_sinks", "window", "window_sinks", "d80", "d256", "d16", "chain100", "prefill",
        "prefill_one", "prefill_group1", "prefill_window", "prefill_window_sinks", "prefill_window_large", "prefill_softcap",
        "prefill_d256",
    }  # fmt: skip
