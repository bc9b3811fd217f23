"""Model cards: front matter, text, code that runs as written, no path of this machine."""

from __future__ import annotations

import getpass
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from card_code import code_in
from huggingface_hub import ModelCard
from small import compared_here
from warm_python import warm

from peft_recipes import RecipeError, train
from peft_recipes.cards.content import run_card
from peft_recipes.cards.metadata import hub_base
from peft_recipes.cards.write import comparison_of, published_card, write_cards
from peft_recipes.catalog.recipes import load_recipe
from peft_recipes.runs.folder import read_run

NASTY = "a|b `x` <script>alert(1)</script> ```\n# no heading [x](http://y)"


@pytest.fixture(scope="module")
def made(request, tmp_path_factory, tiny, reviews):
    """A comparison with a full, a head and a LoRA arm, two seeds."""
    from peft import LoraConfig

    from peft_recipes import Arm, Dataset, Recipe, targets

    recipe = Recipe(
        name="tiny", task="text-classification", model=str(tiny("distilbert")),
        dataset=Dataset(str(reviews), train=96, validation=24, test=40), max_length=16,
        training={"num_train_epochs": 2, "per_device_train_batch_size": 16, "use_cpu": True},
        arms={
            "full": Arm(learning_rate=5e-3), "head": Arm("head", learning_rate=1e-2),
            "lora": Arm(LoraConfig(r=4, lora_alpha=8, target_modules=targets("distilbert", "all-linear")), 2e-2),
        },
    )  # fmt: skip
    return compared_here(recipe, list(recipe.arms), [0, 1], tmp_path_factory.mktemp("compared"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory, made):
    """The folder of a single run."""
    from peft_recipes.runs.folder import resolved_recipe

    recipe = resolved_recipe(made.folder / "recipe.yaml")
    return train(recipe, "lora", output=tmp_path_factory.mktemp("alone")).folder


def read(folder: Path) -> ModelCard:
    """Load a card with huggingface_hub, which validates the front matter."""
    return ModelCard.load(folder / "README.md")


def run_in(folder: Path) -> str:
    """Run the code of a folder's card in the folder and return what it prints."""
    done = subprocess.run(
        warm("-c", code_in((folder / "README.md").read_text())), cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_each_run_of_a_comparison_has_a_card_with_the_verdict_and_all_arms(made):
    for arm in ("full", "head", "lora"):
        for seed in (0, 1):
            card = read(made.folder / arm / f"seed-{seed}")
            assert all(f"| {label} |" in card.text for label in ("Full fine-tuning", "Head only", "LoRA r=4"))
            assert "95 % interval" in card.text or arm == "full"
            verdict = made.verdict(arm).split(". Times are not compared")[0]  # on a busy machine
            assert verdict.split(" (")[0].split(":")[0] in card.text
            assert f"seed {seed}" in card.text.splitlines()[1] + card.text.splitlines()[2]
    base = read(made.folder / "base" / "seed-0")
    assert "nothing to load" in base.text and base.data.library_name == "transformers"


def test_the_front_matter_has_library_tags_and_metrics(made):
    folder = made.folder / "lora" / "seed-1"
    data, run = read(folder).data, read_run(folder)
    assert data.library_name == "peft" and data.pipeline_tag == "text-classification"
    assert {"peft-recipes", "lora", "tiny"} <= set(data.tags) and "embedded-stand-in" not in data.tags
    assert data.base_model is None  # a local folder
    results = {(r.dataset_split, r.metric_type): r.metric_value for r in data.eval_results}
    assert results["test", "accuracy"] == pytest.approx(run.metrics["test"]["accuracy"])
    assert results["test", "f1"] == pytest.approx(run.metrics["test"]["macro_f1"], abs=1e-6)
    assert all(split != "validation" for split, _ in results)
    assert data.eval_results[0].dataset_name == "reviews.csv" and data.eval_results[0].dataset_type == "csv"
    assert read(made.folder / "full" / "seed-0").data.library_name == "transformers"


def test_base_and_dataset_on_the_hub_are_in_the_front_matter(made):
    run = read_run(made.folder / "lora" / "seed-0")
    recipe = load_recipe(made.folder / "recipe.yaml").with_changes(
        {"model": "some/tiny", "dataset": {"path": "other/reviews", "revision": "v2"}}
    )
    data = ModelCard(str(run_card(run, recipe, made.data, []))).data
    assert (data.base_model, data.base_model_relation) == ("some/tiny", "adapter")
    assert data.datasets == ["other/reviews"] and "base_model:adapter:some/tiny" in data.tags
    assert data.eval_results[0].dataset_revision == "v2"
    full = ModelCard(str(run_card(read_run(made.folder / "full" / "seed-0"), recipe, made.data, [])))
    assert full.data.base_model_relation == "finetune"


def test_the_base_model_is_set_only_for_a_base_on_the_hub():
    recipe = load_recipe("smollm2-alpaca", embedded=True)
    assert hub_base(recipe) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert hub_base(load_recipe("mnist-shift", embedded=True)) is None
    assert hub_base(load_recipe("mnist-shift")) is None
    assert hub_base(load_recipe("distilbert-imdb", embedded=True)) is None  # a converted BERT that is not on the Hub
    assert hub_base(load_recipe("distilbert-imdb")) == "distilbert/distilbert-base-uncased"


@pytest.mark.parametrize("arm", ["lora", "full", "head"])
def test_the_code_of_a_card_runs_as_written(made, tiny, tmp_path, arm):
    """It runs in the run's folder, with a copy of the local base where the card says."""
    folder = shutil.copytree(made.folder / arm / "seed-0", tmp_path / "pulled")
    if arm != "full":
        (folder / tiny("distilbert").name).symlink_to(tiny("distilbert"))
    assert run_in(folder) in ("good", "bad")


def test_the_code_of_a_causal_card_runs_as_written(instruct, tiny, tmp_path):
    folder = train(instruct(), "lora", output=tmp_path).folder
    assert "chat_template" in code_in((folder / "README.md").read_text())
    (folder / tiny("llama").name).symlink_to(tiny("llama"))
    run_in(folder)


def test_the_card_of_a_single_run_has_no_comparison(alone):
    card = read(alone)
    assert "there is no full fine-tune to compare it with" in card.text and "trained alone" in card.text
    assert "All arms" not in card.text and "One seed" in card.text
    assert (alone / "plots" / "loss.png").is_file() and "plots/loss.png" in card.text


def test_all_plots_of_a_card_exist(made):
    folder = made.folder / "lora" / "seed-0"
    shown = {line.partition("](")[2].rstrip(")") for line in read(folder).text.splitlines() if line.startswith("![")}
    assert {"plots/difference.png", "plots/loss.png"} <= shown
    assert all((folder / path).is_file() for path in shown)


def test_no_card_contains_a_path_of_this_machine(made, alone, tiny, reviews):
    for folder in [*made.folder.glob("*/seed-*"), alone]:
        text = (folder / "README.md").read_text()
        for secret in (str(tiny("distilbert").parent), str(reviews.parent), str(made.folder), str(Path.home()),
                       f"/{getpass.getuser()}/", "/tmp/"):  # fmt: skip
            assert secret not in text, (folder, secret)
        assert f"`./{tiny('distilbert').name}`" in text or folder.parent.name in ("full", "base")
        assert "./reviews.csv" in text


def test_text_from_recipe_and_data_is_neither_markup_nor_code(made):
    run = read_run(made.folder / "lora" / "seed-0")
    run.data["per_class"] = [{"label": NASTY + '"); import os  # ', "f1": 1.0}, {"label": "x\u202e", "f1": 1.0}]
    run.data["notes"] = [NASTY]
    recipe = load_recipe(made.folder / "recipe.yaml").with_changes({"title": NASTY, "description": NASTY})
    card = ModelCard(str(run_card(run, recipe, {**made.data, "title": NASTY, "notes": [NASTY]}, [])))
    outside, fenced = [], ""
    for line in card.text.splitlines():  # skip code blocks, whose text is never markup
        marks = line[: len(line) - len(line.lstrip("`"))]
        if len(marks) >= 3 and (not fenced or (marks == fenced and line == marks)):
            fenced = "" if fenced else marks
        elif not fenced:
            outside.append(line)
    assert not fenced
    shown = "\n".join(outside)
    assert "<script>" not in shown and "\n# no heading" not in shown
    assert not re.search(r"(?<!\\)\]\(http", shown)  # no link
    code = code_in(str(card))
    compile(code, "card", "exec")
    assert "\u202e" not in code and "import os" not in code.replace("\\n", "\n").splitlines()


def test_a_card_without_a_metric_is_valid(made):
    run = read_run(made.folder / "lora" / "seed-0")
    run.data["metrics"]["test"]["loss"] = None
    card = ModelCard(str(run_card(run, load_recipe(made.folder / "recipe.yaml"), made.data, [])))
    assert {r.metric_type for r in card.data.eval_results} == {"accuracy", "f1", "matthews_correlation"}


def test_writing_the_cards_again_removes_stale_plots(made, tmp_path):
    """Only runs that still exist get a card."""
    folder = shutil.copytree(made.folder, tmp_path / "tiny")
    shutil.rmtree(folder / "head")
    (folder / "lora" / "seed-0" / "plots" / "rank.png").write_bytes(b"old")
    written = write_cards(made.data, folder)
    assert sorted(path.parent.relative_to(folder).as_posix() for path in written) == [
        "base/seed-0", "full/seed-0", "full/seed-1", "lora/seed-0", "lora/seed-1"]  # fmt: skip
    assert not (folder / "lora" / "seed-0" / "plots" / "rank.png").exists()


def test_a_run_belongs_only_to_a_comparison_with_its_figures(made, alone, tmp_path):
    """The folder above a run may have another comparison."""
    assert comparison_of(read_run(made.folder / "lora" / "seed-0")) is not None
    stray = tmp_path / "tiny" / "lora" / "seed-0"
    shutil.copytree(alone, stray)
    data = json.loads((made.folder / "comparison.json").read_text())
    data["arms"]["lora"]["metric"]["values"] = [0.123, 0.456]
    (tmp_path / "tiny" / "comparison.json").write_text(json.dumps(data))
    assert comparison_of(read_run(stray)) is None


def test_the_published_card_keeps_the_users_edits(made, tmp_path):
    folder = shutil.copytree(made.folder / "lora" / "seed-0", tmp_path / "moved")
    path = folder / "README.md"
    path.write_text(path.read_text().replace("## Use it", "My own words.\n\n## Use it"))
    text = published_card(folder, "me/mine", "mit")
    card = ModelCard(text)
    assert "My own words." in text and "All arms of the comparison" in text
    assert card.data.license == "mit" and card.data.model_name == "mine"
    assert 'adapter = "me/mine"' in code_in(text) and "peft-recipes reproduce me/mine" in text
    assert "THIS_FOLDER" not in text
    path.unlink()  # a run of an older version
    assert "## Use it" in published_card(folder, "me/mine")
    path.write_text("---\na: [\n---\n")
    with pytest.raises(RecipeError, match=r"README.md: "):
        published_card(folder, "me/mine")
