"""What the demo prints: the picture of accepted tokens, the table, the histogram and the verdict."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# One shade a round, so that neighbouring rounds stay apart; dark text on them reads on light and dark terminals.
_SHADES = ("black on color(114)", "black on color(152)", "black on color(222)")
_HARDLY = 1.1  # a speed-up below this is within the noise of a single run
_NARROW = 76  # columns; below them the table becomes a list
_SVG_WIDTH = 92  # columns; wider ones are too small to read in a README
_BAR = 32  # columns of the histogram's longest bar


@dataclass(frozen=True)
class PromptResult:
    """One prompt, run plain and with spec_compile.

    Attributes:
        plain_tokens, spec_tokens: the new token ids.
        plain_seconds, spec_seconds: wall time of the whole call, compiling excluded.
        accept_lengths: tokens each round emitted, in order; the first new token is prefill's and in none of them.
    """

    title: str
    plain_tokens: list[int]
    spec_tokens: list[int]
    plain_seconds: float
    spec_seconds: float
    accept_lengths: list[int]

    @property
    def accept_length(self) -> float:
        """Mean tokens a verify emitted, the bonus token included; 0 when there was none."""
        return sum(self.accept_lengths) / len(self.accept_lengths) if self.accept_lengths else 0.0

    @property
    def plain_rate(self) -> float:
        return len(self.plain_tokens) / self.plain_seconds

    @property
    def spec_rate(self) -> float:
        return len(self.spec_tokens) / self.spec_seconds

    @property
    def speedup(self) -> float:
        """By tokens per second, which equals the ratio of times where the tokens are equal."""
        return self.spec_rate / self.plain_rate

    @property
    def first_difference(self) -> int | None:
        """Index of the first differing new token, or None when the two outputs are equal."""
        for index, (plain, spec) in enumerate(zip(self.plain_tokens, self.spec_tokens, strict=False)):
            if plain != spec:
                return index
        shorter, longer = sorted((len(self.plain_tokens), len(self.spec_tokens)))
        return None if shorter == longer else shorter


def token_pieces(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[str]:
    """The text each token adds; a token that ends inside a character adds nothing, the one completing it all of it."""
    pieces: list[str] = []
    shown = ""
    for count in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:count], skip_special_tokens=True)
        complete = text.rstrip("\ufffd") if count < len(tokens) else text
        pieces.append(complete[len(shown) :])
        shown = shown if len(complete) < len(shown) else complete
    return pieces


def uses_colour(console: Console) -> bool:
    return not console.no_color and console.color_system is not None


def acceptance_picture(pieces: Sequence[str], accept_lengths: Sequence[int], colour: bool) -> Text:
    """The text with its accepted drafts on a shade, one shade a round, and the tokens of the target itself plain.

    A round of length L emitted L - 1 accepted drafts and then the target's own token. Without colour, accepted runs stand
    in brackets.
    """
    picture = Text(pieces[0] if pieces else "")
    start, drew = 1, 0
    for length in accept_lengths:
        run = "".join(pieces[start : start + length - 1])
        if run:
            picture.append(run if colour else f"[{run}]", style=_SHADES[drew % len(_SHADES)] if colour else None)
            drew += 1
        picture.append("".join(pieces[start + length - 1 : start + length]))
        start += length
    picture.append("".join(pieces[start:]))
    return picture


def save_svg(path: str, tokenizer: PreTrainedTokenizerBase, results: Sequence[PromptResult]) -> None:
    """Write the legend and the picture of every result to ``path``, as an SVG in colour whatever this terminal shows."""
    console = Console(
        record=True, file=io.StringIO(), width=_SVG_WIDTH, force_terminal=True, color_system="256", highlight=False
    )
    console.print(legend(True))
    for result in results:
        tokens = len(result.spec_tokens)
        console.rule(result.title, align="left", style="dim")
        console.print(acceptance_picture(token_pieces(tokenizer, result.spec_tokens), result.accept_lengths, True))
        console.print(
            f"{tokens} tokens in {len(result.accept_lengths)} rounds, accept length {result.accept_length:.2f}", style="bold"
        )
    console.save_svg(path, title="spec-compile demo", unique_id="demo")


def legend(colour: bool) -> Text:
    marked = Text("shaded", style=_SHADES[0]) if colour else Text("[bracketed]")
    how = "one shade a round" if colour else "one bracket a round"
    return Text.assemble(marked, f": drafted and accepted, {how}; plain: the model's own token of a round")


def result_lines(results: Sequence[PromptResult], sampled: bool, width: int) -> Table | Text:
    """The comparison: a table, or on a narrow terminal a list."""
    columns = ("prompt", "tokens", "equal", "accept", "plain tok/s", "spec tok/s", "speed-up")
    rows = [
        (
            result.title,
            str(len(result.spec_tokens)),
            _equality(result, sampled),
            f"{result.accept_length:.2f}",
            f"{result.plain_rate:.1f}",
            f"{result.spec_rate:.1f}",
            f"{result.speedup:.2f}×",
        )
        for result in results
    ]
    if width < _NARROW:
        blocks = ["\n".join(f"{name}: {cell}" for name, cell in zip(columns, row, strict=True)) for row in rows]
        return Text("\n\n".join(blocks))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, justify="left" if name in ("prompt", "equal") else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _equality(result: PromptResult, sampled: bool) -> str:
    if sampled:
        return "sampled"
    at = result.first_difference
    return "yes" if at is None else f"NO, at {at + 1}"


def histogram(results: Sequence[PromptResult]) -> Text:
    """How many rounds emitted 1, 2, … tokens, over all prompts."""
    counts = Counter(length for result in results for length in result.accept_lengths)
    if not counts:
        return Text("no rounds")
    most = max(counts.values())
    lines = []
    for length in range(1, max(counts) + 1):
        bar = "█" * round(counts[length] / most * _BAR) or "▏" * min(1, counts[length])
        lines.append(f"{length:3d}  {bar} {counts[length]}")
    return Text("\n".join(lines))


def verdict(results: Sequence[PromptResult], draft: str, sampled: bool) -> Text:
    """Where drafting paid and where not, from what was measured."""
    helped = [r for r in results if r.speedup >= _HARDLY]
    rest = [r for r in results if r.speedup < _HARDLY]
    lines = []
    if helped:
        lines.append(f"Faster: {_names(helped)}.")
    if rest:
        lines.append(f"No gain to speak of, or slower: {_names(rest)}.")
    if draft == "ngram":
        lines.append(
            "N-gram drafts copy what the prompt or the answer already said. They pay where the answer repeats the prompt "
            "(edits, code, quotes) and not in free text, where a trained draft model is needed."
        )
    different = [r for r in results if r.first_difference is not None]
    if sampled:
        lines.append("Sampled: both sides draw from the same distribution, with different random numbers.")
    elif not different:
        lines.append("Every token equals plain generate()'s.")
    else:
        lines.append(f"Tokens differ from plain generate()'s: {', '.join(r.title for r in different)}.")
    return Text("\n".join(lines))


def _names(results: Sequence[PromptResult]) -> str:
    return ", ".join(f"{result.title} {result.speedup:.2f}×" for result in results)
