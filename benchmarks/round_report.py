"""Tables, verdicts and plots of bench_round.py's JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import report
import round_cells
import shapes
from round_cells import Cell, accept_lengths, label, parse_rounds

Row = dict[str, Any]
HEADS = {"eagle": "EAGLE-3-shaped head", "mtp": "MTP-shaped head"}


def cell_of(row: Row) -> Cell:
    return Cell(parse_rounds(row["rounds"]), row["batch"], row["context"])


def published(result: dict[str, Any], cell: Cell) -> tuple[float, float | None] | None:
    """The other engine's figures, only beside the same shape, type and GPU kind."""
    args, other = result["args"], report.PUBLISHED
    same = args["shape"] == other["shape"] and args["dtype"] == other["dtype"] and other["device"] in result["meta"]["device"]
    return round_cells.PUBLISHED.get(cell) if same else None


def line(row: Row) -> str:
    name = str(cell_of(row))
    if row["status"] != "ok":
        return f"{name}: {row['status']}: {row.get('reason', '')}"
    text = f"{name}: {row['ms']:.3f} ms a round"
    if row.get("idle") is not None:
        text += f", idle {row['idle']:.1%}"
    return text + (f", but {row['reason']}" if row.get("reason") else "")


def adaptive_line(row: Row, way: str) -> str:
    figure = row.get(way, {"error": "not reached"})
    speed = figure["error"] if "error" in figure else f"{figure['tokens_per_second']:,.0f} tokens/s"
    return f"batch {row['batch']}, rate {row['rate']}, {way}: {speed}"


