"""TRL's GRPOTrainer itself, on a tiny model: every rollout is accelerated, with the weights of its step."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_cli import word_model, word_tokenizer
from transformers import TrainerCallback

from spec_compile import spec_compile

OPTIONS = {"draft": "ngram", "min_ngram": 1, "num_steps": 3, "compile": "none", "adaptive": False, "progress": False}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's and its own dependencies'
@pytest.mark.parametrize(
    ("behind", "checkpointing"),
    [(False, False), (True, True)],
    ids=["compiled before the trainer wraps", "and behind it, with the trainer's default checkpointing"],
)
def test_every_rollout_of_grpo_is_accelerated_with_live_weights(behind: bool, checkpointing: bool, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model, tokenizer = word_model(), word_tokenizer()
    rollouts, texts = [], []

    def reward(completions: list[str], **_: object) -> list[float]:
        rollouts.append((model.training, model.spec.stats().mode))
        return [float(len(set(completion.split()))) for completion in completions]

    class Compare(TrainerCallback):
        """Greedy text behind every optimizer step, ours against plain, in training mode as the trainer left it."""

        def on_step_end(self, *_: object, **__: object) -> None:
            inputs = tokenizer(["w1 w2 w3 w1 w2", "w9 w8 w9 w8 w9"], return_tensors="pt")
            call = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
            call |= {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
            ours = model.generate(**call)
            assert model.spec.stats().mode == "rounds"
            with model.spec.disable():
                assert torch.equal(ours, model.generate(**call))
            texts.append(ours)

    config = trl.GRPOConfig(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, num_generations=2, max_completion_length=8,
        learning_rate=0.05, bf16=False, use_cpu=True, gradient_checkpointing=checkpointing, report_to=[], save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    prompts = datasets.Dataset.from_dict({"prompt": ["w1 w2 w3 w1 w2", "w5 w6 w7", "w9 w8 w9 w8", "w2 w3"] * 4})
    if not behind:
        spec_compile(model, **OPTIONS)
    trainer = trl.GRPOTrainer(
        model=model, reward_funcs=reward, args=config, train_dataset=prompts, processing_class=tokenizer, callbacks=[Compare()]
    )
    if behind:
        spec_compile(model, **OPTIONS)
    trainer.train()
    assert rollouts == [(True, "rounds")] * 3 and len(texts) == 3
    assert any(not torch.equal(a, b) for a, b in itertools.pairwise(texts)), "the steps show in the texts"
