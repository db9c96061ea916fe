"""Gated delta rules of chains by FlashInfer's kernel for several tokens, ``gated_delta_rule_mtp`` (flashinfer-python 0.7.2).

Our windows never write states, so it runs with ``disable_state_update=True`` and without its buffer of a state per token;
``save_window`` keeps what ``gdn_commit`` replays. Two launches a layer, where ``triton`` has one.

What was read in FlashInfer's gdn_decode.py and gdn_kernels/gdn_decode_mtp.py, and what follows here:

* queries, keys, values and raw gates are converted to bfloat16 without a word: other types are refused;
* any strides with a dense last dim will do (the layouts are dynamic), bases must be aligned to 16 bytes. Views of the
  convolution's output are, for heads of 128 dims; what is not is copied (one more launch and its bytes, each time);
* ``A_log`` must be float32, ``dt_bias`` may be bfloat16: ``save_window`` widens both, so that there is one kernel for all;
* a warp holds a row of the state, 4 key dims a thread: key dims must be 128 (its assertion says "at least", but with 256 it
  divides by zero); a block takes up to 64 value dims: they must be a multiple of 64, from 128 on;
* the window is unrolled by the compiler: a kernel a length and range of rows, in 6 s of one core, or 80 s for 16 tokens, and
  another where ``scale`` differs. FlashInfer's tests go to 8 tokens, ours to 16, beyond is refused;
* its documentation begins at 2 tokens. One token is right for several rows; for one row FlashInfer cannot make out the layout
  of a placeholder it makes itself, so that the token runs twice there: five small copies, and the second output is dropped;
* unit lengths with 1e-6 under the root, softplus linear above 20, as ours; for more than 128 (row, value head) pairs the
  softplus is NaN where a + dt_bias is above 88 (0 · log(1 + inf)), which no trained gate comes near;
* a negative slot would leave its output unwritten; ours are never negative: padding rows read slot 0, which holds zeros;
* kernels, placeholders and a counter of B + 1 zeros are made by the first call of a shape: ``warm_up`` makes them.

FlashInfer is imported (seconds) by warm-up; its kernels are CuTe programs, compiled by nvidia-cutlass-dsl without nvcc and kept
on disk by FlashInfer.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util

import torch
from torch import Tensor

from spec_compile.errors import BackendError
from spec_compile.hardware import Hardware
from spec_compile.ops import linear_attention as generic
from spec_compile.ops.providers import flashinfer as attention
from spec_compile.ops.providers.contract import Availability, DeltaNode
from spec_compile.ops.providers.delta_examples import example_arguments
from spec_compile.ops.providers.lowered import lowered_op
from spec_compile.ops.torch_private import OpOverload

NAME = "flashinfer"

MAX_TOKENS = 16
CUTE_DSL = (4, 6, 2)  # from FlashInfer's own requirements
BF16_STATE_ARCHS = ("sm100", "sm103")
_ALIGNMENT = 16  # bytes


def probe() -> Availability:
    """Whether FlashInfer and the compiler of its CuTe kernels are installed; imports nothing of them."""
    found = attention.installed()
    if not found.ok:
        return found
    problem = _missing_compiler()
    return found if problem is None else Availability(found.version, problem)


def _missing_compiler() -> str | None:
    least = ".".join(map(str, CUTE_DSL))
    install = f"pip install 'nvidia-cutlass-dsl>={least}'"
    try:
        version = importlib.metadata.version("nvidia-cutlass-dsl")
    except importlib.metadata.PackageNotFoundError:
        version = None
    if version is None or importlib.util.find_spec("cutlass") is None:
        return f"FlashInfer's delta rule is compiled by nvidia-cutlass-dsl, which is not installed: {install}"
    if attention.release(version) < CUTE_DSL:
        return f"nvidia-cutlass-dsl {version} is older than {least}, which FlashInfer asks for: {install}"
    return None


def supports(node: DeltaNode, hardware: Hardware) -> str | None:
    """None when FlashInfer can run ``node`` on ``hardware``, otherwise the reason why not."""
    if hardware.vendor != "nvidia":
        return f"FlashInfer needs an NVIDIA device, not {hardware.name}"
    if node.op != "gdn_verify":
        return "FlashInfer's delta rule of prompts takes gates that were computed before; triton computes them itself"
    if node.is_tree:
        return "FlashInfer's delta rule knows chains only; triton takes trees"
    if int(hardware.arch.removeprefix("sm")) < 90:
        return f"the kernel needs compute capability 9.0 or newer, not {hardware.arch}"
    if state_kernel(hardware.arch, node.state_dtype) != "mtp":
        return _state_refusal(node, hardware)
    if node.dtype != torch.bfloat16:
        return f"the kernel computes from bfloat16 and would round {node.dtype}"
    if node.head_dim != 128:
        return f"key dim {node.head_dim} is not 128"
    if node.v_head_dim < 128 or node.v_head_dim % 64:
        return f"value dim {node.v_head_dim} is not 128 or more, in steps of 64"
    if node.num_v_heads % node.num_k_heads:
        return f"{node.num_v_heads} value heads are not a multiple of {node.num_k_heads} key heads"
    if node.num_tokens > MAX_TOKENS:
        return f"windows of {node.num_tokens} tokens are longer than {MAX_TOKENS}: the kernel unrolls them"
    return None


def state_kernel(arch: str, state_dtype: torch.dtype) -> str | None:
    """``"mtp"``, ``"bf16_state"`` or None: which of FlashInfer's kernels reads states of a type.

    ``gated_delta_rule_mtp`` reads float32 on SM90 and newer. For bfloat16 states FlashInfer has a kernel of its own, which
    SGLang prefers on SM100 (gdn_kernels/gdn_decode_bf16_state.py; SGLang, gdn_flashinfer.py).
    """
    if state_dtype == torch.float32:
        return "mtp" if int(arch.removeprefix("sm")) >= 90 else None
    return "bf16_state" if state_dtype == torch.bfloat16 and arch in BF16_STATE_ARCHS else None


def _state_refusal(node: DeltaNode, hardware: Hardware) -> str:
    if state_kernel(hardware.arch, node.state_dtype) == "bf16_state":
        return "FlashInfer's kernel for bfloat16 states is not called here: the library keeps states in float32"
    return f"FlashInfer has no kernel for states of {node.state_dtype} on {hardware.arch}"


def lower(node: DeltaNode) -> OpOverload:
    """The op that takes the place of ``spec_compile::gdn_verify``."""
    return torch.ops.spec_compile.gdn_verify_flashinfer.default


def warm_up(node: DeltaNode, device: torch.device) -> None:
    """Import FlashInfer, compile the kernel of ``node`` and make what must not be made during a capture."""
    lower(node)(*example_arguments(node, device))


# ----------------------------------------------------------------------------------------------------------------------
# The op


def _gdn_verify(
    q, k, v, a, b, A_log, dt_bias, state, kv_window, gate_window, state_slot, tree_mask, scale
) -> Tensor:  # fmt: skip
    """``spec_compile::gdn_verify``; same arguments and result.

    Raises:
        BackendError: a tree, or gates that are not bfloat16, which FlashInfer would round.
    """
    import flashinfer.gdn_kernels.gdn_decode_mtp  # noqa: F401 (gdn_decode goes on without it and fails in the call)
    from flashinfer.gdn_decode import gated_delta_rule_mtp

    from spec_compile.ops.kernels import gdn_window

    if tree_mask is not None:
        raise BackendError("a tree_mask: FlashInfer's delta rule knows chains only; use the triton provider.")
    if a.dtype != torch.bfloat16 or b.dtype != torch.bfloat16:
        raise BackendError(f"gates of {a.dtype} and {b.dtype}: FlashInfer would round them; use the triton provider.")
    shape = v.shape
    q, k, v = (_aligned(x) for x in (q, k, v))
    a, b = (x if x.stride(-1) == 1 else x.contiguous() for x in (a, b))
    with torch.cuda.device_of(q):
        weights = gdn_window.save_window(k, v, a, b, A_log, dt_bias, kv_window, gate_window, state_slot)
        if q.shape[:2] == (1, 1):  # see above
            q, k, v, a, b = (torch.cat([x, x], 1) for x in (q, k, v, a, b))
        out = q.new_empty(v.shape)
        gated_delta_rule_mtp(
            q, k, v, state, state_slot, A_log=weights[0], a=a, dt_bias=weights[1], b=b, scale=scale, output=out,
            disable_state_update=True, use_qk_l2norm=True,
        )  # fmt: skip
    return out.flatten(0, 1)[: shape[0] * shape[1]].view(shape)


gdn_verify_flashinfer = lowered_op(generic.gdn_verify, "flashinfer", _gdn_verify)


def _aligned(x: Tensor) -> Tensor:
    """``x`` itself where every head vector is dense and begins at a multiple of 16 bytes, else a copy."""
    steps = [stride * x.element_size() for stride in x.stride()[:-1]]
    dense = x.stride(-1) == 1 and not any(step % _ALIGNMENT for step in (x.data_ptr(), *steps))
    return x if dense else x.clone(memory_format=torch.contiguous_format)
