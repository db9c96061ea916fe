"""The command ``spec-compile``: ``demo``, ``doctor`` and ``generate``.

Exit codes: 0 done, 1 failed (or, for ``doctor``, not ready), 2 wrong usage, 130 interrupted. Text goes to stdout, everything
about it to stderr. torch and transformers are imported only by the command that needs them, so ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from spec_compile.drafts.names import check_name, is_path
from spec_compile.errors import BackendError, CaptureError, ConfigError, DraftError, SpecCompileError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_EPILOG = """\
examples:
  spec-compile doctor
  spec-compile demo
  spec-compile demo --max-new-tokens 48 --prompt "Repeat this sentence twice: The cat sat on the mat."
  spec-compile generate --prompt "Why is the sky blue?"
  spec-compile generate path/to/model --prompt "def fib(n):" --max-new-tokens 200 --no-chat
  spec-compile generate path/to/model --draft path/to/smaller/model --chat --prompt "Hello"
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's own) and return the exit code.

    Raises:
        SystemExit: from argparse, with code 2 for wrong usage and 0 for ``--help`` and ``--version``.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a character the terminal cannot show must not end a run
            stream.reconfigure(errors="replace")
    parser = build_parser()
    args = parser.parse_args(argv)
    # Before torch loads its OpenMP: threads that wait by spinning take the cores from each other as soon as another process
    # wants one too, and a forward then takes several times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if args.debug:
            raise
        print(f"error: {_message(error)}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


def _message(error: Exception) -> str:
    """What a user needs of an error: our own say what to do, here as an option; of others the type matters too."""
    if isinstance(error, BackendError):
        named = re.sub(r"(nearest that can is (\w+)): backend=\{.*?\} \(.*?\)", r"\1: --backend \2", str(error))
        return re.sub(r"backend='(\w+)'", r"--backend \1", named)
    if isinstance(error, DraftError):
        return _as_typed(error)
    if isinstance(error, CaptureError):  # a command has nothing to leave out
        return str(error).replace("; leave spec_compile() out for it", "")
    if isinstance(error, (SpecCompileError, OSError)):
        return str(error)
    return f"{type(error).__name__}: {error}\nRun the command again with --debug before it for the traceback."


def _as_typed(error: DraftError) -> str:
    """What an error says of ``draft=``, as the option that was typed or may be."""
    return (
        re.sub(r"draft='([^']+)'", r"--draft \1", str(error))
        .replace("draft=None", "--draft none")
        .replace("draft=", "--draft ")
    )


def build_parser() -> argparse.ArgumentParser:
    from spec_compile import __version__

    parser = argparse.ArgumentParser(
        prog="spec-compile",
        description="Speculative decoding compiled into Hugging Face generate().",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"spec-compile {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{demo,doctor,generate}")

    demo = commands.add_parser(
        "demo",
        help="plain generate() against spec_compile on a small real model",
        description="Run SmolLM2-135M-Instruct on a few prompts, plain and with spec_compile, and compare tokens and time.",
    )
    demo.set_defaults(run=_run_demo)
    demo.add_argument("--prompt", action="append", metavar="TEXT", help="use this prompt (repeatable), not the built-in ones")
    demo.add_argument(
        "--head",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run the prompts with the model's EAGLE-3 draft head, too (default; with --draft ngram only)",
    )
    demo.add_argument("--svg", metavar="FILE", help="also write the pictures of accepted tokens to FILE, in colour")
    _add_run_arguments(demo, max_new_tokens=96)

    doctor = commands.add_parser(
        "doctor",
        help="what this machine can run, and what to install",
        description="Check hardware, versions, kernel providers and compilers. Exit code 1 when something needed is missing.",
    )
    doctor.set_defaults(run=_run_doctor)
    form = doctor.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the report as JSON")
    form.add_argument("--markdown", action="store_true", help="print docs/support-matrix.md: who can do what on which hardware")
    doctor.add_argument("--no-color", action="store_true", help="no colours (NO_COLOR does the same)")

    generate = commands.add_parser(
        "generate",
        help="generate text with any causal language model",
        description="Stream generated text to stdout and the figures of the run to stderr.",
    )
    generate.set_defaults(run=_run_generate)
    generate.add_argument("model", nargs="?", metavar="MODEL_PATH", help="directory or hub id (default: the demo model)")
    generate.add_argument("--prompt", metavar="TEXT", help="the prompt; without it, standard input is read")
    generate.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="put the prompt into the model's chat template (default: only for the demo model)",
    )
    generate.add_argument("--explain", action="store_true", help="also print which kernel runs in which graph, and why")
    _add_run_arguments(generate, max_new_tokens=256)
    return parser


def _add_run_arguments(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    parser.add_argument(
        "--draft",
        default="ngram",
        metavar="DRAFT",
        help="ngram, mtp, none, or path or hub id of a draft head or a smaller model (default: ngram)",
    )
    parser.add_argument(
        "--backend", default="auto", metavar="NAME", help="attention kernel provider, auto or tune (default: auto)"
    )
    parser.add_argument(
        "--compile",
        choices=("inductor", "none"),
        default="inductor",
        help="none starts sooner and runs slower (default: inductor)",
    )
    parser.add_argument(
        "--max-new-tokens", type=_positive_int, default=max_new_tokens, metavar="N", help=f"default: {max_new_tokens}"
    )
    parser.add_argument(
        "--temperature", type=_temperature, default=0.0, metavar="T", help="0 is greedy, above it samples (default: 0)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of sampling (default: 0)")
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1, … (default: cuda where there is one)"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="auto: float32 on a CPU, bfloat16 on a GPU",
    )
    parser.add_argument("--no-color", action="store_true", help="no colours (NO_COLOR does the same)")


