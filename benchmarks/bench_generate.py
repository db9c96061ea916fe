"""generate() of one model, several ways, side by side in one run: milliseconds a decode step, tokens/s, memory, idle.

    bench_generate.py --shape llama-3.1-8b --device cuda --batch 1 8 32 --json out.json --plot out.png
    bench_generate.py --shape llama-3.1-8b --device cuda --systems --starts ours ours_ngram      # cold and warm start
    bench_generate.py --shape smollm2 --device cpu           # real model, real prompts, plain against ours by turns

All are timed alike: a decode step costs (time of n2 new tokens - time of n1) / (steps of n2 - steps of n1): no prefill
in it, nor what a call costs once. README.md in this folder says what each column means.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import floors
import report
import shapes
import torch
from shapes import SYSTEMS, System
from torch import Tensor, nn

# ----------------------------------------------------------------------------------------------------------------------
# The adapter: every use of the library's API is here

STAT_NAMES = [
    "rounds", "emitted_tokens", "accept_length", "ms_per_round", "host_ms_per_round", "gpu_idle_fraction", "prefill_ms",
    "tokens_per_second", "compile_seconds", "capture_seconds", "graphs", "kv_bytes", "mode", "simulated",
]  # fmt: skip


def attach_ours(model: nn.Module, system: System, draft: nn.Module | None, args: argparse.Namespace) -> nn.Module:
    from spec_compile import SpecConfig, spec_compile

    options: dict[str, Any] = {"progress": False}
    if system.draft is not None:
        options |= {"num_steps": system.steps, "simulate_accept_length": system.simulate}
    config = SpecConfig(**options | args.config)
    return spec_compile(model, draft=system.draft if draft is None else draft, backend=args.backend, config=config)


def our_stats(model: nn.Module) -> dict[str, Any]:
    """The library's own figures of the last call; a name it does not have is None. A call that ran plain is an error: its
    figures are transformers' and not ours."""
    from spec_compile.runtime.stats import accelerated

    stats = accelerated(model.spec.stats())
    return {name: getattr(stats, name, None) for name in STAT_NAMES}


# ----------------------------------------------------------------------------------------------------------------------
# One system on one model


class Runner:
    """``runner(inputs, n)`` generates; ``decode_rounds`` says how many rounds of the target that took."""

    def __init__(self, model: nn.Module, system: System, draft: nn.Module | None = None) -> None:
        self.model, self.system, self.kwargs = model, system, dict(system.kwargs)
        if not system.ours and system.draft == "model":
            if draft is None:
                raise ValueError("this shape has no draft model")
            self.kwargs["assistant_model"] = draft
            options = draft.generation_config  # the same work a round as ours: a fixed number of draft steps
            options.num_assistant_tokens, options.num_assistant_tokens_schedule = system.steps, "constant"
            options.assistant_confidence_threshold = 0.0
        self.forwards = self.before = 0
        counted = system.draft is not None and not system.ours
        self.hook = model.register_forward_pre_hook(self._count) if counted else None

    def _count(self, *_: object) -> None:
        self.forwards += 1

    def close(self) -> None:
        if self.hook is not None:
            self.hook.remove()

    def __call__(self, inputs: dict[str, Tensor], new_tokens: int, **kwargs: Any) -> Tensor:
        return self.model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, **self.kwargs, **kwargs)

    def mark(self) -> None:
        """Call before a run whose rounds are asked for."""
        self.before = self.forwards

    def decode_rounds(self, new_tokens: int) -> int:
        """Target forwards after the prefill in the last run."""
        rounds = our_stats(self.model)["rounds"] if self.system.ours else self.forwards - self.before - 1
        return new_tokens - 1 if self.system.draft is None else rounds  # the prefill gives the first token


@contextmanager
def attached(system: System, model: nn.Module, draft: nn.Module | None, args: argparse.Namespace) -> Iterator[Runner]:
    """The system on the model; afterwards the model is as before and its memory is free."""
    target = attach_ours(model, system, draft, args) if system.ours else model
    try:
        with closing(Runner(target, system, draft)) as runner:
            yield runner
    finally:
        if system.ours:
            target.spec.remove()
        forget_compiled(model)


def forget_compiled(model: nn.Module) -> None:
    """Drop what Hugging Face and Dynamo keep: each of their cells compiles for its own batch, none pays another's."""
    for name in ("_compiled_call", "_last_compile_config", "_previous_max_cache_length"):
        model.__dict__.pop(name, None)
    torch._dynamo.reset()
    shapes.reset_peaks()


# ----------------------------------------------------------------------------------------------------------------------
# One cell


