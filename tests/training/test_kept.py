"""A run that is trained and saved is kept, whatever fails afterwards: its weights, its figures and the reason."""

from __future__ import annotations

import json
import math

import pytest
from peft import LoraConfig, PromptTuningConfig

from peft_recipes import Arm, RecipeError, train
from peft_recipes.guards.runner import failed_checks
from peft_recipes.runs.folder import read_run, run_folder
from peft_recipes.statistics.results import comparison_data
from peft_recipes.tasks.causal import Causal
from peft_recipes.tasks.classification import Classification
from peft_recipes.training import stages, verify


def fails(error):
    """A function that raises, whatever it is called with."""

    def raising(*_, **__):
        raise error

    return raising


def assert_kept(run, *failed):
    """The run is finished, its weights and metrics are there, and its run.json says which checks failed."""
    stored = read_run(run.folder)
    assert stored.ok and set(stored.failed_checks) == set(failed) == set(run.failed_checks)
    assert all(stored.failed_checks.values())
    assert math.isfinite(stored.metrics["test"]["loss"]) and (run.folder / "predictions.parquet").is_file()
    assert all((run.folder / name).stat().st_size == size for name, size in stored.data["checkpoint_files"].items())
    assert not (run.folder / "trainer").exists()
    return stored.data


MEMORY = MemoryError()
STEPS = {
    "outputs": (verify, "store_outputs"),
    "reload": (verify, "_restored"),
    "merge": (verify, "merged"),
    "latency": (verify, "median_milliseconds"),
    "generation": (Causal, "generation_speed"),
    "answers": (Causal, "answer"),
    "card": (stages, "write_run_card"),
}


@pytest.mark.parametrize("arm", ["lora", "full"])
def test_no_step_after_training_loses_the_run(instruct, tmp_path, monkeypatch, arm):
    """Each step fails by itself and names itself; a rerun returns the run without training."""
    trained = stages.fit
    for name, (owner, attribute) in STEPS.items():
        if arm == "full" and name in ("outputs", "merge"):
            continue
        error = MEMORY if name == "reload" else RuntimeError(f"no {name} today")
        with monkeypatch.context() as patch:
            patch.setattr(owner, attribute, fails(error))
            run = train(instruct(), arm, output=tmp_path / name)
        data = assert_kept(run, name)
        assert data["checks"][name]["error"] == ("MemoryError" if name == "reload" else f"no {name} today")
        if arm == "lora" and name == "reload":
            assert data["checks"]["merge"] == "not run: the reload failed"
        monkeypatch.setattr(stages, "fit", fails(AssertionError("trained again")))
        assert train(instruct(), arm, output=tmp_path / name, resume=True).failed_checks == run.failed_checks
        monkeypatch.setattr(stages, "fit", trained)


@pytest.mark.parametrize("arm", ["head", "lora"])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interruption_of_the_verification_does_not_lose_the_run(classify, tmp_path, monkeypatch, arm, stop):
    with monkeypatch.context() as patch, pytest.raises(stop):
        patch.setattr(stages, "verify", fails(stop))
        train(classify(), arm, output=tmp_path)
    monkeypatch.setattr(stages, "fit", fails(AssertionError("trained again")))
    run = train(classify(), arm, output=tmp_path, resume=True)
    data = assert_kept(run)
    assert data["checks"]["reload"] == "not run: the run ended before it" and data["training"]["steps"] == 12
    row = comparison_data(classify(), {(arm, 0): run}, run, [arm], [0])["arms"][arm]
    assert row["status"] == "ok" and row["metric"]["values"] == [run.metrics["test"]["accuracy"]]


