"""load_best_model_at_end: every arm ends with the weights of its best evaluation, and run.json says which."""

from __future__ import annotations

import signal

import pytest
from distributed_runs import signal_at_step
from peft import AdaLoraConfig, IA3Config, LoraConfig, PromptTuningConfig

from peft_recipes import Arm, train

_TARGETS = {"classify": ["q_lin", "v_lin"], "instruct": ["q_proj", "v_proj"]}
_TASK_TYPES = {"classify": "SEQ_CLS", "instruct": "CAUSAL_LM"}
_ARMS = ["full", "head", "bitfit", "lora", "dora", "ia3", "prompt-tuning", "adalora"]


def _arm(name: str, kind: str) -> Arm:
    modules, task = _TARGETS[kind], _TASK_TYPES[kind]
    adalora = AdaLoraConfig(init_r=4, target_r=2, total_step=20, tinit=2, tfinal=4, target_modules=modules)
    adapters = {
        "lora": LoraConfig(r=4, target_modules=modules),
        "dora": LoraConfig(r=4, use_dora=True, target_modules=modules),
        "ia3": IA3Config(target_modules=modules, feedforward_modules=[]),
        "prompt-tuning": PromptTuningConfig(task_type=task, num_virtual_tokens=4),
        "adalora": adalora,
    }
    return Arm(adapters.get(name, name), learning_rate=0.1 if name == "full" else 3.0)


# worst: the epoch of the highest loss counts as the best, so that one of the two cases is not the last epoch.
_IMPOSSIBLE = [
    ("instruct", "head"),  # no task head
    ("instruct", "bitfit"),  # Llama has no biases
    ("classify", "prompt-tuning"),  # DistilBERT takes no virtual tokens
]


@pytest.mark.parametrize("worst", [False, True])
@pytest.mark.parametrize(("kind", "name"), [(k, n) for k in _TARGETS for n in _ARMS if (k, n) not in _IMPOSSIBLE])
def test_an_arm_ends_with_its_best_weights(request, tmp_path, kind, name, worst):
    recipe = request.getfixturevalue(kind)(arms={name: _arm(name, kind)}, prompts=[])
    training = {**recipe.training, "num_train_epochs": 4, "load_best_model_at_end": True, "greater_is_better": worst}
    recipe = recipe.with_changes({"training": training})
    run = train(recipe, name, output=tmp_path)
    points = run.data["training"]["validation"]
    best = (max if worst else min)(points, key=lambda point: point["loss"])
    assert run.data["training"]["best_step"] == best["step"]
    assert run.metrics["validation"]["loss"] == pytest.approx(best["loss"], rel=1e-4)


@pytest.mark.parametrize("arm", ["full", "lora"])
@pytest.mark.parametrize("step", [5, 11, 12])
def test_a_resumed_run_ends_with_its_best_weights(classify, tmp_path, arm, step):
    # The highest loss counts as the best, so that the best evaluation is not the last one.
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    recipe = classify(training={**classify().training, **best})
    one = train(recipe, arm, output=tmp_path / "one")
    signal_at_step(0, step, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, arm, output=tmp_path / "two")
    two = train(recipe, arm, output=tmp_path / "two", resume=True)
    assert two.data["training"]["resumed_at_steps"] == [step]
    assert two.data["training"]["best_step"] == one.data["training"]["best_step"]
    assert two.metrics["test"]["loss"] == pytest.approx(one.metrics["test"]["loss"], rel=1e-5)
