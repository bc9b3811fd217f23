"""The table of methods: each one trains, saves only its adapter and reloads with the same outputs, or is rejected."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from small import compared_here
from typer.testing import CliRunner

from peft_recipes import Arm, Dataset, Recipe, RecipeError, plan, train
from peft_recipes.arms.methods import METHODS, NOT_IN_TABLE, table
from peft_recipes.arms.selection import choose_arms
from peft_recipes.catalog.changes import apply_changes
from peft_recipes.cli.app import app
from peft_recipes.data.cache import stored
from peft_recipes.models.quantisation import TOLERANCE
from peft_recipes.tasks.method_mixin import fit_schedules
from peft_recipes.tasks.registry import task_of

CLASSIFY, SFT = "text-classification", "sft"
SEQ2SEQ = "seq2seq"
WHERE = [("gpt2", CLASSIFY), ("distilbert", CLASSIFY), ("llama", SFT), ("t5", SEQ2SEQ)]
HEADLESS = ("adaption-prompt", "trainable-tokens")
NO_CONV1D = ("oft", "boft", "loha", "lokr", "delora", "hra", "miss", "shira", "c3a", "road")
# The methods that do not fit a base, with a part of the message.
UNFIT = {
    ("distilbert", "prefix-tuning"): "past_key_values, which DistilBertModel does not take",
    ("llama", "bitfit"): "has no biases",
    ("t5", "bitfit"): "has no biases",
    ("t5", "adaption-prompt"): "Unsupported model type for adaption prompt: 't5'",
    ("gpt2", "olora"): "Conv1D layers the wrong way round",
    ("llama", "trainable-tokens"): "tied to the LM head",
    **{(kind, name): "saves no classification head" for kind in ("gpt2", "distilbert") for name in HEADLESS},
    **{("gpt2", name): "Conv1D.*not supported" for name in NO_CONV1D},
}
NO_PIXELS = ("prompt-tuning", "prefix-tuning", "p-tuning", *HEADLESS)


@pytest.fixture
def short(classify, instruct, translate):
    """short(kind, task) -> a recipe of three steps with only the full arm."""

    def make(kind: str, task: str, **changes) -> Recipe:
        recipe = {SFT: instruct, CLASSIFY: classify, SEQ2SEQ: translate}[task](kind)
        return Recipe(**{
            **vars(recipe),
            "dataset": Dataset(**{**vars(recipe.dataset), "train": 24, "validation": 8, "test": 8}),
            "training": {"max_steps": 3, "per_device_train_batch_size": 8, "use_cpu": True, "eval_strategy": "no"},
            "arms": {"full": Arm(learning_rate=5e-3)},
            "prompts": [],
            **({"metric": "loss"} if task == SEQ2SEQ else {}),  # no answers: they take most of the time
            **changes,
        })  # fmt: skip

    return make


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """data(recipe) -> the path of its data, prepared once for all methods, as in a comparison."""
    with contextlib.ExitStack() as stack:
        paths: dict[tuple[str, str], Path] = {}

        def of(recipe: Recipe) -> Path:
            key = (recipe.task, recipe.model)
            if key not in paths:
                path = tmp_path_factory.mktemp("data") / "rows"
                paths[key] = stack.enter_context(stored(task_of(recipe).prepare(), path))
            return paths[key]

        yield of


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("kind", "task"), WHERE, ids=lambda value: value)
def test_a_method_trains_and_reloads_or_is_rejected_with_a_reason(short, data, tiny, tmp_path, kind, task, name):
    wide = {"model": str(tiny(kind, 64))} if METHODS[name].arm.get("quantise") else {}  # NF4 quantises blocks of 64
    recipe = short(kind, task, **wide)
    if (kind, name) in UNFIT:
        with pytest.raises(RecipeError, match=UNFIT[kind, name]):
            train(recipe, name, output=tmp_path)
        assert not (tmp_path / recipe.name).exists()
        return
    run = train(recipe, name, output=tmp_path, data=data(recipe))
    data, checks = run.data, run.data["checks"]
    assert data["status"] == "ok" and data["training"]["steps"] == 3
    assert checks["learning"] is True and checks["frozen"] is True
    assert checks["reload"] <= (TOLERANCE["int8"] if name == "lora-int8" else 1e-4)
    merges = METHODS[name].merges and name != "bitfit"
    assert isinstance(checks.get("merge"), float) == merges
    assert not list(run.folder.glob("model*.safetensors"))
    # The adapter and, in classification, the new head; nothing else.
    assert data["parameters"]["adapter"] > 0 and (data["parameters"]["head"] > 0) == (task == CLASSIFY)


def test_with_virtual_tokens_each_text_of_a_batch_is_classified_by_its_own_last_token(short, tmp_path):
    """GPT-2 finds the last token by the padding token; with input embeddings it would read padding instead."""
    from peft_recipes.arms.apply import apply_arm

    recipe = choose_arms(short("gpt2", CLASSIFY), ["prompt-tuning"]).recipe
    task = task_of(recipe)
    prepared = task.prepare()
    base, new = task.load_base(prepared)
    model, _ = apply_arm(base, recipe.arms["prompt-tuning"], recipe.task, new)
    rows = [prepared.splits["train"][i] for i in range(2)]
    rows[1] = {**rows[1], "input_ids": rows[1]["input_ids"][:3], "attention_mask": [1, 1, 1]}
    batch = {k: v for k, v in task.collator(prepared)(rows).items() if k != "labels"}
    with torch.no_grad():
        batched = model.eval()(**batch).logits
        alone = [model(**{k: torch.tensor([row[k]]) for k in ("input_ids", "attention_mask")}).logits for row in rows]
    assert torch.allclose(batched, torch.cat(alone), atol=1e-5)


def test_all_is_the_recipes_own_arms_and_every_method_that_fits(short):
    chosen = choose_arms(short("gpt2", CLASSIFY), ["all"])
    unfit = {name for kind, name in UNFIT if kind == "gpt2"}
    assert chosen.names == ["full", *(name for name in METHODS if name not in unfit)]
    assert set(chosen.left_out) == unfit | set(NOT_IN_TABLE)
    assert any("oft: " in note and "Conv1D" in note for note in chosen.notes)
    images = choose_arms(Recipe(name="i", task="image-classification", model="small-cnn",
                                dataset=Dataset("embedded:mnist", labels=list("0123456789")),
                                arms={"full": Arm(learning_rate=1e-3)}), ["all"])  # fmt: skip
    assert {*NO_PIXELS, "ln-tuning"} <= set(images.left_out)
    assert {"lora", "oft", "loha", "ia3", "bitfit"} <= set(images.names)


def test_a_recipes_own_arm_comes_before_the_table_and_scales_learning_rates_like_lora(short):
    own = Arm(LoraConfig(r=3, target_modules=["attn.c_attn"]), learning_rate=7e-3)
    chosen = choose_arms(short("gpt2", CLASSIFY, arms={"lora": own}), ["lora", "dora", "loraplus", "ia3"]).recipe
    assert chosen.arms["lora"] is own
    assert chosen.arms["dora"].learning_rate == 7e-3 and chosen.arms["loraplus"].learning_rate == 1.75e-3
    assert chosen.arms["ia3"].learning_rate == METHODS["ia3"].learning_rate


def test_a_typo_names_the_nearest_arm_of_recipe_or_table(short):
    recipe = short("gpt2", CLASSIFY)
    for typo, meant in (("fulll", "full"), ("adalra", "adalora"), ("al", "all")):
        for ask in (lambda t: choose_arms(recipe, [t]), lambda t: plan(recipe, [t]), lambda t: train(recipe, t)):
            with pytest.raises(RecipeError, match=f"Unknown arm '{typo}'.*Did you mean '{meant}'"):
                ask(typo)
    with pytest.raises(RecipeError, match="a run is one"):
        train(recipe, "all")


def test_set_changes_an_arm_of_the_table(short):
    recipe = apply_changes(
        short("gpt2", CLASSIFY), ["arms.dora.peft.r=2", "arms.dora.learning_rate=1e-2", "max_length=8"]
    )
    arm = recipe.arms["dora"]
    assert (arm.peft.r, arm.peft.use_dora, arm.learning_rate, recipe.max_length) == (2, True, 1e-2, 8)
    with pytest.raises(RecipeError, match="Unknown arm 'dorra'"):
        apply_changes(recipe, ["arms.dorra.learning_rate=1"])


def test_the_recipe_yaml_of_a_run_holds_the_complete_arm(short, tmp_path):
    run = train(short("llama", SFT), "p-tuning", output=tmp_path)
    loaded = Recipe.from_yaml(run.folder / "recipe.yaml")
    assert loaded.arms["p-tuning"].to_dict()["peft"]["encoder_hidden_size"] == 128
    assert Recipe.from_dict(loaded.to_dict()).to_dict() == loaded.to_dict()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_plan_has_every_method(short, kind):
    recipe = short(kind, CLASSIFY if kind == "gpt2" else SFT)
    planned = plan(recipe, ["all"])
    assert len(planned["arms"]) >= 20
    for name, arm in planned["arms"].items():
        assert 0 < arm["trainable_parameters"] <= arm["total_parameters"] + arm["adapter_parameters"], name
        assert arm["memory"]["total"] > arm["memory"]["weights"] > 0 and arm["checkpoint_bytes"] > 0, name
    assert planned["arms"]["qlora"]["memory"]["weights"] < planned["arms"]["lora"]["memory"]["weights"]
    notes = " ".join(note for note in planned["notes"] if note.startswith("Not tried: "))
    assert all(name in notes for name in {*METHODS, *NOT_IN_TABLE} - set(planned["arms"]))


def test_planned_parameter_counts_equal_those_of_the_run(short, tmp_path):
    recipe = short("gpt2", CLASSIFY)
    for name in ("pissa", "adalora", "vera", "bitfit", "prompt-tuning"):
        counted = train(recipe, name, output=tmp_path).data["parameters"]
        planned = plan(recipe, [name])["arms"][name]
        assert counted["trainable"] == planned["trainable_parameters"]
        assert counted["adapter"] == planned["adapter_parameters"]


def test_adaloras_schedule_fits_the_runs_steps(short, tmp_path):
    recipe = choose_arms(short("llama", SFT), ["adalora"]).recipe
    fitted, notes = fit_schedules(recipe, 40)
    config = fitted.arms["adalora"].peft
    assert (config.total_step, config.tinit, config.tfinal) == (40, 4, 12) and "40 steps" in notes[0]
    assert fit_schedules(fitted, 40) == (fitted, [])
    recipe.training["max_steps"] = 12
    run = train(recipe, "adalora", output=tmp_path)
    saved = json.loads((run.folder / "adapter_config.json").read_text())
    ranks = [sum(kept) for kept in saved["rank_pattern"].values()]
    # The 14 adapted layers begin with rank 12 and end with 8 on average; if two singular values tie, both are dropped.
    assert saved["total_step"] == 12 and 7 * len(ranks) <= sum(ranks) <= 8 * len(ranks)
    assert run.data["checks"]["reload"] < 1e-4


def test_lora_plus_gives_b_sixteen_times_the_learning_rate_of_a(short, tmp_path, monkeypatch):
    from peft_recipes.tasks.method_mixin import MethodMixin

    groups, create = [], MethodMixin.create_optimizer

    def spy(self, *args):
        optimizer = create(self, *args)
        groups[:] = [(g["lr"], {n for n, p in self.model.named_parameters() if any(p is q for q in g["params"])})
                     for g in optimizer.param_groups]  # fmt: skip
        return optimizer

    monkeypatch.setattr(MethodMixin, "create_optimizer", spy)
    train(short("llama", SFT), "loraplus", output=tmp_path)
    learning_rates = {name: lr for lr, names in groups for name in names}
    assert {lr for name, lr in learning_rates.items() if "lora_A" in name} == {5e-5}
    assert {lr for name, lr in learning_rates.items() if "lora_B" in name} == {8e-4}


def test_bitfit_saves_only_its_biases_and_the_new_head(short, tmp_path):
    from safetensors import safe_open

    run = train(short("distilbert", CLASSIFY), "bitfit", output=tmp_path)
    with safe_open(run.folder / "biases.safetensors", "pt") as file:
        names = set(file.keys())
    assert all(name.endswith("bias") or "classifier" in name for name in names)
    assert run.data["checkpoint_bytes"] == (run.folder / "biases.safetensors").stat().st_size


def test_a_comparison_takes_a_method_of_the_table(short, tmp_path):
    comparison = compared_here(short("llama", SFT), ["full", "ia3"], [0], tmp_path)
    assert list(comparison.data["arms"]) == ["full", "ia3"] and "ia3" in comparison.data["differences"]
    assert {arm["status"] for arm in comparison.data["arms"].values()} == {"ok"}


def test_the_methods_command_prints_the_table():
    shown = CliRunner().invoke(app, ["methods", "--json"])
    assert json.loads(shown.stdout) == json.loads(json.dumps(table()))
    text = CliRunner().invoke(app, ["methods"]).stdout
    assert all(name in text for name in (*METHODS, *NOT_IN_TABLE)) and "2106.09685" in text


def test_every_method_of_peft_is_in_the_table_or_left_out_with_a_reason():
    kinds = {config.__name__: kind.value for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    in_table = {kinds[row.config] for row in METHODS.values() if row.config in kinds}
    left_out = {name.upper().replace("-", "_") for name in NOT_IN_TABLE}
    assert set(kinds.values()) - in_table == left_out - {"BOTTLENECK"}


def test_the_methods_page_is_up_to_date():
    path = Path(__file__).parents[2] / "docs" / "write_methods.py"
    spec = importlib.util.spec_from_file_location("write_methods", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page()  # else: make readme