def test_a_signal_while_the_run_is_stored_takes_effect_afterwards(classify, tmp_path, monkeypatch):
    import os
    import signal

    save = stages.save

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return save(*arguments)

    monkeypatch.setattr(stages, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(classify(), "head", output=tmp_path)
    assert read_run(run_folder(tmp_path, classify(), "head", 0)).ok


def test_a_save_that_fails_is_a_failed_run_that_can_be_resumed(classify, tmp_path, monkeypatch):
    recipe = classify(checkpoint_seconds=0)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(stages, "save", fails(OSError(28, "No space left on device")))
        train(recipe, "lora", output=tmp_path)
    folder = run_folder(tmp_path, recipe, "lora", 0)
    assert "step 12) is kept, and a rerun uses it" in read_run(folder).data["error"]
    assert read_run(folder).data["status"] == "failed" and (folder / "trainer" / "checkpoint-12").is_dir()
    assert train(recipe, "lora", output=tmp_path, resume=True).data["training"]["resumed_at_steps"] == [12]


def test_a_run_whose_merge_fails_is_kept_and_says_so(instruct, tmp_path, monkeypatch):
    """As PEFT alone would merge: into the embedding's weight, which the base's LM head shares."""
    from peft_recipes.arms import merge
    from peft_recipes.comparison.collecting import collect
    from peft_recipes.reporting.markdown import render_markdown

    monkeypatch.setattr(merge, "_untie", lambda base: None)
    config = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"])
    recipe = instruct(arms={"lora": Arm(config, learning_rate=1e-1)})
    run = train(recipe, "lora", output=tmp_path)
    data = assert_kept(run, "merge")
    assert "differs from the trained one" in data["checks"]["merge"]["error"] and data["checks"]["reload"] < 1e-5
    assert data["latency_ms"]["adapter"] > 0 and data["latency_ms"]["merged"] is None
    made = collect(recipe, ["lora"], [0], tmp_path)
    assert made.failed_checks == ["lora"] and made.failed == ["base"]  # the base was not evaluated here
    assert made.data["arms"]["lora"]["failed_checks"][0]["check"] == "merge"
    text = render_markdown(made.data)
    assert "LoRA r=4 †" in text and "the check 'merge' failed after training" in text
    assert "A check failed after training: merge." in (run.folder / "README.md").read_text()


PROMPTS = [{"kind": "question", "prompt": " ".join(["say good in a film"] * times)} for times in (1, 11, 40)]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("arm", ["lora", "prompt"])
def test_prompts_near_the_models_length_are_answered_as_far_as_it_goes(instruct, tmp_path, kind, arm):
    """Of 64 positions the second prompt leaves a few and the third none."""
    config = LoraConfig(r=2, target_modules=["c_attn"] if kind == "gpt2" else ["q_proj"])
    config = config if arm == "lora" else PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    arms = {arm: Arm(config, learning_rate=1e-2)}
    run = train(instruct(kind, arms=arms, prompts=PROMPTS[::-1], max_length=32), arm, output=tmp_path)
    data = assert_kept(run)
    long, near, short = data["answers"]
    assert "no position left" in long["skipped"] and long["answer"] == "" and "skipped" not in near
    assert "skipped" not in short and data["generation_tokens_per_second"]["adapter"] > 0


def test_a_further_set_that_fails_to_evaluate_is_left_out(classify, reviews, tmp_path, monkeypatch):
    recipe = classify(evaluate_also={"other": {"path": str(reviews), "test": 8, "train": 96, "validation": 24}})
    evaluate = Classification.evaluate

    def broken(self, trainer, prepared, split):
        if split == "other":
            raise RuntimeError("a broken row")
        return evaluate(self, trainer, prepared, split)

    monkeypatch.setattr(Classification, "evaluate", broken)
    run = train(recipe, "head", output=tmp_path)
    assert "other" not in assert_kept(run, "evaluate other")["metrics"]


def test_the_command_line_shows_a_failed_check_and_exits_with_1(instruct, tmp_path, monkeypatch, capsys):
    import typer

    from peft_recipes.cli.recipes import train_arm

    options = {"output": tmp_path, "resume": False, "overwrite": False, "wait": False}
    with monkeypatch.context() as patch, pytest.raises(typer.Exit) as ended:
        patch.setattr(verify, "merged", fails(RuntimeError("no merge today")))
        train_arm(instruct(), "lora", 0, False, **options)
    out, err = capsys.readouterr()
    assert ended.value.exit_code == 1 and "FAIL merge: no merge today" in out and "The run is kept" in err


@pytest.mark.parametrize("resume", [True, False])
def test_a_run_finished_while_another_one_waited_is_not_cleared(classify, tmp_path, monkeypatch, resume):
    """Both start on an empty folder; the second gets the lock when the first is done."""
    take, finished = stages.take_folder, []

    def late(setup, held):
        if not finished:
            finished.append(None)
            finished[0] = train(classify(), "head", output=tmp_path)
        return take(setup, held)

    monkeypatch.setattr(stages, "take_folder", late)
    if resume:
        assert (
            train(classify(), "head", output=tmp_path, resume=True, wait=True).data == read_run(finished[0].folder).data
        )
    else:
        with pytest.raises(RecipeError, match=r"Another process has written.*--resume.*--overwrite"):
            train(classify(), "head", output=tmp_path, wait=True)
    assert_kept(finished[0])


def test_check_repeats_what_failed_and_push_refuses_it(instruct, tmp_path, monkeypatch):
    from peft_recipes.adapters.check import check_adapter
    from peft_recipes.publishing.push import _check

    with monkeypatch.context() as patch:
        patch.setattr(verify, "store_outputs", fails(MEMORY))
        patch.setattr(verify, "_restored", fails(RuntimeError("not the same")))
        run = train(instruct(), "lora", output=tmp_path)
    found = {finding.name: finding for finding in check_adapter(run.folder)}
    assert found["run: reload"].ok is False and "not the same" in found["run: reload"].message
    assert found["run: outputs"].ok is None
    with pytest.raises(RecipeError, match=r"fails the check 'run: reload'.*Nothing was sent"):
        _check(run.folder, False)


def test_failed_checks_are_those_with_an_error():
    checks = json.loads('{"a": true, "b": 1e-7, "c": "skipped", "d": {"error": "why"}, "e": "not run: x"}')
    assert failed_checks(checks) == {"d": "why"} and failed_checks(None) == {}
