"""Every architecture that ``AutoModelForCausalLM`` knows, built tiny: is it accelerated, with plain's text, or refused and why?

    python -m benchmarks.sweep_architectures --out docs/architectures.md        (about ten minutes on one core)
    python -m benchmarks.sweep_architectures --only llama,dory

Each runs in a process of its own, with a limit on its time and memory: greedy text in float32 of left-padded prompts that are
longer than the smallest sliding window, with n-gram drafts and without drafts, against plain ``generate()``.
"""

from __future__ import annotations

import argparse
import collections
import multiprocessing
import os
import pathlib
import re
import resource
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from spec_compile import spec_compile
from spec_compile.errors import SpecCompileError

VOCABULARY, WINDOW, NEW_TOKENS, MOST_PARAMETERS = 112, 16, 12, 30_000_000
SECONDS, BYTES = 120, 6 << 30
SIZES: dict[str, object] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "sliding_window": WINDOW, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 48, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1, "moe_topk": 2, "ffn_dim": 96, "ffn_hidden_size": 96, "kv_lora_rank": 16, "q_lora_rank": 24,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "shared_expert_intermediate_size": 48,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "state_size": 8, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 96, "encoder_layers": 2,
    "d_model": 64, "encoder_attention_heads": 4, "encoder_ffn_dim": 96, "local_attention": 2 * WINDOW, "lru_width": 64,
    "embedding_size": 64,
}  # fmt: skip
LATENT = {"deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu", "minicpm3", "longcat_flash", "axk1", "mistral4"}
# What a family needs besides: sizes that have to go together.
OWN: dict[str, dict[str, object]] = {
    "dory": {"num_hidden_layers": 4, "n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_moe_text": {"layer_types": ["linear_attention", "full_attention"]},
    "modernbert-decoder": {"layer_types": ["sliding_attention", "full_attention"]},
}


@dataclass(frozen=True)
class Row:
    """What became of one model type: ``"accelerated"``, ``"refused"``, ``"plain"``, ``"plain fails"``, ``"not built"``,
    ``"no answer"`` (it hangs or dies, and whose fault that is nobody knows) or ``"differs"``, with the reason."""

    model_type: str
    architecture: str
    result: str
    note: str = ""


def sizes_of(config: type[PretrainedConfig], model_type: str) -> dict[str, object]:
    """Those of ``SIZES`` that a configuration knows, for a decoder within it too."""
    known = set(getattr(config, "attribute_map", {}))
    for base in config.__mro__:
        known |= set(getattr(base, "__annotations__", {}))
    sizes = {name: value for name, value in SIZES.items() if name in known}
    if model_type.removesuffix("_text") in LATENT:
        sizes |= {"num_key_value_heads": 4}
        sizes.pop("head_dim", None)
    for name in ("text_config", "decoder"):
        part = getattr(config, "sub_configs", {}).get(name)
        if isinstance(part, type) and issubclass(part, PretrainedConfig) and part is not PretrainedConfig:
            sizes[name] = sizes_of(part, getattr(part, "model_type", ""))
    return sizes | OWN.get(model_type, {})


def build(model_type: str) -> PreTrainedModel:
    """A random float32 model whose logits are far apart.

    Raises:
        ValueError: it stays too large.
    """
    config = AutoConfig.for_model(model_type, **sizes_of(CONFIG_MAPPING[model_type], model_type))
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{count / 1e6:.0f}M parameters with these sizes")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2 and parameter.is_floating_point():
                parameter.normal_(0, 0.1)
    model.generation_config.eos_token_id = None
    return model


def prompts(batch: int, length: int) -> dict[str, Tensor]:
    """Left-padded random prompts in which n-grams find something."""
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(4))
    ids[:, 9:13] = ids[:, 2:6]
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : 3 * row] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def architecture_of(model_type: str) -> str:
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    return names if isinstance(names, str) else names[0]


