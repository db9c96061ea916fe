"""What users hand over as a model: wrappers name the model inside them, weights that are elsewhere what to do about it."""

from __future__ import annotations

import types
from collections.abc import Iterator

import accelerate
import pytest
import torch
import torch.distributed as dist
from tiny import left_padded, tiny_model
from torch import nn
from transformers import PreTrainedModel

from spec_compile import spec_compile
from spec_compile.errors import ConfigError, DraftError

OPTIONS = {"draft": "ngram", "min_ngram": 1, "num_steps": 3, "compile": "none", "adaptive": False, "progress": False}
CALL = {"max_new_tokens": 8, "do_sample": False}


def small() -> PreTrainedModel:
    return tiny_model("llama", num_hidden_layers=1)


def assert_equal_in(mode: str, model: PreTrainedModel) -> None:
    inputs = left_padded(2, 11)
    ours = model.generate(**inputs, **CALL)
    assert model.spec.stats().mode == mode
    with model.spec.disable():
        assert torch.equal(model.generate(**inputs, **CALL), ours)


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """A process group of this process alone, which DistributedDataParallel and fully_shard() ask for."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class PeftLike(nn.Module):
    """A stand-in for PEFT's models, which pass attributes through to the model inside."""

    def __init__(self, model: PreTrainedModel, learned_prompt: bool) -> None:
        super().__init__()
        self.base_model = model
        self.active_peft_config = types.SimpleNamespace(is_prompt_learning=learned_prompt)

    def get_base_model(self) -> PreTrainedModel:
        return self.base_model


# ----------------------------------------------------------------------------------------------------------------------
# Wrappers


@pytest.mark.parametrize(
    ("wrap", "path"),
    [
        (torch.compile, r"model\._orig_mod"),
        (nn.DataParallel, r"model\.module"),
        (lambda model: torch.compile(nn.DataParallel(model)), r"model\._orig_mod\.module"),
        (lambda model: PeftLike(model, False), r"model\.get_base_model\(\)"),
        (lambda model: nn.DataParallel(PeftLike(model, False)), r"model\.module\.get_base_model\(\)"),
    ],
)
def test_a_wrapped_model_is_told_what_to_pass(wrap, path: str):
    with pytest.raises(ConfigError, match=rf"^model=\w+ object: a LlamaForCausalLM is inside it: pass {path}\. "):
        spec_compile(wrap(small()), **OPTIONS)
    with pytest.raises(DraftError, match=rf"^draft=\w+ object: .*: pass {path.replace('model', 'draft', 1)}\. "):
        spec_compile(small(), draft=wrap(small()), compile="none")


def test_a_ddp_model_is_told_what_to_pass(one_process):
    wrapped = nn.parallel.DistributedDataParallel(small())
    with pytest.raises(ConfigError, match=r"^model=DistributedDataParallel object: .*: pass model\.module\. "):
        spec_compile(wrapped, **OPTIONS)
    assert_equal_in("rounds", spec_compile(wrapped.module, **OPTIONS))


def _forward_compiled(module: nn.Module) -> None:
    module.forward = torch.compile(module.forward, backend="eager")


def _compiled_in_place(module: nn.Module) -> None:
    module.compile(backend="eager")


@pytest.mark.parametrize("compile_it", [_forward_compiled, _compiled_in_place])
@pytest.mark.parametrize("path", ["", "model.layers.0"])
@pytest.mark.parametrize("behind", [False, True], ids=["before spec_compile()", "and behind it"])
def test_modules_that_torch_compiles_are_seen_through(compile_it, path: str, behind: bool):
    """``model.forward = torch.compile(model.forward)`` is how transformers' guides write it; plain calls keep running it."""
    model, inputs = small(), left_padded(2, 11)
    expected = model.generate(**inputs, **CALL)
    if not behind:
        compile_it(model.get_submodule(path))
    spec_compile(model, **OPTIONS)
    if behind:
        compile_it(model.get_submodule(path))
    assert torch.equal(model.generate(**inputs, **CALL), expected)
    assert model.spec.stats().mode == "rounds"
    compiled = vars(model.get_submodule(path))
    assert "forward" in compiled or "_compiled_call_impl" in compiled


def test_a_forward_of_the_users_behind_torch_compile_is_captured():
    model, inputs = small(), left_padded(2, 11)
    norm = model.model.norm
    norm.forward = types.MethodType(lambda self, states: type(self).forward(self, states) * 0.5, norm)
    expected = model.generate(**inputs, **CALL)
    norm.forward = torch.compile(norm.forward, backend="eager")
    spec_compile(model, **OPTIONS)
    assert torch.equal(model.generate(**inputs, **CALL), expected)
    assert model.spec.stats().mode == "rounds"


