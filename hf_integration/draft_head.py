"""The path that ``heads.draft_head`` had in 0.1: what scripts import from here stays importable."""

from spec_compile.hf_integration.heads.draft_head import DraftHead, check_fits

__all__ = ["DraftHead", "check_fits"]
