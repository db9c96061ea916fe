"""``spec-compile demo``: a small real model, a few prompts, plain ``generate()`` against spec_compile in one run.

Each prompt runs three times: with spec_compile while the text streams, then plain and with spec_compile on the clock. A timed
call in which something was still compiled is repeated, so that neither side's times hold compilation. Then the prompts run
once more with the trained draft head (``demo_head``).
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spec_compile.errors import ConfigError, SpecCompileError
from spec_compile.other_processes import cores_used_by_others

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from spec_compile.demo_report import PromptResult

_WARM_UP_TOKENS = 24
_ATTEMPTS = 3  # timed calls at most until one compiles nothing


@dataclass(frozen=True)
class DemoPrompt:
    title: str
    text: str


# Chosen for answers of this 135M model that are right, or nearly; four that reuse the prompt's words, one that cannot.
DEMO_PROMPTS = (
    DemoPrompt(
        "edit text",
        "Fix the typos in this text and print the whole text:\n\n"
        "The libary opens at nine in the morning and closes at six in the evening. On Saturdays the library opens at ten "
        "and closes at four. Members may borow up to five books for three weeks. Books that are returned late cost twenty "
        "cents a day.",
    ),
    DemoPrompt(
        "fix code",
        "Fix this Python function: a colon is missing. Print the whole function.\n\n"
        "```python\n"
        "def mean_and_spread(values)\n"
        "    mean = sum(values) / len(values)\n"
        "    squares = [(value - mean) ** 2 for value in values]\n"
        "    spread = (sum(squares) / len(values)) ** 0.5\n"
        "    return mean, spread\n"
        "```",
    ),
    DemoPrompt(
        "extract",
        "The bridge was planned in 1871 and opened in 1883. A fire damaged the wooden deck in 1902, and a new steel deck was "
        "finished in 1905. The bridge was closed to cars in 1999 and reopened as a footbridge in 2004.\n\n"
        "List every sentence of the text above as a numbered list.",
    ),
    DemoPrompt(
        "quote",
        "Repeat the following text exactly, word for word:\n\n"
        "The harbour master keeps a ledger of every ship that enters the bay. Each entry has the name of the ship, the name "
        "of her captain, the port she sailed from and the cargo she carries. At the end of each month the ledger is copied "
        "and sent to the capital.",
    ),
    DemoPrompt("free story", "Write a short story about a lighthouse keeper who finds a message in a bottle."),
)


class Session:
    """The demo's only uses of the library: compile a model, run it plain, run it fast."""

    def __init__(self, model: PreTrainedModel, seed: int, generate_arguments: dict[str, object]) -> None:
        self.model, self._seed, self._arguments = model, seed, generate_arguments

    def compile(self, draft: str | None, backend: str, compile: str, **options: int) -> None:
        from spec_compile import spec_compile

        spec_compile(self.model, draft=draft, backend=backend, compile=compile, **options)

    def plain(self, inputs: dict[str, torch.Tensor], max_new_tokens: int) -> tuple[list[int], float]:
        """New tokens and seconds of transformers' own ``generate()``."""
        with self.model.spec.disable():
            return self._generate(inputs, max_new_tokens)

    def fast(
        self, inputs: dict[str, torch.Tensor], max_new_tokens: int, streamer: object | None = None
    ) -> tuple[list[int], float]:
        """New tokens and seconds of the compiled, speculative ``generate()``.

        Raises:
            RanPlainError: it ran as plain transformers, so there is nothing to compare.
        """
        from spec_compile.runtime.stats import accelerated

        made = self._generate(inputs, max_new_tokens, streamer)
        accelerated(self.model.spec.stats())
        return made

    def rounds(self) -> list[int]:
        """The accept length of each round of the last fast call."""
        stats = self.model.spec.stats()
        return list(stats.accept_lengths[0]) if stats.accept_lengths else []

    def built_seconds(self) -> float:
        """Seconds spent compiling and capturing so far."""
        stats = self.model.spec.stats()
        return stats.compile_seconds + stats.capture_seconds

    def _generate(self, inputs: dict[str, torch.Tensor], count: int, streamer: object | None = None) -> tuple[list[int], float]:
        import torch

        torch.manual_seed(self._seed)
        started = time.perf_counter()
        out = self.model.generate(**inputs, max_new_tokens=count, streamer=streamer, **self._arguments)
        new = out[0, inputs["input_ids"].shape[1] :].tolist()  # waits for the device
        return new, time.perf_counter() - started


