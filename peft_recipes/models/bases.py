"""The base, i.e. the pretrained model under the adapters: load its configuration, weights and tokenizer."""

from __future__ import annotations

import contextlib
import glob
import re
from collections.abc import Iterator
from http.client import responses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.errors import RecipeError
from peft_recipes.models import hub
from peft_recipes.models.architecture_table import head_modules
from peft_recipes.models.chat_templates import set_chat_template
from peft_recipes.models.generation_defaults import keep_generation_defaults
from peft_recipes.recipe.dataset import EMBEDDED
from peft_recipes.recipe.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SMALL_CNN = "small-cnn"
_UNREACHABLE = {  # exceptions of httpx, requests and huggingface_hub
    *("LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectionError", "ConnectTimeout"),
    *("ReadTimeout", "ProxyError", "MaxRetryError"),
}


def is_local(path: str) -> bool:
    """Whether a model or dataset string is a local path (or pattern of paths) rather than a Hub id."""
    return path.startswith((".", "/", "~")) or glob.has_magic(path) or Path(path).exists()


def location(model: str) -> str:
    """Return what `from_pretrained` takes for a recipe's `model`; an embedded stand-in is built on first use.

    Raises RecipeError if a local folder has no config.json.
    """
    if model.startswith(EMBEDDED):
        from peft_recipes.embedded.stand_ins import model_folder

        return str(model_folder(model.removeprefix(EMBEDDED)))
    if is_local(model):
        folder = Path(model).expanduser()
        if not (folder / "config.json").is_file():
            raise RecipeError(f"model '{model}': no config.json there, so it is not a transformers model folder.")
        return str(folder)
    return model


def load_config(recipe: Recipe, **options: Any) -> PretrainedConfig:
    """Load the base's configuration. options: passed to it (num_labels, id2label, ...)."""
    from transformers import AutoConfig

    from peft_recipes.models.small_cnn import SmallCnnConfig  # the import registers it with the Auto classes

    if recipe.model == SMALL_CNN:
        return SmallCnnConfig(**options)
    path = location(recipe.model)
    with hub_errors("model", recipe.model):
        return AutoConfig.from_pretrained(path, trust_remote_code=recipe.trust_remote_code, **options)


def load_model(
    recipe: Recipe, auto_class: Any, *, folder: str | Path | None = None, quantise: str | None = None, **options: Any
):
    """Load the base in fp32, or with quantised linear layers; return it with the names of newly initialised weights.

    auto_class: AutoModelForCausalLM, AutoModelForSequenceClassification, ... folder: a pretrained base to load instead
    of the recipe's model. quantise: "nf4" or "int8"; a base that is stored so stays so, and is dequantised where None
    is asked for. Weights are fp32 whatever the checkpoint's dtype: the full arm
    needs fp32 master weights, and every arm must start from the same values. A classifier's head for other classes
    (ImageNet's 1,000) is replaced by a new one. Raises RecipeError for any other weight of another shape.
    """
    import torch

    import peft_recipes.models.small_cnn  # noqa: F401  (registers it with the Auto classes)
    from peft_recipes.kernels import activations, onednn_linear
    from peft_recipes.models import quantisation
    from peft_recipes.models.batch_norms import correct_momentum

    path = str(folder) if folder is not None else location(recipe.model)
    config = load_config(recipe, **options) if folder is None and recipe.model != SMALL_CNN else None
    stored = quantisation.stored_quantisation(config, recipe.model) if config is not None else None
    if stored:
        options = quantisation.stored_options(recipe, config, stored)
    elif quantise:
        options |= quantisation.loading_options(recipe, load_config(recipe), quantise)
    with hub_errors("model", recipe.model):
        model, info = auto_class.from_pretrained(
            path,
            dtype=torch.float32,
            trust_remote_code=recipe.trust_remote_code,
            output_loading_info=True,
            use_safetensors=True,  # never unpickle weights
            ignore_mismatched_sizes=True,  # such weights are newly initialised; outside a new head they are an error
            **({"attn_implementation": recipe.attention} if recipe.attention else {}),
            **options,
        )
    mismatched = sorted(str(k[0] if isinstance(k, tuple) else k) for k in info.get("mismatched_keys", ()))
    replaced = tuple(f"{name}." for name in head_modules(model)) if recipe.task.endswith("classification") else ()
    if wrong := [name for name in mismatched if not name.startswith(replaced)]:
        raise RecipeError(f"model '{recipe.model}': {len(wrong)} weights have another shape, first {wrong[0]}.")
    correct_momentum(model)
    if model.config.is_encoder_decoder:
        start = decoder_start(model.config, recipe.model)
        model.config.decoder_start_token_id = start
        if getattr(model, "generation_config", None) is not None:  # a classifier has none
            model.generation_config.decoder_start_token_id = start
    keep_generation_defaults(model)
    activations.fuse(model)
    onednn_linear.speed_up(model)
    quantisation.disable_bf16_kernels(model)
    quantisation.check_nf4_widths(model, recipe.model)
    if stored:
        quantisation.compute_as_chosen(model, recipe)
        model = model if quantise else quantisation.dequantised(model)
    return model, sorted({*info["missing_keys"], *mismatched})


