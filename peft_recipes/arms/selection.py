"""Choose arms by name: a recipe's own, or built from the table of methods; "all" means every one that fits."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from peft_recipes.arms.methods import LORA_LR, METHODS, NOT_IN_TABLE, Method
from peft_recipes.errors import RecipeError, nearest
from peft_recipes.models.architectures import architecture_of, targets
from peft_recipes.models.module_matching import matched_modules
from peft_recipes.recipe.arm import Arm
from peft_recipes.recipe.options import LANGUAGE_TASKS, TASKS
from peft_recipes.recipe.recipe import Recipe

if TYPE_CHECKING:
    import torch.nn as nn
    from peft import PeftConfig

ALL = "all"


class DoesNotFit(RecipeError):
    """A method of the table does not work on this base or task; the message is the reason alone."""


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A recipe with the chosen arms, their names in order, and the reason for each method that "all" left out."""

    recipe: Recipe
    names: list[str]
    left_out: dict[str, str]

    @property
    def notes(self) -> list[str]:
        """The methods left out, one line per reason."""
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            reasons.setdefault(reason, []).append(name)
        return [f"Not tried: {', '.join(names)}: {reason.rstrip('.')}." for reason, names in reasons.items()]


def choose_arms(recipe: Recipe, asked: Iterable[str] | None = None) -> Chosen:
    """Return the recipe with every named arm.

    asked: names; None: the recipe's own arms. A name that the recipe has is its own arm; any other is built from the
    table of methods for the recipe's base and task. "all" is the recipe's own arms and every method that fits.
    Raises RecipeError for an unknown name (with the nearest one) or a method that does not fit (with the reason).
    """
    names = list(dict.fromkeys(recipe.arms if asked is None else asked))
    if not names:
        raise RecipeError("No arm was named.")
    valid = {*recipe.arms, *METHODS, ALL}
    problems = [
        # Suggest the recipe's own arms before the table's methods.
        f"Unknown arm '{name}' in recipe {recipe.name}.{nearest(name, recipe.arms) or nearest(name, valid)} "
        f"Valid: {', '.join(sorted(valid))}."
        for name in names
        if name not in valid
    ]
    if problems:
        raise RecipeError(*problems)
    named = [name for name in names if name not in recipe.arms and name != ALL]
    others = [name for name in METHODS if name not in recipe.arms and name not in named] if ALL in names else []
    base, built, unfit = Base(recipe), {}, {}
    for name in (*named, *others):
        try:
            built[name] = arm_of(METHODS[name], base) if name in named else _tried_arm_of(METHODS[name], base)
        except DoesNotFit as error:
            unfit[name] = str(error)
    if problems := [f"arm '{name}': {unfit[name]}" for name in named if name in unfit]:
        raise RecipeError(*problems)
    if built:
        recipe = dataclasses.replace(recipe, arms={**recipe.arms, **built})
    return Chosen(recipe, list(recipe.arms), unfit | NOT_IN_TABLE) if ALL in names else Chosen(recipe, names, {})


@dataclasses.dataclass
class Base:
    """What a method is fitted to: the recipe's task and its base without weights, loaded on first use."""

    recipe: Recipe

    @functools.cached_property
    def config(self) -> Any:
        from peft_recipes.models import bases
        from peft_recipes.models.meta import head_options

        return bases.load_config(self.recipe, **head_options(self.recipe))

    @functools.cached_property
    def model(self) -> nn.Module:
        """The model on the meta device, never modified."""
        from peft_recipes.models.meta import meta_model

        return meta_model(self.recipe, copy.deepcopy(self.config))

    def shapes(self) -> list[tuple[int, int]]:
        """Return the weight shapes of all linear layers that are targets."""
        from peft_recipes.models.module_matching import matched_modules

        names = matched_modules(self.model, targets(self.config, "all-linear"))
        return [tuple(self.model.get_submodule(name).weight.shape) for name in names]


def arm_of(method: Method, base: Base) -> Arm:
    """Build a method's arm for a base: options, target modules, learning rate. Raises DoesNotFit with the reason."""
    if reason := _obstacle(method, base):
        raise DoesNotFit(reason)
    scale = _lora_scale(base.recipe) if method.like_lora else 1.0
    return Arm(_config(method, base), learning_rate=float(f"{method.learning_rate * scale:.3g}"), **method.arm)


def _tried_arm_of(method: Method, base: Base) -> Arm:
    """Build a method's arm and apply it on the meta device. Raises DoesNotFit, also with PEFT's reason."""
    from peft_recipes.arms.meta import with_arm_on_meta

    try:
        arm = arm_of(method, base)
        with_arm_on_meta(base.recipe, base.config, arm, method.name)
    except DoesNotFit:
        raise
    except RecipeError as error:
        raise DoesNotFit(str(error).removeprefix(f"arm '{method.name}': ")) from error
    return arm


def _obstacle(method: Method, base: Base) -> str:
    """Return why a method can't work on this base or task, or ""."""
    task = base.recipe.task
    prompt_methods = ("PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig", "AdaptionPromptConfig")
    if method.config in (*prompt_methods, "TrainableTokensConfig") and task.startswith("image"):
        return "it works on tokens, and images have none"
    if method.config in ("AdaptionPromptConfig", "TrainableTokensConfig") and task not in LANGUAGE_TASKS:
        return "PEFT saves no classification head with it"
    if method.config == "AdaptionPromptConfig" and task in ("kto", "grpo"):
        return "trl's LM head for these tasks does not reach the model inside it"
    if method.config == "PrefixTuningConfig":
        classes = (type(base.model), type(base.model.base_model))
        if not any("past_key_values" in inspect.signature(cls.forward).parameters for cls in classes):
            return f"it needs past_key_values, which {classes[1].__name__} does not take"
    # PEFT's OLoRA decomposes a Conv1D's weight without transposing it, and fails at the first forward.
    if method.options.get("init_lora_weights") == "olora" and architecture_of(base.config).fan_in_fan_out:
        return "PEFT's OLoRA decomposes Conv1D layers the wrong way round"
    with_trl = TASKS[task].arguments.startswith("trl.")
    if method.config == "TrainableTokensConfig" and with_trl and getattr(base.config, "tie_word_embeddings", False):
        return "the embedding is tied to the LM head, and trl's trainers reject an adapter on it"
    return _convolution_obstacle(method) if _layers_of(base) == "convolutions" else ""


