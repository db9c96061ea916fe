"""What every provider can do on every architecture: one table behind ``spec-compile doctor`` and ``docs/support-matrix.md``.

Nothing here is written down twice: cells come from asking each provider's ``supports`` about probe nodes, orders from
``passes/preference.py``. Both need no GPU and nothing installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from spec_compile import family_matrix
from spec_compile.hardware import Hardware
from spec_compile.ops import providers
from spec_compile.ops.providers import AttentionNode, DeltaNode
from spec_compile.passes.preference import DELTA_RULES, RULES, STAGES, Rule, rule_for

# One device of each architecture the table knows. The number of multiprocessors is that of a common model.
DEVICES = (
    Hardware("cpu", "cpu", 8, "any CPU"),
    Hardware("nvidia", "sm80", 108, "A100"),
    Hardware("nvidia", "sm89", 142, "L40S, RTX 4090"),
    Hardware("nvidia", "sm90", 132, "H100, H200"),
    Hardware("nvidia", "sm100", 148, "B200"),
    Hardware("nvidia", "sm120", 170, "RTX 5090"),
    Hardware("amd", "gfx942", 304, "MI300X"),
    Hardware("amd", "gfx950", 256, "MI355X"),
)

_WINDOW_NODE = AttentionNode(
    op="attention", stage="verify", batch=1, num_tokens=8, num_q_heads=32, num_kv_heads=8, head_dim=128, v_head_dim=128,
    page_size=64, window=0, softcap=0.0, has_sinks=False, is_tree=False, dtype=torch.bfloat16, kv_dtype=torch.bfloat16,
    max_context=4096,
)  # fmt: skip
_PROMPT_NODE = replace(_WINDOW_NODE, op="prefill_attention", stage="prefill", batch=None, num_tokens=None)
MODES = {"prefill": _PROMPT_NODE, "chain": _WINDOW_NODE, "tree": replace(_WINDOW_NODE, is_tree=True)}

_DELTA_NODE = DeltaNode("gdn_verify", "verify", 1, 4, 16, 32, 128, 128, False, torch.bfloat16)  # Qwen3-Next, Qwen3.5-4B
DELTA_MODES = {
    "prefill": replace(_DELTA_NODE, op="gdn_prefill", stage="prefill", batch=None, num_tokens=None),
    "chain": _DELTA_NODE,
    "tree": replace(_DELTA_NODE, is_tree=True),
}

_FEATURES = {
    "sliding window": {"window": 1024},
    "sinks": {"has_sinks": True},
    "softcap": {"softcap": 50.0},
    "fp8 cache": {"kv_dtype": torch.float8_e4m3fn},
}
_LATENT = {"num_q_heads": 128, "num_kv_heads": 1, "head_dim": 576, "v_head_dim": 512}
_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 192, 256, 512)
_PAGE_SIZES = (16, 32, 64, 128, 256)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
COLUMNS = (*MODES, *_FEATURES, "latent (MLA)", "head dims", "page sizes", "types")


@dataclass(frozen=True)
class SupportRow:
    """One provider on one architecture.

    Attributes:
        refusal: why it can do nothing at all there; None otherwise.
        cells: by column of ``COLUMNS``; empty with a refusal.
    """

    provider: str
    refusal: str | None
    cells: dict[str, str]


def support_rows(hardware: Hardware, names: Sequence[str] = providers.PROVIDERS) -> list[SupportRow]:
    """What each provider can do on ``hardware``, installed or not."""
    return [_row(name, hardware) for name in names]


def _row(name: str, hardware: Hardware) -> SupportRow:
    provider = providers.load(name)

    def able(changes: dict, modes: Iterable[str] = MODES) -> list[str]:
        return [mode for mode in modes if provider.supports(replace(MODES[mode], **changes), hardware) is None]

    modes = able({})
    if not modes:
        return SupportRow(name, provider.supports(_WINDOW_NODE, hardware), {})
    latent = []
    for mode, node in MODES.items():
        node = replace(node, op=f"mla_{node.op}", **_LATENT)
        latent += [mode] if provider.supports(node, hardware) is None else []
    cells = {mode: "yes" if mode in modes else "no" for mode in MODES}
    cells |= {feature: _where(able(changes, modes), modes) for feature, changes in _FEATURES.items()}
    cells["latent (MLA)"] = _where(latent, list(MODES))
    cells["head dims"] = _values(_HEAD_DIMS, lambda d: able({"head_dim": d, "v_head_dim": d}, modes), modes)
    cells["page sizes"] = _values(_PAGE_SIZES, lambda size: able({"page_size": size}, modes), modes)
    names = {str(dtype).removeprefix("torch."): dtype for dtype in _DTYPES}
    cells["types"] = _values(list(names), lambda n: able({"dtype": names[n], "kv_dtype": names[n]}, modes), modes)
    return SupportRow(name, None, cells)


def _where(able: list[str], modes: list[str]) -> str:
    return "yes" if able == modes else ", ".join(able) or "no"


def _values(values: Sequence, able: Callable[[object], list[str]], modes: list[str]) -> str:
    """Values that work, by the modes they work in where these are not all: ``"64–256; 32 (prefill)"``."""
    groups: dict[tuple[str, ...], list] = {}
    for value in values:
        groups.setdefault(tuple(able(value)), []).append(value)
    order = sorted((where for where in groups if where), key=lambda where: -len(where))
    words = [_runs(groups[where], values) + ("" if list(where) == modes else f" ({', '.join(where)})") for where in order]
    return "; ".join(words) or "none"


def _runs(chosen: list, values: Sequence) -> str:
    """``chosen`` in words, three or more neighbours in ``values`` as a range: ``"16, 64–256"``."""
    runs: list[list] = []
    places = [list(values).index(value) for value in chosen]
    for place, value in zip(places, chosen, strict=True):
        if runs and isinstance(value, int) and place - 1 in places:
            runs[-1].append(value)
        else:
            runs.append([value])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def runs(mode: str, hardware: Hardware, usable: Sequence[str]) -> list[str]:
    """Those of the ``usable`` providers that run ``mode`` on ``hardware``, in the order of preference."""
    order = [name for name in rule_for(MODES[mode], hardware).providers if name in usable]
    return [name for name in order if providers.load(name).supports(MODES[mode], hardware) is None]


def preferred_stages(name: str, hardware: Hardware) -> dict[str, int]:
    """Place (from 1) of provider ``name`` in the order of each stage where it has one, for a node without special needs."""
    places = {}
    for stage in STAGES:
        order = rule_for(replace(MODES["prefill" if stage == "prefill" else "chain"], stage=stage), hardware).providers
        if name in order:
            places[stage] = order.index(name) + 1
    return places


def summary(row: SupportRow) -> str:
    """The cells of a row without refusal in one line, for ``doctor``."""
    parts = [mode for mode in MODES if row.cells[mode] == "yes"]
    for feature in (*_FEATURES, "latent (MLA)"):
        if row.cells[feature] != "no":
            parts.append(feature if row.cells[feature] == "yes" else f"{feature} ({row.cells[feature]})")
    return f"{', '.join(parts)}; head dims {row.cells['head dims']}; pages of {row.cells['page sizes']}"


# ----------------------------------------------------------------------------------------------------------------------
# The page

_INTRODUCTION = """\
# Support matrix

