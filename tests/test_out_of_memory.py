"""A pool that does not fit: smaller requests go on, target and draft keep the same geometry, the error says what to do."""

from __future__ import annotations

import pytest
import torch
from tiny import left_padded, tiny_model

from spec_compile import spec_compile
from spec_compile.errors import SpecCompileError
from spec_compile.runtime import kv_pool

NEW = 6


@pytest.fixture
def limited(monkeypatch):
    """``limit["slots"]``: a pool of more slots than that is out of memory; ``limit["calls"]``: so many allocations succeed."""
    limit = {"slots": 1 << 62, "calls": 1 << 62}
    real = kv_pool.allocate

    def allocate(layers, rows, capacity, *args):
        limit["calls"] -= 1
        if rows * capacity > limit["slots"] or limit["calls"] < 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(layers, rows, capacity, *args)

    monkeypatch.setattr(kv_pool, "allocate", allocate)
    return limit


def compiled(draft: object = "ngram"):
    return spec_compile(tiny_model("llama", max_position_embeddings=4096), draft=draft, num_steps=2, compile="none")


def text(model, rows: int, max_new_tokens: int = NEW) -> torch.Tensor:
    return model.generate(**left_padded(rows, 8), do_sample=False, max_new_tokens=max_new_tokens)


def test_many_short_rows_do_not_stand_in_the_way_of_a_long_one(limited):
    """The rectangle of the largest batch and the longest text need not fit when each request alone does."""
    model, reference = compiled(), tiny_model("llama", max_position_embeddings=4096)
    text(model, 4)
    limited["slots"] = 4 * 1024
    longer = {**left_padded(1, 1500, seed=3), "do_sample": False, "max_new_tokens": NEW}
    assert torch.equal(model.generate(**longer), reference.generate(**longer))
    pool = model.spec._engine.target.programs.pool
    assert (pool.rows, pool.capacity) == (1, 2048)
    assert torch.equal(text(model, 4), text(reference, 4)), "and back again"


def test_what_does_not_fit_alone_is_refused_and_smaller_requests_go_on(limited):
    model, reference = compiled(), tiny_model("llama", max_position_embeddings=4096)
    limited["slots"] = 2 * 1024
    with pytest.raises(SpecCompileError, match=r"no memory for a KV pool of 3 rows × 1024 tokens.*fewer rows"):
        text(model, 3)
    assert model.spec._engine.target.programs.pool is None
    assert torch.equal(text(model, 2), text(reference, 2))


def test_a_draft_without_memory_takes_the_targets_pool_with_it(limited):
    """Both share one page table, so their pools must have the same geometry."""
    model, reference = (
        compiled(tiny_model("llama", seed=1, max_position_embeddings=4096)),
        tiny_model("llama", max_position_embeddings=4096),
    )
    limited["calls"] = 1  # the target's pool, then none for the draft
    with pytest.raises(SpecCompileError, match="no memory"):
        text(model, 3)
    limited["calls"] = 1 << 62
    assert torch.equal(text(model, 1), text(reference, 1))
    engine = model.spec._engine
    assert engine.target.programs.pool.rows == engine.draft.programs[0].pool.rows == 1
