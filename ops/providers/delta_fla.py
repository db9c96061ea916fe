"""Gated delta rules of packed prompts by flash-linear-attention, ``chunk_gated_delta_rule`` (fla-core 0.6.0).

Its chunks of 64 tokens are computed at once, but for one pass over each prompt's states: seven kernels where ``triton`` has
two. Windows are not its business: it has no trees, and its kernel for single tokens writes the states.

What was read in fla/ops/gated_delta_rule/{chunk,chunk_fwd,gate,wy_fast}.py, fla/ops/common/{chunk_delta_h,chunk_o,gate}.py,
fla/ops/utils/index.py and fla/utils/, and what follows here:

* q, k [1, T, H, K] and v [1, T, HV, V] with fewer key heads than value heads, raw gates with ``use_gate_in_kernel`` and
  ``use_beta_sigmoid_in_kernel``, and states [N, HV, V, K] in float32 with ``state_v_first``: all as ours, nothing is
  transposed or repeated. ``state_slot`` is ours alone: the states are copied to their slots. A row without tokens gets zeros;
* between its kernels it rounds to the inputs' type (inverse, w, u and the states at the chunks' bounds), and float32 products
  are TF32 on NVIDIA: float32 is refused. States behind a prompt have errors of the inputs' type, as
  ``triton``'s have. The states at the chunks' bounds are scratch: T / 64 states a layer, in the inputs' type;
* key dims up to 256 (an assertion); any value dim;
* inputs that are not dense are copied, one launch each, and its unit lengths (1e-6 under the root, as ours) are tuned and
  compiled anew for every further 65536 vectors (``NB`` is a constant of the kernel): ``unit_prompts`` does both in one launch,
  and ``use_qk_l2norm_in_kernel`` stays off;
* the list of chunks is made from ``cu_seqlens`` on the device with one host sync for its length, and remembered by the identity
  of that tensor (``tensor_cache``), not its contents. ``gdn_prefill_rows`` makes a new tensor for every prefill, which its
  layers share: one sync for all of them, and no list of another prefill's;
* its kernels are tuned by what is called first, whatever its length: ``warm_up`` calls with a long prompt;
* that memory and Triton's autotuner, which keeps a call's arguments in itself while it looks for a configuration, are not for
  several threads: one at a time calls it;
* with FlashQLA installed it hands calls over, but not with gates computed in the kernel: what runs is what was read.

fla is imported by warm-up, in seconds: it makes a CUDA context, and on Blackwell it sets Triton's allocator.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import threading

import torch
from torch import Tensor

from spec_compile.hardware import Hardware
from spec_compile.ops import linear_attention as generic
from spec_compile.ops.providers import delta_triton
from spec_compile.ops.providers.contract import Availability, DeltaNode
from spec_compile.ops.providers.delta_examples import example_arguments
from spec_compile.ops.providers.flashinfer import release
from spec_compile.ops.providers.lowered import Lowered, lowered_op

NAME = "fla"

INSTALL = "pip install 'spec-compile[fla]'"
_DTYPES = (torch.float16, torch.bfloat16)
_MAX_KEY_DIM = 256
_TUNED_FOR = 2048  # prompt tokens
OPS = ("gdn_prefill",)  # of all delta rules; a provider that names none runs each
_LOCK = threading.Lock()


def probe() -> Availability:
    """Whether the fla that is known here is installed, and what it needs; imports nothing of them."""
    try:
        version = importlib.metadata.version("fla-core")
    except importlib.metadata.PackageNotFoundError:  # a folder called fla on the path may still be found below
        version = None
    if version is None or importlib.util.find_spec("fla") is None:
        return Availability(None, f"flash-linear-attention is not installed: {INSTALL}")
    if not (0, 6) <= release(version) < (0, 7):
        return Availability(version, f"fla-core {version} is not a 0.6, the version that is known here: {INSTALL}")
    if importlib.util.find_spec("einops") is None:
        return Availability(version, "einops, which fla imports, is not installed: pip install einops")
    return Availability(version, delta_triton.probe().problem)


def supports(node: DeltaNode, hardware: Hardware) -> str | None:
    """None when fla can run ``node`` on ``hardware``, otherwise the reason why not."""
    if node.op not in OPS:
        return "fla runs prompts only: it has no kernel that leaves the states of a window as they were"
    if not hardware.is_cuda:
        return f"fla's kernels need a CUDA or ROCm device, not {hardware.name}"
    if hardware.vendor == "nvidia" and int(hardware.arch.removeprefix("sm")) < 80:
        return f"the kernels need compute capability 8.0 or newer, not {hardware.arch}"
    if node.dtype not in _DTYPES:
        return f"fla computes from float16 or bfloat16 and would round products of {node.dtype}"
    if node.state_dtype != torch.float32:
        return f"fla returns float32 states, not {node.state_dtype}"
    if node.head_dim > _MAX_KEY_DIM:
        return f"key dim {node.head_dim} is beyond {_MAX_KEY_DIM}"
    if node.num_v_heads % node.num_k_heads:
        return f"{node.num_v_heads} value heads are not a multiple of {node.num_k_heads} key heads"
    return None


def lower(node: DeltaNode) -> Lowered:
    """The op that takes the place of ``spec_compile::gdn_prefill``, and the rows that layers share."""
    ops = torch.ops.spec_compile
    return Lowered(ops.gdn_prefill_fla.default, ops.gdn_prefill_rows.default)


def warm_up(node: DeltaNode, device: torch.device) -> None:
    """Import fla, then compile and tune its kernels for ``node``: half a minute at first, from Triton's cache later."""
    lower(node)(*example_arguments(node, device, num_tokens=_TUNED_FOR))


# ----------------------------------------------------------------------------------------------------------------------
# The ops


@torch.library.custom_op("spec_compile::gdn_prefill_rows", mutates_args=())
def gdn_prefill_rows(cu_seqlens: Tensor) -> Tensor:
    """The prompts' boundaries as fla wants them: int32 [B + 1] -> int64 [B + 1], always a new tensor (see above)."""
    return cu_seqlens.to(torch.int64, copy=True)


@gdn_prefill_rows.register_fake
def gdn_prefill_rows_fake(cu_seqlens) -> Tensor:
    return cu_seqlens.new_empty(cu_seqlens.shape, dtype=torch.int64)


def _gdn_prefill(q, k, v, a, b, A_log, dt_bias, state, state_slot, cu_seqlens, scale, rows) -> Tensor:
    """``spec_compile::gdn_prefill``; same arguments and result.

    Args:
        rows: int64 [B + 1], from ``gdn_prefill_rows(cu_seqlens)``; layers of one prefill pass the same tensor, and it is not
            written to afterwards. The first layer reads its number of chunks on the host.
    """
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    from spec_compile.ops.kernels import gdn_unit

    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    q, k, v = gdn_unit.unit_prompts(q, k, v)
    with _LOCK, torch.no_grad():  # weights may ask for gradients, for which fla would keep its intermediate results
        out, final = chunk_gated_delta_rule(
            q[None], k[None], v[None], a[None], b[None], scale=scale, output_final_state=True, state_v_first=True,
            use_gate_in_kernel=True, A_log=A_log, dt_bias=dt_bias, use_beta_sigmoid_in_kernel=True, cu_seqlens=rows,
        )  # fmt: skip
    state.index_copy_(0, state_slot.long(), final)  # [B, Hv, Dv, D]
    return out[0]


gdn_prefill_fla = lowered_op(generic.gdn_prefill, "fla", _gdn_prefill, extra=("rows",))
