"""Gated delta rules in plain PyTorch: what CPUs run, and the reference elsewhere."""

from __future__ import annotations

import torch

from spec_compile.hardware import Hardware
from spec_compile.ops import linear_attention as generic
from spec_compile.ops.providers.contract import Availability, DeltaNode
from spec_compile.ops.providers.lowered import lowered_op
from spec_compile.ops.torch_private import OpOverload

NAME = "torch"


def probe() -> Availability:
    return Availability(version=torch.__version__)


def supports(node: DeltaNode, hardware: Hardware) -> str | None:
    if node.op == "gdn_prefill" and hardware.is_cuda:
        return "the reference reads the prompts' lengths on the host"
    return None


def lower(node: DeltaNode) -> OpOverload:
    return getattr(torch.ops.spec_compile, f"{node.op}_torch").default


def warm_up(node: DeltaNode, device: torch.device) -> None:
    pass


gdn_verify_torch = lowered_op(generic.gdn_verify, "torch", generic.verify_reference)
gdn_prefill_torch = lowered_op(generic.gdn_prefill, "torch", generic.prefill_reference)
