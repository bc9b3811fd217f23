"""What the chat template makes of an example: one BOS, whole answers, tools, several answers with a loss."""

from __future__ import annotations

import json

import pytest
from byte_base import CHATML, byte_tokenizer, save_byte_base
from documented_shapes import CALL, WEATHER, said
from trl import chat_template_utils

from peft_recipes import Arm, Dataset, Recipe, RecipeError, train
from peft_recipes.data.rendering import labelled
from peft_recipes.tasks.registry import task_of

CUTS_REASONING = CHATML.replace("message['content'] +", "message['content'].split('</think>')[-1] +")
WITHOUT_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """base(template, bos) -> the folder of a small base whose tokenizer has that chat template."""
    made = {}

    def make(template=CHATML, bos=False):
        key = (template, bos)
        if key not in made:
            made[key] = save_byte_base(tmp_path_factory.mktemp("base"), template, bos)
        return str(made[key])

    return make


def recipe_of(model, rows, folder, task="sft", **dataset):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Recipe(
        name="chat",
        task=task,
        model=model,
        dataset=Dataset(str(path), **{"train": 0.6, "validation": 0.2, "test": 0.2} | dataset),
        max_length=512,
        training={"max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True, "bf16": False},
        arms={"full": Arm(learning_rate=1e-3)},
        skip_checks=["end-token"],  # some templates end a turn with a token of their own model
    )


def prepared(*arguments, **options):
    return task_of(recipe_of(*arguments, **options)).prepare()


def learnt(prepared, number=0):
    labels = prepared.splits["train"][number]["labels"]
    return prepared.processor.decode([label for label in labels if label != -100])


def conversations(count, *turns, **options):
    return [{"messages": said(*(f"{text} {n}" for text in turns)), **options} for n in range(count)]


def test_a_template_that_cuts_the_reasoning_is_refused_with_what_to_do(base, tmp_path):
    rows = conversations(10, "ask", "<think>\nwhy\n</think>\nsay")
    with pytest.raises(RecipeError, match=r"leaves out a part; .*dataset.chat_template=chatml") as error:
        prepared(base(CUTS_REASONING), rows, tmp_path)
    assert "row train-0 has an answer" in str(error.value)
    assert learnt(prepared(base(CUTS_REASONING), rows, tmp_path, chat_template="chatml")).startswith("<think>\nwhy")


def test_deepseeks_reasoning_is_learnt_by_trls_training_template(base, tmp_path):
    made = prepared(base(chat_template_utils.deepseek_r1_distill_chat_template), conversations(
        10, "ask", "<think>\nwhy\n</think>\nsay"), tmp_path)  # fmt: skip
    assert "why" in learnt(made) and "say" in learnt(made)


@pytest.mark.parametrize("template", [chat_template_utils.qwen3_chat_template, chat_template_utils.llama3_chat_template,
                                      CHATML], ids=["qwen3", "llama3", "chatml"])  # fmt: skip
def test_all_answers_have_a_loss_where_the_recipe_asks_for_it(base, tmp_path, template):
    rows = conversations(10, "hi", "hello", "ask", "say")
    last = prepared(base(template), rows, tmp_path)
    every = prepared(base(template), rows, tmp_path, train_on="all")
    assert "hello" not in learnt(last) and "say" in learnt(last)
    assert all(word in learnt(every) for word in ("hello", "say"))
    assert not any(word in learnt(every) for word in ("hi ", "ask "))


def test_all_answers_are_labelled_as_trls_assistant_only_loss(base, tmp_path):
    tokenizer = byte_tokenizer(chat_template_utils.qwen3_training_chat_template)
    messages = said("hi", "hello", "ask", "say")
    ours = labelled({"prompt": messages[:3], "completion": messages[3:], "trained": [1, 3]}, tokenizer)
    theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert ours["input_ids"] == theirs["input_ids"]
    assert [label != -100 for label in ours["labels"]] == [bool(mask) for mask in theirs["assistant_masks"]]


@pytest.mark.parametrize("task", ["sft", "language-modeling"])
def test_a_text_that_went_through_the_template_has_one_bos(base, tmp_path, task):
    rows = [{"text": f"<|endoftext|>ask {n} say {n}<|im_end|>"} for n in range(10)]
    ids = prepared(base(None, bos=True), rows, tmp_path, task=task).splits["train"][0]["input_ids"]
    assert (ids.count(0), ids[0], ids.count(2), ids[-1]) == (1, 0, 1, 2)


def test_a_template_that_writes_bos_itself_gives_one(base, tmp_path):
    template = "{{ bos_token }}" + CHATML
    ids = prepared(base(template, bos=True), conversations(10, "ask", "say"), tmp_path).splits["train"][0]["input_ids"]
    assert ids.count(0) == 1


@pytest.mark.parametrize("task", ["sft", "dpo", "kto", "reward"])
def test_tools_that_the_template_leaves_out_are_named(base, tmp_path, task):
    answers = {
        "sft": {"completion": "say"},
        "kto": {"completion": "say", "label": True},
        "dpo": {"chosen": "good", "rejected": "bad"},
        "reward": {"chosen": "good", "rejected": "bad"},
    }
    tools = [{"type": "function", "function": WEATHER}]
    rows = [{"prompt": f"ask {n}", **answers[task], "tools": tools} for n in range(10)]
    with pytest.raises(RecipeError, match="tools, and the chat template leaves out 'weather'"):
        prepared(base(), rows, tmp_path, task=task)


def test_a_system_message_that_the_template_leaves_out_is_noted(base, tmp_path):
    without = "{% for message in messages if message['role'] != 'system' %}" + CHATML.partition("%}")[2]
    rows = [{"messages": [{"role": "system", "content": "be kind"}, *said(f"ask {n}", "say")]} for n in range(10)]
    (note,) = [note for note in prepared(base(without), rows, tmp_path).notes if "leaves out" in note]
    assert "earlier messages of the role 'system' (6 of the first 6 training rows)" in note


def test_reasoning_beside_the_content_is_learnt_or_named(base, tmp_path):
    rows = [
        {"messages": [*said(f"ask {n}"), {"role": "assistant", "content": "say", "reasoning_content": "why"}]}
        for n in range(10)
    ]
    assert "why" in learnt(prepared(base(chat_template_utils.qwen3_chat_template), rows, tmp_path))
    with pytest.raises(RecipeError, match=r"reasoning \(reasoning_content\) that the chat template leaves out"):
        prepared(base(), rows, tmp_path)


def test_keys_of_messages_that_the_template_does_not_read_are_named(base, tmp_path):
    rows = [{"messages": [{**m, "mood": "calm"} for m in said(f"ask {n}", "say")]} for n in range(10)]
    assert "The chat template does not read the messages' mood." in prepared(base(), rows, tmp_path).notes


def test_an_empty_or_missing_conversation_is_left_out_and_counted(base, tmp_path):
    rows = conversations(12, "ask", "say")
    rows[3]["messages"], rows[4]["messages"][1]["content"], rows[5]["messages"] = [], None, None
    made = prepared(base(), rows, tmp_path, skip_rows=0.9, train=None, validation=4, test=4)
    assert sum(int(note.split()[0]) for note in made.notes if "left out: an empty answer" in note) == 3


def test_a_call_that_the_template_leaves_out_is_named(base, tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]}
    with pytest.raises(RecipeError, match=r"a call of 'weather' that the chat template leaves out.*chat_template"):
        prepared(base(), [{"messages": [*said(f"ask {n}"), call]} for n in range(10)], tmp_path)


