"""Accept length of a draft head on held-out prompts, measured by generating with spec_compile() itself.

    eval_draft.py --draft DIR --json accept.json --plot accept.png       # prints a table; n-gram drafting runs beside it
    eval_draft.py --draft DIR --systems tree --temperatures 0 --sets chat code --device cpu

Accept length is emitted tokens per row and verify, the target's own token included, over all rounds of all prompts of a set;
plain decoding has 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import draft_report
import torch
from draft_prompts import HELD_OUT

from spec_compile import SpecConfig, spec_compile
from spec_compile.hf_integration.demo_model import DEMO_MODEL_NAME, load_demo_model
from spec_compile.runtime.stats import accelerated


@dataclass(frozen=True)
class DraftSystem:
    """One way to draft; ``uses_head`` or n-grams."""

    label: str
    uses_head: bool
    options: dict[str, Any] = field(default_factory=dict)


SYSTEMS = {
    "chain": DraftSystem("EAGLE-3 chain 5", True, {"num_steps": 5, "topk": 1}),
    "tree": DraftSystem("EAGLE-3 tree 5/8/32", True, {"num_steps": 5, "topk": 8, "num_draft_tokens": 32}),
    "ngram": DraftSystem("n-gram 5", False, {"num_steps": 5}),
}


@torch.inference_mode()
def accept_lengths(model, tokenizer, prompts: Sequence[str], temperature: float, max_new_tokens: int) -> list[list[int]]:
    """Accept lengths of every round, by prompt; all prompts are one batch."""
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True)
        for p in prompts
    ]
    tokenizer.padding_side = "left"
    inputs = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt").to(model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    model.generate(**inputs, max_new_tokens=max_new_tokens, **sampling)
    stats = accelerated(model.spec.stats())
    if stats.mode != "rounds" or stats.simulated:
        raise RuntimeError(f"generate() ran as {stats.mode!r}, simulated={stats.simulated}: nothing was measured.")
    return [list(row) for row in stats.accept_lengths]


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Run every system over every set and temperature; ``args.json`` is rewritten after each, so that a cut run keeps them."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model, tokenizer = load_demo_model(torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    result: dict[str, Any] = {
        "target": DEMO_MODEL_NAME, "max_new_tokens": args.max_new_tokens, "seed": args.seed,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU", "dtype": str(model.dtype)[6:],
        "torch": torch.__version__, "python": platform.python_version(),
        "commit": os.environ.get("SPEC_COMPILE_COMMIT", "unknown"), "cells": [],
    }  # fmt: skip
    for name in args.systems:
        system = SYSTEMS[name]
        # adaptive=False: every round drafts, for it is the draft that is measured.
        config = SpecConfig(adaptive=False, compile=args.compile, progress=False)
        spec_compile(model, draft=str(args.draft) if system.uses_head else "ngram", config=config, **system.options)
        for temperature in args.temperatures:
            for group in args.sets:
                torch.manual_seed(args.seed)
                started = time.monotonic()
                rounds = accept_lengths(model, tokenizer, HELD_OUT[group][: args.prompts], temperature, args.max_new_tokens)
                flat = [length for row in rounds for length in row]
                cell = {
                    "system": name, "label": system.label, "temperature": temperature, "set": group, "rounds": len(flat),
                    "tokens": sum(flat), "accept_length": sum(flat) / max(1, len(flat)),
                    "histogram": [flat.count(n) for n in range(1, max(flat, default=1) + 1)],
                }  # fmt: skip
                result["cells"].append(cell)
                seconds = time.monotonic() - started
                print(f"{name} T={temperature:g} {group}: {cell['accept_length']:.3f} ({seconds:.1f} s)", flush=True)
                if args.json:
                    args.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draft", type=Path, required=True, help="directory of the head")
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 1.0])
    parser.add_argument("--sets", nargs="+", choices=list(HELD_OUT), default=list(HELD_OUT))
    parser.add_argument("--prompts", type=int, default=8, help="prompts of each set")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--device")
    parser.add_argument("--compile", choices=("none", "inductor"), default="none", help="changes speed only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args(argv)
    result = evaluate(args)
    print("\n" + draft_report.accept_table(result))
    if args.plot:
        draft_report.plot_accept_lengths(result, args.plot)


if __name__ == "__main__":
    main()
