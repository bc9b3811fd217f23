"""Packed preference pairs give the log-probabilities, losses and gradients of trl's DPOTrainer."""

from __future__ import annotations

import copy
import random

import datasets
import pytest
import torch
from causal_models import KINDS, VOCABULARY, model_of
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from small import tokenizer
from trl import DPOConfig, DPOTrainer

from peft_recipes.data.packing import COMPLETIONS, COUNTS, REFERENCES, SEGMENTS
from peft_recipes.data.preference_packing import PaddedPairsCollator, SharedPromptCollator
from peft_recipes.hardware.device import choose
from peft_recipes.tasks import causal_trainer
from peft_recipes.tasks.preference_trainer import PreferenceTrainer, token_log_probs
from peft_recipes.tasks.reference import Reference


def tokens(count: int, seed: int) -> list[int]:
    return [random.Random(seed * 1000 + i).randrange(3, VOCABULARY) for i in range(count)]


def pair(prompt: list[int], chosen: list[int], rejected: list[int]) -> dict:
    length = 2 * len(prompt) + len(chosen) + len(rejected)
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "length": length}


SYSTEM = tokens(7, 99)
BATCHES = {
    "prompts of unequal length behind a common prefix": [
        pair(SYSTEM + tokens(n, n), tokens(m, n + 50), tokens(k, n + 70))
        for n, m, k in ((3, 4, 9), (6, 2, 1), (1, 8, 3))
    ],
    "nothing in common": [pair(tokens(n, n), tokens(n + 1, n + 9), tokens(3, n + 20)) for n in (4, 9, 6)],
    "one pair": [pair(SYSTEM + tokens(2, 1), tokens(5, 2), tokens(7, 3))],
    "one prompt twice, one a prefix of another": [
        pair(SYSTEM, tokens(4, 7), tokens(3, 8)),
        pair(SYSTEM, tokens(2, 9), tokens(6, 10)),
        pair(SYSTEM[:4], tokens(3, 11), tokens(3, 12)),
    ],
    "answers that begin alike": [pair(SYSTEM, tokens(3, 1) + tokens(2, 4), tokens(3, 1) + tokens(5, 5))] * 2,
    "prompts of one token and of none": [pair([5], tokens(4, 1), tokens(2, 2)), pair([], tokens(3, 3), tokens(5, 4))],
}


class TrlTrainer(DPOTrainer):
    """trl's DPOTrainer on tokenised rows."""

    def _prepare_dataset(self, dataset, *_):
        return dataset


def config(folder, **options):
    return DPOConfig(**{
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False,
        "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "per_device_train_batch_size": 3,
        "train_sampling_strategy": "sequential", "learning_rate": 1e-2, "max_grad_norm": 0.0, **options,
    })  # fmt: skip


def lora(kind: str) -> LoraConfig:
    return LoraConfig(r=4, target_modules=["attn.c_attn"] if kind == "gpt2" else ["q_proj", "v_proj"])


def perturb(model, seed: int = 1):
    """Change the trainable weights, so that the model differs from its reference."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


def theirs(kind, attention, arm, rows, folder, **options):
    model = model_of(kind, attention)
    if arm == "full":
        reference = {"ref_model": copy.deepcopy(model)}
    else:
        torch.manual_seed(0)
        reference = {"peft_config": lora(kind)}
    data = datasets.Dataset.from_list(rows)
    return TrlTrainer(model=model, args=config(folder, **options), train_dataset=data, processing_class=tokenizer(),
                  **reference)  # fmt: skip


def ours(kind, attention, arm, rows, folder, **options):
    model = model_of(kind, attention)
    collator = SharedPromptCollator.for_model(model, 0, 4096)
    reference = Reference(collator, choose({"use_cpu": True}), 2, options.get("ld_alpha"))
    data = reference.add(model, {"train": datasets.Dataset.from_list(rows)}, None, {})["train"]
    if arm == "lora":
        torch.manual_seed(0)
        model = get_peft_model(model, lora(kind))
    made = PreferenceTrainer(model=model, args=config(folder, precompute_ref_log_probs=True, **options),
                             train_dataset=data, processing_class=tokenizer())  # fmt: skip
    assert made.choose_batches(None, 64, 4096, list(data)[:3]) == "shared-prefix"
    return made


def both(*given, **options):
    """Our trainer and trl's, with the same adapter."""
    mine, other = (make(*given, **options) for make in (ours, theirs))
    mine.model.load_state_dict(other.model.state_dict())
    return mine, other


