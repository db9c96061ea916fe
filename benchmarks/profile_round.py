"""Where a round's time goes: kernels of one replayed round, by name, next to the round's wall time.

    python benchmarks/profile_round.py --shape llama-3.1-8b --batch 1 8 32 --num-steps 0 7

Weights are random (RANDOM WEIGHTS); time does not depend on them. The profiler inflates gaps between kernels, so the sum
of kernel times is read from it and the wall time of a round from events around plain replays.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections import defaultdict

import torch
from shapes import build_random
from torch import nn

import spec_compile
from spec_compile.runtime.engine import Engine, Request
from spec_compile.runtime.state import SamplingPlan


def profile(engine: Engine, batch: int, prompt_len: int, replays: int) -> dict[str, object]:
    """Median wall microseconds of a replay, and microseconds of every kernel in it."""
    vocab = engine.target.model.config.vocab_size
    prompts = [torch.randint(vocab, (prompt_len,)) for _ in range(batch)]
    request = Request(
        prompts=prompts,
        end_len=[prompt_len + 400] * batch,
        min_len=[0] * batch,
        eos_ids=[],
        seed=list(range(batch)),
        plan=SamplingPlan(),
    )
    torch.cuda.synchronize()
    begin = time.perf_counter()
    state = engine.admit(request)
    torch.cuda.synchronize()
    first = time.perf_counter() - begin
    begin = time.perf_counter()
    state = engine.admit(request)
    torch.cuda.synchronize()
    prefill = time.perf_counter() - begin
    walls = []
    for _ in range(replays):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        engine.launch(state, request.plan, engine.shape)
        b.record()
        b.synchronize()
        walls.append(a.elapsed_time(b) * 1e3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        engine.launch(state, request.plan, engine.shape)
        torch.cuda.synchronize()
    kernels: dict[str, list[float]] = defaultdict(list)
    for event in trace.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels[re.sub(r"_\d+$", "", event.name)[:90]].append(event.device_time)
    table = sorted(((name, len(t), sum(t)) for name, t in kernels.items()), key=lambda row: -row[2])
    return {
        "wall_us": statistics.median(walls),
        "kernel_us": sum(row[2] for row in table),
        "launches": sum(row[1] for row in table),
        "first_call_s": first,
        "prefill_ms": prefill * 1e3,
        "kernels": table,
    }


def run(model: nn.Module, args: argparse.Namespace) -> list[dict[str, object]]:
    out = []
    for num_steps in args.num_steps:
        draft = "ngram" if num_steps else None
        options = {"num_steps": num_steps, "simulate_accept_length": 3.0} if num_steps else {}
        spec_compile.spec_compile(model, draft=draft, backend=args.backend, **options)
        for batch in args.batch:
            torch.cuda.reset_peak_memory_stats()
            result = profile(model.spec._engine, batch, args.prompt_len, args.replays)
            result |= {"batch": batch, "window": num_steps + 1, "graphs": model.spec._engine.captured()}
            result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            result["kv_gib"] = model.spec._engine.kv_bytes() / 2**30
            out.append(result)
            print(
                f"\nbatch {batch}, window {num_steps + 1}: wall {result['wall_us']:.0f} us, kernels "
                f"{result['kernel_us']:.0f} us in {result['launches']} launches; prefill {result['prefill_ms']:.1f} ms; "
                f"first call {result['first_call_s']:.1f} s; peak {result['peak_gib']:.2f} GiB, KV "
                f"{result['kv_gib']:.2f} GiB; graphs {result['graphs']}"
            )
            for name, count, total in result["kernels"][: args.top]:
                print(f"  {total:9.1f} us {count:4d} x {total / count:7.2f}  {name}")
        print(f"compile {model.spec._engine.compiler.seconds:.1f} s, capture {model.spec._engine.capture_seconds:.1f} s")
        model.spec.remove()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--num-steps", type=int, nargs="+", default=[0, 7])
    parser.add_argument("--prompt-len", type=int, default=512)
    parser.add_argument("--replays", type=int, default=50)
    parser.add_argument("--top", type=int, default=18)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--json")
    args = parser.parse_args()
    model = build_random(args.shape, torch.bfloat16, "cuda")
    result = run(model, args)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"shape": args.shape, "device": torch.cuda.get_device_name(), "rounds": result}, file, indent=1)


if __name__ == "__main__":
    main()
