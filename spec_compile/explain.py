"""``model.spec.explain()``: the compile-time choices as text."""

from __future__ import annotations

from spec_compile.config import RoundShape
from spec_compile.passes.node_words import layers_in_words, needs
from spec_compile.passes.select_backend import Choice
from spec_compile.runtime.engine import Engine
from spec_compile.runtime.programs import Programs


def explain(engine: Engine) -> str:
    """Every graph built so far: provider by layer group with reasons, what the passes did, what was captured."""
    lines = [f"{type(engine.target.model).__name__} on {engine.hardware.name} ({engine.hardware.arch})"]
    if engine.config.simulates:
        simulated = engine.config.simulate_accept_rates or engine.config.simulate_accept_length
        lines.append(f"SIMULATED acceptance of {simulated}: the emitted text is not the model's")
    draft = engine.draft
    lines.append(f"draft: {'none' if draft is None else f'{draft.kind}, {_rounds(draft.shape)}'}")
    lines += _programs("target", engine.target.programs)
    drafting = () if draft is None else draft.programs
    for number, programs in enumerate(drafting, 1):
        lines += _programs("draft" if len(drafting) == 1 else f"draft step {number}", programs)
    for (tokens, outputs, inputs, _), choice in engine.compiler.linears.items():
        if choice is not None:
            times = f"{choice.kernel_us:.1f} us by the library's kernel, {choice.library_us:.1f} by cuBLAS"
            lines.append(f"linear of {tokens} tokens, {inputs} to {outputs}: {times}{'' if choice.tiles else ', which stays'}")
    for name, nbytes in engine.captured():
        lines.append(f"CUDA graph: {name}, {nbytes / 2**20:.1f} MiB")
    if engine.hardware.is_cuda and engine.graphs is None:
        why = "a capture failed, see the warning" if engine.config.cuda_graphs else "cuda_graphs=False"
        lines.append(f"no CUDA graphs ({why}): rounds are launched kernel by kernel, which costs milliseconds each")
    return "\n".join(lines)


def _rounds(shape: RoundShape) -> str:
    if not shape.is_tree:
        return f"{shape.num_steps} tokens a round"
    return f"trees of {shape.num_draft_tokens} tokens, {shape.num_steps} deep, {shape.topk} wide"


def _programs(role: str, programs: Programs) -> list[str]:
    lines = []
    if programs.states is not None:
        states = programs.states
        lines.append(
            f"{role}: {len(states.layout.layers)} recurrent layers, {(states.nbytes - states.window_bytes) / 2**20:.1f} MiB of "
            f"states, {states.window_bytes / 2**20:.1f} MiB for windows of up to {states.most_tokens} tokens"
        )
    for name, choices in programs.choices.items():
        lines.append(f"{role} graph: {name}")
        for choice in choices:
            lines += [f"  {line}" for line in _choice(choice)]
        lines += [f"  {line}" for line in programs.reports[name] if not line.startswith("select_backend")]
    return lines


def _choice(choice: Choice) -> list[str]:
    """The winner of a layer group with its reason, then the losers with theirs; equal reasons share a line."""
    lines = [f"{layers_in_words(choice.layers)} ({choice.node.op}, {needs(choice.node)})"]
    lines.append(f"  {choice.provider}: {choice.reason}")
    by_reason: dict[str, list[str]] = {}
    for name, reason in choice.losers.items():
        by_reason.setdefault(reason, []).append(name)
    return lines + [f"  not {', '.join(names)}: {reason}" for reason, names in by_reason.items()]
