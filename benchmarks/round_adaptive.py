"""Adaptive rounds against no speculation and against rounds that always draft, over batch and simulated acceptance.

Through the public API: one ``spec_compile()`` per way, ``generate()`` on the same prompts. The rates are per draft position
and SIMULATED; what was learned from one rate is forgotten before the next.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import round_report
import shapes
import torch
from report import describe, environment, save, settings
from torch import Tensor, nn

from spec_compile import spec_compile
from spec_compile.runtime.stats import accelerated

STEPS = 5
LEAST = 0.98  # of the speed without speculation
_WAYS = ("off", "adaptive", "fixed")


def run_adaptive(args: argparse.Namespace) -> dict[str, Any]:
    """Fill ``adaptive``: a row per batch and rate with each way's tokens/s; see ``--adaptive-grid``."""
    model = shapes.build_random(args.shape, getattr(torch, args.dtype), args.device)
    head = shapes.random_head(args.shape, model)
    context = args.contexts[0]
    prompts = shapes.random_prompts(model.config.vocab_size, max(args.batches), context, args.device)
    batches = sorted(args.batches, reverse=True)  # pools are made for the largest and serve the others
    told = {name: value for name, value in settings(args).items() if name != "shapes"}  # of rounds: the grid has its own
    result: dict[str, Any] = {
        "meta": {**environment(args.device), "random_weights": True},
        "args": told,
        "rows": [],
        "adaptive": [{"batch": b, "rate": rate, "context": context} for b in batches for rate in args.rates],
    }
    deadline, artifacts = time.monotonic() + args.seconds, {}
    for way in _WAYS:
        options: dict[str, Any] = {"progress": False, "compile": args.compile}
        if way != "off":
            options |= {"num_steps": STEPS, "adaptive": way == "adaptive", "simulate_accept_rates": (args.rates[0],) * STEPS}
        spec_compile(model, draft=None if way == "off" else head, backend=args.backend, **options)
        model.spec._engine.compiler.artifacts = artifacts  # the same segments need no second compilation
        for row in result["adaptive"]:
            same = [r for r in result["adaptive"] if r["batch"] == row["batch"] and way in r]
            if way == "off" and same:
                row[way] = same[0][way]  # no drafts, no rate
            elif time.monotonic() < deadline:
                row[way] = measure(model, prompts, row, args, way)
            save(result, args.json)
            print(round_report.adaptive_line(row, way), file=sys.stderr, flush=True)
        model.spec.remove()
        shapes.reset_peaks()
    return result


def measure(
    model: nn.Module, prompts: dict[str, Tensor], row: dict[str, Any], args: argparse.Namespace, way: str
) -> dict[str, Any]:
    """Tokens/s of decoding: whole calls, and while all rows were live (rows of a simulated batch end apart)."""
    engine = model.spec._engine
    inputs = {name: rows[: row["batch"]].contiguous() for name, rows in prompts.items()}

    def generate(new_tokens: int) -> Any:
        model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        return model.spec.stats()

    try:
        with shapes.time_limit(args.cell_budget):
            begin = time.perf_counter()
            generate(4)  # makes the buffers that hold the rates, compiles, captures
            if way != "off":
                engine._rates.fill_(row["rate"])
            engine._policies.clear()
            setup = time.perf_counter() - begin
            runs = [figures(generate(args.new_tokens), row["batch"]) for _ in range(args.passes)]
    except Exception as error:
        return {"error": describe(error)}
    return {
        "tokens_per_second": statistics.median(run["whole"] for run in runs),
        "first_call": runs[0]["whole"],
        "all_rows_live": statistics.median(run["live"] for run in runs),
        "accept_length": runs[-1]["accept_length"],
        "ms_per_round": runs[-1]["ms_per_round"],
        "setup_seconds": setup,
    }


def figures(stats: Any, batch: int) -> dict[str, float]:
    """Decoding only: the token that prefill gave does not count, nor its time."""
    if accelerated(stats).mode != "rounds":
        raise RuntimeError(f"this call ran {stats.mode}: not what is measured")
    shortest = min(len(lengths) for lengths in stats.accept_lengths)
    live = sum(sum(lengths[:shortest]) for lengths in stats.accept_lengths)
    return {
        "whole": (stats.emitted_tokens - batch) / (stats.ms_per_round * stats.rounds) * 1e3,
        "live": live / (stats.ms_per_round * shortest) * 1e3,
        "accept_length": stats.accept_length,
        "ms_per_round": stats.ms_per_round,
    }
