"""One run: its files and figures, the same result for the same seed, the same order of examples for every arm."""

from __future__ import annotations

import json

import pandas
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors import safe_open

from peft_recipes import Arm, Dataset, RecipeError, train
from peft_recipes.runs.folder import resolved_recipe
from peft_recipes.tasks.registry import task_of


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def run(classify, shared):
    """run(arm, seed) -> a run of the tiny recipe, trained once a module."""
    return lambda arm, seed=0: train(classify(), arm, seed=seed, output=shared, resume=True)


@pytest.mark.parametrize("arm", ["full", "head", "lora"])
def test_an_arm_is_trained_and_its_run_json_is_complete(run, arm):
    data = run(arm).data
    assert data["status"] == "ok"
    # 6 steps an epoch of 96 rows at 16, two epochs; the first three are the warm-up.
    assert (data["training"]["steps"], data["training"]["warmup_steps"], data["training"]["examples"]) == (12, 3, 192)
    assert len(data["training"]["losses"]) == 12 and len(data["training"]["validation"]) == 2
    assert data["training"]["seconds"] > 0 and data["training"]["peak_memory_bytes"] > 10**7
    training = data["training"]
    assert training["tokens"] > 0 and training["padding_share"] >= 0
    if arm == "head":  # on cached features: one position an example
        assert training["computed_tokens"] == 192 and training["batches"] == "features"
    else:
        assert training["tokens"] <= training["computed_tokens"]
    assert data["metrics"]["test"].keys() == {"accuracy", "macro_f1", "mcc", "loss"}
    assert [row["label"] for row in data["per_class"]] == ["bad", "good"]
    assert data["environment"]["versions"]["peft"] and data["environment"]["dataset_fingerprint"]
    assert data["latency_ms"]["base"] > 0
    assert (data["latency_ms"]["merged"] is not None) == (arm == "lora")


def test_lora_learns_the_classes(classify, tmp_path):
    # Three words of six determine the label: a trained arm is far above one half.
    recipe = classify(training={**classify().training, "num_train_epochs": 8})
    assert train(recipe, "lora", output=tmp_path).metrics["test"]["accuracy"] > 0.85


def test_the_metrics_follow_from_the_predictions(run):
    rows = pandas.read_parquet(run("lora").folder / "predictions.parquet")
    assert list(rows.columns) == ["split", "id", "label", "prediction", "accuracy", "macro_f1", "mcc", "loss"]
    assert len(rows) == 40 and rows["id"].is_unique
    metrics = run("lora").metrics["test"]
    assert (rows["label"] == rows["prediction"]).mean() == pytest.approx(metrics["accuracy"])
    assert rows["loss"].mean() == pytest.approx(metrics["loss"])


def test_an_adapters_folder_holds_only_the_adapter_and_its_head(run):
    found = run("lora")
    with safe_open(found.folder / "adapter_model.safetensors", "pt") as file:
        names = set(file.keys())
    assert all("lora_" in name or "classifier" in name for name in names)
    assert any("pre_classifier" in name for name in names)
    size = sum(
        (found.folder / name).stat().st_size for name in ("adapter_model.safetensors", "adapter_config.json")
    )  # fmt: skip
    assert found.data["checkpoint_bytes"] == size < run("full").data["checkpoint_bytes"] / 2
    assert not (found.folder / "model.safetensors").exists()


def test_the_counts_of_an_arm_add_up(run):
    full, head, lora = (run(arm).data["parameters"] for arm in ("full", "head", "lora"))
    assert full["trainable"] == full["total"] == head["total"] == lora["total"]
    assert head["trainable"] == head["head"] == lora["head"] == 32 * 32 + 32 + 2 * 32 + 2
    # r = 4 on q, k, v, out (32 x 32) and the two of the feed-forward (32 x 64), in 2 layers.
    assert lora["adapter"] == 2 * (4 * 4 * (32 + 32) + 2 * 4 * (32 + 64))
    assert lora["trainable"] == lora["adapter"] + lora["head"]
    assert sum(full["by_component"].values()) == full["total"]


