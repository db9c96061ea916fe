"""From the rows of ``bench_attention.py`` to one JSON, two plots and a table; says what was not measured."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from attention_grid import Cell, Grid, cell_of

AUTO = "auto"
NEAR = 1.05  # auto may be so much slower than the best
ERROR_BOUND = 2 * 2**-8  # relative, in bfloat16: half a step (2^-8) for the rounded weights, half a step for the output
WORST_SHOWN = 40
COLUMNS = (
    *Cell.__dataclass_fields__, "provider", "status", "us", "us_layer", "us_plan", "spread", "bandwidth_percent", "error",
    "layers", "version", "choice", "reason",
)  # fmt: skip
COLORS = {
    "triton": "#0072b2",
    "fa4": "#d55e00",
    "flashinfer": "#009e73",
    "torch": "#999999",
    "aiter": "#e69f00",
}

Row = dict[str, Any]


def load(path: Path) -> list[Row]:
    """The rows of a run so far; a last line that was cut off is dropped."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def valid(row: Row) -> bool:
    """Whether a row is a time that counts: measured, and of a right result."""
    return row["status"] == "ok" and row["provider"] != AUTO and row["error"] <= ERROR_BOUND


# ----------------------------------------------------------------------------------------------------------------------
# Merging


def merge(rows: Iterable[Row], grid: Grid) -> dict[str, Any]:
    """The latest row of every cell and provider, and what they say together."""
    metas, latest = [], {}
    for row in rows:
        if "meta" in row:
            metas.append(row["meta"])
        else:
            latest[cell_of(row), row["provider"]] = row
    cells: dict[Cell, dict[str, Row]] = {}
    for (cell, provider), row in latest.items():
        cells.setdefault(cell, {})[provider] = row
    return {
        "meta": metas[0] if metas else {},
        "bandwidth": [meta["bandwidth"]["bytes_per_second"] for meta in metas],
        "grid": grid.describe(),
        "summary": summarize(cells, grid),
        "rows": [latest[key] for key in sorted(latest, key=lambda key: (key[0].key, key[1]))],
    }


def summarize(cells: dict[Cell, dict[str, Row]], grid: Grid) -> dict[str, Any]:
    """Counts, budgets, how good ``auto`` is; every cell that was not run or is not right by name."""
    wanted = grid.cells()
    providers = sorted({name for row in cells.values() for name in row if name != AUTO})
    judged, misses, wins = 0, [], Counter()
    for cell in wanted:
        best = best_of(cells.get(cell, {}))
        if best is None:
            continue
        wins[best["provider"]] += 1
        if AUTO not in cells[cell]:
            continue
        judged += 1
        miss = auto_miss(cell, cells[cell], best)
        misses += [miss] if miss else []
    missing = {cell: [name for name in providers if name not in cells.get(cell, {})] for cell in grid.all_cells()}
    return {
        "cells": len(wanted),
        "providers": providers,
        "cells_measured": sum(wins.values()),
        "fastest": dict(wins.most_common()),
        "auto_judged": judged,
        "auto_near_best": judged - len(misses),
        "auto_misses": sorted(misses, key=lambda miss: -(miss["ratio"] or 1e9)),
        "not_run": [str(cell) for cell in missing if cell not in cells],
        "not_complete": {str(cell): names for cell, names in missing.items() if cell in cells and names},
        "wrong": [
            describe(row) for row in _rows(cells) if row["status"] == "ok" and row["provider"] != AUTO and not valid(row)
        ],
        "errors": [describe(row) for row in _rows(cells) if row["status"] == "error"],
        "left_out": _reasons(cells),
        "budget": [budget_row(cell, most, cells.get(cell, {})) for cell, most in grid.budget_cells()],
    }


def best_of(row: dict[str, Row]) -> Row | None:
    """The fastest valid row of a cell."""
    return min((r for r in row.values() if valid(r)), key=lambda r: r["us"], default=None)


def auto_miss(cell: Cell, row: dict[str, Row], best: Row) -> Row | None:
    """None where ``auto``'s choice is within ``NEAR`` of the best; a choice that has no valid time is a miss."""
    choice = row.get(row[AUTO]["choice"])
    us = choice["us"] if choice is not None and valid(choice) else None
    ratio = us / best["us"] if us is not None else None
    if ratio is not None and ratio <= NEAR:
        return None
    return {
        "cell": str(cell),
        "choice": row[AUTO]["choice"],
        "us": us,
        "best": best["provider"],
        "best_us": best["us"],
        "ratio": ratio,
    }


