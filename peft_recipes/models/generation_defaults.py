"""Save a base's generation defaults as they came, also where transformers refuses a changed file that has them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel


def keep_generation_defaults(model: PreTrainedModel) -> None:
    """Let the model be saved with the sampling defaults that its generation_config.json came with.

    Many bases have temperature and top_p there without do_sample. transformers saves such a configuration as long as
    nothing in it has changed, and refuses it once a padding or end token is set, as it is in training.
    """
    config = getattr(model, "generation_config", None)
    lenient = _lenient_class()
    if config is None or type(config) is not lenient.__base__:  # a model with generation options of its own
        return
    try:
        config.validate(strict=True)
    except ValueError:
        config.__class__ = lenient


@functools.cache
def _lenient_class() -> type[GenerationConfig]:
    from transformers import GenerationConfig

    class KeptGenerationConfig(GenerationConfig):
        """A GenerationConfig that may hold sampling options while it does not sample."""

        def validate(self, strict: bool = False, **options: Any) -> None:
            """Check everything but such leftovers. Raises ValueError for values that `generate` can't take."""
            super().validate(strict=False, **options)

    return KeptGenerationConfig
