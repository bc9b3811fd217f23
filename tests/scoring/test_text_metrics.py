"""Metrics of answers: equal to their libraries', and to the field's examples."""

import sys

import numpy as np
import pytest

from peft_recipes.errors import RecipeError
from peft_recipes.recipe.arm import Arm
from peft_recipes.recipe.dataset import Dataset
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.folder import signature
from peft_recipes.scoring.text_metrics import normalised, reference_problem, scorer, word_f1


def recipe(**options):
    return Recipe(name="x", task="sft", model="m", dataset=Dataset("d"), arms={"full": Arm()}, **options)


def scores(metric, answers, references, rows=None, **options):
    return scorer(recipe(metric=metric, **options))(answers, references, rows or [{}] * len(answers))


def length_share(prediction, row):
    return len(prediction) / row["most"]


def nothing(prediction, row):
    return None


@pytest.mark.parametrize(
    ("metric", "answer", "reference", "expected"),
    [
        ("exact_match", "The Eiffel Tower.", "eiffel tower", 1),
        ("exact_match", "eiffel towers", "eiffel tower", 0),
        ("f1", "the tall Eiffel tower", "Eiffel Tower in Paris", 2 * 2 / 7),
        ("f1", "", "", 1),
        ("f1", "the", "Paris", 0),
        ("contains", "I think it is Paris, France.", "Paris", 1),
        ("contains", "I think it is Rome.", "Paris", 0),
        ("regex", "It was in 1951.", r"19\d\d", 1),
        ("regex", "It was long ago.", r"19\d\d", 0),
        ("json", '{"b": 2, "a": [1]}', '{"a": [1], "b": 2}', 1),
        ("json", 'Here:\n```json\n{"a": 1}\n```', '{"a": 1}', 1),
        ("json", '{"a": true}', '{"a": 1}', 0),
        ("json", "not at all", '{"a": 1}', 0),
        ("number", "So 3 + 4 = 7. The answer is 1,007.0", "#### 1007", 1),
        ("number", "The answer is -7", "7", 0),
        ("number", "I don't know", "7", 0),
        ("number", "costs $12.50.", "12.5", 1),
        ("number", "in 3-5 days: 8", "8", 1),
    ],
)
def test_an_answer_is_scored_as_the_field_scores_it(metric, answer, reference, expected):
    assert scores(metric, [answer], [reference]) == pytest.approx([expected])


def test_a_pattern_extracts_what_is_compared():
    found = scores("regex", ["#### 12", "#### 13 or #### 12", "12"], ["x #### 12"] * 3, answer_pattern=r"#### (\d+)")
    assert found.tolist() == [1, 1, 0]


def test_normalisation_is_squads():
    assert normalised("  The  Cat, an\nanimal! ") == "cat animal"
    assert word_f1("a b b", "b b c") == pytest.approx(2 * 2 / 5)  # "a" is an article


ANSWERS = ["the cat sat on the mat", "a dog", "completely different words here", "to be or not to be"]
REFERENCES = ["the cat is on the mat", "a big dog ran", "nothing shared at all", "to be or not to be"]


def test_the_mean_of_bleu_is_sacrebleus_corpus_score():
    from sacrebleu.metrics import BLEU

    assert scores("bleu", ANSWERS, REFERENCES).mean() == pytest.approx(
        BLEU().corpus_score(ANSWERS, [REFERENCES]).score / 100
    )


def test_rouge_and_chrf_are_their_libraries_sentence_scores():
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    rouge = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = list(zip(ANSWERS, REFERENCES, strict=True))
    assert scores("rougeL", ANSWERS, REFERENCES) == pytest.approx([rouge.score(r, a)["rougeL"][2] for a, r in pairs])
    assert scores("chrf", ANSWERS, REFERENCES) == pytest.approx(
        [sacrebleu.sentence_chrf(a, [r]).score / 100 for a, r in pairs]
    )


def test_a_function_of_the_user_sees_the_answer_and_its_row():
    given = recipe(score=length_share)
    assert given.metric == "score" and given.score.endswith(":length_share")
    assert Recipe.from_dict({**recipe().to_dict(), "score": given.score}).metric == "score"
    values = scorer(given)(["abc", "abcdef"], ["", ""], [{"most": 6}, {"most": 6}])
    assert values.tolist() == [0.5, 1.0]