def budget_row(cell: Cell, most: float, row: dict[str, Row]) -> Row:
    times = {name: r["us"] for name, r in sorted(row.items()) if valid(r)}
    choice = row[AUTO]["choice"] if AUTO in row else None
    best = min(times, key=times.__getitem__, default=None)
    verdict = "NOT RUN" if best is None else "pass" if times[best] <= most else "MISS"
    return {"cell": str(cell), "budget_us": most, "us": times, "best": best, "auto": choice, "verdict": verdict}


def describe(row: Row) -> str:
    what = row.get("reason") or f"error {row['error']}"
    return f"{cell_of(row)}, {row['provider']}: {what}"


def _rows(cells: dict[Cell, dict[str, Row]]) -> Iterable[Row]:
    return (row for by_provider in cells.values() for row in by_provider.values())


def _reasons(cells: dict[Cell, dict[str, Row]]) -> dict[str, int]:
    """Why cells have no time, with the number of cells."""
    counted = Counter(
        f"{r['provider']}, {r['status']}: {r['reason']}" for r in _rows(cells) if r["status"] in ("refused", "skipped")
    )
    return dict(counted.most_common())


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def write(result: dict[str, Any], folder: Path, name: str) -> None:
    """``name``.json (a row a line), ``name``.md and, where matplotlib is installed and something was measured, two plots."""
    head = {key: value for key, value in result.items() if key != "rows"}
    lines = [json.dumps([row.get(column) for column in COLUMNS]) for row in result["rows"]]
    text = (
        json.dumps(head, indent=1)[:-2]
        + f',\n "columns": {json.dumps(COLUMNS)},\n "rows": [\n'
        + ",\n".join(lines)
        + "\n ]\n}\n"
    )
    (folder / f"{name}.json").write_text(text)
    (folder / f"{name}.md").write_text(markdown(result, name))
    if any(valid(row) for row in result["rows"]):
        try:
            plot_times(result, folder / f"{name}-time.png")
            plot_winners(result, folder / f"{name}-winner.png")
        except ImportError:
            print("no plots: pip install 'spec-compile[bench]'")


def read(path: Path) -> dict[str, Any]:
    """A result as ``merge`` made it, from its JSON."""
    result = json.loads(path.read_text())
    result["rows"] = [
        {name: value for name, value in zip(result["columns"], row, strict=True) if value is not None} for row in result["rows"]
    ]
    return result


def summary_lines(result: dict[str, Any]) -> list[str]:
    s = result["summary"]
    share = f"{s['auto_near_best'] / s['auto_judged']:.1%}" if s["auto_judged"] else "none"
    lines = [
        f"{s['cells_measured']} of {s['cells']} cells measured, {len(s['not_run'])} not run, {len(s['not_complete'])} without "
        "some provider",
        "fastest in: " + (", ".join(f"{name} {count}" for name, count in s["fastest"].items()) or "nothing"),
        f"auto is within {NEAR - 1:.0%} of the fastest in {s['auto_near_best']} of {s['auto_judged']} cells: {share}",
        f"wrong results (relative error over {ERROR_BOUND:.2g}): {len(s['wrong'])}; errors: {len(s['errors'])}",
    ]
    for row in s["budget"]:
        times = ", ".join(f"{name} {us:.1f}" for name, us in row["us"].items()) or "–"
        lines.append(f"{row['cell']}: {times} µs (auto: {row['auto']}); budget {row['budget_us']:g} µs: {row['verdict']}")
    return lines


def summary_text(result: dict[str, Any]) -> str:
    s = result["summary"]
    lines = summary_lines(result)
    lines += [f"  auto off: {_miss(miss)}" for miss in s["auto_misses"][:10]]
    lines += [f"  wrong: {text}" for text in s["wrong"][:10]] + [f"  error: {text}" for text in s["errors"][:10]]
    return "\n".join(lines + [f"  {count} × {reason}" for reason, count in list(s["left_out"].items())[:15]])


def _miss(miss: Row) -> str:
    mine = f"{miss['choice']} {miss['us']:.1f} µs" if miss["us"] is not None else f"{miss['choice']} (no time)"
    ratio = f" ({miss['ratio']:.2f}×)" if miss["ratio"] else ""
    return f"{miss['cell']}: {mine}, {miss['best']} {miss['best_us']:.1f} µs{ratio}"


