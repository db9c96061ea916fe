"""Gated delta rules by the library's own Triton kernels: chains and trees in one launch a layer, packed prompts in two.

Triton itself is imported by ``probe()`` and by the first call of an op, never by importing this module.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util

import torch
from torch import Tensor

from spec_compile.hardware import Hardware
from spec_compile.ops import linear_attention as generic
from spec_compile.ops.providers.contract import Availability, DeltaNode
from spec_compile.ops.providers.delta_examples import example_arguments
from spec_compile.ops.providers.lowered import lowered_op
from spec_compile.ops.providers.triton import device_limits, shared_memory
from spec_compile.ops.torch_private import OpOverload

NAME = "triton"

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_HEAD_DIM = 256


def probe() -> Availability:
    """Whether Triton is installed."""
    if importlib.util.find_spec("triton") is None:
        return Availability(None, "Triton is not installed: pip install triton")
    return Availability(importlib.metadata.version("triton"))


def supports(node: DeltaNode, hardware: Hardware) -> str | None:
    """None when the kernels can run ``node`` on ``hardware``, otherwise the reason why not."""
    if not hardware.is_cuda:
        return f"Triton needs a CUDA or ROCm device, not {hardware.name}"
    if hardware.vendor == "nvidia" and int(hardware.arch.removeprefix("sm")) < 80:
        return f"the kernels need compute capability 8.0 or newer, not {hardware.arch}"
    if node.dtype not in _DTYPES:
        return f"dtype {node.dtype} is not float16, bfloat16 or float32"
    if node.state_dtype != torch.float32:
        return f"states of {node.state_dtype} are not float32"
    if max(node.head_dim, node.v_head_dim) > _MAX_HEAD_DIM:
        return f"head dims {node.head_dim} and {node.v_head_dim} are not within {_MAX_HEAD_DIM}"
    most = most_tokens(shared_memory(hardware), node.head_dim)
    if (node.num_tokens or 1) > most:
        what = "prompts" if node.num_tokens is None else f"windows of {node.num_tokens} tokens"
        return (
            f"{what} with keys of {node.head_dim} dims, where the shared memory of {hardware.arch} is enough for {most} tokens"
        )
    return None


def most_tokens(shared: int, key_dim: int) -> int:
    """Tokens of a window or chunk that one program can take with ``shared`` bytes of shared memory; 0 if none.

    For keys of 128 dims the kernels compiled for sm_90 take at most 160, 64 and 48 KiB (64, 32, 16 tokens); of 256, twice that.
    Windows of 32 float32 tokens take 80 there, of 227, where products of 64 lines read both sides from shared memory.
    """
    width = max(1, (1 << (key_dim - 1).bit_length()) // 128)
    return next((tokens for tokens, kib in ((64, 160), (32, 64), (16, 48)) if kib * 1024 * width <= shared), 0)


def lower(node: DeltaNode) -> OpOverload:
    return getattr(torch.ops.spec_compile, f"{node.op}_triton").default


def warm_up(node: DeltaNode, device: torch.device) -> None:
    """Compile the kernel of ``node``, so that capture does not meet the compiler."""
    lower(node)(*example_arguments(node, device))


def _gdn_verify(*args) -> Tensor:
    """``spec_compile::gdn_verify``; same arguments and result."""
    from spec_compile.ops.kernels import gdn

    return gdn.gdn_verify(*args)


def _gdn_prefill(q: Tensor, *others) -> Tensor:
    """``spec_compile::gdn_prefill``; same arguments and result."""
    from spec_compile.ops.kernels import gdn_prefill

    chunk = most_tokens(device_limits(q.device)[1], q.shape[-1])
    return gdn_prefill.gdn_prefill(q, *others, chunk=chunk)


gdn_verify_triton = lowered_op(generic.gdn_verify, "triton", _gdn_verify)
gdn_prefill_triton = lowered_op(generic.gdn_prefill, "triton", _gdn_prefill)
