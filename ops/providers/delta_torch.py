"""Gated delta rules in plain PyTorch: what CPUs run, and the reference elsewhere."""

from __future__ import annotations

import torch

from spec_compile.hardware import Hardware
from spec_compile.ops import linear_attention as generic
from spec_compile.ops.providers import Availability, DeltaNode
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


_WINDOWS = ("kv_window", "gate_window")
gdn_verify = torch.library.custom_op("spec_compile::gdn_verify_torch", generic.verify_reference, mutates_args=_WINDOWS)
gdn_prefill = torch.library.custom_op("spec_compile::gdn_prefill_torch", generic.prefill_reference, mutates_args=("state",))
gdn_verify.register_fake(generic.gdn_verify_fake)
gdn_prefill.register_fake(generic.gdn_prefill_fake)
