"""What hardware a model runs on: the key of every compile-time choice. A leaf module: imports nothing of the project."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Hardware:
    """A device as far as kernel choice may depend on it; part of every compile-cache key.

    Attributes:
        vendor: ``"cpu"``, ``"nvidia"`` or ``"amd"``.
        arch: ``"cpu"``, ``"sm90"``, ``"gfx942"``, …
        num_sms: multiprocessors (compute units on AMD); CPU threads on a CPU.
        name: the device's marketing name, for reports only.
    """

    vendor: str
    arch: str
    num_sms: int
    name: str

    @property
    def is_cuda(self) -> bool:
        return self.vendor != "cpu"


def detect_hardware(device: torch.device | str) -> Hardware:
    """The hardware behind a torch device.

    Raises:
        ValueError: the device is neither a CPU nor a CUDA/ROCm device.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return _detect_cuda(torch.cuda.current_device() if device.index is None else device.index)
    if device.type == "cpu":
        return Hardware(vendor="cpu", arch="cpu", num_sms=torch.get_num_threads(), name="CPU")
    raise ValueError(
        f"device {str(device)!r} is not supported: spec_compile runs on 'cpu' and 'cuda' (NVIDIA or ROCm) devices. "
        "Move the model with model.to('cuda') or model.to('cpu')."
    )


@functools.cache
def _detect_cuda(index: int) -> Hardware:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        arch = properties.gcnArchName.split(":")[0]  # "gfx942:sramecc+:xnack-" -> "gfx942"
        return Hardware("amd", arch, properties.multi_processor_count, properties.name)
    return Hardware("nvidia", f"sm{properties.major}{properties.minor}", properties.multi_processor_count, properties.name)