@pytest.mark.parametrize("arm", ["full", "head", "lora"])
def test_a_saved_arm_is_restored_with_its_head(run, arm):
    checks = run(arm).data["checks"]
    assert checks["reload"] < 1e-6
    if arm == "lora":
        assert checks["merge"] < 1e-5


def test_plain_peft_loads_the_adapter_on_another_seeds_base(run, classify):
    import transformers

    recipe, found = classify(), run("lora")
    task = task_of(recipe)
    prepared = task.prepare()
    transformers.set_seed(123)  # another random head, which the adapter's own must replace
    base, _ = task.load_base(prepared)
    model = PeftModel.from_pretrained(base, found.folder).eval()
    rows = pandas.read_parquet(found.folder / "predictions.parquet")
    with torch.no_grad():
        guesses = [int(model(**batch).logits.argmax()) for batch in task.inputs(prepared, 40)]
    assert guesses == rows["prediction"].tolist()


@pytest.mark.parametrize("kind", ["classify", "instruct"])
def test_predictions_keep_their_ids_under_every_sampling_strategy(request, tmp_path, kind):
    recipe = request.getfixturevalue(kind)()
    runs = {}
    for order in ("random", "group_by_length"):
        recipe.training["train_sampling_strategy"] = order
        recipe.training["per_device_eval_batch_size"] = 4
        runs[order] = train(recipe, "base", output=tmp_path / order)
    rows = [pandas.read_parquet(run.folder / "predictions.parquet") for run in runs.values()]
    assert rows[0]["id"].tolist() == rows[1]["id"].tolist()
    assert rows[0]["loss"].tolist() == pytest.approx(rows[1]["loss"].tolist(), rel=1e-4)


def test_one_seed_gives_the_same_run_and_another_gives_another(classify, run, tmp_path):
    again, other = (
        train(classify(), "lora", seed=0, output=tmp_path),
        train(classify(), "lora", seed=1, output=tmp_path),
    )
    first = run("lora")
    losses = [r.data["training"]["losses"] for r in (first, again, other)]
    assert losses[0] == losses[1] != losses[2]
    rows = [pandas.read_parquet(r.folder / "predictions.parquet") for r in (first, again, other)]
    assert rows[0].equals(rows[1])
    assert not rows[0]["loss"].equals(rows[2]["loss"])


@pytest.mark.parametrize("order", ["random", "group_by_length"])
def test_every_arm_sees_the_same_examples_in_the_same_order(classify, tmp_path, monkeypatch, order):
    from peft_recipes.tasks.trainer import TrainerMixin

    seen: dict[str, list] = {}
    step = TrainerMixin.training_step
    dropout = Arm(LoraConfig(r=4, lora_dropout=0.3, target_modules=["q_lin"]), learning_rate=1e-2)
    training = {**classify().training, "train_sampling_strategy": order}
    recipe = classify(arms={**classify().arms, "dropout": dropout}, training=training)
    for arm in recipe.arms:
        seen[arm] = batches = []

        def spy(self, model, inputs, *args, batches=batches, **kwargs):
            batches.append(inputs["labels"].tolist())
            return step(self, model, inputs, *args, **kwargs)

        monkeypatch.setattr(TrainerMixin, "training_step", spy)
        train(recipe, arm, seed=3, output=tmp_path)
    assert len(seen["full"]) == 12 and seen["full"][:6] != seen["full"][6:]
    assert seen["full"] == seen["head"] == seen["lora"] == seen["dropout"]


def test_the_resolved_recipe_of_a_run_reproduces_it(run, tmp_path):
    first = run("lora")
    again = train(resolved_recipe(first.folder / "recipe.yaml"), "lora", output=tmp_path)
    assert again.data["training"]["losses"] == first.data["training"]["losses"]
    assert again.metrics == first.metrics


