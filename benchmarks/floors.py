"""What no round can be faster than: bytes over bandwidth, and the linear layers alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from shapes import System, median_ms
from torch import Tensor, nn

from spec_compile.hf_integration.attention_interface import recurrent_layers


def read_bandwidth(device: str) -> dict[str, float]:
    """Bytes a second this device reads: the better of a large reduction and a large copy (which reads and writes)."""
    count = 2**30 if device.startswith("cuda") else 2**24  # float32: 4 GiB, far over any L2; 64 MiB on a CPU
    source = torch.rand(count, device=device)
    target = torch.empty_like(source)
    size = source.numel() * source.element_size()
    reduction = size / median_ms(source.sum, device, 10) * 1e3
    copy = 2 * size / median_ms(lambda: target.copy_(source), device, 10) * 1e3
    return {"bytes_per_second": max(reduction, copy), "reduction": reduction, "copy": copy}


def parameter_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def distinct_bytes(models: Sequence[nn.Module]) -> int:
    """Bytes of all parameters; one that two models share (a head's embedding) counts once."""
    parameters = {id(p): p for model in models for p in model.parameters()}
    return sum(p.numel() * p.element_size() for p in parameters.values())


def weight_bytes_read(model: nn.Module) -> int:
    """Bytes of weights one forward must read: all, but of an untied embedding only the rows looked up."""
    total = parameter_bytes(model)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return total if head is embedding else total - embedding.numel() * embedding.element_size()


_PROJECTIONS = ("fc.", "eh_proj.")


def head_bytes_read(head: nn.Module) -> dict[str, int]:
    """Weights of a draft head that a draft step, and the extension behind verification, must read; no embeddings."""
    own = head.own_tensors()
    layers = sum(
        value.nbytes for name, value in own.items() if not name.startswith((*_PROJECTIONS, "embed_tokens.", "lm_head."))
    )
    step = layers + head.get_output_embeddings().weight.nbytes
    projection = sum(value.nbytes for name, value in own.items() if name.startswith(_PROJECTIONS))
    extend = step + projection
    # An MTP head projects its own states too; EAGLE-3's are as wide as its layer.
    return {"draft": extend if head.kind == "mtp" else step, "draft_extend": extend}


def kv_bytes_per_token(model: nn.Module) -> int:
    config = model.config.get_text_config(decoder=True)
    layers = config.num_hidden_layers - len(recurrent_layers(config))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    element = next(model.parameters()).element_size()
    return 2 * layers * config.num_key_value_heads * head_dim * element


def state_bytes_per_row(model: nn.Module) -> int:
    """Bytes of a row's recurrent states, float32; 0 for a model of attention layers only."""
    config = model.config.get_text_config(decoder=True)
    layers = len(recurrent_layers(config))
    if layers == 0:
        return 0
    return 4 * layers * config.linear_num_value_heads * config.linear_value_head_dim * config.linear_key_head_dim


_FUSABLE = (("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"), ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def _weight_groups(model: nn.Module, fuse: bool) -> list[Tensor]:
    """Every linear weight in the order it runs; siblings on one input as one matrix when ``fuse``."""
    weights: list[Tensor] = []
    for module in model.modules():
        linears = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
        for group in _FUSABLE if fuse else ():
            if all(name in linears for name in group):
                weights.append(torch.cat([linears.pop(name).weight.detach() for name in group]))
        weights += [linear.weight.detach() for linear in linears.values()]
    return weights


def linears_alone(model: nn.Module, token_counts: Iterable[int], device: str) -> tuple[dict[int, float], str]:
    """Milliseconds of all linear layers alone for M tokens, as one CUDA graph: what no decode step can be much under.

    Siblings are fused, as a fast engine does; the copy this takes is dropped again, and where it does not fit the
    layers run as they are stored (the second result says which).
    """
    try:
        weights, how = _weight_groups(model, fuse=True), "q/k/v and gate/up fused"
    except torch.OutOfMemoryError:
        weights, how = _weight_groups(model, fuse=False), "as stored (no memory for fused copies)"
    figures: dict[int, float] = {}
    with torch.inference_mode():
        for tokens in sorted(set(token_counts)):
            sizes = {w.shape[1] for w in weights}
            inputs = {n: torch.randn(tokens, n, dtype=weights[0].dtype, device=device) for n in sizes}

            def all_linears(inputs: dict[int, Tensor] = inputs) -> None:
                for weight in weights:
                    nn.functional.linear(inputs[weight.shape[1]], weight)

            call: Callable[[], object] = all_linears
            if device.startswith("cuda"):
                all_linears()  # cuBLAS picks and loads its kernels outside the capture
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    all_linears()
                call = graph.replay
            figures[tokens] = median_ms(call, device, 20 if device.startswith("cuda") else 5)
    return figures, how


def measure_floor(
    model: nn.Module, drafts: dict[str, nn.Module], cells: Iterable[tuple[System, int]], context: float, device: str
) -> dict[str, Any]:
    """A round cannot beat its bytes: the target's weights and cache once, its recurrent states read and written once, a draft
    model's or head's once a draft step.

    Args:
        drafts: what ``System.draft`` names. A head runs steps - 1 draft steps and one extension; the projection of the
            target's states is left out of its linears.
    """
    cells, bandwidth = list(cells), read_bandwidth(device)
    linears, how = linears_alone(model, [batch * (system.steps + 1) for system, batch in cells], device)
    alone_of = {}
    for name, draft in drafts.items():
        heads = name in ("eagle", "mtp")
        layers = nn.ModuleList([*draft.layers, draft.get_output_embeddings()]) if heads else draft
        alone_of[name] = linears_alone(layers, [batch for _, batch in cells], device)[0]
    floors = {}
    for system, batch in cells:
        size = weight_bytes_read(model) + batch * (context * kv_bytes_per_token(model) + 2 * state_bytes_per_row(model))
        alone = linears[batch * (system.steps + 1)]
        if system.draft in drafts:
            draft = drafts[system.draft]
            if system.draft in ("eagle", "mtp"):
                once = head_bytes_read(draft)
                size += (system.steps - 1) * once["draft"] + once["draft_extend"]
            else:
                size += system.steps * weight_bytes_read(draft)
            size += system.steps * batch * context * kv_bytes_per_token(draft)
            alone += system.steps * alone_of[system.draft][batch]
        floors[f"{system.name}/{batch}"] = [size / bandwidth["bytes_per_second"] * 1e3, alone]
    return {"bandwidth": bandwidth, "linears": how, "linears_ms": linears, "draft_linears_ms": alone_of, "cells": floors}