def _positive_int(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 up")
    return int(text)


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 up")
    return value


# ----------------------------------------------------------------------------------------------------------------------
# What the commands share


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Errors only from transformers inside the block; its verbosity and progress bars are as before after it."""
    from transformers.utils import logging as hf_logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def resolve_device(name: str) -> torch.device:
    """The torch device a user named.

    Raises:
        ConfigError: no such device here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name}: not a device; use cpu, cuda or cuda:1.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {name}: torch sees {torch.cuda.device_count()} GPUs; `spec-compile doctor` says why. Use --device cpu."
        )
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: spec_compile runs on cpu and cuda (NVIDIA or ROCm) devices.")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    import torch

    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def resolve_compile(wanted: str, device: torch.device) -> str:
    """``wanted``, or ``"none"`` with a line on stderr where Inductor cannot work."""
    from spec_compile.doctor import inductor_problem

    problem = inductor_problem(device.type) if wanted == "inductor" else None
    if problem is None:
        return wanted
    print(f"note: running uncompiled (--compile none), because {problem}", file=sys.stderr)
    return "none"


def sampling_arguments(temperature: float) -> dict[str, object]:
    """Arguments of ``generate()``; all of the vocabulary is sampled, whatever the model's own defaults are."""
    if temperature == 0.0:
        return {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool, device: torch.device) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask`` of one prompt on ``device``.

    Raises:
        ConfigError: ``chat`` is wanted of a tokenizer without a chat template, or the prompt has no tokens.
    """
    if chat and not tokenizer.chat_template:
        raise ConfigError("--chat: this model's tokenizer has no chat template; leave --chat out.")
    if chat:
        encoded = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    if encoded["input_ids"].shape[1] == 0:
        raise ConfigError("--prompt: the prompt is empty.")
    return {name: encoded[name].to(device) for name in ("input_ids", "attention_mask")}


# ----------------------------------------------------------------------------------------------------------------------
# The commands


def _run_demo(args: argparse.Namespace) -> int:
    from spec_compile.demo import run_demo

    for prompt in args.prompt or ():
        _not_empty(prompt)
    _check_draft(args.draft)
    return run_demo(args)


def _run_doctor(args: argparse.Namespace) -> int:
    from spec_compile.doctor import run_doctor

    return run_doctor(as_json=args.json, no_color=args.no_color, markdown=args.markdown)


def _run_generate(args: argparse.Namespace) -> int:
    if args.model is not None and is_path(args.model) and not os.path.exists(args.model):
        raise ConfigError(f"MODEL_PATH {args.model}: there is no such directory.")
    _check_draft(args.draft)
    prompt = _read_prompt(args.prompt)
    with quiet_transformers():
        return _generate(args, prompt)


def _generate(args: argparse.Namespace, prompt: str) -> int:
    import torch
    from transformers import TextStreamer

    from spec_compile import spec_compile
    from spec_compile.runtime.stats import accelerated

    device = resolve_device(args.device)
    model, tokenizer = _load(args.model, resolve_dtype(args.dtype, device), device)
    inputs = encode_prompt(tokenizer, prompt, args.model is None if args.chat is None else args.chat, device)
    draft = None if args.draft == "none" else args.draft
    print("tracing and compiling; the first run on a machine takes longest …", file=sys.stderr, flush=True)
    started = time.perf_counter()
    spec_compile(model, draft=draft, backend=args.backend, compile=resolve_compile(args.compile, device))
    torch.manual_seed(args.seed)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs, max_new_tokens=args.max_new_tokens, streamer=streamer, **sampling_arguments(args.temperature))
    seconds = time.perf_counter() - started
    sys.stdout.flush()
    stats = accelerated(model.spec.stats())
    print(
        f"{stats.emitted_tokens} tokens in {stats.rounds} rounds, accept length {stats.accept_length:.2f}, "
        f"{stats.tokens_per_second:.1f} tokens/s once compiled; {seconds:.1f} s in all, "
        f"{stats.compile_seconds + stats.capture_seconds:.1f} s of that compiling",
        file=sys.stderr,
    )
    if args.explain:
        print(model.spec.explain(), file=sys.stderr)
    return 0


def _read_prompt(given: str | None) -> str:
    if given is None and sys.stdin.isatty():
        raise ConfigError('No prompt: pass --prompt "…", or pipe one in.')
    return _not_empty(sys.stdin.read() if given is None else given)


def _check_draft(name: str) -> None:
    """That ``name`` may be a draft, before torch is imported and a model is loaded for it."""
    if name in ("ngram", "mtp", "none"):
        return
    try:
        check_name(os.path.expanduser(name))
    except DraftError as error:
        raise ConfigError(_as_typed(error)) from error


def _not_empty(prompt: str) -> str:
    """``prompt``, before a model is loaded for it; in a chat template an empty one has tokens, too."""
    if not prompt.strip():
        raise ConfigError("--prompt: the prompt is empty.")
    return prompt


def _load(path: str | None, dtype: torch.dtype, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if path is None:
        from spec_compile.hf_integration.demo_model import load_demo_model

        return load_demo_model(dtype, device)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval(), tokenizer
    except (OSError, ValueError) as error:
        raise ConfigError(f"MODEL_PATH {path}: transformers cannot load it: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
