"""``model.spec.explain()``: the compile-time choices as text."""

from __future__ import annotations

from spec_compile.passes.select_backend import Choice
from spec_compile.runtime.engine import Engine
from spec_compile.runtime.model_runner import ModelRunner


def explain(engine: Engine) -> str:
    """Every graph built so far: provider by layer group with reasons, what the passes did, what was captured."""
    lines = [f"{type(engine.target.model).__name__} on {engine.hardware.name} ({engine.hardware.arch})"]
    if engine.config.simulate_accept_length is not None:
        lines.append(f"SIMULATED acceptance of {engine.config.simulate_accept_length}: the emitted text is not the model's")
    draft = engine.draft
    lines.append(f"draft: {'none' if draft is None else f'{draft.kind}, {draft.num_steps} tokens a round'}")
    lines += _runner("target", engine.target)
    runner = getattr(draft, "runner", None)
    if runner is not None:
        lines += _runner("draft", runner)
    for name, nbytes in engine.captured():
        lines.append(f"CUDA graph: {name}, {nbytes / 2**20:.1f} MiB")
    return "\n".join(lines)


def _runner(role: str, runner: ModelRunner) -> list[str]:
    lines = []
    for name, choices in runner.choices.items():
        lines.append(f"{role} graph: {name}")
        lines += [f"  {_choice(choice)}" for choice in choices]
        lines += [f"  {line}" for line in runner.reports[name] if not line.startswith("select_backend")]
    return lines


def _choice(choice: Choice) -> str:
    node = choice.node
    first, last = choice.layers[0], choice.layers[-1]
    layers = f"layer {first}" if first == last else f"{len(choice.layers)} layers of {first}–{last}"
    needs = [f"{node.num_q_heads}/{node.num_kv_heads} heads × {node.head_dim}", str(node.dtype).removeprefix("torch.")]
    needs += [f"window {node.window}"] if node.window else []
    needs += ["sinks"] if node.has_sinks else []
    needs += [f"softcap {node.softcap:g}"] if node.softcap else []
    losers = "".join(f"; not {name}: {reason}" for name, reason in choice.losers.items())
    return f"{layers} ({node.op}, {', '.join(needs)}): {choice.provider} ({choice.reason}){losers}"
