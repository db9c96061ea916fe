"""The demo's second half: the EAGLE-3 head that comes with the package, as a chain and as a tree, beside n-grams.

Plain runs are timed anew beside the head's. A tree's rounds are looked at through ``model.spec.last_tree()``, in a
call that is not timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers.generation.streamers import BaseStreamer

from spec_compile.demo_report import PromptResult, histogram, uses_colour

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from spec_compile.demo import Session
    from spec_compile.draft_tree import DraftTree
    from spec_compile.handle import SpecHandle

HEAD_SHAPES = {
    "chain 5": {"num_steps": 5},
    "tree 5/8/32": {"num_steps": 5, "topk": 8, "num_draft_tokens": 32},
}
_KEPT = "bold black on color(114)"
_WARM_UP_TOKENS, _WATCHED_TOKENS = 8, 48


class TreeWatcher(BaseStreamer):
    """Keeps the tree of every round. The tokens of a round come one by one and show the same tree."""

    def __init__(self, handle: SpecHandle) -> None:
        self._handle, self.trees = handle, []

    def put(self, value: torch.Tensor) -> None:
        tree = self._handle.last_tree()
        if tree is not None and (not self.trees or tree != self.trees[-1]):
            self.trees.append(tree)

    def end(self) -> None:
        pass


def run_head(
    console: Console,
    session: Session,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[dict[str, torch.Tensor]],
    results: Sequence[PromptResult],
    args: argparse.Namespace,
    compile: str,
) -> list[PromptResult]:
    """Run the first and the last prompt with the head in both shapes and print what came of it; the results of both.

    Args:
        results: of the n-gram runs of the same prompts, for comparison.
    """
    from spec_compile.demo import measure
    from spec_compile.hf_integration.demo_model import demo_draft_dir

    ends = sorted({0, len(results) - 1})  # two prompts show it: one that copies, one that does not
    results, encoded = [results[i] for i in ends], [encoded[i] for i in ends]
    titles = " and ".join(repr(result.title) for result in results)
    console.rule(f"A trained EAGLE-3 head on {titles}", align="left", style="dim")
    by_shape: dict[str, list[PromptResult]] = {}
    trees: list[DraftTree] = []
    for name, shape in HEAD_SHAPES.items():
        console.print(f"Compiling: the head as {name} …")
        session.compile(str(demo_draft_dir()), args.backend, compile, **shape)
        session.fast(encoded[0], min(_WARM_UP_TOKENS, args.max_new_tokens))
        # Another length: what was compiled for one is compiled for any now.
        watcher = TreeWatcher(session.model.spec)
        session.fast(encoded[-1], min(_WATCHED_TOKENS, args.max_new_tokens), streamer=watcher)
        trees += watcher.trees
        by_shape[name] = [
            measure(session, r.title, inputs, args.max_new_tokens) for r, inputs in zip(results, encoded, strict=True)
        ]
    console.print(head_table(results, by_shape, args.temperature > 0))
    for name, of_shape in by_shape.items():
        console.print(f"\nRounds of {name} by accept length", style="bold")
        console.print(histogram(of_shape))
    if trees:
        console.print(f"\nOne round's tree, of {results[-1].title!r}: the one that kept the longest path", style="bold")
        console.print(tree_picture(pick(trees), tokenizer, uses_colour(console)))
    everything = [result for of_shape in by_shape.values() for result in of_shape]
    console.print()
    console.print(head_verdict(by_shape, str(encoded[0]["input_ids"].device.type)))
    return everything


def head_table(results: Sequence[PromptResult], by_shape: dict[str, list[PromptResult]], sampled: bool) -> Table:
    """Accept length and speed-up a prompt: n-grams, then the head's shapes."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("accept length, speed-up")
    columns = {"n-gram": list(results), **by_shape}
    for name in columns:
        table.add_column(name, justify="right")
    if not sampled:
        table.add_column("equal to plain")
    for index, result in enumerate(results):
        cells = [f"{column[index].accept_length:.2f}  {column[index].speedup:.2f}×" for column in columns.values()]
        if not sampled:
            wrong = [name for name in by_shape if by_shape[name][index].first_difference is not None]
            cells.append(f"NO: {', '.join(wrong)}" if wrong else "yes")
        table.add_row(Text(result.title), *cells)
    means = [sum(r.accept_length for r in column) / len(column) for column in columns.values()]
    table.add_row(Text("mean of the prompts", style="bold"), *(f"{mean:.2f}       " for mean in means))
    return table


def pick(trees: Sequence[DraftTree]) -> DraftTree:
    """The tree with the longest path; of equals, one whose path leaves the likeliest branch, which a chain would have lost."""
    return max(trees, key=lambda tree: (tree.accept_length, _leaves_the_chain(tree)))


def _leaves_the_chain(tree: DraftTree) -> bool:
    return any(tree.children(parent)[0] != child for parent, child in zip(tree.path, tree.path[1:], strict=False))


def tree_picture(tree: DraftTree, tokenizer: PreTrainedTokenizerBase, colour: bool) -> Text:
    """A line a token, children under their parent with the head's probability; kept tokens are marked."""
    picture = Text()

    def line(prefix: str, index: int, note: str) -> None:
        word = repr(tokenizer.decode([tree.tokens[index]]))
        kept = index in tree.path
        picture.append(prefix)
        picture.append(word if colour or not kept else f"[{word}]", style=_KEPT if colour and kept else None)
        picture.append(f" {note}\n", style="dim" if colour else None)

    def below(index: int, prefix: str) -> None:
        children = tree.children(index)
        for child in children:
            last = child == children[-1]
            line(f"{prefix}{'└─ ' if last else '├─ '}", child, f"{_percent(tree.logprobs[child])}")
            below(child, prefix + ("   " if last else "│  "))

    line("", 0, "known")
    below(0, "")
    word = repr(tokenizer.decode([tree.next_token]))
    picture.append(
        f"{len(tree.tokens) - 1} tokens drafted, {tree.accept_length - 1} kept ({'shaded' if colour else 'in brackets'}), "
        f"and the model's own: {word}. Percentages are the head's."
    )
    return picture


def _percent(logprob: float) -> str:
    from math import exp

    return f"{exp(logprob):.0%}" if logprob > -4.6 else "<1%"


def head_verdict(by_shape: dict[str, list[PromptResult]], device: str) -> Text:
    """Whether the head paid here, from what was measured, and why it does or does not."""
    lines, slower = [], False
    for name, results in by_shape.items():
        fast, plain = (sum(r.spec_seconds for r in results), sum(r.plain_seconds for r in results))
        word = "faster than" if fast < 0.95 * plain else "slower than" if fast > 1.05 * plain else "as fast as"
        lines.append(
            f"The head as {name} was {word} plain generate() here: {fast:.1f} s against {plain:.1f} s for all prompts."
        )
        slower = slower or word == "slower than"
    if device == "cpu" and slower:
        lines.append(
            "On a CPU a window of several tokens costs more than one token, and the head's own steps count beside a model this "
            "small. Heads and trees are made for GPUs, where a window costs about what one token does."
        )
    return Text("\n".join(lines))
