"""The ``flashinfer`` provider: XQA for windows, ragged FlashAttention for prompts (flashinfer-python 0.7.2).

XQA (NVIDIA's kernel, in FlashInfer since 0.5) needs no plan on the host: lengths, page table and a packed mask per request
are device tensors, the number of splits comes from shapes. Its documentation speaks of chains, but its generic kernel applies
any mask bits when there is no sliding window, so that random trees are right too (FlashInfer's csrc/xqa/mha.cu,
``applyMaskFromInput``; checked against float64 by ``tests/gpu``). Prompts go through the ragged prefill wrapper, planned on
the host once per prefill and constants, because their keys and values are at hand: reading them back from pages gains nothing.

FlashInfer is imported (seconds) and its kernels are built by nvcc at warm-up, never by importing this module. A build takes
about 10 s for XQA and 50 s for Hopper prefill (16 cores), once per dtypes, dims, page size and group; FlashInfer keeps it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil

import torch
from torch import Tensor

from spec_compile.errors import BackendError
from spec_compile.hardware import Hardware, detect_hardware
from spec_compile.ops import attention as generic
from spec_compile.ops.providers.contract import AttentionNode, Availability
from spec_compile.ops.providers.examples import example_arguments
from spec_compile.ops.providers.lowered import Lowered, lowered_op

NAME = "flashinfer"

INSTALL = "pip install 'spec-compile[flashinfer]'"
XQA_ARCHS = ("sm90", "sm120", "sm121")
TRTLLM_ARCHS = ("sm100", "sm103")
XQA_PAGE_SIZES = (16, 32, 64, 128)
PREFILL_DIMS = (64, 128, 256)
# Of trtllm-gen only what FlashInfer's own tests use (tests/attention/test_trtllm_gen_attention_decode.py: these pages, 128 and
# 256 dims) and the 64 dims of gpt-oss. Nothing of this path was ever run by us.
TRTLLM_PAGE_SIZES = (16, 32, 64)
TRTLLM_DIMS = (64, 128, 256)


def probe() -> Availability:
    """Whether FlashInfer is installed and can build kernels; imports nothing of it."""
    found = installed()
    if not found.ok:
        return found
    if importlib.util.find_spec("flashinfer_jit_cache") is None and (problem := _missing_build_tool()):
        return Availability(found.version, f"FlashInfer compiles its kernels on first use; {problem}")
    return found


def installed() -> Availability:
    """Whether the FlashInfer that is known here is installed, whatever else its kernels want; imports nothing of it."""
    try:
        version = importlib.metadata.version("flashinfer-python")
    except importlib.metadata.PackageNotFoundError:  # a folder called flashinfer on the path may still be found below
        version = None
    if version is None or importlib.util.find_spec("flashinfer") is None:
        return Availability(None, f"FlashInfer is not installed: {INSTALL}")
    if not (0, 7, 2) <= release(version) < (0, 7, 3):
        # XQA is called below the public functions, with scratch sized by the formula by which this version splits keys
        # (``xqa_grid`` in ops/kernels/xqa.py): a version that splits otherwise would write past its end.
        return Availability(
            version, f"flashinfer-python {version} is not a 0.7.2, the version whose kernels are known here: {INSTALL}"
        )
    return Availability(version)


def release(version: str) -> tuple[int, ...]:
    """The numbers a version begins with."""
    return tuple(int(part) for part in re.match(r"\d+(\.\d+)*", version)[0].split("."))


def _missing_build_tool() -> str | None:
    """What is missing and how to get it, looking where FlashInfer looks (flashinfer/jit/cpp_ext.py)."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = None if home else shutil.which("nvcc")
    if not (nvcc or shutil.which("nvcc", path=os.path.join(home or "/usr/local/cuda", "bin"))):
        return "nvcc is not found: install the CUDA toolkit, or set CUDA_HOME to it"
    if shutil.which("ninja") is None:
        return "ninja is not found: pip install ninja"
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        return "a C++ compiler is not found: install g++, or set CXX"
    return None


# ----------------------------------------------------------------------------------------------------------------------
# What it can do


def supports(node: AttentionNode, hardware: Hardware) -> str | None:
    """None when FlashInfer can run ``node`` on ``hardware``, otherwise the reason why not."""
    if hardware.vendor != "nvidia":
        return f"FlashInfer needs an NVIDIA device, not {hardware.name}"
    if node.op in ("mla_attention", "mla_prefill_attention"):
        return "FlashInfer's latent attention is planned on the host before each round"
    if node.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {node.dtype} is not float16 or bfloat16"
    if node.kv_dtype not in (node.dtype, torch.float8_e4m3fn):
        return f"a cache of {node.kv_dtype} is neither {node.dtype} nor float8_e4m3fn"
    if node.num_q_heads % node.num_kv_heads:
        return f"{node.num_q_heads} query heads are not a multiple of {node.num_kv_heads} key/value heads"
    if node.head_dim != node.v_head_dim:
        return f"keys of {node.head_dim} dims and values of {node.v_head_dim} differ"
    return _prefill_refusal(node, hardware) if node.op == "prefill_attention" else _window_refusal(node, hardware)


