"""load_best_model_at_end: every arm ends with the weights of its best evaluation, and run.json says which."""

from __future__ import annotations

import pytest
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
