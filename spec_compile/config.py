"""What a user may set, and its defaults."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from spec_compile.errors import ConfigError

KV_CACHE_DTYPES = ("auto", "bfloat16", "float16", "fp8_e4m3")
MOST_NGRAM = 64  # each token of a suffix is one more look at the whole text in every round

_KINDS: dict[str, type | tuple[type, ...]] = {
    "int": int,
    "bool": bool,
    "str": str,
    "float": (int, float),
    "tuple[float, ...]": (tuple, list),
}


@dataclass(frozen=True)
class RoundShape:
    """How a round drafts, in SGLang's terms.

    Attributes:
        num_steps: tokens drafted one behind another, so a round emits at most ``num_steps + 1``; 0 is plain decoding.
        topk: children a drafted token may have; 1 is a chain.
        num_draft_tokens: tokens the target verifies (N), the root included; ``num_steps + 1`` for a chain.
    """

    num_steps: int
    topk: int
    num_draft_tokens: int

    @property
    def is_tree(self) -> bool:
        return self.topk > 1

    def __str__(self) -> str:
        return f"{self.num_steps}/{self.topk}/{self.num_draft_tokens}"


def chain(num_steps: int) -> RoundShape:
    """A round of ``num_steps`` drafts, each behind the one before; 0 drafts none."""
    return RoundShape(num_steps, 1, num_steps + 1)


@dataclass(frozen=True)
class SpecConfig:
    """Options of ``spec_compile``; every field can also be given to it by keyword.

    Attributes:
        num_steps: tokens drafted one behind another in a round. None takes the draft's default (n-gram 7, others 5, of
            several MTP layers one each).
        topk: children a drafted token may have (EAGLE); 1 drafts a chain, more a tree.
        num_draft_tokens: tokens verified a round, the root included. None: ``num_steps + 1`` for a chain, for a tree
            the smaller of 8 × topk and 64 (names and meaning as in SGLang: 3/1/4, 5/4/8, 6/10/32, 5/8/64, …).
        min_ngram, max_ngram: n-gram drafting looks for the longest repeated suffix of max_ngram (at most 64) down to
            min_ngram tokens.
        compile: ``"inductor"`` compiles the graphs' segments; ``"none"`` runs them as captured (tests, quick starts).
        cuda_graphs: on CUDA, replay each round as one CUDA graph; False launches its kernels one by one.
        verification: how sampled chains of a draft model are judged, both exactly: ``"token"`` by token (Leviathan et al.
            2211.17192), ``"block"`` as a whole (Sun et al. 2403.10444), which keeps at least as many on average.
        adaptive: choose the shape of each round, plain decoding included, by the acceptance seen and the round times measured
            (n-grams anywhere, EAGLE heads on a GPU); False always drafts as asked. A simulated mean accept length fixes it too.
        max_prefill_tokens: prompts are prefilled in groups of rows of at most this many tokens together.
        page_size: slots in a KV cache page on a GPU (a power of two); a CPU row has one page.
        kv_cache_dtype: type of the caches, the draft's too: ``"auto"`` (the model's), ``"bfloat16"``, ``"float16"`` or
            ``"fp8_e4m3"`` (names as in vLLM and SGLang; scale 1.0, written with saturation to ±448). fp8 halves the memory
            and the reads of a cache. A narrower type changes the model's distribution slightly: output is then exactly that of
            decoding one token at a time over the same narrow cache (``draft=None``), no longer that of plain ``generate()``.
        seed: base of the sampling seeds; None draws one from torch's global generator on every generate(), as
            ``torch.multinomial`` would, so that ``torch.manual_seed`` keeps its meaning. Where heads choose rounds by
            measured times (``adaptive`` on a GPU) a seed alone does not fix a sampled text; its distribution is the same.
        self_check: ``spec_compile()`` compares the captured graph with the model's own forward on a short random text, and
            refuses the model where they differ by more than rounding; False leaves that out.
        simulate_accept_length: benchmarks on random weights only: emit this many tokens a round on average (1 to
            num_steps + 1) whatever was drafted. Output is then NOT the model's; ``explain()`` and ``stats()`` say SIMULATED.
            Calls in lockstep (logits processors, scores) judge drafts for real even so, and ``stats()`` says that too.
        simulate_accept_rates: the same by draft position: the probability that draft 1, 2, … stands if those before it do;
            positions behind the last one given never do.
        progress: show a progress bar while graphs are compiled and captured.
    """

    num_steps: int | None = None
    topk: int = 1
    num_draft_tokens: int | None = None
    min_ngram: int = 2
    max_ngram: int = 4
    compile: str = "inductor"
    cuda_graphs: bool = True
    verification: str = "token"
    adaptive: bool = True
    max_prefill_tokens: int = 8192
    page_size: int = 64
    kv_cache_dtype: str = "auto"
    seed: int | None = None
    simulate_accept_length: float | None = None
    simulate_accept_rates: tuple[float, ...] | None = None
    progress: bool = True
    self_check: bool = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, kinds = getattr(self, field.name), _KINDS[field.type.removesuffix(" | None")]
            if value is None and field.type.endswith("| None"):
                continue
            if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
                raise ConfigError(f"{field.name}={value!r}: expected {field.type.replace(' | None', ' or None')}.")
        if self.num_steps is not None and not 1 <= self.num_steps <= 63:
            raise ConfigError(f"num_steps={self.num_steps}: draft 1 to 63 tokens a round, or pass draft=None for none.")
        if not 1 <= self.topk <= 16:
            raise ConfigError(f"topk={self.topk}: 1 drafts a chain, 2 to 16 a tree.")
        if self.num_draft_tokens is not None and not 2 <= self.num_draft_tokens <= 64:
            raise ConfigError(f"num_draft_tokens={self.num_draft_tokens}: verify 2 to 64 tokens a round, the root included.")
        if not 1 <= self.min_ngram <= self.max_ngram <= MOST_NGRAM:
            raise ConfigError(
                f"min_ngram={self.min_ngram}, max_ngram={self.max_ngram}: need 1 <= min_ngram <= max_ngram <= {MOST_NGRAM}."
            )
        if self.compile not in ("inductor", "none"):
            raise ConfigError(f"compile={self.compile!r}: choose 'inductor' or 'none'.")
        if self.verification not in ("token", "block"):
            raise ConfigError(f"verification={self.verification!r}: choose 'token' or 'block'.")
        if self.page_size < 16 or self.page_size & (self.page_size - 1):
            raise ConfigError(f"page_size={self.page_size}: a power of two of at least 16.")
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise ConfigError(f"kv_cache_dtype={self.kv_cache_dtype!r}: choose one of {', '.join(KV_CACHE_DTYPES)}.")
        if self.seed is not None and not abs(self.seed) < 2**62:
            raise ConfigError(f"seed={self.seed}: a number of at most 62 bits.")
        if self.max_prefill_tokens < 1:
            raise ConfigError(f"max_prefill_tokens={self.max_prefill_tokens}: at least 1.")
        if self.simulate_accept_length is not None and not self.simulate_accept_length >= 1:  # nor NaN
            raise ConfigError(f"simulate_accept_length={self.simulate_accept_length}: at least 1 (the bonus token).")
        if self.simulate_accept_rates is not None:
            if self.simulate_accept_length is not None:
                raise ConfigError("simulate_accept_length and simulate_accept_rates: give one of them.")
            if not self.simulate_accept_rates:
                raise ConfigError(
                    f"simulate_accept_rates={self.simulate_accept_rates}: give a rate for each draft position, or leave the "
                    "option out to simulate nothing."
                )
            if not all(
                isinstance(rate, int | float) and not isinstance(rate, bool) and 0 <= rate <= 1
                for rate in self.simulate_accept_rates
            ):
                raise ConfigError(f"simulate_accept_rates={self.simulate_accept_rates}: probabilities from 0 to 1.")

    def simulated_rates(self, num_steps: int) -> list[float] | None:
        """The decreed chance of each of ``num_steps`` drafts, given those before it; None when acceptance is real.

        A mean becomes the rates with the least variance: 1, 1, …, a fraction, 0 (as vLLM's synthetic acceptance). Positions
        behind the last rate given have rate 0.

        Raises:
            ConfigError: more tokens are asked for than a round can emit.
        """
        if self.simulate_accept_rates is not None:
            rates = list(self.simulate_accept_rates)
            if len(rates) > num_steps:
                raise ConfigError(
                    f"simulate_accept_rates={self.simulate_accept_rates}: a round of num_steps={num_steps} has {num_steps} "
                    f"draft positions; give at most {num_steps} rates, or raise num_steps."
                )
            return rates + [0.0] * (num_steps - len(rates))
        if self.simulate_accept_length is None:
            return None
        if self.simulate_accept_length > num_steps + 1:
            raise ConfigError(
                f"simulate_accept_length={self.simulate_accept_length}: a round of num_steps={num_steps} emits at most "
                f"{num_steps + 1} tokens."
            )
        return [min(1.0, max(0.0, self.simulate_accept_length - 1 - step)) for step in range(num_steps)]

    @property
    def simulates(self) -> bool:
        """Whether acceptance is simulated."""
        return self.simulate_accept_length is not None or self.simulate_accept_rates is not None

    def round_shape(self, default_steps: int) -> RoundShape:
        """The rounds these options ask for.

        Args:
            default_steps: what the draft takes for ``num_steps=None``.

        Raises:
            ConfigError: the three numbers do not go together.
        """
        steps = self.num_steps or default_steps
        self.simulated_rates(steps)  # a mean that these rounds cannot have is said now
        if self.topk == 1:
            if self.num_draft_tokens not in (None, steps + 1):
                raise ConfigError(
                    f"num_draft_tokens={self.num_draft_tokens} with topk=1: a chain of num_steps={steps} verifies {steps + 1} "
                    "tokens; leave num_draft_tokens out, or draft a tree (topk > 1)."
                )
            return chain(steps)
        candidates = self.topk + (steps - 1) * self.topk**2
        tokens = self.num_draft_tokens or min(8 * self.topk, 64, candidates + 1)
        if (steps - 1) * self.topk > 128:
            raise ConfigError(f"num_steps={steps}, topk={self.topk}: a draft tree holds at most 128 nodes that are expanded.")
        if not steps < tokens <= candidates + 1:
            raise ConfigError(
                f"num_draft_tokens={tokens}: with num_steps={steps} and topk={self.topk} a tree has {steps + 1} to "
                f"{candidates + 1} tokens, the root included."
            )
        return RoundShape(steps, self.topk, tokens)
