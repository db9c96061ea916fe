"""What callers of ``generate()`` rely on: the same results as plain transformers for everything they may ask for."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from tiny import left_padded, tiny_model
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    pipeline,
)
from transformers.generation import stopping_criteria

from spec_compile import SpecConfig, spec_compile
from spec_compile.errors import BackendError, ConfigError, DraftError, SpecCompileError
from spec_compile.hf_integration.generate import why_plain

PROMPT = 11


@pytest.fixture(scope="module")
def pair():
    """A plain model and the same one compiled with n-gram drafts."""
    model = spec_compile(tiny_model("llama"), draft="ngram", min_ngram=1, num_steps=3, compile="none", adaptive=False)
    return tiny_model("llama"), model


def assert_same(pair, inputs, mode: str = "rounds", **settings) -> torch.Tensor:
    reference, model = pair
    settings = {"max_new_tokens": 20, "do_sample": False} | settings
    plain = reference.generate(**inputs, **copy.deepcopy(settings))
    ours = model.generate(**inputs, **settings)
    assert model.spec.stats().mode == mode
    assert torch.equal(plain, ours)
    return plain


# ----------------------------------------------------------------------------------------------------------------------
# Lengths and ends


@pytest.mark.parametrize("settings", [{"max_new_tokens": 1}, {"max_new_tokens": 2}, {"max_length": 25, "max_new_tokens": None}])
def test_lengths(pair, settings: dict) -> None:
    assert_same(pair, left_padded(3, PROMPT), **settings)


@pytest.mark.parametrize(("context", "told"), [(7, True), (8, False)])
@pytest.mark.parametrize("extra", [{}, {"repetition_penalty": 1.1}], ids=["rounds", "lockstep"])
def test_a_text_longer_than_the_models_context_is_told_as_by_plain_generate(
    context: int, told: bool, extra: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(stopping_criteria.logger, "warning_once", said.append)
    model = tiny_model("llama", num_hidden_layers=1, max_position_embeddings=context)
    inputs = left_padded(1, 4)
    model.generate(**inputs, max_new_tokens=5, do_sample=False, **extra)
    plain = set(said)
    said.clear()
    spec_compile(model, compile="none", num_steps=2).generate(**inputs, max_new_tokens=5, do_sample=False, **extra)
    assert set(said) == plain and bool(plain) == told


@pytest.mark.parametrize("limits", [[PROMPT], [5], [0], [14, 25], [25, 14]])
def test_length_criteria_of_the_caller(pair, limits: list[int]) -> None:
    """The shortest one ends the text, and one token comes even where none would fit."""
    criteria = StoppingCriteriaList([MaxLengthCriteria(limit) for limit in limits])
    text = assert_same(pair, left_padded(3, PROMPT), max_new_tokens=None, stopping_criteria=criteria)
    assert text.shape[1] == max(min(limits), PROMPT + 1)


def test_min_new_tokens_and_several_end_ids(pair) -> None:
    inputs = left_padded(3, PROMPT)
    text = assert_same(pair, inputs)
    ends = [int(text[0, PROMPT + 2]), int(text[1, PROMPT + 4]), int(text[2, PROMPT + 1])]
    assert_same(pair, inputs, eos_token_id=ends)
    assert_same(pair, inputs, eos_token_id=ends, min_new_tokens=7)
    assert_same(pair, inputs, eos_token_id=ends, min_length=PROMPT + 7)


class StopAt(StoppingCriteria):
    """Stops each row behind its own number of new tokens, and counts its calls."""

    def __init__(self, limits: list[int]) -> None:
        self.limits, self.calls = limits, 0

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        self.calls += 1
        return torch.tensor([input_ids.shape[1] - PROMPT >= limit for limit in self.limits], device=input_ids.device)


@pytest.mark.parametrize("end", [None, 5])
def test_custom_criteria_cut_at_the_right_token(pair, end: int | None) -> None:
    inputs, limits = left_padded(3, PROMPT), [4, 9, 6]
    assert_same(pair, inputs, stopping_criteria=StoppingCriteriaList([StopAt(limits)]), eos_token_id=end)
    ours, plain = StopAt(limits), StopAt(limits)
    pair[0].generate(**inputs, max_new_tokens=20, do_sample=False, stopping_criteria=[plain])
    pair[1].generate(**inputs, max_new_tokens=20, do_sample=False, stopping_criteria=[ours])
    assert ours.calls == plain.calls == 9


class Recorder:
    """A streamer that keeps everything it is given."""

    def __init__(self) -> None:
        self.events: list = []

    def put(self, value: torch.Tensor) -> None:
        self.events.append(value.tolist())

    def end(self) -> None:
        self.events.append("end")


@pytest.mark.parametrize("batch", [1, 3])
def test_streamer_sees_what_plain_generate_shows(pair, batch: int) -> None:
    inputs, plain, ours = left_padded(batch, PROMPT), Recorder(), Recorder()
    pair[0].generate(**inputs, max_new_tokens=12, do_sample=False, streamer=plain)
    pair[1].generate(**inputs, max_new_tokens=12, do_sample=False, streamer=ours)
    assert ours.events == plain.events and ours.events[-1] == "end"


# ----------------------------------------------------------------------------------------------------------------------
# Processors, scores


class Spy(LogitsProcessor):
    """A stateful processor: forbids a token that depends on how often it was called, and records its arguments."""

    def __init__(self) -> None:
        self.seen: list = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(input_ids.tolist())
        scores = scores.clone()
        scores[:, len(self.seen) % scores.shape[1]] = -float("inf")
        scores[:, int(scores[0].argmax())] -= 0.5 * (len(self.seen) % 3)
        return scores


@pytest.mark.parametrize("batch", [1, 3])
def test_processors_are_called_once_a_token_as_in_plain_generate(pair, batch: int) -> None:
    inputs, plain, ours = left_padded(batch, PROMPT), Spy(), Spy()
    a = pair[0].generate(**inputs, max_new_tokens=15, do_sample=False, logits_processor=LogitsProcessorList([plain]))
    b = pair[1].generate(**inputs, max_new_tokens=15, do_sample=False, logits_processor=LogitsProcessorList([ours]))
    assert torch.equal(a, b) and ours.seen == plain.seen and len(ours.seen) == 15
    assert pair[1].spec.stats().mode == "lockstep"


def test_repetition_penalty_and_bad_words(pair) -> None:
    assert_same(pair, left_padded(3, PROMPT), "lockstep", repetition_penalty=1.4)
    assert_same(pair, left_padded(3, PROMPT), "lockstep", bad_words_ids=[[5], [7, 9]], no_repeat_ngram_size=2)


def test_scores_and_logits(pair) -> None:
    inputs = left_padded(3, PROMPT)
    end = int(pair[0].generate(**inputs, max_new_tokens=20, do_sample=False)[0, PROMPT + 3])
    settings = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "eos_token_id": end}
    settings |= {"output_scores": True, "output_logits": True, "repetition_penalty": 1.2}
    plain, ours = (m.generate(**inputs, **settings) for m in pair)
    assert torch.equal(plain.sequences, ours.sequences) and len(plain.scores) == len(ours.scores) == len(ours.logits)
    for name in ("scores", "logits"):
        for a, b in zip(getattr(plain, name), getattr(ours, name), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Ways in


def test_custom_generate(pair) -> None:
    reference, model = pair
    inputs = left_padded(3, PROMPT)
    plain = reference.generate(**inputs, max_new_tokens=12, do_sample=False)
    ours = model.generate(**inputs, max_new_tokens=12, do_sample=False, custom_generate=model.spec.generate_loop)
    assert torch.equal(plain, ours) and model.spec.stats().rounds > 0
    own = model.generate(**inputs, max_new_tokens=12, custom_generate=lambda model, input_ids, **kwargs: input_ids[:, :3])
    assert own.shape == (3, 3)


def test_num_return_sequences_and_inference_mode(pair) -> None:
    inputs = left_padded(2, PROMPT)
    torch.manual_seed(1)
    with torch.inference_mode():
        out = pair[1].generate(**inputs, max_new_tokens=6, do_sample=True, num_return_sequences=4)
    assert out.shape == (8, PROMPT + 6) and len({tuple(row) for row in out[:4].tolist()}) > 1
    assert_same(pair, inputs)


def byte_tokenizer():
    """A tokenizer of single printable ASCII characters and a padding token: 96 ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = [chr(code) for code in range(33, 127)] + ["\u0120"]  # ByteLevel's name for a space
    raw = Tokenizer(models.BPE({"<pad>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", padding_side="left")


def test_text_generation_pipeline_and_stop_strings(pair) -> None:
    (reference, model), tokenizer, texts = pair, byte_tokenizer(), ["Hello there", "Hi"]
    written = [
        pipeline("text-generation", model=m, tokenizer=tokenizer)(texts, max_new_tokens=12, do_sample=False, batch_size=2)
        for m in (reference, model)
    ]
    assert written[0] == written[1] and model.spec.stats().mode == "rounds"
    inputs = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    plain = reference.generate(**inputs, max_new_tokens=12, do_sample=False)
    stop = tokenizer.decode(plain[0, -6:-4])
    settings = {"max_new_tokens": 12, "do_sample": False, "stop_strings": [stop], "tokenizer": tokenizer}
    plain, ours = (m.generate(**inputs, **settings) for m in (reference, model))
    assert torch.equal(plain, ours) and model.spec.stats().mode == "rounds"


# ----------------------------------------------------------------------------------------------------------------------
# What is not accelerated runs plain, and says so once


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"num_beams": 2}, "beam search"),
        ({"use_cache": False}, "use_cache"),
        ({"return_dict_in_generate": True, "output_hidden_states": True}, "output_hidden_states"),
        ({"prompt_lookup_num_tokens": 3}, "assisted generation"),
    ],
)
def test_plain_fallbacks(settings: dict, why: str) -> None:
    reference = tiny_model("llama")
    model = spec_compile(tiny_model("llama"), compile="none")
    inputs = left_padded(1, PROMPT)
    with pytest.warns(UserWarning, match=why):
        ours = model.generate(**inputs, max_new_tokens=6, do_sample=False, **settings)
    plain = reference.generate(**inputs, max_new_tokens=6, do_sample=False, **settings)
    assert torch.equal(getattr(ours, "sequences", ours), getattr(plain, "sequences", plain))
    assert model.spec.stats().mode == "plain"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(**inputs, max_new_tokens=6, do_sample=False, **settings)


