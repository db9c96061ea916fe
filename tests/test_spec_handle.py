"""``model.spec``: what it reports, what an error leaves behind, and what a compiled model still is to everyone else."""

from __future__ import annotations

import gc
import io
import pickle
import re
import time
import warnings
import weakref

import pytest
import torch
from tiny import left_padded, tiny_model
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, PreTrainedModel

from spec_compile import spec_compile
from spec_compile.errors import RanPlainError
from spec_compile.hardware import Hardware
from spec_compile.hf_integration.caches import RESULT_CACHE, cache_argument
from spec_compile.ops import providers
from spec_compile.runtime import model_runner
from spec_compile.runtime.stats import SpecStats, accelerated

PROMPT = 11


@pytest.fixture(scope="module")
def pair() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A plain model and the same one compiled with n-gram drafts."""
    model = spec_compile(tiny_model("llama"), draft="ngram", min_ngram=1, num_steps=3, compile="none", adaptive=False)
    return tiny_model("llama"), model


# ----------------------------------------------------------------------------------------------------------------------
# Still the same model to everyone else


def test_pickle_gives_the_plain_model(pair) -> None:
    """``pickle`` and ``torch.save`` of a compiled model write the transformers model: nothing of ours is needed to load it."""
    reference, model = pair
    inputs = left_padded(2, PROMPT)
    plain = reference.generate(**inputs, max_new_tokens=6, do_sample=False)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    written = pickle.dumps(model)
    assert b"spec_compile" not in written
    for twin in (pickle.loads(written), torch.load(file, weights_only=False)):
        assert type(twin) is type(reference) and not hasattr(twin, "spec")
        assert torch.equal(twin.generate(**inputs, max_new_tokens=6, do_sample=False), plain)
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), plain)
    assert model.spec.stats().mode == "rounds", "writing a model down changes nothing about it"


# ----------------------------------------------------------------------------------------------------------------------
# Requests that run plain


def _with_embeddings(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, object]:
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    return {"inputs_embeds": embedded, "attention_mask": inputs["attention_mask"]}


def _with_assistant(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, object]:
    return {**inputs, "assistant_model": tiny_model("llama", seed=1)}


def _with_cache(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, object]:
    """A conversation goes on: all but the last two prompt tokens are in the caller's cache."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=inputs["input_ids"][:, :-2], **{cache_argument(model.forward): cache})
    return {**inputs, RESULT_CACHE: cache}


@pytest.mark.parametrize(
    ("request_of", "why"),
    [(_with_embeddings, "inputs_embeds"), (_with_assistant, "assisted generation"), (_with_cache, "cache")],
)
def test_requests_that_run_plain_say_so_once(pair, request_of, why: str) -> None:
    reference, model = pair
    inputs = left_padded(1, PROMPT)
    plain = reference.generate(**request_of(reference, inputs), max_new_tokens=6, do_sample=False)
    with pytest.warns(UserWarning, match=rf"runs as plain transformers: .*{why}"):
        ours = model.generate(**request_of(model, inputs), max_new_tokens=6, do_sample=False)
    assert torch.equal(ours, plain) and model.spec.stats().mode == "plain"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(**request_of(model, inputs), max_new_tokens=6, do_sample=False)
        model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert model.spec.stats().mode == "rounds", "the next ordinary call is accelerated again"


def test_what_an_accelerated_call_does_not_give_is_said_once(pair) -> None:
    model, inputs = pair[1], left_padded(2, PROMPT)
    settings = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "prefill_chunk_size": 4}
    with pytest.warns(UserWarning) as told:
        ours = model.generate(**inputs, **settings)
    texts = [str(w.message) for w in told if "spec_compile" in str(w.message)]
    assert len(texts) == 2 and f"{RESULT_CACHE} of the result" in texts[0] and "prefill_chunk_size" in texts[1]
    assert getattr(ours, RESULT_CACHE) is None and model.spec.stats().mode == "rounds"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(**inputs, **settings)
        with model.spec.disable():
            plain = model.generate(**inputs, **settings)
    assert torch.equal(ours.sequences, plain.sequences)
    assert getattr(plain, RESULT_CACHE).get_seq_length() == PROMPT + 5, "the remedy that the warning names"


# ----------------------------------------------------------------------------------------------------------------------
# What is left behind


def test_nothing_outlives_remove_or_the_model() -> None:
    """Pools and graphs go with ``remove()``, weights with the model, though Dynamo keeps the classes it has traced."""
    model = spec_compile(tiny_model("llama"), num_steps=1, compile="none")
    model.generate(**left_padded(1, PROMPT), max_new_tokens=4, do_sample=False)
    engine, runner, handle = (weakref.ref(x) for x in (model.spec._engine, model.spec._engine.target, model.spec))
    model.spec.remove()
    gc.collect()
    assert engine() is None and runner() is None and handle() is None
    weights = weakref.ref(spec_compile(model, compile="none"))
    del model
    gc.collect()
    assert weights() is None