def test_messages_that_the_template_refuses_are_left_out_up_to_the_share(base, tmp_path):
    plain, system = conversations(19, "ask", "say"), {"role": "system", "content": "be kind"}
    one = {"messages": [system, *said("ask", "say")]}
    made = prepared(base(WITHOUT_SYSTEM), [*plain, one], tmp_path, validation=4, test=4)
    (note,) = [note for note in made.notes if "left out" in note]
    assert "messages that the chat template refuses (no system role)" in note and "-19)" in note
    rows = [*plain[:15], *[{"messages": [system, *said(f"ask {n}", "say")]} for n in range(5)]]
    with pytest.raises(RecipeError, match=r"no system role.*leave them out: --set dataset.skip_rows=0."):
        prepared(base(WITHOUT_SYSTEM), rows, tmp_path, train=None, validation=1, test=1, seed=1)


def test_one_conversation_that_ends_with_the_user_is_left_out_and_counted(base, tmp_path):
    rows = conversations(10, "ask", "say")
    rows[5]["messages"].append({"role": "user", "content": "thanks"})
    made = prepared(base(), rows, tmp_path)
    assert "1 train row was left out: no answer of the assistant at its end (train-5)." in made.notes
    rows = [{"messages": row["messages"][:1]} if n < 5 else row for n, row in enumerate(rows)]
    with pytest.raises(RecipeError, match=r"can't be used: row train-\d has no answer of the assistant"):
        prepared(base(), rows, tmp_path)
    assert len(prepared(base(), rows, tmp_path, skip_rows=0.9).ids["train"]) < 6