def markdown(result: dict[str, Any], name: str) -> str:
    """The summary, the tables of the headline's head shape, and everything that is missing or off."""
    meta, s = result["meta"], result["summary"]
    bandwidth = f"{statistics.median(result['bandwidth']) / 1e12:.2f} TB/s" if result["bandwidth"] else "not measured"
    origin = ", ".join(
        f"{key} {meta[key]}" for key in ("device", "date", "commit", "torch", "triton", "driver") if meta.get(key)
    )
    versions = {row["provider"]: row.get("version") for row in result["rows"] if row["provider"] != AUTO}
    lines = [
        "# Attention of verify windows, provider by provider",
        "",
        f"{origin}; read bandwidth measured in the run: {bandwidth}.",
    ]
    lines += ["Providers: " + ", ".join(f"{p} {v}" for p, v in sorted(versions.items())) + ".", ""]
    lines += [f"* {line}" for line in summary_lines(result)] + [""]
    lines += table(result, *_headline(result["grid"]))
    lines += _section(f"Cells where auto is more than {NEAR - 1:.0%} off", [_miss(miss) for miss in s["auto_misses"]], name)
    lines += _section("Wrong results", s["wrong"], name) + _section("Errors", s["errors"], name)
    lines += _section(
        "Why a provider has no time", [f"{count} cells: {reason}" for reason, count in s["left_out"].items()], name
    )
    lines += _section("Cells not run", s["not_run"], name)
    lines += _section("Cells without some provider", [f"{c}: {', '.join(p)}" for c, p in s["not_complete"].items()], name)
    return "\n".join(lines) + "\n"


def _section(title: str, items: Sequence[str], name: str) -> list[str]:
    if not items:
        return []
    rest = [f"* … and {len(items) - WORST_SHOWN} more, in `{name}.json`"] if len(items) > WORST_SHOWN else []
    return [f"## {title} ({len(items)})", "", *(f"* {item}" for item in items[:WORST_SHOWN]), *rest, ""]


def _headline(grid: dict[str, Any]) -> tuple[int, int]:
    """(head_dim, group) shown in full: the grid's first ones."""
    return grid["head_dim"][0], grid["group"][0]


def table(result: dict[str, Any], head_dim: int, group: int) -> list[str]:
    """Microseconds a layer (percent of the read bandwidth) for one head shape; the fastest in bold."""
    cells: dict[Cell, dict[str, Row]] = {}
    for row in result["rows"]:
        cell = cell_of(row)
        if (cell.head_dim, cell.group) == (head_dim, group):
            cells.setdefault(cell, {})[row["provider"]] = row
    names = [n for n in result["summary"]["providers"] if any(valid(by[n]) for by in cells.values() if n in by)]
    if not names:
        return []
    heads = result["grid"]["kv_heads"]
    lines = [f"## µs a layer (% of read bandwidth): head dim {head_dim}, {heads * group}/{heads} heads", ""]
    lines += [f"| tokens | batch | context | {' | '.join(names)} | auto |", "|---|---|---|" + "---|" * (len(names) + 1)]
    order = sorted(cells, key=lambda cell: (cell.tokens, cell.tree, cell.batch, cell.context))
    for cell in order:
        best = best_of(cells[cell])
        texts = [_time(cells[cell].get(name), best) for name in names]
        choice = cells[cell].get(AUTO, {}).get("choice", "–")
        tokens = f"{cell.tokens} {'tree' if cell.tree else 'chain'}"
        lines.append(f"| {tokens} | {cell.batch} | {cell.context} | {' | '.join(texts)} | {choice} |")
    return [*lines, ""]


def _time(row: Row | None, best: Row | None) -> str:
    if row is None or not valid(row):
        return "–" if row is None or row["status"] != "ok" else "wrong"
    text = f"{row['us']:.1f} ({row['bandwidth_percent']:.0f})"
    return f"**{text}**" if row is best else text


# ----------------------------------------------------------------------------------------------------------------------
# Plots


