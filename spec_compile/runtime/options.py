"""What every model of one ``spec_compile()`` call is compiled with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spec_compile.hardware import Hardware
from spec_compile.passes.backend_option import Backend
from spec_compile.passes.select_backend import Tuner
from spec_compile.runtime.program import SegmentCompiler


@dataclass(frozen=True)
class RuntimeOptions:
    """Shared by the target and its draft.

    Attributes:
        hardware: what kernels are chosen for.
        compiler: compiles the segments between attention nodes; it also counts the time that compiling takes.
        backend: attention kernels, see ``spec_compile()``.
        page_size: slots a page on a GPU; on a CPU a row has one page.
        kv_dtype: type of the caches; None for the model's own.
        tuner: measures providers for ``backend="tune"``.
        self_check: compare what is captured of the target with its own forward, once.
    """

    hardware: Hardware
    compiler: SegmentCompiler
    backend: Backend = "auto"
    page_size: int = 64
    kv_dtype: torch.dtype | None = None
    tuner: Tuner | None = None
    self_check: bool = False
