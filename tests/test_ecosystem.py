"""What others build on ``generate()``: the same results as over the plain model, and every call accelerated."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from test_cli import word_model, word_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextIteratorStreamer, pipeline

from spec_compile import spec_compile

TEXTS = ["w1 w2 w3 w1 w2", "w9 w8 w9"]
OTHERS_WARNINGS = "ignore::FutureWarning"


@pytest.fixture(scope="module")
def pair() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A plain model and the same one compiled."""
    options = {"draft": "ngram", "min_ngram": 1, "num_steps": 3, "compile": "none", "adaptive": False, "progress": False}
    return word_model(), spec_compile(word_model(), **options)


def assert_same(pair, use: Callable[[PreTrainedModel, PreTrainedTokenizerBase], object]) -> None:
    """``use`` gives the same over both models, and its last call of ``generate()`` ran in rounds."""
    reference, model = pair
    tokenizer = word_tokenizer()
    tokenizer.padding_side = "left"
    expected = use(reference, tokenizer)
    model.generate(input_ids=torch.tensor([[4, 5]]), max_new_tokens=1, num_beams=2)  # not what counts
    assert use(model, tokenizer) == expected
    assert model.spec.stats().mode == "rounds", model.spec.stats().plain_because


def test_a_pipeline_of_several_texts(pair):
    def use(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> object:
        generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
        return generator(TEXTS, max_new_tokens=10, do_sample=False, batch_size=2, return_full_text=False)

    assert_same(pair, use)


def test_a_streamer_that_another_thread_reads(pair):
    def use(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        inputs = tokenizer(TEXTS[0], return_tensors="pt")
        call = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "max_new_tokens": 10}
        thread = threading.Thread(target=model.generate, kwargs={**call, "do_sample": False, "streamer": streamer})
        thread.start()
        words = list(streamer)
        thread.join(60)
        return words

    assert_same(pair, use)


@pytest.mark.filterwarnings(OTHERS_WARNINGS)
def test_lm_evaluation_harness(pair):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    def use(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> object:
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu", max_length=128)
        pairs = [Instance("loglikelihood", {}, (text, " w7"), i) for i, text in enumerate(TEXTS)]
        until = {"until": ["w59"], "max_gen_toks": 10, "do_sample": False}
        asked = [Instance("generate_until", {}, (text, until), i) for i, text in enumerate(TEXTS)]
        return harness.loglikelihood(pairs), harness.generate_until(asked)

    assert_same(pair, use)


@pytest.mark.filterwarnings(OTHERS_WARNINGS)
def test_langchain(pair):
    langchain = pytest.importorskip("langchain_huggingface")

    def use(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> object:
        generator = pipeline("text-generation", model=model, tokenizer=tokenizer, max_new_tokens=10, do_sample=False)
        chain = langchain.HuggingFacePipeline(pipeline=generator)
        return chain.invoke(TEXTS[0]), chain.batch(TEXTS)

    assert_same(pair, use)
