"""The path that ``heads.dflash`` had in 0.1: what scripts import from here stays importable."""

from spec_compile.hf_integration.heads.dflash import DFlashHead, random_dflash_head

__all__ = ["DFlashHead", "random_dflash_head"]
