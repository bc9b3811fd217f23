"""`peft-recipes data`: what is shown is what the trainer gets."""

from __future__ import annotations

import dataclasses
import json

import pytest
from pictures import pictures
from problem_types import recipe_of, save_base, write_rows
from tagged import base_with, bytelevel, tag_recipe, tagged, wordpiece, written
from typer.testing import CliRunner

from peft_recipes import Arm, Dataset, Recipe
from peft_recipes.cli.app import app
from peft_recipes.inspection.examples import decoded
from peft_recipes.inspection.summary import histogram, look, percentile


def text_of(part: dict, labelled: bool | None = None) -> str:
    return "".join(p["text"] for p in part["pieces"] if labelled is None or p["labelled"] == labelled)


def shown(recipe: Recipe, folder, *words: str):
    recipe.to_yaml(folder / "mine.yaml")
    return CliRunner().invoke(app, ["data", str(folder / "mine.yaml"), *words], terminal_width=200)


def test_only_the_answer_of_an_example_is_labelled(instruct):
    looked = look(instruct(), examples=1)
    (part,) = looked["examples"][0]["parts"]
    assert text_of(part).startswith("<|user|> say good in a film")
    assert text_of(part, labelled=True) == " the fine we and lovely bright good <|end|>"
    assert (part["tokens"], part["labelled"]) == (17, 8) and looked["format"].startswith("alpaca (prompt from")


def test_without_colour_labelled_tokens_are_in_brackets_and_special_ones_are_seen(instruct, tmp_path):
    output = shown(instruct(), tmp_path, "--examples", "1").output
    assert (
        "<|user|> say good in a film film <|end|> <|assistant|>[[ the fine we and lovely bright good <|end|>]]"
        in output
    )
    assert "Training example 2" not in output


def test_truncation_says_how_many_labelled_tokens_it_costs(instruct, tmp_path):
    whole, cut = look(instruct(), 0)["splits"]["train"], look(instruct(max_length=16), 0)["splits"]["train"]
    assert whole["truncated"] == 0 and whole["labelled_tokens_cut"] == 0
    assert cut["truncated"] == sum(length > 16 for length in [whole["lengths"]["max"]]) * 21
    assert cut["labelled_tokens"] + cut["labelled_tokens_cut"] == whole["labelled_tokens"]
    assert cut["lengths"] == whole["lengths"]  # before truncation
    assert "21 training examples have more than max_length 16 tokens, which costs 21 of 256" in shown(
        instruct(max_length=16), tmp_path).output  # fmt: skip


def test_both_answers_of_a_pair_are_shown_and_both_labels_of_kto(prefer):
    chosen, rejected = look(prefer(), 1)["examples"][0]["parts"]
    assert (chosen["name"], rejected["name"]) == ("chosen", "rejected")
    assert text_of(chosen, labelled=False) == text_of(rejected, labelled=False)
    assert text_of(chosen, labelled=True).endswith("<|end|>") and text_of(chosen) != text_of(rejected)
    kto = look(prefer(task="kto", prompts=[]), 2)
    assert {example["label"] for example in kto["examples"]} <= {"desirable", "undesirable"}
    assert kto["splits"]["train"]["classes"] == {"desirable": 32, "undesirable": 32}
    reward = look(prefer(task="reward", prompts=[]), 1)["examples"][0]["parts"]
    assert [part["labelled"] for part in reward] == [0, 0]  # a score for the complete answer


def test_input_and_target_of_an_encoder_decoder(translate):
    looked = look(translate(max_length=8), 1)
    given, target = looked["examples"][0]["parts"]
    assert text_of(target) == "it was good and very warm <eos>" and given["labelled"] == 0
    train = looked["splits"]["train"]
    assert train["truncated"] == 22 and train["labelled_tokens_cut"] == 20


def test_prompts_of_grpo_have_no_labelled_token(instruct, questions):
    source = Dataset(str(questions), prompt="input", completion="output", skip_rows=0.5, train=24, validation=8, test=8)
    training = {"num_generations": 2, "per_device_train_batch_size": 4, "use_cpu": True, "bf16": False}
    recipe = instruct(task="grpo", metric="exact_match", prompts=[], dataset=source, training=training,
                      skip_checks=["duplicates"])  # fmt: skip
    example = look(recipe, 1)["examples"][0]
    assert example["parts"][0]["labelled"] == 0 and example["label"].startswith("reference: ")


@pytest.mark.parametrize("words", [wordpiece, bytelevel])
def test_words_are_shown_with_their_tags(words, tmp_path):
    data = written(tmp_path / "tagged.jsonl", tagged(160))
    recipe = tag_recipe(base_with(words(), "distilbert", tmp_path / "base"), data)
    looked = look(recipe, 1)
    (part,) = looked["examples"][0]["parts"]
    tags = [piece["tag"] for piece in part["pieces"] if "tag" in piece]
    assert tags == ["O", "B-BAD", "I-BAD", "O"][: len(tags)] or set(tags) <= {
        *"O",
        "B-BAD",
        "I-BAD",
        "B-GOOD",
        "I-GOOD",
    }
    assert len(tags) == part["labelled"]
    assert sum(looked["splits"]["train"]["classes"].values()) == looked["splits"]["train"]["labelled_tokens"]