def try_out(model_type: str) -> Row:
    """Build, generate plainly, compile, generate again."""

    def row(result: str, note: object = "") -> Row:
        return Row(model_type, architecture_of(model_type), result, short(note))

    try:
        model = build(model_type)
    except Exception as error:
        return row("not built", error)
    calls = [prompts(3, 21), prompts(3, 30)]  # of one batch size: it has graphs of its own

    def texts() -> list[Tensor]:
        return [model.generate(**call, max_new_tokens=NEW_TOKENS, do_sample=False) for call in calls]

    try:
        expected = texts()
    except Exception as error:
        return row("plain fails", error)
    for draft in ("ngram", None):
        try:
            own = {"min_ngram": 1, "num_steps": 3, "adaptive": False} if draft else {}
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                spec_compile(model, draft=draft, compile="none", progress=False, **own)
                got = texts()
        except SpecCompileError as error:
            return row("refused", error)
        except Exception as error:
            return row("differs", f"an error that plain generate() does not raise: {type(error).__name__}: {error}")
        if not all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)):
            return row("differs", f"draft={draft!r}")
        if model.spec.stats().mode != "rounds":
            return row("plain", next((str(w.message) for w in said if "runs as plain" in str(w.message)), ""))
    return row("accelerated")


def short(note: object) -> str:
    """The reason alone, on one line that a table can hold."""
    text = (
        f"{type(note).__name__}: {note}"
        if isinstance(note, Exception) and not isinstance(note, SpecCompileError)
        else str(note)
    )
    text = re.sub(r"^.*cannot be captured: | The model is unchanged and its plain.*$|^.*runs as plain transformers: ", "", text)
    text = " ".join(text.split()).replace("|", "\\|")
    text = re.sub(r"(File \")?/\S*/(\w+\.py)", r"\2", text)  # no paths of the machine it ran on
    return text if len(text) <= 160 else text[:157] + "…"


def _child(model_type: str, results: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
    torch.set_num_threads(1)
    os.close(2)  # what libraries say of half-built configurations
    os.open(os.devnull, os.O_WRONLY)
    results.send(try_out(model_type))


def sweep(model_types: list[str], jobs: int) -> Iterator[Row]:
    """``try_out`` of each, in processes that may be killed, as they finish."""
    context = multiprocessing.get_context("fork")  # nothing is imported again
    waiting, running = model_types[::-1], {}
    while waiting or running:
        while waiting and len(running) < jobs:
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(waiting[-1], writer))
            process.start()
            writer.close()
            running[reader] = process, waiting.pop(), time.monotonic() + SECONDS
        ready = connection.wait(list(running), timeout=1.0)
        for reader, (process, model_type, deadline) in list(running.items()):
            if reader not in ready and time.monotonic() < deadline:
                continue
            try:
                yield reader.recv() if reader in ready else late(model_type)
            except EOFError:  # it died
                yield late(model_type)
            process.kill()
            process.join()
            del running[reader]


def late(model_type: str) -> Row:
    reason = f"no answer within {SECONDS} s and {BYTES >> 30} GiB"
    return Row(model_type, architecture_of(model_type), "no answer", reason)


def page(rows: list[Row]) -> str:
    """The table as Markdown."""
    counts = collections.Counter(row.result for row in rows)
    lines = [
        "# Architectures",
        "",
        "<!-- made by benchmarks/sweep_architectures.py; do not edit by hand -->",
        "",
        f"Every model type of `AutoModelForCausalLM` in transformers {transformers.__version__}, built tiny with random",
        f"weights (torch {torch.__version__.partition('+')[0]}, CPU, float32). Greedy text of left-padded prompts, longer than",
        "the sliding windows, with n-gram drafts and without drafts, is compared with plain `generate()`.",
        "",
        "* **accelerated**: rounds, and the same text; **plain**: the call runs as plain transformers, and says why;",
        "* **refused**: `spec_compile()` raises an error with the reason given here, and the model is as before;",
        "* **plain fails**: transformers itself cannot generate with the tiny model; **not built**: these sizes do not fit it.",
        "",
        ", ".join(f"{count} {result}" for result, count in counts.most_common()) + ".",
        "",
        "| model type | class | result | reason |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| `{r.model_type}` | {r.architecture} | {r.result} | {r.note} |" for r in sorted(rows, key=lambda r: r.model_type)
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the sweep; the exit status is 1 if any text differs, or did not come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="model types, separated by commas")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--out", type=pathlib.Path, help="write the table there")
    args = parser.parse_args(arguments)
    rows = []
    model_types = args.only.split(",") if args.only else sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    for row in sweep(model_types, args.jobs):
        rows.append(row)
        print(f"{row.model_type:24} {row.result:12} {row.note}", flush=True)
    if args.out is not None:
        args.out.write_text(page(rows))
    return int(any(row.result in ("differs", "no answer") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
