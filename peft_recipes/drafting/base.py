"""What a base model is, from its configuration: of images, an encoder-decoder, a causal language model, an encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft_recipes.models import bases
from peft_recipes.models.architecture_table import TIMM
from peft_recipes.models.positions import encoder_decoder_limits, position_limit
from peft_recipes.recipe.recipe import Recipe

IMAGES, ENCODER_DECODER, CAUSAL, ENCODER = "image model", "encoder-decoder", "causal language model", "encoder"
_OFFSET = {
    "roberta",
    "xlm-roberta",
    "camembert",
    "roberta-prelayernorm",
    "xlm-roberta-xl",
    "data2vec-text",
    "mpnet",
    "longformer",
    "ibert",
    "bigbird",
}  # fmt: skip  (two positions are kept for padding)


@dataclass(frozen=True)
class BaseFacts:
    """kind: one of the four above. positions: the most tokens of an example that the model takes; None: no limit."""

    model: str
    kind: str
    config: Any
    positions: int | None


@dataclass(frozen=True)
class _Named:
    """As much of a recipe as loading a configuration needs."""

    model: str
    trust_remote_code: bool


def read_base(model: str, trust_remote_code: bool = False) -> BaseFacts:
    """Load the configuration of a model. Raises RecipeError if it can't be loaded."""
    config = bases.load_config(_Named(model, trust_remote_code))  # type: ignore[arg-type]
    kind = kind_of(config)
    return BaseFacts(model, kind, config, _positions(config, kind))


def kind_of(config: Any) -> str:
    """The kind of model that a configuration is of, by the architecture it names and by transformers' tables."""
    from transformers.models.auto import modeling_auto as tables

    names = getattr(config, "architectures", None) or []
    classifies_images = type(config) in tables.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    if classifies_images or config.model_type in (TIMM, bases.SMALL_CNN):
        return IMAGES
    if getattr(config, "is_encoder_decoder", False):
        return ENCODER_DECODER
    if any("CausalLM" in name or "LMHeadModel" in name for name in names):
        return CAUSAL
    masked = type(config) in tables.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    return CAUSAL if type(config) in tables.MODEL_FOR_CAUSAL_LM_MAPPING and not masked else ENCODER


def _positions(config: Any, kind: str) -> int | None:
    if kind == IMAGES:
        return None
    if kind == ENCODER_DECODER:
        return min((limit for limit in encoder_decoder_limits(config) if limit), default=None)
    limit = position_limit(config.get_text_config())
    return limit - 2 if limit and config.model_type in _OFFSET and limit > 2 else limit


def tokenizer_of(recipe: Recipe) -> Any:
    """The tokenizer of a recipe's base; None for images."""
    return None if recipe.task == "image-classification" else bases.load_tokenizer(recipe)
