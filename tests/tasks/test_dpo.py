"""dpo: formats and tokens as in trl, figures compared with the untrained base, training of every arm."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pandas
import pytest
import torch
from datasets import Dataset as Rows
from peft import LoraConfig
from rows import preference_rows
from small import tiny_config, tokenizer
from trl import DPOConfig, DPOTrainer
from typer.testing import CliRunner

from peft_recipes import Arm, Dataset, RecipeError, compare, train
from peft_recipes.arms.selection import choose_arms
from peft_recipes.cli.app import app
from peft_recipes.data.cache import stored
from peft_recipes.data.preferences import IDENTICAL
from peft_recipes.data.skipped import EMPTY, NO_PROMPT
from peft_recipes.planning.plan import plan
from peft_recipes.tasks import dpo
from peft_recipes.tasks.preference_trainer import PREDICTED
from peft_recipes.tasks.registry import task_of


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


ASK, GOOD, BAD = "say good", "warm film", "cold film"
FORMATS = {
    "text": {"prompt": ASK, "chosen": GOOD, "rejected": BAD},
    "messages": {"prompt": [user(ASK)], "chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]},
    "messages without a prompt": {"chosen": [user(ASK), assistant(GOOD)], "rejected": [user(ASK), assistant(BAD)]},
    "messages that repeat a prompt of text": {
        "prompt": ASK, "chosen": [user(ASK), assistant(GOOD)], "rejected": [user(ASK), assistant(BAD)],
    },
    "messages that repeat the prompt": {
        "prompt": [user(ASK)], "chosen": [user(ASK), assistant(GOOD)], "rejected": [user(ASK), assistant(BAD)],
    },
    "text after messages": {"prompt": [user(ASK)], "chosen": GOOD, "rejected": BAD},
    "messages after text": {"prompt": ASK, "chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]},
}  # fmt: skip


def read_pairs(*rows, chat=True, **columns):
    data = Rows.from_list([{"id": f"train-{i}", **row} for i, row in enumerate(rows)])
    kept, left_out = preference_rows(data, Dataset("d.jsonl", **columns), chat)
    return [{k: v for k, v in row.items() if k != "id"} for row in kept], left_out


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_pair(name):
    rows, left_out = read_pairs(FORMATS[name])
    assert rows == [FORMATS["messages"]] and not left_out
    (plain,), _ = read_pairs(FORMATS[name], chat=False)
    assert plain == {"prompt": f"### Instruction:\n{ASK}\n\n### Response:\n", "chosen": GOOD, "rejected": BAD}


def test_without_a_prompt_the_common_beginning_becomes_the_prompt():
    row = {"chosen": "Human: say good Assistant: warm film", "rejected": "Human: say good Assistant: cold film"}
    for chat in (True, False):
        assert read_pairs(row, chat=chat)[0] == [
            {"prompt": "Human: say good Assistant:", "chosen": " warm film", "rejected": " cold film"}
        ]
    assert read_pairs({"chosen": "warm ", "rejected": "cold "})[0] == [
        {"prompt": "", "chosen": "warm ", "rejected": "cold "}
    ]


def test_unusable_pairs_are_counted_by_reason():
    rows = [FORMATS["text"], {**FORMATS["text"], "rejected": GOOD}, {**FORMATS["text"], "chosen": "  "},
            {**FORMATS["text"], "chosen": None}, {**FORMATS["text"], "prompt": None}]  # fmt: skip
    kept, left_out = read_pairs(*rows)
    assert len(kept) == 1 and left_out == {IDENTICAL: 1, EMPTY: 2, NO_PROMPT: 1}
    assert read_pairs(FORMATS["text"], {**FORMATS["text"], "prompt": ""})[1] == {NO_PROMPT: 1}
    empty = {**FORMATS["messages without a prompt"], "prompt": []}
    assert read_pairs(empty)[0] == [FORMATS["messages"]]
    bare = {"chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]}
    assert read_pairs(FORMATS["messages without a prompt"], bare)[1] == {NO_PROMPT: 1}
    assert read_pairs(FORMATS["messages without a prompt"], {"chosen": [], "rejected": []})[1] == {EMPTY: 1}


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"chosn": GOOD, "rejected": BAD}, {}, "no column 'chosen'. Did you mean 'chosn'?"),
        ({"chosen": GOOD, "worse": BAD}, {}, "no column 'rejected'.* It has: chosen, worse.*dataset.rejected=COLUMN"),
        ({"a": GOOD, "b": BAD}, {"chosen": "a", "rejected": "c"}, "no column 'c'"),
        (FORMATS["text"], {"prompt": "promt"}, "no column 'promt'. Did you mean 'prompt'?"),
        ({**FORMATS["text"], "chosen": 7, "rejected": 8}, {}, "row train-0, column 'chosen': expected text or a list"),
        ({"chosen": [{"role": "user"}], "rejected": [user(ASK)]}, {}, "row train-0 has an empty answer"),
        (
            {"prompt": ASK, "chosen": GOOD, "rejected": GOOD},
            {},
            "row train-0 has the same answer twice",
        ),
    ],
)
def test_malformed_pairs_say_where_and_what(row, columns, message):
    with pytest.raises(RecipeError, match=message):
        read_pairs(row, **columns)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_pairs_are_tokenised_as_in_trl(prefer, kind, tmp_path):
    task = task_of(prefer(kind, arms={"full": Arm()}))
    ours = task.prepare()
    raw, _ = preference_rows(task.raw_splits()["train"], task.recipe.dataset, chat=kind == "llama")
    by_id = {row["id"]: {k: row[k] for k in ("prompt", "chosen", "rejected")} for row in raw}
    if kind == "gpt2":  # trl appends the end token as text, which a word-level tokenizer splits off
        by_id = {i: {**row, **{k: row[k] + " <eos>" for k in ("chosen", "rejected")}} for i, row in by_id.items()}
    config = DPOConfig(output_dir=str(tmp_path), max_length=40, use_cpu=True, bf16=False, report_to="none",
                       precompute_ref_log_probs=True)  # fmt: skip
    model, _ = task.load_base(ours)
    task.use_base(model, ours)
    theirs = DPOTrainer(model=model, args=config, train_dataset=Rows.from_list([by_id[i] for i in ours.ids["train"]]),
                        processing_class=ours.processor).train_dataset  # fmt: skip
    for mine, other in zip(ours.splits["train"], theirs, strict=True):
        for key in ("prompt_ids", "chosen_ids", "rejected_ids"):
            assert mine[key] == other[key]
        for key in ("ref_chosen_logps", "ref_rejected_logps"):  # the reference log-probabilities, of both
            assert mine[key] == pytest.approx(other[key], rel=1e-5)


def test_answers_are_truncated_and_pairs_without_a_difference_left_out(prefer, tmp_path):
    path = tmp_path / "long.jsonl"
    rows = [{"prompt": "say good", "chosen": f"warm {word} " + "film " * 9, "rejected": f"cold {word} " + "film " * 9}
            for word in ("day", "was", "it", "we", "so", "saw", "very", "and")]  # fmt: skip
    rows += [{"prompt": "say good", "chosen": "film " * 9 + word, "rejected": "film " * 9} for word in ("day", "we")]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    recipe = prefer(dataset=Dataset(str(path), train=6, validation=2, test=2), max_length=10)
    prepared = task_of(recipe).prepare()
    notes = " ".join(prepared.notes)
    assert "training pairs were truncated at 10 tokens" in notes and "the same answer twice after truncation" in notes
    for split, pairs in prepared.splits.items():
        assert len(pairs) == len(prepared.ids[split])
        for pair in pairs:
            sizes = [len(pair["prompt_ids"]) + len(pair[key]) for key in ("chosen_ids", "rejected_ids")]
            assert max(sizes) <= 10 and pair["length"] == sum(sizes) and pair["chosen_ids"] != pair["rejected_ids"]
    with pytest.raises(RecipeError, match="--set max_length=8"):
        task_of(prefer(max_length=4)).prepare()


def test_a_pair_of_the_test_split_is_removed_from_train(prefer, preferences, tmp_path):
    path = tmp_path / "twice.jsonl"
    path.write_text(preferences.read_text() * 2)
    recipe = prefer(dataset=Dataset(str(path), train=64, validation=16, test=32))
    prepared = task_of(recipe).prepare()
    assert any("also occur in a later split" in note for note in prepared.notes)

    def answers(split):
        return {(tuple(pair["prompt_ids"]), tuple(pair["chosen_ids"])) for pair in prepared.splits[split]}

    assert not answers("train") & answers("test") and not answers("validation") & answers("test")


def test_a_tie_counts_half_and_figures_follow_their_definitions():
    rows = dict.fromkeys(PREDICTED, np.zeros(4))
    rows |= {"chosen": np.array([-5.0, -9.0, -7.0, -6.0]), "rejected": np.array([-6.0, -4.0, -7.0, -9.0]),
             "ref_chosen": np.array([-5.0, -8, -9, -6 + 1e-5]), "ref_rejected": np.array([-5.0, -4, -8, -9]),
             "chosen_tokens": np.array([5.0, 3, 7, 2]), "rejected_tokens": np.array([3.0, 2, 7, 2])}  # fmt: skip
    found = dpo.per_pair(np.stack([rows[name] for name in PREDICTED], axis=1), beta=0.5)
    assert found["preference_accuracy"].tolist() == [1.0, 0.0, 1.0, 0.5]
    assert found["likelihood_accuracy"].tolist() == [1.0, 0.0, 0.5, 1.0]
    assert found["margin"] == pytest.approx([0.5, -0.5, 0.5, 0.0], abs=1e-5)


@pytest.mark.parametrize("arm", ["full", "lora"])
def test_an_arm_learns_preferences_and_saves_only_its_own_weights(prefer, tmp_path, arm):
    run, base = (train(prefer(), name, output=tmp_path) for name in (arm, "base"))
    assert base.metrics["test"]["preference_accuracy"] == 0.5 and abs(base.metrics["test"]["margin"]) < 1e-5
    assert run.metrics["test"]["preference_accuracy"] > 0.9 and run.metrics["test"]["margin"] > 0
    assert run.metrics["test"]["loss"] < base.metrics["test"]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert run.metrics["test"].keys() == {"preference_accuracy", "likelihood_accuracy", "margin", "loss"}
    training = run.data["training"]
    assert training["batches"] == "shared-prefix" and training["computed_tokens"] < 0.8 * training["tokens"]
    assert training["first_pass_seconds"] > 0 and training["examples"] == 64
    assert run.data["checks"]["reload"] < 1e-6 and run.data["answers"][0]["prompt"] == "say good in a film"
    assert (run.folder / "adapter_model.safetensors").exists() == (arm == "lora")
    assert (run.folder / "model.safetensors").exists() == (arm == "full")
    rows = pandas.read_parquet(run.folder / "predictions.parquet")
    assert len(rows) == 16 and rows["margin"].mean() == pytest.approx(run.metrics["test"]["margin"])


def test_the_log_probabilities_are_those_of_a_plain_forward(prefer, tmp_path):
    run = train(prefer(), "base", output=tmp_path)
    task = task_of(prefer())
    prepared = task.prepare()
    model, _ = task.load_base(prepared)
    rows = pandas.read_parquet(run.folder / "predictions.parquet")
    for pair, found in zip(prepared.splits["test"], rows.itertuples(), strict=True):
        for key in ("chosen", "rejected"):
            ids = torch.tensor([pair["prompt_ids"] + pair[f"{key}_ids"]])
            with torch.no_grad():
                log_probs = model.eval()(input_ids=ids).logits.log_softmax(-1)[0, :-1]
            own = log_probs.gather(-1, ids[0, 1:, None])[len(pair["prompt_ids"]) - 1 :].sum().item()
            assert getattr(found, f"{key}_log_probability") == pytest.approx(own, rel=1e-5)
            assert getattr(found, f"ref_{key}_log_probability") == pytest.approx(own, rel=1e-5)


def test_the_reference_of_an_adapter_that_changes_its_base_is_the_unchanged_base(prefer, tmp_path):
    pissa = LoraConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj", "v_proj"])
    recipe = prefer(arms={"pissa": Arm(pissa, learning_rate=1e-9)}, skip_checks=["merge"])
    run = train(recipe, "pissa", output=tmp_path)
    assert run.data["training"]["losses"][0][1] == pytest.approx(np.log(2), abs=1e-4)


def test_a_comparison_computes_the_reference_once_and_pairs_the_arms(prefer, tmp_path):
    recipe = prefer()
    found = compare(recipe, output=tmp_path)
    assert {arm["status"] for arm in found.data["arms"].values()} == {"ok"}
    first = {json.loads((tmp_path / recipe.name / arm / "seed-0" / "run.json").read_text())["training"][
        "first_pass_seconds"] for arm in ("full", "lora")}  # fmt: skip
    assert len(first) == 1
    difference = found.data["differences"]["lora"]
    assert difference["margin"] == 0.01 and len(difference["ci95"]) == 2
    assert found.data["metric"] == "preference_accuracy" and found.data["higher_is_better"]
    assert found.data["base"]["metrics"]["test"]["preference_accuracy"] == 0.5
    text = (tmp_path / recipe.name / "comparison.md").read_text()
    assert "Test preference accuracy" in text and "50.0 %" in text and "half" in text
    assert not (tmp_path / recipe.name / ".data").exists()


def test_preference_pairs_can_be_planned_and_tried(prefer):
    made_plan = plan(prefer(), trial=True)
    for name, arm in made_plan["arms"].items():
        assert arm["steps"] == 8 and arm["memory"]["played"] and arm["memory"]["total"] > 0, name
        assert arm["trial"]["seconds_per_step"] > 0
    one = plan(prefer(training={"per_device_train_batch_size": 1}))["arms"]["full"]["memory"]
    assert one["activations"] < made_plan["arms"]["full"]["memory"]["activations"]


def test_further_evaluation_sets_have_their_own_columns_and_missing_ones_a_note(prefer, tmp_path):
    path = tmp_path / "further.jsonl"
    path.write_text("".join(json.dumps({"q": ASK, "yes": f"{GOOD} {i}", "no": BAD}) + "\n" for i in range(4)))
    further = {"path": str(path), "prompt": "q", "chosen": "yes", "rejected": "no", "test": 4}
    missing = {name: {"path": f"nobody/{name}"} for name in ("nothing", "none")}
    prepared = task_of(prefer(evaluate_also={"further": further, **missing})).prepare()
    assert len(prepared.splits["further"]) == 4
    assert sum("Left out: evaluate_also.no" in note for note in prepared.notes) == 2


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"loss_type": ["sigmid"]}, "Did you mean 'sigmoid'"),
        ({"bta": 0.1}, "Did you mean 'beta'"),
        ({"precompute_ref_log_probs": False}, "computed once, before training"),
        ({"sync_ref_model": True}, "stays the untrained base"),
    ],
)
def test_unsupported_options_are_refused_before_anything_is_written(prefer, tmp_path, training, message):
    with pytest.raises(RecipeError, match=message):
        train(prefer(training={"use_cpu": True, **training}), "lora", output=tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_a_head_arm_is_refused_and_an_unknown_metric_lists_the_valid_ones(prefer):
    with pytest.raises(RecipeError, match="'head' needs a task head"):
        prefer(arms={"head": Arm("head")})
    with pytest.raises(RecipeError, match="Valid: loss, preference_accuracy"):
        prefer(metric="accuracy")


def test_a_saved_adapter_passes_its_check(prefer, tmp_path):
    run = train(prefer(), "lora", output=tmp_path)
    shown = CliRunner().invoke(app, ["check", str(run.folder)])
    assert shown.exit_code == 0, shown.output


def test_every_loss_type_exists_in_trl():
    import inspect

    source = inspect.getsource(DPOTrainer._compute_loss)
    assert all(f'loss_type == "{kind}"' in source for kind in dpo.LOSSES)
    assert Counter(source.split()).get("elif", 0) >= len(dpo.LOSSES) - 1


def test_the_reference_is_computed_again_for_another_key(tmp_path):
    from transformers import AutoModelForCausalLM

    from peft_recipes.hardware.device import choose
    from peft_recipes.tasks.preference_trainer import PreferenceTrainer
    from peft_recipes.tasks.reference import Reference

    model = AutoModelForCausalLM.from_config(tiny_config("llama", len(tokenizer())))
    rows = {"train": Rows.from_list([{"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9], "length": 7}])}
    reference = Reference(PreferenceTrainer.padded_collator(0), choose({"use_cpu": True}), 8, None)
    first = reference.add(model, rows, tmp_path, {"model": "a"})["train"][0]
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    kept, again = (reference.add(model, rows, tmp_path, {"model": name})["train"][0] for name in ("a", "b"))
    assert kept == first and again["ref_chosen_logps"] != first["ref_chosen_logps"]


def test_the_reference_of_a_quantised_arm_is_the_quantised_base_alone_and_in_a_comparison(prefer, tiny, tmp_path):
    recipe = choose_arms(prefer(model=str(tiny("llama", 64))), ["full", "lora-int8"]).recipe
    prepared = task_of(recipe).prepare()
    with stored(prepared, tmp_path / "data") as data:  # as the runs of a comparison share it, full first
        train(recipe, "full", output=tmp_path / "compared", data=data)
        together = train(recipe, "lora-int8", output=tmp_path / "compared", data=data)
    alone = train(recipe, "lora-int8", output=tmp_path / "alone")
    tables = [pandas.read_parquet(run.folder / "predictions.parquet") for run in (together, alone)]
    pandas.testing.assert_frame_equal(*tables)
    assert together.metrics == alone.metrics
