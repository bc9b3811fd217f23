"""A base whose generation_config.json samples by default is trained and saved; the file stays as it came."""

from __future__ import annotations

import json
import shutil

import pytest
from transformers import AutoModelForCausalLM

from peft_recipes import train

_DEFAULTS = {"temperature": 0.9, "top_p": 0.6}


@pytest.fixture
def sampling(tiny, tmp_path):
    """sampling(kind) -> a base with temperature and top_p, and no do_sample, among its generation defaults."""

    def make(kind):
        shutil.copytree(tiny(kind), tmp_path / kind)
        path = tmp_path / kind / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | _DEFAULTS))
        return str(tmp_path / kind)

    return make


@pytest.mark.parametrize(("make", "kind"), [("instruct", "llama"), ("prefer", "llama"), ("translate", "bart")])
def test_the_full_arm_is_saved_with_them(request, sampling, tmp_path, make, kind):
    recipe = request.getfixturevalue(make)(kind, model=sampling(kind))
    recipe = recipe.with_changes({"training": {"max_steps": 1, "eval_strategy": "no"}, "checkpoint_seconds": 0})
    run = train(recipe, "full", output=tmp_path)
    assert run.ok and not run.failed_checks
    stored = json.loads((run.folder / "generation_config.json").read_text())
    assert {name: stored.get(name) for name in _DEFAULTS} == _DEFAULTS and not stored.get("do_sample")


def test_values_that_generate_refuses_are_still_refused(sampling):
    from peft_recipes.models.generation_defaults import keep_generation_defaults

    model = AutoModelForCausalLM.from_pretrained(sampling("llama"))
    keep_generation_defaults(model)
    model.generation_config.validate(strict=True)
    model.generation_config.max_new_tokens = -1
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.generation_config.validate()
