"""Train an EAGLE-3 draft head for SmolLM2-135M-Instruct on the model's own text, within minutes of one GPU.

    train_draft.py generate --out data --seconds 130                  # the target writes prompts and answers, by this library
    train_draft.py train --data data --out head --seconds 240         # training-time test, saved in the speculators format
    eval_draft.py --draft head --json accept.json                     # accept length through spec_compile() itself

``train`` always saves: after the last step, and when it is interrupted. README.md in this folder says what came out.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from draft_data import Corpus, Packed, draft_vocabulary, generate_corpus, generate_held_out, pack
from draft_loss import chain_rounds, draft_hits, log_normaliser, step_losses, target_states, teacher_probs, training_attention
from draft_prompts import HELD_OUT
from torch import Tensor, nn
from transformers import PreTrainedModel

from spec_compile.hf_integration.demo_model import DEMO_MODEL_NAME, load_demo_model
from spec_compile.hf_integration.heads.draft_head import like_target
from spec_compile.hf_integration.heads.eagle3 import Eagle3Head, random_eagle3_head

CORPUS, HELD_OUT_CORPUS, SETTINGS = "corpus.pt", "held_out.pt", "generation.json"
_LARGEST_CHANNEL_GAIN = 1e3


@dataclass
class Recipe:
    """What is trained and how; ends up in the model card."""

    draft_vocab_size: int = 8192
    intermediate_size: int = 2560
    steps: int = 6  # of training-time test
    decay: float = 0.8  # step j weighs decay ** j
    row_length: int = 512
    rows: int = 64  # a batch is rows * row_length tokens
    learning_rate: float = 1.5e-3
    lm_head_rate: float = 0.3  # times the learning rate: these rows come trained
    weight_decay: float = 0.05
    clip: float = 0.5
    warm_up: float = 0.03  # of the time
    seconds: float = 240.0
    seed: int = 0


# ----------------------------------------------------------------------------------------------------------------------
# The head


def new_head(target: PreTrainedModel, draft_ids: Tensor, recipe: Recipe) -> Eagle3Head:
    """A head to train: the target's lm_head rows and final norm, the last tap passed through, the rest random; float32."""
    pattern = random_eagle3_head(target, draft_ids=draft_ids, norm_before_residual=True, fc_norm=True)
    config = type(pattern.config)(**(pattern.config.to_dict() | {"intermediate_size": recipe.intermediate_size}))
    with like_target(target):
        head = Eagle3Head(config, target, pattern.taps, pattern.options, pattern.draft_ids, pattern.owned)
    generator = torch.Generator().manual_seed(recipe.seed)
    for name, value in head.own_tensors().items():
        if value.dim() == 2:
            gain = 0.3 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            drawn = torch.randn(value.shape, generator=generator) * gain * value.shape[1] ** -0.5
        else:
            drawn = torch.ones(value.shape)
        value.data = drawn.to(value.device)  # float32 masters
    width = target.config.get_text_config(decoder=True).hidden_size
    with torch.no_grad():
        head.lm_head.weight.copy_(target.get_output_embeddings().weight[draft_ids.to(target.device)])
        final_norm = getattr(target.base_model, "norm", None)
        if final_norm is not None:
            head.norm.weight.copy_(final_norm.weight)
        head.fc.weight.mul_(0.1)
        head.fc.weight[:, -width:] += torch.eye(head.config.hidden_size, width, device=head.fc.weight.device)
    head.embed_tokens.requires_grad_(False)
    return head.train()


