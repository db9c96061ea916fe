"""``torch.compile(model, backend="spec_compile")``: the passes that hold for any graph, then Inductor; no speculation.

The function here is a Dynamo backend, found by its entry point (group ``torch_dynamo_backends`` in pyproject.toml). It takes
``torch.compile``'s ``mode`` and ``options`` with the meaning they have for Inductor. ``SPEC_COMPILE_LOGS=passes`` says what was
done to each graph.

* ``model(ids).logits[:, -1]`` in one compiled function computes the last token's logits alone; an argmax over a vocabulary
  goes over slices (``passes/any_graph.py``).
* On an NVIDIA GPU linears of a few tokens get the faster of the matrix library and our kernel (``runtime/skinny_linears.py``),
  except where ``max-autotune`` measures for itself.
* Graphs of many tokens are cut at attention, and layers that are alike are compiled once: compiling takes a fraction of the
  time. Modes that record CUDA graphs keep the graph whole, because a recording should cover it.
* Graphs that compute gradients go to Inductor as they are: it divides them into forward and backward itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from spec_compile.hardware import Hardware, detect_hardware
from spec_compile.ops.torch_private import (
    detect_fake_mode,
    effective_option,
    inductor_compile,
    inductor_options,
    reset_cuda_graphs,
)
from spec_compile.passes.any_graph import memory, prepare_any
from spec_compile.passes.graph import StageGraph, fake, placeholders
from spec_compile.passes.partition import segment_key
from spec_compile.runtime.program import CacheSalt, compile_segment, sort_options, source_hash
from spec_compile.runtime.skinny_linears import Known, use_skinny_linears

_measured: Known = {}  # of linears, by shape: facts of the device, the same for every model of the process


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: list[object],
    *,
    mode: str | None = None,
    options: dict[str, object] | None = None,
) -> Callable[..., object]:
    """Compile what Dynamo traced.

    Args:
        gm: parameters are inputs of it, or attributes with ``torch._dynamo.config.inline_inbuilt_nn_modules`` off; changed.
        example_inputs: one for each input: real tensors, and integers where a size is symbolic.
        mode: ``"default"``, ``"reduce-overhead"``, ``"max-autotune"`` or ``"max-autotune-no-cudagraphs"``.
        options: Inductor's.

    Returns:
        A callable with the inputs and outputs of ``gm``.

    Raises:
        RuntimeError: an option or mode that Inductor does not know.
    """
    wanted = inductor_options(mode, options)
    graph = StageGraph(gm, "torch.compile")
    if computes_gradients(gm, example_inputs):
        graph.note("it computes gradients: Inductor compiles it as it is (torch.no_grad() around calls gets the passes)")
        return inductor_compile(gm, example_inputs, wanted)
    graph = prepare_any(graph, cut=not effective_option(wanted, "triton.cudagraphs"))
    given = dict(zip(placeholders(graph.gm), example_inputs, strict=True))
    hardware = _hardware(example_inputs)
    if graph.gm is gm:
        _use_our_kernels(graph, gm, tuple(example_inputs), hardware, wanted)
        return inductor_compile(gm, example_inputs, wanted | _sort_options(gm))
    return _compile_segments(graph, given, hardware, wanted)


compile_graph.reset = reset_cuda_graphs  # torch.compiler.reset() asks for it


def computes_gradients(gm: fx.GraphModule, example_inputs: list[object]) -> bool:
    """Whether a graph is traced for a backward pass, or switches gradients on within."""
    if any(_switches_gradients_on(node) for node in gm.graph.nodes):
        return True
    tensors = [value for value in (*example_inputs, *gm.parameters()) if isinstance(value, Tensor)]
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _switches_gradients_on(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "_set_grad_enabled" and node.args != (False,)


def _compile_segments(
    graph: StageGraph, given: dict[fx.Node, object], hardware: Hardware | None, options: dict[str, object]
) -> fx.GraphModule:
    """The top graph over compiled segments. They are compiled now, with Dynamo's fakes: what Inductor assumes of a symbolic
    size becomes one of Dynamo's guards only while Dynamo waits."""
    mode = detect_fake_mode([fake(node) for node in given])
    artifacts: dict[tuple[str, tuple[int, ...]], Callable] = {}
    for call in [n for n in graph.gm.graph.nodes if n.op == "call_module"]:
        segment = graph.gm.get_submodule(call.target)
        key = segment_key(segment), _shared_memory(call)
        if key not in artifacts:
            wanted = dict(options)
            _use_our_kernels(graph, segment, tuple(given.get(arg) for arg in call.args), hardware, wanted)
            examples = [fake(node) for node in placeholders(segment)]
            artifacts[key] = compile_segment(segment, examples, wanted | _sort_options(segment), mode)
        setattr(graph.gm, call.target, _Segment(artifacts[key], not isinstance(fake(call), tuple)))
    return graph.gm


def _shared_memory(call: fx.Node) -> tuple[int, ...]:
    """Which inputs of a segment are views of one memory, as the first position of each: it is compiled for that."""
    tensors = [value for arg in call.args if isinstance(arg, fx.Node) and isinstance(value := fake(arg), Tensor)]
    places = memory(tensors)
    return tuple(places.index(place) for place in places)


class _Segment(nn.Module):
    """What stands in a segment's place: Inductor's callables return a sequence, the top graph expects one output bare."""

    def __init__(self, artifact: Callable, bare: bool) -> None:
        super().__init__()
        self.artifact, self.bare = artifact, bare

    def forward(self, *args: object) -> object:
        out = self.artifact(*args)
        return out[0] if self.bare and isinstance(out, list | tuple) else out


def _use_our_kernels(
    graph: StageGraph, gm: fx.GraphModule, args: tuple, hardware: Hardware | None, options: dict[str, object]
) -> None:
    """Measure linears of few tokens and replace those that our kernel computes faster, in place; adds to ``options``."""
    if hardware is None or hardware.vendor != "nvidia" or any(map(torch.is_autocast_enabled, ("cuda", "cpu"))):
        return
    if any(effective_option(options, name) for name in ("max_autotune", "max_autotune_gemm", "post_grad_custom_pre_pass")):
        return  # Inductor measures linears itself, or its disk cache could not be told of our kernel's source
    if any(getattr(node.target, "__name__", "") == "_enter_autocast" for node in gm.graph.nodes):
        return  # which casts for a linear, but not for an op of ours
    if replaced := use_skinny_linears(gm, args, _measured):
        graph.note(f"skinny_linears: {replaced} linears")
        options["post_grad_custom_pre_pass"] = CacheSalt(f"spec_compile {source_hash()} {hardware.arch}")


def _sort_options(gm: fx.GraphModule) -> dict[str, object]:
    symbolic = any(isinstance(fake(node), torch.SymInt) for node in placeholders(gm))
    return sort_options(gm) if symbolic else {}


def _hardware(example_inputs: list[object]) -> Hardware | None:
    """Of a graph's tensors; None where they are on several devices or on one that nothing here was made for."""
    devices = {value.device for value in example_inputs if isinstance(value, Tensor)}
    (device, *others) = devices or {torch.device("cpu")}
    return None if others or device.type not in ("cpu", "cuda") else detect_hardware(device)