def test_autocast_runs_plain_and_leaves_no_trace() -> None:
    """Graphs that were traced or compiled under it would serve later calls with its rounding."""
    settings = left_padded(1, PROMPT) | {"max_new_tokens": 4, "do_sample": False}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    reference, model = tiny_model("gpt2", n_layer=1), tiny_model("gpt2", n_layer=1)
    with torch.autocast("cpu", torch.bfloat16):
        spec_compile(model, draft=None, compile="none")
        with pytest.warns(UserWarning, match="torch.autocast is on"):
            ours = model.generate(**settings)
        assert model.spec.stats().mode == "plain"
        rounded = torch.stack(reference.generate(**settings).logits)
        assert torch.equal(torch.stack(ours.logits), rounded)
    exact = torch.stack(reference.generate(**settings).logits)
    torch.testing.assert_close(torch.stack(model.generate(**settings).logits), exact, rtol=1e-5, atol=1e-5)
    assert model.spec.stats().mode == "lockstep" and (rounded - exact).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "accelerated"),
    [("quantized", False), ("offloaded", False), ("offloaded_static", False), ("static", True), ("dynamic", True)],
)
def test_caches_that_save_memory_are_not_replaced(pair, name: str, accelerated: bool) -> None:
    """Who asks for a smaller cache must not get a full one; the other kinds differ in speed only."""
    config = GenerationConfig(cache_implementation=name, max_length=20)
    reason = why_plain(pair[0], left_padded(1, PROMPT)["input_ids"], config, False, {}, None)
    assert reason is None if accelerated else f"cache_implementation={name!r}" in reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int32])
