"""What a user may set, and its defaults."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from spec_compile.errors import ConfigError

KV_CACHE_DTYPES = ("auto", "bfloat16", "float16", "fp8_e4m3")


_KINDS: dict[str, type | tuple[type, ...]] = {"int": int, "bool": bool, "str": str, "float": (int, float)}


@dataclass(frozen=True)
class SpecConfig:
    """Options of ``spec_compile``; every field can also be given to it by keyword.

    Attributes:
        num_steps: tokens drafted a round. None takes the draft's default (n-gram 7, causal LM 5).
        min_ngram, max_ngram: n-gram drafting looks for the longest repeated suffix of max_ngram down to min_ngram tokens.
        compile: ``"inductor"`` compiles the graphs' segments; ``"none"`` runs them as captured (tests, quick starts).
        cuda_graphs: on CUDA, replay each round as one CUDA graph; False launches its kernels one by one.
        adaptive: leave a round's drafts out where they do not pay (host-synchronous devices, that is CPUs, only).
        max_prefill_tokens: prompts are prefilled in groups of rows of at most this many tokens together.
        page_size: slots in a KV cache page on a GPU (a power of two); a CPU row has one page.
        kv_cache_dtype: type of the caches, the draft's too: ``"auto"`` (the model's), ``"bfloat16"``, ``"float16"`` or
            ``"fp8_e4m3"`` (names as in vLLM and SGLang; scale 1.0, written with saturation to ±448). fp8 halves the memory
            and the reads of a cache. A narrower type changes the model's law slightly: output is then exactly that of
            decoding one token at a time over the same narrow cache (``draft=None``), no longer that of plain ``generate()``.
        seed: base of the sampling seeds; None draws one from torch's global generator on every generate(), as
            ``torch.multinomial`` would, so that ``torch.manual_seed`` keeps its meaning.
        simulate_accept_length: benchmarks on random weights only: emit this many tokens a round on average (1 to
            num_steps + 1) whatever was drafted. Output is then NOT the model's; ``explain()`` and ``stats()`` say SIMULATED.
        progress: show a progress bar while graphs are compiled and captured.
    """

    num_steps: int | None = None
    min_ngram: int = 2
    max_ngram: int = 4
    compile: str = "inductor"
    cuda_graphs: bool = True
    adaptive: bool = True
    max_prefill_tokens: int = 8192
    page_size: int = 64
    kv_cache_dtype: str = "auto"
    seed: int | None = None
    simulate_accept_length: float | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, kinds = getattr(self, field.name), _KINDS[field.type.removesuffix(" | None")]
            if value is None and field.type.endswith("| None"):
                continue
            if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
                raise ConfigError(f"{field.name}={value!r}: expected {field.type.replace(' | None', ' or None')}.")
        if self.num_steps is not None and not 1 <= self.num_steps <= 63:
            raise ConfigError(f"num_steps={self.num_steps}: draft 1 to 63 tokens a round, or pass draft=None for none.")
        if not 1 <= self.min_ngram <= self.max_ngram:
            raise ConfigError(f"min_ngram={self.min_ngram}, max_ngram={self.max_ngram}: need 1 <= min_ngram <= max_ngram.")
        if self.compile not in ("inductor", "none"):
            raise ConfigError(f"compile={self.compile!r}: choose 'inductor' or 'none'.")
        if self.page_size < 16 or self.page_size & (self.page_size - 1):
            raise ConfigError(f"page_size={self.page_size}: a power of two of at least 16.")
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise ConfigError(f"kv_cache_dtype={self.kv_cache_dtype!r}: choose one of {', '.join(KV_CACHE_DTYPES)}.")
        if self.max_prefill_tokens < 1:
            raise ConfigError(f"max_prefill_tokens={self.max_prefill_tokens}: at least 1.")
        if self.simulate_accept_length is not None and self.simulate_accept_length < 1:
            raise ConfigError(f"simulate_accept_length={self.simulate_accept_length}: at least 1 (the bonus token).")
