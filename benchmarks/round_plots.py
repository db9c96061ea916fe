"""Plots of bench_round.py's JSON: a round's time by batch, tokens/s by accept length, and the parts on their floors."""

from __future__ import annotations

from typing import Any

import report
import round_cells
from round_cells import Cell, label
from round_report import cell_of, published, tokens_per_second

_ELSEWHERE = f"{report.PUBLISHED['engine']}, elsewhere"


def plot(result: dict[str, Any], prefix: str) -> None:
    """Write PREFIX-time.png, PREFIX-tokens.png and, where parts were timed, PREFIX-parts.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = {cell_of(row): row for row in result["rows"] if row["status"] == "ok"}
    title = f"{result['args']['shape']}, RANDOM WEIGHTS, {result['meta']['device']}"
    for name, draw in (("time", _time), ("tokens", _tokens), ("parts", _parts)):
        figure = draw(pyplot, result, rows)
        if figure is None:
            continue
        figure.suptitle(title + (", accept lengths SIMULATED" if name == "tokens" else ""), fontsize=10)
        figure.tight_layout()
        figure.savefig(f"{prefix}-{name}.png", dpi=120)
        pyplot.close(figure)


def _time(pyplot: Any, result: dict[str, Any], rows: dict[Cell, dict[str, Any]]) -> Any:
    contexts = sorted({cell.context for cell in rows})
    if not contexts:
        return None
    figure, axes = pyplot.subplots(1, len(contexts), figsize=(5 * len(contexts), 4.5), squeeze=False, sharey=True)
    for axis, context in zip(axes[0], contexts, strict=True):
        here = sorted((cell for cell in rows if cell.context == context), key=lambda cell: cell.batch)
        for number, rounds in enumerate(dict.fromkeys(sorted((cell.rounds for cell in here), key=str))):
            cells, colour = [cell for cell in here if cell.rounds == rounds], f"C{number}"
            batches = [cell.batch for cell in cells]
            axis.plot(batches, [rows[cell]["ms"] for cell in cells], marker="o", color=colour, label=label(rounds))
            other = [(cell.batch, figures[0]) for cell in cells if (figures := published(result, cell))]
            if other:
                axis.plot(*zip(*other, strict=True), "x--", color=colour, label=f"{label(rounds)}: {_ELSEWHERE}", alpha=0.7)
        ticks = sorted({cell.batch for cell in here})
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.set(xlabel="batch", ylabel="ms a round", title=f"prompt {context}")
        axis.grid(True, which="both", alpha=0.3)
        axis.legend(fontsize=7)
    return figure


def _tokens(pyplot: Any, result: dict[str, Any], rows: dict[Cell, dict[str, Any]]) -> Any:
    if not rows:
        return None
    context = min(cell.context for cell in rows)
    here = [cell for cell in rows if cell.context == context]
    batches = sorted({cell.batch for cell in here}, key=lambda b: (b not in (1, 8, 32), b))[:3]
    figure, axes = pyplot.subplots(1, len(batches), figsize=(5 * len(batches), 4.5), squeeze=False)
    for axis, batch in zip(axes[0], sorted(batches), strict=True):
        for cell in sorted((cell for cell in here if cell.batch == batch), key=lambda cell: str(cell.rounds)):
            speeds = tokens_per_second(rows[cell])
            if cell.rounds.num_steps == 0:
                axis.axhline(speeds[1.0][0], color="black", linestyle=":", label="no speculation")
            else:
                axis.plot(list(speeds), [speed for speed, _ in speeds.values()], marker="o", label=label(cell.rounds))
            if cell.rounds == round_cells.CHAIN and (other := published(result, cell)) and other[1]:
                axis.plot([round_cells.ACCEPT], [other[1]], "x", color="red", label=f"5/1/6: {_ELSEWHERE}")
        axis.set(xlabel="accept length (SIMULATED)", ylabel="tokens/s", title=f"batch {batch}, prompt {context}")
        axis.set_ylim(bottom=0)
        axis.grid(True, alpha=0.3)
        axis.legend(fontsize=7)
    return figure


def _parts(pyplot: Any, result: dict[str, Any], rows: dict[Cell, dict[str, Any]]) -> Any:
    cells = [cell for cell, row in rows.items() if row.get("parts")]
    if not cells:
        return None
    names = list(dict.fromkeys(part["part"] for cell in cells for part in rows[cell]["parts"]))
    colours = {name: pyplot.get_cmap("tab20")(number % 20) for number, name in enumerate(names)}
    figure, axis = pyplot.subplots(figsize=(2.2 * len(cells) + 3, 5.5))
    for place, cell in enumerate(cells):
        bottoms = {"ms": 0.0, "floor_ms": 0.0}
        for part in rows[cell]["parts"]:
            for key, shift, hatch in (("ms", -0.2, ""), ("floor_ms", 0.2, "//")):
                axis.bar(
                    place + shift, part[key], 0.36, bottom=bottoms[key], color=colours[part["part"]], hatch=hatch,
                    edgecolor="white", linewidth=0.3,
                )  # fmt: skip
                bottoms[key] += part[key]
        glue = max(0.0, rows[cell]["ms"] - bottoms["ms"])
        axis.bar(place - 0.2, glue, 0.36, bottom=bottoms["ms"], color="lightgrey")
        axis.text(place - 0.2, bottoms["ms"] + glue, f"{rows[cell]['ms']:.2f}", ha="center", va="bottom", fontsize=8)
        axis.text(place + 0.2, bottoms["floor_ms"], f"{bottoms['floor_ms']:.2f}", ha="center", va="bottom", fontsize=8)
    patches = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in [*colours.values(), "lightgrey"]]
    axis.legend(patches, [*names, "glue"], fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    axis.set_xticks(range(len(cells)), [str(cell) for cell in cells], rotation=20, ha="right", fontsize=8)
    axis.set(ylabel="ms: measured, and its floor (hatched)")
    return figure
