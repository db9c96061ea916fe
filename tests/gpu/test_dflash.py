"""DFlash rounds on a GPU: one CUDA graph holds a whole round, and the text stays the model's."""

from __future__ import annotations

import pytest
import torch
from dflash_heads import fit_blocks, own_vocabulary
from heads import target_states
from tiny import left_padded, tiny_model
from transformers import PreTrainedModel

from spec_compile import spec_compile
from spec_compile.hf_integration.heads.dflash import DFlashHead

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

PROMPT, NEW_TOKENS = 11, 24


@pytest.fixture(autouse=True)
def _full_precision() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


def with_head(family: str, block_size: int) -> tuple[PreTrainedModel, PreTrainedModel, DFlashHead]:
    """A model, the same again, and a head for that which was taught the first one's answers to five prompts, on a CPU."""
    slow, ids = tiny_model(family), torch.arange(0, 80)
    taught = own_vocabulary(slow, block_size, ids)
    inputs = left_padded(5, PROMPT, seed=1)
    rows = zip(slow.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False), inputs["attention_mask"], strict=True)
    texts = [row[int((mask == 0).sum()) :] for row, mask in rows]
    fit_blocks(taught, [target_states(slow, taught.taps, text) for text in texts], texts, first=NEW_TOKENS)
    reference, model = (tiny_model(family, device="cuda") for _ in range(2))
    head = own_vocabulary(model, block_size, ids.cuda())
    with torch.no_grad():
        for name, value in head.own_tensors().items():
            value.copy_(taught.own_tensors()[name])
    return reference, model, head


@pytest.mark.parametrize(
    ("family", "block_size", "options"),
    [
        ("llama", 5, {"compile": "none"}),
        ("llama", 5, {"compile": "none", "cuda_graphs": False}),
        ("llama", 16, {"num_steps": 6}),
        ("gemma3_text", 8, {"compile": "none"}),
        ("gpt_oss", 5, {"compile": "none"}),
    ],
)
def test_float32_text_equals_plain_generate(family: str, block_size: int, options: dict[str, object]) -> None:
    """Buckets of 1, 4 and 8 rows, with and without an end in the middle; drafts accepted and refused; graphs replayed."""
    reference, model, head = with_head(family, block_size)
    model = spec_compile(model, draft=head, **options)
    seen: set[int] = set()
    for batch in (1, 3, 5):
        inputs = {name: value.cuda() for name, value in left_padded(batch, PROMPT, seed=1).items()}
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
        plain = reference.generate(**inputs, **settings)
        assert torch.equal(plain, model.generate(**inputs, **settings)), batch
        seen |= {length for row in model.spec.stats().accept_lengths for length in row}
        settings |= {"eos_token_id": int(plain[0, PROMPT + 9]), "pad_token_id": 0}
        assert torch.equal(reference.generate(**inputs, **settings), model.generate(**inputs, **settings)), batch
    assert 1 in seen and max(seen) > 2, f"drafts must be accepted and refused: {sorted(seen)}"
    stats = model.spec.stats()
    assert stats.mode == "rounds" and bool(stats.graphs) == options.get("cuda_graphs", True)


def test_sampled_rows_are_decided_by_the_seed() -> None:
    _, model, head = with_head("llama", 5)
    model = spec_compile(model, draft=head, compile="none")
    inputs = {name: value.cuda() for name, value in left_padded(3, PROMPT, seed=1).items()}

    def text() -> torch.Tensor:
        torch.manual_seed(5)
        return model.generate(**inputs, do_sample=True, max_new_tokens=NEW_TOKENS)

    assert torch.equal(text(), text())
    assert model.spec.stats().accept_length > 1.0