def _prefill_refusal(node: AttentionNode, hardware: Hardware) -> str | None:
    if int(hardware.arch.removeprefix("sm")) < 80:
        return f"the kernels need compute capability 8.0 or newer, not {hardware.arch}"
    if node.head_dim not in PREFILL_DIMS:
        return f"head dim {node.head_dim} is not one of {PREFILL_DIMS}"
    return None


def _window_refusal(node: AttentionNode, hardware: Hardware) -> str | None:
    kernel = window_kernel(hardware.arch, node.is_tree)
    if kernel is None:
        if hardware.arch in TRTLLM_ARCHS:
            return f"on {hardware.arch} windows go to trtllm-gen, which ignores a tree mask; triton takes trees"
        return f"XQA runs on {', '.join(XQA_ARCHS)}, trtllm-gen on {', '.join(TRTLLM_ARCHS)}; not on {hardware.arch}"
    if node.softcap > 0:
        return "XQA and trtllm-gen have no softcap; triton and fa4 do"
    if kernel == "trtllm-gen":
        return _trtllm_refusal(node)
    if node.page_size not in XQA_PAGE_SIZES:
        return f"page size {node.page_size} is not one of {XQA_PAGE_SIZES}"
    if node.head_dim % 16 or not (16 <= node.head_dim <= 128 or 192 <= node.head_dim <= 256):
        return f"head dim {node.head_dim} is not a multiple of 16 within 16..128 or 192..256"  # asserted by mha_sm90.cu
    group = node.num_q_heads // node.num_kv_heads
    if group > (32 if node.num_tokens == 1 and node.head_dim > 128 else 64):
        return f"{group} query heads of a key/value head do not fit into a tile of XQA's"
    if node.is_tree and node.window > 0:
        return "XQA clips a sliding window by slot, not by a tree node's depth; triton and fa4 do it by depth"
    return None


def _trtllm_refusal(node: AttentionNode) -> str | None:
    if node.kv_dtype != node.dtype:
        return f"trtllm-gen is called for caches of {node.dtype} only, not of {node.kv_dtype}; triton reads them"
    if node.page_size not in TRTLLM_PAGE_SIZES:
        return f"page size {node.page_size} is not one of {TRTLLM_PAGE_SIZES}, which trtllm-gen is known to take"
    if node.head_dim not in TRTLLM_DIMS:
        return f"head dim {node.head_dim} is not one of {TRTLLM_DIMS}, which trtllm-gen is known to take"
    return None


def window_kernel(arch: str, is_tree: bool) -> str | None:
    """``"xqa"``, ``"trtllm-gen"`` or None: which of FlashInfer's paged kernels takes a window of tokens on ``arch``.

    trtllm-gen, which FlashInfer itself prefers on SM100, takes a mask argument and ignores it: chains only. This row is
    from reading flashinfer/decode.py (``trtllm_batch_decode_with_kv_cache``); it has never been run.
    """
    if arch in XQA_ARCHS:
        return "xqa"
    return "trtllm-gen" if arch in TRTLLM_ARCHS and not is_tree else None


def lower(node: AttentionNode) -> Lowered:
    """The op and the plan that take the place of ``spec_compile::<node.op>``."""
    ops = torch.ops.spec_compile
    if node.op == "prefill_attention":
        return Lowered(ops.prefill_attention_flashinfer.default, ops.prefill_plan_flashinfer.default)
    return Lowered(ops.attention_flashinfer.default, ops.attention_plan_flashinfer.default, (node.num_tokens, node.page_size))


def warm_up(node: AttentionNode, device: torch.device) -> None:
    """Import FlashInfer, build the kernel of ``node`` and make what must not be made during a capture."""
    from spec_compile.ops.kernels.split_kv import COUNTERS

    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    COUNTERS.prepare(device)
    lower(node)(*example_arguments(node, device))


# ----------------------------------------------------------------------------------------------------------------------
# Windows: plan


@torch.library.custom_op("spec_compile::attention_plan_flashinfer", mutates_args=())
def attention_plan_flashinfer(
    page_table: Tensor, cache_len: Tensor, tree_mask: Tensor | None, num_tokens: int, page_size: int
) -> tuple[Tensor, Tensor]:
    """What XQA wants to know of the rows: how many keys each has, and which of the last N each token sees.

    XQA takes a row's last N keys for its window. Where a row's window hangs over its last page (a finished row's may),
    only what the page table holds is counted, and the mask is shifted by the rest, so that the result stays that of the
    generic op.

    Args:
        page_table, cache_len, tree_mask: as in ``attention``.
        num_tokens: N.
        page_size: slots in a page.

    Returns:
        int32 [B, 1], keys of each row, its window included; int32 [B, N, W], bit j of row i: token i sees the j-th of the
        last N keys. A chain gets its causal mask here.
    """
    batch, device = cache_len.shape[0], cache_len.device
    capacity = page_table.shape[1] * page_size
    end = cache_len + num_tokens
    tree = generic.window_visibility(tree_mask, batch, num_tokens, device)
    source = torch.arange(num_tokens, device=device) - (end - capacity).clamp(min=0)[:, None]  # [B, N]
    seen = tree.gather(2, source.clamp(min=0)[:, None].expand(-1, num_tokens, -1)) | (source < 0)[:, None]
    padded = torch.nn.functional.pad(seen.long(), (0, -num_tokens % 32)).unflatten(-1, (-1, 32))  # [B, N, W, 32]
    words = (padded << torch.arange(32, device=device)).sum(-1)
    words = torch.where(words >= 2**31, words - 2**32, words)
    return end.clamp(max=capacity)[:, None].contiguous(), words.to(torch.int32)


