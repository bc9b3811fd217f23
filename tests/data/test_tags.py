"""Tagged sentences: CoNLL's columns and spans of characters become words with tags; wrong rows are named."""

from __future__ import annotations

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from tagged import bytelevel, tagged, wordpiece

from peft_recipes import Dataset as Source
from peft_recipes import RecipeError
from peft_recipes.data.tags import entity_tags, tagged_splits
from peft_recipes.data.words import encode, windows

TOKENS = ["John", "lives", "in", "New", "York"]
NER = ["B-PER", "O", "O", "B-LOC", "I-LOC"]
TEXT = "John lives in New York, doesn't he?"


def rows_of(rows, features=None) -> Dataset:
    data = Dataset.from_list(rows, features=features)
    return data.add_column("id", [f"train-{i}" for i in range(len(data))])


def read(rows, features=None, **options):
    splits, labels, notes = tagged_splits({"train": rows_of(rows, features)}, Source("data.jsonl", **options))
    return [[labels[tag] for tag in row["tags"]] for row in splits["train"]], splits["train"], labels, notes


def test_tags_of_names_of_numbers_with_names_and_of_numbers_with_labels_are_the_same():
    named, rows, labels, _ = read([{"tokens": TOKENS, "ner_tags": NER}])
    assert named == [NER] and rows[0]["words"] == TOKENS and labels == ["O", "B-LOC", "I-LOC", "B-PER"]
    names = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    numbers = [names.index(tag) for tag in NER]
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=names))})
    assert read([{"tokens": TOKENS, "ner_tags": numbers}], features)[::2] == ([NER], names)
    assert read([{"tokens": TOKENS, "ner_tags": numbers}], labels=names)[::2] == ([NER], names)


@pytest.mark.parametrize(
    "columns",
    [{"text": "tokens", "label": "ner_tags"}, {"text": "words", "label": "tags"}, {"text": "mine", "label": "own"}],
)
def test_the_usual_columns_are_found_and_others_named(columns):
    options = columns if columns["text"] == "mine" else {}
    assert read([{columns["text"]: TOKENS, columns["label"]: NER, "text": "unused"}], **options)[0] == [NER]


SPANS = [(14, 22, "LOC"), (0, 4, "PER")]


@pytest.mark.parametrize(
    "span",
    [
        lambda start, end, label: {"start": start, "end": end, "label": label},
        lambda start, end, label: {"start_offset": start, "end_offset": end, "label": label, "id": 3},
        lambda start, end, label: {"start": start, "end": end, "text": "?", "labels": [label]},
    ],
    ids=["spacy", "doccano", "label-studio"],
)
def test_spans_of_characters_become_bio_tags_over_words(span):
    named, rows, labels, notes = read([{"text": TEXT, "spans": [span(*s) for s in SPANS]}, {"text": "So", "spans": []}])
    assert rows[0]["words"] == ["John", "lives", "in", "New", "York", ",", "doesn", "'", "t", "he", "?"]
    assert named == [["B-PER", "O", "O", "B-LOC", "I-LOC", *"OOOOOO"], ["O"]] and notes == []
    assert rows[0]["spaces"] == [False, True, True, True, True, False, True, False, False, True, False]
    assert labels == ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]


def test_a_span_that_ends_inside_a_word_tags_the_complete_word_and_is_counted():
    named, *_, notes = read([{"text": TEXT, "spans": [{"start": 14, "end": 20, "label": "LOC"}]}])
    assert named[0][3:6] == ["B-LOC", "I-LOC", "O"]
    assert notes == ["1 spans begin or end inside a word: their complete words are tagged."]


def test_the_labels_of_a_recipe_may_be_the_types_of_spans():
    spans = [{"start": 0, "end": 4, "label": "PER"}]
    assert read([{"text": TEXT, "spans": spans}], labels=["PER", "LOC"])[2] == ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def test_sentences_without_a_word_are_left_out_and_counted():
    named, rows, _, notes = read([{"tokens": TOKENS, "ner_tags": NER}, {"tokens": [], "ner_tags": []}])
    assert named == [NER] and rows["id"] == ["train-0"] and notes == ["1 sentences without a word were left out."]