class LiveText:
    """A streamer that redraws the text as it comes on a terminal, and keeps silent anywhere else."""

    def __init__(self, console: Console, tokenizer: PreTrainedTokenizerBase) -> None:
        from rich.live import Live

        self._console, self._tokenizer = console, tokenizer
        self._tokens: list[int] = []
        self._prompt_seen = False
        shown = console.is_terminal and not console.is_dumb_terminal
        # transient: the picture of accepted tokens takes its place
        self._live = Live(console=console, auto_refresh=False, transient=True) if shown else None

    def put(self, value: torch.Tensor) -> None:
        """First the prompt, then each new token; transformers' streamer protocol."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self._tokens += value.flatten().tolist()
        if self._live is not None:
            self._live.update(self._tail(), refresh=True)

    def end(self) -> None:
        pass

    def _tail(self) -> object:
        """As many of the last lines as fit, because a terminal cannot redraw what has scrolled away."""
        from rich.text import Text

        text = Text(self._tokenizer.decode(self._tokens, skip_special_tokens=True))
        lines = text.wrap(self._console, self._console.width)
        return Text("\n").join(lines[-max(1, self._console.height - 4) :])

    def __enter__(self) -> LiveText:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()


def run_demo(args: argparse.Namespace) -> int:
    """Run the demo for parsed arguments of ``spec-compile demo``.

    Returns:
        0; 1 when greedy float32 output differed from plain ``generate()``, which is a bug.

    Raises:
        ConfigError: ``--svg`` names a file in a directory that does not exist.
        SpecCompileError: the model cannot be had or compiled (see ``load_demo_model`` and ``spec_compile``), or a call that was
            to be accelerated ran as plain transformers.
    """
    from spec_compile.cli import quiet_transformers

    with quiet_transformers():
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from transformers.utils import logging as hf_logging

    from spec_compile.cli import encode_prompt, resolve_compile, resolve_device, resolve_dtype, sampling_arguments
    from spec_compile.demo_report import acceptance_picture, legend, save_svg, token_pieces, uses_colour
    from spec_compile.hf_integration.demo_model import DEMO_MODEL_NAME, load_demo_model

    console = Console(no_color=args.no_color or None, highlight=False, markup=False)
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    if args.svg is not None and not Path(args.svg).parent.is_dir():  # before minutes of work for it
        raise ConfigError(f"--svg {args.svg}: there is no such directory; make it first.")
    model, tokenizer = load_demo_model(dtype, device)
    console.print(_header(DEMO_MODEL_NAME, device, dtype, args))
    if device.type == "cpu" and (note := _busy_note()):
        console.print(note)

    session = Session(model, args.seed, sampling_arguments(args.temperature))
    prompts = [DemoPrompt(f"prompt {i}", text) for i, text in enumerate(args.prompt or (), 1)] or list(DEMO_PROMPTS)
    encoded = [encode_prompt(tokenizer, prompt.text, True, device) for prompt in prompts]
    compile = resolve_compile(args.compile, device)
    _warm_up(console, session, encoded, args, compile)

    hf_logging.disable_progress_bar()  # nothing takes long from here on, and a bar would tear the live text

    console.print(legend(uses_colour(console)))
    results: list[PromptResult] = []
    for prompt, inputs in zip(prompts, encoded, strict=True):
        console.rule(f"{prompt.title}", align="left", style="dim")
        console.print(_shorten(prompt.text, 3 * console.width), style="dim")
        with LiveText(console, tokenizer) as live:
            session.fast(inputs, args.max_new_tokens, streamer=live)
        result = measure(session, prompt.title, inputs, args.max_new_tokens)
        pieces = token_pieces(tokenizer, result.spec_tokens)
        console.print(acceptance_picture(pieces, result.accept_lengths, uses_colour(console)))
        console.print(
            f"plain {result.plain_seconds:.2f} s, spec_compile {result.spec_seconds:.2f} s: {result.speedup:.2f}×", style="bold"
        )
        results.append(result)
    _print_summary(console, results, args)
    if args.svg is not None:
        save_svg(args.svg, tokenizer, results)
    if args.draft == "ngram" and args.head:
        from spec_compile.demo_head import run_head

        results += run_head(console, session, tokenizer, encoded, results, args, compile)
    # In bfloat16 two nearly equal logits may swap between a window of one token and of eight; in float32 they must not.
    exact = args.temperature == 0 and str(dtype) == "torch.float32"
    return 1 if exact and any(result.first_difference is not None for result in results) else 0


def _header(name: str, device: torch.device, dtype: torch.dtype, args: argparse.Namespace) -> str:
    import torch
    import transformers

    from spec_compile.hardware import detect_hardware

    decoding = f"temperature {args.temperature:g}, seed {args.seed}" if args.temperature else "greedy"
    return (
        f"{name}, {str(dtype).removeprefix('torch.')} on {detect_hardware(device).name}, {decoding}, draft {args.draft}\n"
        f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    )


def _busy_note() -> str | None:
    """A line when other processes want the cores too, else None."""
    cores = os.cpu_count() or 1
    used = cores_used_by_others()
    if used is None or used < cores / 4:
        return None
    return f"Other processes use this machine ({used:.1f} of {cores} cores): the times below will be unsteady."


def _warm_up(
    console: Console, session: Session, encoded: Sequence[dict[str, torch.Tensor]], args: argparse.Namespace, compile: str
) -> None:
    """Everything that happens once, on both sides, with its cost said."""
    tokens = min(_WARM_UP_TOKENS, args.max_new_tokens)
    console.print("Compiling; the first run on a machine takes longest …" if compile != "none" else "Starting …")
    started = time.perf_counter()
    session.compile(None if args.draft == "none" else args.draft, args.backend, compile)
    session.fast(encoded[0], tokens)
    cold = time.perf_counter() - started
    # Another length: what was compiled for one length only is compiled for any length now.
    session.fast(encoded[-1], tokens)
    total = time.perf_counter() - started
    session.plain(encoded[0], tokens)
    console.print(f"Cold start, not part of any time below: {cold:.1f} s to the first answer, {total:.1f} s until warm.\n")


def measure(session: Session, title: str, inputs: dict[str, torch.Tensor], max_new_tokens: int) -> PromptResult:
    """Time one prompt on both sides; the last call before this was a fast one.

    Raises:
        SpecCompileError: a fast call ran plain, or every one compiled something, so none can be timed.
    """
    from spec_compile.demo_report import PromptResult

    built = session.built_seconds()  # now: the plain call replaces the figures
    plain_tokens, plain_seconds = session.plain(inputs, max_new_tokens)
    for _ in range(_ATTEMPTS):
        spec_tokens, spec_seconds = session.fast(inputs, max_new_tokens)
        before, built = built, session.built_seconds()
        if built == before:
            return PromptResult(title, plain_tokens, spec_tokens, plain_seconds, spec_seconds, session.rounds())
    raise SpecCompileError(
        f"generate() still compiled in call {_ATTEMPTS + 1} with the same prompt, so it cannot be timed. This is a bug: please "
        "report it with the output of `spec-compile doctor`, and try --compile none meanwhile."
    )


def _print_summary(console: Console, results: Sequence[PromptResult], args: argparse.Namespace) -> None:
    from spec_compile.demo_report import histogram, result_lines, verdict

    sampled = args.temperature > 0
    console.rule("Comparison, one run each", align="left", style="dim")
    console.print(result_lines(results, sampled, console.width))
    console.print("\nRounds by accept length (tokens a round emitted, the model's own included)", style="bold")
    console.print(histogram(results))
    console.print()
    console.print(verdict(results, args.draft, sampled))


def _shorten(text: str, limit: int) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 2].rstrip() + " …"


if __name__ == "__main__":
    from spec_compile.cli import main

    sys.exit(main(["demo", *sys.argv[1:]]))