@attention_plan_flashinfer.register_fake
def attention_plan_flashinfer_fake(page_table, cache_len, tree_mask, num_tokens, page_size) -> tuple[Tensor, Tensor]:
    batch = cache_len.shape[0]
    return cache_len.new_empty(batch, 1), cache_len.new_empty(batch, num_tokens, -(-num_tokens // 32))


@attention_plan_flashinfer.register_kernel("cuda")
def attention_plan_flashinfer_cuda(page_table, cache_len, tree_mask, num_tokens, page_size) -> tuple[Tensor, Tensor]:
    from spec_compile.ops.kernels.xqa import xqa_plan

    return xqa_plan(cache_len, tree_mask, num_tokens, page_table.shape[1] * page_size)


# ----------------------------------------------------------------------------------------------------------------------
# Windows: the op


def _attention(
    q, k, v, k_cache, v_cache, page_table, cache_len, tree_mask, scale, window, softcap, sinks, seq_lens, mask
) -> Tensor:
    """``spec_compile::attention``; same arguments and result, behind them the outputs of ``attention_plan_flashinfer``.

    Differs from the generic op in rows whose window hangs over their last page when ``window`` is set: XQA counts the
    window from the last key.

    Raises:
        BackendError: called for a node that ``supports`` refuses: soft-capping, or a tree with a sliding window.
    """
    from spec_compile.ops.kernels import round_ops, xqa

    if softcap > 0:
        raise BackendError(f"softcap={softcap}: XQA and trtllm-gen do not cap logits; use the triton or fa4 provider.")
    if tree_mask is not None and window > 0:
        raise BackendError(
            f"window={window} with a tree_mask: XQA clips by slot, not by depth; use the triton or fa4 provider."
        )
    round_ops.kv_write(k, v, k_cache, v_cache, page_table, cache_len)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    kernel = window_kernel(detect_hardware(q.device).arch, tree_mask is not None)
    launch = xqa.trtllm_gen if kernel == "trtllm-gen" else xqa.xqa
    sinks = None if sinks is None else sinks.float()
    launch(q.contiguous(), k_cache, v_cache, page_table.contiguous(), seq_lens, mask, scale, window, sinks, out)
    return out


attention_flashinfer = lowered_op(generic.attention, "flashinfer", _attention, extra=("seq_lens", "mask"))


# ----------------------------------------------------------------------------------------------------------------------
# Prompts


@torch.library.custom_op("spec_compile::prefill_plan_flashinfer", mutates_args=())
def prefill_plan_flashinfer(page_table: Tensor, cu_seqlens: Tensor) -> Tensor:
    """``cu_seqlens`` on the host, int32 [B + 1]: the one host read of a prefill, from which FlashInfer plans."""
    return cu_seqlens.to("cpu", copy=True)


@prefill_plan_flashinfer.register_fake
def prefill_plan_flashinfer_fake(page_table, cu_seqlens) -> Tensor:
    return torch.empty_like(cu_seqlens, device="cpu")


def _prefill_attention(q, k, v, k_cache, v_cache, page_table, cu_seqlens, scale, window, softcap, sinks, lengths) -> Tensor:
    """``spec_compile::prefill_attention``; same arguments and result, behind them what ``prefill_plan_flashinfer`` returned.

    Sinks are no part of FlashInfer's kernel: they take their share of each row's weight afterwards, by its log-sum-exp.
    """
    from spec_compile.ops.kernels.flashinfer_prefill import ragged_prefill
    from spec_compile.ops.kernels.kv_write_packed import kv_write_packed

    kv_write_packed(k, v, k_cache, v_cache, page_table, cu_seqlens, window)
    k, v = (generic.as_cached(x, k_cache.dtype) for x in (k, v))  # a prompt sees itself as later windows will
    out, lse = ragged_prefill(q, k, v, lengths, scale, window, softcap, with_lse=sinks is not None)
    return out if sinks is None else out.mul_(torch.sigmoid(lse - sinks.float())[..., None])


prefill_attention_flashinfer = lowered_op(generic.prefill_attention, "flashinfer", _prefill_attention, extra=("lengths",))
