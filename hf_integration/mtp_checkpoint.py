"""The path that ``checkpoints.mtp`` had in 0.1: what scripts import from here stays importable."""

from spec_compile.hf_integration.checkpoints.mtp import load_mtp_head

__all__ = ["load_mtp_head"]