def test_several_turns_need_a_chat_template_which_the_recipe_can_give(base, tmp_path):
    rows = conversations(10, "hi", "hello", "ask", "say")
    with pytest.raises(RecipeError, match=r"row train-\d: it has several turns.*dataset.chat_template=chatml"):
        prepared(base(None), rows, tmp_path)
    file = tmp_path / "mine.jinja"
    file.write_text(CHATML.replace("<|im_start|>", "@"))
    given = prepared(base(None), rows, tmp_path, chat_template=str(file))
    assert "@user\nhi" in given.processor.decode(given.splits["train"][0]["input_ids"])
    with pytest.raises(RecipeError, match=r"no file 'chatlm'. Did you mean 'chatml'"):
        prepared(base(None), rows, tmp_path, chat_template="chatlm")
    with pytest.raises(RecipeError, match=r"dataset.chat_template, line 1"):
        prepared(base(None), rows, tmp_path, chat_template="{% for %}")


def test_a_run_stores_its_chat_template_and_the_tokenizer_that_has_it(base, tmp_path):
    from transformers import AutoTokenizer

    file = tmp_path / "mine.jinja"
    file.write_text(CHATML)
    recipe = recipe_of(base(None), conversations(10, "hi", "hello", "ask", "say"), tmp_path, chat_template=str(file))
    from peft import LoraConfig

    recipe.arms["lora"] = Arm(LoraConfig(r=2, target_modules=["q_proj"]), 1e-3)
    run = train(recipe, "lora", output=tmp_path / "runs")
    file.unlink()
    assert AutoTokenizer.from_pretrained(run.folder).chat_template == CHATML
    from peft_recipes import load_recipe

    assert load_recipe(str(run.folder / "recipe.yaml")).dataset.chat_template == CHATML


def test_columns_that_nothing_reads_are_named(base, tmp_path):
    rows = [{"instruction": f"ask {n}", "output": f"say {n}", "source": "web", "weight": 1} for n in range(10)]
    assert "Columns not used: source, weight." in prepared(base(), rows, tmp_path).notes
    pairs = [{"prompt": f"ask {n}", "chosen": "a", "rejected": "b", "score_chosen": 1} for n in range(10)]
    assert "Columns not used: score_chosen." in prepared(base(), pairs, tmp_path, task="dpo").notes


def test_columns_of_any_name_are_read_by_a_mapping(base, tmp_path):
    rows = [{"q": f"ask {n}", "a": f"say {n}", "about": "it", "first": "be kind"} for n in range(10)]
    columns = {"prompt": "q", "completion": "a", "context": "about", "system": "first"}
    made = prepared(base(), rows, tmp_path, columns=columns)
    text = made.processor.decode(made.splits["train"][0]["input_ids"])
    assert "be kind" in text and "\n\nit<|im_end|>" in text and learnt(made).startswith("say")
    with pytest.raises(RecipeError, match=r"Unknown key 'promt' in dataset.columns. Did you mean 'prompt'"):
        prepared(base(), rows, tmp_path, columns={"promt": "q"})
    with pytest.raises(RecipeError, match=r"no column 'abou'. Did you mean 'about'"):
        prepared(base(), rows, tmp_path, columns={**columns, "context": "abou"})


def test_a_misspelt_role_names_the_nearest(base, tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "asistant", "content": "b"}]}] * 10
    with pytest.raises(RecipeError, match=r"got the role 'asistant'. Did you mean 'assistant'"):
        prepared(base(), rows, tmp_path)


def test_a_null_argument_of_a_call_stays_and_a_key_of_another_row_does_not(base, tmp_path):
    calls = [{"name": "f", "arguments": {"city": None}}, {"name": "g", "arguments": {"day": 3}}]
    rows = [
        {
            "messages": [
                *said(f"ask {n}"),
                {"role": "assistant", "content": "", "tool_calls": [{"function": calls[n % 2]}]},
            ]
        }
        for n in range(10)
    ]
    made = prepared(base(), rows, tmp_path, chat_template="chatml")
    texts = {learnt(made, number) for number in range(len(made.ids["train"]))}
    assert texts == {f"<tool_call>\n{json.dumps(call)}\n</tool_call><|im_end|>\n" for call in calls}