def test_masks_of_any_type(pair, dtype: torch.dtype) -> None:
    inputs = left_padded(3, PROMPT)
    assert_same(pair, {**inputs, "attention_mask": inputs["attention_mask"].to(dtype)})


def test_gaps_in_the_mask_and_callers_cache_run_plain(pair) -> None:
    reference, model = pair
    inputs = left_padded(2, PROMPT)
    gaps = inputs["attention_mask"].clone()
    gaps[0, 4] = 0
    with pytest.warns(UserWarning, match="gaps"):
        ours = model.generate(inputs["input_ids"], attention_mask=gaps, max_new_tokens=6, do_sample=False)
    assert torch.equal(ours, reference.generate(inputs["input_ids"], attention_mask=gaps, max_new_tokens=6, do_sample=False))


# ----------------------------------------------------------------------------------------------------------------------
# model.spec


def test_switching_off_and_removing() -> None:
    cls = type(tiny_model("llama"))
    model = spec_compile(tiny_model("llama"), compile="none")
    inputs = left_padded(1, PROMPT)
    assert isinstance(model, cls) and type(model).__name__ == cls.__name__
    with model.spec.disable():
        model.generate(**inputs, max_new_tokens=4)
        assert model.spec.stats().mode == "plain"
        with model.spec.enable():
            model.generate(**inputs, max_new_tokens=4)
            assert model.spec.stats().mode == "rounds"
    model.generate(**inputs, max_new_tokens=4)
    assert model.spec.stats().mode == "rounds"
    model.spec.disable()
    model.generate(**inputs, max_new_tokens=4)
    assert model.spec.stats().mode == "plain"
    model.spec.remove()
    assert type(model) is cls and not hasattr(model, "spec")