def test_a_function_that_fails_is_named_with_the_answer():
    with pytest.raises(RecipeError, match="length_share raised KeyError: 'most' for the answer 'abc'"):
        scorer(recipe(score=length_share))(["abc"], [""], [{}])
    with pytest.raises(RecipeError, match="returned None"):
        scorer(recipe(score=nothing))(["abc"], [""], [{}])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"score": "no_such_module:f"}, "no_such_module can't be imported"),
        ({"score": "statistics:fmaen"}, "Did you mean 'fmean'"),
        ({"score": "/nowhere/x.py:f"}, "there is no file /nowhere/x.py"),
    ],
)
def test_a_function_that_is_not_there_is_named(options, words):
    with pytest.raises(RecipeError, match=words):
        scorer(recipe(**options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"metric": "rougel"}, "Did you mean 'rougeL'"),
        ({"metric": "score"}, "needs the function"),
        ({"score": "no function"}, "expected 'module:function'"),
        ({"score": lambda answer, row: 1.0}, "can't be imported by the runs' processes"),
        ({"metric": "rougeL", "score": "a:b"}, "no effect with the metric 'rougeL'"),
        ({"metric": "regex", "answer_pattern": "("}, "not a regular expression"),
        ({"metric": "number", "answer_pattern": "x"}, "answer_pattern: no effect"),
        ({"metric": "rougeL", "generation": {"temprature": 1.0}}, "Did you mean 'temperature'"),
        ({"metric": "rougeL", "generation": {"max_new_tokens": 0}}, "generation.max_new_tokens"),
        ({"metric": "rougeL", "generation": {"pad_token_id": 3}}, "Unknown key 'pad_token_id'"),
        ({"metric": "rougeL", "generation": {"constraints": []}}, "Unknown key 'constraints'"),
        ({"metric": "rougeL", "test_generations": 1}, "test_generations: expected 2 or more"),
    ],
)
def test_a_wrong_option_is_named(options, words):
    with pytest.raises(RecipeError, match=words):
        recipe(**options)


@pytest.mark.parametrize(
    ("metric", "reference", "options", "words"),
    [
        ("number", "no figure", {}, "has no number"),
        ("json", "{", {}, "is no JSON"),
        ("regex", "(", {}, "is no regular expression"),
        ("regex", "12", {"answer_pattern": "#### 12"}, "has no match"),
    ],
)
def test_a_reference_that_can_not_be_compared_with_is_named(metric, reference, options, words):
    assert words in reference_problem(recipe(metric=metric, **options), reference)
    assert reference_problem(recipe(metric="rougeL"), reference) is None


def test_pseudo_values_of_bleu_keep_examples_apart():
    values = scores("bleu", ANSWERS, REFERENCES)
    assert np.argmax(values) == 3  # the identical pair adds most


@pytest.mark.parametrize(
    ("generation", "words"),
    [
        ({"repetition_penalty": -1.0}, "repetition_penalty: expected a number above 0"),
        ({"num_beams": 0}, "num_beams: expected 1 or more"),
        ({"num_beams": "2"}, "num_beams: expected a whole number"),
        ({"top_p": 5}, "top_p: expected a number above 0, at most 1"),
        ({"do_sample": True, "temperature": 0.0}, "temperature: expected a number above 0"),
        ({"top_k": -1}, "top_k: expected 0 or more"),
        ({"do_sample": "yes"}, "do_sample: expected true or false"),
    ],
)
def test_a_wrong_value_of_generation_is_an_error_before_anything_is_trained(generation, words):
    with pytest.raises(RecipeError, match=words):
        recipe(metric="rougeL", generation=generation)


@pytest.mark.parametrize(("metric", "reference"), [("contains", "A"), ("exact_match", "The"), ("f1", "...")])
def test_a_reference_without_a_word_is_refused(metric, reference):
    assert "no word left" in reference_problem(recipe(metric=metric), reference)


def test_missing_numbers_and_unreadable_json_are_not_equal():
    assert scores("number", ["none"], ["none"]).tolist() == [0]
    assert scores("json", ["[" * 100_000, "x"], ["{}", "x"]).tolist() == [0, 0]


def test_another_function_of_the_same_file_is_another_run():
    one, other = (signature(recipe(score=f"statistics:{name}"), "full", 0, "") for name in ("mean", "median"))
    assert one != other


def test_a_module_of_the_current_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "scores_beside.py").write_text("def one(prediction, row):\n    return 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each])
    assert scorer(recipe(score="scores_beside:one"))(["x"], [""], [{}]).tolist() == [1]
