"""Which provider is tried first where: the table behind ``backend="auto"``.

``RULES`` is read from top to bottom; the first row whose hardware, stages and ``applies`` fit a node gives the order. A row
says what is *preferred*; what a provider *cannot* do it says itself (``Provider.supports``), and then the next one is asked.
To change an order, edit its row and its reason; ``explain()``, ``spec-compile doctor`` and ``docs/support-matrix.md`` (which
a test compares) show what stands here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from spec_compile.hardware import Hardware
from spec_compile.ops.providers import AttentionNode

STAGES = ("prefill", "verify", "draft", "draft_extend")
DECODE = ("verify", "draft", "draft_extend")


def any_node(node: AttentionNode) -> bool:
    return True


@dataclass(frozen=True)
class Rule:
    """One row.

    Attributes:
        hardware: archs (``"sm90"``), or vendors (``"nvidia"``) for every arch of theirs.
        stages: see ``STAGES``.
        providers: best first.
        reason: why this order, with its source; says in words what ``applies`` asks.
        applies: whether the row speaks about a node.
    """

    hardware: tuple[str, ...]
    stages: tuple[str, ...]
    providers: tuple[str, ...]
    reason: str
    applies: Callable[[AttentionNode], bool] = any_node

    def fits(self, node: AttentionNode, hardware: Hardware) -> bool:
        known = hardware.arch in self.hardware or hardware.vendor in self.hardware
        return known and node.stage in self.stages and self.applies(node)


RULES = (
    Rule(("cpu",), STAGES, ("torch",), "nothing else runs on a CPU"),
    # Not measured yet: the order in which the kernels were expected to rank before benchmarks/bench_attention.py ran.
    Rule(("sm90",), ("prefill",), ("fa4", "flashinfer", "triton", "torch"), "expected order, not measured yet"),
    Rule(("sm90",), DECODE, ("triton", "fa4", "flashinfer", "torch"), "expected order, not measured yet"),
    # FlashAttention reads pages and splits them on these; SGLang prefers its and TensorRT-LLM's kernels there too
    # (SGLang, model_override_base.py, get_default_attn_backend).
    Rule(("sm100", "sm103", "sm110"), STAGES, ("fa4", "flashinfer", "triton", "torch"), "SGLang's order; not measured by us"),
    # FlashAttention 4 reads no pages on these (flash-attn-4 4.0.0b36, interface.py).
    Rule(
        ("sm80", "sm86", "sm87", "sm89", "sm120", "sm121"),
        STAGES,
        ("triton", "flashinfer", "torch"),
        "one launch a layer and nothing to build first; not measured by us",
    ),
    Rule(("gfx942", "gfx950"), STAGES, ("aiter", "triton", "torch"), "AMD's own kernels first, as SGLang does on ROCm"),
    Rule(("nvidia", "amd"), STAGES, ("triton", "torch"), "Triton knows every architecture"),
)


def rule_for(node: AttentionNode, hardware: Hardware) -> Rule:
    """The row that speaks about ``node`` on ``hardware``; every vendor has one for any node."""
    return next(rule for rule in RULES if rule.fits(node, hardware))