def test_a_model_compiled_in_inference_mode_can_be_trained() -> None:
    model = tiny_model("llama")
    with torch.inference_mode():
        spec_compile(model, compile="none", draft=None)
        model.generate(**left_padded(1, PROMPT), max_new_tokens=4, do_sample=False)
    ids = left_padded(1, PROMPT)["input_ids"]
    model(ids, labels=ids).loss.backward()
    assert not any(p.is_inference() for p in model.parameters())


@pytest.mark.parametrize("extra", [{}, {"repetition_penalty": 1.2}, {"do_sample": True}], ids=["rounds", "lockstep", "sample"])
def test_a_default_device_changes_nothing(pair, extra: dict) -> None:
    """``torch.set_default_device("cuda")`` is common; here the default is a device that nothing can run on."""
    model, inputs = pair[1], left_padded(2, PROMPT)
    settings = {"max_new_tokens": 6, "do_sample": False, **extra}
    torch.manual_seed(0)
    expected = model.generate(**inputs, **settings)
    call = model.spec._loop

    def under_a_default(*args, **kwargs):
        with torch.device("meta"):
            return call(*args, **kwargs)

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:  # around our loop only: what is before it is transformers' own
        patch.setattr(type(model), "_sample", lambda self, *args, **kwargs: under_a_default(self, None, None, *args, **kwargs))
        got = model.generate(**inputs, **settings)
    assert torch.equal(got, expected)


# ----------------------------------------------------------------------------------------------------------------------
# Reports


def test_explain_names_provider_graph_and_reason(pair) -> None:
    model = pair[1]
    model.generate(**left_padded(3, PROMPT), max_new_tokens=6, do_sample=False)
    text = model.spec.explain()
    assert re.search(r"^draft: ngram, 3 tokens a round$", text, re.M)
    assert "target graph: prefill" in text and "target graph: verify, 3 rows × 4 tokens" in text
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if "(attention," in line)
    assert re.match(r"  layers 0–1 \(attention, 4/2 heads × 16, float32, 3 rows × 4 tokens, .*slots a row\)$", lines[first])
    assert re.match(r"    torch: first of torch on cpu; ", lines[first + 1])
    losers = re.findall(r"^    not ([\w, ]+): (.+)$", text, re.M)
    named = {name for names, _ in losers for name in names.split(", ")}
    assert named == set(providers.PROVIDERS) - {"torch"} and all(reason for _, reason in losers)


def test_stats_read_well(pair) -> None:
    model = pair[1]
    model.generate(**left_padded(2, PROMPT), max_new_tokens=6, do_sample=False)
    stats = model.spec.stats()
    text = str(stats)
    assert text.startswith(f"tokens         12 in {stats.rounds} rounds\n") and "GPU idle" not in text
    assert f"accept length  {stats.accept_length:.2f} tokens a row and round" in text
    drafted = sum(count > 0 for row in stats.accept_lengths for count in row)
    assert 0 < stats.drafted_rounds <= drafted == sum(map(len, stats.accept_lengths))
    assert f"row and round, drafts in {stats.drafted_rounds} of {drafted}\n" in text
    with model.spec.disable():
        model.generate(**left_padded(1, PROMPT), max_new_tokens=2, do_sample=False)
    assert str(model.spec.stats()) == "plain transformers generate(): nothing was measured"
    with torch.autocast("cpu", torch.bfloat16):
        model.generate(**left_padded(1, PROMPT), max_new_tokens=2, do_sample=False)
    assert re.match(r"plain transformers generate\(\) \(torch.autocast is on", str(model.spec.stats()))


def test_figures_are_told_of_accelerated_calls_alone(pair) -> None:
    model, told = pair[1], "was to be accelerated and ran as plain transformers"
    model.generate(**left_padded(1, PROMPT), max_new_tokens=2, do_sample=False)
    assert accelerated(model.spec.stats()) is model.spec.stats()
    model.generate(**left_padded(1, PROMPT), max_new_tokens=2, num_beams=2, do_sample=False)
    with pytest.raises(RanPlainError, match=f"{told}: beam search"):
        accelerated(model.spec.stats())
    with model.spec.disable():
        model.generate(**left_padded(1, PROMPT), max_new_tokens=2, do_sample=False)
    with pytest.raises(RanPlainError, match=f"{told}: model.spec is switched off"):
        accelerated(model.spec.stats())
    with pytest.raises(RanPlainError, match=f"{told}: the installed transformers did not reach the decode loop"):
        accelerated(SpecStats())


