"""The library's own Triton kernels: every attention op of the library, in one launch each, on any CUDA or ROCm device.

Triton itself is imported by ``probe()`` and by the first call of an op, never by importing this module.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util

import torch
from torch import Tensor

from spec_compile.hardware import Hardware, detect_hardware
from spec_compile.ops import attention as generic
from spec_compile.ops.providers.contract import AttentionNode, Availability
from spec_compile.ops.providers.examples import example_arguments
from spec_compile.ops.providers.lowered import lowered_op
from spec_compile.ops.torch_private import OpOverload

NAME = "triton"

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_KV_DTYPES = (*_DTYPES, torch.float8_e4m3fn)
_MAX_HEAD_DIM, _MAX_LATENT_DIM = 256, 512


def probe() -> Availability:
    """Whether Triton is installed."""
    if importlib.util.find_spec("triton") is None:
        return Availability(None, "Triton is not installed: pip install triton")
    return Availability(importlib.metadata.version("triton"))


def supports(node: AttentionNode, hardware: Hardware) -> str | None:
    """None when the kernels can run ``node`` on ``hardware``, otherwise the reason why not."""
    if not hardware.is_cuda:
        return f"Triton needs a CUDA or ROCm device, not {hardware.name}"
    if hardware.vendor == "nvidia" and int(hardware.arch.removeprefix("sm")) < 80:
        return f"the kernels need compute capability 8.0 or newer, not {hardware.arch}"
    if node.dtype not in _DTYPES:
        return f"dtype {node.dtype} is not float16, bfloat16 or float32"
    if node.kv_dtype not in _KV_DTYPES or node.kv_dtype.itemsize > node.dtype.itemsize:
        return f"the cache's dtype {node.kv_dtype} is not among those that queries of {node.dtype} can read"
    if node.kv_dtype == torch.float8_e4m3fn and hardware.vendor == "nvidia" and int(hardware.arch.removeprefix("sm")) < 89:
        return f"Triton has no float8_e4m3fn before compute capability 8.9, here it is {hardware.arch}"
    if node.page_size < 16 or node.page_size & (node.page_size - 1):
        return f"page size {node.page_size} is not a power of two of at least 16"
    if node.num_q_heads % node.num_kv_heads:
        return f"{node.num_q_heads} query heads are not a multiple of {node.num_kv_heads} key/value heads"
    if node.op in ("mla_attention", "mla_prefill_attention"):
        if not 16 <= node.v_head_dim <= _MAX_LATENT_DIM or not 0 < node.head_dim - node.v_head_dim <= 128:
            return f"latent heads of {node.v_head_dim} + {node.head_dim - node.v_head_dim} dims are out of range"
        return None
    if not (16 <= node.head_dim <= _MAX_HEAD_DIM and 16 <= node.v_head_dim <= _MAX_HEAD_DIM):
        return f"head dims {node.head_dim} and {node.v_head_dim} are not within 16..{_MAX_HEAD_DIM}"
    return None


def lower(node: AttentionNode) -> OpOverload:
    """The op that takes the place of ``spec_compile::<node.op>``."""
    return getattr(torch.ops.spec_compile, f"{node.op}_triton").default


def warm_up(node: AttentionNode, device: torch.device) -> None:
    """Compile the kernels of ``node`` and make the arrival counters, so that capture meets neither."""
    from spec_compile.ops.kernels.attention_decode import COUNTERS

    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    COUNTERS.prepare(device)
    lower(node)(*example_arguments(node, device))


def shared_memory(hardware: Hardware) -> int:
    """Bytes of shared memory that one program may have."""
    if hardware.vendor == "amd":
        return 64 * 1024
    if hardware.vendor == "cpu":  # Triton's interpreter
        return 224 * 1024
    large = {"sm80": 160, "sm87": 160, "sm90": 224, "sm100": 224, "sm103": 224}
    return large.get(hardware.arch, 96) * 1024


@functools.cache
def device_limits(device: torch.device) -> tuple[int, int]:
    """(multiprocessors, bytes of shared memory of one program) of a device."""
    hardware = detect_hardware(device)
    return hardware.num_sms, shared_memory(hardware)


# ----------------------------------------------------------------------------------------------------------------------
# The lowered ops


def _attention(q: Tensor, *others) -> Tensor:
    """``spec_compile::attention``; same arguments and result."""
    from spec_compile.ops.kernels.attention_decode import attention_decode

    num_sms, shared_memory = device_limits(q.device)
    return attention_decode(q, *others, num_sms=num_sms, shared_memory=shared_memory)


def _mla_attention(q, kv, kv_cache, page_table, cache_len, tree_mask, scale, v_dim) -> Tensor:
    """``spec_compile::mla_attention``; same arguments and result."""
    from spec_compile.ops.kernels.attention_decode import attention_decode

    num_sms, shared_memory = device_limits(q.device)
    return attention_decode(
        q, kv[:, :, None], None, kv_cache[:, :, None], None, page_table, cache_len, tree_mask, scale,
        num_sms=num_sms, shared_memory=shared_memory, v_dim=v_dim,
    )  # fmt: skip


def _prefill_attention(q: Tensor, *others) -> Tensor:
    """``spec_compile::prefill_attention``; same arguments and result."""
    from spec_compile.ops.kernels.attention_prefill import attention_prefill

    return attention_prefill(q, *others, shared_memory=device_limits(q.device)[1])


def _mla_prefill_attention(q, kv, kv_cache, page_table, cu_seqlens, scale, v_dim) -> Tensor:
    """``spec_compile::mla_prefill_attention``; same arguments and result."""
    from spec_compile.ops.kernels.attention_prefill import attention_prefill

    return attention_prefill(
        q, kv[:, None], None, kv_cache[:, :, None], None, page_table, cu_seqlens, scale,
        shared_memory=device_limits(q.device)[1], v_dim=v_dim,
    )  # fmt: skip


attention_triton = lowered_op(generic.attention, "triton", _attention)
mla_attention_triton = lowered_op(generic.mla_attention, "triton", _mla_attention)
prefill_attention_triton = lowered_op(generic.prefill_attention, "triton", _prefill_attention)
mla_prefill_attention_triton = lowered_op(generic.mla_prefill_attention, "triton", _mla_prefill_attention)