def test_compiling_again_replaces(pair) -> None:
    model = spec_compile(spec_compile(tiny_model("llama"), compile="none"), draft=None, compile="none")
    assert type(model).__mro__[1] is type(tiny_model("llama"))
    assert_same((pair[0], model), left_padded(3, PROMPT))
    assert model.spec.stats().accept_length == 1.0


@pytest.mark.parametrize("wrong", [{"draft": "/no/such/draft"}, {"backend": "fa9"}, {"max_ngram": 65}])
def test_compiling_again_with_what_cannot_be_leaves_what_was(wrong: dict) -> None:
    model = spec_compile(tiny_model("llama", num_hidden_layers=1), draft=None, compile="none")
    before = model.spec
    with pytest.raises(SpecCompileError):
        spec_compile(model, **{"compile": "none", **wrong})
    assert model.spec is before
    model.generate(**left_padded(1, 4), max_new_tokens=2, do_sample=False)
    assert model.spec.stats().mode == "rounds"


def test_stats_count_what_was_emitted(pair) -> None:
    out = assert_same(pair, left_padded(3, PROMPT))
    stats = pair[1].spec.stats()
    new = out.numel() - 3 * PROMPT
    assert stats.emitted_tokens == new
    assert sum(map(sum, stats.accept_lengths)) == new - 3, "all but prefill's token of each row"
    verifies = sum(map(len, stats.accept_lengths))
    assert stats.accept_length == pytest.approx((new - 3) / verifies)
    assert len(stats.acceptance_by_position) == 3
    assert all(a >= b for a, b in zip(stats.acceptance_by_position, stats.acceptance_by_position[1:], strict=False))
    assert "torch" in pair[1].spec.explain() and "ngram" in pair[1].spec.explain()


@pytest.mark.parametrize(
    ("settings", "mode"),
    [
        ({"stopping_criteria": [StopAt([5, 5, 5])]}, "rounds"),
        ({"stopping_criteria": [StopAt([4, 9, 6])], "eos_token_id": 5}, "rounds"),
        ({"eos_token_id": "row 0 ends early", "repetition_penalty": 1.0001}, "lockstep"),
    ],
)
def test_stats_count_what_the_caller_gets(pair, settings: dict, mode: str) -> None:
    """Neither what a criterion cuts off nor the padding behind a row that is done."""
    inputs = left_padded(3, PROMPT)
    ends = isinstance(settings.get("eos_token_id"), str)
    if ends:
        end = int(pair[0].generate(**inputs, max_new_tokens=20, do_sample=False)[0, PROMPT + 3])
        settings = settings | {"eos_token_id": end}
    new = assert_same(pair, inputs, mode, **settings)[:, PROMPT:].tolist()
    if ends:
        got = [row.index(end) + 1 if end in row else len(row) for row in new]
        assert min(got) <= 4 < max(got)
    else:
        limits = settings["stopping_criteria"][0].limits
        got = limits if "eos_token_id" in settings else [len(row) for row in new]
    stats = pair[1].spec.stats()
    assert stats.emitted_tokens == sum(got)
    assert [sum(row) + 1 for row in stats.accept_lengths] == got
    assert stats.tokens_per_second == pytest.approx(sum(got) / stats.total_ms * 1e3)


@pytest.mark.parametrize(("num_steps", "batch"), [(5, 1), (5, 3), (2, 1)])
def test_a_perfect_draft_takes_the_fewest_rounds(num_steps: int, batch: int) -> None:
    """The target drafts for itself: n tokens behind the first take exactly ceil(n / (num_steps + 1)) rounds."""
    model = spec_compile(tiny_model("llama"), draft=tiny_model("llama"), num_steps=num_steps, compile="none")
    model.generate(**left_padded(batch, PROMPT), max_new_tokens=40, do_sample=False)
    assert model.spec.stats().rounds == math.ceil(39 / (num_steps + 1))