def _convolution_obstacle(method: Method) -> str:
    """Return why a method can't work on a base whose only linear layer is its head, or ""."""
    if method.arm.get("quantise"):
        return "it quantises linear layers, and this base has none but its head"
    if any("conv layers" in limit for limit in method.cannot):
        return "it adapts no convolutions, and this base has no linear layers but its head"
    return ""


def _layers_of(base: Base) -> str:
    """Return the group of layers to adapt: the linear ones, or the convolutions of a base that has no others."""
    row = architecture_of(base.config)
    return "convolutions" if row.group("convolutions") and not row.group("all-linear") else "all-linear"


def _lora_scale(recipe: Recipe) -> float:
    """Return the learning rate of the recipe's own LoRA arm relative to the table's; 1 if it has none."""
    own = {name: arm for name, arm in recipe.arms.items() if arm.method_name == "LORA" and not arm.quantise}
    arm = own.get("lora") or next(iter(own.values()), None)
    return arm.learning_rate / LORA_LR if arm is not None else 1.0


def _config(method: Method, base: Base) -> str | PeftConfig:
    import peft

    if not hasattr(peft, method.config):
        return method.config
    options = dict(method.options)
    for option, limit in method.fitted.items():
        options[option] = _common_divisor(base, limit)
    if "n_frequency" in options:  # a layer can't have more than it has weights
        options["n_frequency"] = min(options["n_frequency"], *map(math.prod, base.shapes()))
    if method.config == "ShiraConfig":  # it trains r * (rows + columns) of a layer's weights
        options["r"] = min(options["r"], *(rows * columns // (rows + columns) for rows, columns in base.shapes()))
    return getattr(peft, method.config)(**options, **_TARGETS[method.targets](base))


def _common_divisor(base: Base, limit: int) -> int:
    """Return the largest number up to `limit` that divides every width of the adapted layers."""
    common = math.gcd(*(size for shape in base.shapes() for size in shape))
    divisor = max(n for n in range(1, limit + 1) if common % n == 0)
    if divisor < 2:
        raise DoesNotFit(f"it cuts layers into equal blocks, and only {common} divides all widths of this base")
    return divisor


def _all_linear(base: Base) -> dict[str, Any]:
    return {"target_modules": targets(base.config, _layers_of(base))}


def _norms(base: Base) -> dict[str, Any]:
    paths = [path for path, module in base.model.named_modules() if "Norm" in type(module).__name__]
    if not paths:
        raise DoesNotFit("the base has no norm layers")
    return {"target_modules": list(dict.fromkeys(path.rpartition(".")[2] for path in paths))}


def _ia3(base: Base) -> dict[str, Any]:
    from peft.utils import constants

    model_type = base.config.model_type
    targets = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(model_type, ())
    # PEFT's table is older than some models of transformers 5, whose experts are no layers any more (Mixtral).
    if targets and all(matched_modules(base.model, [name]) for name in targets):
        feedforward = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING[model_type]
        return {"target_modules": list(targets), "feedforward_modules": list(feedforward)}
    if model_type == "distilbert":
        return {"target_modules": ["k_lin", "v_lin", "ffn.lin2"], "feedforward_modules": ["ffn.lin2"]}
    return {**_all_linear(base), "feedforward_modules": []}


def _embeddings(base: Base) -> dict[str, Any]:
    from peft_recipes.models import bases

    tokenizer = bases.load_tokenizer(base.recipe)
    ids = sorted({*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder})
    if not ids:
        raise DoesNotFit("the tokenizer has no special tokens to train")
    return {"token_indices": ids}


def _prompts(base: Base) -> dict[str, Any]:
    """Pass the base's sizes explicitly: PEFT does not know DistilBERT's names for them.

    A virtual token is as wide as an embedding, which in some models (ELECTRA, RemBERT) is not the hidden size.
    """
    text = base.config.get_text_config()
    return {
        "token_dim": base.model.get_input_embeddings().weight.shape[1],
        "num_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
    }


def _prefix(base: Base) -> dict[str, Any]:
    """Give an encoder-decoder's prefix the sizes of its decoder, whose self-attention it extends.

    PEFT takes the encoder's number of layers, and the hidden size where T5 1.1's heads are narrower.
    """
    config = base.config
    if not config.is_encoder_decoder:
        return {}
    heads = getattr(config, "decoder_attention_heads", None) or config.num_attention_heads
    layers = getattr(config, "decoder_layers", None) or getattr(config, "num_decoder_layers", None)
    width = heads * config.d_kv if hasattr(config, "d_kv") else config.hidden_size
    return {"token_dim": width, "num_layers": layers or config.num_hidden_layers, "num_attention_heads": heads}


_TARGETS: dict[str, Callable[[Base], dict[str, Any]]] = {
    "": lambda base: {},
    "prefix": _prefix,
    "prompts": _prompts,
    "all-linear": _all_linear,
    "norms": _norms,
    "ia3": _ia3,
    "embeddings": _embeddings,
    "upper layers": lambda base: {"adapter_layers": max(base.config.get_text_config().num_hidden_layers - 2, 1)},
}
