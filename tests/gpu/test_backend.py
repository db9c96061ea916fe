"""``backend=`` on the device: the forced provider runs every graph and ``explain()`` says so; the text stays the model's."""

from __future__ import annotations

import pathlib
import re

import pytest
import torch
from near_ties import assert_equal_up_to_near_ties
from tiny import left_padded, tiny_model
from transformers import PreTrainedModel

from spec_compile import spec_compile
from spec_compile.errors import BackendError
from spec_compile.ops import providers

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPE = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}  # what every kernel takes


def usable(*names: str) -> None:
    for name in names:
        availability = providers.load(name).probe()
        if not availability.ok:
            pytest.skip(str(availability.problem))


def bfloat16_model(family: str = "llama", seed: int = 0, **overrides: object) -> PreTrainedModel:
    return tiny_model(family, seed, "cuda", **{**SHAPE, **overrides}).bfloat16()


def explained(text: str) -> dict[str, set[str]]:
    """Providers by stage, read from ``explain()``; the draft's own prefill is ``draft/prefill``."""
    found: dict[str, set[str]] = {}
    stage = None
    for line in text.splitlines():
        if heading := re.match(r"(target|draft) graph: (\w+)", line):
            role, stage = heading.groups()
            stage = f"draft/{stage}" if role == "draft" and stage == "prefill" else stage
            found.setdefault(stage, set())
        elif winner := re.match(r" {4}(?!not )(\w+): ", line):
            assert stage is not None, f"a provider outside of any graph: {line}"
            found[stage].add(winner[1])
    return found


def check_text(backend: object, family: str = "llama", draft: PreTrainedModel | None = None, **options: object) -> str:
    """Generate with ``backend`` and plainly, compare, and hand over what ``explain()`` says."""
    reference = bfloat16_model(family)
    source = "ngram" if draft is None else draft
    model = spec_compile(bfloat16_model(family), draft=source, backend=backend, min_ngram=1, num_steps=5, **options)
    for batch, length in ((1, 11), (5, 70)):  # a second page, and a larger pool: kernels are chosen again
        inputs = {name: value.cuda() for name, value in left_padded(batch, length, seed=batch).items()}
        plain = reference.generate(**inputs, max_new_tokens=40, do_sample=False)
        ours = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        diverged = assert_equal_up_to_near_ties(reference, inputs, plain, ours)
        print(f"{backend} {family}: {diverged} of {batch} rows diverged, all at near ties")
    assert model.spec.stats().graphs, "rounds were launched kernel by kernel"
    if draft is not None:
        assert model.spec.stats().accept_length > 1.5, "a draft that is the target drafts almost nothing that is accepted"
    return model.spec.explain()


@pytest.mark.parametrize("name", ["fa4", "flashinfer", "triton"])
def test_the_forced_provider_runs_every_graph(name: str) -> None:
    """Prefill, verify and both kinds of draft windows, by a draft that is the target itself: nothing falls back unnoticed."""
    usable(name)
    text = check_text(name, draft=bfloat16_model())
    found = explained(text)
    assert found == {stage: {name} for stage in ("prefill", "verify", "draft/prefill", "draft", "draft_extend")}, text
    assert text.count(f"forced by backend='{name}'") == len(re.findall(r"^(target|draft) graph: ", text, re.MULTILINE))


@pytest.mark.parametrize("family", ["qwen3", "gpt_oss", "gemma2"])
def test_fa4_takes_sinks_windows_and_softcap(family: str) -> None:
    usable("fa4")
    found = explained(check_text("fa4", family))
    assert found == {"prefill": {"fa4"}, "verify": {"fa4"}}


def test_flashinfer_takes_sinks_and_windows() -> None:
    usable("flashinfer")
    found = explained(check_text("flashinfer", "gpt_oss"))
    assert found == {"prefill": {"flashinfer"}, "verify": {"flashinfer"}}


def test_a_hybrid_runs_each_stage_where_it_was_told() -> None:
    usable("fa4", "flashinfer")
    backend = {"prefill": "flashinfer", "verify": "fa4", "draft": "triton"}
    found = explained(check_text(backend, draft=bfloat16_model()))
    expected = {
        "prefill": "flashinfer",
        "verify": "fa4",
        "draft/prefill": "flashinfer",
        "draft": "triton",
        "draft_extend": "triton",
    }
    assert found == {stage: {name} for stage, name in expected.items()}


def test_a_forced_provider_that_cannot_is_an_error() -> None:
    """FlashInfer has no soft-capped window kernel: the error names node, reason and a provider that can."""
    model = bfloat16_model("gemma2")
    with pytest.raises(BackendError, match=r"(?s)flashinfer.*verify.*softcap.*nearest that can is"):
        spec_compile(model, backend="flashinfer")
    assert getattr(model, "spec", None) is None


def test_tuning_measures_and_remembers(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The winner stands with its time; a second model finds the figures on disk."""
    monkeypatch.setenv("SPEC_COMPILE_CACHE_DIR", str(tmp_path))
    first = check_text("tune")
    assert re.search(r"fastest, \d+\.\d µs a call; measured now", first), first
    assert list(tmp_path.glob("*tuning*"))
    second = check_text("tune")
    assert "measured earlier" in second and "measured now" not in second


@pytest.mark.parametrize("name", ["triton", "flashinfer"])
def test_a_float8_cache_gives_the_text_of_single_tokens(name: str) -> None:
    """Speculation over a narrow cache changes nothing: the text is that of decoding token by token over the same cache."""
    usable(name)
    options = {"backend": name, "kv_cache_dtype": "fp8_e4m3"}
    reference = bfloat16_model()
    single = spec_compile(bfloat16_model(), draft=None, **options)
    several = spec_compile(bfloat16_model(), draft="ngram", min_ngram=1, num_steps=5, **options)
    inputs = {key: value.cuda() for key, value in left_padded(4, 30).items()}
    plain, ours = (model.generate(**inputs, max_new_tokens=40, do_sample=False) for model in (single, several))
    # Near ties are judged by the wide model's gap, so the bound also holds what float8 moves it by.
    assert_equal_up_to_near_ties(reference, inputs, plain, ours, gap=0.25)
    assert "float8_e4m3fn cache" in several.spec.explain()
