"""The Triton kernels under Triton's interpreter on the CPU: tiny cases of the providers' contract.

The interpreter is chosen when kernels are defined, so each case runs in a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spec_compile.hardware import Hardware
from spec_compile.ops import attention as generic
from spec_compile.ops.providers import AttentionNode, triton

INTERPRETER_WORKS = """
import torch, triton, triton.language as tl
@triton.jit
def kernel(x, B: tl.constexpr):
    i = tl.arange(0, B)
    a = tl.load(x + i[:, None] * B + i[None, :])
    for _ in tl.range(0, 1, num_stages=1):
        a = tl.dot(a, a)
    tl.store(x + i[:, None] * B + i[None, :], a)
kernel[(1,)](torch.ones(16, 16), 16)
"""
CASES = {  # one process each: importing torch takes longer than a case
    "decode": [
        "Case((37, 0), 3, (6, 2), (24, 16), tree=True, sinks=True, padding_rows=1)",
        "Case((90,), 5, (6, 2), (16, 40), tree=True, window=20, softcap=5.0)",
        "Case((150, 3), 70, (2, 1), (16, 16), 32)",
        "Case((40, 5), 3, (5, 1), (40, 32), tree=True, latent=True)",
    ],
    "prefill": [
        "Case((70, 0, 33), 0, (4, 2), (16, 24), packed=True)",
        "Case((150, 3), 0, (3, 1), (16, 16), window=40, softcap=5.0, sinks=True, packed=True)",
        "Case((40, 5), 0, (3, 1), (48, 32), packed=True, latent=True)",
    ],
    "broken": [
        "Case((37, 0, 5), 4, (6, 2), (24, 16), padding_rows=1, broken=True)",
        "Case((90, 3), 9, (6, 2), (16, 40), tree=True, window=20, softcap=5.0, sinks=True, broken=True)",
        "Case((150, 3), 70, (2, 2), (16, 16), 32, tree=True, broken=True)",
        "Case((40, 5), 5, (5, 1), (40, 32), tree=True, latent=True, broken=True)",
        "Case((70, 0, 33), 0, (4, 2), (16, 24), packed=True, broken=True)",
        "Case((90, 3), 0, (4, 2), (16, 24), window=40, packed=True, broken=True)",
        "Case((40, 5), 0, (3, 1), (48, 32), packed=True, latent=True, broken=True)",
    ],
}


def run_interpreted(code: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(__file__).parent / "support"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-"], input=code, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips where Triton is missing or its interpreter does not run (Triton 3.6 with NumPy 2.4, say)."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")
    probe = tmp_path_factory.mktemp("interpreter") / "probe.py"  # kernels need a source file
    probe.write_text(INTERPRETER_WORKS)
    result = run_interpreted(f"import runpy; runpy.run_path({str(probe)!r})")
    if result.returncode:
        pytest.skip(f"Triton's interpreter does not run here: {result.stderr.strip().splitlines()[-1]}")


@pytest.mark.parametrize("name", CASES)
def test_kernels_match_the_reference(name: str, interpreter: None) -> None:
    calls = "\n".join(f"check('triton', {case}, torch.float32, 'cpu')" for case in CASES[name])
    result = run_interpreted(f"import torch\nfrom attention_contract import *\ntorch.manual_seed(0)\n{calls}")
    assert result.returncode == 0, result.stderr


# The interpreter rounds to float8 and bfloat16 in its own way (down, or halves up), so new keys and values are such that need
# no rounding, or must saturate. How hardware rounds is checked bit by bit on GPUs.
NARROW = """
import torch, attention_contract
from attention_contract import *
from spec_compile.ops.attention import as_cached
make_problem = attention_contract.make_problem
def representable(*args):
    problem = make_problem(*args)
    dtype = problem.caches[0].dtype
    problem.new[1:] = [torch.where(x.abs() > torch.finfo(dtype).max, x, as_cached(x, dtype)) for x in problem.new[1:]]
    return problem
