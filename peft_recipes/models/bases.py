"""The base: the pretrained model the adapters sit on. Where it lies, its configuration, its weights, its tokenizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.errors import RecipeError
from peft_recipes.models import hub
from peft_recipes.recipe.dataset import EMBEDDED
from peft_recipes.recipe.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SMALL_CNN = "small-cnn"


def is_local(path: str) -> bool:
    """Whether a model or dataset string names a place on this machine rather than a Hub id."""
    return path.startswith((".", "/", "~")) or Path(path).exists()


def location(model: str) -> str:
    """What from_pretrained takes for a recipe's `model`; an embedded stand-in is made on first use."""
    if model.startswith(EMBEDDED):
        from peft_recipes.embedded.stand_ins import model_folder

        return str(model_folder(model.removeprefix(EMBEDDED)))
    if is_local(model):
        folder = Path(model).expanduser()
        if not (folder / "config.json").is_file():
            raise RecipeError(f"model '{model}': no config.json there, so it is no folder of a transformers model.")
        return str(folder)
    return model


def load_config(recipe: Recipe, **options: Any) -> PretrainedConfig:
    """The base's configuration, no weights. options: passed to it (num_labels, id2label, ...)."""
    from transformers import AutoConfig

    from peft_recipes.models.small_cnn import SmallCnnConfig  # registered with the Auto classes by its import

    if recipe.model == SMALL_CNN:
        return SmallCnnConfig(**options)
    where = location(recipe.model)
    with hub_errors("model", recipe.model):
        return AutoConfig.from_pretrained(where, trust_remote_code=recipe.trust_remote_code, **options)


def load_model(
    recipe: Recipe, auto_class: Any, *, folder: str | Path | None = None, quantise: str | None = None, **options: Any
):
    """The base with its weights in fp32, or its linear layers quantised, and whether its head is new.

    auto_class: AutoModelForCausalLM, AutoModelForSequenceClassification, ... folder: load from here instead of the
    recipe's model (a base that was trained first). Weights are fp32 whatever the checkpoint holds: the full arm keeps
    fp32 master weights, and every arm must start from the same numbers. quantise: "nf4" or "int8". Returns (model,
    names of newly made weights).
    """
    import torch

    import peft_recipes.models.small_cnn  # noqa: F401  (registers it with the Auto classes)
    from peft_recipes.kernels import activations, onednn_linear
    from peft_recipes.models import quantisation

    where = str(folder) if folder is not None else location(recipe.model)
    if quantise:
        options |= quantisation.loading_options(recipe, load_config(recipe), quantise)
    with hub_errors("model", recipe.model):
        model, info = auto_class.from_pretrained(
            where,
            dtype=torch.float32,
            trust_remote_code=recipe.trust_remote_code,
            output_loading_info=True,
            use_safetensors=True,  # a pickle is never loaded
            **({"attn_implementation": recipe.attention} if recipe.attention else {}),
            **options,
        )
    new = sorted(info["missing_keys"])
    wrong = sorted(str(k[0] if isinstance(k, tuple) else k) for k in info.get("mismatched_keys", ()))
    if wrong:
        raise RecipeError(f"model '{recipe.model}': {len(wrong)} weights have another shape, first {wrong[0]}.")
    activations.fuse(model)
    onednn_linear.speed_up(model)
    quantisation.keep_exact(model)
    quantisation.check_rows(model, recipe.model)
    return model, new


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with a padding token: where it has none, its end-of-text token serves (masked by place)."""
    from transformers import AutoTokenizer

    load_config(recipe)  # a model that is not to be had is found here; AutoTokenizer would go on and ask a second time
    with hub_errors("tokenizer of model", recipe.model):
        tokenizer = AutoTokenizer.from_pretrained(location(recipe.model), trust_remote_code=recipe.trust_remote_code)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise RecipeError(f"model '{recipe.model}': its tokenizer has neither a padding nor an end-of-text token.")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that end a text: the tokenizer's own, and the usual ends of a turn where it knows them."""
    known = tokenizer.get_vocab()
    turns = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "</s>")
    return {known[t] for t in turns if t in known} | ({tokenizer.eos_token_id} - {None})


def set_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """The model must know the padding token as well: GPT-2 and Llama find a text's last token by it."""
    model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


@contextlib.contextmanager
def hub_errors(what: str, name: str) -> Iterator[None]:
    """Turns what the Hub's libraries raise about `name` into one RecipeError: what happened and what to do."""
    if not (is_local(name) or name.startswith(EMBEDDED) or name == SMALL_CNN):
        hub.offline_if_unreachable()
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:
        if message := _explain(what, name, error):
            raise RecipeError(message) from error
        raise


def _explain(what: str, name: str, error: Exception) -> str:
    _, kinds, status = hub.behind(error)
    text = " ".join(str(error).split())[:300]
    if kinds & {"GatedRepoError"}:
        return f"{what} '{name}' is gated: accept its terms on its Hub page, then log in with `hf auth login`."
    if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError", "RevisionNotFoundError"} and not _offline(
        kinds, text
    ):
        return (
            f"{what} '{name}' does not exist on the Hub, or is private and you are not logged in (`hf auth login`). "
            f"Check the spelling; a local folder is given by its path (./{name})."
        )
    if status == 429 or status >= 500:
        return (
            f"{what} '{name}': the Hub answered {status} ({HTTPStatus(status).phrase}), also when asked again. Try "
            "later, or run on stand-ins that need no Hub with --embedded."
        )
    if kinds & {"ReadTimeout", "WriteTimeout"}:
        return (
            f"{what} '{name}': the Hub did not answer in time, also when asked again. Try later, give it longer "
            "(HF_HUB_DOWNLOAD_TIMEOUT=60 and HF_HUB_ETAG_TIMEOUT=60, in seconds), or run on stand-ins that need no Hub "
            "with --embedded."
        )
    if _offline(kinds, text):
        return (
            f"{what} '{name}': the Hub can't be reached. Check the network (or HF_HUB_OFFLINE, HF_ENDPOINT), "
            "or run on stand-ins that need no Hub with --embedded."
        )
    if "HfHubHTTPError" in kinds:
        return f"{what} '{name}': the Hub answered with an error: {text}"
    if isinstance(error, OSError) and ("safetensors" in text or "model.safetensors" in text):
        return f"{what} '{name}' has no weights in safetensors; a pickle is not loaded. ({text})"
    if isinstance(error, (OSError, ValueError)) and not isinstance(error, (PermissionError, MemoryError)):
        return f"{what} '{name}' can't be loaded: {text}"
    return ""


def _offline(kinds: set[str], text: str) -> bool:
    unreachable = {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectionError",
                   "ConnectTimeout", "ReadTimeout", "ProxyError", "MaxRetryError"}  # fmt: skip
    return bool(kinds & unreachable) or "couldn't connect" in text.lower() or "couldn't reach" in text.lower()