def plot_times(result: dict[str, Any], path: Path) -> None:
    """Time against context, a line a provider: window tokens downwards, batches across; the bytes' floor dotted."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    head_dim, group = _headline(result["grid"])
    rows = [
        row for row in result["rows"] if valid(row) and (row["head_dim"], row["group"], row["tree"]) == (head_dim, group, False)
    ]
    if any(row["provider"] != "torch" for row in rows):  # the reference is slower by orders of magnitude
        rows = [row for row in rows if row["provider"] != "torch"]
    tokens, batches = sorted({row["tokens"] for row in rows}), sorted({row["batch"] for row in rows})
    size = (2 + 2.6 * len(batches), 1.5 + 2.2 * len(tokens))
    figure, axes = pyplot.subplots(len(tokens), len(batches), figsize=size, sharex=True, squeeze=False)
    for line, n in zip(axes, tokens, strict=True):
        for axis, batch in zip(line, batches, strict=True):
            here = [row for row in rows if (row["tokens"], row["batch"]) == (n, batch)]
            for name in sorted({row["provider"] for row in here}):
                points = sorted((row["context"], row["us"]) for row in here if row["provider"] == name)
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, color=COLORS.get(name), label=name)
            contexts = sorted({row["context"] for row in here})
            bandwidth = statistics.median(result["bandwidth"])
            floor = [
                Cell(batch, c, n, False, head_dim, group, result["grid"]["kv_heads"]).bytes_moved / bandwidth * 1e6
                for c in contexts
            ]
            axis.plot(contexts, floor, "k:", linewidth=1, label="bytes / read bandwidth")
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_title(f"batch {batch}, {n} tokens", fontsize=8)
            axis.tick_params(which="both", labelsize=7)
            axis.grid(True, which="major", alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("context", fontsize=8)
    for line in axes:
        line[0].set_ylabel("µs a layer", fontsize=8)
    handles = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.suptitle(
        f"{result['meta'].get('device', '')}: head dim {head_dim}, {group} query heads a key/value head, chain", fontsize=9
    )
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncol=len(handles), fontsize=8)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plot_winners(result: dict[str, Any], path: Path) -> None:
    """A panel for each head dim and group: the fastest provider by window (across) and batch and context (downwards)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import patches, pyplot

    cells: dict[Cell, dict[str, Row]] = {}
    for row in result["rows"]:
        cells.setdefault(cell_of(row), {})[row["provider"]] = row
    grid = result["grid"]
    windows = [(n, tree) for n in sorted(grid["tokens"]) for tree in ((False,) if n == 1 else (False, True))]
    problems = [(batch, context) for batch in sorted(grid["batch"]) for context in sorted(grid["context"])]
    dims, groups = sorted(grid["head_dim"]), sorted(grid["group"])
    size = (1.5 + 3.2 * len(groups), 1.5 + 0.17 * len(problems) * len(dims) + 0.5 * len(dims))
    figure, axes = pyplot.subplots(len(dims), len(groups), figsize=size, squeeze=False)
    seen: set[str] = set()
    for line, head_dim in zip(axes, dims, strict=True):
        for axis, group in zip(line, groups, strict=True):
            for y, (batch, context) in enumerate(problems):
                for x, (n, tree) in enumerate(windows):
                    row = cells.get(Cell(batch, context, n, tree, head_dim, group, grid["kv_heads"]), {})
                    best = best_of(row)
                    color = COLORS.get(best["provider"], "black") if best else "white"
                    axis.add_patch(patches.Rectangle((x, y), 1, 1, facecolor=color, edgecolor="white", linewidth=0.5))
                    seen |= {best["provider"]} if best else set()
                    if best and AUTO in row and auto_miss(cell_of(best), row, best):
                        axis.plot(x + 0.5, y + 0.5, "w.", markersize=3)
            axis.set(xlim=(0, len(windows)), ylim=(len(problems), 0))
            axis.set_title(f"head dim {head_dim}, group {group}", fontsize=8)
            axis.set_xticks([x + 0.5 for x in range(len(windows))], [f"{n}{'t' if t else ''}" for n, t in windows], fontsize=6)
            labels = [f"{b} × {c}" for b, c in problems]
            axis.set_yticks([y + 0.5 for y in range(len(problems))], labels if axis is line[0] else [], fontsize=5)
    handles = [patches.Patch(color=COLORS.get(name, "black"), label=name) for name in sorted(seen)]
    figure.legend(handles=handles, loc="lower center", ncol=len(handles) or 1, fontsize=8)
    figure.suptitle("fastest provider by window tokens (t: tree) and batch × context; dot: auto is over 5 % slower", fontsize=9)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
