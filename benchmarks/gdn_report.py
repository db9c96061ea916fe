"""Tables and a plot of bench_gdn.py's JSON: ``gdn_report.py gdn.json [--plot gdn.png]``."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from report import read

Row = dict[str, Any]


def markdown(result: dict[str, Any]) -> str:
    meta = result["meta"]
    names = ("device", "date", "commit", "torch", "triton", "driver")
    lines = ["# Gated delta nets", "", ", ".join(f"{name} {meta[name]}" for name in names if meta.get(name)) + "; "]
    lines[-1] += f"read bandwidth {result['bandwidth']['bytes_per_second'] / 1e9:,.0f} GB/s. RANDOM inputs, bfloat16."
    for name in dict.fromkeys(row["shape"] for row in result["rows"]):
        shape = result["shapes"][name]
        heads = f"{shape['key_heads']}/{shape['value_heads']} key/value heads × {shape['key_dim']}/{shape['value_dim']}"
        state = f"{shape['state_bytes'] / 2**20:.2f} MiB of states a row and layer"
        lines += ["", f"## {name}: {heads}, {state}", "", f"Models: {shape['models']}."]
        here = [row for row in result["rows"] if row["shape"] == name]
        for make in (_windows, _commits, _prompts):
            lines += make(here)
    return "\n".join([*lines, *_reasons(result["rows"])])


def _windows(rows: list[Row]) -> list[str]:
    found = _by(rows, "verify", ("batch", "tokens", "tree"))
    if not _figured(found):
        return []
    names = _figured(found)
    header = ["batch", "window", *(f"{name}: µs a layer (% of bandwidth, error)" for name in names), "auto"]
    header += ["floor µs", "a state a token would write, µs"]
    body = []
    for (batch, tokens, tree), group in sorted(found.items()):
        good = [row for row in group.values() if row["status"] == "ok"]
        best = min((row["us"] for row in good), default=None)
        texts = [_time(group.get(name), best) for name in names]
        extra = [good[0]["auto"], f"{good[0]['floor_us']:.2f}", _writes(good[0])] if good else ["–"] * 3
        body.append([str(batch), f"{tokens}{' tree' if tree else ''}", *texts, *extra])
    return ["", "Verify. The floor is one read of every row's states; the fastest is bold.", "", *_table(header, body)]


def _commits(rows: list[Row]) -> list[str]:
    found = [row for row in rows if row["kind"] == "commit" and row["status"] == "ok"]
    header = ["batch", "tokens that stand", "µs, all layers", "µs a layer", "% of bandwidth", "error"]
    body = [
        [
            str(row["batch"]), str(row["tokens"]), f"{row['us']:.1f}", f"{row['us'] / row['layers']:.2f}",
            f"{row['bandwidth_percent']:.0f}", f"{row['error']:.1e}",
        ]
        for row in sorted(found, key=lambda row: (row["batch"], row["tokens"]))
    ]  # fmt: skip
    if not found:
        return []
    title = f"Commit of all {found[0]['layers']} layers in one launch; the floor is a read and a write of the states."
    return ["", title, "", *_table(header, body)]


def _prompts(rows: list[Row]) -> list[str]:
    found = _by(rows, "prefill", ("tokens",))
    names = _figured(found)
    if not names:
        return []
    body = []
    for (tokens,), group in sorted(found.items()):
        texts = []
        for name in names:
            row = group.get(name)
            good = row is not None and row["status"] == "ok"
            texts.append(f"{row['us']:,.0f} ({row['error']:.0e})" if good else "–")
        body.append([str(tokens), *texts, next((row["auto"] for row in group.values() if row["status"] == "ok"), "–")])
    header = ["prompt tokens", *(f"{name}: µs a layer (error)" for name in names), "auto"]
    title = "Prompts, one row, launched from the host; layers share what is planned for a prefill."
    return ["", title, "", *_table(header, body)]


def _figured(found: dict[tuple, dict[str, Row]]) -> list[str]:
    """Whoever has a figure among these; the others stand under the tables."""
    return list(dict.fromkeys(name for group in found.values() for name, row in group.items() if row["status"] == "ok"))


def _by(rows: Iterable[Row], kind: str, names: tuple[str, ...]) -> dict[tuple, dict[str, Row]]:
    groups: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        if row["kind"] == kind:
            groups.setdefault(tuple(row[name] for name in names), {})[row["provider"]] = row
    return groups


def _time(row: Row | None, best: float | None) -> str:
    if row is None or row["status"] != "ok":
        return "–" if row is None else row["status"]
    time = f"**{row['us']:.2f}**" if row["us"] == best else f"{row['us']:.2f}"
    return f"{time} ({row['bandwidth_percent']:.0f} %, {row['error']:.0e})"


def _writes(row: Row) -> str:
    return f"{row['state_per_token_us']:.2f} ({row['state_per_token_bytes'] / 2**20:.1f} MiB)"


def _table(header: list[str], body: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *body)]


def _reasons(rows: list[Row]) -> list[str]:
    """Every reason for a missing figure once, with how many cells it speaks of."""
    counts: dict[str, int] = {}
    for row in rows:
        if row["status"] != "ok":
            reason = f"{row['provider']}, {row['kind']}: {row['status']}: {row['reason']}"
            counts[reason] = counts.get(reason, 0) + 1
    return (
        ["", "Without a figure:", "", *(f"* {count} cells of {reason}" for reason, count in counts.items())] if counts else []
    )


def plot(result: dict[str, Any], path: str) -> None:
    """Microseconds of a window by its tokens, a panel a shape and batch, with the floor and the writes that are not made."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in result["rows"] if row["kind"] == "verify" and row["status"] == "ok"]
    names, batches = (list(dict.fromkeys(row[key] for row in rows)) for key in ("shape", "batch"))
    if not rows:
        return
    size = (4.5 * len(batches), 3.8 * len(names))
    figure, axes = pyplot.subplots(len(names), len(batches), figsize=size, squeeze=False)
    for axis_row, name in zip(axes, names, strict=True):
        for axis, batch in zip(axis_row, sorted(batches), strict=True):
            here = sorted(
                (row for row in rows if row["shape"] == name and row["batch"] == batch), key=lambda row: row["tokens"]
            )
            for provider, tree in dict.fromkeys((row["provider"], row["tree"]) for row in here):
                points = [(r["tokens"], r["us"]) for r in here if (r["provider"], r["tree"]) == (provider, tree)]
                label = f"{provider}{', trees' if tree else ''}"
                axis.plot(*zip(*points, strict=True), marker="^" if tree else "o", label=label)
            floors = {row["tokens"]: (row["floor_us"], row["floor_us"] + row["state_per_token_us"]) for row in here}
            if floors:
                axis.plot(list(floors), [low for low, _ in floors.values()], "k--", label="one read of the states")
                axis.plot(list(floors), [high for _, high in floors.values()], "k:", label="and a state written a token")
            axis.set(title=f"{name}, batch {batch}", xlabel="tokens of a window", ylabel="µs a layer")
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.grid(True, which="both", alpha=0.3)
            axis.legend(fontsize=7)
    figure.suptitle(f"Verify of gated delta nets, {result['meta']['device']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path)
    parser.add_argument("--plot", metavar="PNG")
    options = parser.parse_args()
    result = read(options.json)
    print(markdown(result))
    if options.plot:
        plot(result, options.plot)


if __name__ == "__main__":
    main()