def test_an_error_mid_way_loses_nothing_and_breaks_nothing(pair) -> None:
    class Failing(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if input_ids.shape[1] == PROMPT + 8:
                raise RuntimeError("criterion failed")
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    inputs = left_padded(2, PROMPT)
    plain = pair[0].generate(**inputs, max_new_tokens=8, do_sample=False)
    with pytest.raises(RuntimeError, match="criterion failed"):
        pair[1].generate(**inputs, max_new_tokens=20, do_sample=False, stopping_criteria=[Failing()])
    assert torch.equal(pair[1].spec.partial_sequences(), plain)
    assert_same(pair, inputs)


def test_a_copy_is_the_plain_model(pair) -> None:
    reference, model = pair
    assert_same(pair, left_padded(2, PROMPT))
    before = model.spec.stats()
    with pytest.warns(UserWarning, match="a copy of a compiled model is a plain model"):
        twin = copy.deepcopy(model)
    assert type(twin) is type(reference) and not hasattr(twin, "spec")
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert_same((reference, spec_compile(twin, compile="none")), left_padded(2, PROMPT))
    assert type(twin).__mro__[1] is type(reference), "one swapped class, not two"
    assert type(pickle.loads(pickle.dumps(twin))) is type(reference)
    assert model.spec.stats() is before, "the original does not notice"


def _replaced_weight(model: PreTrainedModel) -> Callable[[], None]:
    before = model.lm_head.weight
    model.lm_head.weight = torch.nn.Parameter(-before)
    return lambda: setattr(model.lm_head, "weight", before)


def _replaced_buffer(model: PreTrainedModel) -> Callable[[], None]:
    before = model.model.rotary_emb.inv_freq
    model.model.rotary_emb.inv_freq = before * 0.3
    return lambda: setattr(model.model.rotary_emb, "inv_freq", before)


def _hook(model: PreTrainedModel) -> Callable[[], None]:
    return model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: out * 0).remove


def _pre_hook(model: PreTrainedModel) -> Callable[[], None]:
    return model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: (args[0] * 2,)).remove


def _patched_forward(model: PreTrainedModel) -> Callable[[], None]:
    norm = model.model.norm
    norm.forward = lambda x: -type(norm).forward(norm, x)
    return lambda: delattr(norm, "forward")


class Adapter(torch.nn.Linear):
    """As PEFT's layers: what it computes hangs on a Python attribute of the instance."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (-1.0 if self._disable_adapters else 1.0)


def _switched_adapter(model: PreTrainedModel) -> Callable[[], None]:
    model.lm_head._disable_adapters = True
    return lambda: setattr(model.lm_head, "_disable_adapters", False)


def test_a_model_that_changed_runs_plain_until_the_change_is_undone() -> None:
    """Captured graphs would go on with what the model was."""
    model, inputs = tiny_model("llama"), left_padded(2, PROMPT)
    model.lm_head.__class__, model.lm_head._disable_adapters = Adapter, False
    spec_compile(model, compile="none", min_ngram=1, num_steps=2, adaptive=False)
    settings = {"max_new_tokens": 6, "do_sample": False}
    before = model.generate(**inputs, **settings)
    names = {
        _replaced_weight: r"lm_head\.weight",
        _replaced_buffer: r"model\.rotary_emb\.inv_freq",
        _hook: r"the forward hooks of model\.layers\.0\.mlp",
        _pre_hook: r"the forward hooks of model\.layers\.1\.mlp",
        _patched_forward: r"model\.norm\.forward",
        _switched_adapter: r"lm_head\._disable_adapters \(True, was False\)",
    }
    for change, name in names.items():
        undo = change(model)
        with model.spec.disable():
            plain = model.generate(**inputs, **settings)
        assert not torch.equal(plain, before), f"{change.__name__} matters"
        with pytest.warns(UserWarning, match=rf"moved, replaced or changed since: {name}\. Undo that, or call spec_compile"):
            assert torch.equal(model.generate(**inputs, **settings), plain), change.__name__
        undo()
        assert torch.equal(model.generate(**inputs, **settings), before)
        assert model.spec.stats().mode == "rounds", f"{change.__name__} is undone"


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (ConfigError, "num_steps=0", {"num_steps": 0}),
        (ConfigError, "unknown options.*num_step", {"num_step": 3}),
        (ConfigError, "compile='fast'", {"compile": "fast"}),
        (BackendError, "'fa9' is not a provider.*torch", {"backend": "fa9"}),
        (BackendError, "unknown stages", {"backend": {"decode": "torch"}}),
        (DraftError, "none of 'ngram', 'mtp' and None", {"draft": "no/such-model"}),
        (DraftError, "do not share a tokenizer", {"draft": "other vocabulary"}),
    ],
)
def test_errors_name_argument_and_remedy(error: type[Exception], match: str, arguments: dict) -> None:
    if arguments.get("draft") == "other vocabulary":
        arguments = {"draft": tiny_model("llama", vocab_size=4096)}
    model = tiny_model("llama")
    with pytest.raises(error, match=match):
        spec_compile(model, **{"compile": "none", **arguments})
    assert not hasattr(model, "spec"), "a failed call leaves the model as it was"
    with pytest.raises(ConfigError):
        SpecConfig(min_ngram=5, max_ngram=4)