def loss_and_gradients(trainer, count: int):
    model = trainer.model
    model.zero_grad()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(count)])
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(first, second, count):
    (one, grads), (two, others) = loss_and_gradients(first, count), loss_and_gradients(second, count)
    assert one == pytest.approx(two, rel=1e-5)
    assert grads.keys() == others.keys() and grads
    largest = max(float(g.abs().max()) for g in others.values())
    assert largest > 0
    for name, gradient in grads.items():
        assert float((gradient - others[name]).abs().max()) <= 1e-5 * largest, name


@pytest.mark.parametrize(("attention", "kernel"), [("sdpa", "parts"), ("sdpa", "mask"), ("eager", "mask")])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BATCHES)
def test_packing_gives_the_padded_pairs_log_probabilities(kind, attention, kernel, name):
    model = model_of(kind, attention)
    shared, padded = SharedPromptCollator.for_model(model, 0, 4096, kernel), PaddedPairsCollator(0)
    one, two = (token_log_probs(model, batch(BATCHES[name])) for batch in (shared, padded))
    assert one.shape == two.shape == shared(BATCHES[name])[COMPLETIONS][:, 1:].shape
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(token_log_probs(model, PaddedPairsCollator(0, keeps_logits=False)(BATCHES[name])), two)
    assert ((two != 0) == (shared(BATCHES[name])[COMPLETIONS][:, 1:] == 1)).all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("arm", ["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_trls_trainer(kind, arm, attention, tmp_path):
    rows = [row for name in list(BATCHES)[:2] for row in BATCHES[name]]
    mine, other = both(kind, attention, arm, rows, tmp_path)
    for trainer in (mine, other):
        perturb(trainer.model)
    if arm == "lora":
        assert isinstance(mine.model, PeftModel) and list(mine.model.peft_config) == ["default"]
    assert_same(mine, other, len(rows))


@pytest.mark.parametrize("arm", ["full", "lora"])
def test_accumulated_steps_end_with_the_same_weights(arm, tmp_path):
    rows = [row for batch in BATCHES.values() for row in batch]  # 14: the last step has fewer
    options = {"gradient_accumulation_steps": 2, "max_steps": 4}
    mine, other = both("llama", "sdpa", arm, rows, tmp_path, **options)
    for trainer in (mine, other):
        trainer.train()
    losses = [[line["loss"] for line in t.state.log_history if "loss" in line] for t in (mine, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 4
    weights = dict(other.model.named_parameters())
    for name, weight in mine.model.named_parameters():
        torch.testing.assert_close(weight, weights[name], rtol=1e-4, atol=1e-5)
    for key in ("rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"):
        logged = [[line[key] for line in t.state.log_history if key in line] for t in (mine, other)]
        assert logged[0] == pytest.approx(logged[1], rel=1e-4, abs=1e-5) and len(logged[0]) == 4, key


@pytest.mark.parametrize(
    "options",
    [{"loss_type": ["ipo"]}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]}, {"ld_alpha": 0.5},
     {"f_divergence_type": "js_divergence"}, {"use_weighting": True}, {"loss_type": ["sigmoid_norm"], "beta": 2.0}],
    ids=str,
)  # fmt: skip
def test_every_loss_type_is_trls(options, tmp_path):
    rows = BATCHES["prompts of unequal length behind a common prefix"]
    mine, other = both("llama", "sdpa", "lora", rows, tmp_path, **options)
    for trainer in (mine, other):
        perturb(trainer.model)
    assert_same(mine, other, len(rows))


def test_logits_beyond_the_limit_use_trls_head(tmp_path, monkeypatch):
    rows = BATCHES["prompts of unequal length behind a common prefix"]
    mine, other = both("llama", "sdpa", "lora", rows, tmp_path)
    for trainer in (mine, other):
        perturb(trainer.model)
    monkeypatch.setattr(causal_trainer, "LOGITS_BYTES", 0)
    assert not mine._logits_fit(mine.data_collator(list(mine.train_dataset)))
    assert_same(mine, other, len(rows))
    mine.data_collator = PaddedPairsCollator(0)
    assert_same(mine, other, len(rows))


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path):
    rows = BATCHES["prompts of unequal length behind a common prefix"]
    mine, other = both("llama", "sdpa", "lora", rows, tmp_path, gradient_checkpointing=True)
    for trainer in (mine, other):
        trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        perturb(trainer.model)
        trainer.model.train()
    assert_same(mine, other, len(rows))


def test_virtual_tokens_are_padded_and_use_the_base_as_reference(tmp_path):
    rows = BATCHES["prompts of unequal length behind a common prefix"]
    model = model_of("gpt2")
    data = Reference(PaddedPairsCollator(0), choose({"use_cpu": True}), 8, None).add(
        model, {"train": datasets.Dataset.from_list(rows)}, None, {}
    )["train"]
    model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    made = PreferenceTrainer(model=model, args=config(tmp_path, precompute_ref_log_probs=True), train_dataset=data,
                             processing_class=tokenizer())  # fmt: skip
    assert "virtual tokens" in made.choose_batches(None, 64, 4096, rows)
    loss, gradients = loss_and_gradients(made, len(rows))
    assert gradients and loss > 0
    _, predicted, _ = made.prediction_step(model, made.data_collator(list(data)), False)
    inputs = made.data_collator(list(data))
    plain = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, 3:].log_softmax(-1)
    answer = inputs["labels"][0, 1:] != -100
    own = plain[0, :-1].gather(-1, inputs["input_ids"][0, 1:, None])[:, 0][answer].sum()
    assert predicted[0, 0].item() == pytest.approx(own.item(), rel=1e-5)


