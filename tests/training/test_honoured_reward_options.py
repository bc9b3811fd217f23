"""Options of reward, kto and grpo that the table calls honoured: what must change the training changes it."""

from __future__ import annotations

import json

import pytest
from few_steps import logged
from small import FILLER, GOOD

from peft_recipes import Arm, Dataset
from peft_recipes.recipe import trainer_options

CHANGES, SAME = True, False
REWARD = {
    "center_rewards_coefficient": (0.5, CHANGES),
    "train_sampling_strategy": ("sequential", CHANGES),
    "neftune_noise_alpha": (50.0, CHANGES),
    "bf16": (True, CHANGES),
    "gradient_accumulation_steps": (2, CHANGES),
    "gradient_checkpointing": (True, SAME),
    "disable_dropout": (False, SAME),
}
KTO = {
    "beta": (0.9, CHANGES),
    "loss_type": ("apo_zero_unpaired", CHANGES),
    "desirable_weight": (2.0, CHANGES),
    "undesirable_weight": (2.0, CHANGES),
    "neftune_noise_alpha": (50.0, CHANGES),
    "gradient_accumulation_steps": (2, CHANGES),
    "gradient_checkpointing": (True, SAME),
}
GRPO = {
    "num_generations": (2, CHANGES),
    "max_completion_length": (3, CHANGES),
    "steps_per_generation": (2, CHANGES),
    "num_iterations": (2, CHANGES),
    "temperature": (0.3, CHANGES),
    "top_p": (0.3, CHANGES),
    "top_k": (3, CHANGES),
    "min_p": (0.9, CHANGES),
    "repetition_penalty": (2.0, CHANGES),
    "generation_kwargs": ({"no_repeat_ngram_size": 1}, CHANGES),
    "epsilon": (1e-5, CHANGES),
    "epsilon_high": (1e-5, CHANGES),
    "delta": (1.00001, CHANGES),
    "importance_sampling_level": ("sequence", CHANGES),
    "scale_rewards": ("none", CHANGES),
    "mask_truncated_completions": (True, CHANGES),
    "top_entropy_quantile": (0.2, CHANGES),
    "entropy_coef": (0.5, CHANGES),
    "beta": (0.9, CHANGES),
    "loss_type": ("dr_grpo", CHANGES),
    "gradient_accumulation_steps": (2, CHANGES),
    "gradient_checkpointing": (True, SAME),
    "per_device_eval_batch_size": (3, SAME),
    "disable_dropout": (True, SAME),
}
REPEATED = {key: {"num_iterations": 3} for key in ("epsilon", "epsilon_high", "delta", "importance_sampling_level")}


@pytest.mark.parametrize("option", REWARD)
def test_an_option_of_reward_does_what_it_says(prefer, tmp_path, option):
    check(prefer(task="reward"), tmp_path, "RewardConfig", option, *REWARD[option])


@pytest.mark.parametrize("option", KTO)
def test_an_option_of_kto_does_what_it_says(prefer, tmp_path, option):
    check(prefer(task="kto"), tmp_path, "KTOConfig", option, *KTO[option])


@pytest.mark.parametrize("option", GRPO)
def test_an_option_of_grpo_does_what_it_says(prefer, tmp_path, option):
    rows = [{"prompt": f"say {GOOD[i % 8]} in {FILLER[i % 14]}", "completion": " ".join(GOOD)} for i in range(40)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    training = {"per_device_train_batch_size": 16, "num_generations": 4, "use_cpu": True, "bf16": False,
                "max_completion_length": 6}  # fmt: skip
    recipe = prefer(task="grpo", metric="f1", training=training, skip_checks=["duplicates"], prompts=[],
                    dataset=Dataset(str(tmp_path / "prompts.jsonl"), train=24, validation=8, test=8),
                    arms={"full": Arm(learning_rate=1e-2)})  # fmt: skip
    # On its own answers the loss is about 0, whatever the gradients.
    check(recipe, tmp_path, "GRPOConfig", option, *GRPO[option], what="grad_norm", **REPEATED.get(option, {}))


def check(recipe, folder, options, option, value, changes, what="loss", **beside):
    assert trainer_options.row(option, options).status == trainer_options.HONOURED
    without, having = logged(recipe, folder, what, **beside), logged(recipe, folder, what, **beside, **{option: value})
    assert len(having) == 3 and all(number == number for number in having)
    assert (having != pytest.approx(without, rel=1e-4)) == changes, (without, having)
