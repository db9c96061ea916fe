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
from spec_compile.ops.providers import AttentionNode, DeltaNode, Node

STAGES = ("prefill", "verify", "draft", "draft_extend")
DECODE = ("verify", "draft", "draft_extend")


def any_node(node: Node) -> bool:
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
    applies: Callable[[Node], bool] = any_node

    def fits(self, node: Node, hardware: Hardware) -> bool:
        known = hardware.arch in self.hardware or hardware.vendor in self.hardware
        return known and node.stage in self.stages and self.applies(node)


# The sm90 rows of windows stand on benchmarks/results/h200-attention.json: one H200, bf16, 8 key/value heads, pages of 64, 1620
# cells of batch, context, window, tree or chain, head dim and group. With them the first provider is within 5 % of the fastest
# in 98 % of the cells. Prefill and 8-bit caches were timed on the same card at a few sizes, which are in no committed table:
# prompts of 512 / 2048 / 8192 tokens 14 / 75 / 807 µs (fa4), 14 / 80 / 840 (flashinfer), 17 / 104 / 1304 (triton); a window
# of 8 over an 8-bit cache of 16384 slots 35 µs (flashinfer), 62 (triton). The rows speak of ``rows`` (packed queries of a
# key/value head), ``tiles`` (batch rows times key/value heads) and ``reach`` (most slots a query can see).
def rows(node: AttentionNode) -> int:
    return (node.num_tokens or 1) * node.num_q_heads // node.num_kv_heads


def tiles(node: AttentionNode) -> int:
    return (node.batch or 1) * node.num_kv_heads


def reach(node: AttentionNode) -> int:
    """0 while no cache exists: nothing that is chosen then will run."""
    return min(node.max_context or 0, node.window or 1 << 62)


def long_narrow_cache(node: AttentionNode) -> bool:
    return node.kv_dtype.itemsize == 1 and rows(node) <= 64 and tiles(node) <= 64 and reach(node) >= 16384


def long_small_heads(node: AttentionNode) -> bool:
    return node.head_dim <= 64 and rows(node) <= 16 and 64 <= tiles(node) <= 256 and reach(node) >= 32768


def many_small_heads(node: AttentionNode) -> bool:
    full = tiles(node) > 256 or (tiles(node) > 128 and not 16 < rows(node) <= 32)
    return node.head_dim <= 64 and rows(node) <= 64 and full


def long_prefix(node: AttentionNode) -> bool:
    return reach(node) >= 4096


def much_work_a_slot(node: AttentionNode) -> bool:
    grouped = node.num_q_heads > node.num_kv_heads
    if tiles(node) <= 8:  # one row of the batch
        return rows(node) >= (16 if node.head_dim > 64 else 64) and (grouped or node.head_dim <= 128)
    if node.head_dim > 128:
        return rows(node) >= 32 or tiles(node) >= 512
    if tiles(node) <= 32:
        return 32 <= rows(node) <= 64
    return tiles(node) >= 512 and node.head_dim > 64 and rows(node) <= 16


_FA4 = ("fa4", "triton", "flashinfer", "torch")
_TRITON = ("triton", "fa4", "flashinfer", "torch")
_XQA = ("flashinfer", "fa4", "triton", "torch")

RULES = (
    Rule(("cpu",), STAGES, ("torch",), "nothing else runs on a CPU"),
    Rule(("sm90",), ("prefill",), ("fa4", "flashinfer", "triton", "torch"), "1.1 to 1.6 times Triton's speed at a few sizes"),
    Rule(("sm90",), DECODE, _XQA, "timed at a few sizes: 8-bit caches of 16K slots or more, few rows", long_narrow_cache),
    Rule(("sm90",), DECODE, _XQA, "measured: 32K slots of small heads, few rows", long_small_heads),
    Rule(("sm90",), DECODE, _TRITON, "measured: many tiles of small heads need no split", many_small_heads),
    Rule(("sm90",), DECODE, _FA4, "measured: from 4K slots on its folds pay for a second launch", long_prefix),
    Rule(("sm90",), DECODE, _FA4, "measured: large heads, or windows of many rows, at any length", much_work_a_slot),
    Rule(("sm90",), DECODE, _TRITON, "measured: a short prefix, done in one launch"),
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


# Gated delta rules. One read of the states serves a whole window in our kernels, trees included. The nvidia rows stand on
# benchmarks/results/h200-gdn.json: an H200, Qwen3-Next's and Qwen3.5-4B's heads in bfloat16. fla in another run on that kind of
# card, launched from the host: 1.4 / 1.0 / 1.7 ms a layer for prompts of 512 / 2048 / 8192 tokens (triton: 0.14 / 0.22 / 0.69).
DELTA_RULES = (
    Rule(("cpu",), STAGES, ("torch",), "nothing else runs on a CPU"),
    Rule(("nvidia",), ("prefill",), ("triton", "fla", "torch"), "measured: a tenth to four tenths of fla's time"),
    Rule(("amd",), ("prefill",), ("triton", "fla", "torch"), "two launches a layer; not measured by us"),
    Rule(("nvidia",), DECODE, ("triton", "flashinfer", "torch"), "measured: the faster one in windows of 2 to 16; trees too"),
    Rule(("amd",), DECODE, ("triton", "torch"), "one launch a layer, chains and trees"),
)


def rule_for(node: Node, hardware: Hardware) -> Rule:
    """The row that speaks about ``node`` on ``hardware``; every vendor has one for any node."""
    return next(rule for rule in (DELTA_RULES if isinstance(node, DeltaNode) else RULES) if rule.fits(node, hardware))