@pytest.mark.parametrize("budget", [1, 30, 4096])
def test_any_number_of_sequences_gives_the_same_log_probabilities(budget):
    model, pairs = model_of("llama"), BATCHES["prompts of unequal length behind a common prefix"]
    batch = SharedPromptCollator.for_model(model, 0, budget)(pairs)
    assert len(batch["input_ids"]) == {1: 3, 30: 2, 4096: 1}[budget]
    assert batch[SEGMENTS].rows[0][0].stop == len(SYSTEM)
    torch.testing.assert_close(token_log_probs(model, batch), token_log_probs(model, PaddedPairsCollator(0)(pairs)))


def test_a_prompt_is_computed_once():
    pairs = BATCHES["prompts of unequal length behind a common prefix"]
    counts = SharedPromptCollator(0)(pairs)[COUNTS]
    answers = sum(len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in pairs)
    prompts = sum(len(p["prompt_ids"]) - len(SYSTEM) for p in pairs)
    # the prefix once, the rest of each prompt once, and for each answer a copy of its prompt's last token
    assert counts.computed == len(SYSTEM) + prompts - len(pairs) + answers + 2 * len(pairs)
    assert counts.tokens == sum(p["length"] for p in pairs)
    assert (counts.padding, counts.examples) == (0, 3)
    assert PaddedPairsCollator(0)(pairs)[COUNTS].tokens == counts.tokens
    assert not set(REFERENCES) & set(SharedPromptCollator(0)(pairs))
