"""MTP heads in turn: what they draft is what transformers' MtpModel drafts from scratch, their caches hold what plain forwards
over the final text would put there, and the text stays the target's."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from heads import fit_in_turn, target_states
from mtp_files import published, write_checkpoint
from stored import check_stored
from test_eagle_rounds import GPU_IN_NAME, request
from test_generate_sampling import SETTINGS, V, distance, distribution, noise_level
from tiny import ids_inside_windows, tiny_model
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from spec_compile import spec_compile
from spec_compile.config import SpecConfig, chain
from spec_compile.drafts.eagle import EagleDraft
from spec_compile.drafts.head_runner import HeadRunner
from spec_compile.drafts.mtp_layers import MtpLayersDraft
from spec_compile.errors import DraftError
from spec_compile.hf_integration.heads.mtp import MtpLayers, random_mtp_layers
from spec_compile.hf_integration.taps import NORMED
from spec_compile.runtime.draft import MOST_PENDING, Proposal
from spec_compile.runtime.engine import Engine
from spec_compile.runtime.model_runner import ModelRunner
from spec_compile.runtime.options import RuntimeOptions
from spec_compile.runtime.program import SegmentCompiler
from spec_compile.runtime.round import round_inputs
from spec_compile.runtime.state import DecodeState, SamplingPlan

PLAN = SamplingPlan()
LENGTHS = (9, 2, 1, 6, 4)  # of prompts: also shorter than there are heads


def ragged(batch: int) -> dict[str, Tensor]:
    """Prompts of ``LENGTHS``, padded on the left."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 96, (batch, max(LENGTHS)), generator=generator)
    mask = (torch.arange(max(LENGTHS)) >= max(LENGTHS) - torch.tensor(LENGTHS[:batch])[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def draft_of(model: PreTrainedModel, change: Callable[[MtpLayersDraft], MtpLayersDraft]) -> None:
    """Let a compiled model draft otherwise; what was captured stays."""
    engine = model.spec._engine
    model.spec._engine = Engine(engine.target, change(engine.draft), engine.config)


# ----------------------------------------------------------------------------------------------------------------------
# Against transformers


@contextmanager
def recorded() -> Iterator[list[tuple[Tensor, list[int]]]]:
    """(text, drafts) of every unfinished row and round."""
    propose, seen = MtpLayersDraft.propose, []

    def record(self, state: DecodeState, *rest: object) -> Proposal:
        made = propose(self, state, *rest)
        for row in (~state.finished).nonzero().flatten().tolist():
            seen.append((state.tokens[row, : int(state.cache_len[row]) + 1].clone(), made.window[row, 1:].tolist()))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MtpLayersDraft, "propose", record)
        yield seen


@torch.no_grad()
def transformers_drafts(mtp: torch.nn.Module, target: PreTrainedModel, text: Tensor) -> list[int]:
    """What transformers' module drafts behind ``text`` [L], over all of it at once."""
    from transformers.cache_utils import MtpCache

    positions = torch.arange(1, len(text))[None]
    states = target_states(target, (NORMED,), text[:-1])
    mask = torch.ones_like(positions)  # 5.17.0 wants one
    drafts, _, _ = mtp(text[None, 1:], states, mask, positions, MtpCache(config=target.config.get_mtp_config()))
    return drafts[0].tolist()


def _swapped(draft: MtpLayersDraft) -> MtpLayersDraft:
    return MtpLayersDraft(draft.runners[::-1], draft.shape, draft.vocab_size)


def _nothing_made_again(draft: MtpLayersDraft) -> MtpLayersDraft:
    """Entries that were made of refused drafts stay."""
    other = MtpLayersDraft(draft.runners, draft.shape, draft.vocab_size)
    other.num_older, other.num_slots = 0, draft.num_slots - draft.num_older
    return other


def _always_the_first(draft: MtpLayersDraft) -> MtpLayersDraft:
    return MtpLayersDraft(draft.runners[:1] * len(draft.runners), draft.shape, draft.vocab_size)


@pytest.mark.parametrize(("family", "layers"), [("glm4_moe", 2), ("deepseek_v3", 3)])
def test_drafts_are_those_of_transformers(family: str, layers: int, tmp_path: Path) -> None:
    """``draft="mtp"`` from a checkpoint, behind texts of which drafts are a part or not."""
    from transformers.modeling_layers import MtpModel

    target = tiny_model(family, num_nextn_predict_layers=layers)
    model = write_checkpoint(tmp_path, target, published(family, target, layers=layers))
    # Which tensors are the head's it takes from the family's large models: layer 61 of DeepSeek-V3, 46 and 92 of GLM-4.5.
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{2 + i}\." for i in range(layers)]
    mtp = MtpModel.from_pretrained(model)
    # The prompts' rows are prefilled in two groups.
    spec_compile(model, draft="mtp", compile="none", max_prefill_tokens=8, simulate_accept_rates=(0.8, 0.7, 0.6)[:layers])
    assert len(model.spec._engine.draft.runners) == layers == model.spec._engine.shape.num_steps
    with recorded() as seen:
        model.generate(**ragged(3), max_new_tokens=16, do_sample=False)
    lengths = {n for row in model.spec.stats().accept_lengths for n in row}
    assert len(seen) > 12 and {1, layers + 1} <= lengths
    assert all(drafts == transformers_drafts(mtp, target, text) for text, drafts in seen)
    original = model.spec._engine.draft
    for flip in (_swapped, _nothing_made_again, _always_the_first) if layers == 3 else ():
        draft_of(model, lambda _, flip=flip: flip(original))
        with recorded() as seen:
            model.generate(**ragged(3), max_new_tokens=16, do_sample=False)
        same = [drafts == transformers_drafts(mtp, target, text) for text, drafts in seen]
        assert sum(same) < 0.9 * len(same), f"{flip.__name__}: {sum(same)} of {len(same)} went unnoticed"


# ----------------------------------------------------------------------------------------------------------------------
# Caches


@functools.cache
def runners_for(family: str, layers: int) -> tuple[ModelRunner, tuple[HeadRunner, ...]]:
    """On a CPU, with what the engine does for a GPU: pages, buckets, padding rows, plain rounds."""
    model = tiny_model(family)
    heads = random_mtp_layers(model, layers, own_lm_head=True).heads
    compiler = SegmentCompiler("none", GPU_IN_NAME)
    options = RuntimeOptions(GPU_IN_NAME, compiler, backend="torch", page_size=16)
    return ModelRunner(model, "verify", options, heads[0].taps), tuple(HeadRunner(head, options) for head in heads)


def engine_for(family: str, layers: int, **options: object) -> Engine:
    target, runners = runners_for(family, layers)
    config = SpecConfig(compile="none", cuda_graphs=False, adaptive=False, page_size=16, **options)
    return Engine(target, MtpLayersDraft(runners, chain(layers), 96), config)


@torch.no_grad()
def drafted_from_scratch(engine: Engine, text: Tensor) -> tuple[list[int], list[DynamicCache]]:
    """Drafts behind ``text`` [L] and every head's L - 1 entries, by plain forwards of one row."""
    states, count = target_states(engine.target.model, engine.draft.taps, text[:-1]), len(text) - 1
    drafts, caches = [], []
    for ahead, runner in enumerate(engine.draft.runners, 1):
        ids = torch.cat([text, torch.tensor(drafts, dtype=torch.int64)])[ahead : ahead + count]
        caches.append(DynamicCache())
        states = runner.head(ids[None], states, torch.arange(count)[None], cache=caches[-1])
        drafts.append(int(runner.head.logits(states)[0, -1].argmax()))
    return drafts, caches


@torch.no_grad()
def check_rows(engine: Engine, state: DecodeState) -> int:
    """Draft once more: drafts and caches of unfinished rows, their last entries among them; how many rows there were."""
    window = engine.draft.propose(state, PLAN, engine.shape, round_inputs(state, engine.shape)).window
    rows = (~state.finished).nonzero().flatten().tolist()
    for row in rows:
        length = int(state.cache_len[row])
        drafts, caches = drafted_from_scratch(engine, state.tokens[row, : length + 1])
        assert window[row, 1:].tolist() == drafts
        for programs, cache in zip(engine.draft.programs, caches, strict=True):
            check_stored(programs, state.page_table[row], cache, length, 1e-4)
    return len(rows)


@torch.no_grad()
def test_caches_after_rounds_of_any_shape(fresh_seed: None) -> None:
    """Random acceptance, rounds of fewer steps than there are heads, and plain ones, so many that the heads must catch up
    meanwhile: no entry of any head is missing, and none is made of what was refused."""
    engine = engine_for("qwen2", 3, simulate_accept_rates=(0.7, 0.6, 0.5))
    state = engine.admit(request([11, 1, 2], [400, 300, 30]))
    assert check_rows(engine, state) == 3
    drafting = [chain(1), chain(3)]
    for shape in random.choices(drafting, k=8):
        engine.launch(state, PLAN, shape)
        check_rows(engine, state)
    for plain in (1, 5, MOST_PENDING, MOST_PENDING + 1):
        for shape in [chain(0)] * plain + [random.choice(drafting)]:
            engine.launch(state, PLAN, shape)
        check_rows(engine, state)
    for shape in [*random.choices([chain(0), *drafting], k=30), engine.shape]:
        engine.launch(state, PLAN, shape)
    assert check_rows(engine, state) == 2, "the last row ends on the way"


@torch.no_grad()
def test_what_the_round_before_plain_ones_committed_is_not_forgotten() -> None:
    """The control of the test above: its entries in the later heads' caches are left to catching up."""
    engine = engine_for("qwen2", 3, simulate_accept_rates=(1.0, 1.0, 1.0))
    fill, calls = MtpLayersDraft._fill, []

    def only_the_second(self, *args: object) -> None:
        calls.append(1)
        if len(calls) % 2 == 0:
            fill(self, *args)

    state = engine.admit(request([11, 5, 7], [200] * 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MtpLayersDraft, "_fill", only_the_second)
        calls.clear()
        for shape in [chain(3), *[chain(0)] * 20, chain(3)]:
            engine.launch(state, PLAN, shape)
        assert len(calls) == 2
    with pytest.raises(AssertionError):
        check_rows(engine, state)


@torch.no_grad()
def test_the_text_does_not_depend_on_the_shapes() -> None:
    engine, texts = engine_for("qwen2", 3), []
    wanted = request([9, 1, 4], [30, 30, 20])
    for shapes in ([chain(0)], [chain(3)], [chain(0), chain(3), chain(1)]):
        state, step = engine.admit(wanted), 0
        while not bool(state.finished.all()):
            engine.launch(state, PLAN, shapes[step % len(shapes)])
            step += 1
        texts.append([state.tokens[row, :end].tolist() for row, end in enumerate(wanted.end_len)])
    assert texts[0] == texts[1] == texts[2]


def test_what_plain_rounds_put_aside_ends_with_the_request() -> None:
    engine = engine_for("qwen2", 3)
    state = engine.admit(request([5], [60]))
    with torch.no_grad():
        for _ in range(3):
            engine.launch(state, PLAN, chain(0))
    assert int(engine.draft.pending.count[0]) == 3
    engine.draft.forget()
    assert not any(tensor.any() for tensor in (engine.draft.pending.count, engine.draft.level_start, engine.draft.level_count))


@pytest.mark.parametrize("count", [0, 1])
def test_heads_in_turn_are_several(count: int) -> None:
    with pytest.raises(DraftError, match=f"MtpLayers of {count} heads: heads in turn are two or more"):
        random_mtp_layers(tiny_model("qwen2"), count)


# ----------------------------------------------------------------------------------------------------------------------
# Through generate()


def test_greedy_text_is_the_plain_one() -> None:
    """Ragged batches, ends inside windows, scores; with heads that were taught the text, so that drafts are accepted and
    refused, by the last head too."""
    reference, model = tiny_model("qwen2"), tiny_model("qwen2")
    layers = random_mtp_layers(model, 3, own_lm_head=True)
    settings = {"max_new_tokens": 24, "do_sample": False}
    inputs = ragged(5)
    texts = reference.generate(**inputs, **settings)
    fit_in_turn(layers, reference, [row[-24 - n :] for row, n in zip(texts, LENGTHS, strict=True)], first=24)
    model = spec_compile(model, draft=layers, compile="none", adaptive=False)
    seen, fired = set(), 0
    for batch in (1, 3, 5):
        rows = {name: x[:batch] for name, x in inputs.items()}
        assert torch.equal(model.generate(**rows, **settings), texts[:batch])
        assert model.spec.stats().mode == "rounds"
        seen |= {n for row in model.spec.stats().accept_lengths for n in row}
        if ends := ids_inside_windows(texts[:batch], model.spec.stats().accept_lengths, max(LENGTHS)):
            cut = [m.generate(**rows, **settings, eos_token_id=ends, pad_token_id=0) for m in (reference, model)]
            assert torch.equal(*cut)
            fired += int(torch.isin(cut[0][:, max(LENGTHS) :], torch.tensor(ends)).any(1).sum())
    assert seen == {1, 2, 3, 4}, "drafts must be accepted and refused"
    assert fired, "end-of-sequence ids have to fire inside windows"
    scored = [m.generate(**inputs, **settings, return_dict_in_generate=True, output_scores=True) for m in (reference, model)]
    assert model.spec.stats().mode == "lockstep" and torch.equal(scored[0].sequences, scored[1].sequences)
    torch.testing.assert_close(torch.stack(scored[0].scores), torch.stack(scored[1].scores), rtol=1e-4, atol=1e-4)
    assert "draft step 3 graph: draft_extend, 5 rows × 6 tokens" in model.spec.explain()


def test_sampled_text_follows_the_models_distribution() -> None:
    def toy() -> PreTrainedModel:
        return tiny_model("qwen2", vocab_size=V, num_hidden_layers=1, pad_token_id=None)

    target = toy()
    layers = random_mtp_layers(target, 2, seed=3, own_lm_head=True)
    with torch.no_grad():
        for head in layers.heads:
            head.lm_head.weight *= 0.5  # opinions, not certainties: drafts are accepted and refused
    model = spec_compile(target, draft=layers, compile="none", adaptive=False)
    settings, warpers = SETTINGS["top-p"]
    expected, samples = distribution(toy(), warpers), 1000
    torch.manual_seed(0)  # three standard deviations: other noise in every run would miss them now and then
    assert distance(model, expected, samples, settings) < 1.5 * noise_level(expected, samples)
    assert 1.0 < model.spec.stats().accept_length < 3.0


# ----------------------------------------------------------------------------------------------------------------------
# What is asked for


def test_fewer_steps_use_the_first_layers_and_more_are_refused(tmp_path: Path) -> None:
    target = tiny_model("qwen2")
    model = write_checkpoint(tmp_path, target, published("qwen2", target, layers=3))
    compiled = functools.partial(spec_compile, model, compile="none")
    two = compiled(draft=str(tmp_path), num_steps=2).spec._engine.draft  # by its path as well
    assert isinstance(two, MtpLayersDraft) and len(two.runners) == two.shape.num_steps == 2
    one = compiled(draft="mtp", num_steps=1, topk=2).spec._engine.draft
    assert isinstance(one, EagleDraft) and one.shape.topk == 2
    first = one.head.own_tensors()
    assert all(torch.equal(value, first[name]) for name, value in two.runners[0].head.own_tensors().items())
    with pytest.raises(DraftError, match=r"num_steps=4: this draft has 3 MTP layers, one a step\. Leave num_steps out"):
        compiled(draft="mtp", num_steps=4)
    with pytest.raises(DraftError, match=r"topk=2: MTP layers that draft in turn draft chains only"):
        compiled(draft="mtp", topk=2)


def test_layers_of_another_model_are_refused() -> None:
    target = tiny_model("qwen2")
    layers = random_mtp_layers(target, 2)
    other = MtpLayers([layers.heads[0], random_mtp_layers(tiny_model("qwen2", seed=1), 2).heads[0]])
    with pytest.raises(DraftError, match="reads the embed_tokens and lm_head of another model"):
        spec_compile(target, draft=other, compile="none")
