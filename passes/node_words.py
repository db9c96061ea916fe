"""Nodes in words, for errors and for ``explain()``."""

from __future__ import annotations

from spec_compile.ops.providers import DeltaNode, Node


def call_in_words(node: Node, layers: tuple[int, ...]) -> str:
    """A node in words, for errors."""
    return f"{node.op} in the {node.stage} graph ({layers_in_words(layers)}; {needs(node)})"


def layers_in_words(layers: tuple[int, ...]) -> str:
    """``"layer 3"``, ``"layers 0–31"``."""
    return f"{'layer' if len(layers) == 1 else 'layers'} {span(layers)}"


def span(layers: tuple[int, ...]) -> str:
    """Layer numbers in words: ``"0–31"``, ``"0, 2, 4, …, 30"``, ``"3"``."""
    first, last = layers[0], layers[-1]
    if len(layers) == 1:
        return str(first)
    if len(layers) == last - first + 1:
        return f"{first}–{last}"
    return ", ".join(map(str, layers)) if len(layers) <= 4 else f"{layers[0]}, {layers[1]}, {layers[2]}, …, {last}"


def needs(node: Node) -> str:
    """What a node asks of a kernel, in words."""
    if isinstance(node, DeltaNode):
        words = [f"{node.num_v_heads}/{node.num_k_heads} value/key heads × {node.v_head_dim}/{node.head_dim}"]
        words += [str(node.dtype).removeprefix("torch."), f"{str(node.state_dtype).removeprefix('torch.')} states"]
        words += [f"{node.batch} rows × {node.num_tokens} tokens"] if node.batch is not None else []
        return ", ".join(words + (["a tree"] if node.is_tree else []))
    head = f"{node.head_dim}" if node.head_dim == node.v_head_dim else f"{node.head_dim}/{node.v_head_dim}"
    words = [f"{node.num_q_heads}/{node.num_kv_heads} heads × {head}", str(node.dtype).removeprefix("torch.")]
    words += [f"{str(node.kv_dtype).removeprefix('torch.')} cache"] if node.kv_dtype != node.dtype else []
    words += [f"{node.batch} rows × {node.num_tokens} tokens"] if node.batch is not None else []
    words += ["a tree"] if node.is_tree else []
    words += [f"window {node.window}"] if node.window else []
    words += ["sinks"] if node.has_sinks else []
    words += [f"softcap {node.softcap:g}"] if node.softcap else []
    words += [f"pages of {node.page_size}"]
    words += [f"at most {node.max_context} slots a row"] if node.max_context is not None else []
    return ", ".join(words)