def test_the_base_is_evaluated_without_training(run):
    data = run("base").data
    assert data["training"] is None and data["parameters"]["trainable"] == 0
    assert data["metrics"]["test"]["accuracy"] < run("lora").metrics["test"]["accuracy"]


def test_a_head_that_is_not_new_is_not_saved_with_the_adapter(run, classify, tmp_path):
    # The full arm's folder is a base whose head has been trained: an adapter on it leaves that head alone.
    recipe = classify(model=str(run("full").folder))
    found = train(recipe, "lora", output=tmp_path)
    assert found.data["parameters"]["head"] == 0
    with safe_open(found.folder / "adapter_model.safetensors", "pt") as file:
        assert all("lora_" in name for name in file.keys())  # noqa: SIM118  (not a dict)


def test_an_existing_run_is_only_overwritten_on_request(run, classify, shared):
    folder = run("head").folder
    before = (folder / "run.json").read_bytes()
    with pytest.raises(RecipeError, match="--resume, or replace it with --overwrite"):
        train(classify(), "head", output=shared)
    assert (folder / "run.json").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_the_run_and_is_recorded(classify, tmp_path):
    recipe = classify(arms={"full": Arm(learning_rate=1e30)})
    with pytest.raises(FloatingPointError, match="at step"):
        train(recipe, "full", output=tmp_path)
    data = json.loads((tmp_path / "tiny/full/seed-0/run.json").read_text())
    assert data["status"] == "failed" and "learning rate" in data["error"]


def test_an_adapter_whose_weights_do_not_move_is_an_error(classify, tmp_path):
    recipe = classify(training={**classify().training, "lr_scheduler_type": "constant", "max_grad_norm": 1e-60,
                                "optim": "sgd"})  # fmt: skip
    with pytest.raises(RuntimeError, match="none of its weights has moved"):
        train(recipe, "lora", output=tmp_path)


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        (LoraConfig(target_modules=["q_lin", "k_linn"]), "target 'k_linn' hits no module.*Nearest: .*k_lin"),
        (LoraConfig(target_modules=["zzz"]), "target 'zzz' hits no module"),
        (LoraConfig(target_modules=r"nothing\.here"), "hits no module"),
    ],
)
def test_a_misspelt_target_names_the_nearest_module(classify, tmp_path, arm, message):
    with pytest.raises(RecipeError, match=message):
        train(classify(arms={"lora": Arm(arm, learning_rate=1e-3)}), "lora", output=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_one_class_in_the_train_split_is_an_error(classify, tmp_path):
    path = tmp_path / "one.csv"
    path.write_text("text,label\n" + "".join(f"text {i},good\n" for i in range(60)))
    recipe = classify(dataset=Dataset(str(path), train=40, validation=10, test=10))
    with pytest.raises(RecipeError, match="of one class, 'good'"):
        train(recipe, "lora", output=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_targets_of_another_architecture_become_the_same_group_of_this_one(classify, tmp_path):
    # The recipe names DistilBERT's linear layers; on a Llama they become the same group of modules, with a note.
    recipe = classify(model=str(classify("llama").model))
    run = train(recipe, "lora", output=tmp_path)
    assert {"q_proj", "down_proj"} <= set(run.data["target_modules"])
    assert any("another architecture's all-linear" in note for note in run.data["notes"])
    assert "q_proj" in (run.folder / "recipe.yaml").read_text()


def test_a_class_without_test_examples_gives_a_note(classify, tmp_path):
    path = tmp_path / "d.csv"
    rows = [f"words {i},{'rare' if i == 3 else 'ab'[i % 2]}" for i in range(100)]
    path.write_text("text,label\n" + "\n".join(rows) + "\n")
    notes = task_of(classify(dataset=Dataset(str(path), train=0.9, validation=0.05, test=0.05))).prepare().notes
    assert "The test split has no example of: rare." in notes
