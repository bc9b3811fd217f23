"""Each guard fires on what it is for, and is silent otherwise; a run says what each found and what they cost."""

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


def test_a_run_says_what_its_guards_found_and_what_they_cost(classify, instruct, tmp_path):
    """Silent on sound runs: every guard of a run is in run.json, none of them has fired."""
    for recipe in (classify(), instruct()):
        data = train(recipe, "lora", output=tmp_path).data
        of_the_data = {
            "classes",
            "duplicates",
            "labelled-tokens",
            "end-token",
            "targets",
            "finite-loss",
            "fresh-process",
        }
        assert set(data["checks"]) == set(GUARDS) - of_the_data
        assert data["checks"]["reload"] < 1e-6 and data["checks"]["merge"] < 1e-5
        assert 0 < data["seconds"]["guards"] < data["seconds"]["total"]


def test_a_guard_that_is_to_be_skipped_is_not_called():
    guard = Guards(["learning"])
    guard("learning", pytest.fail)
    guard("merge", lambda: 0.5)
    assert guard.results == {"learning": "skipped", "merge": 0.5}


@pytest.fixture
def adapted(tiny):
    base = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    return get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


def test_a_misspelt_target_among_good_ones(instruct, tmp_path):
    arm = Arm(LoraConfig(r=2, target_modules=["q_proj", "v_porj"]), learning_rate=1e-2)
    with pytest.raises(RecipeError, match=r"'v_porj' hits no module .* Nearest: v_proj"):
        train(instruct(arms={"lora": arm}), "lora", output=tmp_path / "o")
    assert not (tmp_path / "o").exists()
    assert train(instruct(arms={"lora": arm}, skip_checks=["targets"]), "lora", output=tmp_path / "o").ok


def test_nothing_trainable(adapted):
    checks.something_is_trainable(adapted, "lora")
    adapted.requires_grad_(False)
    with pytest.raises(RecipeError, match="nothing is trainable"):
        checks.something_is_trainable(adapted, "lora")


def test_frozen_weights_that_moved(adapted):
    before = checks.frozen_sums(adapted)
    checks.frozen_unchanged(before, adapted, "lora")
    with torch.no_grad():
        next(p for p in adapted.parameters() if not p.requires_grad).view(-1)[7] += 1e-7
    with pytest.raises(RuntimeError, match=r"1 weights that should be frozen have changed"):
        checks.frozen_unchanged(before, adapted, "lora")


def test_a_run_whose_base_moves_is_stopped(instruct, tmp_path, monkeypatch):
    from peft_recipes.training.callbacks import LearningCallback

    def meddle(self, args, state, control, model=None, **_):
        with torch.no_grad():
            next(p for p in model.parameters() if not p.requires_grad).add_(1e-3)

    monkeypatch.setattr(LearningCallback, "on_step_end", meddle)
    with pytest.raises(RuntimeError, match="should be frozen have changed"):
        train(instruct(), "lora", output=tmp_path)
    assert train(instruct(skip_checks=["frozen", "reload", "merge"]), "lora", output=tmp_path, overwrite=True).ok


def test_an_adapter_that_does_not_move_is_stopped_early(classify, tmp_path, monkeypatch):
    from peft_recipes.tasks.trainer import ClassificationTrainer

    monkeypatch.setattr(ClassificationTrainer, "training_step", lambda *_: torch.tensor(1.0))  # nothing flows back
    recipe = classify(training={"num_train_epochs": 20, "per_device_train_batch_size": 8, "use_cpu": True})
    with pytest.raises(RuntimeError, match="none of its weights has moved"):
        train(recipe, "lora", output=tmp_path)
    log = (tmp_path / "tiny" / "lora" / "seed-0" / "log.jsonl").read_text()
    assert '"step": 10,' in log and '"step": 11,' not in log


def test_a_rate_that_warms_up_from_zero_is_not_taken_for_idleness(classify, tmp_path):
    recipe = classify(training={**classify().training, "num_train_epochs": 4, "warmup_steps": 20})
    assert train(recipe, "lora", output=tmp_path).ok


def test_a_head_that_would_not_be_saved(tiny):
    base = AutoModelForSequenceClassification.from_pretrained(tiny("distilbert"), num_labels=2)
    new = ["classifier.weight", "classifier.bias"]
    config = LoraConfig(r=2, target_modules=["q_lin"], modules_to_save=["classifier", "pre_classifier"])
    checks.learns_are_saved(get_peft_model(base, config), new, "lora")
    base = AutoModelForSequenceClassification.from_pretrained(tiny("distilbert"), num_labels=2)
    bare = get_peft_model(base, LoraConfig(r=2, target_modules=["q_lin"]))
    with pytest.raises(RecipeError, match=r"classifier.weight is new or learns, but would not be saved .*2 such"):
        checks.learns_are_saved(bare, new, "lora")
    bare.base_model.model.pre_classifier.weight.requires_grad_(True)
    with pytest.raises(RecipeError, match=r"pre_classifier.weight is new or learns"):
        checks.learns_are_saved(bare, [], "lora")