def test_classes_several_classes_and_numbers(tmp_path):
    base = save_base("bert", tmp_path / "base")
    pairs, several, number = (
        look(recipe_of(kind, write_rows(kind, tmp_path), base), 1) for kind in ("pairs", "several", "number")
    )
    assert text_of(pairs["examples"][0]["parts"][0]).count("<eos>") == 3
    assert pairs["splits"]["train"]["classes"] == {"0": 20, "1": 20}
    assert several["examples"][0]["label"] == "bad, film, good"
    assert number["splits"]["train"]["classes"] is None and number["splits"]["train"]["numbers"]["max"] == 4.5
    assert number["examples"][0]["label"] == "4"


def test_images_have_a_class_and_a_size(tmp_path):
    photos = pictures(tmp_path / "photos", train=8, test=4)
    source = Dataset(str(photos), test_split="test", validation=0.3, test=None)
    recipe = Recipe("photos", "image-classification", "small-cnn", source, {"full": Arm()})
    output = shown(recipe, tmp_path, "--examples", "1").output
    assert "32 x 32 pixels; the model sees 1 x 28 x 28" in output
    counts = look(recipe, 0)["splits"]["test"]["classes"]
    assert set(counts) == {"dark", "light"} and sum(counts.values()) == 8


def test_rows_that_are_also_in_another_split_are_counted(classify, tmp_path):
    (tmp_path / "twice.csv").write_text(
        "text,label\n" + "".join(f"the film {i % 4} {i % 2},{i % 2}\n" for i in range(40))
    )
    source = Dataset(str(tmp_path / "twice.csv"), validation=0.2, test=0.2)
    looked = look(classify(dataset=source, skip_checks=["duplicates"]), 0)["splits"]["train"]
    assert looked["repeated"] >= 20 and set(looked["also_in"]) == {"validation", "test"}
    output = shown(classify(dataset=source, skip_checks=["duplicates"]), tmp_path).output
    assert "examples of train are also in test, as the model sees them." in output


def test_json_is_one_document_and_a_typo_names_the_nearest(instruct, classify, tmp_path):
    looked = json.loads(shown(classify(), tmp_path, "--json", "--examples", "1").stdout)
    assert looked["splits"]["train"]["classes"] == {"bad": 52, "good": 44} and len(looked["examples"]) == 1
    wrong = shown(instruct(), tmp_path, "--set", "dataset.promt=question")
    assert wrong.exit_code == 2 and "Did you mean 'prompt'?" in wrong.stderr
    column = shown(classify(), tmp_path, "--set", "dataset.text=txt")
    assert column.exit_code == 2 and "Did you mean 'text'?" in column.stderr
    assert CliRunner().invoke(app, ["data", "gpt2-sms-spm"]).exit_code == 2


def test_no_weights_are_loaded(instruct, tiny, tmp_path):
    import shutil

    base = tmp_path / "without-weights"
    shutil.copytree(tiny("llama"), base, ignore=shutil.ignore_patterns("*.safetensors"))
    assert look(dataclasses.replace(instruct(), model=str(base)), 1)["splits"]["train"]["examples"] == 32


def test_pieces_keep_spaces_continued_words_and_split_characters():
    words = wordpiece()
    ids = words("bright lovely")["input_ids"]
    pieces = decoded(words, ids, list(range(len(ids))))
    assert "".join(text for text, _ in pieces) == words.decode(ids, clean_up_tokenization_spaces=False)
    own = bytelevel()
    ids = own("the é 🙂")["input_ids"]  # bytes without a merge: several tokens a character
    assert "".join(text for text, _ in decoded(own, ids, list(range(len(ids))))) == "the é 🙂"


def test_the_bins_of_a_histogram_hold_every_length():
    lengths = [3, 17, 18, 95, 200]
    bins = histogram(lengths)
    assert sum(one["examples"] for one in bins) == 5 and len(bins) <= 11
    assert bins[0]["from"] <= 3 <= bins[0]["to"] and bins[-1]["from"] <= 200 <= bins[-1]["to"]
    assert percentile(list(range(1, 101)), 0.95) == 95 and percentile([7], 0.95) == 7


def test_columns_that_nothing_reads_are_named_for_every_task(instruct, classify, tiny, tmp_path):
    rows = [{"text": f"the film {i} {word}", "label": word, "weight": i} for i, word in enumerate(["good", "bad"] * 20)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Dataset(str(data), validation=0.2, test=0.2)
    assert "Columns not used: weight." in look(classify(dataset=source), 0)["notes"]
    plain = instruct("gpt2", task="language-modeling", dataset=source, prompts=[])
    assert "Columns not used: label, weight." in look(plain, 0)["notes"]
    words = written(tmp_path / "words.jsonl", [{**row, "source": i} for i, row in enumerate(tagged(160))])
    assert "Columns not used: source." in look(tag_recipe(tiny("distilbert"), words), 0)["notes"]
