"""What the self-check adds to ``spec_compile()``: capture, the comparison of capture and model, and a later repetition of it.

    bench_self_check.py --shape llama-3.1-8b --json self-check.json
    bench_self_check.py --shape tiny --device cpu   # a smoke test

RANDOM WEIGHTS; the time of a dense model does not depend on them. ``first`` loads kernels that nothing has used before,
``later`` is the median of five more.
"""

from __future__ import annotations

import argparse
import statistics
import time

import shapes
import torch
from report import environment, save, settings

from spec_compile.hf_integration.capture import capture_prefill
from spec_compile.hf_integration.self_check import check_capture


def seconds(call, device: str) -> tuple[float, object]:
    """Wall seconds of ``call`` with the device's work in it, and what it returned."""
    shapes.sync(device)
    start = time.perf_counter()
    result = call()
    shapes.sync(device)
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(shapes.SHAPES), default="llama-3.1-8b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json")
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    model = shapes.build_random(args.shape, dtype, args.device)
    capture, graph = seconds(lambda: capture_prefill(model), args.device)
    first, _ = seconds(lambda: check_capture(model, graph), args.device)
    later = [seconds(lambda: check_capture(model, graph), args.device)[0] for _ in range(5)]
    row = {"shape": args.shape, "capture_s": capture, "first_s": first, "later_s": statistics.median(later)}
    print(f"{args.shape}: capture {capture:.2f} s, self-check {first:.3f} s the first time, {row['later_s']:.3f} s later")
    save({"environment": environment(args.device), "settings": settings(args), "self_check": row}, args.json)


if __name__ == "__main__":
    main()
