"""The path that ``heads.mtp`` had in 0.1: what scripts import from here stays importable."""

from spec_compile.hf_integration.heads.mtp import MtpHead, MtpLayers, random_mtp_head, random_mtp_layers

__all__ = ["MtpHead", "MtpLayers", "random_mtp_head", "random_mtp_layers"]