@torch.no_grad()
def scale_channels(head: Eagle3Head, states: Tensor) -> None:
    """Start ``fc_norm`` so that every channel of every tap comes out at unit variance.

    A few channels of a language model's states are hundreds of times larger than the rest, which Adam, whose steps know no
    scale, would take long to even out.
    """
    for norm, chunk in zip(head.fc_norm, states.float().chunk(len(head.fc_norm), -1), strict=True):
        flat = chunk.flatten(0, -2)
        normed = flat * (flat.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
        norm.weight.copy_(normed.std(0).reciprocal().clamp(max=_LARGEST_CHANNEL_GAIN))


# ----------------------------------------------------------------------------------------------------------------------
# Batches


class Features:
    """The target's states of packed rows: computed when a row is first asked for, kept where the device has the memory.

    A row is ``row_length * (len(taps) + 1) * Ht`` numbers, 2.4 MB for the demo model; 14 M tokens are 64 GB.
    """

    def __init__(self, target: PreTrainedModel, head: Eagle3Head, packed: Packed, keep_bytes: float) -> None:
        self.target, self.taps, self.packed = target, head.taps, packed
        self.head_rows = target.get_output_embeddings().weight[head.draft_ids].detach()
        rows, length = packed.ids.shape
        width = (len(head.taps) + 1) * target.config.get_text_config(decoder=True).hidden_size
        self.known = torch.zeros(rows, dtype=torch.bool)
        self.kept: Tensor | None = None
        if rows * length * width * target.dtype.itemsize <= keep_bytes:
            self.kept = torch.empty(rows, length, width, dtype=target.dtype, device=target.device)
            self.kept_normaliser = torch.empty(rows, length, device=target.device)

    def batch(self, index: Tensor) -> tuple[Packed, Tensor, Tensor]:
        """Rows ``index`` (int64 on the CPU): (packed, tapped states, the target's distribution over the draft vocabulary)."""
        where = index.to(self.target.device)
        packed = self.packed.rows(where)
        if self.kept is None or not bool(self.known[index].all()):
            states, last = target_states(self.target, self.taps, packed)
            normaliser = log_normaliser(self.target, last)
            if self.kept is not None:
                self.kept[where] = torch.cat([states, last], -1)
                self.kept_normaliser[where] = normaliser
                self.known[index] = True
        else:
            both = self.kept[where]
            states, last = both[..., : -self.head_rows.shape[1]], both[..., -self.head_rows.shape[1] :]
            normaliser = self.kept_normaliser[where]
        return packed, states, teacher_probs(self.head_rows, last, normaliser)


def row_batches(rows: int, size: int, seed: int) -> Iterator[tuple[int, Tensor]]:
    """Endless (epoch, row numbers int64 [size]); every epoch is a new order, its incomplete batch is left out."""
    generator = torch.Generator().manual_seed(seed)
    epoch = 0
    while True:
        order = torch.randperm(rows, generator=generator)
        order = order.repeat(-(-size // rows)) if rows < size else order
        for at in range(0, order.numel() - size + 1, size):
            yield epoch, order[at : at + size]
        epoch += 1


# ----------------------------------------------------------------------------------------------------------------------
# Training


def parameter_groups(head: Eagle3Head, recipe: Recipe) -> list[dict[str, object]]:
    """AdamW's groups: matrices, the lm_head at its own rate, norms without decay. ``rate`` scales the learning rate."""
    own = head.own_tensors()
    matrices = [p for name, p in own.items() if p.dim() == 2 and not name.startswith("lm_head")]
    norms = [p for p in own.values() if p.dim() != 2]
    return [
        {"params": matrices, "rate": 1.0, "weight_decay": recipe.weight_decay},
        {"params": [head.lm_head.weight], "rate": recipe.lm_head_rate, "weight_decay": 0.0},
        {"params": norms, "rate": 1.0, "weight_decay": 0.0},
    ]


def learning_rate(progress: float, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine to zero; ``progress`` is the share of the time that is spent."""
    if progress < recipe.warm_up:
        return recipe.learning_rate * progress / recipe.warm_up
    rest = (min(progress, 1.0) - recipe.warm_up) / (1 - recipe.warm_up)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * rest))


def autocast(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


@torch.no_grad()
def validate(head: Eagle3Head, target: PreTrainedModel, corpus: Corpus, steps: int, length: int) -> dict[str, float]:
    """Accept length of a chain of ``steps`` on held-out texts, by temperature and by prompt set at temperature 0."""
    packed = pack(corpus, length).to(target.device)
    rounds: dict[str, list[int]] = {}
    for at in range(0, packed.ids.shape[0], 16):
        part = packed.rows(torch.arange(at, min(at + 16, packed.ids.shape[0]), device=target.device))
        states, _ = target_states(target, head.taps, part)
        with autocast(target.device):
            hits = draft_hits(head, part, states, steps).cpu()
        document, position = part.document.cpu(), part.position.cpu()
        for text in document.unique().tolist():
            if text == 0:
                continue
            inside = document == text
            order = position[inside].argsort()
            found = chain_rounds(hits[inside][order].tolist(), int(corpus.prompt_lens[text - 1]), int(inside.sum()))
            temperature = float(corpus.temperatures[text - 1])
            rounds.setdefault(f"T={temperature:g}", []).extend(found)
            if temperature == 0:
                rounds.setdefault(f"T=0 {list(HELD_OUT)[int(corpus.group[text - 1])]}", []).extend(found)
    return {name: sum(found) / max(1, len(found)) for name, found in sorted(rounds.items())}


def train(target: PreTrainedModel, corpus: Corpus, held_out: Corpus, recipe: Recipe, options: argparse.Namespace) -> tuple:
    """Train for ``recipe.seconds``; returns (head, log), where the log is what the model card shows."""
    torch.manual_seed(recipe.seed)
    draft_ids, coverage = draft_vocabulary(corpus, recipe.draft_vocab_size, target.get_output_embeddings().weight.shape[0])
    packed = pack(corpus, recipe.row_length).to(target.device)
    log: dict[str, object] = {
        "recipe": dataclasses.asdict(recipe), "texts": corpus.lengths.numel(), "tokens": corpus.tokens.numel(),
        "answer_tokens": int(corpus.answer_mask().sum()), "packed_rows": packed.ids.shape[0],
        "greedy_texts": int((corpus.temperatures == 0).sum()), "packing": float((packed.document > 0).float().mean()),
        "draft_vocabulary_coverage": coverage, "curve": [],
        "validation": [],
    }  # fmt: skip
    print(json.dumps({k: v for k, v in log.items() if k not in ("recipe", "curve", "validation")}), flush=True)
    head = new_head(target, draft_ids, recipe)
    features = Features(target, head, packed, options.keep_gb * 2**30)
    scale_channels(head, features.batch(torch.arange(min(4, packed.ids.shape[0])))[1])
    optimizer = torch.optim.AdamW(
        parameter_groups(head, recipe), lr=recipe.learning_rate, betas=(0.9, 0.95), fused=target.device.type == "cuda"
    )
    own = [p for group in optimizer.param_groups for p in group["params"]]
    losses_of = torch.compile(step_losses, dynamic=False) if options.compile else step_losses
    weights = recipe.decay ** torch.arange(recipe.steps, device=target.device)
    weights = weights / weights.sum()
    batches = row_batches(packed.ids.shape[0], recipe.rows, recipe.seed)
    next_validation, number, spent, started = 0.0, 0, 0.0, 0.0
    with training_attention(head):
        try:
            while spent < recipe.seconds and number < options.max_steps:
                epoch, index = next(batches)
                batch, states, probs = features.batch(index)
                with autocast(target.device):
                    losses = losses_of(head, batch, states, probs, recipe.steps)
                (losses * weights).sum().backward()
                norm = nn.utils.clip_grad_norm_(own, recipe.clip)
                # The clock starts behind the first step, which compiles; the learning rate then follows the clock.
                spent = time.monotonic() - started if started else 0.0
                rate = learning_rate((spent + 0.5) / recipe.seconds, recipe)
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["rate"]
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if number % options.log_every == 0:  # reading a loss waits for the device
                    line = {"step": number, "seconds": spent, "epoch": epoch, "losses": losses.tolist(), "norm": float(norm)}
                    log["curve"].append(line)
                    shown = " ".join(f"{x:.3f}" for x in line["losses"])
                    print(f"{number:5d} {spent:6.1f} s  epoch {epoch}  loss {shown}  |g| {norm:.2f}", flush=True)
                if not started:
                    started = time.monotonic()
                if spent >= next_validation:
                    accept = validate(head, target, held_out, 5, recipe.row_length)
                    log["validation"].append({"step": number, "seconds": spent, **accept})
                    print("      validation", json.dumps({k: round(v, 3) for k, v in accept.items()}), flush=True)
                    next_validation = spent + recipe.seconds / 8
                number += 1
        except (KeyboardInterrupt, torch.OutOfMemoryError) as error:
            print(f"stopped at step {number}: {error!r}", flush=True)
            log["stopped"] = repr(error)
        log["steps"], log["seconds"] = number, spent
        log["validation"].append({"step": number, "seconds": spent, **validate(head, target, held_out, 5, recipe.row_length)})
        print("final validation", json.dumps(log["validation"][-1]), flush=True)
    return head, log


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def _device(name: str | None) -> torch.device:
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def run_generate(args: argparse.Namespace) -> None:
    """Write the corpus and the target's answers to the held-out prompts."""
    from spec_compile import spec_compile

    device = _device(args.device)
    model, tokenizer = load_demo_model(torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    # Not compiled: at hundreds of rows a graph of plain kernels is fast enough, and compiling would cost a minute.
    spec_compile(model, draft=None, compile="none", max_prefill_tokens=65536, progress=False)
    args.out.mkdir(parents=True, exist_ok=True)
    options = {"max_new_tokens": args.max_new_tokens}
    generate_held_out(model, tokenizer, per_set=args.held_out, **options).save(args.out / HELD_OUT_CORPUS)
    corpus = generate_corpus(
        model, tokenizer, seconds=args.seconds, batch=args.batch, seed=args.seed, max_tokens=args.max_tokens, **options
    )
    corpus.save(args.out / CORPUS)
    settings = {name: getattr(args, name) for name in ("seconds", "batch", "max_new_tokens", "seed")}
    settings["commit"] = os.environ.get("SPEC_COMPILE_COMMIT", "unknown")
    (args.out / SETTINGS).write_text(json.dumps(settings), encoding="utf-8")


def run_train(args: argparse.Namespace) -> None:
    """Train and save head and log."""
    from spec_compile.hf_integration.checkpoints.eagle3_speculators import save_speculators_eagle3

    torch.set_float32_matmul_precision("high")
    device = _device(args.device)
    target, _ = load_demo_model(torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    target.requires_grad_(False)
    recipe = Recipe(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Recipe)})
    head, log = train(target, Corpus.load(args.data / CORPUS), Corpus.load(args.data / HELD_OUT_CORPUS), recipe, args)
    log |= {"device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU", "torch": torch.__version__}
    log["parameters"] = sum(p.numel() for p in head.own_tensors().values())
    log["generation"] = json.loads((args.data / SETTINGS).read_text(encoding="utf-8"))
    log["commit"] = os.environ.get("SPEC_COMPILE_COMMIT", "unknown")
    args.out.mkdir(parents=True, exist_ok=True)
    for value in head.own_tensors().values():
        value.data = value.data.to(torch.bfloat16)
    save_speculators_eagle3(head, args.out, DEMO_MODEL_NAME)
    (args.out / "training.json").write_text(json.dumps(log, indent=1), encoding="utf-8")
    print(f"saved to {args.out}: {log['parameters']} parameters", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    make = commands.add_parser("generate", help="let the target write the data")
    make.add_argument("--out", type=Path, required=True)
    make.add_argument("--seconds", type=float, default=130.0)
    make.add_argument("--batch", type=int, default=1024)
    make.add_argument("--max-new-tokens", type=int, default=256)
    make.add_argument("--max-tokens", type=int, default=10**9)
    make.add_argument("--held-out", type=int, default=8, help="held-out prompts of each set to answer")
    make.add_argument("--seed", type=int, default=0)
    make.add_argument("--device")
    make.set_defaults(run=run_generate)
    learn = commands.add_parser("train", help="train a head on that data")
    learn.add_argument("--data", type=Path, required=True)
    learn.add_argument("--out", type=Path, required=True)
    learn.add_argument("--device")
    learn.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    learn.add_argument("--keep-gb", type=float, default=90.0, help="memory for the target's states (default: %(default)s)")
    learn.add_argument("--max-steps", type=int, default=10**9)
    learn.add_argument("--log-every", type=int, default=20)
    for field in dataclasses.fields(Recipe):
        learn.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    learn.set_defaults(run=run_train)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
