"""seq2seq: columns, tokens, the losses of a plain Seq2SeqTrainer, saved weights, answers, wrong input."""

from __future__ import annotations

import copy
import json
import os
import random

import numpy as np
import pandas
import pytest
import torch
import transformers
from architectures import ENCODER_DECODERS, save_tiny_encoder_decoder
from datasets import Dataset as Rows
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from rows import input_target_rows
from small import compared_here, tokenizer
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)
from typer.testing import CliRunner

from peft_recipes import Arm, Dataset, RecipeError, plan, targets, train
from peft_recipes.adapters.open import evaluate, open_adapter
from peft_recipes.cli.app import app
from peft_recipes.models import bases
from peft_recipes.models.module_matching import matched_modules
from peft_recipes.scoring.generation import generate
from peft_recipes.tasks.registry import task_of

KINDS = ("t5", "bart")
SOME = ("mt5", "pegasus", "m2m_100")  # the last has no method that shifts its labels
FORMATS = {
    "prompt and completion": {"prompt": "we saw", "completion": "a film"},
    "input and target": {"input": "we saw", "target": "a film"},
    "alpaca": {"instruction": "we saw", "input": "", "output": "a film"},
}


def read_rows(*rows, **columns):
    data = Rows.from_list([{"id": f"train-{i}", **row} for i, row in enumerate(rows)])
    kept, left_out = input_target_rows(data, Dataset("d.jsonl", **columns))
    return [(row["prompt"], row["completion"]) for row in kept], left_out


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_pair(name):
    assert read_rows(FORMATS[name]) == ([("we saw", "a film")], {})


def test_columns_of_any_name_alpacas_input_and_empty_values():
    article = {"article": "we saw", "highlights": "a film"}
    assert read_rows(article, prompt="article", completion="highlights") == ([("we saw", "a film")], {})
    alpaca = {"instruction": "say it", "input": "we saw", "output": "a film"}
    assert read_rows(alpaca) == ([("say it\n\nwe saw", "a film")], {})
    rows = [{"input": "we saw", "target": t} for t in ("a film", " ", None)] + [{"input": "", "target": "a film"}]
    assert read_rows(*rows) == ([("we saw", "a film")], {"an empty target": 2, "an empty input": 1})


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        (
            {"inputs": "a", "target": "b"},
            {},
            "inputs, target, which are none of the pairs.*prompt=COLUMN",
        ),
        ({"input": "a", "target": "b"}, {"completion": "targt", "prompt": "input"}, "'targt'. Did you mean 'target'"),
        ({"input": "a", "target": 7}, {}, "row train-0, column 'target': expected text, got 7"),
        ({"input": "a", "target": " "}, {}, "1 of 1 rows of 'train' can't be used: row train-0 has an empty target"),
        (
            {"input": "a", "target": "b"},
            {"format": "messages"},
            "'messages' has no input and target",
        ),
    ],
)
def test_malformed_rows_say_where_and_what(row, columns, message):
    with pytest.raises(RecipeError, match=message):
        read_rows(row, **columns)


def test_a_misspelt_column_ends_the_command_with_exit_code_2(translate, tmp_path):
    translate().to_yaml(tmp_path / "recipe.yaml")
    for change, hint in (("dataset.prompt=inptu", "Did you mean 'input'"), ("dataset.compltion=a", "'completion'")):
        command = ["train", str(tmp_path / "recipe.yaml"), "--arm", "lora", "--output", str(tmp_path)]
        done = CliRunner().invoke(app, [*command, "--set", change])
        assert done.exit_code == 2 and hint in " ".join(done.output.replace("│", " ").split())


def test_both_sides_are_truncated_and_counted_and_targets_keep_their_end(translate):
    task = task_of(translate(max_length=6))
    prepared = task.prepare()
    rows = prepared.splits["train"]
    assert max(map(len, rows["input_ids"])) == 6 == max(map(len, rows["labels"]))
    assert any("of 32 training examples were truncated at 6 tokens" in note for note in prepared.notes)
    whole = task_of(translate()).prepare()
    assert all(labels[-1] == whole.processor.eos_token_id for labels in whole.splits["train"]["labels"])
    assert not any("truncated" in note for note in whole.notes)


