"""What came out of a training: tables, plots and the model card, from the two JSON files of train_draft.py and eval_draft.py.

draft_report.py --training head/training.json --accept accept.json --out head     # README.md, training.png, accept.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

Cell = dict[str, Any]


def pooled(cells: list[Cell], **where: object) -> Cell:
    """Rounds, tokens and accept length of the cells with these values together; rounds 0 when there are none."""
    chosen = [c for c in cells if all(c[key] == value for key, value in where.items())]
    rounds, tokens = sum(c["rounds"] for c in chosen), sum(c["tokens"] for c in chosen)
    longest = max((len(c["histogram"]) for c in chosen), default=0)
    histogram = [sum(c["histogram"][i] for c in chosen if i < len(c["histogram"])) for i in range(longest)]
    return {"rounds": rounds, "tokens": tokens, "accept_length": tokens / rounds if rounds else 0.0, "histogram": histogram}


def _in_order(cells: list[Cell], key: str) -> list[Any]:
    return list(dict.fromkeys(cell[key] for cell in cells))


def accept_table(result: dict[str, Any]) -> str:
    """Markdown: a row a system and temperature, a column a prompt set, accept lengths."""
    cells = result["cells"]
    groups = _in_order(cells, "set")
    lines = [f"| draft | T | {' | '.join(groups)} | all |", "|---|---|" + "---|" * (len(groups) + 1)]
    for label in _in_order(cells, "label"):
        for temperature in _in_order(cells, "temperature"):
            where = {"label": label, "temperature": temperature}
            figures = [pooled(cells, **where, set=group)["accept_length"] for group in groups]
            every = pooled(cells, **where)
            if every["rounds"]:
                shown = " | ".join(f"{x:.2f}" if x else "–" for x in figures)
                lines.append(f"| {label} | {temperature:g} | {shown} | **{every['accept_length']:.2f}** |")
    return "\n".join(lines)


def plot_accept_lengths(result: dict[str, Any], path: Path) -> None:
    """Histogram of rounds by accept length, a panel a temperature, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = result["cells"]
    temperatures, labels = _in_order(cells, "temperature"), _in_order(cells, "label")
    figure, panels = plt.subplots(
        1, len(temperatures), figsize=(4.6 * len(temperatures), 3.2), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, temperature in zip(panels[0], temperatures, strict=True):
        for i, label in enumerate(labels):
            found = pooled(cells, label=label, temperature=temperature)
            if not found["rounds"]:
                continue
            places = [n + 1 + (i - (len(labels) - 1) / 2) * 0.27 for n in range(len(found["histogram"]))]
            shares = [count / found["rounds"] for count in found["histogram"]]
            panel.bar(places, shares, 0.25, label=f"{label}: mean {found['accept_length']:.2f}")
        panel.set_title(f"temperature {temperature:g}", fontsize=10)
        panel.set_xlabel("accept length (tokens of a round)")
        panel.legend(fontsize=8, frameon=False)
    panels[0][0].set_ylabel("share of rounds")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_training(log: dict[str, Any], path: Path) -> None:
    """Loss of each training-time-test step and held-out accept length over time, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.2), layout="constrained")
    seconds = [line["seconds"] for line in log["curve"]]
    for step in range(len(log["curve"][0]["losses"])):
        left.plot(seconds, [line["losses"][step] for line in log["curve"]], label=f"step {step}", linewidth=1)
    left.set(xlabel="seconds of training", ylabel="cross-entropy", ylim=(0, 6))
    left.legend(fontsize=8, frameon=False, ncols=2)
    for name in ("T=0", "T=1"):
        points = [(line["seconds"], line[name]) for line in log["validation"] if name in line]
        right.plot(
            *zip(*points, strict=True), marker="o", markersize=3, label=f"held-out prompts, text of {name}, likeliest drafts"
        )
    right.set(xlabel="seconds of training", ylabel="accept length, chain of 5")
    right.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


_CARD = Path(__file__).with_name("draft_card.md")  # with str.format fields


def _short(commit: str) -> str:
    """A commit's first seven digits, and what is said about it."""
    name, _, remark = commit.partition(" ")
    return f"{name[:7]} {remark}".strip()


def _again(results: list[dict[str, Any]]) -> str:
    """Tables of further runs of the same prompts, each under what it ran on."""
    return "".join(
        f"The same prompts on {r['device']} in {r['dtype']} (commit {_short(r['commit'])}, torch {r['torch']}):\n\n"
        f"{accept_table(r)}\n\n"
        for r in results
    )


def model_card(log: dict[str, Any], result: dict[str, Any], *again: dict[str, Any]) -> str:
    """The README of the head's directory; ``again`` are further evaluations, on another device for one."""
    recipe = log["recipe"]
    batch = recipe["rows"] * recipe["row_length"]
    ratio = "; ".join(
        f"{line['seconds']:.0f} s: {line['T=0']:.2f}" for line in log["validation"][1 :: max(1, len(log["validation"]) // 4)]
    )
    return _CARD.read_text(encoding="utf-8").format(
        table=accept_table(result), again=_again(list(again)), max_new_tokens=result["max_new_tokens"],
        eval_device=result["device"],
        eval_dtype=result["dtype"], eval_commit=_short(result["commit"]), eval_torch=result["torch"],
        parameters=log["parameters"] / 1e6, texts=log["texts"], tokens=log["tokens"], answer_tokens=log["answer_tokens"],
        greedy=log["greedy_texts"] / log["texts"], vocabulary=recipe["draft_vocab_size"],
        coverage=log["draft_vocabulary_coverage"],
        steps_ttt=recipe["steps"], decay=recipe["decay"], rate=recipe["learning_rate"], clip=recipe["clip"], batch=batch,
        steps=log["steps"], epochs=log["steps"] * recipe["rows"] / log["packed_rows"], seconds=log["seconds"],
        device=log["device"], seed=recipe["seed"], torch=log["torch"], commit=_short(log["commit"]),
        made=log["generation"], made_commit=_short(log["generation"]["commit"]), gain=ratio,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--training", type=Path, required=True)
    parser.add_argument("--accept", type=Path, required=True)
    parser.add_argument("--again", type=Path, nargs="*", default=[], help="further files of eval_draft.py")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    log = json.loads(args.training.read_text(encoding="utf-8"))
    result = json.loads(args.accept.read_text(encoding="utf-8"))
    plot_training(log, args.out / "training.png")
    plot_accept_lengths(result, args.out / "accept.png")
    again = [json.loads(path.read_text(encoding="utf-8")) for path in args.again]
    (args.out / "README.md").write_text(model_card(log, result, *again), encoding="utf-8")


if __name__ == "__main__":
    main()