def timed_ms(runner: Runner, inputs: dict[str, Tensor], new_tokens: int, device: str) -> tuple[float, Tensor]:
    runner.mark()
    shapes.sync(device)
    begin = time.perf_counter()
    output = runner(inputs, new_tokens)
    shapes.sync(device)
    elapsed = (time.perf_counter() - begin) * 1e3
    expected = inputs["input_ids"].shape[1] + new_tokens
    if output.shape[1] != expected:
        raise RuntimeError(f"generate() returned {output.shape[1]} tokens a row, expected {expected}")
    return elapsed, output


def measure(runner: Runner, inputs: dict[str, Tensor], args: argparse.Namespace, cell: dict[str, Any]) -> Tensor:
    """Fill the cell; the tokens generated are returned for comparison between systems."""
    device, long, cuda = args.device, args.new_tokens, args.device.startswith("cuda")
    short, previous = max(1, long // 4), float("inf")
    deadline = time.monotonic() + args.cell_budget
    for cell["warmups"] in range(1, args.max_warmups + 1):  # the first runs compile, record graphs, fill allocators
        elapsed, output = timed_ms(runner, inputs, long, device)
        if abs(elapsed - previous) < 0.05 * elapsed:
            break
        previous = elapsed
    timed_ms(runner, inputs, short, device)
    cell["first_token_ms"] = statistics.median(timed_ms(runner, inputs, 1, device)[0] for _ in range(3))
    if cuda:
        cell["setup_peak_bytes"] = shapes.peak_bytes()
        shapes.reset_peaks()

    rounds: dict[int, int] = {}
    per_step, per_token = [], []
    while len(per_step) < args.repeats and (not per_step or time.monotonic() < deadline):
        times = {}
        for new_tokens in (short, long):
            times[new_tokens], output = timed_ms(runner, inputs, new_tokens, device)
            rounds[new_tokens] = runner.decode_rounds(new_tokens)
        difference, steps = times[long] - times[short], rounds[long] - rounds[short]
        if steps <= 0:
            raise RuntimeError(f"{new_tokens} tokens took no more rounds than {short}: the counter is wrong")
        per_step.append(difference / steps)
        per_token.append(difference / (long - short))
    stats = our_stats(runner.model) if runner.system.ours else {}
    cell.update(
        ms_per_step=statistics.median(per_step),
        ms_per_step_range=[min(per_step), max(per_step)],
        repeats=len(per_step),
        tokens_per_second=inputs["input_ids"].shape[0] * 1e3 / statistics.median(per_token),
        accept_length=stats.get("accept_length") or (long - short) / steps,
        tokens_per_round=(long - short) / steps,  # of a row; under accept_length where rows of a batch end apart
        library_stats=stats or None,
        status="ok",
        reason=None,
    )
    if cuda:
        cell["peak_bytes"] = shapes.peak_bytes()
        if args.idle == "others" and not runner.system.ours:  # the library counts its own
            measure_idle(runner, inputs, cell)
    return output


def measure_idle(runner: Runner, inputs: dict[str, Tensor], cell: dict[str, Any]) -> None:
    """1 - kernel time of a step (in a short profiled window, by difference) / time of a step (measured unprofiled)."""
    try:
        busy, rounds = [], []
        for new_tokens in (8, 24):
            runner.mark()
            busy.append(shapes.kernel_ms(lambda n=new_tokens: runner(inputs, n)))
            rounds.append(runner.decode_rounds(new_tokens))
        cell["gpu_busy_ms_per_step"] = (busy[1] - busy[0]) / max(1, rounds[1] - rounds[0])
        cell["gpu_idle_fraction"] = 1 - cell["gpu_busy_ms_per_step"] / cell["ms_per_step"]
    except Exception as error:  # the cell's times are complete and stay
        cell["gpu_idle_error"] = report.describe(error)


# ----------------------------------------------------------------------------------------------------------------------
# A whole run


def build(args: argparse.Namespace, systems: list[System]) -> tuple[nn.Module, dict[str, nn.Module], dict[str, Tensor]]:
    """The target, the draft modules that systems name (a "model", the shape's head), and prompts."""
    dtype, draft_shape = getattr(torch, args.dtype), shapes.SHAPES[args.shape].draft
    model = shapes.build_random(args.shape, dtype, args.device)
    wanted, drafts = {system.draft for system in systems}, {}
    if "model" in wanted and draft_shape is not None:
        drafts["model"] = shapes.build_random(draft_shape, dtype, args.device, seed=1)
    head = shapes.SHAPES[args.shape].head
    if head in wanted:
        drafts[head] = shapes.random_head(args.shape, model)
    prompts = shapes.random_prompts(model.config.vocab_size, max(args.batch), args.prompt_len, args.device)
    return model, drafts, prompts


def run_cells(args: argparse.Namespace, result: dict[str, Any]) -> None:
    systems = [s for s in SYSTEMS.values() if s.name in args.systems]
    model, drafts, prompts = build(args, systems)
    result["meta"]["attention"] = model.config._attn_implementation
    middle = args.prompt_len + args.new_tokens * 5 / 8  # of what the difference of n2 and n1 = n2 / 4 times
    pairs = [(s, b) for s in systems for b in args.batch]
    if not args.no_floor:
        try:
            result["floor"] = floors.measure_floor(model, drafts, pairs, middle, args.device)
        except Exception as error:
            result["floor_error"] = report.describe(error)
    cells = {s.name: {b: report.new_cell(s, b, result.get("floor")) for b in args.batch} for s in systems}
    result["cells"] = [cell for of_system in cells.values() for cell in of_system.values()]
    report.save(result, args.json)
    outputs: dict[tuple[str, int], Tensor] = {}
    weights = floors.distinct_bytes([model, *drafts.values()])
    for system in systems:
        pending = {b: cell for b, cell in cells[system.name].items() if cell["status"] == "pending"}
        shapes.reset_peaks()
        try:
            with ExitStack() as stack:
                with shapes.time_limit(2 * args.cell_budget):
                    runner = stack.enter_context(attached(system, model, drafts.get(system.draft), args))
                for batch, cell in pending.items():
                    inputs = {name: rows[:batch].contiguous() for name, rows in prompts.items()}
                    if not system.ours:
                        forget_compiled(model)
                    try:
                        with shapes.time_limit(1.5 * args.cell_budget):
                            outputs[system.name, batch] = measure(runner, inputs, args, cell).cpu()
                    except Exception as error:
                        report.fail(cell, error)
                    used = [model] + ([drafts[system.draft]] if system.draft in drafts else [])
                    per_token = sum(map(floors.kv_bytes_per_token, used))
                    report.memory_beyond(cell, weights, batch * (args.prompt_len + args.new_tokens) * per_token)
                    report.save(result, args.json)
                    print(report.progress(cell), file=sys.stderr, flush=True)
                    shapes.reset_peaks()
        except Exception as error:  # attaching failed; the other systems go on, and this one is an error in the table
            for cell in pending.values():
                report.fail(cell, error)
                print(report.progress(cell), file=sys.stderr, flush=True)
    report.compare_tokens(result["cells"], outputs, args.prompt_len)


# ----------------------------------------------------------------------------------------------------------------------
# Cold and warm start


def start_child(args: argparse.Namespace) -> None:
    system, arrivals = SYSTEMS[args.start_child], shapes.Arrivals()
    model, drafts, prompts = build(args, [system])
    shapes.sync(args.device)
    begin = time.perf_counter()
    with attached(system, model, drafts.get(system.draft), args) as runner:
        runner({name: rows[:1].contiguous() for name, rows in prompts.items()}, 16, streamer=arrivals)
        shapes.sync(args.device)
        figures: dict[str, Any] = {"tokens_s": time.perf_counter() - begin, "first_token_s": arrivals.times[1] - begin}
        if system.ours:
            figures["library_stats"] = our_stats(runner.model)
    print(json.dumps(figures, default=str))


def run_starts(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Twice in fresh processes with a private, at first empty, disk cache of Inductor and Triton."""
    result["starts"] = []
    for name in args.starts:
        with tempfile.TemporaryDirectory() as cache:
            private = {"TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor", "TRITON_CACHE_DIR": f"{cache}/triton"}
            for state in ("empty", "full"):
                row: dict[str, Any] = {"system": name, "label": SYSTEMS[name].label, "cache": state}
                command = [sys.executable, __file__, "--start-child", name, "--batch", "1", "--shape", args.shape]
                command += ["--device", args.device, "--dtype", args.dtype, "--prompt-len", str(args.prompt_len)]
                command += ["--backend", args.backend, "--config", json.dumps(args.config)]
                try:
                    done = subprocess.run(
                        command, env=os.environ | private, capture_output=True, text=True, timeout=args.start_budget
                    )
                    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
                    row.update(json.loads(lines[-1]) if done.returncode == 0 else {"error": lines[-1][:300]})
                except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
                    row["error"] = report.describe(error)
                result["starts"].append(row)
                report.save(result, args.json)


# ----------------------------------------------------------------------------------------------------------------------
# The real model: plain and ours by turns on the same prompts


def run_prompts(args: argparse.Namespace, result: dict[str, Any]) -> None:
    system = System("ours_ngram", "ours, n-gram", True, "ngram", 7)  # nothing simulated
    result["prompts"] = rows = [{"name": name, "kind": "unknown"} for name, _ in shapes.REAL_PROMPTS]
    try:
        dtype = getattr(torch, args.dtype)
        model, tokenizer = shapes.load_real(dtype, args.device)
        plain = Runner(model, System("hf_eager", "plain", False))
        twin = shapes.load_real(dtype, args.device)[0]  # a second object: ours is attached to the model itself
        with attached(system, twin, None, args) as ours:
            with shapes.time_limit(10 * args.cell_budget):  # compiles, which on a few CPU cores takes minutes
                ours(encode(tokenizer, shapes.REAL_PROMPTS[0][1], args.device), args.new_tokens)
            for row, (_, text) in zip(rows, shapes.REAL_PROMPTS, strict=True):
                try:
                    with shapes.time_limit(3 * args.cell_budget):
                        row.update(compare_prompt(plain, ours, tokenizer, text, args))
                except Exception as error:
                    row["error"] = report.describe(error)
                report.save(result, args.json)
                print(report.progress(row), file=sys.stderr, flush=True)
    except Exception as error:
        for row in (row for row in rows if "ratio" not in row):
            row.setdefault("error", report.describe(error))
    result["acceptance"] = report.acceptance_lines(rows)


def encode(tokenizer: Any, text: str, device: str) -> dict[str, Tensor]:
    chat = [{"role": "user", "content": text}]
    encoded = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return {name: encoded[name].to(device) for name in ("input_ids", "attention_mask")}


def compare_prompt(plain: Runner, ours: Runner, tokenizer: Any, text: str, args: argparse.Namespace) -> dict[str, Any]:
    """A/B/A/B: each pair of neighbouring runs gives one ratio, so that a machine's slow minute hits both."""
    inputs = encode(tokenizer, text, args.device)
    speeds: tuple[list[float], list[float]] = ([], [])
    outputs = [runner(inputs, args.new_tokens) for runner in (plain, ours)]  # warm, and compiled for this prompt
    for _ in range(args.repeats):
        for which, runner in enumerate((plain, ours)):
            shapes.sync(args.device)
            begin = time.perf_counter()
            outputs[which] = runner(inputs, args.new_tokens)[0, inputs["input_ids"].shape[1] :].cpu()
            speeds[which].append(len(outputs[which]) / (time.perf_counter() - begin))
    quoted = shapes.quoted_share(inputs["input_ids"][0].tolist(), outputs[0].tolist())
    return report.prompt_row(outputs, *speeds) | {
        "quoted_share": quoted,
        "kind": "quoting" if quoted >= 0.5 else "free",
        "accept_length": our_stats(ours.model)["accept_length"],
    }


# ----------------------------------------------------------------------------------------------------------------------


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=list(shapes.SHAPES), default="llama-3.1-8b")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16 on CUDA, float32 on a CPU")
    add("--batch", type=int, nargs="+", default=[1, 8, 32])
    add("--prompt-len", type=int, default=512)
    add("--new-tokens", type=int, default=128)
    add("--systems", nargs="*", choices=list(SYSTEMS), help="run in the order listed here; all that fit the shape")
    add("--backend", default="auto", help="passed to spec_compile()")
    add("--config", type=json.loads, default={}, metavar="JSON", help="more SpecConfig options of ours")
    add("--repeats", type=int, default=5)
    add("--max-warmups", type=int, default=5)
    add("--cell-budget", type=float, default=60, help="seconds after which a cell takes no more repeats; ends at 1.5×")
    add("--idle", choices=("others", "none"), default="others", help="whose GPU idle time is profiled; ours counts its own")
    add("--no-floor", action="store_true")
    add("--starts", nargs="*", choices=list(SYSTEMS), default=[], help="systems whose cold and warm start is measured")
    add("--start-budget", type=float, default=180, help="seconds a start may take")
    add("--start-child", choices=list(SYSTEMS), help=argparse.SUPPRESS)
    add("--json")
    add("--plot", metavar="PNG")
    args = parser.parse_args(arguments)
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    args.systems = shapes.systems_of(args.shape) if args.systems is None else args.systems
    return args


def main() -> None:
    args = parse()
    if args.start_child:
        start_child(args)
        return
    real = shapes.SHAPES[args.shape].config is None
    meta = report.environment(args.device) | {"random_weights": not real}
    result: dict[str, Any] = {"meta": meta, "args": report.settings(args)}
    if real:
        run_prompts(args, result)
    else:
        if args.systems:
            run_cells(args, result)
        run_starts(args, result)
    report.save(result, args.json)
    report.show(result)
    if args.plot and result.get("cells"):
        try:
            report.plot(result, args.plot)
        except ImportError:
            sys.exit("no plot: pip install 'spec-compile[bench]'")
    report.exit_if_plain(result)


if __name__ == "__main__":
    main()
