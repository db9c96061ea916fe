"""Model families × draft kinds × kernels, for ``docs/support-matrix.md``: what is ticked there names the test that shows it.

A new family or draft kind is a line in ``FAMILIES`` and the families of a ``Proof``. tests/test_family_matrix.py collects every
named test, compares what the families ask of kernels with what capture finds, and compares the page with this table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from spec_compile.hardware import Hardware
from spec_compile.ops import providers
from spec_compile.ops.providers import AttentionNode, DeltaNode, Node


@dataclass(frozen=True)
class Family:
    """What the attention of a usual checkpoint of a family asks of kernels.

    Attributes:
        heads: query and key/value heads; a latent cache is one key/value head for all.
        dims: of keys and of values.
        windows: sliding windows of its layers in tokens, 0 for unlimited.
        delta: key heads, value heads and dims of its gated delta nets.
    """

    heads: tuple[int, int]
    dims: tuple[int, int]
    windows: tuple[int, ...] = (0,)
    softcap: float = 0.0
    sinks: bool = False
    latent: bool = False
    delta: tuple[int, int, int] | None = None

    @property
    def features(self) -> tuple[str, ...]:
        """The special ones, as ``CONTRACTS`` names them."""
        named = {"window": any(self.windows), "sinks": self.sinks, "softcap": self.softcap > 0, "latent": self.latent}
        return tuple(name for name, wanted in named.items() if wanted)

    def nodes(self, mode: str, dtype: torch.dtype) -> list[AttentionNode]:
        """A node of each kind of layer, in windows of 8 tokens (``"chain"``, ``"tree"``)."""
        node = AttentionNode(
            op="mla_attention" if self.latent else "attention", stage="verify", batch=1, num_tokens=8,
            num_q_heads=self.heads[0], num_kv_heads=self.heads[1], head_dim=self.dims[0], v_head_dim=self.dims[1], page_size=64,
            window=0, softcap=self.softcap, has_sinks=self.sinks, is_tree=mode == "tree", dtype=dtype, kv_dtype=dtype,
            max_context=4096,
        )  # fmt: skip
        return [replace(node, window=window) for window in self.windows]

    def delta_nodes(self, mode: str, dtype: torch.dtype) -> list[DeltaNode]:
        """The same of its gated delta nets, if it has any."""
        if self.delta is None:
            return []
        key_heads, value_heads, dim = self.delta
        return [DeltaNode("gdn_verify", "verify", 1, 8, key_heads, value_heads, dim, dim, mode == "tree", dtype)]


# Sizes are those of Llama-3.1-8B, Qwen2.5-7B, Qwen3-8B, Qwen3-30B-A3B, Mistral-7B-v0.1, Mixtral-8x7B, Gemma-2-9B, Gemma-3-12B,
# Command R7B, gpt-oss-20b, Phi-3-mini, GPT-2, OLMo-2-7B, Granite-3.1-8B, DeepSeek-V3, GLM-4.5-Air, GLM-4.7-Flash,
# Qwen3.5-4B, and transformers' defaults of Qwen3-Next and Qwen3.5-MoE.
FAMILIES = {
    "llama": Family((32, 8), (128, 128)),
    "qwen2": Family((28, 4), (128, 128)),
    "qwen3": Family((32, 8), (128, 128)),
    "qwen3_moe": Family((32, 4), (128, 128)),
    "mistral": Family((32, 8), (128, 128), windows=(4096,)),
    "mixtral": Family((32, 8), (128, 128)),
    "gemma2": Family((16, 8), (256, 256), windows=(4096, 0), softcap=50.0),
    "gemma3_text": Family((16, 8), (256, 256), windows=(1024, 0)),
    "cohere2": Family((32, 8), (128, 128), windows=(4096, 0)),
    "gpt_oss": Family((64, 8), (64, 64), windows=(128, 0), sinks=True),
    "phi3": Family((32, 32), (96, 96)),
    "gpt2": Family((12, 12), (64, 64)),
    "olmo2": Family((32, 32), (128, 128)),
    "granite": Family((32, 8), (128, 128)),
    "deepseek_v3": Family((128, 1), (576, 512), latent=True),
    "glm4_moe": Family((96, 8), (128, 128)),
    "glm4_moe_lite": Family((20, 1), (576, 512), latent=True),
    "qwen3_next": Family((16, 2), (256, 256), delta=(16, 32, 128)),
    "qwen3_5_text": Family((16, 4), (256, 256), delta=(16, 32, 128)),
    "qwen3_5_moe_text": Family((16, 2), (256, 256), delta=(16, 32, 128)),
}
_RECURRENT = tuple(name for name, family in FAMILIES.items() if family.delta)


# ----------------------------------------------------------------------------------------------------------------------
# Drafts


@dataclass(frozen=True)
class Proof:
    """A test that shows a draft kind on every one of ``families``.

    Attributes:
        drafts: columns of the table.
        test: its id, ``{family}`` in the place of the family.
        gpu: it needs a CUDA device.
    """

    drafts: tuple[str, ...]
    test: str
    families: tuple[str, ...]
    gpu: bool = False

    def test_id(self, family: str) -> str:
        return self.test.format(family=family)


DRAFTS = ("n-gram", "causal LM", "EAGLE-3 chain", "EAGLE-3 tree", "DFlash chain", "MTP chain", "MTP tree")
_EVERY = tuple(name for name in FAMILIES if name not in _RECURRENT)
_WINDOWED = ("mistral", "gemma2", "gemma3_text", "cohere2", "gpt_oss", "deepseek_v3")
_EAGLE = "tests/test_eagle_families.py::test_heads_that_know_nothing_and_heads_that_know_the_text[{family}]"
_EAGLE_FAMILIES = ("llama", "qwen3", "gemma3_text", "gpt_oss", "qwen3_moe")
_EAGLE_ON_GPU = "tests/gpu/test_eagle.py::test_float32_text_equals_plain_generate"
_GPU = "tests/gpu/test_end_to_end.py::test_float32_text_equals_plain_generate[{family}]"
_MTP = "tests/test_mtp_generate.py::test_heads_that_know_nothing_and_heads_that_know_the_text[{family}]"
_MTP_FAMILIES = ("deepseek_v3", "glm4_moe", "glm4_moe_lite", "qwen2", *_RECURRENT)
_MTP_ON_GPU = "tests/gpu/test_mtp.py::test_float32_text_equals_plain_generate"
_BLOCKS = "tests/test_dflash_rounds.py::test_heads_that_know_nothing_and_heads_that_know_the_text[{family}]"
PROOFS = (
    Proof(("n-gram",), "tests/test_families.py::test_ngram_drafts[{family}]", _EVERY),
    Proof(("n-gram",), _GPU, _EVERY, gpu=True),
    Proof(("n-gram",), "tests/test_windows.py::test_ngram_drafts[{family}]", _WINDOWED),
    Proof(("causal LM",), "tests/test_families.py::test_causal_lm_drafts[{family}]", _EVERY),
    Proof(("EAGLE-3 chain", "EAGLE-3 tree"), _EAGLE, _EAGLE_FAMILIES),
    Proof(("EAGLE-3 chain",), f"{_EAGLE_ON_GPU}[{{family}}-3/1/4]", (*_EAGLE_FAMILIES, "deepseek_v3"), gpu=True),
    Proof(("EAGLE-3 tree",), f"{_EAGLE_ON_GPU}[{{family}}-6/10/32]", (*_EAGLE_FAMILIES, "deepseek_v3"), gpu=True),
    Proof(("EAGLE-3 chain",), "tests/test_windows.py::test_eagle3_chains[{family}]", _WINDOWED),
    Proof(("EAGLE-3 tree",), "tests/test_windows.py::test_eagle3_trees[{family}]", _WINDOWED),
    Proof(("DFlash chain",), _BLOCKS, _EAGLE_FAMILIES),
    Proof(("MTP chain", "MTP tree"), _MTP, _MTP_FAMILIES),
    Proof(("MTP chain",), f"{_MTP_ON_GPU}[{{family}}-3/1/4]", _MTP_FAMILIES, gpu=True),
    Proof(("MTP tree",), f"{_MTP_ON_GPU}[{{family}}-3/2/6]", _MTP_FAMILIES, gpu=True),
    Proof(("n-gram",), "tests/test_recurrent.py::test_ngram_drafts[{family}]", _RECURRENT),
    Proof(("EAGLE-3 chain",), "tests/test_recurrent.py::test_eagle3_chains[{family}]", _RECURRENT),
    Proof(("EAGLE-3 tree",), "tests/test_recurrent.py::test_eagle3_trees[{family}]", _RECURRENT),
)


def proofs(family: str, draft: str) -> list[int]:
    """Numbers (from 1) of the tests that show ``draft`` on ``family``."""
    return [i for i, proof in enumerate(PROOFS, 1) if draft in proof.drafts and family in proof.families]


# ----------------------------------------------------------------------------------------------------------------------
# Kernels

CONTRACT = "tests/gpu/test_attention_providers.py::test_contract[{provider}-{case}-bf16]"
CPU_CONTRACT = "tests/test_attention_contract.py::test_the_torch_provider_keeps_it[{case}-torch.float32]"
# (feature or None for a plain node, mode) -> the cases of tests/support/attention_contract.py that show it on a GPU, and on
# a CPU. Sinks and windows come together in the one family that has sinks.
CONTRACTS: dict[tuple[str | None, str], tuple[str, str]] = {
    (None, "chain"): ("chain8", "chain"),
    (None, "tree"): ("tree8_batch1", "tree"),
    ("window", "chain"): ("window", "window_sinks"),
    ("window", "tree"): ("window_below_page", "window_sinks_tree"),
    ("sinks", "chain"): ("window_sinks", "window_sinks"),
    ("sinks", "tree"): ("tree_sinks", "window_sinks_tree"),
    ("softcap", "chain"): ("softcap_chain", "softcap_chain"),
    ("softcap", "tree"): ("softcap", "softcap"),
    ("latent", "chain"): ("latent_chain", "latent_chain"),
    ("latent", "tree"): ("latent", "latent"),
}
# (provider, mode) -> the test that shows it on gated delta nets of the families' sizes; torch is its own reference, tested on a
# CPU.
DELTA_CONTRACTS: dict[tuple[str, str], str] = {
    ("torch", "chain"): "tests/test_ops_linear_attention.py::test_windows[False-8]",
    ("torch", "tree"): "tests/test_ops_linear_attention.py::test_windows[True-8]",
    ("triton", "chain"): "tests/gpu/test_gdn.py::test_windows_of_models[qwen3-next, qwen3.5-4b-4-bf16-chain]",
    ("triton", "tree"): "tests/gpu/test_gdn.py::test_windows_of_models[qwen3-next, qwen3.5-4b-4-bf16-tree]",
    ("flashinfer", "chain"): "tests/gpu/test_gdn.py::test_flashinfer[8-1]",
}
MODES = ("chain", "tree")
TESTED_ARCHES = ("cpu", "sm90")


def kernels(family: str, mode: str, hardware: Hardware, *, delta: bool = False) -> list[str]:
    """Providers that run every layer of ``family`` with attention on ``hardware``, in their own order; on a CPU in float32.
    With ``delta`` those of its gated delta nets, none where it has none."""
    dtype = torch.float32 if hardware.vendor == "cpu" else torch.bfloat16
    made = FAMILIES[family]
    nodes: list[Node] = [*(made.delta_nodes if delta else made.nodes)(mode, dtype)]

    def able(name: str) -> bool:
        return all(providers.load_for(node, name).supports(node, hardware) is None for node in nodes)

    return [name for name in providers.names(nodes[0]) if able(name)] if nodes else []


def contract_tests(family: str, mode: str, provider: str, hardware: Hardware) -> list[str]:
    """Ids of the tests that show what ``family`` asks of ``provider`` in windows of ``mode``."""
    template, which = (CPU_CONTRACT, 1) if hardware.vendor == "cpu" else (CONTRACT, 0)
    cases = [CONTRACTS[feature, mode][which] for feature in (FAMILIES[family].features or (None,))]
    return [template.format(provider=provider, case=case) for case in cases]


# ----------------------------------------------------------------------------------------------------------------------
# The page

_DRAFT_TEXT = """\
## Model families and drafts