attention_contract.make_problem = representable
torch.manual_seed(0)
"""


NARROW_CASES = {
    "Case((37, 0), 3, (6, 2), (24, 16), tree=True, sinks=True, padding_rows=1, outliers=True)": ("float8_e4m3fn", "bfloat16"),
    "Case((40, 5), 3, (5, 1), (40, 32), tree=True, latent=True)": ("float8_e4m3fn", "float16"),
    "Case((70, 0, 33), 0, (4, 2), (16, 24), packed=True, outliers=True)": ("float8_e4m3fn", "float16"),
    "Case((40, 5), 0, (3, 1), (48, 32), packed=True, latent=True)": ("float8_e4m3fn", "bfloat16"),
}


def test_kernels_read_caches_of_a_narrower_type(interpreter: None) -> None:
    cases = [(case, dtype) for case, dtypes in NARROW_CASES.items() for dtype in dtypes]
    calls = "\n".join(f"check('triton', {case}, torch.float32, 'cpu', torch.{dtype})" for case, dtype in cases)
    result = run_interpreted(NARROW + calls)
    assert result.returncode == 0, result.stderr


# Of the tests for the device, cases that take the interpreter a second or less, some of every kernel's.
TREE_CASES = (
    "(test_a_tree and 5-4-8) or (test_a_tree and 3-1-4) or windows_of_any_size or draft_topk_ties or "
    "(accept_tree_greedy and 8-6) or (accept_tree_sampled and 8-6) or (simulate_accept and 8-6) or (accept_block and 4-) or "
    "of_no_distribution"
)


def test_kernels_of_trees_match_their_ops(interpreter: None) -> None:
    file = Path(__file__).parent / "gpu" / "test_tree_ops.py"
    result = run_interpreted(f"import pytest, sys; sys.exit(pytest.main([{str(file)!r}, '-k', {TREE_CASES!r}, '-rA']))")
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("PASSED") > 20 and "SKIPPED" not in result.stdout, result.stdout


def test_kernels_of_drafts_without_a_distribution_match_their_ops(interpreter: None) -> None:
    file = Path(__file__).parent / "gpu" / "test_round_ops.py"
    result = run_interpreted(f"import pytest, sys; sys.exit(pytest.main([{str(file)!r}, '-k', 'of_no_distribution', '-rA']))")
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("PASSED") == 4 and "SKIPPED" not in result.stdout, result.stdout


GDN_CASES = (
    "(test_windows and (4-fp32-chain or 9-bf16-tree) or uneven and (tree or prompts) or save_window or unit_prompts"
    " or test_prompts and 70 and bf16 or not_felt and 9-) and not (models or fla)"
)


def test_kernels_of_delta_rules_match_a_recurrence(interpreter: None) -> None:
    file = Path(__file__).parent / "gpu" / "test_gdn.py"
    result = run_interpreted(f"import pytest, sys; sys.exit(pytest.main([{str(file)!r}, '-k', {GDN_CASES!r}, '-rA']))")
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("PASSED") == 14 and "SKIPPED" not in result.stdout, result.stdout


COMPILED_GDN = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from spec_compile.ops.kernels.gdn import _commit_kernel, _verify_kernel
heads = dict(VALUE_HEADS=32, GROUP=2, D=128, DV=128, BLOCK_D=128, BLOCK_V=16)
window = dict(BLOCK_N=8, BLOCK_J=16, WORDS=1, HAS_TREE=True, WIDE=False, PRECISION="tf32x3")
commit = dict(STORED=3, BLOCK_K=4, BLOCK_C=256, HAS_PATH=True)
for kernel, constants in ((_verify_kernel, heads | window), (_commit_kernel, heads | commit)):
    types = {name: "*bf16" for name in kernel.arg_names if name.endswith("_ptr")}
    types |= dict.fromkeys(("state_ptr", "gate_window_ptr"), "*fp32") | {"scale": "fp32"}
    types |= dict.fromkeys(("slot_ptr", "mask_ptr", "path_ptr", "count_ptr"), "*i32") | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name][0] in "*i"}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    text = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1}).asm["ttgir"]
    print(text.count("tt.dot "), *[x for x in ("threadsPerWarp = [1, 4, 8]", "bf16, #ttg.dot_op") if x in text], sep=";")
"""


def test_kernels_of_delta_rules_compile_for_hopper() -> None:
    """What the interpreter does not show: products of bfloat16, and a commit in which 8 lanes share a value dim."""
    pytest.importorskip("triton")
    result = subprocess.run([sys.executable, "-"], input=COMPILED_GDN, capture_output=True, text=True, env=os.environ)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["3;bf16, #ttg.dot_op", "0;threadsPerWarp = [1, 4, 8]"], result.stdout


def node(**changes: object) -> AttentionNode:
    fields = {
        "op": "attention", "stage": "verify", "batch": 2, "num_tokens": 4, "num_q_heads": 8, "num_kv_heads": 2,
        "head_dim": 64, "v_head_dim": 64, "page_size": 16, "window": 0, "softcap": 0.0, "has_sinks": False,
        "is_tree": True, "dtype": torch.bfloat16, "kv_dtype": torch.bfloat16,
    }  # fmt: skip
    return AttentionNode(**{**fields, **changes})  # type: ignore[arg-type]


H200 = Hardware("nvidia", "sm90", 132, "NVIDIA H200")


def test_supports_what_the_contract_asks() -> None:
    assert triton.supports(node(), H200) is None
    assert triton.supports(node(head_dim=80, v_head_dim=96, page_size=256, num_q_heads=6), H200) is None
    assert triton.supports(node(op="mla_attention", head_dim=576, v_head_dim=512, num_kv_heads=1), H200) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": torch.float64}, "dtype"),
        ({"kv_dtype": torch.float32}, "cache's dtype"),
        ({"kv_dtype": torch.int8}, "cache's dtype"),
        ({"page_size": 24}, "page size"),
        ({"page_size": 8}, "page size"),
        ({"head_dim": 288}, "head dims"),
        ({"num_q_heads": 7}, "multiple"),
        ({"op": "mla_attention", "head_dim": 1152, "v_head_dim": 1024}, "latent"),
    ],
)
def test_refuses_with_a_reason(changes: dict, words: str) -> None:
    assert words in triton.supports(node(**changes), H200)


def test_refuses_a_cpu_and_old_devices() -> None:
    assert "CUDA" in triton.supports(node(), Hardware("cpu", "cpu", 2, "CPU"))
    assert "8.0" in triton.supports(node(), Hardware("nvidia", "sm75", 40, "T4"))


@pytest.mark.parametrize("op", ["attention", "mla_attention", "prefill_attention", "mla_prefill_attention"])
def test_schemas_equal_the_generic_ops(op: str) -> None:
    ours = str(triton.lower(node(op=op))._schema).replace(f"{op}_triton", op)
    assert ours == str(getattr(generic, op)._opoverload._schema)
