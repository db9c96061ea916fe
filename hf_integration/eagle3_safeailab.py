"""The path that ``checkpoints.eagle3_safeailab`` had in 0.1: what scripts import from here stays importable."""

from spec_compile.hf_integration.checkpoints.eagle3_safeailab import read_eagle3_safeailab, safeailab_taps

__all__ = ["read_eagle3_safeailab", "safeailab_taps"]