def merge(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One result of several runs: of each cell the last that was measured; what each run was measured on stays with it.

    Raises:
        ValueError: the runs are of different shapes, types or devices.
    """
    first = results[0]
    for other in results[1:]:
        for where, name in (("args", "shape"), ("args", "dtype"), ("meta", "device"), ("meta", "torch")):
            if other[where][name] != first[where][name]:
                raise ValueError(f"{name}: {first[where][name]!r} and {other[where][name]!r} do not go into one table")
    rows: dict[Cell, Row] = {}
    adaptive: dict[tuple, Row] = {}
    for result in results:
        for row in result["rows"]:
            known = rows.get(cell_of(row))
            if known is None or row["status"] == "ok" or known["status"] == "not reached":
                rows[cell_of(row)] = row
        for row in result.get("adaptive", []):
            adaptive[row["batch"], row["rate"], row["context"]] = row
    order = sorted(rows, key=lambda cell: (cell.context, cell.rounds.num_draft_tokens, cell.rounds.topk, cell.batch))
    merged = dict(first) | {"rows": [rows[cell] for cell in order], "runs": [run["meta"] for run in results]}
    memories = [result["memory"] for result in results if result.get("memory")]
    if memories:
        merged["memory"] = max(memories, key=lambda held: len(held["buckets"]))
    if adaptive:
        merged["adaptive"] = list(adaptive.values())
    return merged


# ----------------------------------------------------------------------------------------------------------------------
# Verdicts


def tokens_per_second(row: Row) -> dict[float, tuple[float, bool]]:
    """Tokens/s of the batch by simulated accept length, and whether they were measured at it.

    A round that was timed gives all lengths: its time hardly depends on how much of it stands.
    """
    cell = cell_of(row)
    if cell.rounds.num_steps == 0:
        return {1.0: (cell.batch / row["ms"] * 1e3, True)}
    figures = {}
    for accept in accept_lengths(cell.rounds):
        timed = row if accept == row["accept"] else row.get("at_accept", {}).get(str(accept))
        reached = timed is not None and abs(timed["accept_measured"] - accept) < 0.05 * accept
        figures[accept] = (cell.batch * accept / (timed if reached else row)["ms"] * 1e3, reached)
    return figures


def verdicts(result: dict[str, Any]) -> list[list[str]]:
    """[what, measured, budget, verdict] of every budget of the shape; one not measured says so."""
    shape = result["args"]["shape"]
    rows = {cell_of(row): row for row in result["rows"] if row["status"] == "ok"}
    lines = []

    def judge(what: str, value: float | None, most: float, pattern: str, at_least: bool = False) -> None:
        verdict = "NOT RUN" if value is None else "pass" if (value >= most if at_least else value <= most) else "MISS"
        lines.append([
            what, "–" if value is None else pattern.format(value), f"{'≥' if at_least else '≤'} {pattern.format(most)}", verdict
        ])  # fmt: skip

    budgets = round_cells.BUDGETS.get(shape, {})
    for cell, most in budgets.items():
        judge(f"round {cell}", rows.get(cell, {}).get("ms"), most, "{:.2f} ms")
    for cell in budgets:
        judge(f"GPU idle between rounds, {cell}", rows.get(cell, {}).get("idle"), round_cells.IDLE, "{:.2%}")
    if budgets:
        cell, least = round_cells.TOKENS_PER_SECOND
        speed = tokens_per_second(rows[cell])[round_cells.ACCEPT][0] if cell in rows else None
        judge(f"tokens/s, {cell}, accept {round_cells.ACCEPT} SIMULATED", speed, least, "{:,.0f}", at_least=True)
        held = result.get("memory") or {}
        complete = set(held.get("buckets", [])) >= set(round_cells.BATCHES)
        extra = held["extra_reserved"] / 2**30 if complete else None
        judge("memory beyond weights and KV, buckets 1 to 64", extra, round_cells.MEMORY / 2**30, "{:.2f} GiB")
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# Markdown


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(header)} |", "|" + "---|" * len(header), *(f"| {' | '.join(row)} |" for row in rows), ""]


def rounds_table(result: dict[str, Any]) -> list[str]:
    header = [
        "rounds",
        "batch",
        "prompt",
        "ms a round",
        "10–90 %",
        "GPU idle",
        "accept (asked, got)",
        "tokens/s by accept length",
    ]
    header += ["extra GiB alloc. / res.", f"elsewhere: {report.PUBLISHED['engine']} ms (tok/s)"]
    rows = []
    for row in result["rows"]:
        cell = cell_of(row)
        start = [label(cell.rounds), str(cell.batch), str(cell.context)]
        if row["status"] != "ok":
            rows.append([*start, f"{row['status']}: {row.get('reason', 'no time left')}", *["–"] * 6])
            continue
        speeds = ", ".join(
            f"{accept:g}: {speed:,.0f}{'' if measured else '*'}" for accept, (speed, measured) in tokens_per_second(row).items()
        )
        held, other = row.get("memory"), published(result, cell)
        rows.append([
            *start, f"{row['ms']:.3f}", "{:.3f}–{:.3f}".format(*row["ms_range"]),
            "–" if row["idle"] is None else f"{row['idle']:.2%}",
            "–" if cell.rounds.num_steps == 0 else f"{row['accept']:g}, {row['accept_measured']:.2f}", speeds,
            "–" if held is None else f"{held['extra_allocated'] / 2**30:.2f} / {held['extra_reserved'] / 2**30:.2f}",
            "–" if other is None else f"{other[0]:.2f}" + (f" ({other[1]:,.0f})" if other[1] else ""),
        ])  # fmt: skip
    notes = [
        "SIMULATED accept lengths; * computed from the round's time, not timed at this length (or not reached by the tree)  "
    ]
    if any(published(result, cell_of(row)) for row in result["rows"]):
        notes.append(f"elsewhere: {report.PUBLISHED['source']}  ")
    return [*_table(header, rows), *notes, ""]


def parts_tables(result: dict[str, Any]) -> list[str]:
    lines = []
    for row in result["rows"]:
        if "parts" not in row:
            continue
        rows = []
        for part in row["parts"]:
            linears = part.get("linears_ms")
            rows.append([
                part["part"], str(part["calls"]), f"{part['ms']:.3f}", f"{part['bytes'] / 1e6:,.2f}",
                f"{part['floor_ms']:.3f} ({part['floor']})", f"{part['ratio']:.2f}" + over(part["ratio"]),
                "–" if linears is None else f"{linears:.3f} ({part['ms'] / linears:.2f}×)",
            ])  # fmt: skip
        together = sum(part["ms"] for part in row["parts"])
        floor = sum(part["floor_ms"] for part in row["parts"])
        rows.append(["glue (rest)", "–", f"{row['ms'] - together:.3f}", "–", "–", "–", "–"])
        ratio = row["ms"] / floor
        rows.append(["**round**", "–", f"**{row['ms']:.3f}**", "–", f"{floor:.3f}", f"{ratio:.2f}", "–"])
        lines += [f"Parts of a round, {cell_of(row)}:", ""]
        lines += _table(["part", "calls", "ms", "MB", "floor ms", "ratio", "linears alone ms"], rows)
    if lines:
        floor = result["floor"]
        lines.append(
            f"Floor: bytes that must be read or written over {floor['bandwidth']['bytes_per_second'] / 1e12:.2f} TB/s, or "
            f"{floor['launch_ms'] * 1e3:.1f} µs a call, the smallest dependent kernel's time in a CUDA graph; both measured in "
            f"the run. Linears alone: {floor['linears']}. ! marks ratios over {round_cells.RATIO}.  "
        )
        lines.append("")
    return lines


def over(ratio: float) -> str:
    return " !" if ratio > round_cells.RATIO else ""


def memory_lines(result: dict[str, Any]) -> list[str]:
    held = result.get("memory")
    if not held:
        return []
    gib = {name: held[name] / 2**30 for name in ("extra_allocated", "extra_reserved", "driver", "graphs", "kv_bytes")}
    return [
        f"Memory with the rounds {held['rounds']} of batches {', '.join(map(str, held['buckets']))} captured in one engine, "
        f"beyond weights and {gib['kv_bytes']:.2f} GiB of keys and values: {gib['extra_allocated']:.2f} GiB allocated, "
        f"{gib['extra_reserved']:.2f} GiB reserved ({gib['graphs']:.2f} GiB by graphs); the driver holds "
        f"{gib['driver']:.2f} GiB (CUDA context, kernels, graph nodes).",
        "",
    ]


def adaptive_table(result: dict[str, Any]) -> list[str]:
    header = ["batch", "rate a position, SIMULATED", "off tok/s", "adaptive tok/s", "adaptive / off", "all rows live"]
    header += ["first call / off", "fixed 5/1/6 tok/s", "fixed / off", "verdict (≥ 0.98)"]
    rows = []
    for row in result["adaptive"]:
        off, adaptive, fixed = (row.get(way) or {} for way in ("off", "adaptive", "fixed"))
        base = off.get("tokens_per_second")

        def ratio(figure: dict[str, Any], name: str = "tokens_per_second", base: float | None = base) -> str:
            return f"{figure[name] / base:.2f}" if base and name in figure else "–"

        def speed(figure: dict[str, Any]) -> str:
            return (
                f"{figure['tokens_per_second']:,.0f}" if "tokens_per_second" in figure else figure.get("error", "not reached")
            )

        measured = base and "tokens_per_second" in adaptive
        verdict = "NOT RUN" if not measured else "pass" if adaptive["tokens_per_second"] >= 0.98 * base else "MISS"
        rows.append([
            str(row["batch"]), str(row["rate"]), speed(off), speed(adaptive), ratio(adaptive), ratio(adaptive, "all_rows_live"),
            ratio(adaptive, "first_call"), speed(fixed), ratio(fixed), verdict,
        ])  # fmt: skip
    return [
        *_table(header, rows),
        "Decoding of whole generate() calls; rows of a simulated batch end apart, which the column 'all rows live' leaves out; "
        "'first call' has learned nothing yet.  ",
        "",
    ]


def markdown(result: dict[str, Any]) -> str:
    meta, args = result["meta"], result["args"]
    lines = [
        f"**{args['shape']}, RANDOM WEIGHTS, {args['dtype']}, {HEADS[shapes.SHAPES[args['shape']].head]}, {meta['device']}**",
        "",
    ]
    judged = verdicts(result) if result["rows"] else []
    if judged:
        lines += _table(["budget", "measured", "bound", "verdict"], judged)
    if result["rows"]:
        lines += [*rounds_table(result), *memory_lines(result), *parts_tables(result)]
    if result.get("adaptive"):
        lines += adaptive_table(result)
    names = ("date", "commit", "torch", "transformers", "triton", "driver")
    for run in result.get("runs", [meta]):
        lines.append(", ".join(f"{name} {run[name]}" for name in names if run.get(name)) + "  ")
    return "\n".join(lines)