A cell names the tests behind it, numbered below: small random models of the family, and greedy text through `generate()` equals
plain transformers' token for token in float32, in ragged batches of 1, 3 and 5, drafts refused and accepted. `·` is a
pair without a test; nothing refuses it, except that few families ship MTP heads (`qwen2` stands for MiMo-7B's). N-grams, causal
LMs and DFlash heads draft chains only.
"""
_KERNEL_TEXT = """\
## Model families and kernels

Who runs all layers of a checkpoint of usual size, in bfloat16 (on a CPU in float32). On {tested} every name is shown by
{contract},
in the cases that the family's features ask for, and on gated delta nets by {delta};
on other hardware it is the provider's own word.
"""


def section(devices: Iterable[Hardware]) -> str:
    """The part of the page on families, from all tables above."""
    lines = [_DRAFT_TEXT, *_rows(("family", *DRAFTS), [(family, *map(_cell_of(family), DRAFTS)) for family in FAMILIES]), ""]
    for number, proof in enumerate(PROOFS, 1):
        lines.append(f"{number}. `{proof.test.replace('{family}', '<family>')}`{' (on a GPU)' if proof.gpu else ''}")
    devices = list(devices)
    contract = f"`{CPU_CONTRACT.split('[')[0]}` and `{CONTRACT.split('[')[0]}`"
    delta = " and ".join(f"`{module}`" for module in sorted({test.split("::")[0] for test in DELTA_CONTRACTS.values()}))
    lines += ["", _KERNEL_TEXT.format(tested=" and ".join(TESTED_ARCHES), contract=contract, delta=delta)]
    groups: dict[tuple[str, ...], list[str]] = {}
    for family, made in FAMILIES.items():
        for delta in (False, True) if made.delta else (False,):
            row = _asks_delta(made.delta) if delta else _asks(made)
            groups.setdefault((row, *(_kernel_cell(family, device, delta) for device in devices)), []).append(family)
    table = [(", ".join(families), *cells) for cells, families in groups.items()]
    return "\n".join([*lines, *_rows(("family", "asks for", *(device.arch for device in devices)), table)]) + "\n"


def _kernel_cell(family: str, hardware: Hardware, delta: bool) -> str:
    chain, tree = (kernels(family, mode, hardware, delta=delta) for mode in MODES)
    return ", ".join(name if name in tree else f"{name} (chain)" for name in chain) or "none"


def _cell_of(family: str) -> Callable[[str], str]:
    return lambda draft: ", ".join(map(str, proofs(family, draft))) or "·"


def _rows(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return [lines[0], "|---" * len(list(header)) + "|", *lines[1:]]


def _asks(family: Family) -> str:
    words = [f"{family.heads[0]}/{family.heads[1]} heads × {'/'.join(map(str, dict.fromkeys(family.dims)))}"]
    words += [f"window {window}" for window in family.windows if window]
    words += ["sinks"] if family.sinks else []
    words += [f"softcap {family.softcap:g}"] if family.softcap else []
    words += ["latent"] if family.latent else []
    return ", ".join(words)


def _asks_delta(delta: tuple[int, int, int]) -> str:
    return f"gated delta nets, {delta[1]}/{delta[0]} value/key heads × {delta[2]}"
