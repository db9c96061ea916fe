"""Several callers of one model: threads take turns, a call from within a call runs plain, nobody loses buffers in use."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import trace_once
from tiny import left_padded, tiny_model
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria

from spec_compile import spec_compile
from spec_compile.errors import SpecCompileError
from spec_compile.hf_integration import capture
from spec_compile.runtime import turns

PROMPT = 11
GREEDY = {"max_new_tokens": 20, "do_sample": False}


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    return tiny_model("llama")


def compiled() -> PreTrainedModel:
    return spec_compile(tiny_model("llama"), min_ngram=1, num_steps=3, compile="none", adaptive=False)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return compiled()


class Once(StoppingCriteria):
    """Does something in mid-call, when the text has ``length`` tokens; stops nothing."""

    def __init__(self, length: int, action: Callable[[], object]) -> None:
        self.length, self.action, self.result = length, action, None

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        if input_ids.shape[1] == self.length:
            self.result = self.action()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def in_threads(actions: list[Callable[[], object]]) -> list[object]:
    """Results or exceptions of ``actions``, each in a thread of its own, all started at once."""
    results: list[object] = [None] * len(actions)

    def work(i: int) -> None:
        try:
            results[i] = actions[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a call never came back"
    return results


def test_threads_take_turns(reference, model) -> None:
    """Each pauses in the middle of its text, so that without turns all of them would be in there at once."""
    inputs = [left_padded(2, PROMPT, seed=seed) for seed in range(3)]
    expected = [reference.generate(**i, **GREEDY) for i in inputs]

    def call(i: dict) -> Callable[[], object]:
        pause = Once(PROMPT + 5, lambda: time.sleep(0.1))
        return lambda: model.generate(**i, **GREEDY, stopping_criteria=[pause])

    got = in_threads([call(i) for i in inputs])
    assert all(isinstance(g, Tensor) and torch.equal(g, e) for g, e in zip(got, expected, strict=True)), got


@pytest.mark.parametrize("extra", [{}, {"repetition_penalty": 1.2}], ids=["rounds", "lockstep"])
def test_a_call_within_a_call_runs_plain_and_disturbs_nothing(reference, model, extra: dict) -> None:
    inputs, others = left_padded(2, PROMPT), left_padded(1, 5, seed=1)
    inner = Once(PROMPT + 5, lambda: model.generate(**others, max_new_tokens=6, do_sample=False))
    model.spec._told.clear()
    with pytest.warns(UserWarning, match="runs as plain transformers: another call of the same model"):
        outer = model.generate(**inputs, **GREEDY, **extra, stopping_criteria=[inner])
    assert torch.equal(outer, reference.generate(**inputs, **GREEDY, **extra))
    assert torch.equal(inner.result, reference.generate(**others, max_new_tokens=6, do_sample=False))
    assert model.spec.stats().mode == ("lockstep" if extra else "rounds"), "the figures are the outer call's"
    model.generate(**inputs, **GREEDY)
    assert model.spec.stats().mode == "rounds", "and the next call is accelerated again"


def test_an_error_lets_the_next_thread_in(reference, model) -> None:
    def fail() -> None:
        raise RuntimeError("criterion failed")

    inputs = left_padded(1, PROMPT)
    with pytest.raises(RuntimeError, match="criterion failed"):
        model.generate(**inputs, **GREEDY, stopping_criteria=[Once(PROMPT + 5, fail)])
    (got,) = in_threads([lambda: model.generate(**inputs, **GREEDY)])
    assert torch.equal(got, reference.generate(**inputs, **GREEDY))


def test_remove_waits_for_the_running_call(reference) -> None:
    model = compiled()
    inputs, spec, removed = left_padded(2, PROMPT), model.spec, []
    remover = threading.Thread(target=lambda: removed.append(spec.remove()))

    def try_to_remove() -> None:
        with pytest.raises(SpecCompileError, match="from within generate"):
            spec.remove()
        remover.start()
        time.sleep(0.1)
        assert not removed

    out = model.generate(**inputs, **GREEDY, stopping_criteria=[Once(PROMPT + 5, try_to_remove)])
    remover.join(60)
    assert removed and not hasattr(model, "spec") and type(model) is type(reference)
    expected = reference.generate(**inputs, **GREEDY)
    assert torch.equal(out, expected) and torch.equal(model.generate(**inputs, **GREEDY), expected)
    spec.remove()  # once more changes nothing


@pytest.mark.parametrize("handle_lives", [True, False])
def test_a_call_that_had_found_the_loop_before_it_was_removed_runs_plain(reference, handle_lives: bool) -> None:
    model, inputs = compiled(), left_padded(1, PROMPT)
    late, spec = type(model)._sample, model.spec
    spec.remove()
    if not handle_lives:
        del spec
        gc.collect()
    with pytest.warns(UserWarning, match="came first") if handle_lives else nullcontext():
        got = model.generate(**inputs, **GREEDY, custom_generate=lambda model, input_ids, **kw: late(model, input_ids, **kw))
    assert torch.equal(got, reference.generate(**inputs, **GREEDY))


def test_models_are_captured_one_at_a_time(monkeypatch) -> None:
    """Capture works through process-wide registries of transformers, whichever model it is for."""
    inside, most = 0, 0
    original = capture.capture_context

    def counted(model: PreTrainedModel, batch: int):
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.05)
        inside -= 1
        return original(model, batch)

    monkeypatch.setattr(capture, "capture_context", counted)
    monkeypatch.setattr(trace_once, "sharing", False)
    models = [tiny_model("llama"), tiny_model("llama", seed=1)]
    got = in_threads([lambda m=m: spec_compile(m, compile="none") for m in models])
    assert got == models and most == 1


@pytest.mark.parametrize("extra", [{}, {"repetition_penalty": 1.2}], ids=["rounds", "lockstep"])
@pytest.mark.parametrize("where", ["criterion", "streamer", "processor"])
def test_who_is_waited_for_does_not_wait(reference, model, monkeypatch, where: str, extra: dict) -> None:
    """A judge in a thread pool asks the same model, and the call that asked waits for the answer."""
    monkeypatch.setattr(turns, "PATIENCE", 0.1)
    inputs, others = left_padded(1, PROMPT), left_padded(1, 5, seed=1)
    answers = []

    def ask(length: int, text: Tensor | None = None) -> None:
        if length == PROMPT + 5:
            answers.extend(in_threads([lambda: model.generate(**others, max_new_tokens=6, do_sample=False)]))

    model.generate(**inputs, **GREEDY, **extra)  # compiles
    model.spec._told.clear()
    with pytest.warns(UserWarning, match="may be waiting for this one"):
        outer = model.generate(**inputs, **GREEDY, **extra, **_calling(where, ask))
    assert torch.equal(outer, reference.generate(**inputs, **GREEDY, **extra))
    assert torch.equal(answers[0], reference.generate(**others, max_new_tokens=6, do_sample=False))


def _calling(where: str, ask: Callable[[int], None]) -> dict[str, object]:
    """An argument of ``generate()`` that calls ``ask`` with the text's length."""
    if where == "criterion":
        return {"stopping_criteria": [Once(PROMPT + 5, lambda: ask(PROMPT + 5))]}
    if where == "processor":
        return {"logits_processor": [lambda input_ids, scores: (ask(input_ids.shape[1]), scores)[1]]}

    class Streamer:
        length = 0

        def put(self, value: Tensor) -> None:
            self.length += value.numel()
            ask(self.length)

        def end(self) -> None:
            pass

    return {"streamer": Streamer()}


def test_a_removal_that_a_call_waits_for_is_an_error(reference, monkeypatch) -> None:
    monkeypatch.setattr(turns, "PATIENCE", 0.1)
    model, inputs = compiled(), left_padded(1, PROMPT)
    removal = Once(PROMPT + 5, lambda: in_threads([model.spec.remove]))
    text = model.generate(**inputs, **GREEDY, stopping_criteria=[removal])
    assert torch.equal(text, reference.generate(**inputs, **GREEDY))
    (error,) = removal.result
    assert isinstance(error, SpecCompileError) and "when that generate() has returned" in str(error)
    assert model.spec.stats().mode == "rounds"
    model.spec.remove()


def test_a_call_that_computes_is_waited_for_however_long(monkeypatch) -> None:
    """Compiling takes minutes, and nobody waits for anybody then."""
    monkeypatch.setattr(turns, "PATIENCE", 0.02)
    line, order = turns.Turns(), []

    def first() -> None:
        with line.take():
            started.set()
            time.sleep(0.1)
            order.append("first")

    def second() -> None:
        started.wait()
        with line.take() as turn:
            order.append(turn)

    started = threading.Event()
    in_threads([first, second])
    assert order == ["first", True]