def test_padding_that_model_and_tokenizer_disagree_on(tiny):
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(tiny("gpt2"))
    model = AutoModelForSequenceClassification.from_pretrained(tiny("gpt2"), num_labels=2)
    with pytest.raises(RuntimeError, match="padding token is 0 in the tokenizer and None in the model"):
        checks.padding_is_set(model, words, {})
    model.config.pad_token_id = words.pad_token_id
    mask = torch.tensor([[1, 1, 0]])
    checks.padding_is_set(model, words, {"attention_mask": mask, "labels": torch.tensor([[5, 6, -100]])})
    with pytest.raises(RuntimeError, match="padded place of the first batch carries a label"):
        checks.padding_is_set(model, words, {"attention_mask": mask, "labels": torch.tensor([[5, 6, 0]])})


def test_answers_that_never_end(instruct, tiny, tmp_path):
    import shutil

    folder = shutil.copytree(tiny("llama"), tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    template = folder / "chat_template.jinja"
    said = template.read_text() if template.is_file() else config["chat_template"]
    broken = said.replace(" <|end|> ", " ")
    assert broken != said
    if template.is_file():
        template.write_text(broken)
    else:
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": broken}))
    with pytest.raises(RecipeError, match="never learn to stop"):
        task_of(instruct(model=str(folder))).prepare()
    assert task_of(instruct(model=str(folder), skip_checks=["end-token"])).prepare()
    assert task_of(instruct()).prepare()


def test_examples_of_train_that_stand_in_test(tmp_path, classify):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"the film was {i % 30}", "label": ("good", "bad")[i % 2]} for i in range(80)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Dataset(str(path), train=0.5, validation=0.25, test=0.25)
    prepared = task_of(classify(dataset=source)).prepare()
    assert prepared.rows["train"] < 40 and any("stand in a later split" in note for note in prepared.notes)
    assert task_of(classify(dataset=source, skip_checks=["duplicates"])).prepare().rows["train"] == 40


def test_a_loss_that_is_not_finite_stops_and_names_its_examples(classify, tmp_path):
    recipe = classify(arms={"full": Arm(learning_rate=1e30)})
    with pytest.raises(FloatingPointError, match=r"The loss is .* at step \d.*bad_batch.json"):
        train(recipe, "full", output=tmp_path)
    folder = tmp_path / "tiny" / "full" / "seed-0"
    kept = json.loads((folder / "bad_batch.json").read_text())
    assert len(kept["examples"]) == 16 and kept["examples"][0]["id"] and kept["examples"][0]["input_ids"]
    assert json.loads((folder / "run.json").read_text())["status"] == "failed"


def test_the_examples_of_a_step_are_those_that_it_saw(instruct, tmp_path, monkeypatch):
    """By the tokens that went through the model, in both epochs and under accumulation."""
    from peft_recipes.tasks.causal_trainer import CausalTrainer

    seen, told = [], []
    step = CausalTrainer.training_step

    def spy(self, model, inputs, *args, **kwargs):
        seen.append(int((inputs["labels"] != -100).sum()))
        self_told.append(self)
        return step(self, model, inputs, *args, **kwargs)

    self_told = []
    monkeypatch.setattr(CausalTrainer, "training_step", spy)
    training = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
                "use_cpu": True}  # fmt: skip
    train(instruct(training=training, batches="padded"), "lora", output=tmp_path)
    trainer = self_told[0]
    rows = trainer.train_dataset
    for number in range(1, trainer.state.max_steps + 1):
        places = trainer.examples_of_step(number)
        told.append(sum(label != -100 for i in places for label in rows[i]["labels"][1:]))
    assert [sum(seen[i : i + 2]) for i in range(0, len(seen), 2)] == told


def test_a_merge_that_changes_outputs_is_refused(classify, tmp_path, monkeypatch):
    from peft_recipes.training import verify

    merged = verify.merged

    def wrong(model):
        made = merged(model)
        with torch.no_grad():
            made.classifier.bias += 1.0
        return made

    monkeypatch.setattr(verify, "merged", wrong)
    with pytest.raises(RuntimeError, match="The merged model differs from the trained one"):
        train(classify(), "lora", output=tmp_path)


def test_a_base_in_the_adapters_folder():
    checks.folder_is_adapter_only(["adapter_model.safetensors", "run.json"])
    with pytest.raises(RuntimeError, match=r"holds the base as well: model.safetensors"):
        checks.folder_is_adapter_only(["adapter_model.safetensors", "model.safetensors"])


def test_a_merge_into_no_numbers_is_not_taken_for_one_that_can_not_be(adapted):
    from peft_recipes.arms import merge

    assert merge.merged(adapted) is not None
    layer = get_peft_model(adapted.base_model.model, adapted.peft_config["default"])
    with torch.no_grad():
        next(p for name, p in layer.named_parameters() if "lora_B" in name).fill_(float("nan"))
    with pytest.raises(RuntimeError, match="no numbers"):
        merge.merged(layer)
