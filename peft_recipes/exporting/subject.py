"""What is exported: a saved adapter with its base, or a full fine-tune, and its tokenizer and prompts."""

from __future__ import annotations

import functools
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.adapters.merge import public_name
from peft_recipes.adapters.open import OpenedAdapter, open_adapter, short_names
from peft_recipes.adapters.saved import CONFIG, RECIPE_FILE
from peft_recipes.errors import RecipeError
from peft_recipes.models import bases
from peft_recipes.runs.folder import resolved_recipe
from peft_recipes.scoring.generation import end_token_ids

if TYPE_CHECKING:
    from torch import nn

FULL = "full"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_BASE_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.model")


@dataclass
class Subject:
    """opened: the adapter; None for a full fine-tune, whose weights are in the folder itself."""

    folder: Path
    opened: OpenedAdapter | None = None
    trust_remote_code: bool = False

    @property
    def method(self) -> str:
        return self.opened.saved.method if self.opened else FULL

    @property
    def title(self) -> str:
        """A name for people: recipe and arm of a run, else the folder's."""
        name = short_names([self.folder])[0]
        return f"{self.opened.recipe.name} {name}" if self.opened and self.opened.saved.is_run else name

    @property
    def base(self) -> str:
        """The base's name, for a file that may leave this machine."""
        return public_name(self.opened.base_name if self.opened else str(self.folder))

    @property
    def base_argument(self) -> str:
        """What a server takes for the base: a Hub id or a folder of this machine."""
        if self.opened is None:
            return str(self.folder)
        return self.opened.base_location().removesuffix(self.opened.quantise or "")

    @functools.cached_property
    def config(self) -> Any:
        if self.opened is not None:
            return bases.load_config(self.opened.recipe)
        from transformers import AutoConfig

        with bases.hub_errors("model", str(self.folder)):
            return AutoConfig.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)

    @functools.cached_property
    def tokenizer(self) -> Any:
        if self.opened is not None:
            return self.opened.processor
        from transformers import AutoTokenizer

        with bases.hub_errors("tokenizer of model", str(self.folder)):
            return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)

    @functools.cached_property
    def chats(self) -> bool:
        """Whether prompts go through the chat template, as in its training."""
        if self.tokenizer.chat_template is None:
            return False
        path = self.folder / RECIPE_FILE
        task = self.opened.recipe.task if self.opened else resolved_recipe(path).task if path.is_file() else "sft"
        return task != "language-modeling"

    def check_language_model(self, server: str) -> None:
        """Raise RecipeError for a model that is no causal language model."""
        if self.opened is not None and (not self.opened.generates or self.opened.encodes):
            raise RecipeError(
                f"{self.folder} is for {self.opened.recipe.task}: {server} takes adapters of causal language models."
            )
        names = list(getattr(self.config, "architectures", None) or ())
        if self.opened is None and not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
            raise RecipeError(
                f"{self.folder} is a {' '.join(names) or 'model'}: {server} takes causal language models."
            )

    def load(self) -> nn.Module:
        """Load the model in fp32, in evaluation mode: the adapter on its (dequantised) base, or the full fine-tune."""
        if self.opened is not None:
            return self.opened.attach(self.opened.load_base(dequantise=True))
        return self._load_full()

    def _load_full(self) -> nn.Module:
        import torch
        from transformers import AutoModelForCausalLM

        with bases.hub_errors("model", str(self.folder)):
            return AutoModelForCausalLM.from_pretrained(
                self.folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=self.trust_remote_code
            ).eval()

    def ends(self, model: nn.Module) -> set[int]:
        """The tokens that end an answer, as in `generate`."""
        own = self.opened is None or self.opened.has_own_tokenizer
        return end_token_ids(model) | ({self.tokenizer.eos_token_id} - {None} if own else set())

    def stage_base(self, stage: Path) -> None:
        """Put the files of the base, or of the full fine-tune, into a folder: links to weights that are on disk.

        A base that was quantised in training is saved dequantised: its adapter was trained on these weights.
        """
        location = self.folder if self.opened is None else Path(self.base_argument)
        if self.opened is not None and (self.opened.quantise or getattr(self.config, "quantization_config", None)):
            model = self.opened.load_base(dequantise=True)
            getattr(model, "save_pretrained")(stage)  # noqa: B009  (nn.Module has no such method)
            return
        if not location.is_dir():
            location = _hub_folder(str(location), self.trust_remote_code)
        for path in {each for pattern in _BASE_FILES for each in location.glob(pattern)}:
            if path.suffix == ".safetensors":
                (stage / path.name).symlink_to(path.resolve())
            else:
                shutil.copy(path, stage / path.name)

    def prompt_ids(self, text: str, tokenizer: Any = None) -> list[int]:
        """Tokenise a prompt as in training. tokenizer: another than its own, to compare."""
        tokenizer = tokenizer or self.tokenizer
        if self.chats:
            messages = [{"role": "user", "content": text}]
            options = {"tokenize": True, "return_dict": False, "add_generation_prompt": True}
            return list(tokenizer.apply_chat_template(messages, **options))
        return list(tokenizer(text)["input_ids"])


def open_subject(folder: str | Path, base: str | None, *, full_too: bool, trust_remote_code: bool = False) -> Subject:
    """Open what is to be exported. full_too: take a full fine-tune as well as an adapter.

    Raises RecipeError: no adapter, a full fine-tune where an adapter is wanted, no such base.
    """
    folder = Path(folder)
    if (folder / CONFIG).is_file() or not (folder / "config.json").is_file():
        opened = open_adapter(folder, base, trust_remote_code=trust_remote_code)
        return Subject(folder, opened, trust_remote_code)
    if not any((folder / name).is_file() for name in _WEIGHTS):
        raise RecipeError(f"{folder} has a config.json and no weights in safetensors, so there is nothing to export.")
    if not full_too:
        raise RecipeError(
            f"{folder} holds a full model, not an adapter. `export {folder} --to gguf --merged` takes a full model; "
            "`peft-recipes extract` makes a LoRA of a full run."
        )
    if base:
        raise RecipeError(f"--base {base}: {folder} holds a full model, which needs no base.")
    return Subject(folder, None, trust_remote_code)


def _hub_folder(name: str, trust_remote_code: bool) -> Path:
    """The cached folder of a model from the Hub, which was loaded before."""
    from huggingface_hub import snapshot_download

    with bases.hub_errors("model", name):
        return Path(snapshot_download(name, allow_patterns=list(_BASE_FILES)))
