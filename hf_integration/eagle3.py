"""The path that ``heads.eagle3`` had in 0.1: what scripts import from here stays importable."""

from spec_compile.hf_integration.heads.eagle3 import Eagle3Head, random_eagle3_head

__all__ = ["Eagle3Head", "random_eagle3_head"]