GOOD = {"tokens": TOKENS, "ner_tags": NER}
WRONG = {
    "lengths": ({"tokens": TOKENS, "ner_tags": NER[:4]}, {}, "row train-1: 5 tokens in 'tokens' and 4 tags"),
    "tag": ({"tokens": ["a"], "ner_tags": ["B-PRE"]}, {"labels": ["O", "B-PER", "B-LOC", "I-LOC"]},
            r"Unknown tag 'B-PRE' in dataset 'data.jsonl', row train-1. Did you mean 'B-PER'\?"),
    "text": ({"tokens": "John lives", "ner_tags": "O"}, {}, "In csv files lists are text: use jsonl or parquet"),
    "column": (GOOD, {"label": "ner_tag"}, "has no column 'ner_tag'. Did you mean 'ner_tags'"),
    "labels": (GOOD, {"text": "token"}, "has no column 'token'. Did you mean 'tokens'"),
    "balance": (GOOD, {"balance": True}, "dataset.balance"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_wrong_tokens_and_tags_name_their_row(what):
    row, options, message = WRONG[what]
    rows = [row] if what in ("text",) else [GOOD, row]
    with pytest.raises(RecipeError, match=message):
        read(rows, **options)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([(30, 60, "LOC")], "row train-1: the span 30 to 60 .LOC. is outside of 'text', which has 35 characters"),
        ([(5, 3, "LOC")], "the span 5 to 3 .LOC. is outside"),
        ([(4, 5, "LOC")], "the span 4 to 5 .LOC. covers no word"),
        ([(0, 10, "A"), (5, 13, "B")], "0 to 10 .A. and 5 to 13 .B. overlap"),
        ([(0, 2, "A"), (2, 4, "B")], "two spans share a word"),
        ([(0, 4, None)], "a span needs start, end and label"),
    ],
)
def test_wrong_spans_name_their_row(spans, message):
    good = {"text": TEXT, "spans": [{"start": 0, "end": 4, "label": "PER"}]}
    row = {"text": TEXT, "spans": [dict(zip(("start", "end", "label"), span, strict=True)) for span in spans]}
    with pytest.raises(RecipeError, match=message):
        read([good, row])


def test_numbers_without_names_ask_for_them_and_numbers_beyond_them_are_named():
    with pytest.raises(RecipeError, match=r"numbers without names.*dataset.labels=\[O,B-PER,I-PER\]"):
        read([{"tokens": ["a", "b"], "ner_tags": [0, 1]}])
    with pytest.raises(RecipeError, match=r"row train-0: tag 2 is outside 0 to 1 \(O, B-PER\)"):
        read([{"tokens": ["a", "b"], "ner_tags": [0, 2]}], labels=["O", "B-PER"])


def test_every_scheme_is_read_as_seqeval_does_and_parts_of_speech_are_no_entities():
    assert entity_tags(["O", "B-A", "L-A", "U-A"]) == ["O", "B-A", "E-A", "S-A"]
    assert entity_tags(["O", "person"]) == ["O", "I-person"]
    assert entity_tags(["NOUN", "VERB"]) is None


# --- words and pieces ------------------------------------------------------------------------------------------------


def test_the_first_piece_of_each_word_is_where_word_ids_has_it():
    tokenizer, sentences = wordpiece(), [row["tokens"] for row in tagged(20)]
    plain = tokenizer(sentences, is_split_into_words=True, truncation=True, max_length=8)
    for i, (sentence, words) in enumerate(
        zip(encode(tokenizer, sentences, [[True] * len(s) for s in sentences], 8), sentences, strict=True)
    ):
        ids = plain.word_ids(i)
        assert sentence.input_ids == plain["input_ids"][i] and len(sentence.input_ids) <= 8
        assert sentence.first == [ids.index(w) if w in ids else None for w in range(len(words))]
        assert sentence.cut == sum(w not in ids for w in range(len(words)))


def test_byte_level_words_are_encoded_as_in_running_text():
    tokenizer, sentences = bytelevel(), [row["tokens"] for row in tagged(20)]
    spaces = [[i > 0 for i in range(len(s))] for s in sentences]
    for words, sentence in zip(sentences, encode(tokenizer, sentences, spaces, 64), strict=True):
        assert sentence.input_ids == tokenizer(" ".join(words))["input_ids"]
        ends = [*sentence.first[1:], len(sentence.input_ids)]
        pieces = [sentence.input_ids[start:end] for start, end in zip(sentence.first, ends, strict=True)]
        assert [tokenizer.decode(ids).strip() for ids in pieces] == words


def test_windows_hold_the_first_piece_of_every_word_once():
    tokenizer, words = wordpiece(), [word for row in tagged(6) for word in row["tokens"]]
    found = windows(tokenizer, words, [True] * len(words), 7)
    assert len(found) > 3 and all(len(window.input_ids) <= 7 for window in found)
    for word in range(len(words)):
        assert sum(window.first[word] is not None for window in found) == 1
