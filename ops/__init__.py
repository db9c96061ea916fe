"""Every ``torch.library`` op of the namespace ``spec_compile::``: schema, fake, reference. Knows no FX and no transformers.

Importing anything of this package registers all ops that the modules below define, so a file that calls
``torch.ops.spec_compile.<name>`` need not know which of them does. Ops of a kernel provider are registered when the provider is
loaded (``ops/providers``): torch takes 10 ms to register one, and a process uses few of them.
"""

import torch

from spec_compile.ops import (
    accept,
    accept_block,
    accept_tree,
    attention,
    kv_cache,
    linear_attention,
    ngram,
    page_table,
    round_inputs,
    sampling,
    simulate,
    skinny_linear,
    tree,
)

OPS = torch.ops.spec_compile  # as graphs name them

__all__ = [
    "OPS",
    "accept",
    "accept_block",
    "accept_tree",
    "attention",
    "kv_cache",
    "linear_attention",
    "ngram",
    "page_table",
    "round_inputs",
    "sampling",
    "simulate",
    "skinny_linear",
    "tree",
]