def test_tracing_counts_as_compiling(monkeypatch) -> None:
    """A first call's speed is that of the call, whatever its graphs cost to make."""
    slept = []
    for name in ("capture_prefill", "capture_window"):
        capture = getattr(model_runner, name)

        def slow(*args, capture=capture):
            time.sleep(0.2)
            slept.append(0.2)
            return capture(*args)

        monkeypatch.setattr(model_runner, name, slow)
    model = spec_compile(tiny_model("llama", num_hidden_layers=1), draft="ngram", compile="none", adaptive=False)
    begin = time.perf_counter()
    model.generate(**left_padded(1, PROMPT), max_new_tokens=4, do_sample=False)
    wall, stats = time.perf_counter() - begin, model.spec.stats()
    assert len(slept) >= 2 and stats.compile_seconds >= sum(slept)
    assert stats.total_ms / 1e3 <= wall - 0.2 and stats.prefill_ms <= stats.total_ms


def test_what_it_shows_of_itself() -> None:
    model = spec_compile(tiny_model("llama", num_hidden_layers=1), draft="ngram", compile="none")
    spec = model.spec
    assert re.fullmatch(r"<spec_compile on: draft ngram, .+>", repr(spec))
    assert str(spec.stats()) == "no generate() call has ended yet"
    with spec.disable():
        assert repr(spec).startswith("<spec_compile off: ")
    spec.remove()
    assert repr(spec).startswith("<spec_compile removed: ")


def test_explain_says_when_rounds_have_no_graphs(monkeypatch) -> None:
    """A GPU in name: its captures failed, or were not wanted."""
    for wanted, words in ((True, "a capture failed"), (False, "cuda_graphs=False")):
        model = spec_compile(tiny_model("llama"), compile="none", cuda_graphs=wanted)
        assert "CUDA graphs" not in model.spec.explain(), "a CPU has none"
        monkeypatch.setattr(model.spec._engine, "hardware", Hardware("nvidia", "sm90", 132, "NVIDIA H200"))
        assert f"no CUDA graphs ({words}" in model.spec.explain()


def test_explain_names_the_layers_that_differ() -> None:
    """Layers that need different things of a kernel are told apart: gpt-oss's sliding and full ones, and its sinks."""
    model = spec_compile(tiny_model("gpt_oss"), compile="none")
    lines = [line for line in model.spec.explain().splitlines() if "prefill_attention," in line]
    assert len(lines) == 2
    assert "layer 0 " in lines[0] and "window 16" in lines[0] and "sinks" in lines[0]
    assert "layer 1 " in lines[1] and "window" not in lines[1] and "sinks" in lines[1]


# ----------------------------------------------------------------------------------------------------------------------
# Errors mid-way


class Collector:
    """A streamer that keeps what it was shown."""

    def __init__(self) -> None:
        self.columns: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.columns.append(value if value.dim() == 2 else value[:, None])

    def end(self) -> None:
        self.ended = True


class FailsAt(LogitsProcessor):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] == self.length:
            raise RuntimeError("processor failed")
        return scores


def test_a_processor_that_raises_loses_no_token(pair) -> None:
    """The exception reaches the caller, streamer and ``partial_sequences()`` have every token shown, the next call works."""
    reference, model = pair
    inputs, streamer = left_padded(1, PROMPT), Collector()
    plain = reference.generate(**inputs, max_new_tokens=9, do_sample=False)
    with pytest.raises(RuntimeError, match="processor failed"):
        model.generate(**inputs, max_new_tokens=20, do_sample=False, logits_processor=[FailsAt(PROMPT + 9)], streamer=streamer)
    assert torch.equal(torch.cat(streamer.columns, 1), plain) and not streamer.ended
    assert torch.equal(model.spec.partial_sequences(), plain)
    assert torch.equal(model.generate(**inputs, max_new_tokens=9, do_sample=False), plain)


def test_a_streamer_that_raises_loses_no_token(pair) -> None:
    """Ctrl-C arrives wherever it likes, here in the streamer's hands: what was made is still there."""
    reference, model = pair

    class Interrupted(Collector):
        def put(self, value: Tensor) -> None:
            super().put(value)
            if len(self.columns) == 8:
                raise KeyboardInterrupt

    inputs = left_padded(1, PROMPT)
    plain = reference.generate(**inputs, max_new_tokens=7, do_sample=False)
    with pytest.raises(KeyboardInterrupt):
        model.generate(**inputs, max_new_tokens=20, do_sample=False, streamer=Interrupted())
    assert torch.equal(model.spec.partial_sequences(), plain)
    assert torch.equal(model.generate(**inputs, max_new_tokens=7, do_sample=False), plain)
