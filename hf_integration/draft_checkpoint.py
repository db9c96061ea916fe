"""The path that ``checkpoints.detect`` had in 0.1: what scripts import from here stays importable."""

from spec_compile.hf_integration.checkpoints.detect import load_draft_head

__all__ = ["load_draft_head"]