def test_a_length_beyond_the_models_positions_is_an_error(translate):
    with pytest.raises(RecipeError, match=r"max_length 65: .*64 positions. .*--set max_length=64"):
        task_of(translate("bart", max_length=65)).prepare()
    assert task_of(translate("t5", max_length=999)).prepare()  # relative positions have no limit


def test_a_missing_decoder_start_is_the_padding_token_or_an_error(translate, tiny, tmp_path):
    config = AutoConfig.from_pretrained(tiny("t5"))
    AutoModelForSeq2SeqLM.from_pretrained(tiny("t5")).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    plain = {k: v for k, v in config.to_dict().items() if k not in ("decoder_start_token_id", "bos_token_id")}
    (tmp_path / "config.json").write_text(json.dumps(plain))
    model, _ = bases.load_model(translate(model=str(tmp_path)), AutoModelForSeq2SeqLM)
    assert model.config.decoder_start_token_id == config.pad_token_id
    config.decoder_start_token_id = config.pad_token_id = None
    with pytest.raises(RecipeError, match=r"no decoder_start_token_id.*config\.json"):
        bases.decoder_start(config, "mine")


def plain_losses(recipe, arm, folder, **changes):
    """The losses of each step by transformers' own trainer and collator, with nothing of this package but the rows."""
    task = task_of(recipe)
    prepared = task.prepare()
    transformers.set_seed(0)
    model = AutoModelForSeq2SeqLM.from_pretrained(recipe.model, dtype=torch.float32)
    if arm == "lora":
        model = get_peft_model(model, copy.deepcopy(recipe.arms["lora"].peft))
    options = {**recipe.training, "learning_rate": recipe.arms[arm].learning_rate, "logging_steps": 1,
               "report_to": "none", "save_strategy": "no", "disable_tqdm": True, **changes}  # fmt: skip
    trainer = Seq2SeqTrainer(
        model, Seq2SeqTrainingArguments(str(folder), seed=0, data_seed=0, **options),
        DataCollatorForSeq2Seq(prepared.processor, model), prepared.splits["train"],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("arm", ["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_each_step_and_saved_weights_are_those_of_a_plain_trainer(translate, tmp_path, kind, arm):
    training = {**translate().training, "train_sampling_strategy": "random"}
    recipe = translate(kind, training=training)
    run = train(recipe, arm, output=tmp_path)
    ours = [loss for _, loss in run.data["training"]["losses"]]
    np.testing.assert_allclose(ours, plain_losses(recipe, arm, tmp_path / "plain"), rtol=0, atol=2e-5)
    assert len(ours) == 4 and ours[-1] < ours[0]
    checks = run.data["checks"]
    assert checks["reload"] < 1e-5 and (arm == "full" or checks["merge"] < 1e-5)
    assert not any(isinstance(result, dict) for result in checks.values())


def test_gradient_checkpointing_changes_no_loss(translate, tmp_path):
    runs = [
        train(translate("bart", training={**translate().training, "gradient_checkpointing": on}), "lora",
              output=tmp_path / str(on)).data["training"]["losses"]
        for on in (False, True)
    ]  # fmt: skip
    np.testing.assert_allclose(*runs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ENCODER_DECODERS if os.environ.get("PEFT_RECIPES_EVERY") else SOME)
def test_other_architectures_train_as_in_a_plain_trainer_by_the_walk_over_their_blocks(translate, tmp_path, kind):
    base = save_tiny_encoder_decoder(kind, tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=targets(AutoConfig.from_pretrained(base), "all-linear"))
    training = {**translate().training, "train_sampling_strategy": "random", "max_steps": 3}
    recipe = translate(model=str(base), training=training, arms={"lora": Arm(lora, learning_rate=1e-2)})
    run = train(recipe, "lora", output=tmp_path)
    ours = [loss for _, loss in run.data["training"]["losses"]]
    np.testing.assert_allclose(ours, plain_losses(recipe, "lora", tmp_path / "plain"), rtol=1e-5, atol=2e-5)
    assert run.data["checks"]["reload"] < 1e-5 and run.data["checks"]["merge"] < 1e-5
    assert not any(isinstance(result, dict) for result in run.data["checks"].values())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_steps_loss_is_the_mean_over_its_labelled_tokens_whatever_the_accumulation(translate, tmp_path, smoothing):
    losses = {}
    for batch, accumulation in ((8, 1), (2, 4)):
        training = {**translate().training, "per_device_train_batch_size": batch, "label_smoothing_factor": smoothing,
                    "gradient_accumulation_steps": accumulation, "train_sampling_strategy": "sequential"}  # fmt: skip
        run = train(translate(training=training), "full", output=tmp_path / str(batch))
        losses[batch] = [loss for _, loss in run.data["training"]["losses"]]
    np.testing.assert_allclose(losses[8], losses[2], rtol=0, atol=2e-5)
    if smoothing:  # as transformers smooths labels
        recipe = translate(training={**translate().training, "label_smoothing_factor": smoothing})
        plain = plain_losses(recipe, "full", tmp_path, train_sampling_strategy="sequential")
        np.testing.assert_allclose(losses[8], plain, rtol=0, atol=2e-5)


def test_losses_of_examples_do_not_depend_on_their_batch(translate, tmp_path):
    tables = []
    for size in (8, 1):
        training = {**translate().training, "per_device_eval_batch_size": size, "max_steps": 1}
        run = train(translate(training=training), "full", output=tmp_path / str(size))
        tables.append(pandas.read_parquet(run.folder / "predictions.parquet"))
        loss = np.average(tables[-1]["loss"], weights=tables[-1]["tokens"])
        assert loss == pytest.approx(run.data["metrics"]["test"]["loss"])
    pandas.testing.assert_frame_equal(*tables, check_exact=False, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_leaves_out_the_lm_head_and_the_shared_embedding(tiny, kind):
    model = AutoModelForSeq2SeqLM.from_pretrained(tiny(kind))
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(matched_modules(model, targets(kind, "all-linear"))) == linear - {"lm_head"}
    # The walk over a model's blocks finds the same layers as the table's row.
    from peft_recipes.models.architecture_walk import walk

    for group in ("attention", "mlp", "all-linear"):
        names = walk(model).group(group)
        assert matched_modules(model, names) == matched_modules(model, targets(kind, group))


def test_tokens_and_padding_of_both_sides_are_counted(translate, tmp_path):
    recipe = translate()
    rows = task_of(recipe).prepare().splits["train"]
    figures = train(recipe, "lora", output=tmp_path).data["training"]
    assert figures["tokens"] == sum(len(row["input_ids"]) + len(row["labels"]) for row in rows)
    assert figures["padding_share"] > 0 and figures["batches"] == "padded"


def test_a_plan_needs_no_data_and_its_memory_covers_both_sides(translate):
    short, long = (plan(translate(max_length=n, dataset=Dataset("my-org/none")), ["lora"]) for n in (16, 64))
    memory = [p["arms"]["lora"]["memory"] for p in (short, long)]
    assert memory[0]["played"] and memory[1]["activations"] > memory[0]["activations"] > 0
    assert plan(translate(), ["lora"])["arms"]["lora"]["steps"] == 4


ADAPTERS = {
    "full": lambda kind: None,
    "lora": lambda kind: LoraConfig(target_modules=targets(kind, "attention"), init_lora_weights=False),
    "prompt tuning": lambda kind: PromptTuningConfig(num_virtual_tokens=3),
    "prefix tuning": lambda kind: PrefixTuningConfig(num_virtual_tokens=3),
}


def decided(tiny, kind, method):
    """A model with weights so large that its answers differ, and that rounding changes none."""
    transformers.set_seed(0)
    model = AutoModelForSeq2SeqLM.from_pretrained(tiny(kind))
    for weight in model.parameters():
        weight.data.mul_({"t5": 3, "bart": 10}[kind] if weight.dim() > 1 else 1)
    stored = model.generation_config  # as with summarisers
    stored.num_beams, stored.min_length, stored.forced_eos_token_id, stored.eos_token_id = 4, 6, 1, None
    if config := ADAPTERS[method](kind):
        config.task_type = "SEQ_2_SEQ_LM"
        model = get_peft_model(model, config)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ADAPTERS)
def test_answers_in_batches_are_those_of_each_prompt_alone_and_of_plain_transformers(tiny, kind, method):
    model, draw = decided(tiny, kind, method), random.Random(0)
    prompts = [[draw.randrange(6, 40) for _ in range(length)] for length in range(2, 10)]
    batched = generate(model, prompts, 0, 8, batch_size=3)
    assert batched == [generate(model, [prompt], 0, 8)[0] for prompt in prompts]
    assert len({tuple(answer) for answer in batched}) > 1
    ids = torch.tensor([prompts[2]])
    plain = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, num_beams=1,
                           do_sample=False, min_length=0, forced_eos_token_id=None)  # fmt: skip
    assert batched[2] == plain[0, 1:].tolist()


@pytest.fixture(scope="module")
def compared(translate, tmp_path_factory):
    training = {**translate().training, "num_train_epochs": 12}
    return compared_here(translate(training=training), ["full", "lora"], [0], tmp_path_factory.mktemp("scored"))


def test_arms_are_compared_by_rouge_of_their_answers(compared):
    data = compared.data
    assert data["metric"] == "rougeL" and data["selection_metric"] == "loss" and data["higher_is_better"]
    for arm in ("full", "lora"):
        rows = pandas.read_parquet(compared.folder / arm / "seed-0" / "predictions.parquet")
        metrics = data["arms"][arm]["metrics"]["test"]
        assert metrics["rougeL"] == pytest.approx(rows["rougeL"].mean())
        assert {"loss", "perplexity", "token_accuracy", "bits_per_byte", "ended", "answer_tokens"} <= set(metrics)
        assert list(rows["reference"].str[:6].unique()) == ["it was"] and rows["answer_tokens"].max() <= 10
    assert data["base"]["metrics"]["test"]["rougeL"] < data["arms"]["full"]["metrics"]["test"]["rougeL"]
    assert data["differences"]["lora"]["examples"] == 8
    assert "validation" not in rows["split"].unique() and "rougeL" not in data["arms"]["lora"]["metrics"]["validation"]


def test_a_reloaded_adapter_gives_the_same_answers_and_loss(compared):
    folder = compared.folder / "lora" / "seed-0"
    opened = open_adapter(folder)
    again = evaluate(opened, opened.attach(opened.load_base()))
    rows = pandas.read_parquet(folder / "predictions.parquet")
    assert again.predictions["answer"] == rows["answer"].tolist()
    np.testing.assert_allclose(again.predictions["loss"], rows["loss"], atol=1e-5)


@pytest.mark.parametrize("metric", ["bleu", "chrf", "exact_match"])
def test_other_metrics_of_answers_and_options_of_generation(translate, tmp_path, metric):
    recipe = translate(metric=metric, generation={"num_beams": 2, "max_new_tokens": 3})
    run = train(recipe, "base", output=tmp_path)
    rows = pandas.read_parquet(run.folder / "predictions.parquet")
    assert run.metrics["test"][metric] == pytest.approx(rows[metric].mean()) and rows["answer_tokens"].max() <= 3
    with pytest.raises(RecipeError, match=f"Did you mean '{metric}'"):
        translate(metric=metric[:-1] + "x")


def test_virtual_tokens_count_against_the_models_positions(translate):
    arm = {"prompt-tuning": Arm(PromptTuningConfig(num_virtual_tokens=20), learning_rate=1e-2)}
    with pytest.raises(RecipeError, match=r"64 positions, and 20 virtual tokens are added.*--set max_length=44"):
        train(translate("bart", arms=arm, max_length=60), "prompt-tuning")


def test_a_linear_probe_is_refused(translate):
    with pytest.raises(RecipeError, match="'head' needs a task head; a seq2seq model has only its LM head"):
        translate(arms={"head": Arm("head", learning_rate=1e-3)})


def test_generation_options_of_the_trainer_are_set_by_the_recipe(translate):
    for option in ("generation_max_length", "predict_with_generate", "sortish_sampler"):
        with pytest.raises(RecipeError, match=f"training.{option}: "):
            translate(training={option: 5 if "length" in option else True})
