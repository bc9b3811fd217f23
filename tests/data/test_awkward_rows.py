"""Rows as people have them: what is learnt from awkward values, or the line that says what to change."""

from __future__ import annotations

import json

import pytest
from byte_base import CHATML, byte_tokenizer, save_byte_base

from peft_recipes import Arm, Dataset, Recipe, RecipeError
from peft_recipes.data.rendering import text_ids, with_end
from peft_recipes.tasks.registry import task_of

CALLS = CHATML.replace(
    "message['content'] +",
    "message['content'] + ('look_up ' ~ message.tool_calls[0].function.arguments | tojson"
    " if message.tool_calls else '') +",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(save_byte_base(tmp_path_factory.mktemp("base"), CALLS, False))


@pytest.fixture
def prepared(base, tmp_path):
    """prepared(rows) -> what a task makes of rows, or of the text of a csv file."""

    def prepare(rows, task="sft", suffix="", **dataset):
        path = tmp_path / f"rows{suffix or ('.csv' if isinstance(rows, str) else '.jsonl')}"
        path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
        sizes = {"train": 0.6, "validation": 0.2, "test": 0.2}
        recipe = Recipe(
            name="awkward",
            task=task,
            model=base,
            dataset=Dataset(str(path), **sizes | dataset),
            max_length=512,
            training={"max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True, "bf16": False},
            arms={"full": Arm(learning_rate=1e-3)},
        )
        return task_of(recipe).prepare()

    return prepare


def learnt(prepared):
    """The labelled text of every training example, and of preferences the chosen answers."""
    train = prepared.splits["train"]
    labels = train["chosen_ids"] if "chosen_ids" in train.column_names else train["labels"]
    return {prepared.processor.decode([one for one in row if one != -100]).strip() for row in labels}


def rows_of(count=10, **columns):
    return [{key: value.format(n) if isinstance(value, str) else value for key, value in columns.items()}
            for n in range(count)]  # fmt: skip


def asked(count=10):
    return [{"prompt": f"Where to, {n}?", "completion": f"To Rome {n}."} for n in range(count)]


@pytest.mark.parametrize("task", ["sft", "dpo"])
@pytest.mark.parametrize("answer", ['{"from": "Rome", "to": "Oslo"}', '[{"role": "nurse", "name": "Ann"}]', "[1, 2]"])
def test_an_answer_that_is_json_is_a_text(task, answer, prepared):
    rows = [{"prompt": f"Trip {n}?", "completion": answer} for n in range(10)]
    if task == "dpo":
        rows = [{"prompt": row["prompt"], "chosen": answer, "rejected": "no"} for row in rows]
    assert all(text.startswith(answer) for text in learnt(prepared(rows, task)))


@pytest.mark.parametrize("mark", [", ", "\n "], ids=["list", "numpy"])
def test_messages_that_a_csv_holds_as_python_writes_them_are_messages(mark, prepared):
    said = [f"[{{'role': 'user', 'content': 'Hi {n}'}}{mark}{{'role': 'assistant', 'content': 'Ho {n}'}}]"
            for n in range(10)]  # fmt: skip
    made = prepared("messages\n" + "".join(f'"{text}"\n' for text in said))
    assert all(text.startswith("Ho ") for text in learnt(made))
    sides = "".join(f"\"[{{'role': 'user', 'content': 'Hi {n}'}}]\",Ho {n}\n" for n in range(10))
    made = prepared("prompt,completion\n" + sides)
    assert "[{" not in made.processor.decode(made.splits["train"][0]["input_ids"])


def test_the_weights_of_a_completion_count(prepared):
    turns = [("assistant", "draft", 0), ("user", "again", None), ("assistant", "final", 1)]
    completion = [{"role": role, "content": text, "weight": weight} for role, text, weight in turns]
    rows = [{"prompt": [{"role": "user", "content": f"Hi {n}"}], "completion": completion} for n in range(10)]
    assert all("final" in text and "draft" not in text for text in learnt(prepared(rows)))


@pytest.mark.parametrize("as_text", [False, True], ids=["objects", "text"])
def test_the_arguments_of_a_call_are_learnt_as_they_are_written(as_text, prepared):
    arguments = [{"z": n, "a": 1} if n % 2 else {"a": 2.5, "b": None, "z": n} for n in range(10)]
    calls = [[{"type": "function", "function": {"name": "look_up", "arguments": one}}] for one in arguments]
    rows = [
        {"messages": [
            {"role": "user", "content": f"Hi {n}"},
            {"role": "assistant", "content": None, "tool_calls": json.dumps(call) if as_text else call},
        ]}
        for n, call in enumerate(calls)
    ]  # fmt: skip
    calls = {f"look_up {json.dumps(one)}" for one in arguments}
    assert {text.partition("<|im_end|>")[0] for text in learnt(prepared(rows))} <= calls


def test_an_end_token_that_the_answer_has_is_not_doubled(prepared):
    rows = [{**row, "completion": row["completion"] + "<|im_end|>"} for row in asked()]
    assert all(text.count("<|im_end|>") == 1 for text in learnt(prepared(rows)))
    texts = [{"text": f"Hello {n}<|im_end|>\n"} for n in range(10)]
    assert all(text.count("<|im_end|>") == 1 for text in learnt(prepared(texts)))


def test_a_prompt_that_has_been_through_the_template_is_noted(prepared):
    rows = [{**row, "prompt": f"<|im_start|>user\n{row['prompt']}<|im_end|>\n"} for row in asked()]
    assert any("goes through it twice" in note for note in prepared(rows).notes)
    assert not any("goes through it twice" in note for note in prepared(asked()).notes)


@pytest.mark.parametrize("task", ["dpo", "kto", "reward"])
def test_such_a_prompt_is_noted_for_every_task(task, prepared):
    answers = {"completion": "Yes.", "label": True} if task == "kto" else {"chosen": "Yes.", "rejected": "No."}
    rows = [{"prompt": f"<|im_start|>user\nHi {n}<|im_end|>\n", **answers} for n in range(10)]
    if task == "kto":
        rows = [{**row, "label": n % 2 == 0} for n, row in enumerate(rows)]
    assert any("goes through it twice" in note for note in prepared(rows, task).notes)


def test_a_tokenizer_without_an_end_token_adds_none():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    assert with_end([5, 6], tokenizer) == [5, 6] and text_ids("ab", tokenizer) == tokenizer("ab")["input_ids"]


def test_rows_without_a_prompt_are_left_out_and_counted(prepared):
    rows = asked(20)
    rows[3]["prompt"] = " "
    assert any("no prompt" in note for note in prepared(rows).notes)
    with pytest.raises(RecipeError, match="has no prompt"):
        prepared([{**row, "prompt": ""} for row in rows])


def test_a_context_alone_is_the_prompt(prepared):
    made = prepared(rows_of(instruction="", input="Ask {}", output="Say {}"))
    assert "user\nAsk" in made.processor.decode(made.splits["train"][0]["input_ids"])


def test_texts_that_are_blank_are_counted(prepared):
    rows = [{"text": None if n % 4 == 0 else f"Hello {n}"} for n in range(20)]
    for task in ("sft", "language-modeling"):
        assert any("without a text were left out" in n or "empty texts" in n for n in prepared(rows, task).notes)


@pytest.mark.parametrize("columns", [{"prompt": "Hi {}", "response": "Ho {}"}, {"messages": [
    {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}])  # fmt: skip
def test_labelled_answers_are_refused_whatever_their_columns(columns, prepared):
    with pytest.raises(RecipeError, match="task: kto"):
        prepared([{**row, "label": n % 2 == 0} for n, row in enumerate(rows_of(**columns))])


@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_in_a_file_of_json_lines_is_read(indent, prepared):
    assert len(prepared(json.dumps(asked(), indent=indent), suffix=".jsonl").splits["train"]) == 6