def test_what_holds_no_model_is_told_what_to_pass():
    for other in (nn.Linear(2, 2), nn.DataParallel(nn.Linear(2, 2)), "path/to/model", None):
        with pytest.raises(ConfigError, match=r"object: pass a transformers causal language model\.$"):
            spec_compile(other, **OPTIONS)


def test_a_learned_prompt_is_not_left_out():
    """The base model without the prompt would be another model."""
    with pytest.raises(ConfigError, match=r"^model=PeftLike object: its adapter is a learned prompt"):
        spec_compile(PeftLike(small(), True), **OPTIONS)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's own
def test_a_peft_model_is_told_what_to_pass_and_is_accelerated_then():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(small(), config).eval()
    with pytest.raises(ConfigError, match=r"^model=PeftModel object: .*: pass model\.get_base_model\(\)\. "):
        spec_compile(wrapped, **OPTIONS)
    model = spec_compile(wrapped.get_base_model(), **OPTIONS)
    assert_equal_in("rounds", model)
    ours = wrapped.generate(**left_padded(2, 11), **CALL)
    assert model.spec.stats().mode == "rounds", "the wrapper's generate() is accelerated, too"
    with model.spec.disable():
        assert torch.equal(wrapped.generate(**left_padded(2, 11), **CALL), ours)
    prompt = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match="its adapter is a learned prompt"):
        spec_compile(peft.get_peft_model(small(), prompt), **OPTIONS)


# ----------------------------------------------------------------------------------------------------------------------
# Weights that are not all here


def test_a_sharded_model_is_refused_by_name(one_process):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    model = small()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    with pytest.raises(ConfigError, match=r"^the model's model\.layers\.0 is sharded by fully_shard\(\) \(FSDP2\)"):
        spec_compile(model, **OPTIONS)
    with pytest.raises(DraftError, match=r"^the draft's model\.layers\.0 is sharded by fully_shard\(\) \(FSDP2\)"):
        spec_compile(small(), draft=model, compile="none")
    with pytest.warns(UserWarning, match="NO_SHARD"):  # which a single process is left with
        wrapped = FullyShardedDataParallel(small(), device_id=torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"^model=FullyShardedDataParallel object: its weights are sharded"):
        spec_compile(wrapped, **OPTIONS)


def test_a_tensor_parallel_model_is_refused_by_name(one_process):
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh, model = dist.device_mesh.init_device_mesh("cpu", (1,)), small()
    model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight.detach(), mesh, [Replicate()]))
    with pytest.raises(ConfigError, match=r"^the model's lm_head\.weight is a DTensor.*tp_plan"):
        spec_compile(model, **OPTIONS)


def _offloaded_to_the_cpu(model: PreTrainedModel, folder: str) -> None:
    accelerate.cpu_offload(model, execution_device="cpu")


def _offloaded_to_disk(model: PreTrainedModel, folder: str) -> None:
    accelerate.disk_offload(model, folder, execution_device="cpu")


def _dispatched(model: PreTrainedModel, folder: str) -> None:
    places = dict.fromkeys(["model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    accelerate.dispatch_model(model, places, main_device="cpu", force_hooks=True)


@pytest.mark.parametrize("place", [_offloaded_to_the_cpu, _offloaded_to_disk, _dispatched])
def test_a_model_with_placement_hooks_is_refused_with_a_remedy_that_works(place, tmp_path):
    model = small()
    place(model, str(tmp_path))
    with pytest.raises(ConfigError, match=r"has a hook of accelerate \(AlignDevicesHook\).*remove_hook_from_submodules"):
        spec_compile(model, **OPTIONS)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert_equal_in("rounds", spec_compile(model.to("cpu"), **OPTIONS))


@pytest.mark.parametrize("place", [_offloaded_to_the_cpu, _offloaded_to_disk])
def test_a_model_offloaded_after_compiling_runs_plain_and_says_so(place, tmp_path):
    model = spec_compile(small(), **OPTIONS)
    assert_equal_in("rounds", model)
    place(model, str(tmp_path))
    with pytest.warns(UserWarning, match="runs as plain transformers"):
        assert_equal_in("plain", model)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert_equal_in("rounds", spec_compile(model, **OPTIONS))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's own
def test_dora_is_refused_with_a_remedy_that_works():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, use_dora=True)
    wrapped = peft.get_peft_model(small(), config).eval()
    with pytest.raises(ConfigError, match=r"self_attn\.q_proj has DoRA adapters \['default'\].*merge_adapter\(\)"):
        spec_compile(wrapped.get_base_model(), **OPTIONS)
    wrapped.merge_adapter()
    assert_equal_in("rounds", spec_compile(wrapped.get_base_model(), **OPTIONS))
    wrapped.unmerge_adapter()
    with pytest.warns(UserWarning, match="runs as plain transformers"):
        assert_equal_in("plain", wrapped.get_base_model())