Written by `spec-compile doctor --markdown` from the providers' own answers, `passes/preference.py` and
`spec_compile/family_matrix.py`; tests compare. Edit those, not this page.

A provider can be named with `backend=`, for all stages or per stage; see [backends](backends.md). *Prefill* is packed causal
prompts, *chain* and *tree* are windows of draft tokens over a paged cache (verify, draft and draft-extend stages). A cell says
"yes" when a feature works in every mode the provider has there, else in which. Probed are head dims {dims}
and page sizes {pages}; everything else with bfloat16, 32 query and 8 key/value heads of 128 dims and pages
of 64. What has to be installed says `spec-compile doctor` on the machine itself.

`torch` takes everything everywhere, so that no model is left without a kernel; on GPUs it is the reference, which reads every
page a row could hold, and slow.

## Order of preference

`backend="auto"` takes the first provider of the first row that fits and that is installed and can run the node;
`backend="tune"` times them all.

| hardware | stages | order | why |
|---|---|---|---|
"""


def markdown() -> str:
    """The whole of ``docs/support-matrix.md``."""
    lines = [_INTRODUCTION.format(dims=", ".join(map(str, _HEAD_DIMS)), pages=", ".join(map(str, _PAGE_SIZES))).rstrip()]
    lines += [_order(rule) for rule in RULES]
    lines += ["", *_delta_section()]
    lines += ["", family_matrix.section(DEVICES).rstrip()]
    groups: dict[tuple[str, ...], list[Hardware]] = {}
    for device in DEVICES:
        groups.setdefault(tuple(_table(device)), []).append(device)
    for table, devices in groups.items():
        lines += ["", f"## {', '.join(f'{d.arch} ({d.name})' for d in devices)}", "", *table]
        for device in devices:
            refusals = [f"* `{row.provider}`: {row.refusal}" for row in support_rows(device) if row.refusal is not None]
            lines += ["", f"Not on {device.arch}:", "", *refusals] if refusals else []
    return "\n".join(lines) + "\n"


def _order(rule: Rule) -> str:
    stages = "all" if rule.stages == STAGES else ", ".join(rule.stages)
    return f"| {', '.join(rule.hardware)} | {stages} | {', '.join(rule.providers)} | {rule.reason} |"


def _delta_section() -> list[str]:
    """Gated delta nets: orders, and the modes in which each provider takes Qwen3-Next's heads on every architecture."""
    lines = [
        "## Gated delta nets",
        "",
        "Recurrent layers have providers and an order of their own (`gdn_verify`, `gdn_prefill`",
    ]
    lines[-1] += " in `backend`'s dict);"
    lines += ["the cells below are for 16 key and 32 value heads of 128 dims in bfloat16, windows of 4.", ""]
    lines += ["| hardware | stages | order | why |", "|---|---|---|---|", *map(_order, DELTA_RULES), ""]
    lines += [f"| | {' | '.join(device.arch for device in DEVICES)} |", "|---" * (len(DEVICES) + 1) + "|"]
    for name in providers.REGISTRY[DeltaNode.FAMILY]:
        refused = [delta_refusals(name, device) for device in DEVICES]
        cells = [_where([mode for mode in DELTA_MODES if mode not in reasons], list(DELTA_MODES)) for reasons in refused]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return lines


def delta_refusals(name: str, hardware: Hardware) -> dict[str, str]:
    """The modes of ``DELTA_MODES`` that a provider of gated delta rules does not take on ``hardware``, with its reasons."""
    asked = {mode: providers.load_for(node, name).supports(node, hardware) for mode, node in DELTA_MODES.items()}
    return {mode: reason for mode, reason in asked.items() if reason is not None}


def _table(device: Hardware) -> list[str]:
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row in support_rows(device):
        if row.refusal is None:
            lines.append(f"| `{row.provider}` | {' | '.join(row.cells[column] for column in COLUMNS)} |")
    return lines
