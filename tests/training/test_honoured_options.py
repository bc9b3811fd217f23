"""Options that the table calls honoured: what must change the losses changes them, what must not leaves them equal."""

from __future__ import annotations

import pytest
from few_steps import logged

from peft_recipes import RecipeError
from peft_recipes.recipe import trainer_options

CHANGES, SAME = True, False
SFT = {
    "per_device_train_batch_size": (4, CHANGES),
    "gradient_accumulation_steps": (2, CHANGES),
    "train_sampling_strategy": ("sequential", CHANGES),
    "lr_scheduler_type": ("constant", CHANGES),
    "lr_scheduler_kwargs": ({"num_cycles": 2.0}, CHANGES),
    "warmup_steps": (2, CHANGES),
    "optim": ("sgd", CHANGES),
    "optim_args": ("momentum=0.9", CHANGES),
    "weight_decay": (0.9, CHANGES),
    "adam_beta1": (0.5, CHANGES),
    "adam_beta2": (0.5, CHANGES),
    "adam_epsilon": (1.0, CHANGES),
    "max_grad_norm": (1e-6, CHANGES),
    "label_smoothing_factor": (0.2, CHANGES),
    "neftune_noise_alpha": (50.0, CHANGES),
    "loss_type": ("dft", CHANGES),
    "bf16": (True, CHANGES),
    "per_device_eval_batch_size": (1, SAME),
    "dataloader_num_workers": (1, SAME),
    "dataloader_pin_memory": (False, SAME),
    "dataloader_drop_last": (True, SAME),
    "average_tokens_across_devices": (False, SAME),
    "gradient_checkpointing": (True, SAME),
    "torch_empty_cache_steps": (1, SAME),
    "eval_strategy": ("steps", SAME),
    "eval_on_start": (True, SAME),
    "eval_accumulation_steps": (1, SAME),
    "disable_tqdm": (False, SAME),
    "log_level": ("error", SAME),
    "run_name": ("mine", SAME),
}
DPO = {
    "beta": (0.9, CHANGES),
    "loss_type": (["ipo"], CHANGES),
    "ld_alpha": (0.5, CHANGES),
    "f_divergence_type": ("forward_kl", CHANGES),
    "label_smoothing": (0.3, CHANGES),
    "use_weighting": (True, CHANGES),
    "gradient_accumulation_steps": (2, CHANGES),
    "disable_dropout": (False, SAME),
}
WITH = {  # what an option needs beside it
    "lr_scheduler_kwargs": {"lr_scheduler_type": "cosine"},
    "optim_args": {"optim": "sgd"},
    "adam_epsilon": {"max_grad_norm": 0.0},
    "max_grad_norm": {"optim": "sgd"},
    "label_smoothing": {"loss_type": ["robust"]},
    "weight_decay": {"lr_scheduler_type": "constant"},
    "eval_strategy": {"eval_steps": 1},
}


@pytest.mark.parametrize("option", SFT)
def test_an_option_of_sft_does_what_it_says(instruct, tmp_path, option):
    check(instruct(), tmp_path, option, *SFT[option])


@pytest.mark.parametrize("option", DPO)
def test_an_option_of_dpo_does_what_it_says(prefer, tmp_path, option):
    check(prefer(), tmp_path, option, *DPO[option])


@pytest.mark.parametrize("option", trainer_options.NEEDS)
def test_an_option_that_has_no_effect_beside_the_others_is_refused(prefer, option):
    with pytest.raises(RecipeError, match=f"training.{option}: no effect unless"):
        prefer().with_changes({"training": {option: 0.25}})


def check(recipe, folder, option, value, changes):
    assert trainer_options.row(option, "SFTConfig").status == trainer_options.HONOURED
    beside = WITH.get(option, {})
    without, having = logged(recipe, folder, **beside), logged(recipe, folder, **beside, **{option: value})
    assert len(having) == 3 and all(loss == loss for loss in having)
    assert (having != pytest.approx(without, rel=1e-5)) == changes, (without, having)
