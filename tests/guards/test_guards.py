"""Each guard raises on the fault it is for and passes otherwise; run.json has their results and time."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from peft_recipes import Arm, Dataset, RecipeError, train
from peft_recipes.guards import checks
from peft_recipes.guards.runner import Guards
from peft_recipes.recipe.options import GUARDS
from peft_recipes.tasks.registry import task_of


def test_run_json_has_the_results_and_the_time_of_the_guards(classify, instruct, tmp_path):
    for recipe in (classify(), instruct()):
        data = train(recipe, "lora", output=tmp_path).data
        not_in_run_json = {
            "classes",
            "duplicates",
            "labelled-tokens",
            "end-token",
            "targets",
            "finite-loss",
            "fresh-process",
        }
        assert set(data["checks"]) == set(GUARDS) - not_in_run_json
        assert data["checks"]["reload"] < 1e-6 and data["checks"]["merge"] < 1e-5
        assert 0 < data["seconds"]["guards"] < data["seconds"]["total"]


def test_a_skipped_guard_is_not_called():
    guard = Guards(["learning"])
    guard("learning", pytest.fail)
    guard("merge", lambda: 0.5)
    assert guard.results == {"learning": "skipped", "merge": 0.5}


@pytest.fixture
def adapted(tiny):
    base = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    return get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


def test_a_misspelt_target_names_the_nearest_module(instruct, tmp_path):
    arm = Arm(LoraConfig(r=2, target_modules=["q_proj", "v_porj"]), learning_rate=1e-2)
    with pytest.raises(RecipeError, match=r"'v_porj' hits no module .* Nearest: v_proj"):
        train(instruct(arms={"lora": arm}), "lora", output=tmp_path / "o")
    assert not (tmp_path / "o").exists()
    assert train(instruct(arms={"lora": arm}, skip_checks=["targets"]), "lora", output=tmp_path / "o").ok


def test_an_arm_without_trainable_weights_is_rejected(adapted):
    checks.something_is_trainable(adapted, "lora")
    adapted.requires_grad_(False)
    with pytest.raises(RecipeError, match="nothing is trainable"):
        checks.something_is_trainable(adapted, "lora")


def test_a_changed_frozen_weight_is_found(adapted):
    before = checks.frozen_sums(adapted)
    checks.frozen_unchanged(before, adapted, "lora")
    with torch.no_grad():
        next(p for p in adapted.parameters() if not p.requires_grad).view(-1)[7] += 1e-7
    with pytest.raises(RuntimeError, match=r"1 weights that should be frozen have changed"):
        checks.frozen_unchanged(before, adapted, "lora")


def test_a_run_that_changes_the_base_is_kept_with_its_failed_checks(instruct, tmp_path, monkeypatch):
    from peft_recipes.training.callbacks import LearningCallback

    def change_base(self, args, state, control, model=None, **_):
        with torch.no_grad():
            next(p for p in model.parameters() if not p.requires_grad).add_(1e-3)

    monkeypatch.setattr(LearningCallback, "on_step_end", change_base)
    run = train(instruct(), "lora", output=tmp_path)
    assert run.ok and set(run.failed_checks) == {"frozen", "reload"}
    assert "should be frozen have changed" in run.failed_checks["frozen"]
    assert train(instruct(skip_checks=["frozen", "reload", "merge"]), "lora", output=tmp_path, overwrite=True).ok


def test_an_adapter_whose_weights_do_not_change_stops_the_run_early(classify, tmp_path, monkeypatch):
    from peft_recipes.tasks.trainer import ClassificationTrainer

    monkeypatch.setattr(ClassificationTrainer, "training_step", lambda *_: torch.tensor(1.0))  # no gradient
    recipe = classify(training={"num_train_epochs": 20, "per_device_train_batch_size": 8, "use_cpu": True})
    with pytest.raises(RuntimeError, match="none of its weights has moved"):
        train(recipe, "lora", output=tmp_path)
    log = (tmp_path / "tiny" / "lora" / "seed-0" / "log.jsonl").read_text()
    assert '"step": 10,' in log and '"step": 11,' not in log


def test_warmup_from_zero_passes_the_learning_guard(classify, tmp_path):
    recipe = classify(training={**classify().training, "num_train_epochs": 4, "warmup_steps": 20})
    assert train(recipe, "lora", output=tmp_path).ok


def test_a_head_that_would_not_be_saved_is_rejected(tiny):
    base = AutoModelForSequenceClassification.from_pretrained(tiny("distilbert"), num_labels=2)
    new = ["classifier.weight", "classifier.bias"]
    config = LoraConfig(r=2, target_modules=["q_lin"], modules_to_save=["classifier", "pre_classifier"])
    checks.trained_weights_are_saved(get_peft_model(base, config), new, "lora")
    base = AutoModelForSequenceClassification.from_pretrained(tiny("distilbert"), num_labels=2)
    bare = get_peft_model(base, LoraConfig(r=2, target_modules=["q_lin"]))
    with pytest.raises(RecipeError, match=r"classifier.weight is new or trainable, but would not be saved .*2 such"):
        checks.trained_weights_are_saved(bare, new, "lora")
    bare.base_model.model.pre_classifier.weight.requires_grad_(True)
    with pytest.raises(RecipeError, match=r"pre_classifier.weight is new or trainable"):
        checks.trained_weights_are_saved(bare, [], "lora")


def test_different_padding_tokens_in_model_and_tokenizer_are_rejected(tiny):
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(tiny("gpt2"))
    model = AutoModelForSequenceClassification.from_pretrained(tiny("gpt2"), num_labels=2)
    with pytest.raises(RuntimeError, match="padding token is 0 in the tokenizer and None in the model"):
        checks.padding_is_set(model, words, {})
    model.config.pad_token_id = words.pad_token_id
    mask = torch.tensor([[1, 1, 0]])
    checks.padding_is_set(model, words, {"attention_mask": mask, "labels": torch.tensor([[5, 6, -100]])})
    with pytest.raises(RuntimeError, match="padding token of the first batch has a label"):
        checks.padding_is_set(model, words, {"attention_mask": mask, "labels": torch.tensor([[5, 6, 0]])})
    checks.padding_is_set(model, words, {"attention_mask": mask, "labels": torch.tensor([[1.0, 0.0, 1.0]])})  # classes


def test_answers_without_an_end_token_are_rejected(instruct, tiny, tmp_path):
    import shutil

    folder = shutil.copytree(tiny("llama"), tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    template = folder / "chat_template.jinja"
    original = template.read_text() if template.is_file() else config["chat_template"]
    broken = original.replace(" <|end|> ", " ")
    assert broken != original
    if template.is_file():
        template.write_text(broken)
    else:
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": broken}))
    with pytest.raises(RecipeError, match="never learn to stop"):
        task_of(instruct(model=str(folder))).prepare()
    assert task_of(instruct(model=str(folder), skip_checks=["end-token"])).prepare()
    assert task_of(instruct()).prepare()


def test_training_examples_that_are_also_in_test_are_removed(tmp_path, classify):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"the film was {i % 30}", "label": ("good", "bad")[i % 2]} for i in range(80)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Dataset(str(path), train=0.5, validation=0.25, test=0.25)
    prepared = task_of(classify(dataset=source)).prepare()
    assert prepared.rows["train"] < 40 and any("also occur in a later split" in note for note in prepared.notes)
    assert task_of(classify(dataset=source, skip_checks=["duplicates"])).prepare().rows["train"] == 40


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_batch(classify, tmp_path):
    recipe = classify(arms={"full": Arm(learning_rate=1e30)})
    with pytest.raises(FloatingPointError, match=r"The loss is .* at step \d.*bad_batch.json"):
        train(recipe, "full", output=tmp_path)
    folder = tmp_path / "tiny" / "full" / "seed-0"
    kept = json.loads((folder / "bad_batch.json").read_text())
    assert len(kept["examples"]) == 16 and kept["examples"][0]["id"] and kept["examples"][0]["input_ids"]
    assert json.loads((folder / "run.json").read_text())["status"] == "failed"


def test_examples_of_step_returns_the_examples_of_the_batch(instruct, tmp_path, monkeypatch):
    """Compared by their labelled tokens, in both epochs and with gradient accumulation."""
    from peft_recipes.tasks.causal_trainer import CausalTrainer

    seen, reported, trainers = [], [], []
    step = CausalTrainer.training_step

    def spy(self, model, inputs, *args, **kwargs):
        seen.append(int((inputs["labels"] != -100).sum()))
        trainers.append(self)
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(CausalTrainer, "training_step", spy)
    training = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
                "use_cpu": True}  # fmt: skip
    train(instruct(training=training, batches="padded"), "lora", output=tmp_path)
    trainer = trainers[0]
    rows = trainer.train_dataset
    for number in range(1, trainer.state.max_steps + 1):
        indices = trainer.examples_of_step(number)
        reported.append(sum(label != -100 for i in indices for label in rows[i]["labels"][1:]))
    assert [sum(seen[i : i + 2]) for i in range(0, len(seen), 2)] == reported


def test_a_merge_that_changes_the_outputs_is_a_failed_check(classify, tmp_path, monkeypatch):
    from peft_recipes.training import verify

    merged = verify.merged

    def wrong(model):
        base = merged(model)
        with torch.no_grad():
            base.classifier.bias += 1.0
        return base

    monkeypatch.setattr(verify, "merged", wrong)
    run = train(classify(), "lora", output=tmp_path)
    assert run.ok and list(run.failed_checks) == ["merge"]
    assert "The merged model differs from the trained one" in run.failed_checks["merge"]


def test_a_base_in_the_adapters_folder_is_rejected():
    checks.folder_is_adapter_only(["adapter_model.safetensors", "run.json"])
    with pytest.raises(RuntimeError, match=r"holds the base as well: model.safetensors"):
        checks.folder_is_adapter_only(["adapter_model.safetensors", "model.safetensors"])


def test_a_merge_into_nan_weights_is_an_error_and_not_an_unmergeable_method(adapted):
    from peft_recipes.arms import merge

    assert merge.merged(adapted) is not None
    layer = get_peft_model(adapted.base_model.model, adapted.peft_config["default"])
    with torch.no_grad():
        next(p for name, p in layer.named_parameters() if "lora_B" in name).fill_(float("nan"))
    with pytest.raises(RuntimeError, match="not numbers"):
        merge.merged(layer)
