"""Draft heads next to targets of every family: what is shared, how they are captured, and their cache in pages."""

from __future__ import annotations

import pytest
import torch
from paged_heads import paged
from tiny import tiny_model
from torch import Tensor
from transformers import DynamicCache, LlamaConfig

from spec_compile.drafts.make import _check_head
from spec_compile.errors import DraftError
from spec_compile.hf_integration.capture import capture_head_prefill, capture_head_window
from spec_compile.hf_integration.heads.draft_head import DraftHead, layer_sizes_like, like_target, randomise
from spec_compile.hf_integration.heads.eagle import EagleHead
from spec_compile.hf_integration.heads.eagle3 import default_taps, random_eagle3_head

VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "draft vocabulary, layers, norms on queries": {
        "draft_vocab_size": 40,
        "num_hidden_layers": 3,
        "qk_norm": True,
        "fc_norm": True,
        "norm_output": True,
    },
    "biases, own embedding": {
        "attention_bias": True,
        "fc_bias": True,
        "norm_before_fc": True,
        "norm_before_residual": True,
        "own_embedding": True,
        "taps": (0, 2),
    },
}


def random_eagle_head(target) -> EagleHead:
    with like_target(target):
        head = EagleHead(LlamaConfig(**layer_sizes_like(target), num_hidden_layers=2), target)
    randomise(head, 0)
    return head.eval()


def check_in_pages(head: DraftHead) -> None:
    """Windows of 5 and 4 tokens through the attention op over pages against transformers' own attention and cache."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 96, (2, 9), generator=generator)
    states = torch.randn(2, 9, head.target_width, generator=generator)
    positions = torch.arange(9).expand(2, -1)

    def run(first: int, last: int, cache) -> Tensor:
        return head.logits(head(ids[:, first:last], head.project(states[:, first:last]), positions[:, first:last], cache))

    with torch.no_grad():
        cache = DynamicCache(config=head.config)
        wanted = torch.cat([run(0, 5, cache), run(5, 9, cache)], 1)
        whole = run(0, 9, None)
        with paged(head, batch=2, capacity=16) as context:
            got = [run(0, 5, context.cache)]
            context.cache_len = torch.tensor([5, 5], dtype=torch.int32)
            got.append(run(5, 9, context.cache))
    torch.testing.assert_close(torch.cat(got, 1), wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(whole, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_cache_in_pages_gives_the_same_logits(variant: str):
    check_in_pages(random_eagle3_head(tiny_model("llama"), **VARIANTS[variant]))


def test_eagle_in_pages_gives_the_same_logits():
    check_in_pages(random_eagle_head(tiny_model("llama")))


@pytest.mark.parametrize("family", ["qwen3_moe", "gemma3_text", "gpt_oss", "gpt2", "deepseek_v3"])
def test_heads_fit_targets_of_other_families(family: str):
    target = tiny_model(family)
    for head in (random_eagle3_head(target, draft_vocab_size=40), random_eagle_head(target)):
        check_in_pages(head)
        assert head.get_input_embeddings() is target.get_input_embeddings()
        assert not any(name.startswith("embed_tokens") for name in head.own_tensors())


@pytest.mark.parametrize("make", [lambda target: random_eagle3_head(target, **VARIANTS["plain"]), random_eagle_head])
def test_heads_are_captured_with_one_attention_op_a_layer(make):
    head = make(tiny_model("llama"))
    extend, step = capture_head_window(head, 2, 3, 1, "draft_extend"), capture_head_window(head, 2, 4, 4, "draft")
    for graph in (extend, step, capture_head_prefill(head)):
        ops = [node for node in graph.gm.graph.nodes if "spec_compile.attention" in str(node.target)]
        assert len(ops) == head.config.num_hidden_layers


def test_embeddings_are_the_bare_rows():
    """Gemma scales what its own layers read; drafts are trained on the matrix."""
    target = tiny_model("gemma3_text")
    ids = torch.arange(5)
    for head in (random_eagle3_head(target), random_eagle_head(target)):
        assert torch.equal(head.embed(ids), target.get_input_embeddings().weight[:5])
    assert not torch.allclose(target.get_input_embeddings()(ids), target.get_input_embeddings().weight[:5])


def test_a_mask_is_used_as_it_is():
    """Two siblings behind a prefix: neither sees the other, and both are where a chain's next token would be."""
    head = random_eagle3_head(tiny_model("llama"))
    ids, states = torch.tensor([[5, 6, 7, 8]]), torch.randn(1, 4, head.config.hidden_size)
    mask = torch.tensor([[[[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]]]).bool()
    with torch.no_grad():
        tree = head(ids, states, torch.tensor([[0, 1, 2, 2]]), attention_mask=mask)
        for sibling in (2, 3):
            path = [0, 1, sibling]
            alone = head(ids[:, path], states[:, path], torch.arange(3)[None])
            torch.testing.assert_close(tree[:, sibling], alone[:, -1])


def test_which_states_are_read_by_default():
    assert default_taps(32) == (2, 16, 29) and default_taps(36) == (2, 18, 33) and default_taps(2) == (2, 1, 0)


def test_the_same_seed_is_the_same_head():
    target = tiny_model("llama")
    first, second, other = (random_eagle3_head(target, 40, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.fc.weight, second.fc.weight) and torch.equal(first.draft_ids, second.draft_ids)
    assert not torch.equal(first.fc.weight, other.fc.weight) and not torch.equal(first.draft_ids, other.draft_ids)
    assert torch.equal(first.draft_ids, first.draft_ids.unique()) and first.logits(torch.ones(1, 64)).shape == (1, 40)


def test_norms_before_fc_exclude_each_other():
    with pytest.raises(DraftError, match="exclude each other"):
        random_eagle3_head(tiny_model("llama"), norm_before_fc=True, fc_norm=True)


def test_a_head_over_another_models_matrices() -> None:
    """Of the same sizes, it would run and draft badly, unseen; a copy of its target is its target."""
    head, other = random_eagle3_head(tiny_model("llama", seed=0), draft_vocab_size=40), tiny_model("llama", seed=1)
    with pytest.raises(DraftError, match="reads the embed_tokens of another model than this target"):
        _check_head(head, other)
    _check_head(head, tiny_model("llama", seed=0))
    _check_head(random_eagle3_head(tiny_model("llama"), draft_vocab_size=40, own_embedding=True), other)