def load_tokenizer(recipe: Recipe, folder: Path | None = None) -> PreTrainedTokenizerBase:
    """Load the base's tokenizer, padding on the right; without a padding token it uses the end-of-text token.

    Its chat template is the recipe's, where it gives one. folder: of an adapter that brings a tokenizer of its own.
    """
    from transformers import AutoTokenizer

    load_config(recipe)  # fails here if the model is missing; AutoTokenizer would query the Hub again
    with hub_errors("tokenizer of model", recipe.model if folder is None else str(folder)):
        place = location(recipe.model) if folder is None else str(folder)
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=recipe.trust_remote_code)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise RecipeError(f"model '{recipe.model}': its tokenizer has neither a padding nor an end-of-text token.")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    set_chat_template(tokenizer, recipe.dataset.chat_template)
    return tokenizer


def stored_dtype(recipe: Recipe) -> str:
    """Return what a base's weights are stored in ("float32", "bfloat16", "float16"), as its config.json says.

    "float32" where it does not say, and for any other.
    """
    config = load_config(recipe)
    name = str(getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)).removeprefix(
        "torch."
    )
    return name if name in ("bfloat16", "float16") else "float32"


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the token ids that end a text: the tokenizer's EOS token and the end-of-turn tokens in its vocabulary."""
    vocabulary = tokenizer.get_vocab()
    turns = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "</s>")
    return {vocabulary[t] for t in turns if t in vocabulary} | ({tokenizer.eos_token_id} - {None})


def decoder_start(config: PretrainedConfig, model: str) -> int:
    """Return the token that an encoder-decoder's answers begin with: as configured, else its BOS or padding token.

    Raises RecipeError if the configuration of `model` names none of them.
    """
    names = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
    token = next((token for name in names if (token := getattr(config, name, None)) is not None), None)
    if token is None:
        raise RecipeError(
            f"model '{model}': its configuration has no decoder_start_token_id, by which an answer begins. Set it in "
            "the base's config.json (T5's is its padding token)."
        )
    return token


def set_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set the tokenizer's padding token in the model's config: classifiers find a text's last token by it."""
    model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


@contextlib.contextmanager
def hub_errors(what: str, name: str) -> Iterator[None]:
    """Turn errors of the Hub's libraries about `name` into one RecipeError: what happened and what to do."""
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
    _, classes, status = hub.error_chain(error)
    text = " ".join(str(error).split())[:300]
    subject, stand_ins = f"{what} '{name}'", "run on stand-ins that need no Hub with --embedded."
    offline = bool(classes & _UNREACHABLE) or "couldn't connect" in text.lower() or "couldn't reach" in text.lower()
    if "GatedRepoError" in classes:
        return f"{subject} is gated: accept its terms on its Hub page, then log in with `hf auth login`."
    if classes & {"RepositoryNotFoundError", "DatasetNotFoundError", "RevisionNotFoundError"} and not offline:
        return (
            f"{subject} does not exist on the Hub, or is private and you are not logged in (`hf auth login`). "
            f"Check the spelling; a local folder is given by its path (./{name})."
        )
    if status == 429 or status >= 500:
        answer = f"{status} ({responses.get(status, 'no standard status')})"
        return f"{subject}: the Hub answered {answer}, also after retries. Try later, or {stand_ins}"
    if classes & {"ReadTimeout", "WriteTimeout"}:
        return (
            f"{subject}: the Hub did not answer in time, also after retries. Try later, set longer timeouts "
            f"(HF_HUB_DOWNLOAD_TIMEOUT=60 and HF_HUB_ETAG_TIMEOUT=60, in seconds), or {stand_ins}"
        )
    if offline:
        return (
            f"{subject}: the Hub can't be reached. Check the network (or HF_HUB_OFFLINE, HF_ENDPOINT), or {stand_ins}"
        )
    if re.search(r"\btimm\b|torchvision", text) and isinstance(error, (ImportError, RuntimeError)):
        return (
            f"{subject} is a model of timm: pip install timm torchvision (the build of torchvision for the installed "
            "torch), or name a model of transformers."
        )
    if "HfHubHTTPError" in classes:
        return f"{subject}: the Hub answered with an error: {text}"
    if "instantiate the backend tokenizer" in text:
        return (
            f"{subject} can't be loaded: there is no tokenizer.json (nor another file that transformers makes one of). "
            "Copy the tokenizer's files there, from the model that it was trained from."
        )
    if isinstance(error, OSError) and "safetensors" in text:
        return f"{subject} has no weights in safetensors; pickled weights are never loaded. ({text})"
    if unsupported := re.match(r"Unrecognized configuration class .*\.(\w+)Config'> .*: (\w+)\.", text):
        architecture, auto_class = unsupported.groups()
        return f"{subject}: transformers has no {auto_class} of {architecture}. Choose another base, or another task."
    if isinstance(error, (OSError, ValueError)) and not isinstance(error, (PermissionError, MemoryError)):
        return f"{subject} can't be loaded: {text}"
    return ""
