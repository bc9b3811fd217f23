"""Arms by name: a recipe's own, or one that the table of methods makes for its base and task; "all" is all that fit."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from peft_recipes.arms.methods import LORA_RATE, METHODS, NOT_IN_TABLE, Method
from peft_recipes.errors import RecipeError, nearest
from peft_recipes.models.architectures import architecture_of
from peft_recipes.recipe.arm import Arm
from peft_recipes.recipe.options import LANGUAGE_TASKS
from peft_recipes.recipe.recipe import Recipe

if TYPE_CHECKING:
    import torch.nn as nn
    from peft import PeftConfig

ALL = "all"


class DoesNotFit(RecipeError):
    """A method of the table that this base or task can't take; its message is the reason alone."""


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A recipe with the arms that were asked for, their names in order, and what "all" left out, each with why."""

    recipe: Recipe
    names: list[str]
    left_out: dict[str, str]

    @property
    def notes(self) -> list[str]:
        """What was left out, a line a reason."""
        reasons: dict[str, list[str]] = {}
        for name, why in self.left_out.items():
            reasons.setdefault(why, []).append(name)
        return [f"Not tried: {', '.join(names)}: {why.rstrip('.')}." for why, names in reasons.items()]


def choose_arms(recipe: Recipe, asked: Iterable[str] | None = None) -> Chosen:
    """The recipe with every arm that was asked for by name.

    asked: names (None: the recipe's own arms). A name that the recipe has is its own arm; another is taken from the
    table of methods and made for the recipe's base and task; "all" is the recipe's own and every method that fits.
    Raises RecipeError: a name of neither (with the nearest of both), a method that does not fit (with the reason).
    """
    names = list(dict.fromkeys(recipe.arms if asked is None else asked))
    if not names:
        raise RecipeError("No arm was named.")
    valid = {*recipe.arms, *METHODS, ALL}
    if problems := [_unknown(n, recipe, valid) for n in names if n not in valid]:
        raise RecipeError(*problems)
    wanted = [n for n in names if n not in recipe.arms and n != ALL]
    base, made, left_out = Base(recipe), {}, {}
    problems = []
    for name in wanted:
        try:
            made[name] = arm_of(METHODS[name], base)
        except DoesNotFit as error:
            problems.append(f"arm '{name}': {error}")
    if problems:
        raise RecipeError(*problems)
    if ALL in names:
        for name in (n for n in METHODS if n not in recipe.arms and n not in made):
            try:
                made[name] = _tried(METHODS[name], base)
            except DoesNotFit as error:
                left_out[name] = str(error)
        left_out |= NOT_IN_TABLE
        names = [*dict.fromkeys([*recipe.arms, *(n for n in names if n != ALL), *(n for n in METHODS if n in made)])]
    return Chosen(dataclasses.replace(recipe, arms={**recipe.arms, **made}) if made else recipe, names, left_out)


def _unknown(name: str, recipe: Recipe, valid: set[str]) -> str:
    """The recipe's own arms are nearer than the table's methods."""
    close = nearest(name, recipe.arms) or nearest(name, valid)
    return f"Unknown arm '{name}' in recipe {recipe.name}.{close} Valid: {', '.join(sorted(valid))}."


@dataclasses.dataclass
class Base:
    """What a method is fitted to: a recipe's base without its weights, and its task."""

    recipe: Recipe

    @functools.cached_property
    def config(self) -> Any:
        from peft_recipes.models import bases
        from peft_recipes.models.meta import label_options

        options = {} if self.recipe.task in LANGUAGE_TASKS else label_options(self.recipe.dataset.labels)
        return bases.load_config(self.recipe, **options)

    @functools.cached_property
    def model(self) -> nn.Module:
        """On the meta device, never changed."""
        from peft_recipes.models.meta import meta_model

        return meta_model(self.recipe, copy.deepcopy(self.config))

    def targets(self, which: str) -> list[str] | str:
        from peft_recipes.models.architectures import targets_of

        return targets_of(self.config, which).names

    def shapes(self) -> list[tuple[int, int]]:
        """Of the weights of all its linear layers that are targets."""
        from peft_recipes.models.module_matching import matched_modules

        layers = [self.model.get_submodule(n) for n in matched_modules(self.model, self.targets("all-linear"))]
        return [tuple(layer.weight.shape) for layer in layers]


def arm_of(method: Method, base: Base) -> Arm:
    """The arm of a method on a base: its defaults, its layers, its rate. Raises DoesNotFit with the reason."""
    for rule in _RULES:
        if why := rule(method, base):
            raise DoesNotFit(why)
    rate = method.learning_rate * _lora_factor(base.recipe) if method.like_lora else method.learning_rate
    return Arm(_config(method, base), learning_rate=float(f"{rate:.3g}"), **method.arm)


def _lora_factor(recipe: Recipe) -> float:
    """How the rate of the recipe's own LoRA stands to the table's: what learns as LoRA does learns best near it."""
    own = [arm for name, arm in recipe.arms.items() if arm.method_name == "LORA" and not arm.quantise]
    named = recipe.arms.get("lora")
    arm = named if named in own else next(iter(own), None)
    return arm.learning_rate / LORA_RATE if arm is not None else 1.0


def _config(method: Method, base: Base) -> str | PeftConfig:
    import peft

    if not hasattr(peft, method.config):
        return method.config
    options = dict(method.options)
    for option, most in method.fitted.items():
        options[option] = _divisor(base, most, method)
    if "n_frequency" in options:  # no layer can have more than it has weights
        options["n_frequency"] = min(options["n_frequency"], *map(math.prod, base.shapes()))
    if method.config == "ShiraConfig":  # likewise: r (rows + columns) of them learn
        options["r"] = min(options["r"], *(rows * columns // (rows + columns) for rows, columns in base.shapes()))
    return getattr(peft, method.config)(**options, **_TARGETS[method.targets](base))


def _divisor(base: Base, most: int, method: Method) -> int:
    """The largest number up to `most` that divides all widths of the adapted layers."""
    common = math.gcd(*(size for shape in base.shapes() for size in shape))
    found = max(n for n in range(1, most + 1) if common % n == 0)
    if found < 2:
        raise DoesNotFit(f"it cuts layers into equal blocks, and only {common} divides all widths of this base")
    return found


def _norms(base: Base) -> dict[str, Any]:
    named = [name for name, module in base.model.named_modules() if "Norm" in type(module).__name__]
    if not named:
        raise DoesNotFit("the base has no norm layers")
    return {"target_modules": list(dict.fromkeys(name.rpartition(".")[2] for name in named))}


def _ia3(base: Base) -> dict[str, Any]:
    from peft.utils import constants

    kind = base.config.model_type
    known = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(kind)
    if known:
        inner = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING[kind]
        return {"target_modules": list(known), "feedforward_modules": list(inner)}
    if kind == "distilbert":
        return {"target_modules": ["k_lin", "v_lin", "ffn.lin2"], "feedforward_modules": ["ffn.lin2"]}
    return {"target_modules": base.targets("all-linear"), "feedforward_modules": []}


def _embeddings(base: Base) -> dict[str, Any]:
    from peft_recipes.models import bases

    tokenizer = bases.load_tokenizer(base.recipe)
    ids = sorted({*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder})
    if not ids:
        raise DoesNotFit("the tokenizer has no special tokens to train")
    return {"token_indices": ids}


def _prompts(base: Base) -> dict[str, Any]:
    """PEFT reads a base's sizes under the names that most configurations have, and DistilBERT's has others."""
    text = base.config.get_text_config()
    return {"token_dim": text.hidden_size, "num_layers": text.num_hidden_layers,
            "num_attention_heads": text.num_attention_heads}  # fmt: skip


_TARGETS: dict[str, Callable[[Base], dict[str, Any]]] = {
    "": lambda base: {},
    "prompts": _prompts,
    "all-linear": lambda base: {"target_modules": base.targets("all-linear")},
    "norms": _norms,
    "ia3": _ia3,
    "embeddings": _embeddings,
    "upper layers": lambda base: {"adapter_layers": max(base.config.get_text_config().num_hidden_layers - 2, 1)},
}


def _needs_text(method: Method, base: Base) -> str:
    prompts = ("PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig", "AdaptionPromptConfig")
    if method.config in (*prompts, "TrainableTokensConfig") and base.recipe.task.startswith("image"):
        return "it works on tokens, and images have none"
    return ""


def _needs_a_causal_model(method: Method, base: Base) -> str:
    headless = ("AdaptionPromptConfig", "TrainableTokensConfig")
    if method.config in headless and base.recipe.task not in LANGUAGE_TASKS:
        return "PEFT stores no classification head with it"
    return ""


def _needs_keys_and_values(method: Method, base: Base) -> str:
    if method.config != "PrefixTuningConfig":
        return ""
    classes = (type(base.model), type(base.model.base_model))
    if any("past_key_values" in inspect.signature(kind.forward).parameters for kind in classes):
        return ""
    return f"it stands before the attention's keys and values, and {classes[1].__name__} takes none from outside"


def _needs_linear_layers(method: Method, base: Base) -> str:
    """PEFT takes OLoRA's Q and R of a Conv1D's weight as it lies, which is turned, and fails at the first forward."""
    if method.options.get("init_lora_weights") == "olora" and architecture_of(base.config).fan_in_fan_out:
        return "PEFT's OLoRA decomposes Conv1D layers the wrong way round"
    return ""


def _needs_an_embedding_of_its_own(method: Method, base: Base) -> str:
    if method.config == "TrainableTokensConfig" and getattr(base.config, "tie_word_embeddings", False):
        return "the embedding is tied to the vocabulary head, which trl's trainers take no adapter on"
    return ""


_RULES = (
    _needs_text,
    _needs_a_causal_model,
    _needs_keys_and_values,
    _needs_linear_layers,
    _needs_an_embedding_of_its_own,
)


def _tried(method: Method, base: Base) -> Arm:
    """The arm of a method, put on the base without weights. Raises DoesNotFit with what PEFT says against it."""
    from peft_recipes.arms.meta import with_arm_on_meta

    try:
        arm = arm_of(method, base)
        with_arm_on_meta(base.recipe, base.config, arm, method.name)
    except DoesNotFit:
        raise
    except RecipeError as error:
        raise DoesNotFit(str(error).removeprefix(f"arm '{method.name}': ")) from error
    return arm
